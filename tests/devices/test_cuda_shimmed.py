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
#: Of values, beside lanes of float32.
NARROW = [torch.bfloat16, torch.float16]


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


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("rules", cases.RULES)
@pytest.mark.parametrize(("tokens", "features", "outs"), [(1, 16, 24), (5, 7, 13)])
def test_zplus_linear_of_16_bits(dtype: torch.dtype, rules: str, tokens: int, features: int, outs: int) -> None:
    """Lanes are as exact as beside float32: operands hold all of their bits. An output that was rounded is not used."""
    x, weight = torch.randn(2, tokens, features).to(dtype), torch.randn(outs, features).to(dtype)
    rel, grad = torch.rand(3, 2, tokens, outs), torch.randn(3, 2, tokens, outs)
    rounded, bias = torch.full((2, tokens, outs), torch.nan, dtype=dtype), torch.full((outs,), torch.nan, dtype=dtype)
    wide, operators = weight.float(), cuda.kernels()
    for w in (weight, weight.mT.contiguous().mT):
        compare(ops.zplus_linear, x, w, None, None, rel, grad, rules)
    compare(ops.zplus_linear, x.float(), weight, None, None, rel, grad, rules)
    compare(ops.zplus_linear, x, wide, None, None, rel, None, rules)
    given = operators[ops.zplus_linear](x, weight, rounded, bias, rel, grad, rules)
    for a, b in zip(given, operators[ops.zplus_linear](x, weight, None, None, rel, grad, rules), strict=True):
        assert torch.equal(a, b)
    ours = operators[torch.matmul](grad, weight)
    assert golden.relative_error(ours.double(), grad.double() @ weight.double()) < 5e-6


