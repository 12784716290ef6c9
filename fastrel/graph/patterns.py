"""Kinds of operators, and the patterns of operators that are attention."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fastrel.graph import axes as axes_

aten = torch.ops.aten

#: Operators that return their first argument unchanged at inference.
IDENTITIES = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.type_as.default,
}

#: Those among them that give the same tensor, and launch nothing on a GPU.
ALIASES = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.alias.default,
    aten.detach.default,
}

ACTIVATIONS = {
    aten.gelu.default,
    aten.relu.default,
    aten.relu_.default,
    aten.silu.default,
    aten.silu_.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.hardtanh.default,
    aten.relu6.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.softplus.default,
    aten.mish.default,
    aten.erf.default,
    aten.exp.default,
    aten.neg.default,
    aten.abs.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.square.default,
    aten.log.default,
    aten.log1p.default,
    aten.sin.default,
    aten.cos.default,
    aten.log_sigmoid.default,
    aten.selu.default,
    aten.celu.default,
    aten.hardshrink.default,
    aten.threshold.default,
    aten.pow.Tensor_Scalar,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.nan_to_num.default,
    aten.expm1.default,
    aten.exp2.default,
    aten.log2.default,
    aten.log10.default,
    aten.atan.default,
    aten.sinh.default,
    aten.asinh.default,
    aten.erfc.default,
    aten.sign.default,
    aten.round.default,
    aten.floor.default,
    aten.ceil.default,
    aten.trunc.default,
    aten.clamp_max.default,
    aten.softshrink.default,
    aten.logit.default,
    aten.tan.default,
    aten.asin.default,
    aten.acos.default,
    aten.erfinv.default,
}

#: Those whose slope is 0 but where they jump.
STEPS = {aten.sign.default, aten.round.default, aten.floor.default, aten.ceil.default}

DIVISIONS = {aten.div.Tensor, aten.div.Scalar}

PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar} | DIVISIONS

ARITHMETIC = {
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
} | PRODUCTS


#: Operators that read no more of their second argument than its shape and dtype.
LIKE_ANOTHER = {
    aten.type_as.default,
    aten.expand_as.default,
    aten.view_as.default,
    aten.reshape_as.default,
}

#: Operators that read no more of a value than its shape and dtype.
CONSTANTS = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}


def reads(node: fx.Node) -> list[fx.Node]:
    """The values whose entries a node reads, not their shapes and dtypes alone."""
    return [node.args[0]] if node.target in LIKE_ANOTHER else node.all_input_nodes  # type: ignore[list-item]


SOFTMAXES = {aten.softmax.int, aten._softmax.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default}

#: How places are found in masks and ids.
_OVER_TOKENS = {
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.max.dim,
    aten.min.dim,
    aten.argmax.default,
    aten.argmin.default,
    aten.count_nonzero.dim_IntList,
    aten.count_nonzero.default,
}

#: Operators that return several runs of entries along a dimension, and those that return one.
_CUTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
_RUNS = {aten.slice.Tensor, aten.narrow.default}

_ALONG_HEADS = {
    *IDENTITIES,
    aten.permute.default,
    aten.transpose.int,
    aten.linear.default,
    aten.conv2d.default,
    aten.batch_norm.default,
}


def enters(node: fx.Node) -> bool:
    """Whether a value is where integers of the input become numbers: a look-up, a cast of uint8 pictures or of one-hot codes."""
    if node.target is aten.embedding.default:
        return True
    if node.target not in _CASTS or not node.meta["val"].is_floating_point():
        return False
    x: Any = node.args[0]
    picture = x.meta["val"].dtype == torch.uint8 and x.meta["val"].dim() > 2
    return picture or (x.target is aten.one_hot.default and not _is_of_places(x))


def _is_of_places(code: fx.Node) -> bool:
    """Whether one-hot codes are of places in a sequence and not of words: as many as there are tokens, or of what was reduced over
    tokens, such as the lengths in a mask."""
    if len(code.args) > 1 and isinstance(code.args[1], fx.Node):
        return True
    todo, seen = [code], {code}
    while todo:
        new = [x for x in reads(todo.pop()) if x not in seen]
        if any(x.target in _OVER_TOKENS and _reduces_tokens(x) for x in new):
            return True
        seen.update(new)
        todo += new
    return False


def _reduces_tokens(node: fx.Node) -> bool:
    """Whether a reduction is over the second dimension, where tokens lie in ids and masks."""
    dims: Any = node.args[1] if len(node.args) > 1 else None
    ndim = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return dims is None or 1 in {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}


def is_pointwise(node: fx.Node) -> bool:
    """Whether each entry of the result depends on one entry of each operand."""
    return node.target in ACTIVATIONS or node.target in ARITHMETIC or node.target in IDENTITIES


def is_attention_value(node: fx.Node) -> bool:
    """Whether a matrix product is A·V: its left operand is a softmax over keys, possibly copied or reshaped."""
    if node.target not in (aten.matmul.default, aten.bmm.default):
        return False
    return is_softmax_over_keys(node.args[0])


def is_softmax_over_keys(attn: Any) -> bool:
    """Whether a value is a softmax over its last dimension, possibly copied, reshaped, masked or scaled by rows, some keys of one
    (where others are sinks), or a sum of such."""
    while isinstance(attn, fx.Node):
        if attn.target in IDENTITIES or attn.target in axes_.RESHAPES or _keeps_keys(attn):
            attn = attn.args[0]
        elif (whole := whole_of_keys(attn)) is not None or (whole := _unmasked(attn)) is not None:
            attn = whole
        else:
            break
    if not isinstance(attn, fx.Node):
        return False
    if attn.target in (aten.mul.Tensor, aten.div.Tensor):
        return any(is_softmax_over_keys(x) and _one_per_row(other) for x, other in (attn.args[:2], attn.args[1::-1]))
    if attn.target is aten.cat.default:  # of several heads
        parts: Any = attn.args[0]
        dim = attn.args[1] if len(attn.args) > 1 else 0
        return dim not in (-1, attn.meta["val"].dim() - 1) and all(is_softmax_over_keys(x) for x in parts)
    if attn.target is aten.add.Tensor:
        return all(is_softmax_over_keys(x) for x in attn.args[:2])
    return attn.target in SOFTMAXES and attn.args[1] in (-1, attn.meta["val"].dim() - 1)


def _one_per_row(x: Any) -> bool:
    """Whether a factor is the same for all keys."""
    return not isinstance(x, fx.Node) or not x.meta["val"].dim() or x.meta["val"].shape[-1] == 1


def _keeps_keys(node: fx.Node) -> bool:
    """Whether a value is a permutation of another one's dimensions that leaves the last where it is."""
    return node.target is aten.permute.default and node.args[1][-1] in (-1, len(node.args[1]) - 1)  # type: ignore


