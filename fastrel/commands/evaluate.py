"""`fastrel evaluate`: methods scored over a data set, with tables and plots."""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastrel import data
from fastrel.commands import images, text
from fastrel.errors import InputError
from fastrel.evaluation import ImageSubject, Store, TextSubject, configurations, evaluate, plots, summarise
from fastrel.evaluation.summary import Row, markdown


def run(options: argparse.Namespace) -> int:
    """Score, write scores.csv, results.csv, results.md and the plots; 1 if some items could not be scored."""
    items = data.read(options.data)
    if options.limit is not None:
        if options.limit < 1:
            raise InputError(f"--limit {options.limit}: nothing would be evaluated")
        chosen = np.random.default_rng(options.seed).permutation(len(items))[: options.limit]
        items = [items[i] for i in sorted(chosen)]
    subject = _subject(options, items[0])
    chosen_methods = configurations(options.methods, options.rules, options.start_layer, options.normalize)
    names = [configuration.name for configuration in chosen_methods]
    out = Path(options.out)
    keys = ("model", "weights", "data", "start_layer", "normalize")
    store = Store(out, {key: getattr(options, key) for key in keys})
    with tqdm(total=len(items), unit="item") as progress:
        failures = evaluate(subject, items, chosen_methods, options.metric, store, lambda _: progress.update(1))
    wanted = {item.name for item in items}
    shown = [s for s in store.scores if s.item in wanted and s.scorer in options.metric and s.configuration in names]
    rows = summarise(shown, names)
    table = markdown(rows)
    (out / "results.md").write_text(table + "\n", encoding="utf-8")
    _write_rows(rows, out / "results.csv")
    plots.bars(rows, out / "scores.png")
    plots.curves(rows, out / "curves.png")
    print(table)
    print(f"\n-> {out}: results.md, results.csv, scores.csv and plots")
    for name, reason in failures.items():
        print(f"fastrel: not scored: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _subject(options: argparse.Namespace, item: object) -> ImageSubject | TextSubject:
    if isinstance(item, data.TextItem):
        if not options.model:
            raise InputError("evaluating on texts needs --model, a Hugging Face name or folder, or MODULE:FUNCTION")
        return TextSubject(*text.load(options.model))
    vision = images.load(options.model, options.weights)
    return ImageSubject(vision.model, vision.preprocess, vision.mean, vision.std)


def _write_rows(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
