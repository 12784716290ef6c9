"""What the Triton backend's operators compute on a device, with the rounding of its tensor cores and exact sums, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from fastrel.triton_kernels import configs
from torch import Tensor, nn

from fastrel import ops
from fastrel.backends import fusion, triton
from fastrel.graphed import run
from fastrel.ops import steps
from fastrel.ops.attention import attention_probabilities
from fastrel.ops.library import REFERENCES
from fastrel.ops.zplus_linear_reduced import FLOOR
from fastrel.reference.rules import safe_divide
from tests.devices import arithmetic
from tests.devices.programs import lowered
from tests.devices.recorder import recorded

#: Depth of a float8 tile of the first and of the second product: after so many its sum goes to a float32 accumulator.
PROMOTED = (64, 32)

Round = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    """No rounding."""
    return x


def layer(x: Tensor, weight: Tensor, rel: Tensor, grad: Tensor | None, value: Round, lane: Round) -> tuple[Tensor, Tensor]:
    """Both signed products, their operands rounded by `value`, S and the gradient by `lane`."""
    x, w = x.float(), weight.float()
    sides, signs = [value(part(x)) for part in PARTS], [value(part(w)) for part in PARTS]
    z = sides[0] @ signs[0].mT + sides[1] @ signs[1].mT
    s = lane(safe_divide(rel, z))
    rel_in = x.clamp(min=0) * (s @ signs[0]) + x.clamp(max=0) * (s @ signs[1])
    return rel_in, x.new_empty(0) if grad is None else lane(grad) @ value(w)


PARTS = (lambda x: x.clamp(min=0), lambda x: x.clamp(max=0))


def bfloat16_layer(
    x: Tensor, w: Tensor, y: Tensor, bias: Tensor | None, rel: Tensor, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Operands of bfloat16; Z from the layer's own output and the product of magnitudes."""
    narrow, x, w = arithmetic.bfloat16, x.float(), w.float()
    magnitude, y = narrow(x.abs()) @ w.abs().mT, y.float() if bias is None else y.float() - bias.float()
    s = narrow(safe_divide(rel, torch.maximum((y + magnitude) / 2, magnitude * FLOOR)))
    rel_in = x.clamp(min=0) * (s @ w.clamp(min=0)) + x.clamp(max=0) * (s @ w.clamp(max=0))
    return rel_in, x.new_empty(0) if grad is None else narrow(grad) @ w


