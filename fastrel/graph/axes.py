"""What each dimension of each value stands for: batch, token or feature.

A dimension is a tuple of factors (size, role); reshaping regroups factors, so that merged and split dimensions keep their
meaning. Symbolic sizes are replaced by large primes, which makes "the same size" a comparison of integers.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fastrel.graph.places import SUMS

aten = torch.ops.aten

Role = Literal["batch", "token", "feature"]
Factor = tuple[int, Role]
Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]

_PRIMES = (1000003, 1000033, 1000037, 1000039, 1000081, 1000099, 1000117, 1000121, 1000133, 1000151, 1000159, 1000171)

#: Over one or more dimensions.
REDUCTIONS = {
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.var.correction,
    aten.std.correction,
    aten.var.dim,
    aten.std.dim,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
    aten.logsumexp.default,
}

#: Operators that put dimensions in another order.
_TURNS = {
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
}

#: Operators that take a part of a value, or several.
_CUTS = {
    aten.select.int,
    aten.slice.Tensor,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
}

RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten.reshape_as.default,
    aten.view_as.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
}


class Sizes:
    """Sizes as integers, with a prime in the place of every symbol: the first is that of the batch, if it varies."""

    def __init__(self, batch: set[str]) -> None:
        self._values: dict[str, int] = dict.fromkeys(batch, _PRIMES[0])

    def __call__(self, size: Any) -> int:
        """One size, symbolic or not."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if str(symbol) not in self._values:
                prime = _PRIMES[len({_PRIMES[0], *self._values.values()}) % len(_PRIMES)]
                # A number of entries that depends on data (x[mask]) is that of all samples, which models divide by their number.
                self._values[str(symbol)] = prime * _PRIMES[0] if str(symbol).startswith("u") else prime
        return int(expression.subs({s: self._values[str(s)] for s in expression.free_symbols}))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's value."""
        return tuple(self(size) for size in node.meta["val"].shape)


def is_feature(axis: Axis) -> bool:
    """Whether a dimension holds nothing but features (sizes of 1 count as such, but for a batch of one sample)."""
    return all(role == "feature" for _, role in axis)


def are_tokens(axis: Axis) -> bool:
    """Whether a dimension holds nothing but tokens, more than one."""
    return size_of(axis) > 1 and all(role == "token" for _, role in axis)


def is_readable(axes: Axes) -> bool:
    """Whether no dimension holds tokens and features at once; one may hold samples, and each one's frames beside it."""
    return all(len({role for _, role in axis}) < 2 or _holds_frames(axis) for axis in axes)


def _holds_frames(axis: Axis) -> bool:
    """Whether a dimension holds samples and, of each, a fixed number of tokens."""
    others = [factor for factor in axis if factor[1] != "batch"]
    return len(others) == len(axis) - 1 and all(role == "token" and not varies(size) for size, role in others)


def size_of(axis: Axis) -> int:
    """Number of entries along a dimension."""
    return math.prod(size for size, _ in axis)


def varies(size: int) -> bool:
    """Whether a size stands for one that varies between calls (or a multiple of it)."""
    return size >= _PRIMES[0]


