"""Linear layers, convolutions, products of activations, attention."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastrel import functional
from fastrel.eager.arithmetic import add, mul, sum_
from fastrel.eager.exponentials import weights_of
from fastrel.eager.kinds import move
from fastrel.eager.parts import of_columns, of_one_head
from fastrel.eager.tape import Facts, Tape, handles, is_activation, refuse_activations
from fastrel.errors import UnsupportedModelError


@handles("linear")
def linear(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Eq. (5); of attention maps whose heads come last it makes maps mixed over heads."""
    refuse_activations("linear", weight, bias)
    if tape.facts(x).turned and len(weight) == 1 and weight.dim() == 2:
        pooled = sum_(tape, mul(tape, x, weight.detach()[0]), -1, True)
        return pooled if bias is None else add(tape, pooled, bias.detach())
    keys, out = tape.facts(x).keys, functional.linear(x, weight, bias, tape.rules)
    if keys not in (None, -1):
        return tape.know(out, keys=keys, mixed=True)
    out = tape.know(out, origin=x, tokens=-2 if x.dim() == 3 else None)
    return of_columns(tape, out, x, weight, weight, bias)


@handles("addmm")
def addmm(tape: Tape, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """A linear layer with its weight the other way round."""
    refuse_activations("addmm", weight, bias)
    return functional.linear(x, weight.detach().t() * alpha, bias * beta, tape.rules)


@handles("conv1d", "conv2d", "conv3d")
def convolution(
    tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """Eq. (5), the pixel rule for the one that reads the image; over the heads of attention maps it mixes them."""
    refuse_activations("convolution", weight, bias)
    reads_image = x.grad_fn is None and not tape.knows(x) and weight.dim() == 4
    if reads_image and set(_flat(padding)) <= {0, "valid"} and set(_flat(dilation)) == {1} and groups == 1:
        return functional.pixel_convolution(x, weight, bias, stride)
    keys = tape.facts(x).keys
    out = functional.convolution(x, weight, bias, stride, padding, dilation, groups, tape.rules)
    return tape.know(out, keys=keys, mixed=True) if keys == -1 and out.shape[2:] == x.shape[2:] else out


@handles("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(
    tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """Eq. (5)."""
    refuse_activations("conv_transpose", weight, bias)
    options = (stride, padding, output_padding, groups, dilation)
    return functional.transposed_convolution(x, weight, bias, *options, tape.rules)


def _flat(option: Any) -> list[Any]:
    return list(option) if isinstance(option, (list, tuple)) else [option]


@handles("matmul", "bmm", "mm", "mv")
def matmul(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """A·V, V·Aᵀ, Q·Kᵀ, other products of two activations, linear layers, and sums by constant weights."""
    if not is_activation(b) and tape.facts(a).turned and (b.dim() == 1 or (b.dim() == 2 and b.shape[1] == 1)):
        return sum_(tape, mul(tape, a, b.detach().flatten()), -1, b.dim() == 2)
    if not is_activation(b) and b.dim() < 3:
        weight = b.detach().mT if b.dim() == 2 else b.detach()[None]
        out = tape.know(functional.linear(a, weight, None, tape.rules), origin=a)
        if b.dim() == 2:
            return of_columns(tape, out, a, b, weight)
        return tape.know(out.squeeze(-1), tokens=-1 if a.dim() == 3 else None)
    one_row = a.dim() > 1 and a.shape[-2] == 1 and b.dim() > 2
    if not is_activation(a) and one_row and tape.facts(a).keys is None:
        return sum_(tape, mul(tape, b, a.mT), -2, True)
    if not is_activation(a) and a.dim() < 3:
        return matmul(tape, b.mT, a.mT).mT.contiguous()
    if (weights := weights_of(tape, a)) is not None:
        attended = matmul(tape, weights[0], b)
        return tape.pointwise(attended.detach() * weights[1], attended)
    of_a, of_b = tape.facts(a), tape.facts(b)
    if of_a.keys == -1:
        return _attention_value(tape, a, b, of_a)
    if of_b.keys == -2 and of_a.keys is None:
        return _attention_value(tape, b.mT, a.mT, of_b).mT.contiguous()
    if not is_activation(b):
        return functional.layers(a, b, tape.rules)
    if any(x.pairs is not None and x.scaled for x in (of_a, of_b)):
        raise UnsupportedModelError("a product of three activations, of which nothing tells which two make a map")
    if of_a.pairs == -1:
        return _attention_value(tape, a, b, replace(of_a, mixed=True))
    if of_b.pairs == -2 and of_a.pairs is None:
        return _attention_value(tape, b.mT, a.mT, replace(of_b, mixed=True)).mT.contiguous()
    if is_gate(of_a, -1) and of_b.pairs is None:
        return tape.know(_gated(tape, a, b), pairs=-1, scaled=True)
    if is_gate(of_b, -2) and of_a.pairs is None:
        return tape.know(_gated(tape, b.mT, a.mT).mT.contiguous(), pairs=-1, scaled=True)
    return tape.know(functional.matmul(a, b, tape.rules), pairs=-1, scaled=True)


def is_gate(facts: Facts, tokens: int) -> bool:
    """Whether a factor of a product over tokens is one number for each, or several that a function shaped, made of this token alone."""
    x = facts.tensor
    return x.dim() == 3 and facts.tokens == tokens and facts.pairs is None and (facts.shaped or x.shape[-3 - tokens] == 1)


def _gated(tape: Tape, gates: Tensor, x: Tensor) -> Tensor:
    """g x of gates [B, n, T] and values [B, T, d], as sums over tokens."""
    weights = move(tape, "unsqueeze", torch.unsqueeze, (gates.mT, 3), {})
    values = move(tape, "unsqueeze", torch.unsqueeze, (x, 2), {})
    return sum_(tape, mul(tape, weights, values), 1)


@handles("grouped_mm", "grouped_mm_fallback")
def grouped_mm(tape: Tape, x: Tensor, weight: Tensor, offs: Tensor, **options: Any) -> Tensor:
    """Experts of a mixture, which are linear layers of the rows that chose them."""
    refuse_activations("grouped_mm", weight)
    if x.dim() != 2 or weight.dim() != 3 or any(option is not None for option in options.values()):
        raise UnsupportedModelError(
            "no relevance function for a grouped_mm that is not x [S, in] times weights [E, in, out]"
        )
    return functional.experts(x, weight, offs, tape.rules)


@handles("inner")
def inner(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ."""
    return matmul(tape, a, b if b.dim() == 1 else b.mT)


@handles("rmatmul")
def rmatmul(tape: Tape, b: Tensor, a: Tensor) -> Tensor:
    """a @ b."""
    return matmul(tape, a, b)


def _attention_value(tape: Tape, a: Tensor, v: Tensor, facts: Facts) -> Tensor:
    """A V; the map is kept as [B, h, Tq, Tk] also where the product takes [B·h, Tq, Tk]."""
    attn = functional.end(a, tape.rules)
    merged = _heads(tape, a, tape.facts(v).merged or facts.merged)
    if merged is None:
        tape.attention.append(attn)
    elif merged[0] != tape.batch == merged[1]:
        tape.attention.append(attn.unflatten(0, merged).transpose(0, 1))
        attn = tape.attention[-1].transpose(0, 1).flatten(0, 1)
    else:
        tape.attention.append(attn.unflatten(0, merged))
        attn = tape.attention[-1].flatten(0, 1)
    out = functional.matmul(attn, v, tape.rules, attention=True, mixed=facts.mixed)
    return of_one_head(tape, out, v, a.shape) if merged is not None and merged[1] == 1 and not facts.mixed else out


def _heads(tape: Tape, x: Tensor, merged: tuple[int, int] | None) -> tuple[int, int] | None:
    """What the first dimension of a value [B·h, T, ·] is made of; None where heads have their own."""
    if x.dim() != 3 or merged is not None:
        return merged if x.dim() == 3 else None
    return (tape.batch, len(x) // tape.batch) if tape.batch and len(x) % tape.batch == 0 else None


@handles("baddbmm")
def baddbmm(tape: Tape, x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta x + alpha a b: scores with their mask, mostly."""
    product = matmul(tape, a, b)
    scaled = tape.pointwise(product.detach() * alpha, product)
    return scaled if beta == 0 else add(tape, scaled, mul(tape, x, beta) if is_activation(x) else x * beta)


@handles("einsum")
def einsum(tape: Tape, equation: str, *operands: Any) -> Tensor:
    """One that is a product of matrices, as that."""
    a, b = operands[0] if isinstance(operands[0], (list, tuple)) else operands if len(operands) == 2 else (None, None)
    if any(tape.facts(x).keys is not None for x in (a, b)) and (whole := _unsummed(equation)) is not None:
        product = einsum(tape, whole[0], a, b)
        return sum_(tape, product, list(range(product.dim() - whole[1], product.dim())))
    left, right, result = _indices(equation, (a, b))
    on_the_right = tape.facts(b).keys is not None and tape.facts(a).keys is None  # a map, which goes to the left
    by_constants = not is_activation(a) and is_activation(b) and set(left) <= set(right)  # weights, which go to the right
    if on_the_right or by_constants:
        a, b, left, right = b, a, right, left
    sizes = dict(zip(left, a.shape, strict=True)) | dict(zip(right, b.shape, strict=True))
    batch = [i for i in result if i in left and i in right]
    summed = [i for i in left if i in right and i not in result]
    rows, columns = ([i for i in side if i not in batch and i not in summed] for side in (left, right))
    if not is_activation(b) and not columns and (left[0] in right or left[-1] not in summed):  # tokens by constant weights
        spread = torch.einsum(f"{right}->{''.join(i for i in left if i in right)}", b)
        weights = spread[tuple(slice(None) if i in right else None for i in left)]
        added = sum_(tape, mul(tape, a, weights), [left.index(i) for i in summed])
        kept = [i for i in left if i not in summed]
        return move(tape, "permute", torch.permute, (added, [kept.index(i) for i in result]), {})

    def rearranged(name: str, x: Tensor, to: list[int]) -> Tensor:
        return move(tape, name, getattr(torch, name), (x, to), {})

    def matrices(x: Tensor, have: str, *groups: list[str]) -> Tensor:
        turned = rearranged("permute", x, [have.index(i) for i in [*batch, *groups[0], *groups[1]]])
        if len(groups[0]) == len(groups[1]) == 1:
            return turned
        return rearranged("reshape", turned, [sizes[i] for i in batch] + [math.prod(sizes[i] for i in g) for g in groups])

    product = matmul(tape, matrices(a, left, rows, summed), matrices(b, right, summed, columns))
    order = [*batch, *rows, *columns]
    product = rearranged("reshape", product, [sizes[i] for i in order])
    out = rearranged("permute", product, [order.index(i) for i in result]).contiguous()
    facts = tape.facts(a)
    mixes = facts.keys is not None and not is_activation(b) and left[facts.keys] in rows
    return tape.know(out, keys=result.index(left[facts.keys]) - len(result), mixed=True) if mixes else out  # type: ignore[index]


@handles("tensordot")
def tensordot(tape: Tape, a: Any, b: Any, dims: Any = 2, out: None = None) -> Tensor:
    """As an einsum."""
    if isinstance(dims, (int, Tensor)):
        count = int(dims)
        dims = (range(a.dim() - count, a.dim()), range(count))
    given = [[d] if isinstance(d, int) else [int(i) for i in d] for d in dims]
    letters = iter(string.ascii_letters)
    left, right = ([next(letters) for _ in range(x.dim())] for x in (a, b))
    for i, j in zip(*given, strict=True):
        right[j] = left[i]
    result = [c for c in (*left, *right) if (c in left) != (c in right)]
    return einsum(tape, f"{''.join(left)},{''.join(right)}->{''.join(result)}", a, b)


def _unsummed(equation: str) -> tuple[str, int] | None:
    """An equation of two operands whose result keeps, at the end, what one operand alone has, and how many indices these are; None
    where it keeps them already."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    alone = [i for i in left + right if (i in left) != (i in right) and i not in result]
    return (f"{inputs}->{result}{''.join(alone)}", len(alone)) if arrow and comma and alone and "." not in inputs else None


def _indices(equation: str, operands: Sequence[Any]) -> tuple[str, str, str]:
    """The indices of an einsum's two operands and of its result, if it is a product of matrices."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    if arrow and comma and operands[0] is not None and "." not in equation and "," not in right:
        once = all(len(set(side)) == len(side) for side in (left, right, result))
        if once and set(left) ^ set(right) <= set(result) <= set(left) | set(right):
            return left, right, result
    raise UnsupportedModelError(f"no relevance function for einsum {equation!r}, which is no product of two matrices")


@handles("scaled_dot_product_attention")
def scaled_dot_product_attention(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention in one call; grouped keys and values are those of each query head."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    merged = _heads(tape, query, tape.facts(value).merged)
    if merged is not None:
        query, key, value = (x.unflatten(0, merged) for x in (query, key, value))
        attn_mask = attn_mask.unflatten(0, merged) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, rules=tape.rules, maps=tape.attention
    )
    if merged is None:
        return out
    joined = out.flatten(0, 1)
    sizes = (*query.shape[:-1], key.shape[-2])
    return of_one_head(tape, joined, value, sizes) if merged[1] == 1 else joined


@handles("multi_head_attention_forward")
def multi_head_attention_forward(tape: Tape, *args: Any, **options: Any) -> Any:
    """nn.MultiheadAttention in all its forms."""
    return functional.multi_head_attention_forward(*args, **options, rules=tape.rules, maps=tape.attention)
