"""Functional graphs: the reverse pass reads values that the forward pass saved, and none may change after that."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from fastrel.graph.nodes import replace

aten = torch.ops.aten

#: Layers and products whose result is a tensor of its own, whatever the options.
_FRESH = {
    aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.linear.default, aten.batch_norm.default,
    aten.layer_norm.default, aten.group_norm.default, aten.add.Tensor, aten.mul.Tensor, aten.matmul.default, aten.bmm.default,
}  # fmt: skip


def functional(program: ExportedProgram) -> ExportedProgram:
    """A program without writes in place and without regions, both of which torch itself takes apart; the rest stays as it is.

    `x[mask] = 0`, `ReLU(inplace=True)` and writes into views become functions of what was there. The inside of
    `torch.enable_grad()` is like its outside, and that of `torch.autocast` has its casts written out.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is aten.detach_.default:
            replace(node, node.args[0])
    _without_grad_regions(program.graph_module)
    _without_needless_writes(graph)
    if not any(_writes(node) or isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph.nodes):
        return program
    with torch.no_grad():
        program = program.run_decompositions({})
    _whole_batch_norms(program.graph_module.graph)
    for node in program.graph_module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # not every kernel lays its result out as torch says
    return program


def _without_grad_regions(module: fx.GraphModule) -> None:
    """Put what lies inside of `torch.enable_grad()` and `torch.no_grad()` in their place."""
    graph = module.graph
    while regions := [node for node in graph.nodes if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled]:
        for node in regions:
            inside = getattr(module, node.args[1].target)
            given = iter(node.args[2:])
            copies: dict[fx.Node, Any] = {}
            with graph.inserting_before(node):
                for x in inside.graph.nodes:
                    if x.op == "placeholder":
                        copies[x] = next(given)
                    elif x.op == "get_attr":  # a region in a region
                        setattr(module, name := f"{node.name}_{x.target}", getattr(inside, x.target))
                        copies[x] = graph.get_attr(name)
                    elif x.op != "output":
                        copies[x] = graph.node_copy(x, copies.__getitem__)
            results = fx.map_arg(next(iter(reversed(inside.graph.nodes))).args[0], copies.__getitem__)
            for part in list(node.users):
                part.replace_all_uses_with(results[part.args[1]])
                graph.erase_node(part)
            graph.erase_node(node)


def _without_needless_writes(graph: fx.Graph) -> None:
    """Let what writes into the result of a layer that nothing else sees, as `ReLU(inplace=True)` does, make its own: torch takes
    longer to find that out than to export the model."""
    for node in graph.nodes:
        x = node.args[0] if node.args else None
        if not _writes(node) or not isinstance(x, fx.Node) or x.target not in _FRESH or list(x.users) != [node]:
            continue
        schema = node.target._schema
        packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
        own = getattr(packet, schema.overload_name or "default", None)
        kinds = {x.meta["val"].dtype for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor)}
        if own is not None and not own._schema.is_mutable and len(kinds) == 1:
            node.target = own


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _whole_batch_norms(graph: fx.Graph) -> None:
    """Batch norms, the one layer that torch takes apart, as models have them."""
    for node in list(graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        x, weight, bias, mean, variance, momentum, eps = node.args
        options: Any = (x, weight, bias, mean, variance, False, momentum, eps, False)
        with graph.inserting_before(node):
            whole = graph.call_function(aten.batch_norm.default, options)
        whole.meta = {**node.meta, "val": node.meta["val"][0]}
        for part in list(node.users):
            if part.args[1] == 0:
                part.replace_all_uses_with(whole)
            graph.erase_node(part)
        graph.erase_node(node)