def regroup(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes after a reshape to `shape`, or None where a boundary cuts through a factor that cannot be split.

    A batch of one sample goes where a larger one would, unless dimensions of size 1 lie before it.
    """
    factors = [factor for axis in axes for factor in axis if factor[0] != 1 or factor[1] == "batch"]
    out: list[Axis] = []
    for size in shape:
        taken: list[Factor] = []
        missing = size
        while factors and factors[0][0] == 1:
            taken.append(factors.pop(0))
        while missing != 1:
            if not factors:
                return None
            available, role = factors.pop(0)
            if missing % available == 0:
                taken.append((available, role))
                missing //= available
            elif available % missing == 0:
                taken.append((missing, role))
                factors.insert(0, (available // missing, role))
                missing = 1
            elif role == "token" and factors and factors[0][1] == role:  # windows of another size
                factors[0] = (available * factors[0][0], role)
            else:
                return None
        out.append(tuple(taken))
    return tuple(out) if all(size == 1 for size, _ in factors) else None


def groups(source: Sequence[int], result: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Dimensions of a reshape that go together: minimal runs of `source` and `result` with equal products."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(result):
        left, right, a, b = [], [], 1, 1
        if i < len(source):
            left, a, i = [i], source[i], i + 1
        if j < len(result) and (a != 1 or not left):
            right, b, j = [j], result[j], j + 1
        while a != b:
            if a < b and i < len(source):
                a *= source[i]
                left.append(i)
                i += 1
            elif j < len(result):
                b *= result[j]
                right.append(j)
                j += 1
            else:
                raise ValueError(f"cannot group the dimensions {tuple(source)} -> {tuple(result)}")
        found.append((left, right))
    return found


@dataclass(frozen=True)
class Labels:
    """What is known of a graph's values so far: the axes of those that were labelled, and sizes as integers; and what is assumed: in
    which dimension inputs have their features, and what values that are stacked are, unless they are known to be tokens."""

    axes: dict[fx.Node, Axes]
    sizes: Sizes
    channels: Mapping[fx.Node, int | None]
    stacked: Role = "feature"

    def of(self, x: Any) -> Axes | None:
        """The axes of a value; None where they are not known or x is no value."""
        return self.axes.get(x) if isinstance(x, fx.Node) else None

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a value, symbols as primes."""
        return self.sizes.shape(node)


Labeller = Callable[[fx.Node, Labels], "Axes | None"]

_LABELLERS: dict[Any, Labeller] = {}


def axes_of(*targets: Any) -> Callable[[Labeller], Labeller]:
    """Register what gives the result of some operators its axes; others have those of their widest operands."""

    def register(function: Labeller) -> Labeller:
        _LABELLERS.update(dict.fromkeys(targets, function))
        return function

    return register


def label(nodes: Sequence[fx.Node], active: set[fx.Node], sizes: Sizes) -> dict[fx.Node, Axes]:
    """Axes of every active value whose dimensions can be followed from the inputs."""
    found = [
        _labelled(nodes, active, Labels({}, sizes, usual)) for usual in _places_of_channels(nodes, active, sizes, _CHANNELS)
    ]
    if all(_fitting(nodes, labels) < 0 and not _attends_to_tokens(nodes, labels) for labels in found):
        turned = [Labels({}, sizes, channels) for channels in _places_of_channels(nodes, active, sizes, _TURNED)]
        known = [labels.channels for labels in found]
        others = [_labelled(nodes, active, labels) for labels in turned if labels.channels not in known]
        found += [labels for labels in others if _attends_to_tokens(nodes, labels)]
    best = max(found, key=lambda labels: _fitting(nodes, labels))
    if _beside_samples(nodes, best):
        # What layers read beside samples are samples of their own: frames, slices without channels, inputs that are stacked.
        grey = {node: None if len(sizes.shape(node)) == 4 else dim for node, dim in best.channels.items()}
        apart = [Labels({}, sizes, channels, "token") for channels in (best.channels, grey)]
        found = [best, *(_labelled(nodes, active, labels) for labels in apart)]
        best = max(found, key=lambda labels: _fitting(nodes, labels))
    return best.axes


def _labelled(nodes: Sequence[fx.Node], active: set[fx.Node], labels: Labels) -> Labels:
    """The same labels, of all values."""
    for node in nodes:
        value = node.meta.get("val")
        if node not in active or not isinstance(value, (Tensor, list, tuple)):
            continue
        if node.op == "placeholder":
            labels.axes[node] = _input_axes(labels.shape(node), labels.channels.get(node))
        elif not isinstance(value, Tensor):
            # A tuple of parts: the axes of the whole, which getitem takes apart.
            known = next((labels.axes[n] for n in node.all_input_nodes if n in labels.axes), None)
            if known is not None:
                labels.axes[node] = known
        elif (found := _LABELLERS.get(node.target, _widest)(node, labels)) is not None:
            labels.axes[node] = found
    return labels


#: Where features may be: of tokens [B, T, D]; pictures [B, C, H, W], [B, H, W, C]; volumes [B, C, D, H, W], films [B, T, C, H, W]
#: and [B, T, H, W, C]; slices [B, D, H, W] have none.
_CHANNELS: dict[int, tuple[int | None, ...]] = {3: (2,), 4: (1, 3, None), 5: (1, 2, 4)}

#: The same, and tokens that come as [B, D, T], as the V variates of a series [B, L, V] may.
_TURNED = _CHANNELS | {3: (2, 1)}


def _places_of_channels(
    nodes: Sequence[fx.Node], active: set[fx.Node], sizes: Sizes, channels: dict[int, tuple[int | None, ...]]
) -> list[dict[fx.Node, int | None]]:
    """What may be tried for a graph's inputs, the most usual first; pictures [B, C ≤ 4, H, W] are what they look like."""
    inputs = [n for n in nodes if n.op == "placeholder" and n in active and n.meta["val"].dim() in channels]
    choices = []
    for node in inputs:
        shape = sizes.shape(node)
        places = channels[len(shape)]
        choices.append(places[:1] if len(shape) == 4 and shape[1] <= 4 else places)
    return [dict(zip(inputs, places, strict=True)) for places in itertools.product(*choices)]


def _fitting(nodes: Sequence[fx.Node], labels: Labels) -> int:
    """How well features lie where layers take them: convolutions in their channels, linear layers in the last dimension."""
    score = 0
    for node in nodes:
        axes = labels.of(node.args[0]) if node.args else None
        if axes is None:
            continue
        if node.target in (aten.conv2d.default, aten.conv3d.default):
            score += is_feature(axes[1]) and not any(has_features(axis) for axis in axes[2:])
        elif node.target is aten.linear.default:
            score -= any(has_features(axis) for axis in axes[1:-1])
    return score - _beside_samples(nodes, labels)


def _beside_samples(nodes: Sequence[fx.Node], labels: Labels) -> int:
    """How many layers read features that lie beside samples, which they do not mix."""
    layers = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default)
    read = [labels.of(node.args[0]) for node in nodes if node.target in layers]
    return sum(len(axes) > 1 and has_features(axes[0]) for axes in read if axes)


