"""Triton kernels under Triton's interpreter, against the plain PyTorch of the same operators.

Collected only in a process with TRITON_INTERPRET=1: tests/test_triton.py starts one.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start: tests/test_triton.py runs it", allow_module_level=True)

import numpy as np
from fastrel.triton_kernels import (
    attention_products,
    configs,
    layer_norm_backward,
    residual_add,
    zplus_linear,
    zplus_products,
    zplus_sums,
)
from fastrel.triton_kernels import math as kernel_math

import fastrel
from fastrel import ops
from fastrel.backends import fusion, triton
from fastrel.graphed import run
from fastrel.ops.library import REFERENCES
from fastrel.reference.rules import safe_divide
from tests import golden_files as golden
from tests import models
from tests.devices import arithmetic, cases
from tests.devices.guards import Guards, guards  # noqa: F401  (a fixture)
from tests.devices.programs import lowered
from tests.devices.stores import conflicts, disjoint_stores  # noqa: F401  (a fixture)

#: Of values; lanes are float32. bfloat16 is upcast right after the load, which is all that the interpreter gets right of it.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RULES, UPDATES = cases.RULES, cases.UPDATES


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def compare(guards: Guards, op: torch._ops.OpOverload, *args: Any, operand: Any = None) -> None:  # noqa: F811
    cases.compare(triton.kernels()[op], op, *args, around=guards.around, operand=operand)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("tokens", "features", "outs"), [(1, 16, 24), (5, 7, 13), (63, 100, 33), (70, 65, 130)])
def test_zplus_linear(guards: Guards, dtype: torch.dtype, rules: str, tokens: int, features: int, outs: int) -> None:  # noqa: F811
    if dtype != torch.float32 and tokens > 5:
        pytest.skip("the tails are the same")
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((2, tokens, features), (outs, features), (outs,)))
    y = (x.float() @ weight.float().mT + bias.float()).to(dtype)
    rel, grad = torch.rand(3, 2, tokens, outs), torch.randn(3, 2, tokens, outs)
    exact_output = y if dtype == torch.float32 else None  # an output rounded to 16 bits is not what Z is formed from
    compare(guards, ops.zplus_linear, x, weight, exact_output, bias if exact_output is not None else None, rel, grad, rules)
    compare(guards, ops.zplus_linear, x, weight, None, None, rel, None, rules)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("tokens", "features", "outs"), [(1, 16, 24), (5, 70, 33)])
def test_torchs_products_with_passes_between_them(
    guards: Guards,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    rules: str,
    tokens: int,
    features: int,
    outs: int,
) -> None:
    """In a bfloat16 model: 16-bit operands, S and the gradient in two parts, and still float32's accuracy."""
    monkeypatch.setattr(configs, "products_first", lambda *_: True)
    x, weight = torch.randn(2, tokens, features).bfloat16(), torch.randn(outs, features).bfloat16()
    rel, grad = torch.rand(3, 2, tokens, outs), torch.randn(3, 2, tokens, outs)
    compare(guards, ops.zplus_linear, x, weight, None, None, rel, grad, rules)
    compare(guards, ops.zplus_linear, x, weight.mT.contiguous().mT, None, None, rel, None, rules)


def test_gradients_by_a_16_bit_weight_alone() -> None:
    """As exact as in float32, and not multiplied in it."""
    lane, weight = torch.randn(2, 3, 5, 70), torch.randn(70, 33).bfloat16()
    ours, exact = triton.kernels()[torch.matmul](lane, weight), lane.double() @ weight.double()
    assert golden.relative_error(ours.double(), exact) < 5e-6
    wide = weight.float()
    assert torch.equal(triton.kernels()[torch.matmul](lane, wide), lane @ wide)


