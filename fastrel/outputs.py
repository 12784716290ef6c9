"""Which of a model's outputs are its logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch.utils._pytree as pytree
from torch import Tensor

from fastrel.errors import UnsupportedModelError
from fastrel.graph.capture import Captured


def logits_index(captured: Captured) -> int:
    """Which output holds the logits: the one so named, else the first floating-point tensor.

    Raises:
        UnsupportedModelError: the model returns no floating-point tensor.
    """
    outputs = captured.outputs
    named = pytree.tree_unflatten(list(range(len(outputs))), captured.out_spec)
    logits = named.get("logits") if isinstance(named, Mapping) else getattr(named, "logits", None)
    if isinstance(logits, int):
        return logits
    for i, node in enumerate(outputs):
        value = getattr(node, "meta", {}).get("val")
        if isinstance(value, Tensor) and value.is_floating_point():
            return i
    raise UnsupportedModelError("the model returns no floating-point tensor to explain")