def _attends_to_tokens(nodes: Sequence[fx.Node], labels: Labels) -> bool:
    """Whether the keys of some attention map are tokens."""
    for node in nodes:
        fused = node.target is aten.scaled_dot_product_attention.default
        axes = labels.of(node.args[1]) if fused else labels.of(node) if node.target is aten.softmax.int else None
        dim: Any = -2 if fused else node.args[1] if axes else None
        if axes and are_tokens(axes[dim]):
            return True
    return False


def has_features(axis: Axis) -> bool:
    """Whether a dimension holds features, more than one, with others or not."""
    return any(role == "feature" and size > 1 for size, role in axis)


def _input_axes(shape: tuple[int, ...], channels: int | None) -> Axes:
    roles: list[Role] = ["token"] * len(shape)
    if shape:
        roles[0] = "batch"
    if channels is not None:
        roles[channels] = "feature"
    return tuple(((size, role),) for size, role in zip(shape, roles, strict=True))


def _widest(node: fx.Node, labels: Labels) -> Axes | None:
    return _broadcast([labels.axes[n] for n in node.all_input_nodes if n in labels.axes], labels.shape(node))


@axes_of(operator.getitem)
def _part(node: fx.Node, labels: Labels) -> Axes | None:
    whole: Any = node.args[0]
    x, shape = labels.of(whole), labels.shape(node)
    if x is None:
        return None
    if len(shape) < len(x):  # unbind, max, var_mean …
        place, default = (2, -1) if whole.target is aten.kthvalue.default else (1, 0)
        given = whole.args[place] if len(whole.args) > place else whole.kwargs.get("dim", default)
        dims = {dim % len(x) for dim in ([given] if isinstance(given, int) else given or range(len(x)))}
        return tuple(axis for dim, axis in enumerate(x) if dim not in dims)
    return _broadcast([x], shape)


@axes_of(aten.embedding.default)
def _embedding(node: fx.Node, labels: Labels) -> Axes:
    shape = labels.shape(node)
    roles: list[Role] = ["token"] * (len(shape) - 1)
    if len(shape) >= 3 or _is_word(node, labels):
        ids: Any = node.args[1]
        roles[_samples_of(ids, labels)] = "batch"
    return (*(((size, role),) for size, role in zip(shape, roles, strict=False)), ((shape[-1], "feature"),))