def test_torchs_products_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one part each, they err as rounding to bfloat16 does."""
    monkeypatch.setattr(configs, "products_first", lambda *_: True)
    test_reduced_products_err_as_their_rounding_does("bfloat16", monkeypatch)


def test_zplus_linear_takes_a_transposed_weight(guards: Guards) -> None:  # noqa: F811
    x, weight, rel = torch.randn(7, 10), torch.randn(10, 9).T, torch.rand(2, 7, 9)
    compare(guards, ops.zplus_linear, x, weight, None, None, rel, rel - 0.5, "positive")


@pytest.mark.parametrize("rules", RULES)
def test_zplus_linear_at_the_edges(guards: Guards, rules: str) -> None:  # noqa: F811
    """All-zero and all-negative inputs, no relevance: the reference's answer, never NaN."""
    weight = torch.randn(4, 6)
    for x in (torch.zeros(2, 6), -torch.rand(2, 6)):
        for rel in (torch.ones(1, 2, 4), torch.zeros(1, 2, 4)):
            compare(guards, ops.zplus_linear, x, weight, None, None, rel, rel, rules)


def test_few_rows_in_bfloat16_where_weights_are_prepared_for_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what layers prepared for bfloat16 give, Z formed before or not."""
    op, prepare = triton.kernels()[ops.zplus_linear_reduced], triton.kernels()[ops.reduced_weight]
    x, weight, bias = torch.randn(2, 37, 100), torch.randn(70, 100), torch.randn(70)
    y, rel, grad = x @ weight.mT + bias, torch.rand(2, 2, 37, 70), torch.randn(2, 2, 37, 70)
    with monkeypatch.context() as wide:
        wide.setattr(configs, "in_float8", lambda *_: True)
        in_float8, in_bfloat16 = prepare(weight, "float8"), prepare(weight, "bfloat16")
    rest = (in_bfloat16[0], y, bias, rel, grad)
    (z, _) = zplus_sums.zplus_sums(*(x, in_float8[1], y, bias) * 2, reduced=True)
    for given in ({}, {"sums": z}):
        for a, b in zip(op(x, *in_float8, *rest, **given), op(x, *in_bfloat16, *rest, **given), strict=True):
            assert torch.equal(a, b)
    monkeypatch.setattr(configs, "in_float8", lambda *_: True)
    assert not torch.equal(op(x, *in_float8, *rest)[0], op(x, *in_bfloat16, *rest)[0])


@pytest.mark.parametrize("purpose", ["bfloat16", "float8"])
def test_reduced_products_err_as_their_rounding_does(purpose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands are rounded as on a device; the interpreter's sums are exact."""
    monkeypatch.setattr(configs, "in_float8", lambda *_: True)
    x, weight, bias = torch.randn(2, 37, 100), torch.randn(70, 100), torch.randn(70)
    y, rel, grad = x @ weight.mT + bias, torch.rand(2, 2, 37, 70), torch.randn(2, 2, 37, 70)
    prepared = REFERENCES[ops.reduced_weight](weight, purpose)
    w_grad = REFERENCES[ops.reduced_weight](weight, "gradient")[0]
    wide = [cases.cast(x, torch.float64) for x in (x, weight, y, bias, rel, grad)]
    exact = REFERENCES[ops.zplus_linear](*wide, "positive")
    plain = REFERENCES[ops.zplus_linear_reduced](x, *prepared, w_grad, y, bias, rel, grad)
    kernels = triton.kernels()
    ours_prepared, own_grad = (
        kernels[ops.reduced_weight](weight, purpose),
        kernels[ops.reduced_weight](weight, "gradient")[0],
    )
    assert torch.equal(ours_prepared[0].float(), prepared[0].float())
    ours = kernels[ops.zplus_linear_reduced](x, *ours_prepared, own_grad, y, bias, rel, grad)
    for mine, rounded, wanted in zip(ours, plain, exact, strict=True):
        error = golden.relative_error(mine.double(), wanted)
        assert 1e-6 < error < 1.5 * golden.relative_error(rounded.double(), wanted)


