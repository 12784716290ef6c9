"""`fastrel explain --text`: one text, one page; of a language model also what it goes on with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastrel import language
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
from fastrel.render.parts import page_of
from fastrel.render.showing import parts_of
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
    said = _chances(explain, rows[0])
    print(f"{'classes' if len(said) > 1 else 'score'}: {', '.join(said)}")
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
    answers = language.answers(loaded.model)
    given = None if options.generate else _tokens(reader, options.continuation, answers)
    count = options.generate if given is None else len(given)
    if not answers and ids.shape[1] + count > reader.limit:
        raise InputError(f"{ids.shape[1]} + {count} tokens, and the model reads {reader.limit}")
    after = _generated(loaded.model, ids, count).cpu() if given is None else torch.tensor([given])
    explanation = explain.settings.explainer(loaded).continuation(ids, after.to(ids.device))
    if answers:
        texts = {"input_ids": ids, "decoder_input_ids": language.decoder_inputs(loaded.model, after)}
    else:
        texts = {"input_ids": torch.cat([ids.cpu(), after], 1)}
    tokens = {name: reader.tokens(one[0].tolist()) for name, one in texts.items()}
    names = [f"{loaded.class_names[i]!r}" for i in after[0].tolist()]
    files.folder(out.parent)
    files.write(out, page_of(parts_of(explanation.maps, None, tokens), [f"→ {name}" for name in names]))
    rows = {name: one.relevance[0].float().cpu() for name, one in explanation.maps.items()}
    if options.npz:
        held = {"relevance" if name == "input_ids" else name: x for name, x in rows.items()}
        files.write(out.with_suffix(".npz"), npz({"target": after[0], **held}))
    print(f"{options.text!r} {'is answered' if answers else 'goes on'} with {reader.tokenizer.decode(after[0])!r}")
    for k, name in enumerate(names):
        # What a token was made of, one text after the other.
        made_of = {one: k + 1 if one != "input_ids" else ids.shape[1] + k * (not answers) for one in tokens}
        before = [token for one, count in made_of.items() for token in tokens[one][:count]]
        row = torch.cat([rows[one][k, :count] for one, count in made_of.items()])
        print(f"{name}: {_highest(before, row.numpy())}")
    print(f"-> {out}")
    return 0


def _generated(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The most likely tokens after a prompt, one by one, [1, N]."""
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, num_beams=1)
    after = found[:, 1 if language.answers(model) else ids.shape[1] :].clone()
    if not after.numel():
        raise InputError("the model has nothing to add to this text")
    return after


def _tokens(reader: Any, text: str, answers: bool) -> list[int]:
    """The ids of a continuation, of an answer in the language that the model writes (Marian has a vocabulary for each)."""
    given = {"text_target": text} if answers else {"text": text}
    found = reader.tokenizer(**given, add_special_tokens=False)["input_ids"]
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
