"""The reverse walk: a captured forward pass -> two graphs, one that predicts and saves, one that explains.

The captured nodes are walked once in reverse. For each node that carries lanes, its rule (fastrel/rules) turns the lanes
of its output into lanes of its inputs, as nodes of the reverse graph. Lanes that nothing needs are never emitted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from fastrel.errors import InputError, UnsupportedModelError
from fastrel.graph import axes as axes_
from fastrel.graph.capture import Captured
from fastrel.graph.facts import Memory, Stretch, along
from fastrel.graph.nodes import describe
from fastrel.precision import Products
from fastrel.reference.rollout import per_attention
from fastrel.reference.rules import Rules
from fastrel.rules import rule_for
from fastrel.rules.generic import generic
from fastrel.transform.context import Context
from fastrel.transform.emit import Emitter, common_lane_dtype
from fastrel.transform.grids import on_grid, picture_of, samples_first
from fastrel.transform.lanes import Lane, Lanes, lane_dtype
from fastrel.transform.method import NEEDS_SAME_TOKENS, AllMaps, Kind, LaneSum, Method
from fastrel.transform.program import Map, Program

aten = torch.ops.aten


class _Found(NamedTuple):
    """A map that was read: at which value, and its row; at others as well, if these are look-ups of the same tokens."""

    node: fx.Node
    row: Lane
    others: tuple[fx.Node, ...] = ()


def transform(
    captured: Captured,
    method: Method,
    *,
    rules: Rules,
    leaves: Sequence[int],
    trace: bool = False,
    memory: Memory = "normal",
    products: Products = Products(),  # noqa: B008
    device: torch.device | None = None,
) -> Program:
    """Build the forward and reverse graphs for explaining the outputs `leaves` of a captured model.

    With memory="low", the forward graph saves only what the blocks pass on, and the reverse graph computes the rest again. `device`:
    where they will run, if not where the model was captured.

    Raises:
        InputError: `start_layer` leaves no block.
        UnsupportedModelError: the graph holds something without a rule; the message names it.
    """
    if not leaves:
        raise InputError("the model returns no floating-point tensor to explain")
    nodes = [captured.outputs[i] for i in leaves]
    stretch = Stretch.of(captured.facts, nodes, method.start_layer, everything=trace or method.to_the_end)
    dtype = common_lane_dtype(stretch.needed)
    emit = Emitter(captured.graph, captured.facts.recomputed(memory, device or nodes[0].meta["val"].device), dtype)
    products = products if dtype == torch.float32 else Products()
    t = Context(captured.facts, stretch, method, rules, products, emit, trace)
    for i, leaf in enumerate(nodes):
        seeds = [emit.placeholder(f"{lane}_{i}") for lane in ("grad", "rel", "row")]
        if lane_dtype(leaf.meta["val"].dtype) != dtype:
            seeds = [emit.call(aten.to.dtype, seed, dtype) for seed in seeds]
        grad, rel, row = seeds
        t.seed = t.seed or row
        t.give(
            leaf,
            Lane(grad) if method.needs_gradient else None,
            Lane(rel) if method.needs_relevance else None,
            t.rollout.seed(row),
        )
    found = _Walk(t).run()
    if method.per_attention and len(found) > 1:
        raise UnsupportedModelError(f"{method.name} explains models of one sequence of tokens; this one has {len(found)}")
    found = sorted(_met(t, found), key=lambda one: captured.inputs.index(t.facts.source(one.node)))
    grids = [on_grid(t, one.node, one.row) for one in found]
    rows = [samples_first(t, one.node, one.row) for one in found]
    parts = [_parts(t, one, row) for one, row in zip(found, rows, strict=True)]
    emit.output(
        (
            [row for own in parts for _, row in own],
            [grid for grid, own in zip(grids, parts, strict=True) for _ in own],
            [node for _, node in t.records],
        )
    )
    forward, reverse = emit.modules(captured.outputs)
    return Program(
        forward,
        reverse,
        dtype,
        tuple(leaves),
        tuple(tuple(t.features(leaf)) for leaf in nodes),
        tuple(name for name, _ in t.records),
        tuple(
            Map(
                captured.inputs.index(source),
                tuple(x.name for x in (one.node, *one.others)),
                tuple(t.features(one.node)),
                picture_of(t.facts, source),
                branch,
                _beside(t, one, [source for source, _ in own]),
            )
            for one, branch, own in zip(found, _branches(t, found), parts, strict=True)
            for source, _ in own
        ),
        len(stretch.blocks),
        tuple(dict.fromkeys(t.generic)),
    )


class _Walk:
    """The driver: collects the lanes of a node, asks its rule, and notices where a map can be read."""

    def __init__(self, t: Context) -> None:
        self.t = t
        self.pixels = t.method.at_pixels
        self.found: list[_Found] = []

    def run(self) -> list[_Found]:
        """Walk from the outputs to where the maps are read.

        Raises:
            UnsupportedModelError: a node has no rule, or the row leads to no tokens.
        """
        t, found = self.t, self.found
        for node in (n for n in reversed(t.facts.nodes) if n in t.facts.active):
            t.emit.source = describe(node)
            lanes = t.collect(node)
            if lanes is None:
                continue
            if self._is_read(node, lanes):
                found.append(_Found(node, self._reading(node, lanes)))
                if not any(pending.rows for pending in t.pending.values()):
                    break
                continue
            if self.pixels and node.target is aten.embedding.default:
                break
            self._apply(node, lanes._replace(row=None) if self.pixels and node not in t.stretch.above else lanes)
        t.emit.source = None
        if not found:
            raise UnsupportedModelError(
                "the model takes no floating-point input: read this method at its tokens instead"
                if self.pixels
                else "the attention maps of this model do not lead back to any sequence of tokens"
            )
        return found[::-1]

    def _is_read(self, node: fx.Node, lanes: Lanes) -> bool:
        """Whether this is where one input's tokens are read: nothing else of that input is under way or was read, and no block
        comes before."""
        if self.pixels:
            return self.t.facts.enters(node) and node.target is not aten.embedding.default
        t = self.t
        if lanes.row is None or node in t.stretch.above:
            return False
        if t.facts.enters(node):
            return True
        own = t.facts.sources[node]
        under_way = [*(x for x, pending in t.pending.items() if pending.rows), *(one.node for one in self.found)]
        alone = not any(own & t.facts.sources[x] for x in under_way)
        return alone and len(t.facts.sequences(node)) == 1 and axes_.is_readable(t.axes(node))

    def _apply(self, node: fx.Node, lanes: Lanes) -> None:
        t = self.t
        try:
            (rule_for(node) or generic)(t, node, lanes)
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(f"the rule of {describe(node)} does not take it: {error!r}") from error
        except UnsupportedModelError as error:
            if t.block in (t.stretch.total, min(t.stretch.blocks)):
                raise
            raise UnsupportedModelError(f"{error}; with start_layer={t.block} it is not needed") from error

    def _reading(self, node: fx.Node, lanes: Lanes) -> Lane:
        """The explanation at the value where it is read, with size 1 in feature dimensions."""
        t, reading = self.t, self.t.method.reading
        if not isinstance(reading, LaneSum):
            assert lanes.row
            row = t.rollout.share(lanes.row, t.sum_of_rows(node))
            row = t.dense(row, node, is_row=True)
            if isinstance(reading, AllMaps):
                assert t.read_row
                combined = t.emit.call(reading.combine, t.read_row, *(self._of_all_blocks(kind) for kind in reading.of))
                return Lane(t.emit.call(as_row, combined, row.node))
            if t.method.per_attention:
                return Lane(t.emit.call(divided, row.node, self._of_all_blocks("received")))
            return row
        lane = lanes.rel if reading.lane == "relevance" else lanes.grad
        assert lane
        dense = t.dense(lane, node).node
        if reading.lane == "gradient":
            dense = t.emit.call(torch.mul, dense, t.value(node))
        features = [dim + 1 for dim in t.features(node)]
        return Lane(t.emit.call(aten.sum.dim_IntList, dense, features, True) if features else dense)

    def _of_all_blocks(self, kind: Kind) -> list[fx.Node]:
        """What the blocks hand to the reading, the first block's first."""
        t = self.t
        found = t.maps[kind]
        if len(found) < len(t.stretch.blocks):
            raise UnsupportedModelError(
                f"{t.method.name} needs to know what each attention block reads; here some read no tokens"
            )
        return [found[block] for block in sorted(found)]


