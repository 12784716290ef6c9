"""Nodes of a captured graph: their arguments, their names in messages, new ones between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def arguments(node: fx.Node, *defaults: Any, count: int) -> tuple[Any, ...]:
    """The first `count` positional arguments of a node; those left out of the call come from the tail of `defaults`."""
    missing = max(0, count - len(node.args))
    return (*node.args[:count], *defaults[len(defaults) - missing :])


def insert_call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """`target(*args)` where the graph inserts now, with the value that the captured ones have in their meta."""
    new = graph.call_function(target, args)
    new.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return new


def insert_like(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """The same in the place of a node, found under its line of the model."""
    new = insert_call(node.graph, target, *args)
    new.meta |= {name: x for name, x in node.meta.items() if name != "val"}
    return new


def replace(node: fx.Node, by: fx.Node) -> None:
    """Let all that read a node read another one, and take it out."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def is_view(node: fx.Node) -> bool:
    """Whether a value shares memory with another one (or with the model's input or parameters)."""
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return node.op == "placeholder" or shares


def describe(node: fx.Node) -> str:
    """A node as an error message names it: operator, shape, and the model's own line where known."""
    value = node.meta.get("val")
    shape = f" {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    modules = node.meta.get("nn_module_stack") or {}
    where = next(reversed(list(modules.values())), ("", ""))[0] if modules else ""
    return f"{node.target}{shape}" + (f" in {where}" if where else "")
