"""What a lowered reverse graph launches on a GPU, made fewer: lanes are added up, joined, multiplied by a slope or divided where a
Triton kernel reads or writes them anyway, and what does not depend on each other shares a launch."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastrel.backends.common import as_the_model_has_it
from fastrel.ops.steps import add_rows, gelu_backward

aten = torch.ops.aten

#: What takes a part of a value, or turns it around, and launches nothing.
_VIEWS = {aten.narrow.default, aten.t.default, aten.dropout.default, aten.view.default, aten.unsqueeze.default}


def fuse(graph: fx.Graph) -> None:
    """Rewrite a lowered reverse graph in place."""
    _Fusion(graph).run()


class _Fusion:
    def __init__(self, graph: fx.Graph) -> None:
        from fastrel.triton_kernels import (
            activation,
            attention_relevance,
            layer_norm_backward,
            residual_add,
            zplus_linear,
            zplus_products,
            zplus_sums,
        )

        self.graph = graph
        self.norm, self.norm_beside = (
            layer_norm_backward.layer_norm_backward,
            layer_norm_backward.layer_norm_backward_beside,
        )
        self.half_block = layer_norm_backward.half_block
        self.ratio, self.gelu = activation.activation_ratio, activation.through_gelu
        self.share, self.share_of_sum = residual_add.residual_add, residual_add.residual_add_of_sum
        self.attention = attention_relevance.attention_relevance
        self.linear, self.reduced = zplus_linear.zplus_linear, zplus_linear.zplus_linear_reduced
        # By target: what fx calls one may be a name, so the keys are not typed.
        self.matmuls: dict[Any, Any] = {
            zplus_products.matmul: self.linear,
            zplus_products.reduced_matmul: self.reduced,
        }
        self.sums, self.most = zplus_sums.zplus_sums, zplus_sums.LAYERS

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.target is aten.cat.default:
                node.target = joined
            elif node.target is add_rows and self._is_own(node.args[0]):
                node.target = add_rows_in_place
            elif node.target is self.share and node.args[4] == "positive":
                self._share_of_sum(node)
            elif _is_sum(node):
                self._norm_beside(node)
            elif node.target is gelu_backward:
                lane, x, *rest = node.args
                self._slope(node, lane, x, rest[0] if rest else "none", frozen=False)
            elif node.target is self.ratio and node.args[3:] and node.args[3]:
                lane, x, _, form = node.args
                self._slope(node, lane, x, form, frozen=True)
        for node in list(self.graph.nodes):
            if node.target in self.matmuls:
                self._gradient_of_more_outputs(node)
        self._half_blocks()
        self._rows()
        self.graph.eliminate_dead_code()
        self._sums_together()

    def _is_own(self, lane: Any) -> bool:
        """Whether a lane was just made by a kernel, for this one use: it may be written to."""
        made = lane.args[0] if lane.target is operator.getitem else lane
        return len(lane.users) == 1 and made.target in (self.norm, self.norm_beside, self.linear, self.reduced)

    def _share_of_sum(self, node: fx.Node) -> None:
        u, v, total = node.args[:3]
        of_sum = _is_sum(total) and len(total.users) == 1  # type: ignore[union-attr]
        node.target, node.args = self.share_of_sum, (u, v, *(total.args if of_sum else (total, None)))  # type: ignore[union-attr]

    def _norm_beside(self, total: fx.Node) -> None:
        for own, beside in (total.args, reversed(total.args)):
            assert isinstance(own, fx.Node)
            if own.target is self.norm and len(own.users) == 1:
                with self.graph.inserting_before(total):
                    both = self.graph.call_function(self.norm_beside, (*own.args[:5], beside, *own.args[5:]))
                both.meta = dict(own.meta)
                total.replace_all_uses_with(both)
                return

    def _slope(self, node: fx.Node, lane: Any, x: Any, approximate: Any, frozen: bool) -> None:
        """A gradient through gelu: by the layer after it, whose gradient it is, or in a pass of its own."""
        with self.graph.inserting_before(node):
            x = as_the_model_has_it(x)
        made: Any = lane.args[0] if lane.target is operator.getitem and len(lane.users) == 1 else None
        if made is None or made.target not in (self.linear, self.reduced) or not isinstance(x, fx.Node) or not _is_given(x):
            node.target, node.args = self.gelu, (lane, x, approximate, frozen)
            return
        _move_before(x, made)
        made.kwargs = {**made.kwargs, "slope": x, "approximate": approximate, "frozen": frozen}
        node.replace_all_uses_with(lane)

    def _gradient_of_more_outputs(self, product: fx.Node) -> None:
        """Relevance of v and the gradient of q, k and v through the layer that makes them all."""
        lane, weight = product.args
        call = self.matmuls[product.target]
        own = [node for node in self.graph.nodes if node.target is call and self._is_part_of(node, weight)]
        if len(own) != 1 or _is_used_before(*sorted((own[0], product))):
            return
        (layer,) = own
        with self.graph.inserting_after(max(layer, product)):
            both = self.graph.call_function(call, layer.args, dict(layer.kwargs))
        if call is self.linear:
            both.args = (*layer.args[:5], lane, layer.args[6])
            both.kwargs = {**both.kwargs, "w_grad": weight}
        else:
            both.args = (*layer.args[:4], weight, *layer.args[5:8], lane)
        both.meta = dict(layer.meta)
        self._replaced(both, [(use, use.args[1]) for use in list(layer.users)] + [(product, 1)])

    def _is_part_of(self, layer: fx.Node, weight: Any) -> bool:
        """Whether a layer with relevance alone has some of the outputs that a product's weight has."""
        grad = layer.args[5 if layer.target is self.linear else 8]
        part = _origin(layer.args[1])
        return grad is None and part.target is aten.narrow.default and _origin(part.args[0]) is _origin(weight)

    def _half_blocks(self) -> None:
        """A norm's gradient and the shares of a sum, one after the other."""
        norms: list[fx.Node] = []
        for node in list(self.graph.nodes):
            if node.target in (self.norm, self.norm_beside):
                norms = [node]
            elif node.target in (self.share, self.share_of_sum) and norms:
                norm = norms.pop()
                if node.target is self.share or _is_used_before(norm, node):
                    continue
                given = norm.args if norm.target is self.norm_beside else (*norm.args[:5], None, *norm.args[5:])
                frozen = {"frozen": given[6]} if given[6:] else {}
                with self.graph.inserting_after(node):
                    both = self.graph.call_function(self.half_block, (*given[:6], *node.args), frozen)
                both.meta = dict(norm.meta)
                self._replaced(both, [(norm, 0), *((use, 1 + use.args[1]) for use in list(node.users))])

    def _replaced(self, both: fx.Node, results: Sequence[tuple[fx.Node, Any]]) -> None:
        """Place i of what `both` returns takes the place of a node, for each (node, i)."""
        after = both
        for node, i in results:
            with self.graph.inserting_after(after):
                after = self.graph.call_function(operator.getitem, (both, i))
            node.replace_all_uses_with(after)

    def _rows(self) -> None:
        """r + r M of an attention block by the launch of the half block that comes after it."""
        block: fx.Node | None = None
        for node in list(self.graph.nodes):
            if node.target is self.attention and not node.args[12] and node.args[6] is not None:
                block = node
            elif node.target is self.half_block and block:
                self._row(block, node)
                block = None

    def _row(self, block: fx.Node, half: fx.Node) -> None:
        """There is the row as it is at the sum R and as the attention has it, r, and `through` on its way back to R: steps that lay
        out anew what is there. Whether they undo each other shows when they run."""
        row: Any = block.args[6]
        through = next((use for use in block.users if use.args[1] == 7), None)
        if through is None:
            return
        steps, end = _way(through)
        if not _is_sum(end) or any(user <= half for user in end.users):
            return
        others: list[Any] = [x for x in end.args if x is not through and x not in steps]
        if len(others) != 1 or not any(x is others[0] for x in (row, *_laid_out(row))):
            return
        (whole,), given = others, {through, *steps}
        if any(x > half for x in (whole, *(x for step in steps for x in step.all_input_nodes if x not in given))):
            return
        with self.graph.inserting_before(half):
            back = _copied(self.graph, steps, {through: row})
            entering = self.graph.call_function(if_in_place, (back, whole, row))
        block.kwargs = {**block.kwargs, "parts": True}
        half.kwargs = {**half.kwargs, "through": through, "row": entering}
        with self.graph.inserting_before(half.next):
            left = self.graph.call_function(operator.getitem, (half, 3))
            moved = _copied(self.graph, steps, {through: left})
            end.replace_all_uses_with(self.graph.call_function(settled, (moved, whole, entering)))

    def _sums_together(self) -> None:
        """Z of the layers of a block in one launch."""
        group: list[fx.Node] = []
        for node in [*self.graph.nodes]:
            if node.target in (self.linear, self.reduced) and all(_is_given(x) for x in self._values(node)):
                if group and node.target is not group[0].target:
                    self._together(group)
                    group = []
                group.append(node)
                if len(group) == self.most:
                    self._together(group)
                    group = []
        self._together(group)

    def _values(self, layer: fx.Node) -> tuple[Any, ...]:
        """x, weight (of reduced products that of bfloat16, which few rows are multiplied by), output and bias."""
        x, w, *rest = layer.args
        return (x, w, *rest[:2]) if layer.target is self.linear else (x, rest[0], *rest[3:5])

    def _together(self, group: Sequence[fx.Node]) -> None:
        if len(group) < 2:
            return
        parts = [x for layer in group for x in self._values(layer)]
        first = group[0]
        rel: Any = first.args[4 if first.target is self.linear else 7]
        if rel.target is operator.getitem and rel.args[0].target is self.half_block:
            first = rel.args[0]  # which may then divide by them
        for x in parts:
            if isinstance(x, fx.Node):
                _move_before(x, first)
        with self.graph.inserting_before(first):
            sums = self.graph.call_function(self.sums, tuple(parts), {"reduced": group[0].target is self.reduced})
            sums.meta = dict(group[0].meta)
            found = [self.graph.call_function(operator.getitem, (sums, i)) for i in range(len(group))]
        for layer, z in zip(group, found, strict=True):
            formed = self._divided_where_it_is_made(layer, sums, z)
            layer.kwargs = {**layer.kwargs, "sums": z, "formed": formed}

    def _divided_where_it_is_made(self, layer: fx.Node, sums: fx.Node, z: fx.Node) -> bool:
        """S = R ⊘ Z by what makes R for this layer alone, once for each number, and not where every tile of the layer reads it."""
        rel: Any = layer.args[4 if layer.target is self.linear else 7]
        if rel.target is not operator.getitem or len(rel.users) > 1:
            return False
        made, place = rel.args
        if "divisor" in made.kwargs:
            return False
        if made.target is self.half_block and made > sums:
            if place == 1:
                self._exchange_operands(made)
        elif made.target is not layer.target or place != 0 or made < sums:
            return False
        made.kwargs = {**made.kwargs, "divisor": z}
        return True

    def _exchange_operands(self, half: fx.Node) -> None:
        """v + u for u + v."""
        u, v = half.args[6:8]
        half.args = (*half.args[:6], v, u, *half.args[8:])
        for use in list(half.users):
            place: Any = use.args[1]
            if place in (1, 2):
                use.args = (half, 3 - place)