def _samples_of(ids: fx.Node, labels: Labels) -> int:
    """The dimension of integers along which samples lie: that of the batch's size, or, where sizes do not tell, that to which the first
    one of an input was moved; the first where neither says so."""
    shape = labels.shape(ids)
    if shape[0] % _PRIMES[0] and shape.count(_PRIMES[0]) == 1:
        return shape.index(_PRIMES[0])
    return moved_to(ids) or 0


def moved_to(ids: fx.Node) -> int | None:
    """To which dimension the first one of an input of integers was moved; None where it cannot be followed."""
    if ids.op == "placeholder":
        return 0
    if ids.target is aten.cat.default:  # with constants, perhaps, which were not moved
        parts: Any = ids.args[0]
        return max((dim for part in parts if (dim := moved_to(part)) is not None), default=None)
    given: Any = ids.args[0] if ids.args else None
    if not isinstance(given, fx.Node) or ids.target in RESHAPES or given.meta["val"].dim() != ids.meta["val"].dim():
        return None
    dim, order = moved_to(given), order_of(ids)
    return dim if dim is None or order is None else order.index(dim)


def order_of(node: fx.Node) -> list[int] | None:
    """Which dimension of a value lies where in a transpose or permutation of it; None for other nodes."""
    if node.target not in _TURNS:
        return None
    operator_: Any = node.target
    probe = torch.empty([dim + 2 for dim in range(node.meta["val"].dim())], device="meta")
    return [size - 2 for size in operator_(probe, *node.args[1:]).shape]


def unturned(x: fx.Node) -> fx.Node:
    """What a value is a transpose or permutation of; else itself."""
    while order_of(x) is not None:
        x = x.args[0]  # type: ignore[assignment]
    return x


def _is_word(node: fx.Node, labels: Labels) -> bool:
    """Whether a look-up is of one word of each sample: of integers [B], an input or a column of one."""
    ids: Any = node.args[1]
    shape = labels.shape(ids)
    while ids.op != "placeholder" and ids.args and isinstance(ids.args[0], fx.Node):
        ids = ids.args[0]
    given = ids.meta.get("val")
    return isinstance(given, Tensor) and given.dim() > 0 and len(shape) == 1 and labels.shape(ids)[0] == shape[0]


def _word(part: fx.Node, labels: Labels) -> Any:
    """Which word of each sample a value was made of, and of nothing else; None where it is none."""
    while part.target is not aten.embedding.default:
        sources = [n for n in part.all_input_nodes if n in labels.axes]
        if len(sources) != 1:
            return None
        part = sources[0]
    ids: Any = part.args[1]
    return (str(ids.target), str(ids.args)) if _is_word(part, labels) else None


@axes_of(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
)
def _convolution(node: fx.Node, labels: Labels) -> Axes:
    x, shape = labels.of(node.args[0]), labels.shape(node)
    first = x[0] if x is not None and len(x) == len(shape) else ((shape[0], "batch"),)
    window = labels.shape(node.args[1])[2:]  # type: ignore[arg-type]
    kept = [
        x is not None and len(x) == len(shape) and size == 1 and has_features(x[dim]) and size_of(x[dim]) == shape[dim]
        for dim, size in enumerate(window, 2)
    ]  # over heads and tokens of [B, h, T, d], each feature by itself
    places = [x[dim] if kept[dim - 2] else ((shape[dim], "token"),) for dim in range(2, len(shape))]  # type: ignore[index]
    return (first, ((shape[1], "feature"),), *places)


@axes_of(aten.stack.default)
def _stack(node: fx.Node, labels: Labels) -> Axes | None:
    """A new dimension: of tokens where these are the parts of one over tokens, or words of several inputs, else of features (heads,
    layers, members)."""
    parts: Any = node.args[0]
    known = next((part for part in parts if labels.of(part) is not None), None)
    if known is None:
        return _widest(node, labels)
    x, shape = labels.axes[known], labels.shape(node)
    dim = int(node.args[1]) % len(shape) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    return (*x[:dim], ((shape[dim], "token" if _are_tokens(parts, labels) else labels.stacked),), *x[dim:])


