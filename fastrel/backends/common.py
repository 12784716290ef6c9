"""Reasons that several backends share."""

from __future__ import annotations

from torch import fx


def options(call: fx.Node) -> list[str]:
    """The string arguments of a call: its rules, update or purpose."""
    return [x for x in call.args if isinstance(x, str)]


def without_kernel(call: fx.Node, narrow: str | None) -> list[str]:
    """Reasons against calls that no kernel computes, and against weights in an 8-bit dtype other than `narrow`."""
    given, reasons = options(call), []
    if "original_lrp" in given:
        reasons.append("has no kernel for rules 'original_lrp'")
    if "gradcam" in given:
        reasons.append("has no kernel for attention Grad-CAM's update")
    others = [dtype for dtype in ("int8", "float8") if dtype != narrow]
    reasons += [f"has no products in {dtype}" for dtype in others if dtype in (*given, call.meta.get("purpose"))]
    return reasons
