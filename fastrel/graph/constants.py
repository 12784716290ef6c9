"""Tensors that code makes on the CPU and then moves to where the model is, such as a rotary grid: a copy that waits for a GPU at every
call, and that no CUDA graph can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastrel.errors import InputError
from fastrel.graph.nodes import describe


def fold_constants(graph: fx.Graph, before: fx.Node) -> list[Tensor]:
    """Compute once what is made on the CPU of numbers alone and then moved; a placeholder in front of `before` takes its place.

    Returns:
        The values of these placeholders, in order, on the device that they are moved to.
    """
    constant: set[fx.Node] = set()
    values: dict[fx.Node, Any] = {}
    folded: list[Tensor] = []
    for node in list(graph.nodes):
        if _is_constant(node, constant):
            constant.add(node)
        if node not in constant or not _is_moved(node):
            continue
        with graph.inserting_before(before):
            place = graph.placeholder(f"constant_{len(folded)}")
        place.meta = {"val": node.meta["val"]}
        folded.append(_computed(node, values))
        node.replace_all_uses_with(place)
    graph.eliminate_dead_code()
    return folded


def _is_moved(node: fx.Node) -> bool:
    return _on(node) not in (None, "cpu") and any(_on(x) == "cpu" for x in node.all_input_nodes)


def _is_constant(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a value is made of numbers and of values that are `constant` alone, the same at every call."""
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op == "call_function" and not random and constant.issuperset(node.all_input_nodes)


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node not in values:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: _computed(x, values))
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def from_the_cpu(graph: fx.Graph, device: torch.device) -> list[fx.Node]:
    """Nodes whose tensor is on the CPU, and used, in the graph of a model on another device; numbers of no dimension are passed by
    value."""
    if device.type == "cpu":
        return []
    return [node for node in graph.nodes if node.users and _on(node) == "cpu" and node.meta["val"].dim()]


def check_device(graph: fx.Graph, device: torch.device) -> None:
    """Raise InputError where a graph cannot be captured as a CUDA graph because of what it makes on the CPU."""
    if found := from_the_cpu(graph, device):
        raise InputError(
            f"{describe(found[0])} lies on the CPU at every call, and the model on {device}: a CUDA graph cannot hold the copy; give "
            "the code that makes it device=x.device, or explain without `graphed`"
        )


def _on(node: fx.Node) -> str | None:
    """The kind of device that a tensor is on."""
    value = node.meta.get("val")
    return value.device.type if isinstance(value, Tensor) else None