def _is_sum(node: Any) -> bool:
    """a + b of two lanes, neither scaled."""
    return (
        isinstance(node, fx.Node)
        and node.target is aten.add.Tensor
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(x, fx.Node) for x in node.args)
    )


#: What lays a row out anew.
_LAYOUTS = {aten.reshape.default, aten.permute.default, aten.squeeze.dims, aten.unsqueeze.default, aten.transpose.int}


def _way(x: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """The steps by which alone a value is laid out anew, with what they ask of its shape, and where it is used then."""
    steps: list[fx.Node] = []
    while True:
        shapes = [use for use in x.users if use.target is getattr]
        shapes += [size for shape in shapes for size in shape.users]
        steps += shapes
        users = [use for use in x.users if use not in shapes]
        if len(users) != 1 or users[0].target not in _LAYOUTS:
            return steps, users[0] if len(users) == 1 else x
        x = users[0]
        steps.append(x)


def _laid_out(x: Any) -> Iterator[fx.Node]:
    """What a value is a new layout of."""
    while isinstance(x, fx.Node) and x.target in _LAYOUTS:
        x = x.args[0]
        yield x


def _copied(graph: fx.Graph, steps: Sequence[fx.Node], given: dict[fx.Node, fx.Node]) -> fx.Node:
    """The steps once more, from another value on."""
    copies = dict(given)
    last = next(iter(given.values()))
    for step in steps:
        copies[step] = graph.node_copy(step, lambda x: copies.get(x, x))
        last = copies[step] if step.target in _LAYOUTS else last
    return last


def if_in_place(back: Tensor, whole: Tensor, row: Tensor) -> Tensor | None:
    """row, if its entries lie where they do in `whole` when it is laid out as `back`."""
    same = back.shape == whole.shape and back.untyped_storage()._cdata == whole.untyped_storage()._cdata
    sizes = zip(whole.shape, back.stride(), whole.stride(), strict=True) if same else ()
    same = same and back.storage_offset() == whole.storage_offset()
    return row if same and all(a == b for size, a, b in sizes if size > 1) else None


def settled(moved: Tensor, whole: Tensor, entering: Tensor | None) -> Tensor:
    """r + r M: `moved` itself if that took r in."""
    return moved if entering is not None else moved + whole


def _is_used_before(first: fx.Node, last: fx.Node) -> bool:
    """Whether the result of `first`, or a part of it, is used before `last` has run."""
    users = [user for use in first.users for user in ([*use.users] if use.target is operator.getitem else [use])]
    return any(user <= last for user in users)


def _prepares(node: fx.Node) -> bool:
    return bool(node.meta.get("of a weight"))


def _is_given(x: Any) -> bool:
    """Whether a value is there from the start: an input of the reverse graph, a part of one, or made of a weight."""
    if not isinstance(x, fx.Node) or x.op == "placeholder":
        return True
    known = x.target in _VIEWS or x.target is operator.getitem or _prepares(x)
    return known and all(_is_given(one) for one in x.all_input_nodes)


def _move_before(x: fx.Node, node: fx.Node) -> None:
    """x, and what it is made of, which is there from the start, to before a node."""
    if x.op == "placeholder" or x < node:
        return
    node.prepend(x)
    for one in x.all_input_nodes:
        _move_before(one, x)


def _origin(x: Any) -> Any:
    """The weight, or the part of one, that a prepared weight was made of."""
    while isinstance(x, fx.Node) and (x.target is operator.getitem or _prepares(x)):
        x = x.args[0]
    return x


def add_rows_in_place(dense: Tensor, part: Tensor, dim: int, start: int) -> Tensor:
    """`add_rows` to a lane that nothing else will read."""
    dense.narrow(dim, start, part.shape[dim]).add_(part)
    return dense


def joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, without a copy where the parts already lie one after the other in one buffer, as a kernel left them."""
    first = tensors[0]
    step = tensors[1].storage_offset() - first.storage_offset() if len(tensors) > 1 else 0
    apart = step > 0 and first.shape[dim] == 1
    if apart and all(
        x.shape == first.shape
        and x.stride() == first.stride()
        and x.storage_offset() == first.storage_offset() + i * step
        and x.untyped_storage()._cdata == first.untyped_storage()._cdata
        for i, x in enumerate(tensors)
    ):
        shape, stride = list(first.shape), list(first.stride())
        shape[dim], stride[dim] = len(tensors), int(step)
        return first.as_strided(shape, stride)
    return torch.cat(list(tensors), dim)
