"""The operators' namespaces: `fastrel::` in plain PyTorch, `fastrel_cpu::` the same operators as C++ kernels, `fastrel_cuda::`
the passes around torch's products on a GPU (fastrel.backends.cuda).

Schemas and shape functions are defined here in Python, once for both. Rules emit `fastrel::` operators, which run
everywhere; `fastrel.backends` replaces those for which a compiled backend has a kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fastrel", "DEF")
_CPU_LIBRARY = torch.library.Library("fastrel_cpu", "DEF")
CUDA_LIBRARY = torch.library.Library("fastrel_cuda", "DEF")

#: The implementation in plain PyTorch of every operator.
REFERENCES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}

#: The shape function of every operator.
FAKES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}

#: The operator of `fastrel_cpu::` that does the same; it runs once its library is loaded (fastrel.backends.native).
CPU_KERNELS: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu_kernel: bool = True,
    cpu_fake: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Register `fastrel::<name>` from its schema, its implementation in plain PyTorch and its shape function.

    `cpu_fake`: the C++ kernel's own shape function, where its results are laid out differently.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastrel::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fastrel, name).default
    REFERENCES[op], FAKES[op] = reference, fake
    torch.library.register_autograd(f"fastrel::{name}", _backward_of(reference), setup_context=_keep_inputs, lib=_LIBRARY)
    if cpu_kernel:
        declare(schema)
        torch.library.register_fake(f"fastrel_cpu::{name}", cpu_fake or fake, lib=_CPU_LIBRARY)
        CPU_KERNELS[op] = getattr(torch.ops.fastrel_cpu, name).default
    return op


def declare(schema: str) -> None:
    """An operator that only the C++ library implements."""
    _CPU_LIBRARY.define(schema)


def declare_cuda(schema: str) -> None:
    """A pass that only the CUDA library implements."""
    CUDA_LIBRARY.define(schema)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def _backward_of(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of an operator: its plain PyTorch run again, and autograd through it."""

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        keep, tensors = torch.is_grad_enabled(), iter(ctx.saved_tensors)
        inputs = [next(tensors) if other is None else other[0] for other in ctx.others]
        with torch.enable_grad():
            leaves = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
            outputs = reference(*leaves)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            used = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
            wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
            ends, given = [y for y, _ in used], [g for _, g in used]
            results = (
                torch.autograd.grad(ends, wanted, given, create_graph=keep, allow_unused=True)
                if used
                else [None] * len(wanted)
            )
            found = iter(results)
        return tuple(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in leaves)

    return backward
