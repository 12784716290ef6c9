"""Calls of every launcher at small awkward sizes, which launch every shipped kernel, and how exact the results have to be.

Sizes are such that there are tails in every direction, several blocks, several tiles in every loop, and addresses that are and
that are not multiples of 16 bytes: Triton compiles other loads for the latter.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from fastrel.triton_kernels import activation, configs, layer_norm_backward, zplus_sums
from fastrel.triton_kernels.residual_add import residual_add_of_sum
from torch import Tensor

from fastrel import ops
from fastrel.backends import triton
from fastrel.ops.library import REFERENCES
from fastrel.reference.rules import safe_divide
from tests import golden_files as golden
from tests.devices import arithmetic, cases

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Call:
    """One call of an operator, compared with its reference, on a GPU of this capability.

    Rows are never too few for float8. many: they count as many; products: layers as wide enough for the vendor's products.
    """

    check: Callable[[], None]
    capability: int = 80
    many: bool = False
    products: bool = False

    def __call__(self) -> None:
        with contextlib.ExitStack() as patched:
            patched.enter_context(mock.patch.object(configs, "in_float8", lambda *_: True))
            if self.many:
                patched.enter_context(mock.patch.object(configs, "MANY_ROWS", 1))
            if self.products:
                patched.enter_context(mock.patch.object(configs, "products_first", lambda *_: True))
            torch.manual_seed(0)
            self.check()


def compare(op: Any, *args: Any, operand: Any = None) -> None:
    """By the rule of every GPU backend (`cases.compare`): twice the error of plain PyTorch in float32, or 5e-6; where one TF32
    product is asked for, twice the error of plain PyTorch with operands of TF32, or 2^-11.

    What tensor cores add is within it: a sum over k numbers is cut off once per 8 of them, 2^-23 each time and for each of
    three products, 3.4e-6 for k = 76.
    """
    cases.compare(triton.kernels()[op], op, *args, operand=operand)


def _linear(
    dtype: torch.dtype, sizes: tuple[int, ...] = (5, 70, 33), rules: str = "positive", output: bool = True, bias: bool = True,
    grad: bool = True, transposed: bool = False, x_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    tokens, features, outs = sizes
    x, weight, b = (torch.randn(*s).to(dtype) for s in ((2, tokens, features), (outs, features), (outs,)))
    if transposed:
        weight = weight.mT.contiguous().mT
    y = x @ weight.mT + (b if bias else 0) if output and dtype == FLOAT32 else None  # Z is not formed from 16 bits
    rel, gradient = torch.rand(3, 2, tokens, outs), torch.randn(3, 2, tokens, outs)
    x = x.to(x_dtype or dtype)
    compare(ops.zplus_linear, x, weight, y, b if y is not None and bias else None, rel, gradient if grad else None, rules)


def _reduced(purpose: Any, sizes: tuple[int, ...] = (37, 100, 70), bias: bool = True) -> None:
    """Against float64: as plain PyTorch with the same operands, and half as much again for what it does not round."""
    tokens, features, outs = sizes
    x, weight, b = torch.randn(2, tokens, features), torch.randn(outs, features), torch.randn(outs) if bias else None
    y, rel, grad = x @ weight.mT + (0 if b is None else b), torch.rand(2, 2, tokens, outs), torch.randn(2, 2, tokens, outs)
    plain = REFERENCES[ops.reduced_weight](weight, purpose)
    w_grad = REFERENCES[ops.reduced_weight](weight, "gradient")[0]
    wide = [cases.cast(value, torch.float64) for value in (x, weight, y, b, rel, grad)]
    exact = REFERENCES[ops.zplus_linear](*wide, "positive")
    rounded = REFERENCES[ops.zplus_linear_reduced](x, *plain, w_grad, y, b, rel, grad)
    prepared = triton.kernels()[ops.reduced_weight](weight, purpose)
    own = prepared[0] if purpose == "bfloat16" else triton.kernels()[ops.reduced_weight](weight, "gradient")[0]
    ours = triton.kernels()[ops.zplus_linear_reduced](x, *prepared, own, y, b, rel, grad)
    for mine, same, wanted in zip(ours, rounded, exact, strict=True):
        assert golden.relative_error(mine.double(), wanted) < 1.5 * golden.relative_error(same.double(), wanted)


def _attention(
    dtype: torch.dtype, rules: str, sizes: tuple[int, int, int], mask: str, which: int, bias: torch.dtype | None = None,
    halves: bool | None = None,
) -> None:  # fmt: skip
    """which: 0 for lanes of the inputs, 1 for rows that are scaled, of `cases.attention`; 2 for both at once.

    halves: of the gradient; unless told, as the default method has it, under the positive rules.
    """
    q, k, v, given, rel, grad, row, *options = list(cases.attention(dtype, rules, *sizes, mask))[min(which, 1)]
    normalize, inputs = (True, True) if which == 2 else options[5:7]
    options[5:] = [normalize, inputs, rules == "positive" if halves is None else halves]
    if bias is not None:
        given = given.to(bias)
    operand = None if dtype == FLOAT32 else arithmetic.tf32
    compare(ops.attention_relevance, q, k, v, given, rel, grad, row, *options, operand=operand)


def _methods(update: str, lanes: str) -> None:
    q, k, v, lane = (torch.randn(*s) for s in ((2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8), (4, 2, 3, 9, 8)))
    rel, grad = lane.abs() if lanes == "rel" else None, lane if lanes == "grad" else None
    options = (0.3, False, 0, "positive", update, True, True)
    compare(ops.attention_relevance, q, k, v, None, rel, grad, torch.rand(4, 2, 9), *options)


def _residual(rules: str, dtype: torch.dtype, sizes: tuple[int, ...], batch_dim: int = 0) -> None:
    """Away from 0 = u + v, where the official rules divide by rounding."""
    u, v = (1 + torch.rand(*sizes)).to(dtype), (-0.5 * torch.rand(*sizes)).to(dtype)
    compare(ops.residual_add, u, v, torch.rand(2, *sizes), batch_dim, rules)


def _residual_of_sum() -> None:
    u, v, rel, beside = torch.randn(4, 150), torch.randn(4, 150), torch.rand(2, 4, 150), torch.rand(2, 4, 150)
    ours = residual_add_of_sum(u, v, rel, beside)
    exact = REFERENCES[ops.residual_add](u.double(), v.double(), rel.double() + beside.double(), 0, "positive")
    for mine, wanted in zip(ours, exact, strict=True):
        assert golden.relative_error(mine.double(), wanted) < 5e-6


def _norm(width: int, dtype: torch.dtype, weighted: bool = True, frozen: bool = False) -> None:
    x, weight, grad = torch.randn(2, 3, width).to(dtype), torch.randn(width).to(dtype), torch.randn(3, 2, 3, width)
    compare(ops.layer_norm_backward, grad, x, weight if weighted else None, 1, 1e-5, frozen)


def _gelu(dtype: torch.dtype, approximate: str, frozen: bool) -> None:
    x, grad = torch.randn(3, 171).to(dtype), torch.randn(2, 3, 171)
    exact = cases.through_gelu(grad.double(), x.double(), approximate, frozen)
    assert golden.relative_error(activation.through_gelu(grad, x, approximate, frozen).double(), exact) < 5e-6


def _ratio(dtype: torch.dtype) -> None:
    x, y, grad = torch.randn(3, 171).to(dtype), torch.randn(3, 171).to(dtype), torch.randn(2, 3, 171)
    x[1] = 0
    compare(ops.activation_ratio, grad, x, y)


def _update(update: str, sizes: tuple[int, int]) -> None:
    attn, grad, rel = torch.rand(2, 3, *sizes), torch.randn(4, 2, 3, *sizes), torch.rand(4, 2, 3, *sizes)
    compare(ops.attention_update, attn, grad, rel, update)


def _rollout(size: int, normalize: bool) -> None:
    row, m = torch.rand(3, 2, size), torch.rand(3, 2, size, size)
    compare(ops.rollout_row, row, m, normalize)
    compare(ops.rollout_row, row, m[0], normalize)


def _matmul() -> None:
    lane, weight = torch.randn(2, 3, 5, 70), torch.randn(70, 33).bfloat16()
    ours = triton.kernels()[torch.matmul](lane, weight)
    assert golden.relative_error(ours.double(), lane.double() @ weight.double()) < 5e-6


def _unaligned(x: Tensor) -> Tensor:
    """x, at an address that is no multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _unaligned_attention() -> None:
    args = next(cases.attention(BFLOAT16, "positive", 40, 17, 32, "none"))
    values = (_unaligned(x.contiguous()) if isinstance(x, Tensor) else x for x in args)
    compare(ops.attention_relevance, *values, operand=arithmetic.tf32)


