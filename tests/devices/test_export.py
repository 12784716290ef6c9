"""Models captured on a device that is not the CPU: nothing in their graphs may lie on, or come from, the CPU.

A copy from the CPU waits for a GPU at every call, and cannot be a part of a CUDA graph. The device is "meta", which every machine has.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, fx, nn

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is computed here", allow_module_level=True)

from fastrel.graph.capture import Captured, capture, in_order
from tests import models

aten = torch.ops.aten


def captured_elsewhere(model: nn.Module, given: dict[str, Tensor]) -> Captured:
    """The graph of a model whose parameters and buffers were moved, as `model.cuda()` would move them."""
    inputs = {name: x.to("meta", torch.float32 if x.is_floating_point() else x.dtype) for name, x in given.items()}
    return capture(model.eval().to("meta"), (), in_order(model, (), inputs))


def from_the_cpu(graph: fx.Graph) -> list[str]:
    """Nodes that make or read a tensor of the CPU; numbers of no dimension are passed by value."""
    found = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        made = torch.device(node.kwargs.get("device") or "meta").type == "cpu"
        copied = node.target is aten.to.device and node.args[0].meta["val"].device != value.device
        if made or copied or (value.device.type == "cpu" and value.dim()):
            found.append(str(node.format_node()))
    return found


@pytest.mark.parametrize("name", models.FAMILIES)
def test_captured_graphs_stay_on_the_device(name: str) -> None:
    captured = captured_elsewhere((models.VISION | models.TEXT)[name](), models.inputs(name))
    assert from_the_cpu(captured.graph) == []


class _CpuGrid(nn.Module):
    """As timm's DINOv3 makes its rotary grid."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.arange(4, device="cpu").to(x.device)


def test_a_grid_made_on_the_cpu_is_found() -> None:
    assert from_the_cpu(captured_elsewhere(_CpuGrid(), {"x": torch.empty(2, 4)}).graph)
