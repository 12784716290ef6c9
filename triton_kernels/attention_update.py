"""`attention_update`: eq. (13) for maps that exist, grad ⊙ relevance → clamp → mean over heads in one pass."""

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels.launch import blocks, dense, on_its_device
from fastrel.triton_kernels.math import UPDATES, update_of
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["size", "attn_maps"])
def attention_update_kernel(
    attn_ptr,  # [attn_maps, heads, size]
    grad_ptr, rel_ptr,  # [maps, heads, size]
    out_ptr,  # [maps, size]
    heads, size, attn_maps,
    ATTN: tl.constexpr, GRAD: tl.constexpr, REL: tl.constexpr, UPDATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    map_ = tl.program_id(0).to(tl.int64)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    b_attn = tl.zeros((BLOCK,), tl.float32)
    b_grad = tl.zeros((BLOCK,), tl.float32)
    b_rel = tl.zeros((BLOCK,), tl.float32)
    for h in range(heads):
        own = (map_ * heads + h) * size + at
        if ATTN:
            b_attn = tl.load(attn_ptr + ((map_ % attn_maps) * heads + h) * size + at, mask=inside, other=0.0).to(
                tl.float32
            )  # [BLOCK]
        if GRAD:
            b_grad = tl.load(grad_ptr + own, mask=inside, other=0.0)  # [BLOCK]
        if REL:
            b_rel = tl.load(rel_ptr + own, mask=inside, other=0.0)  # [BLOCK]
        total += update_of(b_attn, b_grad, b_rel, UPDATE)
    tl.store(out_ptr + map_ * size + at, total / heads, mask=inside)


@on_its_device
def attention_update(attn: Tensor | None, grad: Tensor | None, rel: Tensor | None, update: str) -> Tensor:
    """`fastrel::attention_update` for maps of float32, bfloat16 or float16 and lanes of float32."""
    used = {"attention": (attn, None, None), "relevance": (None, None, rel), "gradient_attention": (attn, grad, None)}
    given = used.get(update, (None, grad, rel))
    attn, grad, rel = (None if x is None else dense(x) for x in given)
    shape = next(x for x in (grad, rel, attn) if x is not None).shape
    out = torch.empty(*shape[:-3], *shape[-2:], dtype=torch.float32, device=next(x for x in given if x is not None).device)
    size = shape[-2] * shape[-1]
    maps = out.numel() // size
    attention_update_kernel[maps, blocks(size, BLOCK)](
        *(out if x is None else x for x in (attn, grad, rel)), out, shape[-3], size,
        maps if attn is None else attn.numel() // (shape[-3] * size),
        ATTN=attn is not None, GRAD=grad is not None, REL=rel is not None, UPDATE=UPDATES[update], BLOCK=BLOCK,
    )  # fmt: skip
    return out