def _unaligned_linear() -> None:
    x, weight, rel = torch.randn(70, 64), torch.randn(48, 64), torch.rand(2, 70, 48)
    compare(ops.zplus_linear, _unaligned(x), _unaligned(weight), None, None, _unaligned(rel), rel - 0.5, "positive")


def _slope(dtype: torch.dtype, approximate: str, frozen: bool) -> None:
    """The gradient goes on through the gelu before the layer."""
    h, weight = torch.randn(2, 5, 70).to(dtype), torch.randn(33, 70).to(dtype)
    rel, grad = torch.rand(2, 2, 5, 33), torch.randn(2, 2, 5, 33)
    x = torch.nn.functional.gelu(h, approximate=approximate)
    options = {"slope": h, "approximate": approximate, "frozen": frozen}
    _, ours = triton.kernels()[ops.zplus_linear](x, weight, None, None, rel, grad, "positive", **options)
    exact = cases.through_gelu(grad.double() @ weight.double(), h.double(), approximate, frozen)
    assert golden.relative_error(ours.double(), exact) < 5e-6


def _block(dtype: torch.dtype, purpose: Any = None) -> None:
    """A block's layers with Z formed in one launch: the same numbers as one by one, whose checks hold for them. The first takes
    gelu's slope, AttnLRP's and its own, the last the gradient of more outputs."""
    kernels, tokens = triton.kernels(), 5
    op = kernels[ops.zplus_linear_reduced if purpose else ops.zplus_linear]
    wide = torch.randn(39, 20).to(dtype)
    sizes = ((70, 33), (33, 70), (20, 13), (20, 13))
    weights = [torch.randn(outs, ins).to(dtype) for ins, outs in sizes[:3]] + [wide[26:]]
    prepared = [kernels[ops.reduced_weight](w, purpose) if purpose else (w,) for w in weights]
    layers, parts = [], []
    for w, made in zip(weights, prepared, strict=True):
        x, bias = torch.randn(1, tokens, w.shape[1]).to(dtype), torch.randn(len(w)).to(dtype)
        layers.append((x, (x.float() @ w.float().mT + bias.float()).to(dtype), bias))
        parts += [x, made[1 if purpose else 0], *layers[-1][1:]]
    sums = zplus_sums.zplus_sums(*parts, reduced=bool(purpose))
    for i, ((x, y, bias), w, z) in enumerate(zip(layers, prepared, sums, strict=True)):
        rel, grad = torch.rand(2, *y.shape), torch.randn(2, *y.shape[:-1], 39 if i == 3 else y.shape[-1])
        own = wide.bfloat16() if purpose and i == 3 else w[0]
        tail = () if purpose else ("positive",)
        formed = i < 3 and z is not None
        values = (x, *w, *((own,) if purpose else ()), y, bias)
        more = {"w_grad": wide} if i == 3 and not purpose else {}
        divided = safe_divide(rel, z.view(y.shape)) if formed else rel
        divisor = sums[1] if i == 0 else None
        for frozen in (True, False) if i == 0 else (False,):
            slope = {"slope": x, "frozen": frozen} if i == 0 else {}
            ours = op(*values, divided, grad, *tail, sums=z, formed=formed, divisor=divisor, **more, **slope)
            alone = op(*values, rel, None if i == 3 else grad, *tail, **slope)
            wanted = alone[0] if divisor is None else safe_divide(alone[0], divisor.view(1, tokens, -1))
            assert torch.equal(ours[0], wanted)
            assert i == 3 or torch.equal(ours[1], alone[1])
            exact = grad.double() @ (own if purpose else wide if i == 3 else w[0]).double()
            exact = cases.through_gelu(exact, x.double(), "none", frozen) if i == 0 else exact
            assert golden.relative_error(ours[1].double(), exact) < (5e-3 if purpose else 5e-6)


