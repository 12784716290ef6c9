"""Device time of every kernel beside what `benchmarks.roofline` predicted: `python -m benchmarks.measured FOLDER`, on a GPU.

Explanations of ViT-B that have passed the gate (`benchmarks.gate`) are profiled; what the forward pass alone takes is taken off. The
folder gets kernels.json; where it has test_gpu.py's gpu.json, its rows come first. `--fake` makes both up, on any machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline, test_gpu

#: What `roofline` calls the work of a Triton kernel.
OPERATORS = {
    "zplus_sums_kernel": "zplus_shares",
    "zplus_shares_kernel": "zplus_shares",
    "zplus_back_kernel": "zplus_back",
    "attention_rows_kernel": "attention rows",
    "attention_queries_kernel": "attention queries",
    "attention_keys_kernel": "attention keys",
    "attention_lanes_kernel": "attention lanes",
    "half_block_kernel": "half block",
    "activation_kernel": "gelu",
    "layer_norm_backward_kernel": "norm",
    "rollout_kept_kernel": "row",
    "rollout_through_kernel": "row",
    "attention_update_kernel": "row",
    **dict.fromkeys(("residual_share_kernel", "residual_sums_kernel", "residual_scale_kernel"), "add"),
    **dict.fromkeys(("sides_kernel", "shares_kernel", "combine_kernel", "parts_kernel", "scaled_rows_kernel"), "passes"),
}

#: What names of the vendor's products hold.
PRODUCTS = ("gemm", "gemv", "cutlass", "xmma", "nvjet", "splitk")

#: Batch sizes, and what is explained how, by `roofline`'s names.
BATCHES = (1, 64)
PROVIDERS = {"float32": "triton", "bfloat16 model": "triton", "mixed": "triton, mixed", "low": "triton, low"}

#: Explanations that are profiled at once.
ROUNDS = 10

CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"

#: Launches and seconds of an explanation, by kernel.
Times = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Record:
    """One kind of explanation of ViT-B/16 224: how far its map is from plain PyTorch's, what runs of it and of the model alone."""

    what: str
    batch: int
    device: str
    capability: int
    clocks: str
    distance: float
    explanation: Times
    forward: Times


def operator_of(kernel: str) -> str:
    """A kernel's work, by `roofline`'s name for it; "other" is none of ours."""
    if kernel in OPERATORS:
        return OPERATORS[kernel]
    return "products" if any(part in kernel.lower() for part in PRODUCTS) else "other"


def times_of(events: Iterable[Any], rounds: int) -> Times:
    """What ran on the device by what torch's profiler saw of `rounds` calls."""
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return {event.key: (event.count / rounds, 1e-6 * event.self_device_time_total / rounds) for event in on_device}


def profiled(call: Callable[[], Any]) -> Times:
    """Of one call, on a GPU."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(ROUNDS):
            call()
        torch.cuda.synchronize()
    return times_of(seen.key_averages(), ROUNDS)


def clocks(call: Callable[[], Any]) -> str:
    """What the driver says of the GPUs while they work."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as asked:
            while asked.poll() is None:
                call()
            return asked.stdout.read().strip() if asked.stdout else ""
    except OSError as error:
        return str(error)


def measured() -> Iterator[Record]:
    """Every kind of explanation on the current GPU. One that fails is left out, and said."""
    major, minor = torch.cuda.get_device_capability()
    for what, width, precision in roofline.KINDS:
        if precision == "low" and (major, minor) < (9, 0):
            continue
        dtype = torch.float32 if width == 4 else torch.bfloat16
        model = test_gpu.build("vit_base_patch16_224", 224).to("cuda", dtype)
        for batch in BATCHES:
            given = test_gpu.given("vit_base_patch16_224", 224, batch, dtype)
            try:
                with torch.no_grad():
                    run, distance = test_gpu.runner(PROVIDERS[what], model, given)
                    forward, _ = test_gpu.runner("forward", model, given)
                    times = profiled(run), profiled(forward)
                    said = clocks(run)
            except (RuntimeError, AssertionError) as error:
                print(f"{what}, batch {batch}: {error}")
                continue
            yield Record(what, batch, torch.cuda.get_device_name(), 10 * major + minor, said, distance, *times)


def predicted(record: Record) -> tuple[roofline.Device, Times]:
    """Launches and seconds of the reverse pass by operator, on the newest GPU of `roofline` that is not newer than this one."""
    known = [device for device in roofline.DEVICES if device.capability <= record.capability]
    device, model = (known or roofline.DEVICES)[-1], roofline.MODELS[0]
    width, precision = next((width, precision) for what, width, precision in roofline.KINDS if what == record.what)
    if precision == "low" and "float8" not in device.tflops:
        return device, {}
    return device, _added(
        (work.operator, model.blocks, model.blocks * work.seconds(device))
        for work in roofline.reverse(device, model, record.batch, width, precision)
    )


