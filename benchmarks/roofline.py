"""A prediction, not a measurement: what explanations should take on GPUs that are not here. `python -m benchmarks.roofline`.

Every launch of an explanation, as the code of today makes it, takes the longest of four times, each as if it had the device to itself:
arithmetic at the data sheet's rate (what the vendor's products reach of it: `VENDOR`), memory, the L2 cache that tiles read from, and
the instructions that the compiled loop issues (tests/golden/triton_resources.json). The last wave of programs counts as a whole one.
To all of it the gaps between launches are added, or what the host takes to launch, where that is longer. Perfect overlap within a
launch and no contention are assumed: a device will be slower. Counted: one target, all blocks, positive rules.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastrel.triton_kernels import configs

from benchmarks import compiled


@dataclass(frozen=True)
class Device:
    """A GPU: dense TFLOP/s by precision and GB/s of memory from its data sheet, GB/s of its L2 from public microbenchmarks, processors
    and their clock in GHz."""

    name: str
    target: str
    tflops: dict[str, float]
    bandwidth: float
    l2: float
    processors: int
    clock: float

    @property
    def capability(self) -> int:
        """90 for compute capability 9.0."""
        return int(self.target.removeprefix("sm_"))


#: NVIDIA's data sheets of the A100 80 GB SXM and the H100 SXM, without sparsity. tf32x3: three TF32 products for one.
DEVICES = (
    Device("A100", "sm_80", {"bfloat16": 312, "tf32": 156, "tf32x3": 52, "float32": 19.5}, 2039, 4000, 108, 1.41),
    Device(
        "H100",
        "sm_90",
        {"bfloat16": 989, "float8": 1979, "tf32": 494, "tf32x3": 165, "float32": 67},
        3350,
        5500,
        132,
        1.755,
    ),
)

#: What a vendor's products reach of the peak at these sizes.
VENDOR = 0.65

#: Seconds between two launches of a CUDA graph, and those that a host takes to launch one of torch's operators or a Triton kernel
#: (vllm#34838).
GAP, HOST_TORCH, HOST_TRITON = 1.2e-6, 4.5e-6, 11e-6


@dataclass(frozen=True)
class Model:
    """A plain transformer: blocks, features, features of the MLP, heads, tokens."""

    name: str
    blocks: int
    features: int
    hidden: int
    heads: int
    tokens: int


MODELS = (
    Model("ViT-B/16 224", 12, 768, 3072, 12, 197),
    Model("ViT-L/16 224", 24, 1024, 4096, 16, 197),
    Model("DINOv2-B/14 518", 12, 768, 3072, 12, 1370),
    Model("BERT-base, 128 tokens", 12, 768, 3072, 12, 128),
)


@dataclass(frozen=True)
class Work:
    """One launch: operations in a precision, bytes of memory and of L2, instructions of warps; how full its waves are."""

    operator: str
    flop: float = 0.0
    bytes: float = 0.0
    precision: str = "float32"
    l2: float = 0.0
    issued: float = 0.0
    programs: float = math.inf
    triton: bool = True

    def bounds(self, device: Device) -> dict[str, float]:
        """Seconds by what bounds it."""
        peak = device.tflops.get(self.precision, device.tflops["bfloat16"]) * (1.0 if self.triton else VENDOR)
        waves = 1.0
        if math.isfinite(self.programs):
            waves = math.ceil(self.programs / device.processors) * device.processors / self.programs
        return {
            "arithmetic": waves * self.flop / (peak * 1e12),
            "memory": self.bytes / (device.bandwidth * 1e9),
            "L2": self.l2 / (device.l2 * 1e9),
            "issue": waves * self.issued / (4 * device.processors * device.clock * 1e9),
        }

    def seconds(self, device: Device) -> float:
        """What the slowest bound allows."""
        return max(self.bounds(device).values())


def product(m: int, n: int, k: int) -> float:
    """Operations of one matrix product."""
    return 2.0 * m * n * k


def vendor(operator: str, m: int, n: int, k: int, precision: str, width: int = 2) -> Work:
    """One of torch's own products, result in float32."""
    return Work(operator, product(m, n, k), width * (m * k + k * n) + 4 * m * n, precision, triton=False)