def _half_block(dtype: torch.dtype, width: int, frozen: bool = False) -> None:
    """Norm, residual add and the row's step of one value in one launch: the same numbers as in launches of their own."""
    x, u, v = (torch.randn(2, 5, width).to(dtype) for _ in range(3))
    weight, (grad, rel, grad_beside, rel_beside) = torch.randn(width).to(dtype), torch.randn(4, 3, 2, 5, width)
    through, row = torch.rand(3, 2, 7, 5), torch.rand(3, 2, 5)
    z = torch.rand(2, 5, width)
    for steps in ((None, None, z), (through, row, z)):
        values = (grad, x, weight, 1, 1e-5, grad_beside)
        ours = layer_norm_backward.half_block(*values, u, v, rel, rel_beside, *steps, frozen=frozen)
        assert torch.equal(ours[0], layer_norm_backward.layer_norm_backward_beside(*values, frozen))
        rel_u, rel_v = residual_add_of_sum(u, v, rel, rel_beside)
        assert torch.equal(ours[1], rel_u)
        assert torch.equal(ours[2], safe_divide(rel_v, z))
        if steps[0] is not None:
            torch.testing.assert_close(ours[3], through.sum(2) + row)


def linears() -> Iterator[tuple[str, Call]]:
    """`zplus_linear`, `zplus_linear_reduced` and the passes around the vendor's products."""
    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        name = str(dtype).removeprefix("torch.")
        yield f"{name}, tails", Call(lambda dtype=dtype: _linear(dtype))
        if dtype != FLOAT16:
            yield f"{name}, aligned", Call(lambda dtype=dtype: _linear(dtype, (40, 96, 80), bias=False))
        yield (
            f"{name}, one row, official, transposed",
            Call(lambda dtype=dtype: _linear(dtype, (1, 16, 24), "official", output=False, grad=False, transposed=True)),
        )
    yield "bfloat16, one feature", Call(lambda: _linear(BFLOAT16, (5, 1, 16)))
    yield "float32, official", Call(lambda: _linear(FLOAT32, rules="official"))
    yield "float32, many rows", Call(lambda: _linear(FLOAT32, (75, 96, 80)), many=True)
    yield "float32, unaligned", Call(_unaligned_linear)
    yield "float32 values in a bfloat16 layer", Call(lambda: _linear(BFLOAT16, x_dtype=FLOAT32))
    yield "bfloat16 products, tails", Call(lambda: _reduced("bfloat16"))
    yield "bfloat16 products, aligned", Call(lambda: _reduced("bfloat16", (40, 96, 80), bias=False))
    yield "float8 products, tails", Call(lambda: _reduced("float8"), capability=89)
    yield "float8 products, aligned", Call(lambda: _reduced("float8", (40, 96, 80), bias=False), capability=89)
    yield "bfloat16, passes", Call(lambda: _linear(BFLOAT16, output=False), products=True)
    yield (
        "bfloat16, passes, official",
        Call(lambda: _linear(BFLOAT16, (5, 96, 1040), "official", output=False, grad=False), products=True),
    )
    yield "bfloat16 products, passes", Call(lambda: _reduced("bfloat16"), products=True)
    yield "a gradient by a bfloat16 weight", Call(_matmul)
    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        yield f"a block in {str(dtype).removeprefix('torch.')}", Call(lambda dtype=dtype: _block(dtype))
        yield (
            f"a block in {str(dtype).removeprefix('torch.')}, many rows",
            Call(lambda dtype=dtype: _block(dtype), many=True),
        )
    for many in (False, True):
        name = f"a block in bfloat16 products{', many rows' if many else ''}"
        yield name, Call(lambda: _block(FLOAT32, "bfloat16"), many=many)
    yield "a block in float8 products", Call(lambda: _block(FLOAT32, "float8"), capability=89, many=True)
    for approximate, frozen in itertools.product(("none", "tanh"), (False, True)):
        name = f"gelu, {approximate}{', frozen' if frozen else ''}"
        how = (approximate, frozen)
        yield f"slope of {name}", Call(lambda how=how: _slope(FLOAT32, *how))
        yield name, Call(lambda how=how: _gelu(BFLOAT16 if how[1] else FLOAT32, *how))


