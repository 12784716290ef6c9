"""The relevance rules as autograd functions: the forward pass is the plain operator, the backward pass propagates relevance.

    y = fastrel.functional.linear(x, weight, bias)
    torch.autograd.grad(y, x, grad_outputs=R)   # the relevance of x, by eq. (5)

`propagation()` makes an existing eager model use them, without export and without touching it:

    with fastrel.functional.propagation() as tape:
        logits = model(images)
    torch.autograd.grad(logits, tape.attention, one_hot)   # the relevance of every attention map

Activations must have their batch first. Parameters receive no relevance: what is asked for with respect to one is an error.
`relevance` differentiates through the fused operators themselves, so that a map can be a part of a training loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastrel import ops
from fastrel.errors import UnsupportedModelError
from fastrel.reference import rules as R

Rules = R.Rules


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rules: Rules) -> Tensor:
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, y, bias)
        ctx.rules = rules
        return y

    @staticmethod
    def backward(ctx: Any, *lanes: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, bias = ctx.saved_tensors
        return relevance.zplus_linear(x, weight, y, bias, lanes[0], ctx.rules), None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, rules: Rules) -> Tensor:
        ctx.save_for_backward(u, v)
        ctx.rules = rules
        return u + v

    @staticmethod
    def backward(ctx: Any, *lanes: Tensor) -> tuple[Tensor | None, ...]:
        u, v = ctx.saved_tensors
        full = torch.broadcast_tensors(u, v)
        rel_u, rel_v = relevance.residual_add(*full, lanes[0], ctx.rules)
        return rel_u.sum_to_size(u.shape), rel_v.sum_to_size(v.shape), None
