"""Explanations next to the model's own forward pass, forward plus backward, and the plain reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrel
from fastrel import reference
from fastrel.reference.rollout import gradient_relevance, rollout


def vit(name: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(name).eval()


def reference_map(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    params, heads = dict(model.state_dict()), model.blocks[0].attn.num_heads  # type: ignore[index, union-attr]
    image = x.clone().requires_grad_()
    result = reference.trace(lambda tape: reference.vit(tape, params, image, heads=heads), target)
    return rollout([gradient_relevance(b.gradient, b.relevance) for b in result.blocks])[:, 0]


def backward(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf).amax(1).sum(), leaf)[0]


@pytest.mark.parametrize("what", ["forward", "backward", "explain", "explain_last", "reference"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"])
def test_vit(benchmark: Any, name: str, batch: int, what: str) -> None:
    benchmark.group = f"{name}-B{batch}"
    model, x = vit(name), torch.randn(batch, 3, 224, 224)
    run: Callable[[], Any]
    if what == "forward":

        def run() -> Tensor:
            with torch.inference_mode():
                return model(x)

    elif what == "backward":
        run = lambda: backward(model, x)  # noqa: E731
    elif what == "reference":
        run = lambda: reference_map(model, x, torch.zeros(batch, dtype=torch.long))  # noqa: E731
    else:
        explainer = fastrel.Explainer(model, start_layer=-1 if what == "explain_last" else 0)
        if what == "explain":
            expected = reference_map(model, x, torch.zeros(batch, dtype=torch.long))
            ours = explainer(x, target=0).relevance
            assert float((ours - expected).norm() / expected.norm()) < 1e-4
        run = lambda: explainer(x, target=0)  # noqa: E731
    run()
    benchmark.pedantic(run, rounds=5 if batch == 1 else 3)
