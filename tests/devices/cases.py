"""What every backend for GPUs is asked on a CPU, against the plain PyTorch of the same operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrel import ops
from fastrel.ops.library import REFERENCES
from fastrel.ops.steps import gelu_backward
from tests import golden_files as golden
from tests.devices import arithmetic

RULES = ["positive", "official"]
UPDATES = [name for name in ops.UPDATES if name != "gradcam"]
#: queries, keys, head size
ATTENTION_SIZES = [(1, 1, 16), (1, 50, 128), (5, 7, 24), (33, 40, 80), (40, 17, 64)]
MASKS = ["none", "bool", "float", "causal"]


def cast(x: Any, to: torch.dtype) -> Any:
    return x.to(to) if isinstance(x, Tensor) and x.is_floating_point() else x


def compare(
    kernel: Callable[..., Any],
    op: torch._ops.OpOverload,
    *args: Any,
    around: Callable[[Tensor], Tensor] | None = None,
    operand: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """float64 within 1e-10 of plain PyTorch; else within twice the error of plain PyTorch in float32, or 5e-6.

    operand: what the kernel's products make of float32 operands, and plain PyTorch's therefore too; what is least is then
    TF32's own rounding, half a unit in the last place.
    """
    least = 2.0**-11 if operand else 5e-6
    given = [around(x) if around and isinstance(x, Tensor) else x for x in args]
    ours = kernel(*given)
    exact = REFERENCES[op](*(cast(x, torch.float64) for x in args))
    with arithmetic.products(operand) if operand else contextlib.nullcontext():
        plain = REFERENCES[op](*(cast(x, torch.float32) for x in args))
    ours, plain, exact = ((x,) if isinstance(x, Tensor) else x for x in (ours, plain, exact))
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.shape == c.shape, f"output {i} of {op}"
        assert a.isfinite().all(), f"output {i} of {op}"
        if a.numel():
            limit = 1e-10 if a.dtype == torch.float64 else max(2 * golden.relative_error(b.double(), c), least)
            assert golden.relative_error(a.double(), c) <= limit, f"output {i} of {op}"


def through_gelu(grad: Tensor, x: Tensor, approximate: str, frozen: bool) -> Tensor:
    """grad through gelu at x, by its slope or by AttnLRP's."""
    if not frozen:
        return gelu_backward(grad, x, approximate)
    return REFERENCES[ops.activation_ratio](grad, x, torch.nn.functional.gelu(x, approximate=approximate))


def attention(dtype: torch.dtype, rules: str, queries: int, keys: int, d: int, mask: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of attention_relevance, with and without lanes for the inputs and rows scaled to sum 1; halves of the gradient where
    the number of keys is odd."""
    lane_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # Under official, denominators are signed sums: positive operands keep them from zero, where all digits are rounding.
    draw = torch.rand if rules == "official" else torch.randn
    q, k, v = (draw(2, t, 2, d).to(dtype).transpose(1, 2) for t in (queries, keys, keys))
    given = None
    if mask == "bool":
        given = torch.rand(2, 1, queries, keys) > 0.3
        given[0, 0, 0] = rules == "official"  # a row that attends to nothing
    if mask == "float":
        given = draw(2, 1, 1, keys).to(lane_dtype)
    rel, grad = (f(2, 2, queries, 2, d, dtype=lane_dtype).transpose(2, 3) for f in (torch.rand, torch.randn))
    row = torch.rand(2, 2, queries, dtype=lane_dtype)
    for inputs, normalize in ((True, False), (False, True)):
        options = (d**-0.5, mask == "causal", max(0, keys - queries), rules, "gradient_relevance", normalize, inputs)
        options = (*options, keys % 2 == 1)
        yield q, k, v, given, rel, grad, row, *options
