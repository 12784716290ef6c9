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


def runner(provider: str, model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    if provider == "forward":
        return lambda: logits(model(**inputs))
    if provider == "forward + backward":
        leaf = next(model.parameters())

        def backward() -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(logits(model(**inputs))[:, 0].sum(), leaf)

        return backward
    options = PROVIDERS[provider]
    if reason := BACKENDS[options["backend"]].unavailable():
        pytest.skip(reason)
    explainer = fastrel.Explainer(model, **options)
    start = options.get("start_layer")
    expected = fastrel.Explainer(model, backend="torch", start_layer=start)(**inputs, target=0).relevance
    if "graph" in provider:
        graphed = explainer.graphed(**inputs, targets=1)
        explain: Callable[[], Any] = lambda: graphed(**inputs, target=0)  # noqa: E731
    else:
        explain = lambda: explainer(**inputs, target=0)  # noqa: E731
    bound = 5e-2 if "precision" in options else 1e-3
    assert float((explain().relevance - expected).norm() / expected.norm()) < bound, "not what plain PyTorch gives"
    return explain


def timed(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.gpu
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-B{case[2]}-{str(case[3]).removeprefix('torch.')}"
)
def test_explanation(benchmark: Any, case: tuple[str, int, int, torch.dtype], provider: str) -> None:
    name, size, batch, dtype = case
    model, inputs = build(name, size).to("cuda", dtype), given(*case)
    benchmark.group = f"{name}, {size}, batch {batch}, {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        run, forward = runner(provider, model, inputs), runner("forward", model, inputs)
        forward_times: list[float] = []

        def before() -> None:
            forward_times.append(timed(forward))

        def synchronized() -> None:
            run()
            torch.cuda.synchronize()

        benchmark.pedantic(synchronized, setup=before, rounds=20, warmup_rounds=3)
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "forward": statistics.median(forward_times),
        "peak_memory": torch.cuda.max_memory_allocated(),
    }
