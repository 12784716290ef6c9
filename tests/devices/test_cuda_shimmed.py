"""The CUDA passes on a CPU, through the host shim of tests/shim, with the address and undefined-behaviour sanitizers.

Collected only where FASTREL_CUDA_LIBRARY names the shimmed library: tests/test_cuda.py builds it and starts this.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not os.environ.get("FASTREL_CUDA_LIBRARY"):
    pytest.skip("needs FASTREL_CUDA_LIBRARY: tests/test_cuda.py runs it", allow_module_level=True)

import fastrel
from fastrel import ops
from fastrel.backends import cuda
from fastrel.ops.library import REFERENCES
from tests import golden_files as golden
from tests import models
from tests.devices import cases

assert cuda.unavailable() is None
DTYPES = [torch.float64, torch.float32]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def compare(op: Any, *args: Any) -> None:
    cases.compare(cuda.kernels()[op], op, *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", cases.RULES)
@pytest.mark.parametrize(("tokens", "features", "outs"), [(1, 16, 24), (5, 7, 13), (63, 100, 33)])
def test_zplus_linear(dtype: torch.dtype, rules: str, tokens: int, features: int, outs: int) -> None:
    x, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((2, tokens, features), (outs, features), (outs,)))
    y = x @ weight.mT + bias
    rel, grad = torch.rand(3, 2, tokens, outs, dtype=dtype), torch.randn(3, 2, tokens, outs, dtype=dtype)
    for given in ((y, bias), (y - bias, None), (None, None)):
        compare(ops.zplus_linear, x, weight, *given, rel, grad, rules)
    compare(ops.zplus_linear, x, weight, y, bias, rel, None, rules)


@pytest.mark.parametrize("rules", cases.RULES)
def test_zplus_linear_at_the_edges(rules: str) -> None:
    """All-zero, all-negative and denormal inputs and relevance: the reference's answer, never NaN."""
    weight = torch.randn(4, 6, dtype=torch.float64)
    for x in (torch.zeros(1, 2, 6), -torch.rand(1, 2, 6), torch.full((1, 2, 6), 1e-310)):
        for rel in (torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2, 4), 1e-320)):
            wide, lane = x.double(), rel.double()
            compare(ops.zplus_linear, wide, weight, wide @ weight.mT, None, lane, lane, rules)


def test_reduced_products_err_as_their_rounding_does() -> None:
    x, weight, bias = torch.randn(2, 37, 100), torch.randn(70, 100), torch.randn(70)
    y, rel, grad = x @ weight.mT + bias, torch.rand(2, 2, 37, 70), torch.randn(2, 2, 37, 70)
    prepared = REFERENCES[ops.reduced_weight](weight, "bfloat16")
    wide = [cases.cast(x, torch.float64) for x in (x, weight, y, bias, rel, grad)]
    exact = REFERENCES[ops.zplus_linear](*wide, "positive")
    plain = REFERENCES[ops.zplus_linear_reduced](x, *prepared, prepared[0], y, bias, rel, grad)
    ours = cuda.zplus_linear_reduced(x, *prepared, prepared[0], y, bias, rel, grad)
    for mine, rounded, wanted in zip(ours, plain, exact, strict=True):
        error = golden.relative_error(mine.double(), wanted)
        assert (
            1e-6 < error < 2 * golden.relative_error(rounded.double(), wanted) + 4e-3
        )  # sums are rounded to bfloat16 here


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", cases.RULES)
@pytest.mark.parametrize(("queries", "keys", "d"), cases.ATTENTION_SIZES[:3])
@pytest.mark.parametrize("mask", cases.MASKS)
def test_attention_relevance(dtype: torch.dtype, rules: str, queries: int, keys: int, d: int, mask: str) -> None:
    for args in cases.attention(dtype, rules, queries, keys, d, mask):
        compare(ops.attention_relevance, *args)


