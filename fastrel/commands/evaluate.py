"""`fastrel evaluate`: methods scored over a data set, with tables and plots."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastrel import data, methods
from fastrel.commands import options as shared
from fastrel.data import files
from fastrel.errors import InputError
from fastrel.evaluation import ImageSubject, Store, TextSubject, configurations, evaluate, labels, plots, scorers, summarise
from fastrel.evaluation.summary import Row, markdown
from fastrel.models import Loaded
from fastrel.options import RULES

HELP = "score methods over a data set: tables and plots"
EPILOG = """\
A run that was interrupted goes on where it was when the same command is given again. MODULE:FUNCTION is a function of yours
that returns the model (for texts: the model and its tokenizer).

examples:
  fastrel evaluate --data mosaics --methods frozen_attribution rollout --metric pointing segmentation --out results
  fastrel evaluate --data images:photos --model vit_base_patch16_224 --metric perturbation --limit 500 --out results
  fastrel evaluate --data imagenet-seg:gtsegs_ijcv.mat --model vit_base_patch16_224 --metric segmentation --out results
  fastrel evaluate --data eraser:movies/val.jsonl --model ./my-bert --metric rationale faithfulness --out results
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    kinds = "; ".join(f"{name}: {what}" for name, (_, what) in data.READERS.items())
    parser.add_argument("--data", required=True, metavar="KIND:PATH", help=f"what to explain. {kinds}")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="default: the rules' own; the first is compared with the others",
    )
    parser.add_argument("--rules", nargs="+", default=["positive"], choices=RULES, help="default: positive")
    parser.add_argument(
        "--metric",
        nargs="+",
        required=True,
        choices=[*scorers.IMAGE_SCORERS, *scorers.TEXT_SCORERS],
        help=f"pictures: {', '.join(scorers.IMAGE_SCORERS)}; texts: {', '.join(scorers.TEXT_SCORERS)}",
    )
    parser.add_argument("--start-layer", type=int, metavar="N", help="of methods that chain eq. (13) (default: 0)")
    parser.add_argument("--normalize", action="store_true", default=None, help="of the same, as BERT code does")
    parser.add_argument("--limit", type=int, metavar="N", help="a random N of the items")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for scores, tables and plots")
    shared.model(parser)
    shared.explaining(parser)


def run(options: argparse.Namespace) -> int:
    """Score, write scores.csv, results.csv, results.md and the plots; 1 if some items could not be scored."""
    names = options.methods or [methods.default(options.rules[0]).name]
    chosen_methods = configurations(names, options.rules, options.start_layer, options.normalize)
    settings = shared.settings(options, rules="positive", start_layer=None, normalize_rollout=None)
    if not options.model and options.data.partition(":")[0] in ("eraser", "sst"):
        raise InputError("evaluating on texts needs --model, a Hugging Face name or folder, or MODULE:FUNCTION")
    loaded = settings.load()
    items = data.read(options.data, loaded.class_names)
    if options.limit is not None:
        if options.limit < 1:
            raise InputError(f"--limit {options.limit}: nothing would be evaluated")
        chosen = np.random.default_rng(options.seed).permutation(len(items))[: options.limit]
        items = [items[i] for i in sorted(chosen)]
    subject = _subject(loaded)
    called = labels(chosen_methods)
    out = Path(options.out)
    made_by = {"reader": loaded.reader.describe(), "sha256": loaded.fingerprint()}
    keys = ("model", "weights", "classes", "data", "start_layer", "normalize", "dtype", "precision")
    with (
        Store(out, {key: getattr(options, key) for key in keys} | made_by) as store,
        tqdm(total=len(items), unit="item", smoothing=0.05) as progress,
    ):
        failures = evaluate(
            subject,
            items,
            chosen_methods,
            options.metric,
            store,
            lambda _: progress.update(1),
            explainer=settings.explainer(loaded),
            batch_size=options.batch_size,
            workers=options.workers,
        )
    wanted = {item.name for item in items}
    shown = [
        score._replace(configuration=called[score.configuration])
        for score in store.scores
        if score.item in wanted and score.scorer in options.metric and score.configuration in called
    ]
    rows = summarise(shown, list(called.values()))
    if not rows:
        raise InputError(f"{', '.join(options.metric)}: undefined for each of the {len(items)} items")
    table = markdown(rows)
    files.write(out / "results.md", table + "\n")
    files.write(out / "results.csv", _table(rows))
    with files.replaced(out / "scores.png") as path:
        plots.bars(rows, path)
    if any(plots.is_curve_point(row.metric) for row in rows):
        with files.replaced(out / "curves.png") as path:
            plots.curves(rows, path)
    print(table)
    print(f"\n-> {out}: results.md, results.csv, scores.csv and plots")
    if isinstance(subject, TextSubject) and subject.cut:
        print(f"{len(subject.cut)} texts are longer than the model reads: words beyond that count as lowest")
    for name, reason in failures.items():
        print(f"fastrel: not scored: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _subject(loaded: Loaded) -> ImageSubject | TextSubject:
    if loaded.kind not in ("image", "text"):
        raise InputError(f"a model of kind {loaded.kind} cannot be evaluated; it takes a classifier of pictures or texts")
    return ImageSubject(loaded) if loaded.kind == "image" else TextSubject(loaded)


def _table(rows: Sequence[Row]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Row._fields)
    writer.writerows(rows)
    return text.getvalue()
