"""A prediction, not a measurement: what explanations should take on GPUs that are not here. `python -m benchmarks.roofline`.

For every operator of a model: bytes moved and floating-point operations of our Triton kernels, and the time that the slower of two
roofs allows, memory bandwidth or the arithmetic of the precision that is multiplied in. For every kernel: registers, shared memory
and occupancy of the compiled binary. Launches, synchronisation and everything that keeps a kernel from its roof are left out;
a device will be slower. The model's own forward pass is predicted in the same way, so that the ratio says something.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import compiled


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet: dense TFLOP/s by precision, GB/s of memory, and what a multiprocessor has."""

    name: str
    target: str
    tflops: dict[str, float]
    bandwidth: float
    shared: int
    registers: int = 65536
    threads: int = 2048


#: NVIDIA's data sheets of the A100 80 GB SXM and the H100 SXM, without sparsity. tf32x3: three TF32 products for one.
DEVICES = (
    Device("A100", "sm_80", {"bfloat16": 312, "tf32": 156, "float32": 52, "plain": 19.5}, 2039, 164 << 10),
    Device("H100", "sm_90", {"bfloat16": 989, "float8": 1979, "tf32": 494, "float32": 165, "plain": 67}, 3350, 228 << 10),
)


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
    """One operator of a block: operations in its precision, and bytes."""

    operator: str
    flop: float
    bytes: float
    precision: str

    def seconds(self, device: Device) -> float:
        """What the slower roof allows."""
        peak = device.tflops.get(self.precision, device.tflops["bfloat16"])
        return max(self.flop / (peak * 1e12), self.bytes / (device.bandwidth * 1e9))


def product(m: int, n: int, k: int) -> float:
    """Operations of one matrix product."""
    return 2.0 * m * n * k


def linears(model: Model) -> Iterator[tuple[int, int, int]]:
    """(inputs, outputs, outputs that carry relevance) of a block's linear layers: of q, k and v only v does."""
    d = model.features
    yield from ((d, 3 * d, d), (d, d, d), (d, model.hidden, model.hidden), (model.hidden, d, d))


def forward(model: Model, batch: int, width: int, precision: str) -> Iterator[Work]:
    """One block of the model's own forward pass, values of `width` bytes."""
    n, d = batch * model.tokens, model.features
    for ins, outs, _ in linears(model):
        yield Work("linear", product(n, outs, ins), width * (n * ins + outs * ins + n * outs), precision)
    maps = batch * model.tokens**2 * d
    yield Work("attention", 4.0 * maps, width * 4 * n * d, precision)
    yield Work("norms and adds", 10.0 * n * d, width * 10 * n * d, "plain")


def reverse(model: Model, batch: int, width: int, precision: str) -> Iterator[Work]:
    """One block of the reverse pass under the positive rules, one target; lanes are float32."""
    n, d = batch * model.tokens, model.features
    linear = "tf32" if width == 2 and precision == "float32" else precision
    share = 4 if precision == "float32" else 2  # bytes of what lies between the two products
    for ins, outs, relevant in linears(model):
        from_output = width == 4 and precision == "float32"
        first = product(n, relevant, ins) * (1 if from_output else 2)
        values = width * (n * ins + relevant * ins) + (width * n * relevant if from_output else 0)
        yield Work("zplus_shares", first, values + 4 * n * relevant + share * n * relevant, linear)
        weight = width * relevant * ins
        moved = share * n * relevant + 4 * n * relevant + weight + width * n * ins + 8 * n * ins
        yield Work("zplus_back", 3 * product(n, ins, relevant), moved, linear)
        if relevant < outs:
            rest = outs - relevant
            yield Work("gradient", product(n, ins, rest), 4 * n * (rest + ins) + width * rest * ins, linear)
    maps = batch * model.tokens**2 * d
    attention = "tf32" if width == 2 else "float32"
    # Dots of the three sweeps: rows 3, queries 3, keys 6, the scores once more where lanes go separately.
    yield Work(
        "attention_relevance", 2.0 * maps * (12 if width == 2 else 14), width * 9 * n * d + 4 * 12 * n * d, attention
    )
    yield Work("residual_add", 16.0 * n * d, 2 * (2 * width + 12) * n * d, "plain")
    yield Work("layer_norm_backward", 24.0 * n * d, 2 * (width + 8) * n * d, "plain")
    hidden = n * model.hidden
    yield Work("gelu and sums of lanes", 30.0 * hidden, (width * 3 + 8) * hidden + 4 * 6 * n * d, "plain")