def as_row(found: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """A map [K, B, T] in the shape of the row [K, B, T, 1 …] at the same tokens.

    Raises:
        InputError: it is over other tokens.
    """
    if found.shape != row.flatten(2).shape:
        raise InputError(f"this method {NEEDS_SAME_TOKENS}")
    return found.reshape(row.shape)


def divided(row: torch.Tensor, received: Sequence[torch.Tensor]) -> torch.Tensor:
    """A row [K, B, T, 1 …] by the attention that each token receives, [B, T] per block.

    Raises:
        InputError: the blocks are over other tokens.
    """
    tokens = row.flatten(2)
    if any(own.shape != tokens.shape[1:] for own in received):
        raise InputError(f"this method {NEEDS_SAME_TOKENS}")
    return per_attention(tokens, received).reshape(row.shape)


def _met(t: Context, found: Sequence[_Found]) -> list[_Found]:
    """The maps that were found, those over look-ups of the same tokens as one."""
    by_tokens: dict[Any, list[_Found]] = defaultdict(list)
    for one in found:
        by_tokens[one.node.args[1] if one.node.target is aten.embedding.default else one.node].append(one)
    return [
        _Found(
            several[0].node,
            t.added(several[0].node, [one.row for one in several], is_row=True),
            tuple(one.node for one in several[1:]),
        )
        for several in by_tokens.values()
    ]


def _parts(t: Context, one: _Found, row: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The inputs that a map is over, each with its part of the row [K, B, T]: one, unless inputs were joined before they were looked
    up. Tokens that the model puts between them (CLS, a separator) belong to the input before, those at the start to the first."""
    source = t.facts.source(one.node)
    joined: Any = t.facts.joined.get(source)
    if joined is None:
        return [(source, row)]
    tokens = [dim for dim, axis in enumerate(t.axes(one.node)) if any(role == "token" for _, role in axis)] or [1]
    dim = along(joined)
    if str(one.node.meta["val"].shape[tokens[0]]) != str(joined.meta["val"].shape[dim]):
        return [(source, row)]
    lengths: dict[fx.Node, Any] = {}
    before: Any = 0
    for part in joined.args[0]:
        x, length = axes_.unturned(part), t.emit.size(part, dim)
        if x in t.facts.joined:
            lengths[x], before = t.emit.arith("add", before, length), 0
        elif lengths:
            last = next(reversed(lengths))
            lengths[last] = t.emit.arith("add", lengths[last], length)
        else:
            before = t.emit.arith("add", before, length)
    found, start = [], 0
    for x, length in lengths.items():
        found.append((x, t.emit.call(aten.narrow.default, row, 2, start, length)))
        start = t.emit.arith("add", start, length)
    return found


def _beside(t: Context, one: _Found, own: list[fx.Node]) -> tuple[int, ...]:
    """The other inputs that a map's tokens are made of besides its own, position by position."""
    inputs = [x for x in t.facts.inputs if x in t.facts.sources[one.node] and x not in own]
    return tuple(t.facts.inputs.index(x) for x in inputs)


def _branches(t: Context, found: Sequence[_Found]) -> list[str]:
    """The module that reads an input, where several read it as other tokens each; else nothing."""
    counts = Counter(t.facts.source(one.node) for one in found)
    seen: Counter[str] = Counter()
    names = []
    for one in found:
        modules = list((one.node.meta.get("nn_module_stack") or {}).values())
        name = modules[-1][0] if modules and modules[-1][0] else one.node.name
        seen[name] += 1
        name += f" ({seen[name]})" if seen[name] > 1 else ""
        names.append(f" in {name}" if counts[t.facts.source(one.node)] > 1 else "")
    return names
