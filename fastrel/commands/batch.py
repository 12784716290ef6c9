"""`fastrel batch`: a whole data set into Parquet, resumable, on one machine or a Ray cluster."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any

from tqdm import tqdm

from fastrel.batch import Explain
from fastrel.commands import options as shared
from fastrel.errors import InputError

HELP = "explain a whole data set into Parquet files; interrupted, it goes on where it was"
EPILOG = """\
One row per item and target: item, sha256, target, logit, probability, the map (an Arrow tensor) or the words' relevance, and
for what failed the reason. The same command again does what is missing. `fastrel show DIR` renders rows, fastrel.batch.read(DIR)
gives numpy, torch and pandas.

examples:
  fastrel batch photos/ --model vit_base_patch16_224 --target top3 --out maps
  fastrel batch shards/*.tar --model ./my-vit --device cuda --batch-size 64 --workers 8 --out maps
  fastrel batch reviews.parquet --column text --model ./my-bert --long window --out maps
  fastrel batch claims.csv --column premise --pair-column hypothesis --model ./my-nli --out maps      pairs of texts
  fastrel batch captions.csv --column photo --pair-column caption --model ./my-clip --out maps        pictures with texts
  fastrel batch photos/ --model vit_base_patch16_224 --out maps --shard 3/8          one of eight jobs
  fastrel batch photos/ --model vit_base_patch16_224 --out maps --ray --address auto --actors 16
"""
_SHOWN = 10


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    shared.inputs(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--limit", type=shared.positive, metavar="N", help="the first N items")
    parser.add_argument("--retry-errors", action="store_true", help="also try again what failed before")
    parser.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="every N-th item from the I-th on, I from 0"
    )
    parser.add_argument(
        "--part", type=shared.positive, default=256, metavar="N", help="items per file (default: %(default)s)"
    )
    shared.model(parser)
    shared.method(parser)
    shared.explaining(parser)
    group = parser.add_argument_group("Ray")
    group.add_argument(
        "--ray", action="store_true", help="on a Ray cluster, or (without --address) with Ray on this machine"
    )
    group.add_argument("--address", metavar="ADDRESS", help="of the cluster; auto: the one that this machine belongs to")
    group.add_argument("--actors", type=shared.positive, metavar="N", help="default: 1")
    group.add_argument("--cpus", type=float, metavar="N", help="processors of an actor (default: 1)")
    group.add_argument("--gpus", type=float, metavar="N", help="GPUs of an actor (default: 0)")
    parser.set_defaults(workers=None)


def run(options: argparse.Namespace) -> int:
    """Do what is missing; 1 if some items failed, now or before."""
    from fastrel.batch import table
    from fastrel.batch.store import Store, failures

    of_ray = [f"--{name}" for name in ("address", "actors", "cpus", "gpus") if getattr(options, name) is not None]
    if of_ray and not options.ray:
        raise InputError(f"{' '.join(of_ray)}: of a Ray cluster; add --ray")
    if options.ray and options.workers is not None:
        raise InputError(f"--workers {options.workers}: on Ray, actors read what they explain; give --actors")
    explain, found = shared.asked(options)
    items = found.items[: options.limit]
    if found.ignored:
        print(f"fastrel: {found.ignored} files of other kinds ignored", file=sys.stderr)
    settings = explain.settings.describe(explain.loaded) | {"column": options.column}
    settings |= {} if options.pair_column is None else {"pair_column": options.pair_column}
    with Store(options.out, settings, options.shard) as store:
        tasks = store.tasks(items, options.retry_errors, options.part)
        mine = {item.name for item in items[options.shard[0] :: options.shard[1]]}
        if tasks:
            schema = table.schema(
                explain.shape(), settings | explain.settings.circumstances(), texts=explain.loaded.kind == "multimodal"
            )
            _work(options, explain, tasks, store, schema, len(mine))
        failed = {name: why for name, why in failures(store.folder) if name in mine}
    for name, why in list(failed.items())[:_SHOWN]:
        print(f"fastrel: not explained: {name}: {why}", file=sys.stderr)
    if len(failed) > _SHOWN:
        print(f"fastrel: … and {len(failed) - _SHOWN} more: fastrel show {options.out} --failures", file=sys.stderr)
    print(f"-> {options.out}: {len(mine) - len(failed)} of {len(mine)} items explained")
    return 1 if failed else 0


def _work(options: argparse.Namespace, explain: Explain, tasks: list[Any], store: Any, schema: Any, total: int) -> None:
    left = sum(len(task.items) for task in tasks)
    with tqdm(total=total, initial=max(0, total - left), unit="item", smoothing=0.05) as bar:
        failed = 0

        def progress(done: int, wrong: int) -> None:
            nonlocal failed
            failed += wrong
            bar.set_postfix({"failed": failed} if failed else {}, refresh=False)
            bar.update(done)

        if options.ray:
            if not (options.address or os.environ.get("RAY_ADDRESS")):
                os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # on this machine alone: listen on loopback
            from fastrel.batch import on_ray

            given = {name: getattr(options, name) for name in ("actors", "cpus", "gpus", "address")}
            asked = {name: value for name, value in given.items() if value is not None}
            on_ray.run(explain, tasks, store, schema, progress, **asked)
        else:
            from fastrel.batch import local

            workers = 1 if options.workers is None else options.workers
            local.run(explain, tasks, store, schema, workers, progress)


def shard(text: str) -> tuple[int, int]:
    """I/N with 0 <= I < N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(found[1]), int(found[2])
