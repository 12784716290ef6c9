"""`fastrel show`: rows of what `fastrel batch` wrote, as a list or as pictures and pages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastrel.batch import read
from fastrel.batch.row import Row
from fastrel.commands import options as shared
from fastrel.commands.drawing import draw, endings
from fastrel.commands.outputs import Outputs
from fastrel.data import inputs, pictures
from fastrel.data.preprocessing import Preprocessing
from fastrel.errors import FastrelError, InputError
from fastrel.render.overlay import STYLES

HELP = "list or render what fastrel batch wrote"
EPILOG = """\
examples:
  fastrel show maps                                   the first rows
  fastrel show maps --failures                        what could not be explained, and why
  fastrel show maps photos/a.jpg photos/b.jpg --out overlays
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("results", metavar="DIR", help="the folder that fastrel batch wrote")
    parser.add_argument("items", nargs="*", metavar="ITEM", help="names as the rows have them; default: the first ones")
    parser.add_argument("--limit", type=shared.positive, default=10, metavar="N", help="items (default: %(default)s)")
    parser.add_argument("--failures", action="store_true", help="items that failed, instead of rows")
    parser.add_argument(
        "--out", metavar="DIR", help="render overlays or pages into this folder, from the items as they were given"
    )
    parser.add_argument("--style", default="blend", choices=list(STYLES), help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Print, or render; 1 if an item cannot be rendered or is not there."""
    results = read(options.results)
    if options.failures:
        for name, reason in results.failures.items():
            print(f"{name}: {reason}")
        return 0
    failures = {name: results.failures[name] for name in options.items if name in results.failures}
    chosen = [list(own) for _, own in groupby(_rows(results, options), lambda row: row.item)]
    missing = {*options.items} - {rows[0].item for rows in chosen} - failures.keys()
    failures |= dict.fromkeys(sorted(missing), "there is no such item")
    made_from = {"show": results.settings, "style": options.style}
    with Outputs(options.out, made_from) if options.out else nullcontext() as outputs:
        for rows in chosen:
            print(rows[0].item)
            for row in rows:
                piece = f" [{row.window}]" if row.window else ""
                print(f"  {row.target} {row.target_name}{piece}: logit {row.logit:.2f}")
            if outputs is not None:
                try:
                    print(f"  -> {', '.join(map(str, _render(rows, results.settings, outputs, options.style)))}")
                except (FastrelError, OSError) as error:
                    failures[rows[0].item] = str(error)
    for name, reason in failures.items():
        print(f"fastrel: not shown: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _rows(results: Any, options: argparse.Namespace) -> list[Row]:
    """Those of the items asked for, or of the first ones, in the order of the results."""
    wanted = {*options.items}
    found: list[Row] = []
    for batch in results.batches():
        for row in batch:
            if wanted and row.item not in wanted:
                continue
            if not wanted and len({r.item for r in found} | {row.item}) > options.limit:
                return found
            found.append(row)
    return found


def _render(rows: Sequence[Row], settings: dict[str, Any], outputs: Outputs, style: str) -> list[Path]:
    texts = rows[0].map is None
    item = inputs.locate(rows[0].item, "text" if texts else "image", settings.get("column"), settings.get("pair_column"))
    picture = None if texts else _seen(item, settings["reader"])
    paths = outputs.claim(item, endings(rows, npz=False))
    draw(rows, picture, paths, style)
    outputs.finish(item)
    return paths


def _seen(item: inputs.Item, reader: dict[str, Any]) -> Image.Image:
    """The picture as the model saw it."""
    if "resize" not in reader:
        raise InputError("the model has a preprocessing of its own, so what it saw of the picture is not known here")
    content = item.where.load()
    assert isinstance(content, bytes)
    prepare = Preprocessing.from_dict(reader)
    return Image.fromarray(np.asarray(prepare.seen(pictures.read(content).image))).convert("RGB")
