"""A prediction, not a measurement: what explanations should take on GPUs that are not here. `python -m benchmarks.roofline`.

Every launch of an explanation, as the code of today makes it, takes the longest of four times, each as if it had the device to itself:
arithmetic at the data sheet's rate (what the vendor's products reach of it: `VENDOR`), memory, the L2 cache that tiles read from, and
the instructions that the compiled loop issues (tests/golden/triton_resources.json). The last wave of programs counts as a whole one.
To all of it the gaps between launches are added, or what the host takes to launch, where that is longer. Perfect overlap within a
launch and no contention are assumed: a device will be slower. Counted: one target, all blocks, positive rules.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

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


def linears(model: Model) -> Iterator[tuple[int, int, int]]:
    """(inputs, outputs, outputs that carry relevance) of a block's linear layers: of q, k and v only v does."""
    d = model.features
    yield from ((d, 3 * d, d), (d, d, d), (d, model.hidden, model.hidden), (model.hidden, d, d))


def forward(model: Model, batch: int, width: int) -> Iterator[Work]:
    """One block of the model's own forward pass in float32 without TF32, or in bfloat16."""
    n, d = batch * model.tokens, model.features
    precision = "float32" if width == 4 else "bfloat16"
    for ins, outs, _ in linears(model):
        yield vendor("linear", n, outs, ins, precision, width)
    yield Work("attention", 4.0 * batch * model.tokens**2 * d, width * 4 * n * d, precision, triton=False)
    for name, moved in (("norm", 2 * d), ("norm", 2 * d), ("add", 3 * d), ("add", 3 * d), ("gelu", 2 * model.hidden)):
        yield Work(name, 0.0, width * n * moved, triton=False)


def _loop(device: Device, kernel: str, label: str) -> int:
    """Instructions of a kernel's loop over tiles in what tests/golden/triton_resources.json keeps; 0 if it keeps none."""
    kept = json.loads(compiled.TABLE.read_text()).get(device.target, {})
    return next((used.get("loop", 0) for name, used in kept.items() if name.startswith(f"{kernel} {label}")), 0)


def layer(device: Device, n: int, ins: int, outs: int, width: int, precision: str) -> Iterator[Work]:
    """The reverse pass of a linear layer, both lanes, as `zplus_linear` and `zplus_linear_reduced` choose it."""
    capability = int(device.target.removeprefix("sm_"))
    parts = 2 if precision == "float32" else 1
    if (width == 2 or precision == "mixed") and precision != "low" and configs.products_first(n, (outs, ins)):
        exact = precision == "float32"
        yield Work("passes", 0.0, n * ins * (width + (4 if exact else 2)))
        yield vendor("products", n, outs, 2 * ins if exact else ins, "bfloat16")
        yield Work("passes", 0.0, n * outs * (12 + 4 * parts + (0 if exact else width)))
        yield vendor("products", n, 2 * ins, parts * outs, "bfloat16")
        yield vendor("products", n, ins, parts * outs, "bfloat16")
        yield Work("passes", 0.0, n * ins * (width + 12))
        return
    kind = {"float32": "float32" if width == 4 else "split", "mixed": "bfloat16", "low": "float8"}[precision]
    peak = {"float32": "tf32x3", "split": "bfloat16", "bfloat16": "bfloat16", "float8": "float8"}[kind]
    label = {
        "float32": "float32 many rows",
        "split": "bfloat16 ieee",
        "bfloat16": "float32 mixed",
        "float8": "float32 low",
    }[kind]
    if kind == "float32" and n < configs.MANY_ROWS:
        label = "float32 tf32x3"
    stored, weight = (4, width) if precision == "float32" else (2, 1 if kind == "float8" else 2)
    tile = configs.product(configs.SHARES, kind, n, capability)
    value = 1 if kind == "float8" else width
    if kind == "float8":
        yield Work("passes", 0.0, n * ins * (width + 1))
    moved = value * n * ins + weight * outs * ins + n * outs * (width + 4 + stored)
    dots = 2 if kind == "split" else 1
    loop = _loop(device, "zplus_shares_kernel", label)
    yield tiled("zplus_shares", tile, n, outs, ins, dots, (value, weight), peak, moved, loop)
    tile = configs.product(configs.BACK, kind, n, capability)
    moved = n * outs * (stored + 4) + weight * outs * ins + n * ins * (width + 8)
    dots = 6 if kind == "split" else 3
    loop = _loop(device, "zplus_back_kernel", label)
    yield tiled("zplus_back", tile, n, ins, outs, dots, (stored + 4, weight), peak, moved, loop)


def reverse(device: Device, model: Model, batch: int, width: int, precision: str) -> Iterator[Work]:
    """One block of the reverse pass; lanes are float32. Elementwise launches as the graph makes them (tests count them)."""
    n, d = batch * model.tokens, model.features
    for ins, outs, relevant in linears(model):
        yield from layer(device, n, ins, relevant, width, precision)
        if relevant < outs:  # the gradient of q, k and v, as one
            if width == 2 or precision != "float32":
                parts = 2 if precision == "float32" else 1
                yield Work("passes", 0.0, n * outs * (4 + 2 * parts))
                yield vendor("products", n, ins, parts * outs, "bfloat16")
            else:
                yield vendor("products", n, ins, outs, "float32", 4)
    maps = float(batch) * model.tokens**2 * d
    attention = "tf32" if width == 2 else "tf32x3"
    # Dots of rows, queries and keys; in TF32 A V counts twice, in float32 scores and g V are formed once more for relevance.
    for name, dots, lanes in (
        (("rows", 5, 3), ("queries", 4, 4), ("keys", 7, 6)) if width == 2
        else (("rows", 3, 3), ("queries", 4, 4), ("keys", 6, 5), ("keys", 3, 3))
    ):  # fmt: skip
        yield Work(f"attention {name}", 2.0 * maps * dots, (width * 3 + 4 * lanes) * n * d, attention)
    for _ in range(2):
        yield Work("residual share", 0.0, n * d * (2 * width + 16))
        yield Work("norm again", 0.0, n * d * 2 * width, triton=False)
        yield Work("norm backward", 0.0, n * d * (width + 12))
    yield Work("gelu again", 0.0, n * model.hidden * 2 * width, triton=False)
    yield Work("gelu backward", 0.0, n * model.hidden * (width + 8), triton=False)
    yield Work("row", 0.0, 4 * batch * model.tokens * (model.heads + 3), triton=False)


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
            for ins, _, relevant in linears(model):
                for work in layer(device, batch * model.tokens, ins, relevant, width, precision):
                    times = " | ".join(f"{1e6 * seconds:.0f}" for seconds in work.bounds(device).values())
                    print(f"| {device.name} | {name} | {work.operator} {ins} → {relevant} | {times} |")


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
