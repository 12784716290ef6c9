"""Lanes: what flows backwards through the captured graph.

Every value may carry three of them, each with a leading dimension K (targets explained at once):
`grad`, ∂y_c/∂value, and `rel`, its relevance, have the value's own shape; `row`, the share of the explanation that its
tokens hold so far, has size 1 in every feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx


def lane_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lanes for values of `dtype`: float32 for 16-bit values, so that small relevances add up."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


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


class Branch(NamedTuple):
    """One of the ways by which a sum was made: which sum, and which of its operands."""

    fork: int
    operand: int


#: Through which operands of which sums, from the outermost to the innermost, a part of a row came.
Path = tuple[Branch, ...]


@dataclass(frozen=True)
class Part:
    """A part of a row. Its lane holds the *whole* row of what its path leads to, not a share of it.

    `settled`: it is what an attention block left of the row in the place of I, normalised (None: nothing), and takes the place of
    what comes by the other operands of the same sums: of as many of those that its path begins with.
    """

    lane: Lane | None
    settled: int = 0


@dataclass(frozen=True)
class Row:
    """A row of the rollout at one value: its parts, by the path that each came.

    Where u + v meet the row r of their sum, either of them may lead back to where the other comes from; r counts once there. So
    both get r, marked with the operand that they are (`Rollout.fork`), and where all operands have come back, they are one again.
    """

    parts: dict[Path, Part]

    def map(self, f: Callable[[Lane], Lane]) -> Row:
        """The row moved by f."""
        return Row({path: Part(part.lane and f(part.lane), part.settled) for path, part in self.parts.items()})


class Lanes(NamedTuple):
    """The lanes of one value; None where nothing upstream needs one."""

    grad: Lane | None = None
    rel: Lane | None = None
    row: Row | None = None