@pytest.mark.parametrize("rules", cases.RULES)
@pytest.mark.parametrize("mask", cases.MASKS)
def test_attention_in_several_chunks_of_queries(monkeypatch: pytest.MonkeyPatch, rules: str, mask: str) -> None:
    monkeypatch.setattr(cuda, "CHUNK", 0)  # 16 queries at a time
    for args in cases.attention(torch.float64, rules, 37, 40, 8, mask):
        compare(ops.attention_relevance, *args)


@pytest.mark.parametrize("update", cases.UPDATES)
def test_attention_relevance_of_other_methods(update: str) -> None:
    q, k, v, lane = (torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 9, 8),) * 3 + ((4, 2, 3, 9, 8),))
    rel = None if update in ("gradient_attention", "attention") else lane.abs()
    grad = None if update in ("relevance", "attention") else lane
    row = torch.rand(4, 2, 9, dtype=torch.float64)
    compare(ops.attention_relevance, q, k, v, None, rel, grad, row, 0.3, False, 0, "positive", update, True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", cases.RULES)
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_residual_add(dtype: torch.dtype, rules: str, batch_dim: int) -> None:
    u, v = 1 + torch.rand(4, 3, 50, dtype=dtype), -0.5 * torch.rand(4, 3, 50, dtype=dtype)
    rel = torch.rand(2, 4, 3, 50, dtype=dtype)
    compare(ops.residual_add, u, v, rel, batch_dim, rules)
    if rules == "positive":
        compare(ops.residual_add, u, -u, rel, batch_dim, rules)


def test_residual_add_over_several_chunks() -> None:
    u, v, rel = 1 + torch.rand(2, 20_000), torch.rand(2, 20_000), torch.rand(1, 2, 20_000)
    compare(ops.residual_add, u, v, rel, 0, "official")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 63, 300])
