"""What pointwise functions are at 0."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fastrel.graph.patterns import ACTIVATIONS, ARITHMETIC, IDENTITIES, STEPS


def value_at_zero(node: fx.Node) -> float:
    """f(0) of a pointwise operator of one value; NaN for steps, of which no line from 0 tells anything, and where f hangs on others."""
    if node.target in STEPS or any(isinstance(x, fx.Node) for x in (*node.args[1:], *node.kwargs.values())):
        return math.nan
    return float(_at_zero(node, node.args[0]))


def vanishes(node: fx.Node, root: fx.Node) -> bool:
    """Whether a pointwise function of one activation is 0 where that is, constants of the model taken as 1."""
    return float(_at_zero(node, root)) == 0


def _at_zero(x: Any, root: Any) -> Any:
    """The value of x where the activation that it is made of is 0: sin(x)/x has none."""
    if x is root:
        return torch.zeros((), dtype=torch.float64)
    if not isinstance(x, fx.Node):
        return x
    if x.target in IDENTITIES:
        return _at_zero(x.args[0], root)
    if x.target not in ACTIVATIONS and x.target not in ARITHMETIC:
        return torch.ones((), dtype=torch.float64)
    op: Any = x.target
    return op(*(_at_zero(arg, root) for arg in x.args), **{name: _at_zero(arg, root) for name, arg in x.kwargs.items()})
