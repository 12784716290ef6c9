"""The grid that tokens lie on: patches of an image, frames of patches, blocks of a volume.

The row of a map is followed further back, through rearrangements only, to what made the tokens: a convolution, whose places are the
grid, or a linear layer over pixels that were rearranged into patches. Where these came from is found by rearranging coordinates.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from fastrel.errors import UnsupportedModelError
from fastrel.graph import axes as axes_
from fastrel.graph.facts import Facts, Stretch
from fastrel.graph.nodes import arguments
from fastrel.graph.patterns import is_pointwise
from fastrel.rules import rule_for
from fastrel.rules.generic import INDEX_MAPS
from fastrel.transform.context import Context, Pending
from fastrel.transform.lanes import Lane, Lanes, Part, Row

aten = torch.ops.aten

_CONVOLUTIONS = {aten.conv2d.default, aten.conv3d.default}

#: What leaves every pixel where it is, though it looks at others.
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}

#: What moves pixels and does not mix them.
_MOVES = {
    *INDEX_MAPS,
    *axes_.RESHAPES,
    aten.permute.default,
    aten.transpose.int,
    aten.select.int,
    aten.slice.Tensor,
    aten.unbind.int,
    aten.chunk.default,
    aten.split.Tensor,
    aten.cat.default,
    operator.getitem,
}

#: What makes a picture of another size, in which everything lies where it lay, in proportion.
_RESAMPLES = {
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
    aten.upsample_nearest3d.vec,
    aten.upsample_trilinear3d.vec,
}


def samples_first(t: Context, node: fx.Node, row: Lane) -> fx.Node:
    """The row at a value without feature dimensions and with its samples first, [K, B, …]: models may have them behind their tokens,
    or frames and views of a sample beside it, which get dimensions of their own.

    Raises:
        ValueError: samples cannot be told from frames.
    """
    axes, dense = list(t.axes(node)), row.node
    places = [dim for dim, axis in enumerate(axes) if any(role == "batch" for _, role in axis)]
    samples = places[0] if places else 0
    mixed = axes[samples] if axes else ()
    if len(mixed) > 1:
        if sum(role == "batch" for _, role in mixed) != 1:
            raise ValueError(f"{node} has samples in several places")
        sizes = [-1 if role == "batch" else size for size, role in mixed]
        dense = t.emit.call(aten.unflatten.int, dense, samples + 1, sizes)
        axes[samples : samples + 1] = [(factor,) for factor in mixed]
        samples += sizes.index(-1)
    order = [samples, *(dim for dim in range(len(axes)) if dim != samples)]
    if samples:
        dense = t.emit.call(aten.permute.default, dense, [0, *(dim + 1 for dim in order)])
    features = [place + 1 for place, dim in enumerate(order) if place and axes_.is_feature(axes[dim])]
    return t.emit.call(aten.squeeze.dims, dense, features) if features else dense


def picture_of(facts: Facts, source: fx.Node) -> tuple[int, int] | None:
    """The dimensions of height and width in an input of pictures, films or volumes; None for others."""
    value = source.meta["val"]
    if value.dim() not in (4, 5) or not (value.is_floating_point() or value.dtype == torch.uint8):
        return None
    if source not in facts.axes:
        return value.dim() - 2, value.dim() - 1
    *_, height, width = _spatial(facts, source)
    return height, width


def _spatial(facts: Facts, source: fx.Node) -> list[int]:
    """The dimensions of an input that tokens lie along."""
    return [dim for dim, axis in enumerate(facts.axes[source]) if axis and axis[0][1] == "token"]


def on_grid(t: Context, node: fx.Node, row: Lane) -> fx.Node | None:
    """The part of the row at `node` that lies on a grid, [K, B, gh, gw] or [K, B, frames, gh, gw]; None where none is found."""
    if t.method.at_pixels or (t.facts.enters(node) and picture_of(t.facts, t.facts.source(node))):
        return samples_first(t, node, row)
    stretch = Stretch(t.stretch.leaves, {}, t.stretch.total, frozenset(), frozenset(), frozenset())
    back = Context(t.facts, stretch, t.method, t.rules, t.products, t.emit, trace=False)
    back.pending = {node: Pending(rows=[Row({(): Part(row)})])}
    nodes = [n for n in t.facts.nodes[: t.facts.nodes.index(node) + 1] if n in t.facts.active]
    try:
        for x in reversed(nodes):
            lanes = back.collect(x)
            if lanes is None or lanes.row is None:
                continue
            places = _places(t.facts, x.args[0]) if x.target is aten.linear.default else None
            inside = _inside(t.facts, x) if x.target in _CONVOLUTIONS else []
            if inside is None:
                return None
            if x.target in _CONVOLUTIONS or places is not None:
                row = back.rollout.share(lanes.row, back.sum_of_rows(x))
                dense = samples_first(back, x, back.dense(row, x, is_row=True))
                for dim, (start, length) in enumerate(inside, -len(inside)):
                    if length < x.meta["val"].shape[dim]:
                        dense = t.emit.call(aten.narrow.default, dense, dim, start, length)
                return dense if places is None else _arranged(back, dense, *places)
            rule = rule_for(x)
            if rule is None:
                return None
            rule(back, x, Lanes(row=lanes.row))
        return None
    except (UnsupportedModelError, ValueError, AssertionError):
        return None


def _arranged(t: Context, row: fx.Node, sizes: list[int], order: list[int]) -> fx.Node:
    """A row over patches [K, B, …] on their grid, over whose dimensions they run in some order."""
    flat = t.emit.call(aten.flatten.using_ints, row, 2)
    grid = t.emit.call(aten.unflatten.int, flat, 2, [sizes[dim] for dim in order])
    return t.emit.call(aten.permute.default, grid, [0, 1, *(2 + order.index(dim) for dim in range(len(sizes)))])


def _places(facts: Facts, patches: fx.Node) -> tuple[list[int], list[int]] | None:
    """Where the rows of a value [B, tokens…, entries] lie in the input that they are taken from: the sizes of their grid, and in
    which order the tokens run over its dimensions; None where they are not taken from a grid."""
    source = facts.source(patches)
    dims = source.meta["val"].dim()
    spatial = _spatial(facts, source) if source in facts.axes else []
    coordinates = (
        _coordinates(facts, patches, source, spatial) if len(spatial) in (2, 3) and dims == len(spatial) + 2 else None
    )
    if coordinates is None:
        return None
    centres, extents = [], []
    for moved, dim in zip(coordinates, spatial, strict=True):
        moved = moved.reshape(_batch(source), -1, moved.shape[-1])[0]
        low, high = moved.where(moved > 0, math.inf).amin(-1), moved.amax(-1)  # what pads an image is 0
        centres.append((low + high) / 2)
        extents.append(float((high - low).max()) + 1)
        if low.min() > 1 or high.max() <= source.meta["val"].shape[dim] - extents[-1]:
            return None  # only a part of the picture is there
    levels = [centre.unique() for centre in centres]
    sizes = [len(level) for level in levels]
    if math.prod(sizes) != len(centres[0]) or not all(map(_fits, levels, extents)):
        return None
    index = [torch.searchsorted(level, centre) for level, centre in zip(levels, centres, strict=True)]
    for order in itertools.permutations(range(len(sizes))):
        place = torch.zeros_like(index[0])
        for dim in order:
            place = place * sizes[dim] + index[dim]
        if torch.equal(place, torch.arange(len(place))):
            return sizes, list(order)
    return None


def _fits(level: Tensor, extent: float) -> bool:
    """Whether patches of this extent lie beside one another or overlap by half, not across one another."""
    return bool(level.isfinite().all()) and (len(level) == 1 or extent <= 2 * float(level.diff().max()))


def _inside(facts: Facts, convolution: fx.Node) -> list[tuple[int, int]] | None:
    """Which places of a convolution lie in the picture, not in what pads it: the first and how many, along each dimension, all where
    none is named. None where what it reads does not lie as the picture does, as far as that was only moved, padded, or made larger
    or smaller: where it is turned, cropped or shifted."""
    x, weight, _, strides, paddings = arguments(convolution, None, 1, 0, count=5)
    source = facts.source(x)
    dims = x.meta["val"].dim() - 2
    spatial = _spatial(facts, source)[-dims:] if source in facts.axes else []
    coordinates = _coordinates(facts, x, source, spatial, _RESAMPLES) if len(spatial) == dims else None
    if coordinates is None:
        return []  # something was computed of it
    found = []
    for place, dim, moved in zip(range(-dims, 0), spatial, coordinates, strict=True):
        along = moved.movedim(place, 0).flatten(1).amax(1)
        pixels = along.nonzero()[:, 0]  # what pads a picture is 0
        size, step = len(pixels), source.meta["val"].shape[dim] / max(len(pixels), 1)
        expected = (torch.arange(size) + 0.5) * step + 0.5
        if not bool(((along[pixels] - expected).abs() <= (1e-3 if step == 1 else max(step, 1))).all()):
            return None
        kernel, count = weight.meta["val"].shape[place], convolution.meta["val"].shape[place]
        stride, padding = (x[place] if isinstance(x, (list, tuple)) else x for x in (strides, paddings))
        # The cell of a place: a stride's width around the centre of its kernel.
        begins = torch.arange(count) * stride - padding + (kernel - stride) / 2
        within = ((begins + stride > pixels[0]) & (begins <= pixels[-1])).nonzero()[:, 0]
        found.append((int(within[0]), len(within)) if size < len(along) else (0, count))
    return found


def _batch(source: fx.Node) -> int:
    """Samples to try a graph on: as many as it is fixed to, else one."""
    size = source.meta["val"].shape[0]
    return int(size) if is_concrete_int(size) else 1


def _coordinates(
    facts: Facts, x: fx.Node, source: fx.Node, spatial: list[int], resamples: Set[Any] = frozenset()
) -> list[Tensor] | None:
    """What x would hold if its input held coordinates, from 1 on, along each of some dimensions; None where x mixes them by anything
    but `resamples`, or sizes vary."""
    shape = source.meta["val"].shape
    if not all(map(is_concrete_int, shape[1:])):
        return None
    found = []
    for dim in spatial:
        line = torch.arange(1.0, shape[dim] + 1).reshape([-1 if i == dim else 1 for i in range(len(shape))])
        moved = _moved(facts, x, {source: line.expand(_batch(source), *shape[1:]).contiguous()}, _MOVES | resamples)
        if moved is None:
            return None
        found.append(moved)
    return found


def _moved(facts: Facts, node: fx.Node, known: dict[fx.Node, Any], moves: Set[Any]) -> Tensor | None:
    """What a value would hold if its input held coordinates: these, after `moves`; None where they are mixed."""

    def value(x: fx.Node) -> Any:
        if x not in known:
            known[x] = computed(x)
        return known[x]

    def computed(x: fx.Node) -> Any:
        active = [n for n in x.all_input_nodes if n in facts.active]
        if x in facts.active and (is_pointwise(x) or x.target in _NORMS):
            same = [n for n in active if n.meta["val"].shape == x.meta["val"].shape]
            if len(active) != 1 or not same:
                raise ValueError(f"{x} mixes values")
            return value(same[0])
        if x.op != "call_function" or (x in facts.active and x.target not in moves):
            raise ValueError(f"{x} does not move entries")
        operator_: Any = x.target
        return operator_(*fx.map_arg(x.args, value), **fx.map_arg(x.kwargs, value))

    try:
        return value(node)
    except (ValueError, RuntimeError, TypeError):
        return None
