"""How each kind of node turns the lanes of its output into lanes of its inputs. One file per family.

A rule is `rule(t, node, out)`: `t` is the `Context`, `out` the lanes of `node`. It emits nodes of the reverse graph and
hands lanes to the node's inputs with `t.give` or its relatives. Nothing is keyed on models: only on operators.
"""

from fastrel.rules import attention, convolution, generic, linear, norm, places, pointwise, rearrange, reduce
from fastrel.rules.registry import RULES, Rule, rule, rule_for

__all__ = [
    "RULES",
    "Rule",
    "attention",
    "convolution",
    "generic",
    "linear",
    "norm",
    "places",
    "pointwise",
    "rearrange",
    "reduce",
    "rule",
    "rule_for",
]
