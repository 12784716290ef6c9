"""Which rule is for which operator."""

from collections.abc import Callable
from typing import Any

from torch import fx

from fastrel.transform.context import Context
from fastrel.transform.lanes import Lanes

Rule = Callable[[Context, fx.Node, Lanes], None]

RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for one or more operators; those that may not be there, of libraries and of later versions of torch, by name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def rule_for(node: fx.Node) -> Rule | None:
    """The rule for a node, or None."""
    return RULES.get(node.target) or RULES.get(str(node.target))
