"""Models captured on a GPU: nothing in their graphs may lie on, or come from, the CPU.

A copy from the CPU waits for a GPU at every call, and cannot be a part of a CUDA graph. No GPU is needed: all tensors are fake.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import Tensor, fx, nn

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is computed here", allow_module_level=True)

from fastrel.errors import InputError
from fastrel.graph.capture import Captured
from fastrel.graph.constants import check_device, fold_constants, from_the_cpu
from tests import models
from tests.devices.programs import captured_on

aten = torch.ops.aten


#: Where models are.
GPU = torch.device("cuda:0")


def captured_on_gpu(model: nn.Module, given: dict[str, Tensor]) -> Captured:
    """The graph of a model of float32 that was moved."""
    return captured_on(GPU, model.eval(), {name: x.float() if x.is_floating_point() else x for name, x in given.items()})[0]


@pytest.mark.parametrize("name", models.FAMILIES)
def test_captured_graphs_stay_on_the_device(name: str) -> None:
    captured = captured_on_gpu((models.VISION | models.TEXT)[name](), models.inputs(name))
    assert from_the_cpu(captured.graph, GPU) == []


class _CpuGrid(nn.Module):
    """As timm's DINOv3 makes its rotary grid; `varying`: as long as the text."""

    def __init__(self, varying: bool = False) -> None:
        super().__init__()
        self.layer, self.varying = nn.Linear(4, 4), varying

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.arange(x.shape[1] if self.varying else 4, device="cpu").sin() + torch.ones(1)
        return self.layer(x) + (grid[:, None] if self.varying else grid).to(x.device)


def test_a_grid_made_on_the_cpu_is_made_once() -> None:
    captured = captured_on_gpu(_CpuGrid(), {"x": torch.empty(2, 4)})
    assert from_the_cpu(captured.graph, GPU) == []
    check_device(captured.graph, GPU)
    assert [owner.shape for owner in captured.owners if isinstance(owner, Tensor)] == [(4,)]


def test_a_grid_that_varies_is_refused_in_a_cuda_graph() -> None:
    captured = captured_on_gpu(_CpuGrid(varying=True), {"x": torch.empty(2, 7, 4)})
    with pytest.raises(
        InputError, match=r"arange.* lies on the CPU at every call, and the model on cuda:0: a CUDA graph cannot hold"
    ):
        check_device(captured.graph, GPU)


def test_what_is_made_once_has_the_numbers_that_the_code_makes() -> None:
    """Moved by its dtype's name, where a CPU is all there is."""
    graph = fx.symbolic_trace(nn.Identity()).graph
    x = next(iter(graph.nodes))
    with graph.inserting_before(next(reversed(graph.nodes))):
        made = graph.call_function(aten.arange.default, (4,), {"device": torch.device("cpu")})
        made.meta["val"] = torch.arange(4)
        moved = graph.call_function(aten.to.dtype, (made, torch.float64))
        moved.meta["val"] = torch.empty(4, dtype=torch.float64, device="meta")
    x.replace_all_uses_with(moved)
    (value,) = fold_constants(graph, x)
    assert torch.equal(value, torch.arange(4, dtype=torch.float64))


def _hf(name: str, **options: object) -> Callable[[], nn.Module]:
    """A tiny model for `models.inputs("hf_bert")`."""
    sizes = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = getattr(transformers, name)
    return lambda: model(model.config_class(**{**sizes, **tokens, **options}))


#: Models that make tensors in their forward pass: grids and windows, biases of distances, a cache that is empty.
OTHERS = {
    "DINOv3": lambda: timm.create_model("vit_small_patch16_dinov3", num_classes=4, img_size=32, depth=1),
    "Swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, img_size=56, depths=(1, 2)),
    "ModernBERT": _hf("ModernBertForSequenceClassification", local_attention=4, cls_token_id=1, sep_token_id=2),
    "DeBERTa": _hf(
        "DebertaV2ForSequenceClassification", relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]
    ),
    "GPT-2": _hf("GPT2LMHeadModel"),
    "Llama": _hf("LlamaForCausalLM", num_key_value_heads=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_captured_graphs_of_other_models_stay_on_the_device(name: str) -> None:
    size = {"DINOv3": 32, "Swin": 56}.get(name)
    given = {"x": torch.randn(2, 3, size, size)} if size else models.inputs("hf_bert")
    captured = captured_on_gpu(OTHERS[name](), given)
    assert from_the_cpu(captured.graph, GPU) == []
