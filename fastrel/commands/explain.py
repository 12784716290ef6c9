"""`fastrel explain`: overlays for pictures, pages for texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastrel.batch import Explain
from fastrel.batch.decoding import Decoded
from fastrel.batch.row import Row
from fastrel.batch.stream import explained
from fastrel.commands import options as shared
from fastrel.commands import pairs, text
from fastrel.commands.drawing import draw, endings, noise_floor
from fastrel.commands.outputs import Outputs
from fastrel.data.inputs import Item
from fastrel.data.preprocessing import shown
from fastrel.errors import InputError, reason
from fastrel.render.overlay import STYLES

HELP = "explain pictures or texts with a model of yours"
EPILOG = """\
The same command again explains what is missing. For thousands of items, see fastrel batch.

examples:
  fastrel explain scene.png --out maps                                      the embedded model
  fastrel explain photos/ *.jpg --model vit_base_patch16_224 --out maps     timm, pretrained weights
  fastrel explain cat.jpg --model deit_tiny_patch16_224 --weights deit.pth --target 281 tiger --out maps --npz
  fastrel explain --text "not bad at all" --model ./my-bert --target 0 1 --out map.html
  fastrel explain --text "The capital of France is" --model ./my-gpt2 --generate 5 --out map.html
  fastrel explain --text "summarize: …" --model ./my-t5 --generate 9 --out map.html     text and answer so far
  fastrel explain cat.jpg --text "a photo of a cat" --model ./my-clip --out map.html          both maps
  fastrel explain --text "A man sleeps." --text-pair "Nobody sleeps." --model ./my-nli --out map.html
  fastrel explain reviews.csv --column text --model ./my-bert --out pages
"""
_RENDERERS = 2


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    shared.inputs(parser, required=False)
    parser.add_argument("--text", help="a text to explain instead of inputs, or with one picture")
    text.configure(parser)
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
        return pairs.run(options) if options.inputs else text.run(options)
    if options.text_pair is not None:
        raise InputError("--text-pair goes with --text, the text that is read before it")
    if options.generate or options.continuation is not None:
        raise InputError("--generate and --continuation go with --text, the text that is gone on with")
    if not options.inputs:
        raise InputError("nothing to explain: give picture files, or --text")
    explain, found = shared.asked(options)
    settings = explain.settings.describe(explain.loaded) | {"style": options.style, "npz": options.npz}
    settings |= {} if options.pair_column is None else {"pair_column": options.pair_column}
    with Outputs(options.out, settings) as outputs:
        todo = [item for item in found.items if not outputs.done(item)]
        if len(todo) < len(found.items):
            print(f"{len(found.items) - len(todo)} of {len(found.items)} were explained before")
        failures = explain_all(options, explain, todo, outputs)
    for name, why in failures.items():
        print(f"fastrel: not explained: {name}: {why}", file=sys.stderr)
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
                except (InputError, OSError) as error:
                    failures[item.name] = reason(error)
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
    if explain.loaded.kind == "multimodal":
        processor = explain.loaded.reader.processor.image_processor
        return shown(item.samples[0]["pixel_values"], processor.image_mean, processor.image_std)
    if explain.loaded.kind != "image":
        return None
    prepare = explain.loaded.reader.prepare
    (x,) = item.samples[0].values()
    return shown(x, prepare.mean, prepare.std)


def _report(item: Item, rows: Sequence[Row], names: Sequence[str], paths: Sequence[Path]) -> str:
    """The top classes of an item, or how well its picture and text fit, and where its files are."""
    first = rows[0]
    if first.map is not None and first.tokens is not None:
        said = f"{first.target_name}: {first.logit:.2f}"
    else:
        logits = np.asarray(first.logits)
        top = (f"{c} {names[c] if c < len(names) else ''} {logits[c]:.2f}" for c in logits.argsort()[::-1][:5])
        said = f"top classes (logits): {', '.join(top)}"
    notes = f"\n  note: {'; '.join(first.notes)}" if first.notes else ""
    return f"{item.name}\n  {said}{notes}{noise_floor(rows)}\n  -> {', '.join(map(str, paths))}"
