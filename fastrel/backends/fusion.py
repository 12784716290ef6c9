"""Lanes that are added up, or joined, where a Triton kernel reads or writes them anyway: fewer launches, less memory moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def fuse(graph: fx.Graph) -> None:
    """Rewrite a lowered reverse graph in place."""
    from fastrel.triton_kernels.layer_norm_backward import layer_norm_backward, layer_norm_backward_beside
    from fastrel.triton_kernels.residual_add import residual_add, residual_add_of_sum

    for node in list(graph.nodes):
        if node.target is aten.cat.default:
            node.target = joined
        elif (
            node.target is residual_add
            and node.args[4] == "positive"
            and _is_sum(node.args[2])
            and len(node.args[2].users) == 1
        ):
            u, v, total = node.args[:3]
            node.target, node.args = residual_add_of_sum, (u, v, *total.args)
        elif _is_sum(node):
            _fuse_norm(graph, node, layer_norm_backward, layer_norm_backward_beside)
    graph.eliminate_dead_code()


def _is_sum(node: Any) -> bool:
    """a + b of two lanes, neither scaled."""
    return (
        isinstance(node, fx.Node)
        and node.target is aten.add.Tensor
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(x, fx.Node) for x in node.args)
    )


def _fuse_norm(graph: fx.Graph, total: fx.Node, norm: Any, with_sum: Any) -> None:
    for own, beside in (total.args, reversed(total.args)):
        assert isinstance(own, fx.Node)
        if own.target is norm and len(own.users) == 1:
            with graph.inserting_before(total):
                total.replace_all_uses_with(graph.call_function(with_sum, (*own.args, beside)))
            return


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
