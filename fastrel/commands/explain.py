"""`fastrel explain`: overlays for pictures, pages for texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastrel.batch import Explain
from fastrel.batch.decoding import Decoded
from fastrel.batch.local import explained
from fastrel.batch.row import Row
from fastrel.commands import options as shared
from fastrel.commands.drawing import draw, endings, text_page
from fastrel.commands.outputs import Outputs
from fastrel.data import files, inputs
from fastrel.data.inputs import Item, Value
from fastrel.data.preprocessing import shown
from fastrel.errors import InputError
from fastrel.render.overlay import STYLES
from fastrel.render.text import words

HELP = "explain pictures or texts with a model of yours"
EPILOG = """\
The same command again explains what is missing. For thousands of items, see fastrel batch.

examples:
  fastrel explain scene.png --out maps                                      the embedded model
  fastrel explain photos/ *.jpg --model vit_base_patch16_224 --out maps     timm, pretrained weights
  fastrel explain cat.jpg --model deit_tiny_patch16_224 --weights deit.pth --target 281 tiger --out maps --npz
  fastrel explain --text "not bad at all" --model ./my-bert --target 0 1 --out map.html
  fastrel explain reviews.csv --column text --model ./my-bert --out pages
"""
_RENDERERS = 2


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    shared.inputs(parser, required=False)
    parser.add_argument("--text", help="a text to explain instead of inputs")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="folder for overlays or pages; with --text an .html file"
    )
    parser.add_argument("--style", default="blend", choices=list(STYLES), help="default: %(default)s")
    parser.add_argument("--npz", action="store_true", help="also write the raw maps, one .npz per item")
    shared.model(parser)
    shared.method(parser)
    shared.explaining(parser)


def run(options: argparse.Namespace) -> int:
    """Dispatch on what is to be explained; 1 if some items failed, 2 if all did."""
    if options.text is not None:
        return _text(options)
    if not options.inputs:
        raise InputError("nothing to explain: give picture files, or --text")
    explain = Explain(**vars(shared.settings(options)))
    content: inputs.Content = "image" if explain.loaded.kind == "image" else "text"
    found = inputs.find(options.inputs, content, options.column)
    if not found.items:
        raise InputError(f"nothing to explain in {' '.join(options.inputs)}: no {content}s")
    settings = explain.settings.describe(explain.loaded) | {"style": options.style, "npz": options.npz}
    outputs = Outputs(options.out, settings)
    todo = [item for item in found.items if not outputs.done(item)]
    if len(todo) < len(found.items):
        print(f"{len(found.items) - len(todo)} of {len(found.items)} were explained before")
    failures = explain_all(options, explain, todo, outputs)
    for name, reason in failures.items():
        print(f"fastrel: not explained: {name}: {reason}", file=sys.stderr)
    return 0 if not failures else 2 if len(failures) == len(found.items) else 1


def explain_all(options: argparse.Namespace, explain: Explain, todo: Sequence[Item], outputs: Outputs) -> dict[str, str]:
    """Explain items while others are decoded and drawn; the failures, with the reason."""
    size = options.batch_size
    batches = [todo[at : at + size] for at in range(0, len(todo), size)]
    stream = explained(explain, batches, options.workers, noise=explain.settings.rules == "official")
    failures: dict[str, str] = {}
    with (
        tqdm(total=len(todo), unit="item", disable=len(todo) < 2) as bar,
        ThreadPoolExecutor(_RENDERERS) as renderers,
    ):
        drawing: list[tuple[Item, list[Row], list[Path], Future[None]]] = []

        def finish(waiting: int) -> None:
            while len(drawing) > waiting:
                item, rows, paths, drawn = drawing.pop(0)
                try:
                    drawn.result()
                except InputError as error:
                    failures[item.name] = str(error)
                    continue
                outputs.finish(item)
                bar.write(_report(item, rows, explain.loaded.class_names, paths))

        for batch, (ready, made) in zip(batches, stream, strict=True):
            for item, found, rows in zip(batch, ready, _grouped(made), strict=True):
                if wrong := next((row.error for row in rows if row.error is not None), None):
                    failures[item.name] = wrong
                    continue
                paths = outputs.claim(item, endings(rows, options.npz))
                picture = _seen(explain, found)
                drawing.append((item, rows, paths, renderers.submit(draw, rows, picture, paths, options.style)))
            bar.update(len(batch))
            finish(2 * size)
        finish(0)
    return failures


def _grouped(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows of each item."""
    return (list(own) for _, own in groupby(rows, lambda row: row.item))


def _seen(explain: Explain, item: Decoded) -> Image.Image | None:
    """The picture as the model saw it; None for texts."""
    if explain.loaded.kind != "image":
        return None
    prepare = explain.loaded.reader.prepare
    (x,) = item.samples[0].values()
    return shown(x, prepare.mean, prepare.std)


def _report(item: Item, rows: Sequence[Row], names: Sequence[str], paths: Sequence[Path]) -> str:
    """The top classes of an item, and where its files are."""
    logits = np.asarray(rows[0].logits)
    top = ", ".join(f"{c} {names[c] if c < len(names) else ''} {logits[c]:.2f}" for c in logits.argsort()[::-1][:5])
    notes = f"\n  note: {'; '.join(rows[0].notes)}" if rows[0].notes else ""
    return f"{item.name}\n  top classes (logits): {top}{notes}{_noise(rows)}\n  -> {', '.join(map(str, paths))}"


def _noise(rows: Sequence[Row]) -> str:
    """How far the maps depend on rounding, where that was measured."""
    if rows[0].noise is None:
        return ""
    floors = ", ".join(f"{100 * (row.noise or 0):.2g} %" for row in rows)
    return (
        f"\n  noise floor: {floors} (how far rounding alone moves these maps; under --rules positive it is next to nothing)"
    )


def _text(options: argparse.Namespace) -> int:
    """One text, one page."""
    if options.inputs:
        raise InputError(f"give images or --text, not both ({options.inputs[0]!r} was given as an image)")
    out = Path(options.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"with --text, --out must name an .html file, not {options.out!r}")
    if not options.model:
        raise InputError("--text needs --model, the name or folder of a Hugging Face classifier")
    if not options.text.strip():
        raise InputError("--text is empty")
    explain = Explain(**vars(shared.settings(options)))
    ((_, rows),) = explained(explain, [[Item("text", Value(options.text))]], 0, noise=options.rules == "official")
    if rows[0].error is not None:
        raise InputError(rows[0].error)
    if rows[-1].window:
        raise InputError("--text reads one window; give longer texts as files, in a folder or a table")
    files.folder(out.parent)
    files.write(out, text_page(rows))
    print("classes: " + ", ".join(_chances(explain, rows[0])))
    for row in rows:
        best = sorted(words(row.tokens or [], np.asarray(row.relevance)), key=lambda found: -found[1])[:5]
        print(f"{row.target_name}: " + ", ".join(word for word, _ in best) + _noise([row]))
    print(f"-> {out}")
    return 0


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
