"""Facts about a captured graph that the transform needs before it walks it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastrel import axes as axes_
from fastrel.capture import Captured, insert_call
from fastrel.errors import InputError, UnsupportedModelError

aten = torch.ops.aten

#: Operators that return their first argument unchanged at inference.
IDENTITIES = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.type_as.default,
}

ACTIVATIONS = {
    aten.gelu.default,
    aten.relu.default,
    aten.relu_.default,
    aten.silu.default,
    aten.silu_.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.hardtanh.default,
    aten.relu6.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.softplus.default,
    aten.mish.default,
    aten.erf.default,
    aten.exp.default,
    aten.neg.default,
    aten.abs.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.square.default,
    aten.log.default,
    aten.log1p.default,
    aten.sin.default,
    aten.cos.default,
    aten.log_sigmoid.default,
    aten.selu.default,
    aten.celu.default,
    aten.hardshrink.default,
    aten.threshold.default,
    aten.pow.Tensor_Scalar,
    aten.clamp.default,
    aten.clamp_min.default,
}

ARITHMETIC = {
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.mul_.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
}


_ALONG_HEADS = {
    *IDENTITIES,
    aten.permute.default,
    aten.transpose.int,
    aten.linear.default,
    aten.conv2d.default,
    aten.batch_norm.default,
}


class Analysis:
    """What depends on the input, where the attention maps are, and what lies between them and the prediction."""

    def __init__(self, captured: Captured, leaves: Sequence[fx.Node], start_layer: int) -> None:
        nodes = list(captured.graph.nodes)
        self.leaves = list(leaves)
        self.active = _active(captured, nodes)
        for leaf in leaves:
            if leaf not in self.active:
                raise UnsupportedModelError(f"the output {leaf} does not depend on the input")
        sizes = axes_.Sizes({entry[0] for entry in captured.sizes if entry and isinstance(entry[0], str)})
        self.axes = axes_.label(nodes, self.active, sizes)
        moved = [
            _einsums_as_products(captured.graph),
            _maps_on_the_left(captured.graph),
            _heads_beside_tokens(captured.graph, self.axes),
            _heads_in_dimension_one(captured.graph, self.axes),
        ]
        if any(moved):
            nodes = list(captured.graph.nodes)
            self.active = _active(captured, nodes)
            self.axes = axes_.label(nodes, self.active, sizes)
        self.sizes = sizes
        self.roots = _pointwise_roots(nodes, self.active)
        found = self._attention_blocks(nodes)
        self.total_blocks = len(found)
        if not -len(found) <= start_layer < len(found):
            raise InputError(
                f"start_layer {start_layer} is out of range: the model has {len(found)} attention blocks, "
                f"so use {-len(found)} to {len(found) - 1}"
            )
        start = start_layer % len(found)
        self.blocks = {node: i for i, node in enumerate(found) if i >= start}
        self.needed = _downstream(nodes, set(self.blocks), self.active)

    def is_scale(self, x: Any) -> bool:
        """Whether x is a number per token made of all its features, the divisor or factor of a spelled-out norm."""
        node, reduced = x, False
        while isinstance(node, fx.Node) and node in self.active:
            if node.target in axes_.REDUCTIONS:
                reduced = True
                break
            moves = node.target in (aten.expand.default, aten.expand_as.default, aten.unsqueeze.default)
            if not is_pointwise(node) and not moves:
                return False
            sources = [n for n in ([node.args[0]] if moves else node.all_input_nodes) if n in self.active]
            if len(sources) != 1:
                return False
            node = sources[0]
        if not reduced:
            return False
        source, reduction = self.axes.get(node.args[0]), self.axes.get(node)
        if source is None or reduction is None:
            return False
        if len(reduction) == len(source) - 1:  # without the dimension, which is put back later
            return node.args[1] in ([-1], [len(source) - 1])
        return len(source) == len(reduction) and not reduction[-1]

    def _mixes_tokens(self, node: fx.Node) -> bool:
        """Whether a product is A·V with A a map over tokens: maps over channels are no attention blocks of the method."""
        if not is_attention_value(node) and not is_talking_heads_value(node):
            return False
        maps, values = (self.axes.get(x) for x in node.args[:2])  # type: ignore[arg-type]
        over_tokens = values is not None and len(values) > 1 and not axes_.is_feature(values[-2])
        return maps is None or not axes_.is_feature(maps[-1]) or over_tokens

    def recomputed(self, memory: str) -> Callable[[fx.Node], bool]:
        """Which values the reverse pass computes again instead of keeping them.

        "normal": activation functions and layer norms, which are quick. "low": all but those through which all flows.
        """
        quick = {*ACTIVATIONS, *IDENTITIES, aten.layer_norm.default}
        kept = _bottlenecks(self.active) if memory == "low" else self.active

        def again(x: fx.Node) -> bool:
            if x not in self.active or x.op != "call_function" or x.target is aten.embedding.default:
                return False
            return x.target in quick or x not in kept

        return again

    def _attention_blocks(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Nodes that mix values by an attention map: fused attention, or a matrix product with a softmax on its left."""
        relevant = _upstream(self.leaves)
        found = [
            node
            for node in nodes
            if node in relevant
            and node in self.active
            and (node.target is aten.scaled_dot_product_attention.default or self._mixes_tokens(node))
        ]
        if not found:
            raise UnsupportedModelError(
                "no attention was found between the input and the prediction; fastrel explains transformers"
            )
        return found