#: Every size, every mask, and the masks where a tile ends; test_ptx.py has the rest, as compiled and in less time.
ATTENTION = [*((size, "none") for size in cases.ATTENTION_SIZES), *(((5, 7, 24), mask) for mask in cases.MASKS[1:])]
ATTENTION += [((33, 40, 80), mask) for mask in ("bool", "causal")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("size", "mask"), ATTENTION)
def test_attention_relevance(
    guards: Guards,  # noqa: F811
    dtype: torch.dtype,
    rules: str,
    size: tuple[int, int, int],
    mask: str,
) -> None:
    if dtype != torch.float32 and size[0] > 5:
        pytest.skip("the tails are the same")
    for args in cases.attention(dtype, rules, *size, mask):
        compare(guards, ops.attention_relevance, *args, operand=None if dtype == torch.float32 else arithmetic.tf32)


@pytest.mark.parametrize(("size", "mask"), [((33, 40, 80), mask) for mask in cases.MASKS] + [((1, 50, 128), "none")])
@pytest.mark.parametrize("at_once", [1, 2])
def test_attention_by_torchs_products(
    guards: Guards,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int, int],
    mask: str,
    at_once: int,
) -> None:
    """All samples at once, and one after the other."""
    monkeypatch.setattr(configs, "heads_by_library", lambda *_: True)
    monkeypatch.setattr(attention_products, "CHUNK", attention_products.CHUNK if at_once == 2 else 1)
    for args in cases.attention(torch.float32, "positive", *size, mask):
        compare(guards, ops.attention_relevance, *args)
    kernel = triton.kernels()[ops.attention_relevance]
    whole, parts = kernel(*args), kernel(*args, parts=True)
    assert torch.equal(parts[7].sum(2), whole[7])


@pytest.mark.parametrize(("update", "lanes"), [("gradient_attention", "grad"), ("relevance", "rel"), ("attention", "none")])
def test_attention_of_other_methods_by_torchs_products(
    guards: Guards,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    update: str,
    lanes: str,
) -> None:
    monkeypatch.setattr(configs, "heads_by_library", lambda *_: True)
    q, k, v, lane = (torch.randn(*s) for s in ((2, 3, 9, 72), (2, 3, 9, 72), (2, 3, 9, 72), (4, 2, 3, 9, 72)))
    rel, grad = lane.abs() if lanes == "rel" else None, lane if lanes == "grad" else None
    for inputs in (True, False):
        options = (0.3, False, 0, "positive", update, True, inputs)
        compare(guards, ops.attention_relevance, q, k, v, None, rel, grad, torch.rand(4, 2, 9), *options)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("lanes", ["both", "rel", "grad", "none"])
def test_attention_relevance_of_other_methods(guards: Guards, update: str, lanes: str) -> None:  # noqa: F811
    needs = {"gradient_relevance": {"both"}, "gradient_attention": {"both", "grad"}, "relevance": {"both", "rel"}}
    if lanes not in needs.get(update, {"both", "rel", "grad", "none"}):
        pytest.skip("the update needs a lane that is not there")
    q, k, v, lane = (torch.randn(*s) for s in ((2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8), (4, 2, 3, 9, 8)))
    rel, grad = lane.abs() if lanes in ("both", "rel") else None, lane if lanes in ("both", "grad") else None
    compare(
        guards,
        ops.attention_relevance,
        q,
        k,
        v,
        None,
        rel,
        grad,
        torch.rand(4, 2, 9),
        0.3,
        False,
        0,
        "positive",
        update,
        True,
        True,
    )


