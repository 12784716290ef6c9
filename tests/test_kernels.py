"""C++ kernels against the plain PyTorch of the same operators: every tail, stride, mask and rule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrel import ops
from fastrel.backends import native
from fastrel.ops.library import CPU_KERNELS, REFERENCES
from tests import golden_files as golden

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"no compiled kernels: {native.load()}")

DTYPES = [torch.float64, torch.float32]
RULES = ["positive", "official"]


def double(values: Any) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]


def compare(op: torch._ops.OpOverload, *args: Any) -> None:
    """float64 within 1e-10 of the reference; float32 within twice its own float32 error, or 5e-6 (sums run in order)."""
    ours, plain, exact = CPU_KERNELS[op](*args), REFERENCES[op](*args), REFERENCES[op](*double(args))
    ours, plain, exact = ((x,) if isinstance(x, Tensor) else x for x in (ours, plain, exact))
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.shape == c.shape
        assert a.isfinite().all(), f"output {i} of {op}"
        if not a.numel():
            continue
        limit = 1e-10 if a.dtype == torch.float64 else max(2 * golden.relative_error(b.double(), c), 5e-6)
        assert golden.relative_error(a.double(), c) <= limit, f"output {i} of {op}"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    ("tokens", "features", "outs"), [(1, 16, 24), (5, 7, 13), (63, 100, 33), (197, 65, 2100), (577, 3, 1)]
)
@pytest.mark.parametrize("targets", [1, 3])
def test_zplus_linear(dtype: torch.dtype, rules: str, tokens: int, features: int, outs: int, targets: int) -> None:
    x, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((2, tokens, features), (outs, features), (outs,)))
    y = x @ weight.mT + bias
    rel, grad = torch.rand(targets, 2, tokens, outs, dtype=dtype), torch.randn(targets, 2, tokens, outs, dtype=dtype)
    for given in ((y, bias), (y - bias, None), (None, None)):
        compare(ops.zplus_linear, x, weight, *given, rel, grad, rules)
    compare(ops.zplus_linear, x, weight, y, bias, rel, None, rules)


def test_zplus_linear_over_several_chunks_of_the_weight_and_tiles_of_rows() -> None:
    x, weight = torch.randn(1, 600, 768), torch.randn(1500, 768)
    lanes = torch.rand(2, 1, 600, 1500)
    compare(ops.zplus_linear, x, weight, x @ weight.mT, None, lanes, lanes - 0.5, "positive")


def test_zplus_linear_takes_any_strides() -> None:
    x, weight = torch.randn(7, 3, 10).transpose(0, 1), torch.randn(10, 9).T
    y = (x @ weight.mT)[:, ::2]
    rel = torch.rand(3, 4, 9, 2).permute(3, 0, 1, 2)
    compare(ops.zplus_linear, x[:, ::2], weight, y, None, rel, rel.flip(2), "positive")


@pytest.mark.parametrize("rules", RULES)
def test_zplus_linear_at_the_edges(rules: str) -> None:
    """All-zero and all-negative inputs, relevance that is zero or denormal: the reference's answer, never NaN."""
    weight = torch.randn(4, 6, dtype=torch.float64)
    for x in (torch.zeros(1, 2, 6), -torch.rand(1, 2, 6), torch.full((1, 2, 6), 1e-310)):
        for rel in (torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2, 4), 1e-320)):
            x64, rel64 = x.double(), rel.double()
            compare(ops.zplus_linear, x64, weight, x64 @ weight.mT, None, rel64, rel64, rules)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_residual_add(dtype: torch.dtype, rules: str, batch_dim: int) -> None:
    u, v, rel = torch.randn(4, 3, 50, dtype=dtype), torch.randn(4, 3, 50, dtype=dtype), torch.rand(2, 4, 3, 50, dtype=dtype)
    compare(ops.residual_add, u, v, rel, batch_dim, rules)
    compare(ops.residual_add, u, v[:1].expand(4, 3, 50), rel.transpose(1, 2).contiguous().transpose(1, 2), batch_dim, rules)
    if rules == "positive":
        compare(ops.residual_add, u, -u, rel, batch_dim, rules)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    ("queries", "keys", "d"), [(1, 1, 16), (1, 50, 128), (5, 7, 24), (63, 100, 80), (197, 197, 64), (130, 61, 128)]
)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_attention_relevance(dtype: torch.dtype, rules: str, queries: int, keys: int, d: int, mask: str) -> None:
    # Under official, denominators are signed sums: positive operands keep them from zero, where all digits are rounding.
    draw = torch.rand if rules == "official" else torch.randn
    q, k, v = (draw(2, t, 3, d, dtype=dtype).transpose(1, 2) for t in (queries, keys, keys))
    given = {
        "none": None,
        "causal": None,
        "bool": torch.rand(2, 1, queries, keys) > 0.3,
        "float": draw(2, 1, 1, keys, dtype=dtype),
    }[mask]
    if mask == "bool":
        given[0, 0, 0] = rules == "official"  # type: ignore[index]  # a row that attends to nothing
    rel, grad = (f(2, 2, queries, 3, d, dtype=dtype).transpose(2, 3) for f in (torch.rand, torch.randn))
    row = torch.rand(2, 2, queries, dtype=dtype)
    for inputs, normalize in itertools.product((True, False), repeat=2):
        options = (d**-0.5, mask == "causal", 0, rules, "gradient_relevance", normalize, inputs, keys % 2 == 1)
        compare(ops.attention_relevance, q, k, v, given, rel, grad, row, *options)