def _product_like(node: fx.Node, target: Any, a: Any, b: Any) -> fx.Node:
    """A product in the place of a node, found under the same line of the model."""
    product = insert_call(node.graph, target, a, b)
    product.meta |= {name: x for name, x in node.meta.items() if name != "val"}
    return product


def _einsums_as_products(graph: fx.Graph) -> bool:
    """einsum("bhlt,bhtv->bhlv", a, b) and ("bhlk,bhtk->bhlt") become matrix products; whether there was any."""
    found = False
    for node in list(graph.nodes):
        if node.target is not aten.einsum.default or len(node.args[1]) != 2 or "." in node.args[0]:
            continue
        operands, _, result = node.args[0].replace(" ", "").partition("->")
        left, _, right = operands.partition(",")
        batch, i, j = result[:-2], result[-2:-1], result[-1:]
        summed = set(left) & set(right) - set(result)
        if (
            len(result) < 3
            or len(summed) != 1
            or left != batch + i + (k := summed.pop())
            or right not in (batch + k + j, batch + j + k)
        ):
            continue
        a, b = node.args[1]
        with graph.inserting_before(node):
            b = b if right.endswith(k + j) else insert_call(graph, aten.transpose.int, b, -2, -1)
            product = _product_like(node, aten.matmul.default, a, b)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        found = True
    return found


def _maps_on_the_left(graph: fx.Graph) -> bool:
    """V Aᵀ becomes (A Vᵀ)ᵀ; whether there was any."""
    found = False
    for node in list(graph.nodes):
        if node.target not in (aten.matmul.default, aten.bmm.default):
            continue
        v, turned = node.args
        if not isinstance(turned, fx.Node) or turned.target is not aten.transpose.int:
            continue
        attn, ndim = turned.args[0], turned.meta["val"].dim()
        if {dim % ndim for dim in turned.args[1:]} != {ndim - 2, ndim - 1} or not is_softmax_over_keys(attn):
            continue
        with graph.inserting_before(node):
            values = insert_call(graph, aten.transpose.int, v, -2, -1)
            product = _product_like(node, node.target, attn, values)
            # In the layout that the model's own product has.
            result = insert_call(graph, aten.contiguous.default, insert_call(graph, aten.transpose.int, product, -2, -1))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        found = True
    return found