def float8_layer(
    x: Tensor, w: Tensor, scales: Tensor, w_grad: Tensor, y: Tensor, bias: Tensor | None, rel: Tensor, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Operands of float8, sums of 14 bits that are promoted after each tile."""

    def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
        return (rows / scale).to(torch.float8_e4m3fn).float(), scale

    x, w = x.float(), w.float()
    given, scale = scaled(x.reshape(-1, x.shape[-1]))
    magnitude = arithmetic.float8_sum(given.abs(), w.abs().mT.contiguous(), PROMOTED[0]) * scale * scales
    magnitude = magnitude.view(*x.shape[:-1], -1)
    y = y.float() if bias is None else y.float() - bias.float()
    s = safe_divide(rel, torch.maximum((y + magnitude) / 2, magnitude * FLOOR)) * scales
    narrow, scale = scaled(arithmetic.bfloat16(s).reshape(-1, s.shape[-1]))
    signs = [arithmetic.float8_sum(narrow, part(w), PROMOTED[1]) * scale for part in PARTS]
    c_pos, c_neg = (c.view(*rel.shape[:-1], -1) for c in signs)
    rel_in = x.clamp(min=0) * c_pos + x.clamp(max=0) * c_neg
    return rel_in, x.new_empty(0) if grad is None else arithmetic.bfloat16(grad) @ w_grad.float()


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, rel: Tensor, grad: Tensor, row: Tensor | None, scale: float,
    is_causal: bool, query_start: int, rules: str, update: str, normalize: bool, inputs: bool, halves: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """16-bit q, k, v under the positive rules, in TF32: what the sweeps round, where they do."""
    assert rules == "positive"
    tf32, (q, k, v) = arithmetic.tf32, (x.float() for x in (q, k, v))
    attn = attention_probabilities(q, k, mask, scale, is_causal, query_start)
    relevant, grad = v.clamp(min=0), tf32(grad)
    s = tf32(safe_divide(rel, attn @ relevant))  # A in two parts
    delta = (grad * (attn @ v)).sum(-1, keepdim=True)
    rel_attn, grad_attn = 0.5 * attn * (s @ relevant.mT), grad @ v.mT
    kept = through = none = q.new_empty(0)
    if row is not None:
        kept, through = REFERENCES[ops.rollout_row](
            row, REFERENCES[ops.attention_update](attn, grad_attn, rel_attn, update), normalize
        )
    if not inputs:
        return (none,) * 6 + (kept, through)
    narrow, weighted = tf32(attn).mT, tf32(attn * (grad_attn - delta) * scale)
    of_scores, of_values = (0.25, 0.5) if halves else (1.0, 1.0)  # powers of two: nothing is rounded
    grads = (of_scores * (weighted @ k), of_scores * (weighted.mT @ q), of_values * (narrow @ grad))
    return none, none, relevant * (narrow @ s), *grads, kept, through


def activation_ratio(grad: Tensor, x: Tensor, y: Tensor, gelu: str = "") -> Tensor:
    """A slope in float32; gelu's from x alone, not from a y of 16 bits."""
    x = x.float()
    return REFERENCES[ops.activation_ratio](grad, x, steps.gelu(x, gelu) if gelu else y.float())


def operators() -> dict[Any, Callable[..., Any]]:
    """By operator."""

    def zplus_linear(x: Any, weight: Any, y: Any, bias: Any, rel: Any, grad: Any, rules: str) -> Any:
        return layer(x, weight, rel, grad, same, arithmetic.two_parts if weight.dtype == torch.bfloat16 else same)

    def zplus_linear_reduced(
        x: Any, w: Any, w_abs: Any, scales: Any, w_grad: Any, y: Any, bias: Any, rel: Any, grad: Any
    ) -> Any:
        if w.dtype == torch.bfloat16:
            return bfloat16_layer(x, w, y, bias, rel, grad)
        return float8_layer(x, w, scales, w_grad, y, bias, rel, grad)

    def attention_relevance(q: Tensor, *rest: Any) -> Any:
        return (REFERENCES[ops.attention_relevance] if q.dtype == torch.float32 else attention)(q, *rest)

    return {
        ops.zplus_linear: zplus_linear,
        ops.zplus_linear_reduced: zplus_linear_reduced,
        ops.attention_relevance: attention_relevance,
    }


def explained(
    model: nn.Module, given: dict[str, Tensor], classes: Tensor, precision: str = "float32", exact: bool = False
) -> Tensor:
    """The maps [B, K, T] of classes [B, K], as the Triton backend would compute it; exact: the same operators without any rounding.
    All layers of `low` in float8, though of most widths they are not."""
    with recorded(90), mock.patch.object(fusion, "fuse", lambda graph: None):  # operators one by one
        program, values = lowered(model, given, torch.device("cuda:0"), precision=precision)
        launchers = triton.kernels()
    simulated = operators()
    if exact:
        simulated[ops.zplus_linear] = lambda x, w, y, b, rel, grad, rules: layer(x, w, rel, grad, same, same)
        simulated[ops.attention_relevance] = lambda q, k, v, *rest: REFERENCES[ops.attention_relevance](
            q.float(), k.float(), v.float(), *rest
        )
    by_launcher = {launcher: op for op, launcher in launchers.items()}
    lanes = arithmetic.two_parts if not exact else same
    for node in program.reverse.graph.nodes:
        op = by_launcher.get(node.target)
        if op is torch.matmul:
            node.target = lambda lane, weight: (lanes(lane) if weight.dtype == torch.bfloat16 else lane) @ weight.float()
        if op in simulated:
            node.target = simulated[op]
        elif op is ops.activation_ratio:
            node.target = activation_ratio
        elif op in (ops.residual_add, ops.layer_norm_backward):
            node.target = _widened(REFERENCES[op])
        elif op in REFERENCES and op is not ops.reduced_weight:
            node.target = REFERENCES[op]
    program.reverse.recompile()
    with torch.no_grad(), mock.patch.object(configs, "in_float8", lambda *_: True):
        _, _, relevance, _ = run(program, values, classes)
    return relevance[0]


def _widened(reference: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: reference(*(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args))