def _added(parts: Iterable[tuple[str, float, float]]) -> Times:
    total: Times = {}
    for name, launches, seconds in parts:
        before = total.get(name, (0.0, 0.0))
        total[name] = before[0] + launches, before[1] + seconds
    return total


def table(record: Record) -> Iterator[str]:
    """Lines of Markdown: the reverse pass by operator, slowest first, and what it is of."""
    device, expected = predicted(record)
    own = _added((operator_of(name), *times) for name, times in record.explanation.items())
    apart = _added((operator_of(name), -launches, -seconds) for name, (launches, seconds) in record.forward.items())
    found = _added((name, *times) for part in (own, apart) for name, times in part.items())
    yield f"### {record.what}, batch {record.batch}: map {record.distance:.1e} from plain PyTorch's\n"
    yield f"Measured on {record.device} ({record.clocks}); predicted for {device.name} at {device.clock} GHz.\n"
    yield "| operator | launches | as predicted | ms | as predicted | times |\n|---|---|---|---|---|---|"
    rows = {name: (found.get(name, (0.0, 0.0)), expected.get(name, (0.0, 0.0))) for name in {**expected, **found}}
    rows["all"] = tuple(tuple(map(sum, zip(*side, strict=True))) for side in zip(*rows.values(), strict=True))  # type: ignore[assignment]
    for name, ((launches, seconds), (wanted, bound)) in sorted(rows.items(), key=lambda row: -row[1][0][1]):
        ratio = f"{seconds / bound:.2f}" if bound else "–"
        yield f"| {name} | {launches:.0f} | {wanted:.0f} | {1e3 * seconds:.3f} | {1e3 * bound:.3f} | {ratio} |"
    yield ""


def runs(report: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown: what test_gpu.py timed, the host's and the device's time side by side."""
    yield "| case | what | host, ms | device, ms | forward, ms | distance | peak, MB | clock, MHz |"
    yield "|---|---|---|---|---|---|---|---|"
    for run in report["benchmarks"]:
        info = run["extra_info"]
        times = " | ".join(f"{1e3 * x:.2f}" for x in (run["stats"]["median"], info["device_time"], info["forward_device"]))
        more = f"{info['distance']:.1e} | {info['peak_memory'] / 1e6:.0f} | {info['clock_rate']}"
        yield f"| {run['group']} | {run['params']['provider']} | {times} | {more} |"
    yield ""


#: By how much made-up kernels are slower than predicted.
SLOWER = 1.5


def fake() -> tuple[dict[str, Any], list[Record]]:
    """What a GPU might have given, `SLOWER` than predicted, in the form of gpu.json and as records."""
    records, timed = [], []
    spelled = {operator: kernel for kernel, operator in reversed(OPERATORS.items())} | {"products": "sm90_xmma_gemm_bf16"}
    for what, _, _ in roofline.KINDS:
        for batch in BATCHES:
            empty = Record(what, batch, "no GPU: made-up times", 90, "no clock", 1e-6, {}, {})
            reverse = {spelled[name]: (n, SLOWER * s) for name, (n, s) in predicted(empty)[1].items()}
            forward = {"ampere_sgemm_128x64_tn": (48.0, 1e-3), "elementwise_kernel": (77.0, 1e-4)}
            records.append(Record(**{**asdict(empty), "explanation": {**forward, **reverse}, "forward": forward}))
            device = sum(seconds for _, seconds in records[-1].explanation.values())
            info = {"threads": 1, "torch": torch.__version__, "device": empty.device, "forward": 2e-3, "forward_device": 1e-3,
                    "device_time": device, "distance": 1e-6, "peak_memory": 10**9, "clock_rate": "none"}  # fmt: skip
            group = f"vit_base_patch16_224, 224, batch {batch}, made up, {what}"
            timed.append(
                {
                    "group": group,
                    "params": {"provider": PROVIDERS[what]},
                    "stats": {"median": 2 * device},
                    "extra_info": info,
                }
            )
    return {"machine_info": {"cpu": {}}, "benchmarks": timed}, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fake", action="store_true", help="make up both files")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    timed, kept = options.folder / "gpu.json", options.folder / "kernels.json"
    if options.fake:
        report, records = fake()
        timed.write_text(json.dumps(report))
    else:
        records = list(measured())
    kept.write_text(json.dumps([asdict(record) for record in records]))
    if timed.exists():
        print("\n".join(runs(json.loads(timed.read_text()))))
    for record in records:
        print("\n".join(table(record)))
    print(f"What was profiled, whole:\n\n{kept.read_text()}")


if __name__ == "__main__":
    main()
