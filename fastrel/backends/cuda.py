"""Backend "cuda": torch's own matrix products, and the passes of csrc/cuda for everything around them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrel import ops, weights
from fastrel.backends import native
from fastrel.backends.common import Call, without_kernel
from fastrel.ops.attention import mask_factor
from fastrel.ops.library import CUDA_LIBRARY, FAKES, declare_cuda
from fastrel.ops.narrow_products import prepared, product
from fastrel.ops.zplus_linear_reduced import FLOOR

#: Numbers that the attention maps of a chunk of queries may have.
CHUNK = 8 << 20

_FLOATS = "Tensor attn, Tensor? grad_product, Tensor? rel_product"
for _schema in (
    "zplus_ratio(Tensor signed_sum, Tensor? bias, Tensor? magnitude, Tensor rel, float least, bool official, int parts=0)"
    " -> Tensor",
    "zplus_parts(Tensor lane, int parts) -> Tensor",
    "zplus_sides(Tensor x) -> Tensor",
    "zplus_magnitude(Tensor x) -> Tensor",
    "zplus_combine(Tensor x, Tensor c, Tensor c_abs) -> Tensor",
    "zplus_combine_sides(Tensor x, Tensor c) -> Tensor",
    "residual_add(Tensor u, Tensor v, Tensor rel, int batch_dim, str rules) -> (Tensor, Tensor)",
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, int dims, float eps, bool frozen=False) -> Tensor",
    'activation_ratio(Tensor grad, Tensor x, Tensor y, str gelu="") -> Tensor',
    "attention_update(Tensor? attn, Tensor? grad, Tensor? rel, str update) -> Tensor",
    "rollout_row(Tensor row, Tensor m, bool normalize) -> (Tensor, Tensor)",
    "attention_softmax_(Tensor(a!) products, Tensor? mask, float scale, bool causal, int query_start) -> Tensor(a!)",
    f"attention_sums({_FLOATS}, str update) -> Tensor",
    f"attention_through_(Tensor(a!) through, {_FLOATS}, Tensor weights, str update, bool add) -> Tensor(a!)",
    "attention_score_lanes_(Tensor attn, Tensor? products, Tensor? mask, Tensor(a!)? grad_product, Tensor(b!)? rel_product,"
    " Tensor(c!)? sums, float scale) -> ()",
):
    declare_cuda(_schema)

passes = torch.ops.fastrel_cuda


def _like(name: str, shape: Callable[..., Any]) -> None:
    torch.library.register_fake(f"fastrel_cuda::{name}", shape, lib=CUDA_LIBRARY)


def _parts(lane: Tensor, parts: int) -> Tensor:
    width = lane.shape[-1]
    return lane.new_empty((lane.numel() // width if width else 0, parts * width), dtype=torch.bfloat16)


_like(
    "zplus_ratio",
    lambda signed, bias, magnitude, rel, least, official, parts=0: _parts(rel, parts) if parts else torch.empty_like(rel),
)
_like("zplus_parts", _parts)
_like("zplus_sides", lambda x: x.new_empty((x.shape[:-1].numel(), 2 * x.shape[-1])))
_like("zplus_magnitude", lambda x: _parts(x, 1))
_like("zplus_combine", lambda x, c, c_abs: c.new_empty(c.shape))
_like("zplus_combine_sides", lambda x, c: c.new_empty((*c.shape[:-1], x.shape[-1])))
_like("attention_softmax_", lambda products, *_: products)
_like("attention_sums", lambda attn, *_: attn.new_empty(attn.shape[:3]))
_like("attention_through_", lambda through, *_: through)
_like("attention_score_lanes_", lambda *_: None)
for _op in (ops.residual_add, ops.layer_norm_backward, ops.activation_ratio, ops.attention_update, ops.rollout_row):
    _like(_op._schema.name.removeprefix("fastrel::"), FAKES[_op])


@functools.cache
def unavailable() -> str | None:
    """Why the CUDA passes cannot run on this machine; compiles them if need be."""
    if os.environ.get(native.CUDA_LIBRARY_VARIABLE):  # the tests' host shim among them
        return native.load_cuda()
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return native.load_cuda()


def runs_on(device: torch.device) -> str | None:
    """On a CUDA device."""
    if device.type == "cuda" or native.shimmed():
        return None
    return f"it runs on a CUDA device, and the model is on {device}"


@functools.cache
def kernels() -> dict[Any, Any]:
    """Functions by operator."""
    return {
        ops.zplus_linear: zplus_linear,
        ops.zplus_linear_reduced: zplus_linear_reduced,
        ops.residual_add: residual_add,
        ops.attention_relevance: attention_relevance,
        ops.attention_update: passes.attention_update.default,
        ops.rollout_row: passes.rollout_row.default,
        ops.layer_norm_backward: passes.layer_norm_backward.default,
        ops.activation_ratio: passes.activation_ratio.default,
        ops.reduced_weight: reduced_weight,
        ops.reduced_matmul: reduced_matmul,
        torch.matmul: matmul,
    }


def supports(call: Call) -> list[str]:
    """Why a call cannot be computed."""
    return without_kernel(call, None)


_kept = weights.kept_by_version(prepared)


def zplus_linear(
    x: Tensor, weight: Tensor, y: Tensor | None, bias: Tensor | None, rel: Tensor, grad: Tensor | None, rules: str
) -> tuple[Tensor, Tensor]:
    """`fastrel::zplus_linear` for x, weight, y and bias of the lanes' dtype or of 16 bits, lanes of float32 or float64.

    Where x and the weight have 16 bits, so have the products' operands: Z = [x⁺ x⁻] [W⁺ W⁻]ᵀ, without the layer's own output, of
    which too few digits are left for a difference.
    """
    official = rules == "official"
    if x.dtype == weight.dtype != rel.dtype == torch.float32:
        (signed,) = _kept(weight, "sides 2" if weight.dtype == torch.bfloat16 else "sides 1")
        z = product(passes.zplus_sides(x), signed.narrow(0, 0, len(weight)).t())
        rel_in = passes.zplus_combine_sides(x, _times(_ratio(z, weight, rel, official), weight, "sides", rel.shape))
        return rel_in, rel.new_empty(0) if grad is None else matmul(grad, weight)
    exact = y is not None and y.dtype == rel.dtype
    x, weight = x.to(rel.dtype), weight.to(rel.dtype)
    (w_abs,) = _kept(weight, "magnitude 1")
    magnitude = x.abs() @ w_abs.mT
    s = passes.zplus_ratio(y if exact else x @ weight.mT, bias if exact else None, magnitude, rel, 0.0, official)
    rel_in = passes.zplus_combine(x, s @ weight, s @ w_abs)
    return rel_in, x.new_empty(0) if grad is None else grad @ weight


def _ratio(z: Tensor, weight: Tensor, rel: Tensor, official: bool) -> Tensor:
    """S as the product with a weight takes it: in two parts of bfloat16, which hold 16 bits and more; float16 has not the range."""
    return passes.zplus_ratio(z, None, None, rel, 0.0, official, 2 if weight.dtype == torch.bfloat16 else 0)


def _times(lane: Tensor, weight: Tensor, what: str, shape: Sequence[int]) -> Tensor:
    """A lane [*shape], or its two parts, times what was prepared of a 16-bit weight."""
    if weight.dtype != torch.bfloat16:
        return lane @ _kept(weight, f"{what} wide")[0]
    return product(lane, _kept(weight, f"{what} 2")[0]).view(*shape[:-1], -1)


def matmul(lane: Tensor, weight: Tensor) -> Tensor:
    """`torch.matmul` of a lane by a weight of its dtype or of 16 bits."""
    if lane.dtype != torch.float32 or weight.dtype not in (torch.bfloat16, torch.float16) or weight.dim() != 2:
        wide = functools.reduce(torch.promote_types, (lane.dtype, weight.dtype, torch.float32))
        return lane.to(wide) @ weight.to(wide)
    return _times(passes.zplus_parts(lane, 2) if weight.dtype == torch.bfloat16 else lane, weight, "itself", lane.shape)


def zplus_linear_reduced(
    x: Tensor,
    w: Tensor,
    w_abs: Tensor,
    scales: Tensor,
    w_grad: Tensor | None,
    y: Tensor,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`fastrel::zplus_linear_reduced` in bfloat16, for x, y and bias of float32 or 16 bits, lanes and sums of float32."""
    magnitude = product(passes.zplus_magnitude(x), w_abs.t())
    s = passes.zplus_ratio(y, bias, magnitude, rel, FLOOR, False, 1)
    shape = (*rel.shape[:-1], w.shape[1])
    rel_in = passes.zplus_combine(x, product(s, w).view(shape), product(s, w_abs).view(shape))
    return rel_in, rel.new_empty(0) if grad is None or w_grad is None else reduced_matmul(grad, w_grad)