@pytest.mark.parametrize("update", ["gradient_attention", "relevance", "attention"])
def test_attention_relevance_of_other_methods(update: str) -> None:
    q, k, v, lane = (
        torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8), (4, 2, 3, 9, 8))
    )
    row = torch.rand(4, 2, 9, dtype=torch.float64)
    rel = None if update == "gradient_attention" else lane.abs()
    grad = None if update == "relevance" else lane
    compare(ops.attention_relevance, q, k, v, None, rel, grad, row, 0.3, False, 0, "positive", update, True, True)


def test_attention_over_some_queries_is_that_part_of_all() -> None:
    """With a causal mask, which must know where the queries are."""
    q, k, v = (torch.randn(1, 2, 70, 16, dtype=torch.float64) for _ in range(3))
    lane = torch.rand(1, 1, 2, 9, 16, dtype=torch.float64)
    row = torch.rand(1, 1, 9, dtype=torch.float64)
    options = (0.25, True, 40, "positive", "gradient_relevance", False, True)
    compare(ops.attention_relevance, q[:, :, 40:49], k, v, None, lane, lane - 0.5, row, *options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 5, 63, 768])
def test_layer_norm_backward(dtype: torch.dtype, width: int) -> None:
    x, weight, grad = (torch.randn(*s, dtype=dtype) for s in ((2, 9, width), (width,), (3, 2, 9, width)))
    for frozen in (False, True):
        compare(ops.layer_norm_backward, grad, x, weight, 1, 1e-5, frozen)
        compare(ops.layer_norm_backward, grad, x, None, 1, 1e-5, frozen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_ratio(dtype: torch.dtype) -> None:
    x, grad = torch.randn(2, 9, 63, dtype=dtype), torch.randn(3, 2, 9, 63, dtype=dtype)
    x[0, 0] = 0
    compare(ops.activation_ratio, grad, x, torch.relu(x))
    compare(ops.activation_ratio, grad, x, torch.nn.functional.gelu(x), "none")


@pytest.mark.parametrize("update", ["gradient_relevance", "gradient_attention", "relevance", "attention"])
def test_attention_update(update: str) -> None:
    attn, grad, rel = torch.rand(2, 3, 5, 7), torch.randn(4, 2, 3, 5, 7), torch.rand(4, 2, 3, 5, 7)
    compare(ops.attention_update, attn, grad, rel, update)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("tokens", "features", "outs"), [(5, 40, 24), (197, 384, 96), (600, 64, 48)])
