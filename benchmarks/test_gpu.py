"""Explanations on a GPU, next to the model's own forward pass, forward plus backward and plain PyTorch: needs a CUDA device.

`pytest benchmarks/test_gpu.py --benchmark-json=gpu.json`, then `python -m benchmarks.table gpu.json`. What is timed has just been
checked against plain PyTorch on the same device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastrel
from benchmarks import gate
from benchmarks.test_explanations import build, logits
from fastrel.backends import BACKENDS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

#: Model, image size or text length, batch, dtype.
CASES = [
    (name, size, batch, dtype)
    for name, size in (("vit_base_patch16_224", 224), ("vit_base_patch14_dinov2", 518), ("bert", 128))
    for batch in (1, 8, 64)
    for dtype in (torch.float32, torch.bfloat16)
]
PROVIDERS: dict[str, dict[str, Any]] = {
    "forward": {},
    "forward + backward": {},
    "triton": {"backend": "triton"},
    "triton, mixed": {"backend": "triton", "precision": "mixed"},
    "triton, low": {"backend": "triton", "precision": "low"},
    "triton, CUDA graph": {"backend": "triton", "precision": "mixed"},
    "cuda": {"backend": "cuda"},
    "torch": {"backend": "torch"},
    "triton, last block": {"backend": "triton", "start_layer": -1},
}


def given(name: str, size: int, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if name == "bert":
        return {"input_ids": torch.randint(1000, 20000, (batch, size), device="cuda")}
    return {"x": torch.randn(batch, 3, size, size, device="cuda", dtype=dtype)}


def expected_map(model: Any, inputs: dict[str, torch.Tensor], start: int | None) -> torch.Tensor:
    """By plain PyTorch on the same device, a few samples at a time: its maps take memory that a large batch does not leave."""
    explainer = fastrel.Explainer(model, backend="torch", start_layer=start)
    count = len(next(iter(inputs.values())))
    parts = [{name: x[i : i + 4] for name, x in inputs.items()} for i in range(0, count, 4)]
    return torch.cat([explainer(**part, target=0).relevance.cpu() for part in parts])


def runner(provider: str, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Callable[[], Any], float]:
    """What to time, and how far it is from what plain PyTorch gives."""
    if provider == "forward":
        return lambda: logits(model(**inputs)), 0.0
    if provider == "forward + backward":
        leaf = next(model.parameters())

        def backward() -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(logits(model(**inputs))[:, 0].sum(), leaf)

        return backward, 0.0
    options = PROVIDERS[provider]
    device = next(iter(inputs.values())).device
    if reason := BACKENDS[options["backend"]].unavailable() or BACKENDS[options["backend"]].runs_on(device):
        pytest.skip(reason)
    explainer = fastrel.Explainer(model, **options)
    expected = expected_map(model, inputs, options.get("start_layer"))
    if "graph" in provider:
        graphed = explainer.graphed(**inputs, targets=1)
        explain: Callable[[], Any] = lambda: graphed(**inputs, target=0)  # noqa: E731
    else:
        explain = lambda: explainer(**inputs, target=0)  # noqa: E731
    return explain, gate.check(explain().relevance, expected, options.get("precision", "float32"))


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that the host waits, and seconds between the first and the last launch on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began = time.perf_counter()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return time.perf_counter() - began, start.elapsed_time(end) / 1e3


def clocks() -> dict[str, Any]:
    """What the device runs at, where its driver says."""
    found: dict[str, Any] = {}
    for name in ("clock_rate", "power_draw", "temperature"):
        try:
            found[name] = getattr(torch.cuda, name)()
        except Exception as error:
            found[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-B{case[2]}-{str(case[3]).removeprefix('torch.')}"
)
def test_explanation(benchmark: Any, case: tuple[str, int, int, torch.dtype], provider: str) -> None:
    """Wall time by the benchmark, device time beside it; the L2 cache is as the previous call left it."""
    name, size, batch, dtype = case
    model, inputs = build(name, size).to("cuda", dtype), given(*case)
    benchmark.group = f"{name}, {size}, batch {batch}, {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        (run, distance), (forward, _) = runner(provider, model, inputs), runner("forward", model, inputs)
        forward_times: list[tuple[float, float]] = []
        device_times: list[float] = []
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

        def before() -> None:
            forward_times.append(timed(forward))

        def synchronized() -> None:
            device_times.append(timed(run)[1])

        benchmark.pedantic(synchronized, setup=before, rounds=20, warmup_rounds=3)
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "forward": statistics.median(wall for wall, _ in forward_times),
        "forward_device": statistics.median(device for _, device in forward_times),
        "device_time": statistics.median(device_times),
        "distance": distance,
        "peak_memory": torch.cuda.max_memory_allocated(),
        **clocks(),
    }