def _unmasked(node: fx.Node) -> Any:
    """The value of which some entries were replaced by a number, 0 mostly, or multiplied by a mask of 0 and 1; None for others."""
    if node.target in (aten.masked_fill.Scalar, aten.nan_to_num.default):
        return node.args[0]
    if node.target is aten.where.ScalarOther:
        return node.args[1]
    if node.target is aten.where.ScalarSelf:
        return node.args[2]
    if node.target is aten.mul.Tensor:
        return next((x for x, mask in (node.args[:2], node.args[1::-1]) if _is_mask(mask)), None)
    return None


def _is_mask(x: Any) -> bool:
    """Whether a value is one of truth values or whole numbers, cast and moved."""
    while isinstance(x, fx.Node) and x.meta["val"].is_floating_point():
        if x.target not in IDENTITIES and x.target not in axes_.RESHAPES and x.target is not aten.expand.default:
            return False
        x = x.args[0]
    return isinstance(x, fx.Node)


def whole_of_keys(node: fx.Node) -> fx.Node | None:
    """The value of which a value is a run of entries along the last dimension, or is all (`x[:]`); None for others."""
    cut: Any = node.args[0] if node.target is operator.getitem else node
    if cut.target not in (_CUTS if cut is not node else _RUNS):
        return None
    place = 2 if cut.target in _CUTS else 1
    dim = cut.args[place] if len(cut.args) > place else 0
    whole: Any = cut.args[0]
    shapes = [str(x.meta["val"].shape) for x in (node, whole)]
    return whole if dim in (-1, node.meta["val"].dim() - 1) or shapes[0] == shapes[1] else None


def is_talking_heads_value(node: fx.Node) -> bool:
    """Whether a matrix product is A'·V with A' a mixture of several heads' softmax maps."""
    if node.target not in (aten.matmul.default, aten.bmm.default):
        return False
    attn, mixed = node.args[0], False
    while isinstance(attn, fx.Node) and attn.target in _ALONG_HEADS:
        mixed = mixed or attn.target in (aten.linear.default, aten.conv2d.default)
        attn = attn.args[0]
    return mixed and isinstance(attn, fx.Node) and attn.target in SOFTMAXES