def test_lanes_in_parts_of_bfloat16() -> None:
    """Two hold 16 bits, as plain PyTorch rounds; what is infinite stays so, and NaN stays NaN."""
    lane = torch.randn(2, 3, 50) * torch.logspace(-20, 20, 50)
    lane[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    one, two = cuda.passes.zplus_parts(lane, 1), cuda.passes.zplus_parts(lane, 2)
    high, low = two.view(2, 3, 2, 50).unbind(2)
    assert torch.equal(one.view_as(high).nan_to_num(7), lane.bfloat16().nan_to_num(7))
    assert torch.equal(high.nan_to_num(7), lane.bfloat16().nan_to_num(7))
    assert not low[0, 0, :3].any()
    finite = lane.flatten()[3:]
    assert ((high + low.float()).flatten()[3:] / finite - 1).abs().max() <= 2.0**-16


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
        assert 1e-6 < error < 2 * golden.relative_error(rounded.double(), wanted)
    narrow = [x.bfloat16() for x in (x, weight, y, bias)]
    prepared = cuda.kernels()[ops.reduced_weight](narrow[1], "bfloat16")
    values = [x.float() for x in narrow]
    for x, y, bias in ((narrow[0], narrow[2], narrow[3]), (values[0], values[2], values[3])):
        results = cuda.zplus_linear_reduced(x, *prepared, prepared[0], y, bias, rel, grad)
        ours = results if x.dtype == torch.bfloat16 else ours
    assert all(torch.equal(a, b) for a, b in zip(ours, results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", cases.RULES)
@pytest.mark.parametrize(("queries", "keys", "d"), cases.ATTENTION_SIZES[:3])
@pytest.mark.parametrize("mask", cases.MASKS)
def test_attention_relevance(dtype: torch.dtype, rules: str, queries: int, keys: int, d: int, mask: str) -> None:
    for args in cases.attention(dtype, rules, queries, keys, d, mask):
        compare(ops.attention_relevance, *args)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("mask", cases.MASKS)
def test_attention_relevance_of_16_bits(dtype: torch.dtype, mask: str) -> None:
    for q, k, v, given, *rest in cases.attention(dtype, "positive", 5, 7, 24, mask):
        narrow = given.to(dtype) if mask == "float" else given
        compare(ops.attention_relevance, q, k, v, narrow, *rest)


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


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("rules", cases.RULES)
def test_passes_over_values_of_16_bits(dtype: torch.dtype, rules: str) -> None:
    """Both operands, or one beside another of float32."""
    u, v, rel = (1 + torch.rand(4, 3, 50)).to(dtype), (-0.5 * torch.rand(4, 3, 50)).to(dtype), torch.rand(2, 4, 3, 50)
    for given in ((u, v), (u.float(), v), (u, v.float())):
        compare(ops.residual_add, *given, rel, 1, rules)
    weight, grad = torch.randn(50).to(dtype), rel - 0.5
    for frozen in (False, True):
        compare(ops.layer_norm_backward, grad, u, weight, 1, 1e-5, frozen)
        compare(ops.layer_norm_backward, grad, u, weight.float(), 1, 1e-5, frozen)
    compare(ops.activation_ratio, grad, v, torch.relu(v))
    for form in ("none", "tanh"):
        compare(ops.activation_ratio, grad, u.float(), torch.nn.functional.gelu(u.float(), approximate=form), form)
        ours = cuda.kernels()[ops.activation_ratio](grad, u, u, form)
        assert torch.equal(ours, cuda.kernels()[ops.activation_ratio](grad, u.float(), u.float(), form))
    with pytest.raises(RuntimeError, match="values of another dtype than lanes"):
        cuda.passes.residual_add(u.double(), v, rel, 0, rules)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_norm_whose_squares_overflow_has_no_gradient(dtype: torch.dtype) -> None:
    """As in plain PyTorch: 0 would look like an answer."""
    x = torch.randn(3, 70).to(dtype)
    x[1] *= 1e200 if dtype == torch.float64 else 1e25
    grad = torch.randn(1, 3, 70, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for frozen in (False, True):
        ours = cuda.kernels()[ops.layer_norm_backward](grad, x, None, 1, 1e-5, frozen)
        plain = REFERENCES[ops.layer_norm_backward](grad, x.to(grad.dtype), None, 1, 1e-5, frozen)
        assert torch.equal(ours.isnan(), plain.isnan())
        assert ours.isnan().any(-1).flatten().tolist() == [False, True, False]


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
    for dtype in NARROW:
        narrow = (x.to(dtype), weight.to(dtype))
        for rules in cases.RULES:
            assert not kernels[ops.zplus_linear](*narrow, None, None, lane, None, rules)[0][0, 1].isfinite().all()
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


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_explanations_of_16_bit_models(dtype: torch.dtype) -> None:
    """Nearer to lanes of float32 beside the same values than 16 bits of an output are."""
    model, given = models.build("timm_vit").to(dtype), models.inputs("timm_vit")
    given = {key: x[:2].to(dtype) for key, x in given.items()}
    plain = fastrel.Explainer(model, backend="torch")(**given, target=1).relevance
    explainer = fastrel.Explainer(model, backend="cuda")
    assert golden.map_error(explainer(**given, target=1).relevance, plain) < 2e-3
    (program,) = models.programs(explainer)
    targets = [node.target for node in program.reverse.graph.nodes]
    assert torch.ops.aten.to.dtype not in targets
    assert not any(target in REFERENCES.values() for target in targets)


def test_torch_accepts_the_passes_registrations() -> None:
    """opcheck: schemas tell the truth about what is written to."""
    attn, row = torch.rand(1, 2, 3, 4), torch.rand(1, 3)
    passes, lane = cuda.passes, torch.rand(1, 2, 3, 4)
    calls = [
        (passes.zplus_ratio, (lane, None, lane, lane, 0.0, False)),
        (passes.zplus_ratio, (lane, None, lane, lane, 0.0, False, 2)),
        (passes.zplus_parts, (lane, 2)),
        (passes.zplus_sides, (lane.bfloat16(),)),
        (passes.zplus_magnitude, (lane.half(),)),
        (passes.zplus_combine, (lane, lane, lane)),
        (passes.zplus_combine_sides, (lane[0].half(), torch.cat([lane, lane], -1))),
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