@axes_of(aten.cat.default)
def _cat(node: fx.Node, labels: Labels) -> Axes | None:
    """As the widest part; along a dimension of size 1 in all parts, [B, 1, D], as where these are stacked. What holds tokens in two
    dimensions beside it (channels of a picture cut apart) gets no others."""
    parts: Any = [part for part in node.args[0] if labels.of(part) is not None]  # type: ignore[union-attr]
    found, shape = _widest(node, labels), labels.shape(node)
    dim = int(node.args[1]) % len(shape) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    new = len(shape) > 2 and len(parts) > 1 and all(size_of(labels.axes[part][dim]) == 1 for part in parts)
    if found is None or not new or sum(are_tokens(axis) for i, axis in enumerate(found) if i != dim) > 1:
        return found
    if not _are_tokens(parts, labels):
        return found
    return (*found[:dim], ((shape[dim], "token"),), *found[dim + 1 :])


def _are_tokens(parts: Sequence[fx.Node], labels: Labels) -> bool:
    """Whether values that are joined along a new dimension are tokens of a sequence: parts of one value, cut apart where its tokens
    lie, or look-ups of a word per sample each."""
    cuts = [_cut_into_tokens(part, labels) for part in parts]
    found = [cut for cut in cuts if cut is not None]
    if len(found) == len(parts):
        return len({whole for whole, _ in found}) == 1 and len({places for _, places in found}) == len(parts)
    words = {_word(part, labels) for part in parts}
    return None not in words and len(words) == len(parts)


def _cut_into_tokens(part: fx.Node, labels: Labels) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """The value over tokens of which one token, or a run of them, made this part, and where it was cut out."""
    seen, todo = {part}, [part]
    places: list[Any] = []
    while todo:
        node = todo.pop()
        cut, place, of_tokens = _cut(node, labels)
        if of_tokens:
            places.append(place)
            todo = [cut]
            continue
        moved = node.target in RESHAPES or cut is not None
        if places and not (moved and node.args[0] in labels.axes):
            return node, tuple(places)
        if cut is not None and len(place) == 2:  # one entry, of what holds no tokens
            return None
        new = [n for n in node.all_input_nodes if n in labels.axes and n not in seen]
        seen.update(new)
        todo += new
    return None


def _cut(node: fx.Node, labels: Labels) -> tuple[Any, tuple[Any, ...], bool]:
    """Of what a value was cut out, where, and whether its tokens lie there; (None, (), False) for what is no part of another."""
    call: Any = node.args[0] if node.target is operator.getitem else node
    if call.target not in _CUTS or not isinstance(node.meta["val"], Tensor):  # all parts together are no part
        return None, (), False
    whole, *given = call.args
    x = labels.of(whole)
    single = call.target in (aten.select.int, aten.unbind.int)
    at = 0 if single or call.target is aten.slice.Tensor else 1
    dim = given[at] if len(given) > at else 0
    if x is None or (call.target is aten.slice.Tensor and node is not call):
        return None, (), False
    place = (dim, node.args[1:]) if single else (dim, node.args[1:], given)
    dim = dim % len(x)
    tokens = any(role == "token" for _, role in x[dim])
    # Of what is more than half of the whole there are no two that lie apart.
    apart = single or (tokens and 2 * labels.shape(node)[dim] <= size_of(x[dim]))
    return whole, tuple(map(str, place)), tokens and apart


