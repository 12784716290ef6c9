"""Small random models of every supported family, and inputs for them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastrel
from tests import golden_files as golden

Inputs = dict[str, Tensor]


def programs(explainer: Any) -> list[Any]:
    """The programs that an explainer's captured graphs became."""
    return [program for entry in explainer._engine._entries for program in entry.programs.values()]


def golden_vit(name: str) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**golden.config(name)).double().eval()
    model.load_state_dict(golden.parameters(name))
    return model


def golden_bert(name: str, attention: str = "sdpa") -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**golden.config(name), attn_implementation=attention)
    model = BertForSequenceClassification(config).double().eval()
    model.load_state_dict(golden.parameters(name), strict=False)
    return model


@functools.cache
def golden_explainer(name: str, attention: str = "sdpa") -> fastrel.Explainer:
    """Of a golden model that nobody changes, captured once; `using` gives it other options."""
    return fastrel.Explainer(golden_vit(name) if name.startswith("vit") else golden_bert(name, attention))


def _images(batch: int, size: tuple[int, int] = (32, 32)) -> Inputs:
    return {"x": torch.randn(batch, 3, *size, dtype=torch.float64)}


def _texts(batch: int, length: int = 12) -> Inputs:
    """Token ids with paddings of several lengths."""
    ids = torch.randint(3, 60, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    for i in range(batch):
        mask[i, length - 2 * i :] = 0 if i else 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=6, **options)

    return build


def _vit(**options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        plain = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 6}
        return VisionTransformer(**{**plain, **options})

    return build


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 3, 4, 48, 96, num_classes=6)


_SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 60,
    "num_labels": 6,
}


def _hf(kind: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        task = "ImageClassification" if kind == "ViT" else "SequenceClassification"
        return getattr(transformers, f"{kind}For{task}")(getattr(transformers, f"{kind}Config")(**config))

    return build


_DISTIL = {"dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 96, "vocab_size": 60, "num_labels": 6}

VISION: dict[str, Callable[[], nn.Module]] = {
    "timm_vit": _vit(),
    "timm_vit_mean_pooled": _vit(class_token=False, global_pool="avg"),
    "timm_vit_registers": _vit(reg_tokens=3, init_values=0.3),
    "timm_deit": _timm("deit_tiny_patch16_224", img_size=32, depth=3),
    "timm_deit_distilled": _timm("deit_tiny_distilled_patch16_224", img_size=32, depth=3),
    "torchvision_vit": _torchvision,
    "hf_vit": _hf("ViT", hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=32,
                  patch_size=8, num_labels=6),
}  # fmt: skip
TEXT: dict[str, Callable[[], nn.Module]] = {
    "hf_bert": _hf("Bert", **_SMALL),
    "hf_bert_eager": _hf("Bert", **_SMALL, attn_implementation="eager"),
    "hf_roberta": _hf("Roberta", **_SMALL),
    "hf_distilbert": _hf("DistilBert", **_DISTIL),
    "hf_electra": _hf("Electra", **_SMALL, embedding_size=24),
}
FAMILIES = [*VISION, *TEXT]


def build(name: str, seed: int = 0) -> nn.Module:
    """A small random model in float64, with parameters large enough for attention to be uneven."""
    torch.manual_seed(seed)
    model = (VISION | TEXT)[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3 if parameter.shape[-1] < 64 else 0.15)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def explainer(name: str) -> fastrel.Explainer:
    """Of `build(name)`, which nobody changes, captured once; `using` gives it other options."""
    return fastrel.Explainer(build(name))


def inputs(name: str, batch: int = 3, seed: int = 1) -> Inputs:
    """A batch of inputs for a family, by the name the model gives them."""
    torch.manual_seed(seed)
    if name in TEXT:
        return _texts(batch)
    images = _images(batch)
    return {"pixel_values": images["x"]} if name == "hf_vit" else images


def logits(model: nn.Module, given: Inputs) -> Tensor:
    output = model(**given)
    return output if isinstance(output, Tensor) else output.logits


def samples(given: Inputs) -> list[Inputs]:
    """The batch taken apart."""
    count = len(next(iter(given.values())))
    return [{name: x[i : i + 1] for name, x in given.items()} for i in range(count)]
