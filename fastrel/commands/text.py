"""`fastrel explain --text`: one text, one page; of a language model also what it goes on with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastrel.batch import Explain
from fastrel.batch.row import Row
from fastrel.batch.stream import explained
from fastrel.commands import options as shared
from fastrel.commands.drawing import noise_floor, npz, raw, text_page
from fastrel.data import files
from fastrel.data.inputs import Item, Pair, Value
from fastrel.errors import InputError
from fastrel.models import Loaded
from fastrel.models.readers import TEXTS
from fastrel.render.parts import page
from fastrel.render.text import words


def configure(parser: argparse.ArgumentParser) -> None:
    """What --text goes with."""
    parser.add_argument("--text-pair", metavar="TEXT", help="a second text, which the model reads together with --text")
    group = parser.add_argument_group("language models, with --text")
    group.add_argument(
        "--generate", type=shared.positive, metavar="N", help="explain each of the N tokens that the model goes on with"
    )
    group.add_argument("--continuation", metavar="TEXT", help="explain each token of this continuation instead")


def run(options: argparse.Namespace) -> int:
    """Explain one text and write its page."""
    out = Path(options.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"with --text, --out must name an .html file, not {options.out!r}")
    if not options.model:
        raise InputError("--text needs --model, the name or folder of a Hugging Face classifier or language model")
    if not options.text.strip():
        raise InputError("--text is empty")
    if options.text_pair is not None and not options.text_pair.strip():
        raise InputError("--text-pair is empty")
    if options.generate and options.continuation is not None:
        raise InputError("give --generate or --continuation, not both")
    explain = Explain(**vars(shared.settings(options)))
    if explain.loaded.kind not in ("text", "causal"):
        raise InputError(_reads_no_texts(options.model, explain.loaded))
    if options.generate or options.continuation is not None:
        if options.text_pair is not None:
            raise InputError("--text-pair is for classifiers of two texts; --generate and --continuation go on with one")
        return _continued(options, explain, out)
    if options.text_pair is not None and explain.loaded.kind != "text":
        raise InputError(f"--text-pair: {options.model!r} is no classifier of texts; give it --text alone")
    where = Value(options.text) if options.text_pair is None else Pair(Value(options.text), options.text_pair)
    ((_, rows),) = explained(explain, [[Item("text", where)]], 0, noise=options.rules == "official")
    if rows[0].error is not None:
        raise InputError(rows[0].error)
    if rows[-1].window:
        raise InputError("--text reads one window; give longer texts as files, in a folder or a table")
    files.folder(out.parent)
    files.write(out, text_page(rows))
    if options.npz:
        files.write(out.with_suffix(".npz"), raw(rows))
    print("classes: " + ", ".join(_chances(explain, rows[0])))
    for row in rows:
        best = _highest(row.tokens or [], np.asarray(row.relevance))
        print(f"{row.target_name}: {best}{noise_floor([row])}")
    print(f"-> {out}")
    return 0


def _reads_no_texts(name: str, loaded: Loaded) -> str:
    """What to say of a model that --text cannot be given to; of a user's function, what it would have to return."""
    if loaded.source.get("family") != "function":
        return f"--text: {name!r} does not read texts alone"
    return (
        f"--text: {name!r} returned no tokenizer, so its model is taken for one of pictures, and what else it returned for their "
        f"preprocessing; {TEXTS}"
    )


def _continued(options: argparse.Namespace, explain: Explain, out: Path) -> int:
    """The prompt's words, coloured for each token that comes after it."""
    if explain.loaded.kind != "causal":
        raise InputError(f"--generate and --continuation are for language models; {options.model!r} classifies")
    if options.target:
        raise InputError("--target names the next token; with --generate or --continuation every token is explained")
    whole: Any = explain.loaded.model  # asks for the next token only
    loaded = replace(explain.loaded, model=whole.model)
    reader: Any = loaded.reader
    (sample,) = reader(options.text)
    ids = torch.from_numpy(sample["input_ids"])[None].to(loaded.device)
    given = None if options.generate else _tokens(reader, options.continuation)
    count = options.generate if given is None else len(given)
    if ids.shape[1] + count > reader.limit:
        raise InputError(f"{ids.shape[1]} + {count} tokens, and the model reads {reader.limit}")
    after = _generated(loaded.model, ids, count) if given is None else torch.tensor([given])
    explanation = explain.settings.explainer(loaded).continuation(ids, after.to(ids.device))
    tokens = reader.tokens([*ids[0].tolist(), *after[0].tolist()])
    names = [f"{loaded.class_names[i]!r}" for i in after[0].tolist()]
    files.folder(out.parent)
    files.write(out, page(tokens, explanation.relevance[0], [f"→ {name}" for name in names]))
    if options.npz:
        relevance = explanation.relevance[0].float().cpu()
        files.write(out.with_suffix(".npz"), npz({"target": after[0].cpu(), "relevance": relevance}))
    print(f"{options.text!r} goes on with {reader.tokenizer.decode(after[0])!r}")
    for k, (name, row) in enumerate(zip(names, explanation.relevance[0].float().cpu().numpy(), strict=True)):
        before = ids.shape[1] + k  # what a token was made of
        print(f"{name}: {_highest(tokens[:before], row[:before])}")
    print(f"-> {out}")
    return 0


def _generated(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The most likely tokens after a prompt, one by one, [1, N]."""
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, num_beams=1)
    after = found[:, ids.shape[1] :].clone()
    if not after.numel():
        raise InputError("the model has nothing to add to this text")
    return after


def _tokens(reader: Any, text: str) -> list[int]:
    found = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not found:
        raise InputError("--continuation is empty")
    return found


def _highest(tokens: Sequence[str], relevance: np.ndarray) -> str:
    return ", ".join(word for word, _ in sorted(words(tokens, relevance), key=lambda found: -found[1])[:5])


def _chances(explain: Explain, row: Row) -> list[str]:
    """The highest classes with their probabilities, or logits where there are none."""
    loaded, logits = explain.loaded, torch.from_numpy(np.asarray(row.logits))
    values = logits if loaded.probabilities is None else logits.softmax(0)
    if loaded.probabilities == "sigmoid":
        values = logits.sigmoid()
    shown_as = "{:.2f}" if loaded.probabilities is None else "{:.1%}"
    top = values.topk(min(5, len(values)))
    return [
        f"{loaded.class_names[c]} {shown_as.format(v)}"
        for v, c in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]