def _heads_in_dimension_one(graph: fx.Graph, axes: dict[fx.Node, axes_.Axes]) -> bool:
    """Give A·V spelled out the form [batch and windows, heads, T, ·]; whether there was any with heads elsewhere.

    [B·h, windows, T, ·] and [B, h, windows, T, ·] have them elsewhere.
    """
    found = False
    for node in list(graph.nodes):
        if not is_attention_value(node) or node.args[0] not in axes or node.args[0].meta["val"].dim() < 4:
            continue
        lead = axes[node.args[0]][:-2]
        plain = len(lead) == 2 and axes_.is_feature(lead[1]) and not any(role == "feature" for _, role in lead[0])
        factors = [factor for axis in lead for factor in axis]
        counts = [sum(role == "batch" for _, role in factors), *(isinstance(n, int) for n in node.meta["val"].shape[1:])]
        if plain or counts[0] != 1 or not all(counts[1:]) or factors[0][1] != "batch":
            continue
        sizes = [-1, *(size for size, _ in factors[1:])]
        order = sorted(range(len(factors)), key=lambda i: factors[i][1] == "feature")
        heads = math.prod(size for size, role in factors if role == "feature")
        rest, last = len(factors), node.meta["val"].shape
        back = [order.index(i) for i in range(rest)]

        def moved(x: Any, sizes: Any = sizes, order: Any = order, heads: int = heads, rest: int = rest) -> fx.Node:
            ends = list(x.meta["val"].shape[-2:])
            split = insert_call(graph, aten.reshape.default, x, [*sizes, *ends])
            turned = insert_call(graph, aten.permute.default, split, [*order, rest, rest + 1])
            return insert_call(graph, aten.reshape.default, turned, [-1, heads, *ends])

        with graph.inserting_before(node):
            product = _product_like(node, node.target, moved(node.args[0]), moved(node.args[1]))
            split = insert_call(graph, aten.reshape.default, product, [*(sizes[i] for i in order), *last[-2:]])
            turned = insert_call(graph, aten.permute.default, split, [*back, rest, rest + 1])
            result = insert_call(graph, aten.reshape.default, turned, [-1, *last[1:]])
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        found = True
    return found


def _heads_beside_tokens(graph: fx.Graph, axes: dict[fx.Node, axes_.Axes]) -> bool:
    """Give fused attention its heads next to its tokens; whether there was any that had them elsewhere.

    [B, h, windows, T, d] becomes [B, windows, h, T, d], and [B·h, T, d] becomes [B, h, T, d].
    """
    found = False
    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or node.args[0] not in axes:
            continue
        q = axes[node.args[0]]
        merged = [size for size, role in q[0] if role != "batch"]
        windows = len(q) == 5 and axes_.is_feature(q[1]) and len(node.args) == 3
        if windows and (not axes_.is_feature(q[2]) or (q[1] and not q[2])):  # a single window has size 1
            there: Any = (aten.transpose.int, 1, 2)
            back = there
        elif len(q) == 3 and merged and q[0][0][1] == "batch":
            there, back = (aten.unflatten.int, 0, [-1, math.prod(merged)]), (aten.flatten.using_ints, 0, 1)
        else:
            continue

        def moved(x: Any, how: Any) -> Any:
            if not isinstance(x, fx.Node) or x.meta["val"].dim() < 3:
                return x
            new = graph.call_function(how[0], (x, *how[1:]))
            new.meta = {**x.meta, "val": how[0](x.meta["val"], *how[1:])}
            return new

        with graph.inserting_before(node):
            node.args = tuple(moved(x, there) for x in node.args)
            node.kwargs = {name: moved(x, there) for name, x in node.kwargs.items()}
        node.meta["val"] = there[0](node.meta["val"], *there[1:])
        with graph.inserting_after(node):
            result = moved(node, back)
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
        found = True
    return found


