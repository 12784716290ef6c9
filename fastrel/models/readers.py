"""From one picture or text to the samples that a model reads, and from samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastrel.data.preprocessing import Prepare
from fastrel.errors import InputError

#: The arrays that one sample gives to a batch, without its dimension.
Sample: TypeAlias = dict[str, np.ndarray]


#: What a function of the user's returns for texts, for messages.
TEXTS = (
    "for texts return (model, tokenizer), the model with a Hugging Face config, or "
    'fastrel.models.Loaded(model, "text", fastrel.models.Texts(tokenizer, limit), class_names); '
    "a tokenizer is called as Hugging Face's, gives input_ids, and has convert_ids_to_tokens, model_input_names and pad_token_id; "
    "transformers.PreTrainedTokenizerFast(tokenizer_object=…) makes one of a tokenizers.Tokenizer"
)


@dataclass(frozen=True)
class Pictures:
    """A reader of pictures. name: how a batch of them is called."""

    prepare: Prepare
    name: str = "x"

    def __call__(self, image: Image.Image) -> list[Sample]:
        """The sample of one picture in RGB."""
        return [{self.name: self.prepare(image)}]

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """[B, C, H, W] float32.

        Raises:
            InputError: the preprocessing gave several sizes.
        """
        arrays = [sample[self.name] for sample in samples]
        if len({array.shape for array in arrays}) > 1:
            raise InputError(f"pictures of several sizes {sorted({array.shape for array in arrays})} make no batch")
        # In memory of torch, which is aligned: where an array of numpy begins, products may round in another way.
        return {self.name: torch.stack([torch.from_numpy(array) for array in arrays])}

    def describe(self) -> dict[str, Any]:
        """What tells it from another one, as JSON."""
        return self.prepare.describe()


@dataclass(frozen=True)
class Texts:
    """A reader of texts: a (fast) Hugging Face tokenizer and how many tokens the model reads.

    long: what becomes of longer texts: "refuse", or "window": pieces that share a quarter of `limit`, a sample each.
    """

    tokenizer: Any
    limit: int
    long: Literal["refuse", "window"] = "refuse"

    def __call__(self, text: str | tuple[str, str]) -> list[Sample]:
        """The sample of one text, or of a pair that is read as one sequence, or those of its windows: of a pair, of its second text.

        Raises:
            InputError: the text is blank, or too long.
        """
        given = (text,) if isinstance(text, str) else text
        if not all(part.strip() for part in given):
            raise InputError("the text is empty" if len(given) == 1 else "a text of the pair is empty")
        encoded = self.tokenizer(*given, truncation=False, verbose=False)
        count = len(encoded["input_ids"])
        if count <= self.limit:
            return [self._sample(encoded)]
        if self.long == "refuse":
            raise InputError(
                f"the text has {count} tokens, the model reads {self.limit}; shorten it, or read it in windows"
            )
        if (
            len(given) == 2
            and count - len(self.tokenizer(given[1], add_special_tokens=False)["input_ids"]) > self.limit // 2
        ):
            raise InputError("the first text of the pair leaves too little room for windows of the second; shorten it")
        pieces = self.tokenizer(
            *given,
            truncation=True if len(given) == 1 else "only_second",
            max_length=self.limit,
            stride=self.limit // 4,
            return_overflowing_tokens=True,
        )
        names = self._names(pieces)
        return [{name: np.array(pieces[name][i], np.int64) for name in names} for i in range(len(pieces["input_ids"]))]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokenizer's strings for token ids."""
        return self.tokenizer.convert_ids_to_tokens(list(ids))

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """[B, T] int64 each, padded at the end to the longest; `attention_mask` tells."""
        length = max(len(sample["input_ids"]) for sample in samples)
        pad = self.tokenizer.pad_token_id or 0
        return {
            name: torch.from_numpy(
                np.stack(
                    [
                        np.pad(s[name], (0, length - len(s[name])), constant_values=pad if name == "input_ids" else 0)
                        for s in samples
                    ]
                )
            )
            for name in samples[0]
        }

    def describe(self) -> dict[str, Any]:
        """What tells it from another one, as JSON."""
        return {"tokenizer": type(self.tokenizer).__name__, "limit": self.limit, "long": self.long}

    def _names(self, encoded: Any) -> list[str]:
        return [name for name in self.tokenizer.model_input_names if name in encoded]

    def _sample(self, encoded: Any) -> Sample:
        return {name: np.array(encoded[name], np.int64) for name in self._names(encoded)}


@dataclass(frozen=True)
class PicturesWithText:
    """A reader of pairs of a picture and a text: a Hugging Face processor."""

    processor: Any

    def __call__(self, pair: tuple[Image.Image, str]) -> list[Sample]:
        """The sample of one pair."""
        encoded = self.processor(images=pair[0], text=pair[1], return_tensors="np")
        return [{name: value[0] for name, value in encoded.items()}]

    def tokens(self, sample: Sample) -> list[str]:
        """The tokenizer's strings for a sample's text."""
        ids = sample["input_ids"]
        kept = ids if "attention_mask" not in sample else ids[sample["attention_mask"] != 0]
        return self.processor.tokenizer.convert_ids_to_tokens(kept.tolist())

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Arrays stacked; those of tokens are padded at the end to the longest."""
        pad = self.processor.tokenizer.pad_token_id or 0
        batch = {}
        for name in samples[0]:
            arrays = [sample[name] for sample in samples]
            if arrays[0].ndim == 1:
                length = max(map(len, arrays))
                fill = pad if name == "input_ids" else 0
                arrays = [np.pad(a, (0, length - len(a)), constant_values=fill) for a in arrays]
            batch[name] = torch.stack([torch.from_numpy(array) for array in arrays])
        return batch

    def describe(self) -> dict[str, Any]:
        """What tells it from another one, as JSON."""
        return {"processor": type(self.processor).__name__}
