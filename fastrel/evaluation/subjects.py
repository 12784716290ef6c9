"""Models with what it takes to explain items of a data set with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastrel.data import ImageItem, TextItem
from fastrel.errors import InputError
from fastrel.explainer import Explainer


class ImageMap(NamedTuple):
    """The map [gh, gw] of one class of a picture, x [3, H, W] as the model reads it."""

    heat: Tensor
    x: Tensor
    explained: int
    predicted: int


class TextMap(NamedTuple):
    """Relevance per word [T] (the highest of its tokens), for the class explained."""

    words: np.ndarray
    explained: int


@dataclass(frozen=True)
class ImageSubject:
    """A model of pictures. preprocess: picture -> [3, H, W]; mean, std [3, 1, 1]: how it normalises."""

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    mean: Tensor
    std: Tensor
    kind = ImageItem

    def explain(self, explainer: Explainer, item: ImageItem, target: str = "label") -> ImageMap:
        """The map of `label`, the best-scoring of the item's classes (or predicted if none), or of `predicted`."""
        x = self.preprocess(item.picture())
        prediction = explainer.predict(x[None])
        logits = prediction.logits[0]
        predicted = int(logits.argmax())
        wrong = [c for c in item.classes if not 0 <= c < len(logits)]
        if wrong:
            raise InputError(f"{item.name}: class {wrong[0]} is out of range: the model has {len(logits)} classes")
        labelled = max(item.classes, key=lambda c: float(logits[c]), default=predicted)
        explained = labelled if target == "label" else predicted
        patches = prediction.explain(explained).patches
        if patches is None:
            raise InputError(f"{explainer.method.name} gives no map over the picture for this model")
        return ImageMap(patches[0], x, explained, predicted)

    def mask(self, item: ImageItem) -> Tensor | None:
        """The item's mask as the model sees the picture, [H, W] of bool."""
        if item.mask is None:
            return None
        mask, picture = item.mask(), item.picture()
        if mask.shape != (picture.height, picture.width):
            raise InputError(f"{item.name}: a mask of {mask.shape} for a picture of {(picture.height, picture.width)}")
        seen = self.preprocess(Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB"))
        return (seen * self.std + self.mean).mean(0) > 0.5


@dataclass(frozen=True)
class TextSubject:
    """A sequence classifier and its (fast) tokenizer. Texts longer than the model reads are cut."""

    model: nn.Module
    tokenizer: Any
    kind = TextItem

    def encode(self, words: list[str]) -> tuple[dict[str, Tensor], list[int | None]]:
        """The model's inputs, and the word that each token belongs to (None: special)."""
        limit = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 512))
        encoded = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit, return_tensors="pt")
        return dict(encoded), encoded.word_ids()

    def explain(self, explainer: Explainer, item: TextItem) -> TextMap:
        """Relevance of every word for the item's label; words beyond the model's length get the lowest."""
        inputs, word_of = self.encode(list(item.words))
        prediction = explainer.predict(**inputs)
        if not 0 <= item.label < prediction.logits.shape[1]:
            raise InputError(f"{item.name}: class {item.label} is out of range: the model has {prediction.logits.shape[1]}")
        row = prediction.explain(item.label).relevance[0].double().cpu().numpy()
        words = np.full(len(item.words), row.min())
        for token, word in enumerate(word_of):
            if word is not None:
                words[word] = max(words[word], row[token])
        return TextMap(words, item.label)

    def probability(self, item: TextItem) -> Callable[[np.ndarray], float]:
        """A function kept [T] of bool -> the model's probability of the item's label with only those words."""

        def probability(kept: np.ndarray) -> float:
            inputs, _ = self.encode([word for word, keep in zip(item.words, kept, strict=True) if keep])
            with torch.no_grad():
                return float(self.model(**inputs).logits[0].softmax(0)[item.label])

        return probability