def test_layer_norm_backward(dtype: torch.dtype, width: int) -> None:
    x, weight, grad = (torch.randn(*s, dtype=dtype) for s in ((2, 4, width), (width,), (3, 2, 4, width)))
    for frozen in (False, True):
        compare(ops.layer_norm_backward, grad, x, weight, 1, 1e-5, frozen)
        compare(ops.layer_norm_backward, grad, x, None, 1, 1e-5, frozen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_ratio(dtype: torch.dtype) -> None:
    x, grad = torch.randn(2, 4, 63, dtype=dtype), torch.randn(3, 2, 4, 63, dtype=dtype)
    x[0, 0] = 0
    compare(ops.activation_ratio, grad, x, torch.relu(x))
    for form in ("none", "tanh"):
        compare(ops.activation_ratio, grad, x, torch.nn.functional.gelu(x, approximate=form), form)
        # Its slope is known from x alone, and bounded where y/x is a quotient of denormal numbers.
        from_x = cuda.passes.activation_ratio(grad, x, torch.full_like(x, torch.nan), form)
        assert torch.equal(from_x, cuda.passes.activation_ratio(grad, x, x, form))
    with pytest.raises(RuntimeError, match="knows no form other of gelu"):
        cuda.passes.activation_ratio(grad, x, x, "other")
    with pytest.raises(RuntimeError, match="y must have shape"):
        cuda.passes.activation_ratio(grad, x, x[:1], "")


@pytest.mark.parametrize("update", cases.UPDATES)
def test_attention_update(update: str) -> None:
    attn, grad, rel = torch.rand(2, 3, 5, 7), torch.randn(4, 2, 3, 5, 7), torch.rand(4, 2, 3, 5, 7)
    compare(ops.attention_update, attn, grad, rel, update)


@pytest.mark.parametrize("normalize", [False, True])
def test_rollout_row(normalize: bool) -> None:
    row, m = torch.rand(3, 2, 70), torch.rand(3, 2, 70, 70)
    compare(ops.rollout_row, row, m, normalize)
    compare(ops.rollout_row, row, m[0], normalize)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_hidden(bad: float) -> None:
    """A comparison with NaN is false: what it chooses by must not take the other side."""
    kernels, lane = cuda.kernels(), torch.rand(1, 3, 20)
    x, weight = torch.randn(3, 16), torch.randn(20, 16)
    x[1, 2] = bad
    assert not kernels[ops.zplus_linear](x, weight, None, None, lane, None, "positive")[0][0, 1].isfinite().all()
    prepared = REFERENCES[ops.reduced_weight](weight, "bfloat16")
    reduced = kernels[ops.zplus_linear_reduced](x, *prepared, None, x @ weight.mT, None, lane, None)
    assert not reduced[0][0, 1].isfinite().all()
    u, v = torch.randn(2, 3, 20)
    u[1, 2] = bad
    for rules in cases.RULES:
        assert not all(part.isfinite().all() for part in kernels[ops.residual_add](u, v, lane, 0, rules)), rules
    for form in ("", "none", "tanh"):
        assert not kernels[ops.activation_ratio](lane, u, u, form)[0, 1, 2].isfinite(), form
    maps = torch.rand(1, 2, 4, 4)
    maps[0, 0, 1, 1] = bad
    assert not kernels[ops.attention_update](None, maps, maps, "gradient_relevance").isfinite().all()
    for position in range(3):
        qkv = torch.randn(3, 1, 2, 5, 16)
        qkv[position, 0, 0, 2, 3] = bad
        lanes, row = torch.rand(1, 1, 2, 5, 16), torch.rand(1, 1, 5)
        options = (0.25, False, 0, "positive", "gradient_relevance", False, True)
        results = kernels[ops.attention_relevance](*qkv, None, lanes, lanes, row, *options)
        assert not results[7].isfinite().all(), "qkv"[position]


def test_more_samples_and_maps_than_y_can_count() -> None:
    """A grid's y ends at 65535: a batch of windows times heads has more."""
    m, row = torch.rand(65_600, 1, 1), torch.rand(65_600, 1)
    compare(ops.rollout_row, row[None], m[None], False)


@pytest.mark.parametrize("rules", cases.RULES)
@pytest.mark.parametrize("name", ["timm_vit", "hf_bert"])
def test_explanations(name: str, rules: str) -> None:
    """Whole models in float64, padding masks among them, by these passes alone."""
    model, given = models.build(name), models.inputs(name)
    given = {key: x[:2] for key, x in given.items()}
    plain = fastrel.Explainer(model, rules=rules, backend="torch")(**given, target=1).relevance
    explainer = fastrel.Explainer(model, rules=rules, backend="cuda")
    assert golden.relative_error(explainer(**given, target=1).relevance, plain) < 1e-8
    (program,) = models.programs(explainer)
    assert not any(node.target in REFERENCES.values() for node in program.reverse.graph.nodes)


def test_torch_accepts_the_passes_registrations() -> None:
    """opcheck: schemas tell the truth about what is written to."""
    attn, row = torch.rand(1, 2, 3, 4), torch.rand(1, 3)
    passes, lane = cuda.passes, torch.rand(1, 2, 3, 4)
    calls = [
        (passes.zplus_ratio, (lane, None, lane, lane, 0.0, False)),
        (passes.zplus_combine, (lane, lane, lane)),
        (passes.residual_add, (row, row, row[None], 0, "official")),
        (passes.layer_norm_backward, (row[None], row, None, 1, 1e-5)),
        (passes.activation_ratio, (row[None], row, row, "none")),
        (passes.attention_update, (None, lane, lane, "gradient_relevance")),
        (passes.rollout_row, (row[None], torch.rand(1, 3, 3), True)),
        (passes.attention_softmax_, (attn.clone(), None, 0.5, False, 0)),
        (passes.attention_sums, (attn, lane, lane, "gradient_relevance")),
        (passes.attention_through_, (torch.zeros(1, 2, 4), attn, lane, lane, row, "gradient_relevance", False)),
        (passes.attention_score_lanes_, (attn, attn, None, lane.clone(), lane.clone(), None, 0.5)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