def occupancy(device: Device, registers: int, shared: int, warps: int) -> float:
    """Threads that a multiprocessor holds of those it could hold."""
    threads = 32 * warps
    by_registers = device.registers // (threads * -(-registers // 8) * 8)
    by_shared = device.shared // (shared + 1024) if shared else 32
    return min(by_registers, by_shared, device.threads // threads, 32) * threads / device.threads


def models(batches: list[int]) -> None:
    """Predicted milliseconds of forward passes and explanations."""
    kinds = (("float32", 4, "float32"), ("bfloat16 model", 2, "float32"), ("mixed", 2, "bfloat16"), ("low", 2, "float8"))
    print("| device | model | batch | what | forward, ms | explanation, ms | in forward passes | slowest operators |")
    print("|---|---|---|---|---|---|---|---|")
    for device in DEVICES:
        for model in MODELS:
            for batch in batches:
                for name, width, precision in kinds:
                    if precision not in device.tflops:
                        continue
                    own = list(forward(model, batch, width, "plain" if width == 4 else "bfloat16"))  # TF32 is off in torch
                    back = list(reverse(model, batch, width, precision))
                    once = model.blocks * sum(work.seconds(device) for work in own)
                    total = once + model.blocks * sum(work.seconds(device) for work in back)
                    by_operator: Counter[str] = Counter()
                    for work in back:
                        by_operator[work.operator] += work.seconds(device) * model.blocks / total
                    slowest = ", ".join(f"{operator} {part:.0%}" for operator, part in by_operator.most_common(3))
                    ratio = f"{total / once:.1f}"
                    times = f"{1e3 * once:.3f} | {1e3 * total:.3f}"
                    print(f"| {device.name} | {model.name} | {batch} | {name} | {times} | {ratio} | {slowest} |")


def kernels() -> None:
    """Resources and occupancy of the binaries that tests/golden/triton_resources.json describes."""
    kept = json.loads(compiled.TABLE.read_text())
    print("| device | kernel | registers | shared, KiB | occupancy |\n|---|---|---|---|---|")
    for device in DEVICES:
        for case in compiled.cases(device.target):
            used = kept[device.target][case.name]
            share = occupancy(device, used["registers"], used["shared"], case.warps)
            print(f"| {device.name} | {case.name} | {used['registers']} | {used['shared'] / 1024:.0f} | {share:.0%} |")


def operators(model: Model, batch: int) -> None:
    """Operations, bytes and both roofs of every operator of one block."""
    print("| device | operator | GFLOP | MB | µs by arithmetic | µs by memory |\n|---|---|---|---|---|---|")
    for device in DEVICES:
        for name, width, precision in (("float32", 4, "float32"), ("mixed", 2, "bfloat16")):
            for work in reverse(model, batch, width, precision):
                peak = device.tflops.get(work.precision, device.tflops["bfloat16"])
                times = f"{work.flop / peak / 1e6:.1f} | {work.bytes / device.bandwidth / 1e3:.1f}"
                print(
                    f"| {device.name} | {work.operator}, {name} | {work.flop / 1e9:.2f} | {work.bytes / 1e6:.1f} | {times} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 64], help="batch sizes (default: 1 64)")
    options = parser.parse_args()
    print("# Predicted, never measured\n\n## Explanations, all blocks, one target\n")
    models(options.batch)
    print(f"\n## Operators of one block of {MODELS[0].name}, batch {options.batch[-1]}\n")
    operators(MODELS[0], options.batch[-1])
    print("\n## Kernels\n")
    kernels()


if __name__ == "__main__":
    main()
