"""What a rule sees of the transform: facts, forward values, and where to hand lanes."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastrel.graph import axes as axes_
from fastrel.graph.facts import Facts, Stretch
from fastrel.ops.steps import add_rows
from fastrel.precision import Products
from fastrel.reference.rules import Rules, safe_divide
from fastrel.transform.emit import Emitter
from fastrel.transform.lanes import Lane, Lanes, Path, Row, Rows
from fastrel.transform.method import Kind, Method
from fastrel.transform.rollout import Rollout, Sum

aten = torch.ops.aten


@dataclass
class Pending:
    """Lanes that were handed to a value and wait until all of its users are done."""

    grad: list[Lane] = field(default_factory=list)
    rel: list[Lane] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class Context:
    """The services that rules call. Built by the walk, one for each reverse graph.

    Attributes:
        facts, stretch: the captured graph, and the part of it that is walked.
        method, rules, products: what is asked for.
        published: whether the rules are those of the published code.
        emit: writes the reverse graph.
        rollout: keeps book of the row.
        generic: operators that took the generic rule.
        maps: by kind, what the method's reading asks for of the blocks met so far, by their number.
        read_row: what the head reads of the last block, [K, B, Tq].
        seed: the row at an output of the model, [K, B, *].
        read: for methods that read by evidence, N² [K, B] of the tokens that the head reads of each stream; None: it reads one. By the
            encoder that the stream belongs to: one of `encoders`, or no sequence at all.
        encoders: the sequences of tokens that blocks of others attended to so far.
    """

    def __init__(
        self, facts: Facts, stretch: Stretch, method: Method, rules: Rules, products: Products, emit: Emitter, trace: bool
    ) -> None:
        self.facts, self.stretch = facts, stretch
        self.method, self.rules, self.products, self.emit, self.trace = method, rules, products, emit, trace
        self.published = rules != "positive"
        self.rollout = Rollout(emit.call, linear=method.residual and not method.normalize)
        self.pending: dict[fx.Node, Pending] = {}
        self.records: list[tuple[tuple[int, str], fx.Node]] = []
        self.generic: list[str] = []
        self.maps: dict[Kind, dict[int, fx.Node]] = defaultdict(dict)
        self.read_row: fx.Node | None = None
        self.read: dict[frozenset[Any], dict[Path, fx.Node | None]] = defaultdict(dict)
        self.encoders: list[frozenset[Any]] = []
        self.seed: fx.Node | None = None
        self.block = stretch.total  #: number of the block entered last

    # What rules ask.

    def wants(self, x: Any) -> bool:
        """Whether the gradient and relevance of x are needed: an attention map that takes part lies upstream of it."""
        return x in self.stretch.needed

    def is_active(self, x: Any) -> bool:
        """Whether x is an activation (it depends on the model's input), not a parameter, mask or constant."""
        return x in self.facts.active

    def shape(self, x: fx.Node) -> tuple[Any, ...]:
        """Shape of x for the reverse graph: numbers, and nodes for sizes that vary."""
        return tuple(self.emit.size(x, dim) for dim in range(x.meta["val"].dim()))

    def row_shape(self, x: fx.Node) -> tuple[Any, ...]:
        """Shape of a row lane of x: 1 in feature dimensions."""
        axes = self.axes(x)
        return tuple(1 if axes_.is_feature(axis) else self.emit.size(x, dim) for dim, axis in enumerate(axes))

    def axes(self, x: fx.Node) -> axes_.Axes:
        """What the dimensions of x stand for."""
        if x not in self.facts.axes:
            raise self.facts.not_followed(x)
        return self.facts.axes[x]

    def features(self, x: fx.Node) -> list[int]:
        """The feature dimensions of x."""
        return [dim for dim, axis in enumerate(self.axes(x)) if axes_.is_feature(axis)]

    def value(self, x: fx.Node, rows: Rows | None = None, ndim: int | None = None) -> fx.Node:
        """The forward value of x, saved for the reverse pass; only `rows` of it where given (counted in `ndim` dims)."""
        saved = self.emit.saved(x)
        if rows is None or not isinstance(x.meta["val"], torch.Tensor):
            return saved
        own = x.meta["val"].dim()
        dim = rows.dim - ((own if ndim is None else ndim) - own)
        if dim < 0 or self.emit.size(x, dim) == 1:
            return saved
        return self.emit.call(aten.narrow.default, saved, dim, rows.start, rows.length)

    # What the walk takes.

    def collect(self, node: fx.Node) -> Lanes | None:
        """The lanes of a node, all of its users done; None where there are none."""
        pending = self.pending.pop(node, None)
        if pending is None or not (pending.grad or pending.rel or pending.rows):
            return None
        rel = pending.rel
        if self.published and len(rel) > 1:
            rel = [self._published_clone(node, lane) for lane in rel]
        row, met = None, False
        if pending.rows:
            row, met = self.rollout.merge(pending.rows, self.sum_of_rows(node))
        lanes = Lanes(
            self.added(node, pending.grad) if pending.grad else None,
            self.added(node, rel) if rel else None,
            row if row and any(part.lane for part in row.parts.values()) else None,
        )
        if lanes.rel and met:
            self.record(self.block, "input_relevance", self.dense(lanes.rel, node).node)
        if lanes.grad and met and self.asks("tokens"):
            self.maps["tokens"][self.block] = self.times_gradient(node, lanes.grad)
        return lanes

    def sum_of_rows(self, x: fx.Node) -> Sum:
        """What adds up the rows that meet at x."""
        axes = self.facts.axes.get(x, ())
        batch = next((i for i, axis in enumerate(axes) if any(role == "batch" for _, role in axis)), 0)
        inner = bool(axes) and len(axes[batch]) > 1 and axes[batch][-1][1] == "batch"
        return Sum(lambda lanes: self.added(x, lanes, is_row=True), batch, inner)

    def _published_clone(self, node: fx.Node, lane: Lane) -> Lane:
        """The published code's fan-out: x ⊙ Σ (R_i ⊘ x)."""
        if lane.rows and axes_.is_feature(self.axes(node)[lane.rows.dim]):
            return lane
        return Lane(self.published_share(self.value(node, lane.rows), lane.node), lane.rows)

    # What rules give back.

    def give(self, x: Any, grad: Lane | None = None, rel: Lane | None = None, row: Row | None = None) -> None:
        """Add lanes to x, if x is an activation and they are needed there."""
        if not self.is_active(x):
            return
        pending = self.pending.setdefault(x, Pending())
        if self.wants(x):
            pending.grad += [grad] if grad else []
            pending.rel += [rel] if rel else []
        pending.rows += [row] if row else []

    def pass_through(self, x: Any, out: Lanes, grad: Callable[[Lane], Lane] | None = None) -> None:
        """Relevance and row unchanged, the gradient by `grad`."""
        if not self.is_active(x):
            return
        new = out.grad
        if out.grad and grad and self.wants(x):
            new = grad(out.grad)
        self.give(x, new, out.rel, out.row)

    def index_map(self, x: Any, out: Lanes, back: Callable[[Lane, bool], Lane]) -> None:
        """All lanes moved by `back(lane, is_row)`, the transpose of a pure rearrangement."""
        grad = rel = None
        if self.wants(x):
            grad = back(out.grad, False) if out.grad else None
            rel = back(out.rel, False) if out.rel else None
        self.give(x, grad, rel, out.row and out.row.map(lambda lane: back(lane, True)))

    def dense(self, lane: Lane, x: fx.Node, is_row: bool = False) -> Lane:
        """The lane with its zeros written out."""
        if lane.rows is None:
            return lane
        rows, dim = lane.rows, lane.rows.dim
        total = (self.row_shape(x) if is_row else self.shape(x))[dim]
        pad_dims = x.meta["val"].dim() - 1 - dim
        after = self.emit.arith("sub", total, rows.stop)
        if after == 0 and rows.start == 0:
            return Lane(lane.node)
        return Lane(self.emit.call(aten.constant_pad_nd.default, lane.node, [0, 0] * pad_dims + [rows.start, after], 0.0))

    def published_share(self, x: fx.Node, rel: fx.Node) -> fx.Node:
        """x ⊙ (R ⊘ x): R itself, but for the published code's 1e-9."""
        return self.emit.call(torch.mul, x, self.emit.call(safe_divide, rel, x, self.rules))

    def times_gradient(self, x: fx.Node, grad: Lane) -> fx.Node:
        """x ⊙ ∂y/∂x summed over features, which are left out."""
        product = self.emit.call(torch.mul, self.dense(grad, x).node, self.value(x))
        features = [dim + 1 for dim in self.features(x)]
        return self.emit.call(aten.sum.dim_IntList, product, features) if features else product

    def asks(self, kind: Kind) -> bool:
        """Whether the method reads this of every block."""
        return kind in self.method.kinds

    def record(self, block: int, name: str, node: fx.Node) -> None:
        """Return a node of the reverse graph as part of a trace."""
        if self.trace:
            self.records.append(((block, name), node))

    def enter_block(self, node: fx.Node) -> int | None:
        """The number of the attention block whose map `node` holds, if it takes part; called once per block."""
        if node not in self.stretch.blocks:
            return None
        self.block = self.stretch.blocks[node]
        return self.block

    def whole_row(self, row: Row, x: fx.Node) -> Lane:
        """All of a row at x in one dense lane."""
        return self.dense(self.rollout.whole(row, self.sum_of_rows(x)), x, is_row=True)

    def added(self, x: fx.Node, lanes: Sequence[Lane], is_row: bool = False) -> Lane:
        """Lanes of one value added up, as sparse as they allow."""
        by_rows: dict[Rows | None, Lane] = {}
        for lane in lanes:
            before = by_rows.get(lane.rows)
            total = self.emit.call(aten.add.Tensor, before.node, lane.node) if before else lane.node
            by_rows[lane.rows] = Lane(total, lane.rows)
        sparse = sorted((r for r in by_rows if r is not None), key=lambda r: (r.dim, r.start))
        if not sparse:
            return by_rows[None]
        if len({r.dim for r in sparse}) == 1 and None not in by_rows:
            adjacent = all(a.stop == b.start for a, b in itertools.pairwise(sparse))
            if adjacent:
                parts, dim = [by_rows[r].node for r in sparse], sparse[0].dim
                joined = parts[0] if len(parts) == 1 else self.emit.call(aten.cat.default, parts, dim + 1)
                length = sparse[-1].stop - sparse[0].start
                whole = length == (self.row_shape(x) if is_row else self.shape(x))[dim]
                return Lane(joined, None if whole else Rows(dim, sparse[0].start, length))
        total_lane = by_rows.get(None) or self.dense(by_rows[sparse.pop()], x, is_row)
        for rows in sparse:
            added = self.emit.call(add_rows, total_lane.node, by_rows[rows].node, rows.dim + 1, rows.start)
            total_lane = Lane(added)
        return total_lane
