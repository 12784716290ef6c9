"""NaN and infinity stay what they are: no C++ kernel makes a number of them where plain PyTorch does not, on any instruction set."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrel import ops
from fastrel.backends import native
from fastrel.ops.library import CPU_KERNELS, REFERENCES

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"no compiled kernels: {native.load()}")

POISONS = (float("nan"), float("inf"), -float("inf"))


def agree(op: torch._ops.OpOverload, *args: Any) -> None:
    """Finite in the same places as the plain implementation, and equal there."""
    ours, plain = CPU_KERNELS[op](*args), REFERENCES[op](*args)
    ours, plain = ((x,) if isinstance(x, Tensor) else x for x in (ours, plain))
    for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
        assert torch.equal(a.isfinite(), b.isfinite()), f"output {i} of {op}"
        torch.testing.assert_close(a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0), rtol=2e-3, atol=1e-5)


def poisoned(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The arguments with one entry of one tensor replaced: the first, one in a vector's tail, and the last."""
    for i, x in enumerate(args):
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            continue
        for value, at in itertools.product(POISONS, {0, x.numel() // 2, x.numel() - 1}):
            copy = x.clone(memory_format=torch.contiguous_format)
            copy.view(-1)[at] = value
            yield (*args[:i], copy, *args[i + 1 :])


def check(op: torch._ops.OpOverload, *args: Any) -> None:
    agree(op, *args)
    for bad in poisoned(args):
        agree(op, *bad)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("rules", ["positive", "official"])
def test_zplus_linear(dtype: torch.dtype, rules: str) -> None:
    x, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((2, 5, 19), (21, 19), (21,)))
    rel = torch.rand(2, 2, 5, 21, dtype=dtype)
    check(ops.zplus_linear, x, weight, x @ weight.mT + bias, bias, rel, rel - 0.5, rules)
    check(ops.zplus_linear, x, weight, None, None, rel, None, rules)


@pytest.mark.parametrize("purpose", ["bfloat16", "int8"])
@pytest.mark.parametrize("bf16_gradient", [False, True])
def test_zplus_linear_reduced(purpose: str, bf16_gradient: bool) -> None:
    x, weight, bias = torch.randn(2, 5, 40), torch.randn(24, 40), torch.randn(24)
    y, rel = x @ weight.mT + bias, torch.rand(2, 2, 5, 24)
    for bad in ((weight,), *poisoned((weight,))):
        w = CPU_KERNELS[ops.reduced_weight](bad[0], purpose)
        w_grad = CPU_KERNELS[ops.reduced_weight](bad[0], "gradient")[0] if bf16_gradient else bad[0]
        args = (x, *w, w_grad, y, bias, rel, rel - 0.5)
        for given in (args, *(poisoned(args) if bad[0] is weight else ())):
            ours, plain = CPU_KERNELS[ops.zplus_linear_reduced](*given), REFERENCES[ops.zplus_linear_reduced](*given)
            for a, b in zip(ours, plain, strict=True):
                assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize("purpose", ["bfloat16", "int8", "gradient"])
def test_reduced_weight(purpose: str) -> None:
    """An int8 row holds no NaN: its scale must."""
    weight = torch.randn(5, 40)
    for value, at in itertools.product((*POISONS, torch.tensor(-1, dtype=torch.int32).view(torch.float32)), (0, 17, 39)):
        bad = weight.clone()
        bad[2, at] = value
        ours, plain = CPU_KERNELS[ops.reduced_weight](bad, purpose), REFERENCES[ops.reduced_weight](bad, purpose)
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
        if purpose == "int8":
            assert not ours[2][2].isfinite()


@pytest.mark.parametrize("rules", ["positive", "official"])
def test_residual_add(dtype: torch.dtype, rules: str) -> None:
    u, v, rel = (torch.randn(*s, dtype=dtype) for s in ((3, 21), (3, 21), (2, 3, 21)))
    check(ops.residual_add, u, v, rel.abs(), 0, rules)
    for a, b in itertools.permutations(POISONS, 2):  # both operands at once
        u[1, 2], v[1, 2] = a, b
        agree(ops.residual_add, u, v, rel.abs(), 0, rules)


@pytest.mark.parametrize("rules", ["positive", "official"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "excluding", "causal"])
def test_attention_relevance(dtype: torch.dtype, rules: str, mask: str) -> None:
    q, k, v = (torch.randn(2, 2, t, 5, dtype=dtype) for t in (3, 7, 7))
    keep = torch.rand(2, 1, 3, 7) > 0.4
    keep[0, 0, 0], keep[0, 0, 1] = False, True
    given = {
        "none": None,
        "causal": None,
        "bool": keep,
        "float": torch.randn(2, 1, 1, 7, dtype=dtype),
        "excluding": torch.zeros(2, 1, 3, 7, dtype=dtype).masked_fill(~keep, -torch.inf),
    }[mask]
    rel, row = torch.rand(2, 2, 2, 3, 5, dtype=dtype), torch.rand(2, 2, 3, dtype=dtype)
    for update, normalize in (("gradient_relevance", False), ("relevance", True), ("attention", True)):
        options = (0.4, mask == "causal", 2, rules, update, normalize, True)
        check(ops.attention_relevance, q, k, v, given, rel, rel - 0.5, row, *options)
    check(
        ops.attention_relevance,
        q,
        k,
        v,
        given,
        None,
        rel - 0.5,
        row,
        0.4,
        False,
        0,
        rules,
        "gradient_attention",
        True,
        True,
    )
    nothing_left = torch.full_like(q, torch.nan)
    agree(ops.attention_relevance, nothing_left, k, v, given, rel, rel - 0.5, row, *options)


@pytest.mark.parametrize("update", ["gradient_relevance", "gradient_attention", "relevance", "attention"])
def test_attention_update(dtype: torch.dtype, update: str) -> None:
    attn, grad, rel = (torch.randn(*s, dtype=dtype) for s in ((2, 3, 5, 7), (2, 2, 3, 5, 7), (2, 2, 3, 5, 7)))
    check(ops.attention_update, attn, grad, rel, update)


def test_layer_norm_backward(dtype: torch.dtype) -> None:
    x, weight, grad = (torch.randn(*s, dtype=dtype) for s in ((3, 19), (19,), (2, 3, 19)))
    check(ops.layer_norm_backward, grad, x, weight, 1, 1e-5)
    check(ops.layer_norm_backward, grad, x, None, 1, 1e-5)
    check(ops.layer_norm_backward, grad, x, weight, 1, 1e-5, True)


def test_activation_ratio(dtype: torch.dtype) -> None:
    x, y, grad = (torch.randn(*s, dtype=dtype) for s in ((3, 19), (3, 19), (2, 3, 19)))
    check(ops.activation_ratio, grad, x, y)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 17, 3), (4, 16, 4), (7, 33, 70), (13, 48, 66)], ids=str)
