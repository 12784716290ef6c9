"""What pointwise functions are at 0."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fastrel.graph.patterns import ACTIVATIONS, DIVISIONS, IDENTITIES, PRODUCTS


def value_at_zero(node: fx.Node) -> float:
    """f(0) of a pointwise operator of one value; NaN where that hangs on other values."""
    given = [*node.args[1:], *node.kwargs.values()]
    if not all(x is None or isinstance(x, (bool, int, float, str)) for x in given):
        return math.nan
    op: Any = node.target
    return float(op(torch.zeros((), dtype=torch.float64), *node.args[1:], **node.kwargs))


def vanishes(x: Any, root: fx.Node) -> bool:
    """Whether a pointwise function of one activation is known to be 0 where that is."""
    if x is root or not isinstance(x, fx.Node):
        return x is root
    if x.target in PRODUCTS:
        return any(vanishes(factor, root) for factor in x.args[: 1 if x.target in DIVISIONS else 2])
    return (x.target in IDENTITIES or (x.target in ACTIVATIONS and value_at_zero(x) == 0)) and vanishes(x.args[0], root)
