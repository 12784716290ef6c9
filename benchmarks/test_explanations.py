"""Explanations end to end, next to the model's own forward pass, forward plus backward, the plain reference and peers.

`pytest benchmarks/test_explanations.py --benchmark-json=out.json`, then `python -m benchmarks.table out.json`. What is
timed has just been checked against the plain PyTorch backend. Compare within a case only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrel
from benchmarks import gate
from benchmarks.baselines import libraries

#: Name: model, size of an image or length of a text, batch.
CASES: dict[str, tuple[str, int, int]] = {
    "ViT-Ti/16 224": ("vit_tiny_patch16_224", 224, 1),
    "ViT-S/16 224": ("vit_small_patch16_224", 224, 1),
    "ViT-B/16 224": ("vit_base_patch16_224", 224, 1),
    "ViT-B/16 224, batch 8": ("vit_base_patch16_224", 224, 8),
    "ViT-L/16 224": ("vit_large_patch16_224", 224, 1),
    "ViT-B/16 384": ("vit_base_patch16_384", 384, 1),
    "DINOv2-B/14 392 (T = 785)": ("vit_base_patch14_dinov2", 392, 1),
    "DINOv2-B/14 518 (T = 1370)": ("vit_base_patch14_dinov2", 518, 1),
    "BERT-base, 128 tokens": ("bert", 128, 1),
    "BERT-base, 128 tokens, batch 8": ("bert", 128, 8),
    "BERT-base, 512 tokens": ("bert", 512, 1),
    "MiniLM size, 32 tokens": ("minilm", 32, 1),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "fastrel": {},
    "fastrel, official": {"rules": "official"},
    "fastrel, mixed": {"precision": "mixed"},
    "fastrel, low": {"precision": "low"},
    "fastrel, last block": {"start_layer": -1},
    "fastrel, torch backend": {"backend": "torch"},
    "fastrel, memory low": {"memory": "low"},
}

PEERS = {
    "captum, input x gradient": libraries.captum_input_x_gradient,
    "zennit, LRP of linear layers": libraries.zennit_lrp,
    "grad-cam, last block": libraries.grad_cam,
}
PROVIDERS = ["forward", "forward + backward", "predict", *OPTIONS, "fastrel, 10 targets", *PEERS]

_models: dict[tuple[str, int], nn.Module] = {}


def build(name: str, size: int) -> nn.Module:
    """A model with random weights: times do not depend on them."""
    torch.manual_seed(0)
    if name in ("bert", "minilm"):
        import transformers

        small = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536} if name == "minilm" else {}
        return transformers.BertForSequenceClassification(transformers.BertConfig(**small)).eval()
    import timm

    kwargs = {"img_size": size} if "dinov2" in name else {}
    return timm.create_model(name, num_classes=1000, **kwargs).eval()


def case(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and inputs of a case; models are kept, because building them takes longer than running them."""
    kind, size, batch = CASES[name]
    if (kind, size) not in _models:
        _models.clear()
        _models[kind, size] = build(kind, size)
    if kind in ("bert", "minilm"):
        return _models[kind, size], {"input_ids": torch.randint(1000, 20000, (batch, size))}
    return _models[kind, size], {"x": torch.randn(batch, 3, size, size)}


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def runner(provider: str, model: nn.Module, given: dict[str, Tensor]) -> Callable[[], Any]:
    """What to time; whatever of fastrel's it is, checked first."""
    if provider == "forward":

        def forward() -> Tensor:
            with torch.inference_mode():
                return logits(model(**given))

        return forward
    embedded = "input_ids" in given
    if provider == "forward + backward":

        def backward() -> Tensor:
            if embedded:
                leaf = model.bert.embeddings.word_embeddings(given["input_ids"]).detach().requires_grad_()  # type: ignore
                out = logits(model(inputs_embeds=leaf))
            else:
                leaf = given["x"].clone().requires_grad_()
                out = model(leaf)
            return torch.autograd.grad(out[:, 0].sum(), leaf)[0]

        return backward
    if provider in PEERS:
        if embedded:
            pytest.skip("the peers need a wrapper for token ids")
        try:
            call = PEERS[provider](model)
        except ImportError as error:
            pytest.skip(f"not installed: {error.name}")
        return lambda: call(given["x"])
    batch = len(next(iter(given.values())))
    target: Any = [list(range(10))] * batch if "10 targets" in provider else 0
    options = OPTIONS.get(provider, {})
    if "10 targets" in provider and embedded:
        pytest.skip("the text models have two classes")
    explainer = fastrel.Explainer(model, **options)
    if provider == "predict":
        with torch.inference_mode():
            torch.testing.assert_close(explainer.predict(**given).logits, logits(model(**given)), rtol=1e-4, atol=1e-4)
        return lambda: explainer.predict(**given)
    ours = explainer(**given, target=target).relevance
    if "torch" not in provider:
        plain = {key: value for key, value in options.items() if key in ("start_layer", "rules")}
        expected = fastrel.Explainer(model, backend="torch", **plain)(**given, target=target).relevance
        gate.check(ours, expected, options.get("precision", "float32"))
    return lambda: explainer(**given, target=target)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", CASES)
def test_explanation(benchmark: Any, name: str, provider: str) -> None:
    """Each round is preceded by a forward pass of the model alone, so that a machine that drifts slows both."""
    benchmark.group = name
    model, given = case(name)
    model.requires_grad_(False)
    run, forward = runner(provider, model, given), runner("forward", model, given)
    forward_times: list[float] = []

    def before() -> None:
        start = time.perf_counter()
        forward()
        forward_times.append(time.perf_counter() - start)

    run()
    before()
    rounds = 21 if forward_times.pop() < 1 else 5  # short ones scatter more
    benchmark.pedantic(run, setup=before, rounds=rounds, warmup_rounds=0)
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "forward": statistics.median(forward_times),
    }