def tiled(operator: str, tile: configs.Tile, m: int, n: int, k: int, dots: int, widths: tuple[float, float], precision: str,
          bytes: float, loop: int) -> Work:  # fmt: skip
    """A fused product over [m, n] of depth k: `dots` of them per tile, from one read of the operands of `widths` bytes."""
    programs = math.ceil(m / tile.m) * math.ceil(n / tile.n)
    steps = programs * math.ceil(k / tile.k)
    read = steps * tile.k * (tile.m * widths[0] + tile.n * widths[1])
    return Work(operator, dots * product(m, n, k), bytes, precision, read, steps * loop * tile.warps, programs)


@dataclass(frozen=True)
class Layer:
    """A linear layer on the way back: inputs, outputs that carry relevance and those that carry a gradient; whether gelu comes before
    it, and whether another layer does, which takes what this one gives."""

    ins: int
    outs: int
    grad_outs: int
    after_gelu: bool = False
    next: bool = False


def layers(model: Model) -> tuple[Layer, ...]:
    """Of a block, the last first: of q, k and v only v has relevance."""
    d, hidden = model.features, model.hidden
    return Layer(hidden, d, d, True, True), Layer(d, hidden, hidden), Layer(d, d, d), Layer(d, d, 3 * d)


def forward(model: Model, batch: int, width: int) -> Iterator[Work]:
    """One block of the model's own forward pass in float32 without TF32, or in bfloat16."""
    n, d = batch * model.tokens, model.features
    precision = "float32" if width == 4 else "bfloat16"
    for layer in layers(model):
        yield vendor("linear", n, layer.grad_outs, layer.ins, precision, width)
    yield Work("attention", 4.0 * batch * model.tokens**2 * d, width * 4 * n * d, precision, triton=False)
    for name, moved in (("norm", 2 * d), ("norm", 2 * d), ("add", 3 * d), ("add", 3 * d), ("gelu", 2 * model.hidden)):
        yield Work(name, 0.0, width * n * moved, triton=False)


@functools.cache
def _compiled() -> Any:
    return json.loads(compiled.TABLE.read_text())


def _loop(device: Device, kernel: str, label: str, flags: str = "") -> int:
    """Instructions of a kernel's loop over tiles in what tests/golden/triton_resources.json keeps.

    Raises:
        LookupError: it keeps no such kernel.
    """
    for name, used in _compiled()[device.target].items():
        if name.startswith(f"{kernel} {label}") and name.endswith(flags):
            return int(used["loop"])
    raise LookupError(f"no {kernel} {label} … {flags} for {device.target}")


def kind_of(width: int, precision: str) -> str:
    """How the fused kernels multiply, by the name that `configs` has for it."""
    return {"float32": "float32" if width == 4 else "split", "mixed": "bfloat16", "low": "float8"}[precision]


PEAKS = {"float32": "tf32x3", "split": "bfloat16", "bfloat16": "bfloat16", "float8": "float8"}
LABELS = {"float32": "float32", "split": "bfloat16", "bfloat16": "bfloat16 mixed", "float8": "bfloat16 low"}


def together(n: int) -> bool:
    """Whether Z of a block's layers is formed in one launch."""
    return n < configs.MANY_ROWS


def shares(device: Device, layer: Layer, n: int, width: int, precision: str) -> Work:
    """Z of a layer, and S unless that is formed elsewhere."""
    kind, capability = kind_of(width, precision), device.capability
    tile = configs.product(configs.SHARES, kind, n, capability)
    stored, weight, value = _widths(kind, width, precision)
    moved = value * n * layer.ins + weight * layer.outs * layer.ins + n * layer.outs * (width + stored)
    label, kernel = f"{LABELS[kind]} block", "zplus_sums_kernel"
    if not together(n):
        moved += 4 * n * layer.outs
        label, kernel = (
            {"float32": "float32 many rows", "split": "bfloat16 ieee"}.get(kind, LABELS[kind]),
            "zplus_shares_kernel",
        )
    loop = _loop(device, kernel, label)
    dots = 2 if kind == "split" else 1
    return tiled("zplus_shares", tile, n, layer.outs, layer.ins, dots, (value, weight), PEAKS[kind], moved, loop)


