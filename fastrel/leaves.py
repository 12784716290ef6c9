"""Gradients of a captured graph by torch.autograd, the ordinary ones and AttnLRP's: what `verify` compares the engine's with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastrel.graph.capture import Captured
from fastrel.graph.nodes import arguments
from fastrel.graph.patterns import ACTIVATIONS, DIVISIONS, PRODUCTS
from fastrel.graph.zero import value_at_zero, vanishes
from fastrel.reference import gradients

aten = torch.ops.aten


class Leaves(fx.Interpreter):
    """Runs a captured graph with some values as leaves of autograd, which lie in `found` afterwards; returns the outputs."""

    def __init__(self, captured: Captured, names: Sequence[str]) -> None:
        graph: fx.Graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in captured.graph.nodes:
            if node.op != "output":
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(fx.map_arg(tuple(captured.outputs), copies.__getitem__))
        super().__init__(fx.GraphModule(nn.Module(), graph), garbage_collect_values=False)
        self.facts, self.copies = captured.facts, copies
        self.originals = {copy: node for node, copy in copies.items()}
        self.names, self.found = set(names), list[Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        """As usual, but for these values."""
        value = super().run_node(n)
        if n in self.originals and self.originals[n].name in self.names:
            value = value.detach().clone().requires_grad_()
            self.found.append(value)
        return value


class FrozenLeaves(Leaves):
    """The same with AttnLRP's gradient behind norms, activation functions and products: values are those of the operators."""

    def run_node(self, n: fx.Node) -> Any:
        """By the rule of its operator."""
        rule = _RULES.get(n.target)
        node = self.originals.get(n)
        if rule is None or node is None or node not in self.facts.active or node.name in self.names:
            return super().run_node(n)
        return rule(self, node)

    def value(self, x: Any) -> Any:
        """The value of a node of the captured graph; what is none as it is."""
        return fx.map_arg(x, lambda node: self.env[self.copies[node]])

    def plainly(self, node: fx.Node, *args: Any) -> Any:
        """The operator itself, of these arguments in the place of its first."""
        op: Any = node.target
        return op(*args, *self.value(node.args[len(args) :]), **self.value(node.kwargs))


def _share(x: Any, share: float) -> Any:
    """x, of whose gradient a share is passed on."""
    return x * share + x.detach() * (1 - share) if isinstance(x, Tensor) else x


def _frozen(x: Tensor, dims: Sequence[int], center: bool, eps: float) -> Tensor:
    """x, less its mean if centred, over a root mean square that is a constant."""
    centered = x - x.mean(tuple(dims), keepdim=True) if center else x
    return centered / (centered.square().mean(tuple(dims), keepdim=True) + eps).sqrt().detach()


def _norm(run: FrozenLeaves, node: fx.Node) -> Tensor:
    """Layer norm and RMS norm over trailing dimensions."""
    layer = node.target is aten.layer_norm.default
    _, shape, weight, *rest = arguments(node, None, None, 1e-5, count=5) if layer else arguments(node, None, None, count=4)
    x = run.value(node.args[0])
    bias, eps = rest if layer else (None, rest[0])
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = _frozen(x, range(-len(shape), 0), layer, eps)
    y = y if weight is None else y * run.value(weight)
    return y if bias is None else y + run.value(bias)


def _group_norm(run: FrozenLeaves, node: fx.Node) -> Tensor:
    _, groups, weight, bias, eps, _ = arguments(node, None, None, 1e-5, True, count=6)
    x = run.value(node.args[0])
    parts = x.unflatten(1, (groups, -1))
    y = _frozen(parts, range(2, parts.dim()), True, eps).flatten(1, 2)
    weight, bias = (p if p is None else run.value(p).reshape(-1, *(1,) * (x.dim() - 2)) for p in (weight, bias))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _activation(run: FrozenLeaves, node: fx.Node) -> Tensor:
    x = run.value(node.args[0])
    if not math.isfinite(value_at_zero(node)):
        return run.plainly(node)
    return gradients.activation(lambda value: run.plainly(node, value), x)


def _gate(run: FrozenLeaves, node: fx.Node) -> Tensor:
    """Products and quotients: a scale is a constant, factors take half each, and x·σ(x) is an activation function."""
    facts, (u, v) = run.facts, node.args[:2]
    if not all(isinstance(x, fx.Node) and x in facts.active for x in (u, v)):
        return run.plainly(node)
    a, b = run.value(u), run.value(v)
    scales, root = [facts.is_scale(x) for x in (u, v)], facts.roots[node]
    if node.target in DIVISIONS and root is node:
        return run.plainly(node, a, b.detach())
    if scales[0] != scales[1]:
        return run.plainly(node, a.detach() if scales[0] else a, b.detach() if scales[1] else b)
    if root is node:
        return run.plainly(node, _share(a, 0.5), _share(b, 0.5))
    if not vanishes(node, root):
        return run.plainly(node)
    x, y = run.value(root), run.plainly(node).detach()
    return y + gradients.slope(x, y).detach() * (x - x.detach())


def _product(run: FrozenLeaves, node: fx.Node) -> Tensor:
    """A matrix product of two activations, or of a softmax and values: half of the gradient to each."""
    u, v = node.args[:2]
    if not all(isinstance(x, fx.Node) and x in run.facts.active for x in (u, v)):
        return run.plainly(node)
    return run.plainly(node, _share(run.value(u), 0.5), _share(run.value(v), 0.5))


def _attention(run: FrozenLeaves, node: fx.Node) -> Tensor:
    """softmax(QKᵀ)V: half to V, and of the map's half, half to Q and K each."""
    q, k, v = (run.value(x) for x in node.args[:3])
    return run.plainly(node, _share(q, 0.25), _share(k, 0.25), _share(v, 0.5))


_RULES: dict[Any, Callable[[FrozenLeaves, fx.Node], Tensor]] = {
    **dict.fromkeys(ACTIVATIONS, _activation),
    **dict.fromkeys(PRODUCTS, _gate),
    **dict.fromkeys([aten.matmul.default, aten.bmm.default, aten.mm.default], _product),
    **dict.fromkeys([aten.layer_norm.default, aten.rms_norm.default], _norm),
    aten.group_norm.default: _group_norm,
    aten.scaled_dot_product_attention.default: _attention,
}