def test_reduced_products_err_as_their_rounding_does(int8: bool, tokens: int, features: int, outs: int) -> None:
    """Within twice the error of the same rounding in plain PyTorch, plus bfloat16's rounding of results."""
    x, weight, bias = torch.randn(2, tokens, features), torch.randn(outs, features), torch.randn(outs)
    y, rel, grad = x @ weight.mT + bias, torch.rand(2, 2, tokens, outs), torch.randn(2, 2, tokens, outs)
    exact = REFERENCES[ops.zplus_linear](*double((x, weight, y, bias, rel, grad)), "positive")
    prepared = [CPU_KERNELS[ops.reduced_weight](weight, "int8" if int8 else "bfloat16")]
    prepared.append(REFERENCES[ops.reduced_weight](weight, "int8" if int8 else "bfloat16"))
    for ours, plain in zip(*prepared, strict=True):
        difference = (ours.double() - plain.double()).abs()
        assert not ours.numel() or difference.max() <= (1 if ours.dtype == torch.int8 else 1e-6)  # halves round either way
        assert not ours.numel() or difference.mean() < 1e-2
    for bf16_gradient in (False, True):
        w_grad = CPU_KERNELS[ops.reduced_weight](weight, "gradient")[0] if bf16_gradient else weight
        args = (x, *prepared[0], w_grad, y, bias, rel, grad)
        wide = double(args)
        wide[4] = w_grad if bf16_gradient else w_grad.double()
        plain = REFERENCES[ops.zplus_linear_reduced](*wide)
        for ours, rounded, wanted in zip(CPU_KERNELS[ops.zplus_linear_reduced](*args), plain, exact, strict=True):
            limit = 2 * golden.relative_error(rounded, wanted) + (4e-3 if not int8 or bf16_gradient else 1e-5)
            assert golden.relative_error(ours.double(), wanted) < limit


def test_what_a_kernel_does_not_take_is_said() -> None:
    q, lane = torch.randn(1, 1, 3, 4), torch.rand(1, 1, 1, 3, 4)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        CPU_KERNELS[ops.residual_add](q.half(), q.half(), lane.half(), 0, "positive")
    with pytest.raises(RuntimeError, match="different dtypes"):
        CPU_KERNELS[ops.residual_add](q, q.double(), lane, 0, "positive")


def test_torch_accepts_the_kernels_registrations() -> None:
    """opcheck: schemas tell the truth, shape functions give the shapes."""
    x, weight = torch.randn(2, 5, 8), torch.randn(6, 8)
    lane, value = torch.rand(3, 2, 5, 6), torch.randn(2, 5, 6)
    q, heads, row = torch.randn(2, 3, 5, 4), torch.rand(2, 2, 3, 5, 4), torch.rand(2, 2, 5)
    maps = torch.rand(2, 3, 5, 5)
    calls: dict[torch._ops.OpOverload, tuple[Any, ...]] = {
        ops.zplus_linear: (x, weight, None, None, lane, lane, "positive"),
        ops.zplus_linear_reduced: (
            x, *CPU_KERNELS[ops.reduced_weight](weight, "int8"), weight, value, None, lane, lane,
        ),
        ops.reduced_weight: (weight, "int8"),
        ops.row_digest: (weight, torch.arange(8, dtype=torch.int32)),
        ops.residual_add: (value, value, lane, 0, "official"),
        ops.layer_norm_backward: (lane, value, None, 1, 1e-5),
        ops.activation_ratio: (lane, value, value),
        ops.attention_relevance: (
            q, q, q, None, heads, heads, row, 0.5, False, 0, "official", "gradient_relevance", True, True
        ),
        ops.attention_update: (maps, maps, maps, "gradient_relevance"),
    }  # fmt: skip
    assert set(calls) == set(CPU_KERNELS)
    for op, args in calls.items():
        torch.library.opcheck(CPU_KERNELS[op], args, test_utils=("test_schema", "test_faketensor"))


