"""From a picture or a text to the arrays that an artefact reads, by what the artefact carries. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastrel.artefact.metadata import Metadata, extra
from fastrel.data.preprocessing import Preprocessing
from fastrel.errors import InputError, needed


@dataclass(frozen=True)
class ReadsPictures:
    """RGB pictures to [C, H, W] float32."""

    prepare: Preprocessing

    def __call__(self, image: Image.Image) -> list[np.ndarray]:
        """The inputs of one sample."""
        return [self.prepare(image)]


class ReadsTexts:
    """Texts to token ids and what goes with them, [T] int64 each."""

    def __init__(self, core: Any, names: tuple[str, ...], limit: int) -> None:
        core.no_truncation()
        core.no_padding()
        self._core, self._names, self._limit = core, names, limit

    def __call__(self, text: str | tuple[str, str]) -> list[np.ndarray]:
        """The inputs of one sample: a text, or two that are read as one sequence.

        Raises:
            InputError: the text is blank, or too long.
        """
        given = (text,) if isinstance(text, str) else text
        if not all(part.strip() for part in given):
            raise InputError("the text is empty")
        encoded = self._core.encode(*given)
        if len(encoded.ids) > self._limit:
            raise InputError(f"the text has {len(encoded.ids)} tokens, the model reads {self._limit}; shorten it")
        of = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask, "token_type_ids": encoded.type_ids}
        return [np.array(of[name], np.int64) for name in self._names]

    def tokens(self, ids: np.ndarray) -> list[str]:
        """The tokenizer's strings for token ids."""
        return [self._core.id_to_token(int(i)) or "" for i in ids]


def reader(path: str | os.PathLike[str], about: Metadata) -> ReadsPictures | ReadsTexts:
    """What reads pictures or texts for the artefact at `path`.

    Raises:
        InputError: it was exported without its preprocessing or tokenizer, or `tokenizers` is not installed.
    """
    if "preprocessing" in about.reader:
        return ReadsPictures(Preprocessing.from_dict(about.reader["preprocessing"]))
    if "tokenizer" not in about.reader:
        raise InputError(
            f"the artefact {os.fspath(path)!r} carries neither a preprocessing described by numbers nor a tokenizer; export it "
            "with loaded=fastrel.models.load(…), or feed it tensors"
        )
    with needed("an artefact of texts", "serve"):
        from tokenizers import Tokenizer
    names = tuple(x.name for x in about.inputs)
    return ReadsTexts(Tokenizer.from_str(extra(path, about.reader["tokenizer"])), names, about.reader["limit"])


def collate(samples: list[list[np.ndarray]], about: Metadata) -> list[np.ndarray]:
    """A batch of samples, one array [B, …] per input; token sequences padded at the end."""
    batch = []
    for i, x in enumerate(about.inputs):
        arrays = [sample[i] for sample in samples]
        if len(x.shape) == 2 and x.shape[1] is None:
            length = max(len(a) for a in arrays)
            pad = about.reader.get("pad", 0) if x.name == "input_ids" else 0
            arrays = [np.pad(a, (0, length - len(a)), constant_values=pad) for a in arrays]
        batch.append(np.stack(arrays))
    return batch
