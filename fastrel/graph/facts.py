"""Facts about a captured graph that the transform needs before it walks it. Read-only."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from fastrel.errors import InputError, UnsupportedModelError
from fastrel.graph import axes as axes_
from fastrel.graph import mixing
from fastrel.graph.nodes import describe
from fastrel.graph.patterns import (
    ACTIVATIONS,
    ALIASES,
    ARITHMETIC,
    CONSTANTS,
    IDENTITIES,
    enters,
    is_attention_value,
    is_pointwise,
    is_talking_heads_value,
    reads,
    whole_of_keys,
)

aten = torch.ops.aten

#: Whether the reverse pass keeps what it needs, or computes most of it again.
Memory = Literal["normal", "low"]
MEMORIES: tuple[Memory, ...] = get_args(Memory)


class Facts:
    """Which values depend on the input, what their dimensions are, and which are functions of one other value.

    Attributes:
        nodes: all nodes of the graph, in order; inputs: those that hold the model's inputs.
        active: those whose values depend on the model's input.
        axes: what the dimensions of active values stand for.
        sizes: sizes as integers, symbols as primes.
        roots: for values that are pointwise functions of one single activation, that activation; else the value itself.
        sources: the inputs of the model that active values depend on.
        joined: for inputs of integers that are joined before they are looked up, what they become.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[fx.Node], batch: set[str]) -> None:
        self.nodes = list(graph.nodes)
        self.inputs = list(inputs)
        self.active = _active(self.nodes, inputs)
        self.sizes = axes_.Sizes(batch)
        self.axes = axes_.label(self.nodes, self.active, self.sizes)
        self.roots = _pointwise_roots(self.nodes, self.active)
        self.sources = _sources(self.nodes, self.active, inputs)
        self.joined = _joined(self.nodes, inputs)
        self._in_a_row = _in_a_row(self.nodes, self.active, self.axes, self.sources)
        self._numbers = {node: i for i, node in enumerate(self.nodes) if node in self.active}

    def enters(self, x: fx.Node) -> bool:
        """Whether x is where an input of the model becomes numbers: that input itself, or a look-up or cast of its integers."""
        return x.op == "placeholder" or (enters(x) and not any(n in self.active for n in x.all_input_nodes))

    def source(self, x: fx.Node) -> fx.Node:
        """The first of the model's inputs that x depends on."""
        return next(node for node in self.inputs if node in self.sources[x])

    def sequences(self, x: fx.Node) -> set[Any]:
        """The sequences of tokens that x is made of: inputs; but those over the same tokens ([B, T, …], T alike) are one, unless
        one comes after the other."""
        if x in self._in_a_row:
            return set(self.sources[x])
        sources = {self.joined.get(node, node) for node in self.sources[x]}
        shapes = {node: tuple(str(size) for size in node.meta["val"].shape) for node in sources}
        return {node if len(shape) > 3 else shape[1:2] for node, shape in shapes.items()}

    def are_streams(self, operands: Sequence[fx.Node], blocks: Collection[fx.Node]) -> bool:
        """Whether the operands of a sum are streams of tokens: each with attention blocks that no other has, and, where they come
        from the same, with a way there past these blocks (else they are what one block adds up to)."""
        if len(operands) < 2:
            return False
        mask = self._bits(blocks)
        every, past = self._ancestors(operands, set()), self._ancestors(operands, set(blocks))
        for i, (whole, free) in enumerate(zip(every, past, strict=True)):
            others = 0
            for j, other in enumerate(every):
                others |= other if j != i else 0
            if whole & others and not (whole & ~others & mask and free & others):
                return False
        return True

    def own_attention(self, operands: Sequence[fx.Node], blocks: Collection[fx.Node]) -> list[bool]:
        """For each of some values whether it comes by attention blocks that others of them do not come by."""
        mask = self._bits(blocks)
        every = [bits & mask for bits in self._ancestors(operands, set())]
        common = functools.reduce(operator.and_, every)
        return [bool(bits & ~common) for bits in every]

    def _bits(self, values: Collection[fx.Node]) -> int:
        return sum(1 << self._numbers[x] for x in values)

    def _ancestors(self, ends: Sequence[fx.Node], stop: set[fx.Node]) -> list[int]:
        """What each of some values is made of, as bits; not what lies beyond `stop`."""
        found: dict[fx.Node, int] = {}
        for node in self.nodes:
            if node in self._numbers:
                bits = 1 << self._numbers[node]
                for x in () if node in stop else reads(node):
                    bits |= found.get(x, 0)
                found[node] = bits
        return [found[end] for end in ends]

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

    def are_same_tokens(self, q: fx.Node, v: fx.Node) -> bool:
        """Whether queries and values [*, T, d] of attention are of the same tokens: from the same inputs, as many, and by the same
        attention blocks (in cross-attention, those of a decoder lie on the way to the queries alone)."""
        lengths = {self.sizes.shape(x)[-2] for x in (q, v)}
        return len(lengths) == 1 and self.sources[q] == self.sources[v] and self._attended[q] == self._attended[v]

    @functools.cached_property
    def _attended(self) -> dict[fx.Node, int]:
        """The attention blocks that lie on the way to each value, as bits."""
        found: dict[fx.Node, int] = {}
        for node in self.nodes:
            if node in self.active:
                bits = functools.reduce(operator.or_, (found.get(x, 0) for x in reads(node)), 0)
                found[node] = bits | (1 << self._numbers[node] if self._attends(node) else 0)
        return found

    def _attends(self, node: fx.Node) -> bool:
        """Whether a value is what an attention block makes of its values, mixing tokens by a map."""
        return node.target is aten.scaled_dot_product_attention.default or self._mixes_tokens(node)

    def is_mixed_value(self, node: fx.Node) -> bool:
        """Whether a product is A·V with A no softmax over keys, but any other map over tokens, or one mixed over heads."""
        if is_attention_value(node):
            return is_talking_heads_value(node)
        return is_talking_heads_value(node) or mixing.is_map_value(node, self.axes)

    def not_followed(self, node: fx.Node) -> UnsupportedModelError:
        """What to say of a value whose dimensions are not known: the first operator on the way to it that lost them."""
        seen, todo = {node}, [node]
        while todo:
            lost = todo.pop()
            before = [x for x in reads(lost) if x in self.active and x not in self.axes]
            if not before:
                break
            todo += [x for x in before if x not in seen]
            seen.update(before)
        return UnsupportedModelError(
            f"cannot follow tokens through {describe(lost)}; where no attention comes after it, let the model return what goes into it "
            "and target= be a function that does the rest"
        )

    def unknown_mixing(self, node: fx.Node) -> str | None:
        """What to say of a product that mixes tokens by a map that is not known, or brings sums over them back; else None."""
        if node.target not in mixing.MATRIX_PRODUCTS or self._attends(node):
            return None
        if mixing.is_product_of_maps(node.args[0], self.axes) and not mixing.is_product_of_maps(node, self.axes):
            return (
                f"cannot follow tokens through {describe(node)}: it mixes them by a matrix that is no softmax, a product of maps, as "
                "approximations of attention are (Nyström's)"
            )
        sums = mixing.brought_back(node, self.axes)
        if sums is None:
            return None
        return (
            f"{describe(node)} brings to each token what {describe(sums)} summed over them: linear attention in a form whose map "
            "is not found; write it as q @ (k.mT @ v), or as (q @ k.mT) @ v"
        )

    def queries(self, attn: fx.Node) -> fx.Node | None:
        """The queries Q [*, Tq, d] of an attention map [*, Tq, Tk] made of scores QKᵀ; None where none are found: these were turned
        or have other dimensions."""
        shape, seen, todo = self.sizes.shape(attn), {attn}, [attn]
        keys = {shape[-1]}  # more where some of the columns are sinks
        while todo:
            node = todo.pop(0)
            if node not in self.active or len(own := self.sizes.shape(node)) < 2 or _turns(node):
                continue
            if own[-2] != shape[-2] or own[-1] not in keys:
                continue
            if node.target in (aten.matmul.default, aten.bmm.default):
                q: Any = node.args[0]
                return q if self.sizes.shape(q)[:-1] == shape[:-1] else None
            whole = whole_of_keys(node)
            sources = reads(node) if whole is None else [whole]
            if whole is not None or node.target is aten.cat.default:
                keys.update(self.sizes.shape(x)[-1] for x in sources if x in self.active)
            todo += [x for x in sources if x not in seen]
            seen.update(todo)
        return None

    def recomputed(self, memory: Memory, device: torch.device) -> Callable[[fx.Node], bool]:
        """Which values the reverse pass computes again instead of keeping them.

        "normal": on a CPU activation functions and layer norms, which are quick there; on a GPU, where each would be a launch, what
        a training step keeps is kept. "low": all but those through which all flows.
        """
        quick = {*ACTIVATIONS, *IDENTITIES, aten.layer_norm.default}
        if device.type == "cuda" and memory == "normal":
            quick = ALIASES
        kept = _bottlenecks(self.active) if memory == "low" else self.active

        def again(x: fx.Node) -> bool:
            if x not in self.active or x.op != "call_function" or self.enters(x):
                return False
            return x.target in quick or x not in kept

        return again

    def _mixes_tokens(self, node: fx.Node) -> bool:
        """Whether a product is A·V with A a map over tokens: maps over channels are no attention blocks of the method."""
        if not is_attention_value(node) and not is_talking_heads_value(node):
            return mixing.is_map_value(node, self.axes)
        if self._is_factorised(node):
            return False
        maps, values = (self.axes.get(x) for x in node.args[:2])  # type: ignore[arg-type]
        over_tokens = values is not None and len(values) > 1 and not axes_.is_feature(values[-2])
        # The axis of a single token looks like one of features.
        return maps is None or not axes_.is_feature(maps[-1]) or axes_.size_of(maps[-1]) == 1 or over_tokens

    def _is_factorised(self, node: fx.Node) -> bool:
        """Whether a value is softmax(Kᵀ) V of [*, d, d], which queries are multiplied with afterwards."""
        if not is_attention_value(node) or node not in self.active or (axes := self.axes.get(node)) is None:
            return False
        if not axes_.is_feature(axes[-2]) or axes_.size_of(axes[-2]) == 1:
            return False
        todo, seen = [node], {node}
        while todo:
            for user in todo.pop().users:
                if user.target in (aten.matmul.default, aten.bmm.default):
                    if user.args[1] not in seen:
                        return False
                elif user.target in IDENTITIES or user.target in ARITHMETIC or user.target in axes_.RESHAPES:
                    todo.append(user)
                    seen.add(user)
                else:
                    return False
        return True

    def _refuse_complex_numbers(self, relevant: set[fx.Node]) -> None:
        for node in self.nodes:
            value = node.meta.get("val")
            is_complex = node in relevant and isinstance(value, Tensor) and value.is_complex()
            if is_complex and self.active.intersection(reads(node)):
                raise UnsupportedModelError(
                    f"{describe(node)} makes complex numbers of activations, for which there are no rules; compute with their parts"
                )

    def attention_blocks(self, leaves: Sequence[fx.Node]) -> list[fx.Node]:
        """Nodes that mix values by an attention map on the way to `leaves`: fused attention, or a product with a softmax
        on its left. In the order of the forward pass.

        Raises:
            UnsupportedModelError: there is none, or an output does not depend on the input.
        """
        relevant = _upstream(leaves)
        for leaf in leaves:
            if leaf not in self.active:
                self._refuse_complex_numbers(relevant)
                raise UnsupportedModelError(f"the output {leaf} does not depend on the input")
        found = [node for node in self.nodes if node in relevant and node in self.active and self._attends(node)]
        if not found:
            for node in self.nodes:
                if node in relevant and self._is_factorised(node):
                    raise UnsupportedModelError(
                        f"{describe(node)} is factorised attention, keys times values before queries: no map over tokens is made, "
                        "and the method chains such maps"
                    )
            raise UnsupportedModelError(
                "no attention was found between the input and the prediction; fastrel explains transformers, of which this has no block"
                " on its way (for other models: captum)"
            )
        self._refuse_complex_numbers(relevant)
        for node in found:
            self._refuse_mixed_samples(node)
        return found

    def _refuse_mixed_samples(self, block: fx.Node) -> None:
        """Raise UnsupportedModelError where the values that a block mixes are those of samples, not of tokens."""
        values: Any = block.args[2 if block.target is aten.scaled_dot_product_attention.default else 1]
        axes = self.axes.get(values, ())
        if len(axes) > 1 and axes[-2] and all(role == "batch" for _, role in axes[-2]):
            raise UnsupportedModelError(
                f"{describe(block)} attends to samples, for it mixes what lies along dimension 0 of {self.source(values).name}; of a "
                "model that takes sequences first, [T, B, …], explain a module that takes [B, T, …] and transposes it for the model"
            )