@axes_of(aten.index.Tensor)
def _index(node: fx.Node, labels: Labels) -> Axes | None:
    """x[mask] of some tokens of every sample, [samples and tokens, …]; other indices as elementwise."""
    x, shape, indices = labels.of(node.args[0]), labels.shape(node), list(node.args[1])  # type: ignore[arg-type]
    first: Any = indices[0]
    mask = (
        len(indices) == 1 and first is not None and first.meta["val"].dtype == torch.bool and first.meta["val"].dim() == 2
    )
    if x is None or not mask or is_feature(x[1]) or shape[0] % size_of(x[0]):
        return _broadcast([x], shape) if x else _widest(node, labels)
    return ((*x[0], (shape[0] // size_of(x[0]), "token")), *x[2:])


@axes_of(*SUMS)
def _at_places(node: fx.Node, labels: Labels) -> Axes | None:
    """Sums at places: along a dimension of which the result has as many as there are samples, samples."""
    known = [labels.axes[n] for n in node.all_input_nodes if n in labels.axes]
    found, shape = _broadcast(known, labels.shape(node)), labels.shape(node)
    if found is None or any(role == "batch" for axis in found for _, role in axis) or shape[0] != _PRIMES[0]:
        return found
    return (((shape[0], "batch"),), *found[1:])


@axes_of(aten.im2col.default)
def _windows(node: fx.Node, labels: Labels) -> Axes | None:
    """[B, C, H, W] -> [B, C · window, windows]."""
    x, shape = labels.of(node.args[0]), labels.shape(node)
    if x is None:
        return _widest(node, labels)
    window = math.prod(node.args[1])  # type: ignore[arg-type]
    return (x[0], ((shape[1] // window, "feature"), (window, "token")), ((shape[2], "token"),))


@axes_of(aten.col2im.default)
def _from_windows(node: fx.Node, labels: Labels) -> Axes | None:
    x, shape = labels.of(node.args[0]), labels.shape(node)
    if x is None:
        return _widest(node, labels)
    return (x[0], ((shape[1], "feature"),), *(((size, "token"),) for size in shape[2:]))


@axes_of(aten.unfold.default)
def _unfold(node: fx.Node, labels: Labels) -> Axes | None:
    """One dimension -> windows there, and their entries at the end."""
    x, shape = labels.of(node.args[0]), labels.shape(node)
    if x is None:
        return _widest(node, labels)
    dim = int(node.args[1]) % len(x)  # type: ignore[arg-type]
    return (*x[:dim], _resize(x[dim], shape[dim]), *x[dim + 1 :], _resize(x[dim], shape[-1]))


@axes_of(aten.linear.default)
def _linear(node: fx.Node, labels: Labels) -> Axes | None:
    x, shape = labels.of(node.args[0]), labels.shape(node)
    return _widest(node, labels) if x is None else (*x[:-1], _made_by_layer(node, x, shape[-1]))


#: What may stand between a layer over tokens and the transpose that puts its results where the tokens were.
_BEFORE_TURNING = {
    aten.linear.default,
    aten.gelu.default,
    aten.relu.default,
    aten.relu6.default,
    aten.silu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.hardswish.default,
    aten.mish.default,
    aten.softplus.default,
    aten.layer_norm.default,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.add.Tensor,
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
}


def _made_by_layer(node: fx.Node, x: Axes, size: int) -> Axis:
    """What a layer makes of the last dimension: features; tokens, where it is one over tokens (of [*, D, T]) and turned back after."""
    over = len(x) > 1 and are_tokens(x[-1]) and has_features(x[-2])
    return ((size, "token" if over and _is_turned_back(node) else "feature"),)


def _is_turned_back(node: fx.Node) -> bool:
    """Whether all that is made of a value goes through a transpose of its last two dimensions."""
    readers = [user for user in node.users if isinstance(user.meta.get("val"), Tensor)]
    return bool(readers) and all(map(_turns_back, readers))


def _turns_back(node: fx.Node) -> bool:
    ndim = node.meta["val"].dim()
    if node.target is aten.transpose.int:
        return {dim % ndim for dim in node.args[1:]} == {ndim - 2, ndim - 1}
    if node.target is aten.permute.default:
        return [dim % ndim for dim in node.args[1][-2:]] == [ndim - 1, ndim - 2]  # type: ignore
    return node.target in _BEFORE_TURNING and _is_turned_back(node)


@axes_of(aten.scaled_dot_product_attention.default)
def _attention(node: fx.Node, labels: Labels) -> Axes | None:
    x, shape = labels.of(node.args[0]), labels.shape(node)
    values = labels.of(node.args[2])
    return _widest(node, labels) if x is None else (*x[:-1], values[-1] if values else ((shape[-1], "feature"),))


@axes_of(aten.matmul.default, aten.bmm.default)
def _product(node: fx.Node, labels: Labels) -> Axes | None:
    x, other, shape = labels.of(node.args[0]), labels.of(node.args[1]), labels.shape(node)
    if x is None:
        if len(shape) > 2:  # learned queries times keys, say
            return (*other[:-2], ((shape[-2], "token"),), other[-1]) if other and len(other) == len(shape) else None
        return _widest(node, labels)
    if len(shape) == len(x) - 1 and node.args[1].meta["val"].dim() == 1:  # type: ignore[union-attr]
        return x[:-1]  # times a vector
    if len(x) == len(shape):  # what several heads or experts read has their dimension afterwards
        own: Axes = tuple(((size, "feature"),) for size in shape)
        wider = other if other and len(other) == len(x) else own
        x = (*(a if size_of(a) == n else b for a, b, n in zip(x[:-2], wider, shape, strict=False)), *x[-2:])
    if other and len(other) == len(x) and is_feature(x[-1]) and is_feature(x[-2]) and not is_feature(other[-2]):
        # A map over tokens that a linear layer made (outlook attention): its rows are tokens where its columns are.
        x = (*x[:-2], other[-2] if size_of(other[-2]) == shape[-2] else x[-2], x[-1])
    return (*x[:-1], other[-1] if other and len(other) == len(x) else _made_by_layer(node, x, shape[-1]))


@axes_of(*RESHAPES)
def _reshape(node: fx.Node, labels: Labels) -> Axes | None:
    x = labels.of(node.args[0])
    return _widest(node, labels) if x is None else regroup(x, labels.shape(node))


@axes_of(aten.unsqueeze.default)
def _unsqueeze(node: fx.Node, labels: Labels) -> Axes | None:
    x = labels.of(node.args[0])
    if x is None:
        return _widest(node, labels)
    dim = int(node.args[1]) % (len(x) + 1)  # type: ignore[arg-type]
    return (*x[:dim], (), *x[dim:])


@axes_of(aten.expand.default)
def _expand(node: fx.Node, labels: Labels) -> Axes | None:
    """As elementwise; one sample that is repeated is no batch."""
    x, found, shape = labels.of(node.args[0]), _widest(node, labels), labels.shape(node)
    if x is None or found is None:
        return found
    repeated = {
        i for i, axis in enumerate(x, len(shape) - len(x)) if axis and axis[0] == (1, "batch") and shape[i] != size_of(axis)
    }
    return tuple(((shape[i], "feature"),) if i in repeated else axis for i, axis in enumerate(found))


@axes_of(aten.permute.default)
def _permute(node: fx.Node, labels: Labels) -> Axes | None:
    x = labels.of(node.args[0])
    return _widest(node, labels) if x is None else tuple(x[dim] for dim in node.args[1])  # type: ignore


@axes_of(aten.transpose.int)
def _transpose(node: fx.Node, labels: Labels) -> Axes | None:
    x = labels.of(node.args[0])
    if x is None:
        return _widest(node, labels)
    moved, (a, b) = list(x), node.args[1:3]
    moved[a], moved[b] = moved[b], moved[a]  # type: ignore[index]
    return tuple(moved)


@axes_of(aten.select.int)
def _select(node: fx.Node, labels: Labels) -> Axes | None:
    x = labels.of(node.args[0])
    if x is None:
        return _widest(node, labels)
    dim = int(node.args[1]) % len(x)  # type: ignore[arg-type]
    return (*x[:dim], *x[dim + 1 :])


@axes_of(*REDUCTIONS)
def _reduction(node: fx.Node, labels: Labels) -> Axes | None:
    x = labels.of(node.args[0])
    if x is None:
        return _widest(node, labels)
    norms = (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
    given: Any = node.args[2] if node.target in norms else node.args[1]
    dims = {dim % len(x) for dim in ([given] if isinstance(given, int) else given or range(len(x)))}
    kept = len(labels.shape(node)) == len(x)
    return tuple(() if i in dims else axis for i, axis in enumerate(x) if kept or i not in dims)


def _resize(axis: Axis, size: int) -> Axis:
    """An axis of which a part is taken, or that is enlarged."""
    if size_of(axis) == size:
        return axis
    if size == 1:
        return ()
    roles = {role for _, role in axis}
    role: Role = "token" if "token" in roles else "batch" if "batch" in roles else "feature"
    return ((size, role),)


def _broadcast(known: list[Axes], shape: tuple[int, ...]) -> Axes | None:
    """Axes of an elementwise result, a concatenation or a part: per dimension, those of the widest operand."""
    if not known:
        return None
    out: list[Axis] = []
    for position in range(1, len(shape) + 1):
        candidates = [x[-position] for x in known if len(x) >= position and x[-position]]
        exact = [axis for axis in candidates if size_of(axis) == shape[-position]]
        widest: Axis = max(candidates, key=size_of, default=((shape[-position], "feature"),))
        out.append(_resize(exact[0] if exact else widest, shape[-position]))
    return tuple(reversed(out))
