"""Images explained per second over batch sizes, by fastrel, by the paper's official code and by libraries that do related work.

    python -m benchmarks.peers [--model vit_small_patch16_224] [--batch-sizes 1 8 32] [--write]

One process, random weights, one class per image; all take turns, and each run is preceded by a forward pass of the model alone, so that
a machine that drifts slows both. What is fastrel's has just been checked against the plain PyTorch backend. Some four minutes on two
cores; nothing else may run meanwhile. `--write` puts the table into benchmarks/README.md and the plot into docs/figures.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor, nn

import fastrel
from benchmarks import gate
from benchmarks.baselines import ViT, libraries
from benchmarks.pages import Section

ROOT = Path(__file__).parents[1]
SECTION = Section(ROOT / "benchmarks" / "README.md", "peers", "python -m benchmarks.peers --write")
PLOT = ROOT / "docs" / "figures" / "throughput.png"
#: Runs of a batch: as many as make up these images, and no more than these runs.
IMAGES, RUNS = 16, 5

Call = Callable[[Tensor], Any]


def _forward(model: nn.Module) -> Call:
    def forward(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images)

    return forward


def _fastrel(model: nn.Module, **options: Any) -> Call:
    explainer = fastrel.Explainer(model, **options)
    images = torch.randn(2, 3, *model.patch_embed.img_size)  # type: ignore[union-attr, misc]
    expected = explainer.using(backend="torch", precision="float32")(images, target=0).relevance
    gate.check(explainer(images, target=0).relevance, expected, explainer.options.precision)
    return partial(explainer, target=0)


#: What makes a call of a model, in the order of the table.
PEERS: dict[str, Callable[[Any], Call]] = {
    "fastrel": _fastrel,
    "fastrel, mixed": partial(_fastrel, precision="mixed"),
    "the paper's official code": lambda model: partial(ViT(model).maps, target=0),
    "lxt, AttnLRP": libraries.lxt_attnlrp,
    "captum, input x gradient": libraries.captum_input_x_gradient,
    "zennit, LRP of linear layers": libraries.zennit_lrp,
    "grad-cam, last block": libraries.grad_cam,
}
#: These explain one image after the other, so that their rate is that of a batch of one.
ONE_BY_ONE = {"the paper's official code"}
FORWARD = "the model's forward pass"


@dataclass
class Peer:
    """Seconds per image by batch size, and those of the forward passes in turn with them; or why there are none."""

    call: Call | None
    missing: str = ""
    own: dict[int, float] = field(default_factory=dict)
    forward: dict[int, float] = field(default_factory=dict)

    def cell(self, batch: int) -> str:
        """Images per second, and how many forward passes one takes."""
        if batch not in self.own:
            return "–"
        return f"{1 / self.own[batch]:.2f} ({self.own[batch] / self.forward[batch]:.1f})"


def build(model: nn.Module) -> dict[str, Peer]:
    """All peers, those that are not installed with the reason."""
    found = {FORWARD: Peer(_forward(model))}
    for name, make in PEERS.items():
        try:
            found[name] = Peer(make(model))
        except ImportError as error:
            found[name] = Peer(None, f"not installed: {error.name}")
    return found


def measure(peers: Mapping[str, Peer], images: Tensor) -> None:
    """Fill in the seconds of this batch size."""
    batch, forward = len(images), peers[FORWARD].call
    assert forward
    calls = {name: peer.call for name, peer in peers.items() if peer.call and not (name in ONE_BY_ONE and batch > 1)}
    own: dict[str, list[float]] = {name: [] for name in calls}
    before: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(min(RUNS, max(1, IMAGES // batch))):
        for name, call in calls.items():
            for times, run in ((before[name], forward), (own[name], call)):
                start = time.perf_counter()
                run(images)
                times.append(time.perf_counter() - start)
    for name in calls:
        peers[name].own[batch] = statistics.median(own[name]) / batch
        peers[name].forward[batch] = statistics.median(before[name]) / batch
    for name in ONE_BY_ONE - calls.keys():
        if 1 in peers[name].own:
            peers[name].own[batch], peers[name].forward[batch] = peers[name].own[1], peers[FORWARD].own[batch]


def table(peers: Mapping[str, Peer], batches: Sequence[int]) -> list[str]:
    """Markdown."""
    lines = [f"| images/s (forward passes) | {' | '.join(f'batch {batch}' for batch in batches)} |"]
    lines.append("|---" * (len(batches) + 1) + "|")
    for name, peer in peers.items():
        cells = [peer.missing or peer.cell(batch) for batch in batches]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def plot(peers: Mapping[str, Peer], title: str) -> Figure:
    """Images per second over batch sizes, a line each."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    measured: set[int] = set()
    for name, peer in peers.items():
        if peer.own:
            axes.plot(list(peer.own), [1 / seconds for seconds in peer.own.values()], marker="o", label=name)
            measured |= peer.own.keys()
    axes.set(xlabel="batch size", ylabel="images per second", xscale="log", yscale="log")
    axes.set_xticks(sorted(measured), [str(batch) for batch in sorted(measured)], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside center right", fontsize=8)
    return figure


def main() -> None:
    """Print the table."""
    import timm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a ViT of timm with a class token")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--write", action="store_true", help=f"into {SECTION.page.name} and {PLOT.name}")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(options.model).eval().requires_grad_(False)
    size = model.patch_embed.img_size
    peers = build(model)
    for peer in peers.values():  # captures, and whatever else is done once
        for batch in (1, 2):
            if peer.call:
                peer.call(torch.randn(batch, 3, *size))
    batches = sorted(options.batch_sizes)
    for batch in batches:
        measure(peers, torch.randn(batch, 3, *size))
    machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    lines = [f"{options.model}, {machine}", "", *table(peers, batches)]
    print("\n".join(lines))
    if options.write:
        plot(peers, f"{options.model}, {machine}").savefig(PLOT, dpi=120)
        SECTION.write([*lines, "", f"![images per second over batch sizes](../docs/figures/{PLOT.name})"])


if __name__ == "__main__":
    main()