def test_products_of_int8_are_exact(sizes: tuple[int, int, int]) -> None:
    """Of either sign, with B turned or not, and where all numbers are the largest: pairs of products then nearly fill 16 bits."""
    rows, columns, depth = sizes
    for least in (0, -127):
        a = torch.randint(least, 128, (rows, depth), dtype=torch.int8)
        for b in (torch.randint(-127, 128, (depth, columns), dtype=torch.int8), torch.full((columns, depth), 127).char().T):
            for left in (a, torch.full_like(a, 127), torch.full_like(a, -127)):
                assert torch.equal(torch.ops.fastrel_cpu.int8_matmul(left, b), left.int() @ b.int())


def test_layer_norm_backward_of_huge_activations_is_exact_or_not_finite() -> None:
    """Squares of 1e30 are no float32: a gradient of 0 would look like an answer."""
    x, grad = torch.randn(4, 33) * 1e30, torch.randn(2, 4, 33)
    exact = REFERENCES[ops.layer_norm_backward](grad.double(), x.double(), None, 1, 1e-5)
    for implementation in (REFERENCES, CPU_KERNELS):
        result = implementation[ops.layer_norm_backward](grad, x, None, 1, 1e-5).double()
        finite = result.isfinite()
        torch.testing.assert_close(result[finite], exact[finite], rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_lesser_instruction_sets_do_so_too(isa: str) -> None:
    ladder = ["generic", "avx2", "avx512"]
    if ladder.index(native.instruction_set()) <= ladder.index(isa):
        pytest.skip(f"{native.instruction_set()} was tested above")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", __file__, "-k", "not lesser"]
    result = subprocess.run(command, env={**os.environ, "FASTREL_ISA": isa}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