@dataclass(frozen=True)
class Stretch:
    """The part of a graph that an explanation walks: from some outputs down to the attention block it starts with.

    `blocks` numbers the attention blocks that take part, counted from the input; `total` counts all, which `every` holds. `needed`
    holds the values whose gradient and relevance are needed: an attention map that takes part lies upstream of them. `above` holds the
    values that come after one of these maps.
    """

    leaves: tuple[fx.Node, ...]
    blocks: dict[fx.Node, int]
    total: int
    every: frozenset[fx.Node]
    needed: frozenset[fx.Node]
    above: frozenset[fx.Node]

    @classmethod
    def of(cls, facts: Facts, leaves: Sequence[fx.Node], start_layer: int, everything: bool = False) -> Stretch:
        """The stretch above block `start_layer`; with `everything`, all active values are needed, down to the input.

        Raises:
            InputError: there is no such block.
            UnsupportedModelError: no attention lies on the way.
        """
        found = facts.attention_blocks(leaves)
        if not -len(found) <= start_layer < len(found):
            raise InputError(
                f"start_layer {start_layer} is out of range: the model has {len(found)} attention blocks, "
                f"so use {-len(found)} to {len(found) - 1}"
            )
        if start_layer % len(found) == 0:  # down to the input, also below the first block
            relevant = _upstream(leaves)
            for why in (facts.unknown_mixing(node) for node in facts.nodes if node in relevant and node in facts.active):
                if why is not None:
                    raise UnsupportedModelError(why)
        blocks = {node: i for i, node in enumerate(found) if i >= start_layer % len(found)}
        above = frozenset(_downstream(facts.nodes, set(blocks), facts.active))
        needed = frozenset(facts.active) if everything else above
        return cls(tuple(leaves), blocks, len(found), frozenset(found), needed, above)


