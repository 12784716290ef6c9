"""Models with what it takes to explain items of a data set with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastrel.data import ImageItem, TextItem
from fastrel.errors import InputError
from fastrel.explainer import Explainer
from fastrel.models import Loaded, Sample
from fastrel.outputs import logits_in


class ImageMap(NamedTuple):
    """The map [gh, gw] of one class of a picture, x [C, H, W] as the model reads it; both on the CPU.

    size: (height, width) of the picture before that.
    """

    heat: Tensor
    x: Tensor
    explained: int
    predicted: int
    size: tuple[int, int]


class TextMap(NamedTuple):
    """Relevance per word [T] (the highest of its tokens), for the class explained."""

    words: np.ndarray
    explained: int


@dataclass(frozen=True)
class ReadPicture:
    """From an item to its picture as the model reads it, and its size before that; light, to be sent to other processes."""

    reader: Any

    def __call__(self, item: ImageItem) -> tuple[Sample, tuple[int, int]]:
        """One sample, and the picture's (height, width)."""
        picture = item.picture()
        return self.reader(picture)[0], (picture.height, picture.width)


@dataclass(frozen=True)
class ReadWords:
    """From an item to its words as the model reads them, and the word that each token belongs to; light."""

    reader: Any

    def __call__(self, item: TextItem) -> tuple[Sample, list[int | None]]:
        """A sample and its words."""
        return self.encode(item.words)

    def encode(self, words: Sequence[str]) -> tuple[Sample, list[int | None]]:
        """A sample, cut where the model reads no further, and the word that each token belongs to (None: special)."""
        tokenizer = self.reader.tokenizer
        encoded = tokenizer(list(words), is_split_into_words=True, truncation=True, max_length=self.reader.limit)
        names = [name for name in tokenizer.model_input_names if name in encoded]
        return {name: np.array(encoded[name], np.int64) for name in names}, encoded.word_ids()


@dataclass(frozen=True)
class ImageSubject:
    """A model of pictures."""

    loaded: Loaded
    kind = ImageItem

    @property
    def mean(self) -> Tensor:
        """How it normalises, [C, 1, 1]."""
        return torch.tensor(self.loaded.reader.prepare.mean).reshape(-1, 1, 1)

    @property
    def std(self) -> Tensor:
        """How it normalises, [C, 1, 1]."""
        return torch.tensor(self.loaded.reader.prepare.std).reshape(-1, 1, 1)

    @property
    def read(self) -> ReadPicture:
        """From an item to its picture as the model reads it, and its size before that."""
        return ReadPicture(self.loaded.reader)

    def logits(self, x: Tensor) -> Tensor:
        """The model's logits [B, classes] for x [B, C, H, W], which may be on another device; float32, on the model's."""
        with torch.no_grad():
            output = self.loaded.model(x.to(self.loaded.device, self.loaded.dtype))
        return logits_in(output).float()

    def explain(
        self,
        explainer: Explainer,
        items: Sequence[ImageItem],
        samples: Sequence[tuple[Sample, tuple[int, int]]],
        predicted: bool,
    ) -> list[dict[str, ImageMap]]:
        """Per item its map of `label`, the best-scoring of its classes (or predicted if none), and if asked of `predicted`."""
        batch = self.loaded.inputs([sample for sample, _ in samples])
        args, kwargs = self.loaded.arguments(batch)
        prediction = explainer.predict(*args, **kwargs)
        logits = prediction.logits.float().cpu()
        best = logits.argmax(1).tolist()
        for item in items:
            wrong = [c for c in item.classes if not 0 <= c < logits.shape[1]]
            if wrong:
                raise InputError(f"{item.name}: class {wrong[0]} is out of range: the model has {logits.shape[1]} classes")
        labels = [
            max(item.classes, key=lambda c, row=row: float(row[c]), default=top)  # type: ignore[misc]
            for item, row, top in zip(items, logits, best, strict=True)
        ]
        both = predicted and labels != best
        targets = torch.tensor(list(zip(labels, best, strict=True))) if both else torch.tensor(labels)[:, None]
        grid = prediction.explain(targets.to(prediction.logits.device)).grid
        if grid is None:
            raise InputError(f"{explainer.method.name} gives no map over the picture for this model")
        heats = grid.cpu()
        xs = [torch.from_numpy(next(iter(sample.values()))) for sample, _ in samples]
        return [
            {
                "label": ImageMap(heats[i, 0], xs[i], labels[i], best[i], size),
                "predicted": ImageMap(heats[i, -1], xs[i], best[i] if both else labels[i], best[i], size),
            }
            for i, (_, size) in enumerate(samples)
        ]

    def mask(self, item: ImageItem, size: tuple[int, int]) -> Tensor | None:
        """The item's mask as the model sees the picture of this (height, width), [H, W] of bool."""
        if item.mask is None:
            return None
        mask = item.mask()
        if mask.shape != size:
            raise InputError(f"{item.name}: a mask of {mask.shape} for a picture of {size}")
        seen = self.loaded.reader.prepare(Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB"))
        return (torch.from_numpy(seen) * self.std + self.mean).mean(0) > 0.5


@dataclass(frozen=True)
class TextSubject:
    """A sequence classifier with its (fast) tokenizer. Texts longer than the model reads are cut, and `cut` names them."""

    loaded: Loaded
    cut: set[str] = field(default_factory=set)
    kind = TextItem

    @property
    def read(self) -> ReadWords:
        """From an item to its words as the model reads them."""
        return ReadWords(self.loaded.reader)

    def explain(
        self,
        explainer: Explainer,
        items: Sequence[TextItem],
        samples: Sequence[tuple[Sample, list[int | None]]],
        predicted: bool,
    ) -> list[dict[str, TextMap]]:
        """Per item the relevance of every word for its label; words beyond the model's length get the lowest."""
        args, kwargs = self.loaded.arguments(self.loaded.inputs([sample for sample, _ in samples]))
        prediction = explainer.predict(*args, **kwargs)
        count = prediction.logits.shape[1]
        for item in items:
            if not 0 <= item.label < count:
                raise InputError(f"{item.name}: class {item.label} is out of range: the model has {count}")
        relevance = prediction.explain([item.label for item in items]).relevance.double().cpu().numpy()
        found = []
        for item, (_, word_of), row in zip(items, samples, relevance, strict=True):
            if len(item.words) - 1 not in word_of:
                self.cut.add(item.name)
            words = np.full(len(item.words), row[: len(word_of)].min())
            for token, word in enumerate(word_of):
                if word is not None:
                    words[word] = max(words[word], row[token])
            found.append({"label": TextMap(words, item.label)})
        return found

    def probabilities(self, item: TextItem, kept: Sequence[np.ndarray]) -> list[float]:
        """The model's probability of the item's label with only some of its words, [T] of bool each: one batch of them."""
        samples = [self.read.encode([word for word, keep in zip(item.words, own, strict=True) if keep])[0] for own in kept]
        with torch.no_grad():
            output: Any = self.loaded.model(**self.loaded.inputs(samples))
        return output.logits.float().softmax(1)[:, item.label].tolist()