def _active(captured: Captured, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Values that depend on the input through floating-point numbers, or on token ids through an embedding."""
    varying = set(captured.inputs)
    active: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            if node in varying and _is_float(node):
                active.add(node)
            continue
        if isinstance(node.meta.get("val"), (Tensor, list, tuple)) and any(n in varying for n in node.all_input_nodes):
            varying.add(node)  # sizes do not count
        if node.op != "call_function" or not (_is_float(node) or isinstance(node.meta.get("val"), (list, tuple))):
            continue
        looks_up = node.target is aten.embedding.default and node.args[1] in varying
        if looks_up or any(n in active for n in node.all_input_nodes):
            active.add(node)
    return active


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def is_pointwise(node: fx.Node) -> bool:
    """Whether each entry of the result depends on one entry of each operand."""
    return node.target in ACTIVATIONS or node.target in ARITHMETIC or node.target in IDENTITIES


def _pointwise_roots(nodes: Sequence[fx.Node], active: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For values that are pointwise functions of one single activation: that activation (else the value itself).

    x·σ(1.7x) is such a function of x, and passes relevance like any activation function; u·v is not.
    """
    roots: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in active:
            continue
        sources = {roots[n] for n in node.all_input_nodes if n in active} if is_pointwise(node) else set()
        same_shape = len(sources) == 1 and next(iter(sources)).meta["val"].shape == node.meta["val"].shape
        roots[node] = sources.pop() if same_shape else node
    return roots


def is_attention_value(node: fx.Node) -> bool:
    """Whether a matrix product is A·V: its left operand is a softmax over keys, possibly copied or reshaped."""
    if node.target not in (aten.matmul.default, aten.bmm.default):
        return False
    return is_softmax_over_keys(node.args[0])


def is_softmax_over_keys(attn: Any) -> bool:
    """Whether a value is a softmax over its last dimension, possibly copied, reshaped or scaled by rows, or a sum of such."""
    while isinstance(attn, fx.Node) and (attn.target in IDENTITIES or attn.target in axes_.RESHAPES or _keeps_keys(attn)):
        attn = attn.args[0]
    if not isinstance(attn, fx.Node):
        return False
    if attn.target in (aten.mul.Tensor, aten.div.Tensor):
        return any(is_softmax_over_keys(x) and _one_per_row(other) for x, other in (attn.args[:2], attn.args[1::-1]))
    if attn.target is aten.add.Tensor:
        return all(is_softmax_over_keys(x) for x in attn.args[:2])
    return attn.target in (aten.softmax.int, aten._softmax.default) and attn.args[1] in (-1, attn.meta["val"].dim() - 1)


def _one_per_row(x: Any) -> bool:
    """Whether a factor is the same for all keys."""
    return not isinstance(x, fx.Node) or not x.meta["val"].dim() or x.meta["val"].shape[-1] == 1


def _keeps_keys(node: fx.Node) -> bool:
    """Whether a value is a permutation of another one's dimensions that leaves the last where it is."""
    return node.target is aten.permute.default and node.args[1][-1] in (-1, len(node.args[1]) - 1)  # type: ignore


def is_talking_heads_value(node: fx.Node) -> bool:
    """Whether a matrix product is A'·V with A' a mixture of several heads' softmax maps."""
    if node.target not in (aten.matmul.default, aten.bmm.default):
        return False
    attn, mixed = node.args[0], False
    while isinstance(attn, fx.Node) and attn.target in _ALONG_HEADS:
        mixed = mixed or attn.target in (aten.linear.default, aten.conv2d.default)
        attn = attn.args[0]
    return mixed and isinstance(attn, fx.Node) and attn.target in (aten.softmax.int, aten._softmax.default)


def _upstream(leaves: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(leaves)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _bottlenecks(active: set[fx.Node]) -> set[fx.Node]:
    """Activations from which alone everything after them is computed: the residual stream between blocks, mostly."""
    found: set[fx.Node] = set()
    order = [node for node in next(iter(active)).graph.nodes if node in active]
    position = {node: i for i, node in enumerate(order)}
    position |= {node: len(order) for node in order[0].graph.nodes if node.op == "output"}
    ends = {node: max((position.get(user, i) for user in node.users), default=i) for node, i in position.items()}
    alive: set[fx.Node] = set()
    for i, node in enumerate(order):
        alive = {x for x in alive if ends[x] > i} | {node}
        if len(alive) == 1:
            found.add(node)
    return found


def _downstream(nodes: Sequence[fx.Node], sources: set[fx.Node], active: set[fx.Node]) -> set[fx.Node]:
    found = set(sources)
    for node in nodes:
        if node in active and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found
