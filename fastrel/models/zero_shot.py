"""Models of pictures with text (CLIP, SigLIP) as classifiers of pictures, their classes given in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrel.errors import InputError


class ZeroShot(nn.Module):
    """Logits [B, C] of pictures [B, 3, H, W] for C texts: what the model itself gives for each pair.

    texts: [C, D], of length 1 each; read once, so that an explanation is that of the picture alone.
    """

    texts: Tensor

    def __init__(self, model: Any, texts: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("texts", texts)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W]."""
        found = normalised(self.model.get_image_features(pixel_values=x))
        logits = nn.functional.linear(found, self.texts) * self.model.logit_scale.exp()
        return logits + self.model.logit_bias if _independent(self.model) else logits


def classifier(name: str, model: Any, tokenizer: Any, limit: int, classes: Sequence[str]) -> ZeroShot:
    """A classifier of pictures by what describes them.

    Raises:
        InputError: a text is longer than the model reads, or the model has no features of pictures and texts on their own.
    """
    if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
        raise InputError(f"{name!r} reads a picture and a text together, so classes cannot be given in words; "
                         "write a function that returns a model of pictures, and give MODULE:FUNCTION")  # fmt: skip
    for text in classes:
        if not 0 < (count := len(tokenizer(text)["input_ids"])) <= limit or not text.strip():
            raise InputError(f"class {text!r} has {count} tokens; the model reads 1 to {limit}")
    # SigLIP was trained on texts padded to its full length, without a mask.
    padding: Any = {"padding": "max_length", "max_length": limit} if _independent(model) else {"padding": True}
    encoded = tokenizer(list(classes), return_tensors="pt", **padding)
    with torch.no_grad():
        features = model.eval().get_text_features(**{k: encoded[k] for k in tokenizer.model_input_names if k in encoded})
    return ZeroShot(model, normalised(features).clone())


def probabilities(model: ZeroShot) -> Any:
    """What makes probabilities of its logits."""
    return "sigmoid" if _independent(model.model) else "softmax"


def normalised(features: Any) -> Tensor:
    """To length 1."""
    vectors = features if isinstance(features, Tensor) else features.pooler_output
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _independent(model: Any) -> bool:
    """Whether each pair is judged on its own, as SigLIP does."""
    return hasattr(model, "logit_bias")
