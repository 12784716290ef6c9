"""`fastrel bench`: how long forward pass, prediction and explanation take here, and how many a second."""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from fastrel import backends, precision
from fastrel.artefact.loading import load
from fastrel.commands import options as shared
from fastrel.data import files, pictures
from fastrel.errors import InputError
from fastrel.explainer import Explainer
from fastrel.models import Loaded
from fastrel.timing import Timing, measure

HELP = "time forward pass, prediction and explanation on this machine"
EPILOG = """\
All calls of one number of threads take turns, so that what disturbs one disturbs all. The ratio is to the model's own forward pass
of the same batch size and threads.

examples:
  fastrel bench --model vit_base_patch16_224 --random
  fastrel bench --model ./my-bert --text "a text" --batch-sizes 1 8 32 --threads 1 2 4 --backends torch cpp --out bench
"""
COLUMNS = ("call", "batch", "threads", "precision", "backend", "p50 ms", "p90 ms", "p99 ms", "per second", "ratio")


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    count = shared.positive
    parser.add_argument("--batch-sizes", type=count, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    parser.add_argument("--threads", type=count, nargs="+", metavar="N", help="default: as torch has them")
    parser.add_argument(
        "--precisions", nargs="+", default=["float32"], choices=precision.PRECISIONS, help="default: float32"
    )
    parser.add_argument(
        "--backends", nargs="+", default=["auto"], choices=["auto", *backends.BACKENDS], help="default: auto"
    )
    parser.add_argument("--seconds", type=float, default=3, metavar="S", help="per call (default: %(default)s)")
    parser.add_argument("--artefact", metavar="FILE", help="of the same model, to be timed too")
    parser.add_argument("--random", action="store_true", help="random weights: nothing is loaded but the architecture")
    parser.add_argument("--text", help="for a model of texts")
    parser.add_argument("--out", metavar="DIR", help="also write bench.csv and bench.png there")
    shared.model(parser)
    shared.method(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    settings = shared.settings(options, random=options.random)
    loaded = settings.load()
    base = settings.explainer(loaded)
    known = torch.get_num_threads()
    rows: list[list[Any]] = []
    print(" | ".join(COLUMNS))
    try:
        for threads in options.threads or [known]:
            torch.set_num_threads(threads)
            for batch in options.batch_sizes:
                timings = measure(_calls(options, loaded, base, batch), options.seconds)
                forward = timings["forward | – | –"].percentile(0.5)
                for name, timing in timings.items():
                    rows.append(_row(name, timing, threads, forward))
                    print(" | ".join(map(str, rows[-1])), flush=True)
    finally:
        torch.set_num_threads(known)
    if options.out:
        folder = files.folder(options.out)
        with files.replaced(folder / "bench.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        with files.replaced(folder / "bench.png") as path:
            plot(rows).savefig(path, dpi=120)
        print(f"-> {folder / 'bench.csv'}, {folder / 'bench.png'}")
    return 0


def _calls(
    options: argparse.Namespace, loaded: Loaded, base: Explainer, batch: int
) -> dict[str, tuple[int, Callable[[], Any]]]:
    args, kwargs = loaded.arguments(loaded.inputs([_sample(options, loaded)] * batch))

    def forward() -> Any:
        with torch.inference_mode():
            return loaded.model(*args, **kwargs)

    calls: dict[str, tuple[int, Callable[[], Any]]] = {"forward | – | –": (batch, _waited(forward, loaded))}
    for precise, backend in itertools.product(options.precisions, options.backends):
        explainer = base.using(precision=precise, backend=backend)
        for name, call in (("predict", explainer.predict), ("explain", explainer)):

            def one(call: Any = call) -> Any:
                return call(*args, **kwargs)

            calls[f"{name} | {precise} | {backend}"] = (batch, _waited(one, loaded))
    if options.artefact:
        artefact = load(options.artefact)
        form = "compiled" if artefact.compiled else "program"
        calls[f"artefact | {artefact.metadata.options['precision']} | {form}"] = (
            batch,
            _waited(lambda: artefact(*args, **kwargs), loaded),
        )
    return calls


def _waited(call: Callable[[], Any], loaded: Loaded) -> Callable[[], Any]:
    """The call with the device's work done."""
    if loaded.device.type != "cuda":
        return call

    def whole() -> None:
        call()
        torch.cuda.synchronize(loaded.device)

    return whole


def _sample(options: argparse.Namespace, loaded: Loaded) -> Any:
    if loaded.kind == "image":
        return loaded.reader(pictures.noise())[0]
    if options.text is None or loaded.kind == "multimodal":
        raise InputError(f"{options.model!r} is a model of texts: give --text")
    return loaded.reader(options.text)[0]


def _row(name: str, timing: Timing, threads: int, forward: float) -> list[Any]:
    call, precise, backend = name.split(" | ")
    shares = [f"{timing.percentile(share):.2f}" for share in (0.5, 0.9, 0.99)]
    ratio = f"{timing.percentile(0.5) / forward:.2f}"
    return [call, timing.batch, threads, precise, backend, *shares, f"{timing.throughput:.1f}", ratio]


def plot(rows: Sequence[Sequence[Any]]) -> Figure:
    """Median milliseconds and samples per second over batch sizes, a line per call and setting."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    lines: dict[tuple[Any, ...], list[tuple[int, float, float]]] = {}
    for call, batch, threads, precise, backend, median, _, _, rate, _ in rows:
        lines.setdefault((call, precise, backend, threads), []).append((batch, float(median), float(rate)))
    for (call, precise, backend, threads), points in lines.items():
        label = f"{call}, {threads} threads" if call == "forward" else f"{call} {precise} {backend}, {threads} threads"
        sizes, medians, rates = zip(*sorted(points), strict=True)
        latency.plot(sizes, medians, marker="o", label=label)
        throughput.plot(sizes, rates, marker="o", label=label)
    latency.set(xlabel="batch size", ylabel="median, ms", xscale="log", yscale="log")
    throughput.set(xlabel="batch size", ylabel="samples per second", xscale="log")
    measured = sorted({row[1] for row in rows})
    for axes in (latency, throughput):
        axes.set_xticks(measured, [str(size) for size in measured])
        axes.xaxis.set_minor_locator(NullLocator())
    latency.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (latency.yaxis, throughput.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    throughput.legend(fontsize=8)
    return figure