def reduced_matmul(grad: Tensor, weight: Tensor) -> Tensor:
    """`fastrel.ops.reduced_matmul` of a bfloat16 weight, its sums not rounded."""
    return product(passes.zplus_parts(grad, 1), weight).view(*grad.shape[:-1], weight.shape[1])


def reduced_weight(weight: Tensor, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
    """`fastrel::reduced_weight` of float32 or 16 bits for products in bfloat16."""
    narrow, none = weight.bfloat16(), weight.new_empty(0)
    return narrow, none if purpose == "gradient" else narrow.abs(), none


def residual_add(u: Tensor, v: Tensor, rel: Tensor, batch_dim: int, rules: str) -> tuple[Tensor, Tensor]:
    """`fastrel::residual_add`."""
    if rules == "positive" or batch_dim == 0:
        return passes.residual_add(u, v, rel, 0, rules)
    moved = (u.movedim(batch_dim, 0), v.movedim(batch_dim, 0), rel.movedim(batch_dim + 1, 1))
    rel_u, rel_v = passes.residual_add(*moved, 0, rules)
    return rel_u.movedim(1, batch_dim + 1), rel_v.movedim(1, batch_dim + 1)


def attention_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rel: Tensor | None,
    grad: Tensor | None,
    row: Tensor | None,
    scale: float,
    is_causal: bool,
    query_start: int,
    rules: str,
    update: str,
    normalize: bool,
    inputs: bool,
    halves: bool = False,
) -> tuple[Tensor, ...]:
    """`fastrel::attention_relevance`, a chunk of queries at a time: memory grows with queries or keys, not with both.

    q, k and v of 16 bits are widened on the way to where batched products need them, head by head; a mask where it is read.
    """
    given = rel if rel is not None else grad if grad is not None else row
    if given is not None:
        q, k, v = (
            x if x.dtype == given.dtype else x.to(given.dtype, memory_format=torch.contiguous_format) for x in (q, k, v)
        )
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    targets, official = 1 if given is None else len(given), rules == "official"
    none, relevant = q.new_empty(0), v if official else v.clamp(min=0)

    def lane(wanted: bool, like: Tensor) -> Tensor:
        return like.new_zeros(targets, *like.shape) if wanted else none

    wants_rel, wants_grad = inputs and rel is not None, inputs and grad is not None
    rel_q, rel_k, rel_v = lane(wants_rel and official, q), lane(wants_rel and official, k), lane(wants_rel, v)
    grad_q, grad_k, grad_v = lane(wants_grad, q), lane(wants_grad, k), lane(wants_grad, v)
    through = none if row is None else q.new_empty(targets, batch, heads, keys)
    kept = none if row is None or not normalize else torch.empty_like(row)
    full_mask = None if mask is None else mask.expand(batch, heads, queries, keys)
    mask_sums = q.new_zeros(targets, batch, 3) if mask is not None and wants_rel and official else none
    step = max(16, CHUNK // (targets * batch * heads * keys))
    for start in range(0, queries, step):
        chunk = slice(start, min(start + step, queries))
        q_chunk = q[:, :, chunk]
        products = q_chunk @ k.mT
        attn = (products.clone() if official else products).contiguous()
        mask_chunk = None if full_mask is None else full_mask[:, :, chunk]
        passes.attention_softmax_(attn, mask_chunk, scale, is_causal, query_start + start)
        # The passes take targets and samples as one dimension: [K·B, h, queries, keys].
        each = _of_each_target(attn, targets)
        rel_product = grad_product = s = None
        if rel is not None:
            s = passes.zplus_ratio(attn @ relevant, None, None, rel[:, :, :, chunk], 0.0, official)
            rel_product = (s @ relevant.mT).flatten(0, 1)
        if grad is not None:
            grad_product = (grad[:, :, :, chunk] @ v.mT).flatten(0, 1)
        if row is not None:
            weights = row[:, :, chunk]
            if normalize:
                sums = passes.attention_sums(each, grad_product, rel_product, update).sum(1)
                weights = weights / (1 + sums.unflatten(0, (targets, batch)))
                kept[:, :, chunk] = weights
            passes.attention_through_(
                through.flatten(0, 1), each, grad_product, rel_product, weights.flatten(0, 1), update, start > 0
            )
        if s is not None and wants_rel:
            rel_v += attn.mT @ s
        if grad is not None and wants_grad:
            grad_v += attn.mT @ grad[:, :, :, chunk]
        shared = rel_product if wants_rel and official else None
        if (grad_product is not None and wants_grad) or shared is not None:
            lanes = (grad_product if wants_grad else None, shared)
            sums = q.new_empty(*each.shape[:3], 3) if mask_sums.numel() else None
            # Products and mask are what relevance is divided by, and only the official rules give them any.
            below = (None if x is None or shared is None else _of_each_target(x, targets) for x in (products, mask_chunk))
            passes.attention_score_lanes_(each, *below, *lanes, sums, scale)
            if sums is not None:
                mask_sums += sums.sum((1, 2)).unflatten(0, (targets, batch))
        if grad_product is not None and wants_grad:
            lane_of_scores = grad_product.unflatten(0, (targets, batch))
            grad_q[:, :, :, chunk] = lane_of_scores @ k
            grad_k += lane_of_scores.mT @ q_chunk
        if shared is not None:
            lane_of_scores = shared.unflatten(0, (targets, batch))
            rel_q[:, :, :, chunk] = lane_of_scores @ k
            rel_k += lane_of_scores.mT @ q_chunk
    if wants_rel:
        rel_v *= relevant * 0.5 if official else relevant
        if official:
            factor = mask_factor(mask_sums)[:, :, None, None, None] if mask_sums.numel() else 1.0
            rel_q *= q * (0.5 * factor)
            rel_k *= k * (0.5 * factor)
    if wants_grad and halves:
        grad_q, grad_k, grad_v = grad_q.mul_(0.25), grad_k.mul_(0.25), grad_v.mul_(0.5)
    return rel_q, rel_k, rel_v, grad_q, grad_k, grad_v, kept, none if row is None else through.sum(2)


def _of_each_target(x: Tensor, targets: int) -> Tensor:
    """[B, …] once for every target, [K·B, …]."""
    return x if targets == 1 else x.repeat(targets, *[1] * (x.dim() - 1))
