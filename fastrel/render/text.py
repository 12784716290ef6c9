"""Relevance of words as a web page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence

import matplotlib
import numpy as np
from torch import Tensor

from fastrel.errors import InputError

_SPECIAL = {"[CLS]", "[SEP]", "[PAD]", "[MASK]", "<s>", "</s>", "<pad>", "<|endoftext|>", "<unk>", "<bos>", "<eos>"}
_COLORMAP = "YlOrRd"

#: With `body`.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fastrel</title>
<style>
body {{ font: 18px/1.9 Georgia, serif; max-width: 46em; margin: 2em auto; padding: 0 1em; color: #222; }}
h2 {{ font: 600 15px/1.4 system-ui, sans-serif; margin: 1.6em 0 .4em; }}
h3 {{ font: 13px/1.4 system-ui, sans-serif; margin: 1em 0 .2em; color: #555; }}
img {{ max-width: 100%; margin-right: .4em; }}
span {{ padding: .15em .2em; border-radius: .2em; }}
footer {{ font: 13px system-ui, sans-serif; color: #777; margin-top: 2em; }}
</style></head><body>
{body}
<footer>Each map is scaled by its own highest value. Hover over a word for its share of the whole.</footer>
</body></html>
"""


def _byte_of() -> dict[str, int]:
    """Byte-level BPE writes a byte as a character: itself where it can be seen, else one from 256 on, in order."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_of()


def _decoded(word: str) -> str:
    """A word of byte-level BPE as a person writes it."""
    if any(character not in _BYTE_OF for character in word):
        return word
    return bytes(_BYTE_OF[character] for character in word).decode("utf-8", "replace").strip()


def words(tokens: Sequence[str], relevance: Tensor | np.ndarray) -> list[tuple[str, float]]:
    """Whole words and their relevance: sub-words are joined and count as the highest of them; special tokens are left out.

    tokens: T strings as a tokenizer returns them, with the marks of WordPiece (##), byte-level BPE (Ġ) or
    SentencePiece (▁). relevance: [T].

    Raises:
        InputError: there are not as many tokens as relevances.
    """
    if len(tokens) != len(relevance):
        raise InputError(f"{len(tokens)} tokens but relevance for {len(relevance)}")
    marked = any(token.startswith(("Ġ", "▁")) for token in tokens)
    found: list[tuple[str, float]] = []
    apart = False  # after a token that is nothing but a blank
    for token, value in zip(tokens, relevance.tolist(), strict=True):
        if token in _SPECIAL:
            continue
        continues = token.startswith("##") or (marked and not token.startswith(("Ġ", "▁", "Ċ")))
        text = token[2:] if token.startswith("##") else token.lstrip("Ġ▁")
        continues, apart = continues and not apart, not text
        if continues and found:
            word, before = found[-1]
            found[-1] = (word + text, max(before, value))
        elif text:
            found.append((text, value))
    if any(token.startswith(("Ġ", "Ċ")) for token in tokens):
        found = [(_decoded(word) or "↵", value) for word, value in found]
    return found


def paragraph(tokens: Sequence[str], relevance: Tensor) -> str:
    """Words of a text as HTML, coloured by their relevance [T]."""
    found = words(tokens, relevance)
    highest = max((value for _, value in found), default=0.0)
    total = sum(value for _, value in found)
    spans = []
    for word, value in found:
        level = max(value, 0.0) / highest if highest > 0 else 0.0
        red, green, blue, _ = (round(255 * c) for c in matplotlib.colormaps[_COLORMAP](0.85 * level))
        ink = "#fff" if level > 0.75 else "#222"
        style = f"background: rgba({red},{green},{blue},{min(1.0, 1.4 * level):.3f}); color: {ink}"
        share = f"{value / total:.1%}" if total > 0 else "0 %"
        spans.append(f'<span style="{style}" title="{share}">{html.escape(word)}</span>')
    return f"<p>{' '.join(spans)}</p>"