def test_attention_over_some_queries_is_that_part_of_all(guards: Guards) -> None:  # noqa: F811
    """With a causal mask, which must know where the queries are."""
    q, k, v = (torch.randn(1, 2, 70, 16) for _ in range(3))
    lane, row = torch.rand(1, 1, 2, 9, 16), torch.rand(1, 1, 9)
    options = (0.25, True, 40, "positive", "gradient_relevance", False, True)
    compare(guards, ops.attention_relevance, q[:, :, 40:49], k, v, None, lane, lane - 0.5, row, *options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_residual_add(guards: Guards, dtype: torch.dtype, rules: str, batch_dim: int) -> None:  # noqa: F811
    # Away from 0 = u + v, where the official rules divide by rounding.
    u, v = (1 + torch.rand(4, 3, 50)).to(dtype), (-0.5 * torch.rand(4, 3, 50)).to(dtype)
    compare(guards, ops.residual_add, u, v, torch.rand(2, 4, 3, 50), batch_dim, rules)


def test_residual_add_over_several_chunks(guards: Guards) -> None:  # noqa: F811
    u, v = 1 + torch.rand(2, 20_000), torch.rand(2, 20_000)
    compare(guards, ops.residual_add, u, v, torch.rand(1, 2, 20_000), 0, "official")
    compare(guards, ops.residual_add, u, -u, torch.rand(1, 2, 20_000), 0, "positive")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_goes_on_through_the_gelu_before_the_layer(dtype: torch.dtype, approximate: str, frozen: bool) -> None:
    """Also where torch multiplies, and the last rows of a longer value."""
    h, weight = torch.randn(2, 7, 20).to(dtype)[:, 2:], torch.randn(13, 20).to(dtype)
    x = torch.nn.functional.gelu(h, approximate=approximate)
    rel, grad = torch.rand(3, 2, 5, 13), torch.randn(3, 2, 5, 13)
    how = {"slope": h, "approximate": approximate, "frozen": frozen}
    ours = triton.kernels()[ops.zplus_linear](x, weight, None, None, rel, grad, "positive", **how)
    wanted = cases.through_gelu(grad.double() @ weight.double(), h.double(), approximate, frozen)
    assert golden.relative_error(ours[1].double(), wanted) < 5e-6
    for parts in (1, 2):
        values = (x.bfloat16(), weight.bfloat16())
        made = zplus_linear.zplus_linear(*values, None, None, rel, grad, "positive", **how)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(configs, "products_first", lambda *_: True)
            by_torch = zplus_linear.zplus_linear(*values, None, None, rel, grad, "positive", **how)
        for a, b in zip(made, by_torch, strict=True):
            assert golden.relative_error(a, b.double()) < 1e-4, parts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["all", "some"])
def test_relevance_of_v_and_the_gradient_of_q_k_and_v_at_once(dtype: torch.dtype, rows: str) -> None:
    """One layer makes all three, of which only v has relevance; where the gradient is of fewer tokens, each by itself."""
    x, weight, bias = torch.randn(2, 5, 20).to(dtype), torch.randn(39, 20).to(dtype), torch.randn(39).to(dtype)
    qkv, v = (x.float() @ weight.float().mT + bias.float()).to(dtype), slice(26, 39)
    rel, grad = torch.rand(3, 2, 5, 13), torch.randn(3, 2, 5 if rows == "all" else 1, 39)
    exact = qkv[..., v] if dtype == torch.float32 else None
    ours = triton.kernels()[ops.zplus_linear](x, weight[v], exact, bias[v], rel, grad, "positive", w_grad=weight)
    wide = [one.double() for one in (x, weight[v])]
    (rel_in, _) = REFERENCES[ops.zplus_linear](*wide, None, None, rel.double(), None, "positive")
    assert golden.relative_error(ours[0].double(), rel_in) < 5e-6
    assert golden.relative_error(ours[1].double(), grad.double() @ weight.double()) < 5e-6