def wrong_shapes() -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    """Calls that fit but for the shape of one operand: a size more, less or 0, a dimension more or less."""
    x, weight = torch.randn(2, 5, 8), torch.randn(6, 8)
    lane, value = torch.rand(3, 2, 5, 6), torch.randn(2, 5, 6)
    q, k, heads, row = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.rand(2, 2, 3, 5, 4), torch.rand(2, 2, 5)
    maps, prepared = torch.rand(2, 3, 5, 5), CPU_KERNELS[ops.reduced_weight](weight, "int8")
    options = (0.5, False, 0, "official", "gradient_relevance", True, True)
    calls: dict[torch._ops.OpOverload, tuple[Any, ...]] = {
        ops.zplus_linear: (x, weight, value, torch.randn(6), lane, lane, "positive"),
        ops.zplus_linear_reduced: (x, *prepared, weight, value, torch.randn(6), lane, lane),
        ops.reduced_weight: (weight, "bfloat16"),
        ops.row_digest: (weight, torch.arange(8, dtype=torch.int32)),
        ops.residual_add: (value, value, lane, 0, "official"),
        ops.layer_norm_backward: (lane, value, torch.randn(6), 1, 1e-5),
        ops.activation_ratio: (lane, value, value),
        ops.attention_relevance: (q, k, k, torch.rand(2, 1, 5, 7), heads, heads, row, *options),
        ops.attention_update: (maps, maps[None], maps[None], "gradient_relevance"),
    }
    assert set(calls) == set(CPU_KERNELS)
    for op, args in calls.items():
        CPU_KERNELS[op](*args)
        for i, arg in enumerate(args):
            if not isinstance(arg, Tensor):
                continue
            others: list[tuple[int, ...]] = [(1, *arg.shape), tuple(arg.shape[1:]), tuple(arg.shape[:-1])]
            for dim, size in enumerate(arg.shape):
                others += [(*arg.shape[:dim], new, *arg.shape[dim + 1 :]) for new in (size - 1, size + 1, 0)]
            for shape in others:
                yield op, (*args[:i], torch.ones(shape, dtype=arg.dtype), *args[i + 1 :])


def test_operands_that_do_not_fit_together_are_refused_not_read_past_their_end() -> None:
    """By a check of our own; what is taken, a mask that broadcasts, say, is what the reference makes of it."""
    right = 0
    for op, args in wrong_shapes():
        try:
            results = CPU_KERNELS[op](*args)
        except RuntimeError as error:
            right += f"fastrel::{op._schema.name.removeprefix('fastrel::')}" in str(error)
            continue
        wanted = REFERENCES[op](*args)
        torch.testing.assert_close(results, wanted, rtol=1e-3, atol=1e-5)
        right += 1
    assert right == sum(1 for _ in wrong_shapes())
    bad = (torch.randn(3, 4), torch.randn(5, 6), None, None, torch.rand(1, 3, 5), None, "positive")
    with pytest.raises(RuntimeError, match=r"fastrel::zplus_linear: x must have shape \[3, 6\], not \[3, 4\]"):
        CPU_KERNELS[ops.zplus_linear](*bad)


@pytest.mark.parametrize("targets", [0, 1])
@pytest.mark.parametrize("outs", [0, 3])
@pytest.mark.parametrize("tokens", [0, 2])
def test_linear_layers_without_targets_tokens_or_outputs(targets: int, outs: int, tokens: int) -> None:
    x, weight, rel = torch.randn(1, tokens, 4), torch.randn(outs, 4), torch.rand(targets, 1, tokens, outs)
    y = x @ weight.mT
    compare(ops.zplus_linear, x, weight, y, None, rel, rel, "positive")
    prepared = CPU_KERNELS[ops.reduced_weight](weight, "bfloat16")
    for part in CPU_KERNELS[ops.zplus_linear_reduced](x, *prepared, weight, y, None, rel, rel):
        assert part.shape == (targets, 1, tokens, 4)
        assert part.isfinite().all()
