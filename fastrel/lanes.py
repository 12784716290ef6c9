"""Lanes: what flows backwards through the captured graph.

Every value may carry three of them, each with a leading dimension K (targets explained at once):
`grad`, ∂y_c/∂value, and `rel`, its relevance, have the value's own shape; `row`, the share of the explanation that its
tokens hold so far, has size 1 in every feature dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx


def arguments(node: fx.Node, *defaults: Any, count: int) -> tuple[Any, ...]:
    """The first `count` positional arguments of a node; those left out of the call come from the tail of `defaults`."""
    missing = max(0, count - len(node.args))
    return (*node.args[:count], *defaults[len(defaults) - missing :])


@dataclass(frozen=True)
class Rows:
    """A lane is zero outside entries start … start+length-1 of dimension `dim` of its value, and holds only those."""

    dim: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + self.length


@dataclass(frozen=True)
class Lane:
    """A node of the reverse graph, and which part of the value it covers (None: all of it)."""

    node: fx.Node
    rows: Rows | None = None


@dataclass(frozen=True)
class RowLane:
    """A row of the rollout.

    `origin` numbers the row it stems from. What an attention block made of row `replaces` meets that row again on the
    residual stream, where r (I + M) = kept + through: `kept` then takes its place (`drop`: nothing does).
    """

    lane: Lane
    origin: int
    replaces: int | None = None
    kept: Lane | None = None
    drop: bool = False


class Lanes(NamedTuple):
    """The lanes of one value; None where nothing upstream needs one."""

    grad: Lane | None = None
    rel: Lane | None = None
    row: RowLane | None = None
