"""Transform: a captured forward pass -> two graphs, one that predicts and saves, one that explains.

The captured nodes are walked once in reverse. For each node that carries lanes, its rule (fastrel/rules) turns the lanes
of its output into lanes of its inputs, as nodes of the reverse graph. Lanes that nothing needs are never emitted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastrel import axes as axes_
from fastrel.analysis import Analysis
from fastrel.capture import Captured
from fastrel.emit import Emitter, common_lane_dtype, lane_dtype
from fastrel.errors import InputError, UnsupportedModelError
from fastrel.lanes import Lane, Lanes, RowLane, Rows
from fastrel.methods import Method
from fastrel.precision import Products
from fastrel.reference.rules import safe_divide

aten = torch.ops.aten


@dataclass(frozen=True)
class Program:
    """A model's prediction and its explanation as two plain fx modules.

    `forward(*parameters_and_inputs)` returns (outputs, saved). `reverse([*seeds, *saved])`, which empties that list, with
    three seeds per explained output (gradient, relevance, row), returns (row, grid, records): the map over all tokens
    [K, B, T…]; the part of it on the patch grid [K, B, gh, gw], None where there is none; and, when traced, the tensors
    that `record_names` names. `dtype` is that of all lanes. `read_at` is the captured value whose tokens the map is over,
    `read_features` its other dimensions, `blocks` the number of attention blocks in it; `generic` names the operators that
    had no rule of their own.
    """

    forward: fx.GraphModule
    reverse: fx.GraphModule
    dtype: torch.dtype
    leaves: tuple[int, ...]
    leaf_features: tuple[tuple[int, ...], ...]
    record_names: tuple[tuple[int, str], ...]
    read_at: fx.Node
    read_features: tuple[int, ...]
    blocks: int
    generic: tuple[str, ...]


@dataclass
class _Pending:
    grad: list[Lane] = field(default_factory=list)
    rel: list[Lane] = field(default_factory=list)
    row: list[RowLane] = field(default_factory=list)


class Transform:
    """The reverse walk. Rules call its methods; nobody else needs it."""

    def __init__(
        self,
        captured: Captured,
        method: Method,
        rules: str,
        leaves: Sequence[int],
        trace: bool,
        memory: str,
        products: Products,
    ) -> None:
        self.captured, self.method, self.trace = captured, method, trace
        self.rules = rules
        self.published = rules != "positive"
        self.analysis = Analysis(captured, [captured.outputs[i] for i in leaves], method.start_layer)
        if trace or method.lane:
            self.analysis.needed = set(self.analysis.active)
        self.dtype = common_lane_dtype(self.analysis.needed)
        self.products = products if self.dtype == torch.float32 else Products()
        self.emit = Emitter(captured.graph, self.analysis.recomputed(memory), self.dtype)
        self.generic: list[str] = []
        self.records: list[tuple[tuple[int, str], fx.Node]] = []
        self._pending: dict[fx.Node, _Pending] = {}
        self._origins = 0
        self._unnormalized = False
        self._blocks_left = len(self.analysis.blocks)
        self._block = self.analysis.total_blocks
        self.attention_maps: list[fx.Node] = []
        self.read_row: fx.Node | None = None  # what the head reads of the last block, [K, B, Tq]

    # What rules ask.

    def wants(self, x: Any) -> bool:
        """Whether the gradient and relevance of x are needed: an attention map that takes part lies upstream of it."""
        return x in self.analysis.needed

    def is_active(self, x: Any) -> bool:
        """Whether x is an activation (it depends on the model's input), not a parameter, mask or constant."""
        return x in self.analysis.active

    def shape(self, x: fx.Node) -> tuple[Any, ...]:
        """Shape of x for the reverse graph: numbers, and nodes for sizes that vary."""
        return tuple(self.emit.size(x, dim) for dim in range(x.meta["val"].dim()))

    def row_shape(self, x: fx.Node) -> tuple[Any, ...]:
        """Shape of a row lane of x: 1 in feature dimensions."""
        axes = self.axes(x)
        return tuple(1 if axes_.is_feature(axis) else self.emit.size(x, dim) for dim, axis in enumerate(axes))

    def axes(self, x: fx.Node) -> axes_.Axes:
        """What the dimensions of x stand for."""
        if x not in self.analysis.axes:
            raise UnsupportedModelError(f"cannot follow tokens through {describe(x)}")
        return self.analysis.axes[x]

    def value(self, x: fx.Node, rows: Rows | None = None, ndim: int | None = None) -> fx.Node:
        """The forward value of x, saved for the reverse pass; only `rows` of it where given (counted in `ndim` dims)."""
        saved = self.emit.saved(x)
        if rows is None:
            return saved
        own = x.meta["val"].dim()
        dim = rows.dim - ((own if ndim is None else ndim) - own)
        if dim < 0 or self.emit.size(x, dim) == 1:
            return saved
        return self.emit.call(aten.narrow.default, saved, dim, rows.start, rows.length)

    # What rules give back.

    def give(self, x: Any, grad: Lane | None = None, rel: Lane | None = None, row: RowLane | None = None) -> None:
        """Add lanes to x, if x is an activation and they are needed there."""
        if not self.is_active(x):
            return
        pending = self._pending.setdefault(x, _Pending())
        if self.wants(x):
            pending.grad += [grad] if grad else []
            pending.rel += [rel] if rel else []
        pending.row += [row] if row else []

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
        self.give(x, grad, rel, self.map_row(out.row, lambda lane: back(lane, True)))

    def map_row(self, row: RowLane | None, f: Callable[[Lane], Lane]) -> RowLane | None:
        """A row moved by f."""
        if row is None:
            return None
        kept = f(row.kept) if row.kept else None
        return RowLane(f(row.lane), row.origin, row.replaces, kept, row.drop)

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

    def new_origin(self) -> int:
        """A number for a new row."""
        self._origins += 1
        return self._origins

    def record(self, block: int, name: str, node: fx.Node) -> None:
        """Return a node of the reverse graph as part of a trace."""
        if self.trace:
            self.records.append(((block, name), node))

    def enter_block(self, node: fx.Node) -> int | None:
        """The number of the attention block whose map `node` holds, if it takes part; called once per block."""
        if node not in self.analysis.blocks:
            return None
        self._blocks_left -= 1
        self._block = self.analysis.blocks[node]
        return self._block

    def entering_row(self, row: RowLane, x: fx.Node) -> RowLane:
        """The row of x as its attention block reads it: where the head reads several tokens, shares that sum to 1."""
        if not self._unnormalized:
            return row
        self._unnormalized = False
        dims = list(range(2, x.meta["val"].dim() + 1))
        total = self.emit.call(aten.sum.dim_IntList, row.lane.node, dims, True)
        return RowLane(Lane(self.emit.call(aten.div.Tensor, row.lane.node, total)), row.origin)

    # The walk.

    def run(self) -> Program:
        """Walk the graph and build both modules."""
        from fastrel.rules import rule_for
        from fastrel.rules.generic import generic

        self._seed()
        result: tuple[fx.Node, Lane] | None = None
        nodes = [n for n in reversed(self.captured.graph.nodes) if n in self.analysis.active]
        pixels = self.method.reading == "pixels"
        for node in nodes:
            lanes = self._collect(node)
            if lanes is None:
                continue
            if pixels and node.op == "placeholder":
                result = (node, self._reading(node, lanes))
                break
            if lanes.row and not self._blocks_left and not any(p.row for p in self._pending.values()):
                if not pixels and axes_.is_readable(self.axes(node)):
                    result = (node, self._reading(node, lanes))
                    break
                lanes = lanes._replace(row=None) if pixels else lanes
            rule = rule_for(node)
            if rule is None and pixels and node.target is aten.embedding.default:
                break
            try:
                (rule or generic)(self, node, lanes)
            except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise UnsupportedModelError(f"the rule of {describe(node)} does not take it: {error!r}") from error
            except UnsupportedModelError as error:
                if self._block == self.analysis.total_blocks:
                    raise
                raise UnsupportedModelError(f"{error}; with start_layer={self._block} it is not needed") from error
        if result is None:
            raise UnsupportedModelError(
                "the model takes no floating-point input: read this method at its tokens instead"
                if pixels
                else "the attention maps of this model do not lead back to one sequence of tokens"
            )
        row = self._squeeze(*result)
        on_image = result[0].op == "placeholder" and result[0].meta["val"].dim() == 4
        grid = row if pixels or on_image else self._grid(nodes[nodes.index(result[0]) :], *result)
        self.emit.output((row, grid, [node for _, node in self.records]))
        forward, reverse = self.emit.modules(self.captured.outputs)
        leaves = tuple(self.captured.outputs.index(leaf) for leaf in self.analysis.leaves)
        features = tuple(tuple(self._features(leaf)) for leaf in self.analysis.leaves)
        names = tuple(name for name, _ in self.records)
        return Program(
            forward,
            reverse,
            self.dtype,
            leaves,
            features,
            names,
            result[0],
            tuple(self._features(result[0])),
            len(self.analysis.blocks),
            tuple(dict.fromkeys(self.generic)),
        )

    def _seed(self) -> None:
        for i, leaf in enumerate(self.analysis.leaves):
            seeds = [self.emit.placeholder(f"{lane}_{i}") for lane in ("grad", "rel", "row")]
            if lane_dtype(leaf.meta["val"].dtype) != self.dtype:
                seeds = [self.emit.call(aten.to.dtype, seed, self.dtype) for seed in seeds]
            grad, rel, row = map(Lane, seeds)
            self.give(
                leaf,
                grad if self.method.needs_gradient else None,
                rel if self.method.needs_relevance else None,
                RowLane(row, self.new_origin()),
            )

    def _collect(self, node: fx.Node) -> Lanes | None:
        pending = self._pending.pop(node, None)
        if pending is None or not (pending.grad or pending.rel or pending.row):
            return None
        rel = pending.rel
        if self.published and len(rel) > 1:
            rel = [self._published_clone(node, lane) for lane in rel]
        lanes = Lanes(self._sum(node, pending.grad), self._sum(node, rel), self._merge_rows(node, pending.row))
        if lanes.rel and self._meets_residual(pending.row):
            self.record(self._block, "input_relevance", self.dense(lanes.rel, node).node)
        return lanes

    def _published_clone(self, node: fx.Node, lane: Lane) -> Lane:
        """The published code's fan-out: x ⊙ Σ (R_i ⊘ x)."""
        if lane.rows and axes_.is_feature(self.axes(node)[lane.rows.dim]):
            return lane
        return Lane(self.published_share(self.value(node, lane.rows), lane.node), lane.rows)

    def _sum(self, node: fx.Node, lanes: Sequence[Lane], is_row: bool = False) -> Lane | None:
        """Lanes of one value added up, as sparse as they allow."""
        if not lanes:
            return None
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
                whole = length == (self.row_shape(node) if is_row else self.shape(node))[dim]
                return Lane(joined, None if whole else Rows(dim, sparse[0].start, length))
        total_lane = by_rows.get(None) or self.dense(by_rows[sparse.pop()], node, is_row)
        for rows in sparse:
            added = self.emit.call(add_rows, total_lane.node, by_rows[rows].node, rows.dim + 1, rows.start)
            total_lane = Lane(added)
        return total_lane

    def _merge_rows(self, node: fx.Node, rows: Sequence[RowLane]) -> RowLane | None:
        """Rows that meet at one value: the residual stream and what the attention block made of it."""
        if not rows:
            return None
        steps = {row.replaces: row for row in rows if row.replaces is not None}
        lanes: dict[Lane, RowLane] = {}
        for row in rows:
            step = steps.get(row.origin)
            if step is None or (step.kept is None and not step.drop):
                lanes.setdefault(row.lane, row)
            elif step.kept is not None:
                lanes.setdefault(step.kept, RowLane(step.kept, row.origin))
        if len(lanes) == 1:
            (row,) = lanes.values()
            return row if row.replaces is None or not self._meets_residual(rows) else RowLane(row.lane, self.new_origin())
        if not steps and self._blocks_left == len(self.analysis.blocks):
            self._unnormalized = True
        total = self._sum(node, list(lanes), is_row=True)
        assert total is not None
        return RowLane(total, self.new_origin())

    @staticmethod
    def _meets_residual(rows: Sequence[RowLane]) -> bool:
        origins = {row.origin for row in rows}
        return any(row.replaces in origins for row in rows)

    # The result.

    def _reading(self, node: fx.Node, lanes: Lanes) -> Lane:
        """The explanation at the value where it is read, with size 1 in feature dimensions."""
        if self.method.reading == "maps":
            assert self.method.combine
            assert self.read_row
            combined = self.emit.call(self.method.combine, self.read_row, *reversed(self.attention_maps))
            for dim in self._features(node):
                combined = self.emit.call(aten.unsqueeze.default, combined, dim + 1)
            return Lane(combined)
        if self.method.lane is None:
            assert lanes.row
            return self.dense(lanes.row.lane, node, is_row=True)
        lane = lanes.rel if self.method.lane == "relevance" else lanes.grad
        assert lane
        dense = self.dense(lane, node).node
        if self.method.lane == "gradient":
            dense = self.emit.call(torch.mul, dense, self.value(node))
        features = [dim + 1 for dim in self._features(node)]
        return Lane(self.emit.call(aten.sum.dim_IntList, dense, features, True))

    def _features(self, x: fx.Node) -> list[int]:
        """The feature dimensions of x."""
        return [dim for dim, axis in enumerate(self.axes(x)) if axes_.is_feature(axis)]

    def _squeeze(self, node: fx.Node, row: Lane) -> fx.Node:
        """A row without its feature dimensions, [K, B, …]."""
        features = [dim + 1 for dim in self._features(node)]
        return self.emit.call(aten.squeeze.dims, row.node, features) if features else row.node

    def _grid(self, nodes: Sequence[fx.Node], start: fx.Node, row: Lane) -> fx.Node | None:
        """The row followed further back, through rearrangements only, to the patch embedding that made the tokens."""
        from fastrel.rules import rule_for

        needed, self.analysis.needed = self.analysis.needed, set()
        self._pending = {start: _Pending(row=[RowLane(row, self.new_origin())])}
        try:
            for node in nodes:
                lanes = self._collect(node)
                if lanes is None or lanes.row is None:
                    continue
                if node.target is aten.conv2d.default:
                    return self._squeeze(node, self.dense(lanes.row.lane, node, is_row=True))
                rule = rule_for(node)
                if rule is None:
                    return None
                rule(self, node, Lanes(row=lanes.row))
            return None
        except UnsupportedModelError:
            return None
        finally:
            self.analysis.needed = needed


def add_rows(dense: torch.Tensor, part: torch.Tensor, dim: int, start: int) -> torch.Tensor:
    """dense with `part` added to its entries from `start` on along `dim`."""
    out = dense.clone()
    out.narrow(dim, start, part.shape[dim]).add_(part)
    return out


def describe(node: fx.Node) -> str:
    """A node as an error message names it: operator, shape, and the model's own line where known."""
    value = node.meta.get("val")
    shape = f" {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    modules = node.meta.get("nn_module_stack") or {}
    where = next(reversed(list(modules.values())), ("", ""))[0] if modules else ""
    return f"{node.target}{shape}" + (f" in {where}" if where else "")


def transform(
    captured: Captured,
    method: Method,
    *,
    rules: str,
    leaves: Sequence[int],
    trace: bool = False,
    memory: str = "normal",
    products: Products = Products(),  # noqa: B008
) -> Program:
    """Build the forward and reverse graphs for explaining the outputs `leaves` of a captured model.

    With memory="low", the forward graph saves only what the blocks pass on, and the reverse graph computes the rest again.

    Raises:
        InputError: `start_layer` leaves no block.
        UnsupportedModelError: the graph holds something without a rule; the message names it.
    """
    if not leaves:
        raise InputError("the model returns no floating-point tensor to explain")
    return Transform(captured, method, rules, leaves, trace, memory, products).run()
