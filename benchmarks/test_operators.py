"""Each fused operator as C++ kernel and in plain PyTorch: time, rate, and the share of the peak measured in the same run.

`pytest benchmarks/test_operators.py --benchmark-json=out.json`, then `python -m benchmarks.table out.json`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrel import ops
from fastrel.backends import native
from fastrel.ops.library import CPU_KERNELS, REFERENCES

T, D, HEADS = 197, 768, 12


def best(run: Callable[[], Any]) -> float:
    """Seconds, the best of ten."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def peak_gflops() -> float:
    """What torch's own large matrix product reaches."""
    a, b = torch.randn(1536, 3072), torch.randn(3072, 1536)
    return 2e-9 * 1536 * 1536 * 3072 / best(lambda: a @ b)


@functools.cache
def peak_bandwidth() -> float:
    """GB/s of a copy that fits in no cache, reads and writes counted."""
    a = torch.randn(64 << 20)
    b = torch.empty_like(a)
    return 1e-9 * 8 * a.numel() / best(lambda: b.copy_(a))


def linear(ins: int, outs: int) -> tuple[tuple[Any, ...], float, float]:
    x, weight, lane = torch.randn(1, T, ins), torch.randn(outs, ins), torch.rand(1, 1, T, outs)
    return (x, weight, x @ weight.mT, None, lane, lane - 0.5, "positive"), 4 * 2e-9 * T * ins * outs, 0


def attention(tokens: int) -> tuple[tuple[Any, ...], float, float]:
    q, k, v = torch.randn(3, 1, HEADS, tokens, 64)
    lane, row = torch.rand(1, 1, HEADS, tokens, 64), torch.rand(1, 1, tokens)
    options = (0.125, False, 0, "positive", "gradient_relevance", False, True)
    return (q, k, v, None, lane, lane - 0.5, row, *options), 8 * 2e-9 * HEADS * tokens * tokens * 64, 0


def add() -> tuple[tuple[Any, ...], float, float]:
    u, v, lane = torch.randn(8, T, D), torch.randn(8, T, D), torch.rand(1, 8, T, D)
    return (u, v, lane, 0, "positive"), 0, 5 * 4e-9 * u.numel()


def norm() -> tuple[tuple[Any, ...], float, float]:
    x, lane = torch.randn(8, T, D), torch.rand(1, 8, T, D)
    return (lane, x, torch.randn(D), 1, 1e-6), 0, 3 * 4e-9 * x.numel()


def update() -> tuple[tuple[Any, ...], float, float]:
    maps = torch.rand(1, HEADS, T, T)
    return (None, maps, maps, "gradient_relevance"), 0, 4e-9 * maps.numel() * (2 + 1 / HEADS)


#: Name: operator, (arguments, GFLOP, GB).
CASES: dict[str, tuple[Any, Callable[[], tuple[tuple[Any, ...], float, float]]]] = {
    "zplus_linear 768 → 3072": (ops.zplus_linear, lambda: linear(768, 3072)),
    "zplus_linear 3072 → 768": (ops.zplus_linear, lambda: linear(3072, 768)),
    "zplus_linear 768 → 768": (ops.zplus_linear, lambda: linear(768, 768)),
    "attention_relevance T = 197": (ops.attention_relevance, lambda: attention(197)),
    "attention_relevance T = 785": (ops.attention_relevance, lambda: attention(785)),
    "residual_add, batch 8": (ops.residual_add, add),
    "layer_norm_backward, batch 8": (ops.layer_norm_backward, norm),
    "attention_update": (ops.attention_update, update),
}


@pytest.mark.parametrize("provider", ["plain PyTorch", "C++"])
@pytest.mark.parametrize("name", CASES)
def test_operator(benchmark: Any, name: str, provider: str) -> None:
    if provider == "C++" and native.load():
        pytest.skip(f"no compiled kernels: {native.load()}")
    torch.manual_seed(0)
    op, make = CASES[name]
    args, gflop, gigabytes = make()
    function = CPU_KERNELS[op] if provider == "C++" else REFERENCES[op]
    exact = REFERENCES[op](*(x.double() if isinstance(x, Tensor) else x for x in args))
    for ours, wanted in zip(*(x if isinstance(x, tuple) else (x,) for x in (function(*args), exact)), strict=True):
        assert not wanted.numel() or float((ours - wanted).norm() / wanted.norm()) < 1e-5
    benchmark.group = name
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gflop": gflop,
        "gigabytes": gigabytes,
        "peak": peak_gflops() if gflop else peak_bandwidth(),
    }
    benchmark.pedantic(functools.partial(function, *args), rounds=15, warmup_rounds=2)
