"""What each dimension of each value stands for: batch, token or feature.

A dimension is a tuple of factors (size, role); reshaping regroups factors, so that merged and split dimensions keep their
meaning. Symbolic sizes are replaced by large primes, which makes "the same size" a comparison of integers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

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
    """Sizes as integers, with a prime in the place of every symbol."""

    def __init__(self, batch: set[str]) -> None:
        self._values: dict[str, int] = dict.fromkeys(batch, _PRIMES[0])

    def __call__(self, size: Any) -> int:
        """One size, symbolic or not."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if str(symbol) not in self._values:
                self._values[str(symbol)] = _PRIMES[len(set(self._values.values())) % len(_PRIMES)]
        return int(expression.subs({s: self._values[str(s)] for s in expression.free_symbols}))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's value."""
        return tuple(self(size) for size in node.meta["val"].shape)


def is_feature(axis: Axis) -> bool:
    """Whether a dimension holds nothing but features (sizes of 1 count as such)."""
    return all(role == "feature" for _, role in axis)


def is_readable(axes: Axes) -> bool:
    """Whether samples have a dimension of their own, and no dimension holds tokens and features at once."""
    return all(len({role for _, role in axis}) < 2 for axis in axes)


def size_of(axis: Axis) -> int:
    """Number of entries along a dimension."""
    return math.prod(size for size, _ in axis)


def regroup(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes after a reshape to `shape`, or None where a boundary cuts through a factor that cannot be split."""
    factors = [factor for axis in axes for factor in axis if factor[0] != 1]
    out: list[Axis] = []
    for size in shape:
        taken: list[Factor] = []
        missing = size
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
            else:
                return None
        out.append(tuple(taken))
    return tuple(out) if not factors else None


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


def label(nodes: Sequence[fx.Node], active: set[fx.Node], sizes: Sizes) -> dict[fx.Node, Axes]:
    """Axes of every active value whose dimensions can be followed from the inputs."""
    axes: dict[fx.Node, Axes] = {}
    for node in nodes:
        if node not in active or not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            continue
        found = _label(node, axes, sizes)
        if found is not None:
            axes[node] = found
    return axes


def _label(node: fx.Node, axes: dict[fx.Node, Axes], sizes: Sizes) -> Axes | None:
    value = node.meta["val"]
    if node.op == "placeholder":
        return _input_axes(sizes.shape(node))
    target: Any = node.target
    args: tuple[Any, ...] = node.args
    if target is operator.getitem:
        return _part(node, axes, sizes)
    known = [axes[n] for n in node.all_input_nodes if n in axes]
    if not isinstance(value, Tensor):
        return known[0] if known else None  # a tuple of parts: the axes of the whole, `_part` takes them apart
    shape = sizes.shape(node)
    x = axes.get(args[0]) if args and isinstance(args[0], fx.Node) else None
    if target is aten.embedding.default:
        roles: list[Role] = ["batch", "token"] if len(shape) >= 3 else ["token"]
        roles += ["token"] * (len(shape) - 1 - len(roles))
        return (*(((size, role),) for size, role in zip(shape, roles, strict=False)), ((shape[-1], "feature"),))
    if target in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
        first = x[0] if x is not None and len(x) == len(shape) else ((shape[0], "batch"),)
        return (first, ((shape[1], "feature"),), *(((size, "token"),) for size in shape[2:]))
    if target is aten.im2col.default and x is not None:  # [B, C, H, W] -> [B, C · window, windows]
        window = math.prod(args[1])
        return (x[0], ((shape[1] // window, "feature"), (window, "token")), ((shape[2], "token"),))
    if target is aten.col2im.default and x is not None:
        return (x[0], ((shape[1], "feature"),), *(((size, "token"),) for size in shape[2:]))
    if target is aten.unfold.default and x is not None:  # one dimension -> windows there, and their entries at the end
        dim = args[1] % len(x)
        windows = _resize(x[dim], shape[dim])
        return (*x[:dim], windows, *x[dim + 1 :], _resize(x[dim], shape[-1]))
    if x is None and target in (aten.matmul.default, aten.bmm.default) and len(shape) > 2:
        right = axes.get(args[1])  # learned queries times keys, say
        return (*right[:-2], ((shape[-2], "token"),), right[-1]) if right and len(right) == len(shape) else None
    if x is None:
        return _broadcast(known, shape)
    if target is aten.linear.default:
        return (*x[:-1], ((shape[-1], "feature"),))
    if target is aten.scaled_dot_product_attention.default:
        values = axes.get(args[2])
        return (*x[:-1], values[-1] if values else ((shape[-1], "feature"),))
    if target in (aten.matmul.default, aten.bmm.default):
        other = axes.get(args[1]) if isinstance(args[1], fx.Node) else None
        if other and len(other) == len(x) and is_feature(x[-1]) and is_feature(x[-2]) and not is_feature(other[-2]):
            # A map over tokens that a linear layer made (outlook attention): its rows are tokens where its columns are.
            x = (*x[:-2], other[-2] if size_of(other[-2]) == shape[-2] else x[-2], x[-1])
        return (*x[:-1], other[-1]) if other and len(other) == len(x) else (*x[:-1], ((shape[-1], "feature"),))
    if target in RESHAPES:
        return regroup(x, shape)
    if target is aten.permute.default:
        return tuple(x[dim] for dim in args[1])
    if target is aten.transpose.int:
        moved = list(x)
        a, b = args[1], args[2]
        moved[a], moved[b] = moved[b], moved[a]
        return tuple(moved)
    if target is aten.select.int:
        dim = args[1] % len(x)
        return (*x[:dim], *x[dim + 1 :])
    if target in REDUCTIONS:
        given = args[2] if target is aten.linalg_vector_norm.default or target is aten.norm.ScalarOpt_dim else args[1]
        dims = {dim % len(x) for dim in ([given] if isinstance(given, int) else given or range(len(x)))}
        return tuple(() if i in dims else axis for i, axis in enumerate(x) if len(shape) == len(x) or i not in dims)
    return _broadcast(known, shape)


def _input_axes(shape: tuple[int, ...]) -> Axes:
    roles: list[Role] = ["token"] * len(shape)
    if shape:
        roles[0] = "batch"
    if len(shape) == 4:
        roles[1] = "feature"
    elif len(shape) == 3:
        roles[2] = "feature"
    return tuple(((size, role),) for size, role in zip(shape, roles, strict=True))


def _part(node: fx.Node, axes: dict[fx.Node, Axes], sizes: Sizes) -> Axes | None:
    whole: Any = node.args[0]
    x = axes.get(whole)
    if x is None:
        return None
    shape = sizes.shape(node)
    if len(shape) == len(x) - 1:  # unbind
        dim = (whole.args[1] if len(whole.args) > 1 else 0) % len(x)
        return (*x[:dim], *x[dim + 1 :])
    return _broadcast([x], shape)


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