def _widths(kind: str, width: int, precision: str) -> tuple[int, int, int]:
    """Bytes of S, of a weight and of a value as the fused kernels have them."""
    weight = 1 if kind == "float8" else width if precision == "float32" else 2
    return 4 if precision == "float32" else 2, weight, 1 if kind == "float8" else width


def linear(device: Device, layer: Layer, n: int, width: int, precision: str) -> Iterator[Work]:
    """The reverse pass of a linear layer, both lanes, as `zplus_linear` and `zplus_linear_reduced` choose it; without Z where that is
    formed for several layers at once."""
    ins, outs, more = layer.ins, layer.outs, layer.grad_outs
    if precision == "low" and not configs.in_float8(n, (outs, ins), device.capability):
        precision = "mixed"
    kind = kind_of(width, precision)
    if kind in ("split", "bfloat16") and configs.products_first(n, (outs, ins), kind, more > outs, device.capability):
        exact = precision == "float32"
        parts = 2 if exact else 1
        yield Work("passes", 0.0, n * ins * (width + (4 if exact else 2)))
        yield vendor("products", n, outs, 2 * ins if exact else ins, "bfloat16")
        yield Work(
            "passes",
            0.0,
            n * outs * (8 + 2 * parts + (0 if exact else width)) + (n * outs * (4 + 2 * parts)) * (more == outs),
        )
        yield vendor("products", n, 2 * ins, parts * outs, "bfloat16")
        yield Work("passes", 0.0, n * ins * (width + 12))
        if more > outs:
            yield Work("passes", 0.0, n * more * (4 + 2 * parts))
        yield vendor("products", n, ins, parts * more, "bfloat16")
        if layer.after_gelu:
            yield Work("gelu", 0.0, n * ins * (width + 8))
        return
    few, apart = together(n), more > outs
    stored, weight, _ = _widths(kind, width, precision)
    if not few:
        if kind == "float8":
            yield Work("passes", 0.0, n * ins * (width + 1))
        yield shares(device, layer, n, width, precision)
    divided = f"{kind}, divided"
    tile = configs.product(configs.BACK, divided if few and divided in configs.BACK else kind, n, device.capability)
    read = 8 if few and apart else 4 if few else stored  # R and Z, or S
    moved = n * (outs * read + more * 4) + weight * (outs + more * apart) * ins + n * ins * (width + 8)
    moved += n * ins * (width * layer.after_gelu + 4 * (few and layer.next))
    label = f"{LABELS[kind]} block" + (", many rows" if kind == "float32" and not few else "")
    flags = "apart" if apart else ""
    loop = _loop(device, "zplus_back_kernel", label, flags)
    parts = 2 if kind == "split" else 1
    together_ = tiled("zplus_back", tile, n, ins, outs, parts * (2 if apart else 3), (read + 4 * (not apart), weight), PEAKS[kind],
                      moved, loop)  # fmt: skip
    if not apart:
        yield together_
        return
    # A second loop with one product for two; it is taken to issue half as much.
    second = tiled("zplus_back", tile, n, ins, more, parts, (4, weight), PEAKS[kind], 0.0, loop // 2)
    yield replace(
        together_,
        flop=together_.flop + second.flop,
        l2=together_.l2 + second.l2,
        issued=together_.issued + second.issued,
    )


#: Sweeps of attention by width of values: kernel, its flags, dots and lanes. In TF32 A V counts twice, in float32 scores and g V are
#: formed once more for relevance.
SWEEPS = {
    2: (("rows", "", 5, 3), ("queries", "grad_in", 4, 4), ("keys", "rel_in grad_in", 7, 6)),
    4: (("rows", "", 3, 3), ("queries", "grad_in", 4, 4), ("keys", "grad_in", 6, 5), ("keys", "rel_in", 3, 3)),
}


def attention(device: Device, model: Model, batch: int, width: int) -> Iterator[Work]:
    """Attention of a block as `attention_relevance` chooses it."""
    n, head, capability = batch * model.tokens, model.features // model.heads, device.capability
    if width == 4 and head > 64 and configs.heads_by_library(head, n, capability):
        yield from attention_by_library(model, batch)
        return
    sweeps = list(attention_by_sweeps(device, model, batch, width))
    if not configs.together("tf32" if width == 2 else "float32", head, n, capability):
        yield from sweeps
        return
    rows, *others = sweeps
    yield rows
    yield Work(
        "attention lanes",
        sum(work.flop for work in others),
        sum(work.bytes for work in others),
        rows.precision,
        issued=sum(work.issued for work in others),
    )


def attention_by_sweeps(device: Device, model: Model, batch: int, width: int) -> Iterator[Work]:
    """Each a launch of its own, in tiles of heads padded to a power of two."""
    n, head, tokens = batch * model.tokens, model.features // model.heads, model.tokens
    padded, capability = max(32, 1 << (head - 1).bit_length()), device.capability
    dtype, table = ("bfloat16", "tf32") if width == 2 else ("float32", "float32")
    precision = "tf32" if width == 2 else "tf32x3" if padded <= 64 else "float32"
    for name, flags, dots, lanes in SWEEPS[width]:
        relevance = " relevance" if flags == "rel_in" else ""
        tile = configs.attention(table, padded, f"{name}{relevance}", capability)
        steps = math.ceil(tokens / tile.m) * math.ceil(tokens / tile.n) * batch * model.heads
        loop = _loop(device, f"attention_{name}_kernel", f"{dtype} d={padded}{' unmasked' if padded == 64 else ''}", flags)
        flop = dots * 2.0 * tokens**2 * padded * batch * model.heads
        moved = (width * 3 + 4 * lanes) * n * model.features
        yield Work(f"attention {name}", flop, moved, precision, issued=steps * loop * tile.warps)


#: How often `attention_products` reads or writes the maps of all heads, products aside; products do once each
#: (tests/devices/test_launches.py counts).
MAP_PRODUCTS, MAP_PASSES = 9, 12


def attention_by_library(model: Model, batch: int) -> Iterator[Work]:
    """Attention by torch's own products, maps in memory."""
    heads, tokens, head = batch * model.heads, model.tokens, model.features // model.heads
    for _ in range(MAP_PRODUCTS):
        moved = 4.0 * heads * (tokens**2 + 2 * tokens * head)
        yield Work("attention products", product(tokens, tokens, head) * heads, moved, "float32", triton=False)
    yield Work("attention passes", 0.0, 4.0 * MAP_PASSES * heads * tokens**2)


def reverse(device: Device, model: Model, batch: int, width: int, precision: str) -> Iterator[Work]:
    """One block of the reverse pass; lanes are float32. Launches and what they move as recorded (tests/devices/test_launches.py)."""
    n, d = batch * model.tokens, model.features
    if together(n):
        precision = "mixed" if precision == "low" else precision
        one = [shares(device, layer, n, width, precision) for layer in layers(model)]
        yield replace(
            one[0],
            flop=sum(work.flop for work in one),
            bytes=sum(work.bytes for work in one),
            l2=sum(work.l2 for work in one),
            issued=sum(work.issued for work in one),
            programs=sum(work.programs for work in one),
        )
    for layer in layers(model):
        yield from linear(device, layer, n, width, precision)
    yield from attention(device, model, batch, width)
    divisor = 4 if together(n) else 0
    for through in (0, 4 * n * (model.heads + 2)):
        yield Work("half block", 0.0, n * d * (3 * width + 28 + divisor) + through)


KINDS = (("float32", 4, "float32"), ("bfloat16 model", 2, "float32"), ("mixed", 2, "mixed"), ("low", 2, "low"))


def total(device: Device, model: Model, works: list[Work]) -> tuple[float, float]:
    """Seconds of all blocks on the device with the gaps between launches, and what the host takes to launch them eagerly."""
    on_device = model.blocks * sum(work.seconds(device) + GAP for work in works)
    return on_device, model.blocks * sum(HOST_TRITON if work.triton else HOST_TORCH for work in works)


def models(batches: list[int]) -> None:
    """Predicted milliseconds of forward and reverse passes."""
    print("| device | model | batch | what | forward, ms | reverse, ms | launching it, ms | bound by | slowest |")
    print("|---|---|---|---|---|---|---|---|---|")
    for device in DEVICES:
        for model in MODELS:
            for batch in batches:
                for name, width, precision in KINDS:
                    if precision == "low" and "float8" not in device.tflops:
                        continue
                    own, back = list(forward(model, batch, width)), list(reverse(device, model, batch, width, precision))
                    (once, _), (again, host) = total(device, model, own), total(device, model, back)
                    limits: Counter[str] = Counter()
                    parts: Counter[str] = Counter()
                    for work in back:
                        bounds = work.bounds(device)
                        limits[max(bounds, key=bounds.__getitem__)] += model.blocks * work.seconds(device) / again
                        parts[work.operator] += model.blocks * work.seconds(device) / again
                    limits["gaps"] = model.blocks * len(back) * GAP / again
                    shown = [", ".join(f"{key} {part:.0%}" for key, part in c.most_common(3)) for c in (limits, parts)]
                    times = f"{1e3 * once:.2f} | {1e3 * again:.2f} | {1e3 * host:.2f}"
                    print(f"| {device.name} | {model.name} | {batch} | {name} | {times} | {shown[0]} | {shown[1]} |")


def products(model: Model, batch: int) -> None:
    """Every launch of one block's linear layers: its four bounds."""
    print("| device | what | operator | arithmetic, µs | memory, µs | L2, µs | issue, µs |\n|---|---|---|---|---|---|---|")
    for device in DEVICES:
        for name, width, precision in KINDS:
            if precision == "low" and "float8" not in device.tflops:
                continue
            for layer in layers(model):
                for work in linear(device, layer, batch * model.tokens, width, precision):
                    times = " | ".join(f"{1e6 * seconds:.0f}" for seconds in work.bounds(device).values())
                    print(f"| {device.name} | {name} | {work.operator} {layer.ins} → {layer.outs} | {times} |")


#: The reverse pass of ViT-B at batch 64 on an H100, ms: what was claimed before L2, issue and launches were counted, the code of then
#: by the corrected model, and the best that is known how to do.
BEFORE = {
    "float32": (55, 155, "90–110"),
    "bfloat16 model": (26, 73, "25–30"),
    "mixed": (16, 57, "16–18"),
    "low": (13, 57, "12–14"),
}


def comparison() -> None:
    """Today's code beside what was assumed and what is possible."""
    device, model = DEVICES[1], MODELS[0]
    print("| what | assumed before | the code then | the code now | best design |\n|---|---|---|---|---|")
    for name, width, precision in KINDS:
        now, _ = total(device, model, list(reverse(device, model, 64, width, precision)))
        assumed, then, best = BEFORE[name]
        print(f"| {name} | {assumed} | {then} | {1e3 * now:.0f} | {best} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 64], help="batch sizes (default: 1 64)")
    options = parser.parse_args()
    print("# Predicted, never measured\n\n## Explanations, all blocks, one target\n")
    models(options.batch)
    print(f"\n## {MODELS[0].name}, batch 64, reverse pass on an H100, ms\n")
    comparison()
    print(f"\n## Linear layers of one block of {MODELS[0].name}, batch {options.batch[-1]}\n")
    products(MODELS[0], options.batch[-1])


if __name__ == "__main__":
    main()