#: Names, and dtype, rules, queries, keys, head size, mask, lanes, the dtype of a bias, and halves of the gradient.
ATTENTIONS: dict[str, tuple[Any, ...]] = {
    "float32, d 32": (FLOAT32, "positive", (40, 17, 32), "none", 0),
    "float32, d 64": (FLOAT32, "positive", (33, 40, 64), "none", 0),
    "float32, d 64, bias": (FLOAT32, "positive", (33, 40, 64), "float", 2),
    "float32, d 128": (FLOAT32, "positive", (17, 33, 128), "none", 0),
    "float32, d 16, scaled rows alone": (FLOAT32, "positive", (5, 37, 16), "none", 1),
    "float32, d 64, scaled rows alone": (FLOAT32, "positive", (33, 40, 64), "none", 1),
    "float32, d 128, scaled rows alone": (FLOAT32, "positive", (17, 33, 128), "none", 1),
    "bfloat16, d 64, scaled rows alone": (BFLOAT16, "positive", (33, 40, 64), "none", 1),
    "float32, d 64, whole gradient": (FLOAT32, "positive", (33, 40, 64), "none", 0, None, False),
    "bfloat16, d 32, whole gradient": (BFLOAT16, "positive", (40, 70, 32), "none", 0, None, False),
    "float32, d 72, two queries": (FLOAT32, "positive", (2, 65, 72), "none", 2),
    "float32, official, d 32, bias": (FLOAT32, "official", (40, 17, 32), "float", 2),
    "float32, official, d 64, bias": (FLOAT32, "official", (17, 33, 64), "float", 2),
    "float32, official, d 24, causal, halves": (FLOAT32, "official", (5, 37, 24), "causal", 2, None, True),
    "float32, official, d 8, keep": (FLOAT32, "official", (35, 37, 8), "bool", 0),
    "bfloat16, d 32": (BFLOAT16, "positive", (40, 70, 32), "none", 2),
    "bfloat16, d 32, together": (BFLOAT16, "positive", (40, 70, 32), "none", 0),
    "bfloat16, d 64": (BFLOAT16, "positive", (33, 40, 64), "none", 0),
    "bfloat16, d 64, bias": (BFLOAT16, "positive", (65, 40, 64), "float", 2, BFLOAT16),
    "bfloat16, d 128": (BFLOAT16, "positive", (33, 40, 128), "none", 0),
    "bfloat16, d 24, keep": (BFLOAT16, "positive", (5, 37, 24), "bool", 0),
    "bfloat16, official, d 24, bias": (BFLOAT16, "official", (15, 17, 24), "float", 2, BFLOAT16),
    "bfloat16, official, d 64, bias": (BFLOAT16, "official", (33, 40, 64), "float", 2, BFLOAT16),
    "float16, d 80, causal": (FLOAT16, "positive", (3, 17, 80), "causal", 2),
}

