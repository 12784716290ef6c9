"""What backends are asked about, and reasons that several share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """A call of a fused operator: its rules, update, purpose and 8-bit dtype; the dtype of its lanes; the size of attention heads.

    `mixed`: some operand has another floating-point dtype. In a reverse graph none has (fastrel.transform.emit).
    """

    op: Any
    options: tuple[str, ...]
    dtype: torch.dtype
    head_size: int = 0
    mixed: bool = False

    @classmethod
    def of(cls, node: fx.Node, dtype: torch.dtype) -> Call:
        """The call that a node of a reverse graph makes."""
        options = [x for x in (*node.args, node.meta.get("purpose")) if isinstance(x, str)]
        return cls(node.target, tuple(options), dtype, node.meta.get("head_size", 0))


def without_kernel(call: Call, narrow: str | None) -> list[str]:
    """Reasons against calls that no kernel computes, and against products in an 8-bit dtype other than `narrow`."""
    reasons = ["takes operands of one dtype"] if call.mixed else []
    if "original_lrp" in call.options:
        reasons.append("has no kernel for rules 'original_lrp'")
    if "gradcam" in call.options:
        reasons.append("has no kernel for attention Grad-CAM's update")
    others = [dtype for dtype in ("int8", "float8") if dtype != narrow]
    return reasons + [f"has no products in {dtype}" for dtype in others if dtype in call.options]


#: What takes a part of a value or turns it around, before or after a cast alike.
_VIEWS = {aten.narrow.default, aten.t.default}


def as_the_model_has_it(x: Any) -> Any:
    """A 16-bit value, or a part of one, without its cast to float32."""
    if not isinstance(x, fx.Node):
        return x
    if x.meta.get("widened"):
        return x.args[0]
    if x.target in _VIEWS and (narrow := as_the_model_has_it(x.args[0])) is not x.args[0]:
        return x.graph.call_function(x.target, (narrow, *x.args[1:]))
    return x
