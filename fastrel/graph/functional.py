"""Graphs that overwrite nothing: the reverse pass reads values that the forward pass saved, and none may change after that."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastrel.errors import CaptureError
from fastrel.graph.nodes import insert_call, is_view

aten = torch.ops.aten


def make_functional(graph: fx.Graph) -> None:
    """Replace operators that overwrite their first argument (ReLU(inplace=True), x += y) by those that do not.

    The reverse pass reads values that the forward pass saved; none may change after it was saved.

    Raises:
        CaptureError: an operator overwrites a part of another value, or has no such counterpart.
    """
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        written = node.args[0]
        if node.target is aten.detach_.default:
            node.replace_all_uses_with(written)
            graph.erase_node(node)
            continue
        if node.target is aten.copy_.default and isinstance(written, fx.Node):
            _scatter(graph, node)
            continue
        packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
        overload = getattr(packet, schema.overload_name or "default", None)
        read_later = isinstance(written, fx.Node) and is_view(written) and _base_is_read_after(written, node)
        if overload is None or overload is node.target or not isinstance(written, fx.Node) or read_later:
            raise CaptureError(f"{node.target} overwrites a value in place, which cannot be explained; write it without")
        node.target = overload
        written.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)  # type: ignore[misc]


def _base_is_read_after(view: fx.Node, node: fx.Node) -> bool:
    """Whether what a view was made of, or another view of it, is read after a node that overwrites the view."""
    base = view
    while base.op == "call_function" and is_view(base):
        base = base.args[0]  # type: ignore[assignment]
    if base.op == "placeholder":
        return True
    todo, family = [base], {base}
    while todo:
        for user in todo.pop().users:
            if user.op == "call_function" and is_view(user) and user not in family:
                family.add(user)
                todo.append(user)
    return any(user > node for x in family - {view} for user in x.users)


def _scatter(graph: fx.Graph, node: fx.Node) -> None:
    """x[part] = value: the whole with its part replaced, for everything that reads it from here on.

    Raises:
        CaptureError: the part is not a slice or an entry of a value that the model made.
    """
    view, value = node.args[:2]
    assert isinstance(view, fx.Node)
    assert isinstance(value, fx.Node)
    scatters = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
    with graph.inserting_before(node):
        while view.op == "call_function" and view.target in scatters:
            whole: Any = view.args[0]
            if whole.meta["val"].shape != view.meta["val"].shape or value.meta["val"].shape != view.meta["val"].shape:
                scatter: Any = scatters[view.target]
                if value.meta["val"].shape != view.meta["val"].shape:
                    value = insert_call(graph, aten.expand.default, value, list(view.meta["val"].shape))
                value = insert_call(graph, scatter, whole, value, *view.args[1:])
            view = whole
    if is_view(view):
        raise CaptureError(
            f"{node.target} overwrites a part of {view} in place, which cannot be explained; write it without"
        )
    view.replace_all_uses_with(value, delete_user_cb=lambda user: user > node)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
