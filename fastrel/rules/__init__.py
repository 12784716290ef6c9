"""How each kind of node turns the lanes of its output into lanes of its inputs. One file per family.

A rule is `rule(t, node, out)`: `t` is the Transform, `out` the lanes of `node`. It emits nodes of the reverse graph and
hands lanes to the node's inputs with `t.give` or its relatives. Nothing is keyed on models: only on operators.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from fastrel.lanes import Lanes

if TYPE_CHECKING:
    from fastrel.transform import Transform

Rule = Callable[["Transform", fx.Node, Lanes], None]

_RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for one or more operators."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def rule_for(node: fx.Node) -> Rule | None:
    """The rule for a node, or None."""
    return _RULES.get(node.target)


from fastrel.rules import (  # noqa: E402, F401  (registration)
    attention,
    convolution,
    generic,
    linear,
    norm,
    pointwise,
    rearrange,
    reduce,
)
