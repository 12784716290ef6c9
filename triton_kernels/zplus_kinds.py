"""How a linear layer is multiplied, and what the kernels of both its products take alike."""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from fastrel.triton_kernels import configs
from fastrel.triton_kernels.launch import float32_precision, with_unit_stride
from torch import Tensor


class Kind(NamedTuple):
    """How a layer is multiplied: the dtype of operands, how float32 ones are, in two parts each or not; the gradient's
    operands, and the dtype in which S lies between the two products."""

    name: str
    dot: tl.dtype
    precision: str
    split: bool
    dot_grad: tl.dtype
    stored: torch.dtype


def kind_of(weight: torch.dtype) -> Kind:
    """`zplus_linear` by the weight's dtype: float32's accuracy. 16-bit weights are exact in one operand of 16 bits, S and g in two."""
    if weight == torch.bfloat16:
        return Kind("split", tl.bfloat16, "ieee", True, tl.bfloat16, torch.float32)
    if weight == torch.float16 and not torch.version.hip:
        return Kind("split, tf32", tl.float32, "tf32", True, tl.float32, torch.float32)
    return Kind("float32", tl.float32, float32_precision(), False, tl.float32, torch.float32)


#: `zplus_linear_reduced` by the dtype of the prepared weight.
REDUCED = {
    torch.bfloat16: Kind("bfloat16", tl.bfloat16, "ieee", False, tl.bfloat16, torch.bfloat16),
    torch.float8_e4m3fn: Kind("float8", tl.float8e4nv, "ieee", False, tl.bfloat16, torch.bfloat16),
}


def has_exact_output(weight: Tensor, y: Tensor | None) -> bool:
    """Whether Z of `zplus_linear` may be formed from the layer's own output."""
    return y is not None and y.dtype == weight.dtype == torch.float32


def rows_of(x: Tensor, width: int) -> Tensor:
    """x [*, width] as [n, width], a view of it where that can be."""
    return with_unit_stride(x.reshape(-1, width))


def options_of(tile: configs.Tile) -> dict[str, Any]:
    """A tile as the kernels take it."""
    return {
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": configs.GROUP,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