#: Those that are launched otherwise where rows are many.
MANY_ROWS = (
    "float32, d 32",
    "bfloat16, d 32, together",
    "float32, d 64",
    "bfloat16, d 64",
    "float32, d 64, whole gradient",
)

#: Updates of other methods, and the lanes that they come with.
METHODS = (("gradient_attention", "grad"), ("relevance", "rel"), ("attention", "none"))


def attentions() -> Iterator[tuple[str, Call]]:
    """`attention_relevance`."""
    for name, options in ATTENTIONS.items():
        yield name, Call(lambda options=options: _attention(*options))
    for name in MANY_ROWS:
        yield f"{name.split(', together')[0]}, many rows", Call(lambda name=name: _attention(*ATTENTIONS[name]), many=True)
    for update, lanes in METHODS:
        yield f"float32, {update}", Call(lambda update=update, lanes=lanes: _methods(update, lanes))
    yield "bfloat16, unaligned", Call(_unaligned_attention)


def others() -> Iterator[tuple[str, Call]]:
    """Kernels without products."""
    for rules in ("positive", "official"):
        yield f"residual add, {rules}", Call(lambda rules=rules: _residual(rules, FLOAT32, (4, 3, 350)))
        yield f"residual add, {rules}, bfloat16", Call(lambda rules=rules: _residual(rules, BFLOAT16, (3, 4, 16), 1))
    yield "residual add, official, chunks", Call(lambda: _residual("official", FLOAT32, (2, 20_001)))
    yield "residual add of a sum", Call(_residual_of_sum)
    for dtype in (FLOAT32, FLOAT16):
        yield f"ratio of an activation, {dtype}", Call(lambda dtype=dtype: _ratio(dtype))
    yield "half a block of 63", Call(lambda: _half_block(FLOAT32, 63))
    yield "half a block of 768, frozen", Call(lambda: _half_block(FLOAT32, 768, frozen=True))
    for width in (768, layer_norm_backward.WIDEST):
        yield f"layer norm {width}, frozen", Call(lambda width=width: _norm(width, FLOAT32, frozen=True))
    yield "half a block of 768, bfloat16", Call(lambda: _half_block(BFLOAT16, 768))
    for frozen in (False, True):
        name = ", frozen" if frozen else ""
        yield (
            f"half a block of the widest{name}",
            Call(lambda frozen=frozen: _half_block(FLOAT32, layer_norm_backward.WIDEST, frozen)),
        )
    for width in (3, 63, 768, layer_norm_backward.WIDEST):
        yield f"layer norm {width}", Call(lambda width=width: _norm(width, FLOAT32))
    yield "layer norm 1030, float16, no weight", Call(lambda: _norm(1030, FLOAT16, weighted=False))
    for update in cases.UPDATES:
        yield f"attention update {update}", Call(lambda update=update: _update(update, (37, 33)))
    yield "attention update, aligned", Call(lambda: _update("gradient_relevance", (16, 16)))
    for normalize in (False, True):
        for size in (1, 70):
            yield f"rollout of {size}, {normalize}", Call(lambda size=size, normalize=normalize: _rollout(size, normalize))


CALLS: dict[str, Call] = {
    f"{kind}: {name}": call
    for kind, made in (("linear", linears()), ("attention", attentions()), ("other", others()))
    for name, call in made
}
