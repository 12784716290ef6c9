"""What models of the zoo launch, recorded: whole explanations of their full width, two blocks deep, with nothing computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastrel.precision import products
from tests.devices.programs import Launches, lowered
from tests.devices.recorder import Variant, recorded

DEVICE = torch.device("cuda:0")

#: One sample, and as many as fill a GPU.
BATCHES = (1, 64)


def _vit(size: int = 224, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=size, depth=2, **options).eval(), {"x": torch.randn(2, 3, size, size)}


def _bert(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, vocab_size=100, **options)).eval()
    ids = torch.randint(0, 100, (2, 128))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "ViT-B/16": _vit,
    "ViT-H/14": lambda: _vit(patch_size=14, embed_dim=1280, num_heads=16),
    "BERT": _bert,
    "MiniLM": lambda: _bert(hidden_size=384, intermediate_size=1536),
}


@dataclass(frozen=True)
class Use:
    """A model, its dtype, and how it is explained."""

    model: str
    dtype: torch.dtype
    precision: str = "float32"
    rules: str = "positive"

    @property
    def name(self) -> str:
        """For tables."""
        parts = [self.model, str(self.dtype).removeprefix("torch.")]
        parts += [self.precision] * (self.precision != "float32") + [self.rules] * (self.rules != "positive")
        return " ".join(parts)


def uses(float8: bool) -> Iterator[Use]:
    """Every model in float32 and bfloat16 with the precisions there are, some in float16 and under the official rules."""
    for model in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            for precision in ("float32", "mixed", *(["low"] if float8 else [])):
                yield Use(model, dtype, precision)
    for model in ("ViT-B/16", "BERT"):
        yield Use(model, torch.float32, rules="official")
    yield Use("ViT-B/16", torch.float16)


@functools.cache
def _program(use: Use) -> Any:
    """What is made of a model, the same for every GPU on which it is of use."""
    model, given = MODELS[use.model]()
    given = {name: x.to(use.dtype) if x.is_floating_point() else x for name, x in given.items()}
    return lowered(model.to(use.dtype), given, DEVICE, precision=use.precision, rules=use.rules), len(given)


def variants(capability: int) -> Iterator[tuple[Use, int, Variant]]:
    """Every kernel that they launch on a GPU of this capability, and for which use and batch."""
    with recorded(capability, devices=1, checked=False):
        float8 = products("low", "positive", device=DEVICE).relevance == "float8"
    for use in uses(float8):
        with recorded(capability, devices=1, checked=False) as seen:
            (program, values), inputs = _program(use)
            launches = Launches(seen, program, values, DEVICE, inputs)
            for batch in BATCHES:
                launches.explain(batch)
                for variant in seen.kernels:
                    yield use, batch, variant