def _turns(node: fx.Node) -> bool:
    """Whether a value is another one with its last two dimensions elsewhere."""
    ndim = node.meta["val"].dim()
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return [dim % ndim for dim in order[-2:]] != [ndim - 2, ndim - 1]
    swapped: Any = node.args[1:] if node.target is aten.transpose.int else ()
    return any(dim % ndim >= ndim - 2 for dim in swapped)


def _active(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> set[fx.Node]:
    """Values that depend on the input through floating-point numbers, or on integers of the input from where these enter. An input
    without dimensions is a number that all samples share, a constant."""
    varying = {x for x in inputs if not isinstance(x.meta.get("val"), Tensor) or x.meta["val"].dim()}
    active: set[fx.Node] = set()
    chosen: set[fx.Node] = set()  # by activations, as experts are
    for node in nodes:
        if node.op == "placeholder":
            if node in varying and _is_float(node):
                active.add(node)
            continue
        if node.target in CONSTANTS:
            continue
        if isinstance(node.meta.get("val"), (Tensor, list, tuple)) and any(n in varying for n in node.all_input_nodes):
            varying.add(node)  # sizes do not count
            chosen.update([node] if any(n in active or n in chosen for n in node.all_input_nodes) else ())
        if node.op != "call_function" or not (_is_float(node) or isinstance(node.meta.get("val"), (list, tuple))):
            continue
        entry = enters(node) and _indices(node) in varying
        if entry and node.target is not aten.embedding.default:
            entry = _indices(node) not in chosen
        if entry or any(n in active for n in reads(node)):
            active.add(node)
    return active


def _indices(node: fx.Node) -> Any:
    """The integers that enter at a node."""
    return node.args[1 if node.target is aten.embedding.default else 0]


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _pointwise_roots(nodes: Sequence[fx.Node], active: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For values that are pointwise functions of one single activation: that activation (else the value itself).

    x·σ(1.7x) is such a function of x, and passes relevance like any activation function; u·v is not.
    """
    roots: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in active:
            continue
        sources = {roots[n] for n in reads(node) if n in active} if is_pointwise(node) else set()
        same_shape = len(sources) == 1 and next(iter(sources)).meta["val"].shape == node.meta["val"].shape
        roots[node] = sources.pop() if same_shape else node
    return roots


def _sources(
    nodes: Sequence[fx.Node], active: set[fx.Node], inputs: Sequence[fx.Node]
) -> dict[fx.Node, frozenset[fx.Node]]:
    """The inputs that each active value depends on through activations; a look-up depends on its indices."""
    every: dict[fx.Node, frozenset[fx.Node]] = {node: frozenset([node]) for node in inputs}
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in nodes:
        if node.op == "placeholder":
            every.setdefault(node, frozenset())
        else:
            every[node] = frozenset().union(*(every[n] for n in reads(node)))
        if node in active:
            through = [n for n in reads(node) if n in active]
            known = [every[n] for n in reads(node)] if not through or enters(node) else [found[n] for n in through]
            found[node] = every[node] if node.op == "placeholder" else frozenset().union(*known)
    return found


def _joined(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For inputs [B, T] of integers that an embedding looks up as cat([first, …, second], 1), or as cat([first.T, …, second.T]): that
    cat."""
    found: dict[fx.Node, fx.Node] = {}
    several: set[fx.Node] = set()
    for node in nodes:
        cat: Any = axes_.unturned(node.args[1]) if node.target is aten.embedding.default else None  # type: ignore[arg-type]
        if cat is None or cat.target is not aten.cat.default or cat.meta["val"].dim() != 2:
            continue
        parts = [axes_.unturned(x) for x in cat.args[0]]
        own = [x for x in parts if x in inputs]
        if along(cat) != (axes_.moved_to(cat) or 0) and len(own) > 1 and len(set(own)) == len(own):
            several.update(x for x in own if x in found and list(found[x].args[0]) != list(cat.args[0]))  # type: ignore[arg-type]
            found.update(dict.fromkeys(own, cat))
    return {x: cat for x, cat in found.items() if several.isdisjoint(map(axes_.unturned, cat.args[0]))}  # type: ignore


def along(cat: fx.Node) -> int:
    """The dimension along which values are joined."""
    dim: Any = cat.args[1] if len(cat.args) > 1 else 0
    return int(dim % cat.meta["val"].dim())


def _in_a_row(
    nodes: Sequence[fx.Node],
    active: set[fx.Node],
    axes: dict[fx.Node, axes_.Axes],
    sources: dict[fx.Node, frozenset[fx.Node]],
) -> set[fx.Node]:
    """Values made of tokens of several inputs, one input's after the other's."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node not in active:
            continue
        operands = [n for n in reads(node) if n in active]
        if node.target in (aten.cat.default, aten.stack.default) and node in axes:
            dim: Any = node.args[1] if len(node.args) > 1 else 0
            apart = len({sources[n] for n in operands}) > 1 and not axes_.is_feature(axes[node][dim])
        else:
            apart = False
        if apart or any(n in found for n in operands):
            found.add(node)
    return found


def _upstream(leaves: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(leaves)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += reads(node)
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
        if node in active and any(n in found for n in reads(node)):
            found.add(node)
    return found