def _layers(dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """x, weight, output and bias of a block's layers: one of fewer rows, one a part of a wider value."""
    made = []
    for tokens, features, outs in ((1, 70, 33), (5, 33, 70), (5, 20, 13)):
        x, weight, bias = (torch.randn(*s).to(dtype) for s in ((2, tokens, features), (outs, features), (outs,)))
        made.append((x, weight, (x.float() @ weight.float().mT + bias.float()).to(dtype), bias))
    x, weight, y, bias = made[1]
    return [*made, (x[:, 2:, :], weight[40:], y[:, 2:, 40:], bias[40:])]


@pytest.fixture
def tiles_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Z was formed before or not: tiles of other sizes add up in another order, on some processors."""
    monkeypatch.setattr(
        configs, "BACK", {kind: tile for kind, tile in configs.BACK.items() if not kind.endswith("divided")}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.usefixtures("tiles_of_one_size")
def test_sums_of_several_layers_are_those_of_each(dtype: torch.dtype, rules: str, count: int) -> None:
    """To the bit: S is formed later, and of the same numbers."""
    layers = _layers(dtype)[-count:]
    sums = zplus_sums.zplus_sums(*(x for layer in layers for x in layer), reduced=False)
    for (x, weight, y, bias), z in zip(layers, sums, strict=True):
        assert z is not None
        rel, grad = torch.rand(3, *y.shape), torch.randn(3, *y.shape)
        call = (x, weight, y, bias, rel, grad, rules)
        expected = triton.kernels()[ops.zplus_linear](*call)
        for a, b in zip(triton.kernels()[ops.zplus_linear](*call, sums=z), expected, strict=True):
            assert torch.equal(a, b)
        formed = (*call[:4], safe_divide(rel, z.view(y.shape), rules), *call[5:])
        before = torch.rand(len(z), weight.shape[1])
        ours = triton.kernels()[ops.zplus_linear](*formed, sums=z, formed=True, divisor=before)
        assert torch.equal(ours[0], safe_divide(expected[0], before.view(x.shape), rules))
        assert torch.equal(ours[1], expected[1])


@pytest.mark.usefixtures("tiles_of_one_size")
def test_reduced_sums_of_several_layers_are_those_of_each() -> None:
    kernels, layers = triton.kernels(), _layers(torch.float32)
    prepared = [kernels[ops.reduced_weight](weight, "bfloat16") for _, weight, _, _ in layers]
    given = [(x, w[0], y, bias) for (x, _, y, bias), w in zip(layers, prepared, strict=True)]
    sums = zplus_sums.zplus_sums(*(x for layer in given for x in layer), reduced=True)
    for (x, _, y, bias), w, z in zip(layers, prepared, sums, strict=True):
        rel, grad = torch.rand(3, *y.shape), torch.randn(3, *y.shape)
        call = (x, *w, w[0], y, bias, rel, grad)
        expected = kernels[ops.zplus_linear_reduced](*call)
        for a, b in zip(kernels[ops.zplus_linear_reduced](*call, sums=z), expected, strict=True):
            assert torch.equal(a, b)


def test_layers_that_do_not_go_together_are_summed_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    (a, b), narrow = _layers(torch.float32)[:2], _layers(torch.bfloat16)[0]
    assert zplus_sums.zplus_sums(*a, *narrow, reduced=False) == [None, None]
    monkeypatch.setattr(configs, "MANY_ROWS", 1)
    assert zplus_sums.zplus_sums(*a, *b, reduced=False) == [None, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("extra", ["nothing", "lanes", "lanes and row"])
def test_a_half_block_is_its_parts(guards: Guards, dtype: torch.dtype, extra: str, frozen: bool) -> None:  # noqa: F811
    """Norm, residual add and the row's step, to the bit what they are by themselves."""
    x, u, v = (torch.randn(2, 9, 63).to(dtype) for _ in range(3))
    weight, (grad, rel, grad_beside, rel_beside) = torch.randn(63).to(dtype), torch.randn(4, 3, 2, 9, 63)
    through, row = torch.rand(3, 2, 5, 9), torch.rand(3, 2, 9)
    besides = (None, None) if extra == "nothing" else (grad_beside, rel_beside)
    steps = {} if extra == "nothing" else {"through": through, "row": row if "row" in extra else None}
    if extra != "nothing":
        steps["divisor"] = torch.rand(2, 9, 63)
    given = [guards.around(one) for one in (grad, x, weight)]
    ours = layer_norm_backward.half_block(
        *given,
        1,
        1e-5,
        besides[0],
        guards.around(u),
        guards.around(v),
        guards.around(rel),
        besides[1],
        frozen=frozen,
        **steps,
    )
    norm = layer_norm_backward.layer_norm_backward_beside(grad, x, weight, 1, 1e-5, besides[0], frozen)
    assert torch.equal(ours[0], norm)
    rel_u, rel_v = residual_add.residual_add_of_sum(u, v, rel, besides[1])
    assert torch.equal(ours[1], rel_u)
    assert torch.equal(ours[2], rel_v if extra == "nothing" else safe_divide(rel_v, steps["divisor"]))
    if steps:
        torch.testing.assert_close(ours[3], through.sum(2) + (row if "row" in extra else 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm_vit", "hf_bert", "mixed"])
def test_fused_passes_change_no_map(name: str) -> None:
    """What is launched for a GPU, with values kept as there, against one operator after the other."""
    if name == "mixed":  # layers as wide as reduced products are for
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(img_size=32, patch_size=16, embed_dim=256, depth=2, num_heads=4, num_classes=6).eval()
        given = {"x": torch.randn(2, 3, 32, 32)}
    else:
        model, given = models.build(name).float(), models.inputs(name)
        given = {key: x.float() if x.is_floating_point() else x for key, x in given.items()}
    precision = "mixed" if name == "mixed" else "float32"
    found = []
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patched:
            if not fused:
                patched.setattr(fusion, "fuse", lambda graph: None)
            program, values = lowered(model, given, torch.device("cpu"), precision=precision, kept_as_on="cuda")
            targets = {node.target for node in program.reverse.graph.nodes}
            assert (zplus_sums.zplus_sums in targets) == (layer_norm_backward.half_block in targets) == fused
            with torch.no_grad():
                found.append(run(program, values, torch.ones(len(values[-1]), 2, dtype=torch.long))[2][0])
    assert golden.relative_error(found[0], found[1].double()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 63, 768])
def test_layer_norm_backward(guards: Guards, dtype: torch.dtype, width: int) -> None:  # noqa: F811
    x, weight, grad = torch.randn(2, 9, width).to(dtype), torch.randn(width).to(dtype), torch.randn(3, 2, 9, width)
    for frozen in (False, True):
        compare(guards, ops.layer_norm_backward, grad, x, weight, 1, 1e-5, frozen)
        compare(guards, ops.layer_norm_backward, grad, x, None, 1, 1e-5, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_norm_whose_squares_overflow_has_no_gradient(dtype: torch.dtype, frozen: bool) -> None:
    """As in plain PyTorch: 0 would look like an answer."""
    x, lane = torch.randn(3, 70).to(dtype), torch.randn(1, 3, 70)
    x[1] *= 1e25
    norm = triton.kernels()[ops.layer_norm_backward]
    both = layer_norm_backward.half_block(lane, x, None, 1, 1e-5, None, x, x, lane, None, frozen=frozen)
    for ours in (norm(lane, x, None, 1, 1e-5, frozen), both[0]):
        plain = REFERENCES[ops.layer_norm_backward](lane, x.float(), None, 1, 1e-5, frozen)
        assert torch.equal(ours.isnan(), plain.isnan())
        assert ours.isnan().any(-1).flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_ratio(guards: Guards, dtype: torch.dtype) -> None:  # noqa: F811
    x, grad = torch.randn(2, 9, 63).to(dtype), torch.randn(3, 2, 9, 63)
    x[0, 0] = 0
    compare(guards, ops.activation_ratio, grad, x, torch.relu(x))
    for form in ("none", "tanh"):
        ours = triton.kernels()[ops.activation_ratio](grad, x, x, form)
        assert golden.relative_error(ours.double(), cases.through_gelu(grad.double(), x.double(), form, True)) < 1e-6


@pytest.mark.parametrize("update", UPDATES)
def test_attention_update(guards: Guards, update: str) -> None:  # noqa: F811
    attn, grad, rel = torch.rand(2, 3, 5, 7), torch.randn(4, 2, 3, 5, 7), torch.rand(4, 2, 3, 5, 7)
    compare(guards, ops.attention_update, attn, grad, rel, update)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [1, 5, 70])
def test_rollout_row(guards: Guards, normalize: bool, size: int) -> None:  # noqa: F811
    row, m = torch.rand(3, 2, size), torch.rand(3, 2, size, size)
    compare(guards, ops.rollout_row, row, m, normalize)
    compare(guards, ops.rollout_row, row, m[0], normalize)


NOT_FINITE = [float("nan"), float("inf")]


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_what_is_not_a_number_is_not_hidden(monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    """Triton's own maximum drops NaN: an image with one in it would be explained as if nothing were wrong."""
    kernels = triton.kernels()
    lane, x, weight = torch.rand(1, 3, 20), torch.randn(3, 16), torch.randn(20, 16)
    x[1, 2] = bad
    for dtype in DTYPES:
        values = (x.to(dtype), weight.to(dtype), None, None)
        rel_in, grad_in = kernels[ops.zplus_linear](*values, lane, lane, "positive")
        assert not rel_in[0, 1].isfinite().all(), dtype
        broken = lane.clone()
        broken[0, 2, 3] = bad
        rel_in, grad_in = kernels[ops.zplus_linear](torch.randn(3, 16).to(dtype), *values[1:], broken, broken, "positive")
        assert not rel_in[0, 2].isfinite().all(), dtype
        assert not grad_in[0, 2].isfinite().all(), dtype
    products = zplus_products.linear(
        x.bfloat16(), weight.bfloat16(), weight.bfloat16(), None, None, lane, lane, "positive", parts=2
    )
    assert not products[0][0, 1].isfinite().all()
    u, v = torch.randn(2, 3, 20)
    u[1, 2] = bad
    for rules in RULES:
        assert not all(part.isfinite().all() for part in kernels[ops.residual_add](u, v, lane, 0, rules)), rules
    maps = torch.rand(1, 2, 4, 4)
    maps[0, 0, 1, 1] = bad
    assert not kernels[ops.attention_update](None, maps, maps, "gradient_relevance").isfinite().all()
    assert not kernels[ops.layer_norm_backward](lane, u, None, 1, 1e-5).isfinite().all()
    qkv = torch.randn(3, 1, 2, 5, 16)
    monkeypatch.setattr(configs, "heads_by_library", lambda *_: True)
    wide = torch.randn(3, 1, 2, 5, 72)
    for values, position in itertools.product((qkv, wide), range(3)):
        broken_qkv = values.clone()
        broken_qkv[position, 0, 0, 2, 3] = bad
        lanes, row = torch.rand(1, 1, 2, 5, values.shape[-1]), torch.rand(1, 1, 5)
        options = (0.25, False, 0, "positive", "gradient_relevance", False, True)
        results = kernels[ops.attention_relevance](*broken_qkv, None, lanes, lanes, row, *options)
        assert not results[7].isfinite().all(), "qkv"[position]


def test_a_map_of_an_image_with_a_hole_is_no_map() -> None:
    """What a CUDA graph replays: nobody looks at the logits in between."""
    model, images = models.build("timm_vit").float(), models.inputs("timm_vit")["x"].float()
    explainer = fastrel.Explainer(model, backend="triton")
    explainer(images)
    values = explainer._engine.enter((), {"x": images}).values
    (program,) = models.programs(explainer)
    images[0, 0, 3, 3], images[1, 0, 3, 3] = NOT_FINITE
    _, _, relevance, _ = run(program, values, None)
    assert [bool(row.isfinite().all()) for row in relevance[0]] == [False, False, True]


def test_stores_of_two_programs_to_one_place_are_found() -> None:
    """A check that could not fail would prove nothing."""
    assert conflicts([(0, np.array([1, 2])), (1, np.array([3]))]) == 0
    assert conflicts([(0, np.array([1, 2, 2])), (1, np.array([2]))]) == 1


def test_helpers_are_the_references_equations() -> None:
    """Each maths helper alone, where its denominators vanish or change sign."""
    import triton as tr
    import triton.language as tl

    from fastrel.reference import rules

    @tr.jit
    def divide(a_ptr, b_ptr, out_ptr, OFFICIAL: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, 8)
        tl.store(out_ptr + i, kernel_math.safe_divide(tl.load(a_ptr + i), tl.load(b_ptr + i), OFFICIAL))

    a = torch.ones(8)
    b = torch.tensor([0.0, 1e-39, 1e-30, 1.0, -1.0, -1e-9, 2.0, -0.0])
    for rule in RULES:
        out = torch.empty(8)
        divide[(1,)](a, b, out, rule == "official")
        assert torch.allclose(out, rules.safe_divide(a, b, rule), rtol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "rules"), [("vit_a", "official"), ("bert_a", "positive")])
def test_golden_models_explained_by_triton(name: str, rules: str) -> None:
    """The official code's own maps, and those of the positive rules in float64, from float32 by these kernels alone."""
    data, target, is_bert = golden.load(name), golden.targets(name)[0], name == "bert_a"
    model = (models.golden_bert if is_bert else models.golden_vit)(name)
    given = {"input_ids": golden.tensor(data["input_ids"])} if is_bert else {"x": golden.tensor(data["input"])}
    options = {"rules": rules, "normalize_rollout": is_bert}
    wanted = fastrel.Explainer(model, backend="torch", **options)(**given, target=target).relevance[0]
    if rules == "official":
        official = golden.tensor(data[f"t{target}/transformer_attribution/start0"])
        assert golden.relative_error(wanted[1:], official[-len(wanted) + 1 :]) < 1e-6
    narrow = {key: x.float() if x.is_floating_point() else x for key, x in given.items()}
    model.float()
    plain = fastrel.Explainer(model, backend="torch", **options)(**narrow, target=target).relevance[0]
    explainer = fastrel.Explainer(model, backend="triton", **options)
    ours = explainer(**narrow, target=target).relevance[0]
    (program,) = models.programs(explainer)
    assert not any(node.target in REFERENCES.values() for node in program.reverse.graph.nodes)
    assert sum(node.target in triton.kernels().values() for node in program.reverse.graph.nodes) > 10
    assert golden.map_error(ours, wanted) <= max(2 * golden.map_error(plain, wanted), 1e-5)


def test_auto_prefers_triton_and_all_precisions_run() -> None:
    model, given = models.build("timm_vit").float(), {"x": models.inputs("timm_vit")["x"].float()}
    exact = fastrel.Explainer(model.double(), backend="torch")(given["x"].double(), target=1).relevance
    model.float()
    explainer = fastrel.Explainer(model)
    assert golden.map_error(explainer(**given, target=1).relevance, exact) < 1e-5
    (program,) = models.programs(explainer)
    assert any(node.target is triton.kernels()[ops.zplus_linear] for node in program.reverse.graph.nodes)


@pytest.mark.parametrize("precision", ["mixed", "low"])
def test_reduced_precisions_by_triton(precision: str) -> None:
    from scipy.stats import spearmanr
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=256, depth=2, num_heads=4, num_classes=6).eval()
    image = torch.randn(1, 3, 32, 32)
    exact = fastrel.Explainer(model, backend="torch")(image, target=1).relevance
    explainer = fastrel.Explainer(model, backend="triton", precision=precision)
    ours = explainer(image, target=1).relevance
    (program,) = models.programs(explainer)
    calls = [node for node in program.reverse.graph.nodes if node.target is triton.kernels()[ops.zplus_linear_reduced]]
    assert {node.meta["purpose"] for node in calls} == {"float8" if precision == "low" else "bfloat16"}
    assert spearmanr(ours[0, 1:], exact[0, 1:]).statistic > 0.99
    assert 1e-7 < golden.map_error(ours, exact) < 0.05


def test_an_explicit_backend_that_cannot_run_lists_its_reasons() -> None:
    with pytest.raises(
        fastrel.UnsupportedModelError, match=r"backend 'triton' cannot run: .* lanes of this model are float64"
    ):
        fastrel.Explainer(models.build("timm_vit"), backend="triton")(**models.inputs("timm_vit"))
    model = models.build("timm_vit").float()
    images = models.inputs("timm_vit")["x"].float()
    with pytest.raises(fastrel.UnsupportedModelError, match="triton has no kernel for attention Grad-CAM's update"):
        fastrel.Explainer(model, "attention_gradcam", backend="triton")(images)


def test_lanes_of_all_kinds_are_reproducible() -> None:
    """No atomics: the same bits twice."""
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    lane, row = torch.rand(1, 1, 2, 40, 16), torch.rand(1, 1, 40)
    options = (0.25, False, 0, "official", "gradient_relevance", True, True)
    runs = [triton.kernels()[ops.attention_relevance](q, k, v, None, lane, lane - 0.5, row, *options) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
