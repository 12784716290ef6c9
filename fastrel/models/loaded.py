"""What loading a model gives."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastrel.errors import InputError
from fastrel.models.readers import Sample

#: image: pictures -> classes. text: texts -> classes. causal: a text -> its next token. multimodal: picture and text -> scores.
Kind: TypeAlias = Literal["image", "text", "causal", "multimodal"]


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with what it takes to feed it and to name what it says.

    Attributes:
        model: called with what `inputs` gives; logits [B, C] (multimodal: what the library's model returns).
        reader: from one picture or text to samples; light, can be sent to other processes.
        class_names: C names, empty where there are none to be had.
        probabilities: what makes probabilities of logits: over all classes, or of each on its own; None: nothing does.
        source: what the model was made from, as JSON.
    """

    model: nn.Module
    kind: Kind
    reader: Any  # Pictures, Texts or PicturesWithText
    class_names: tuple[str, ...] = ()
    probabilities: Literal["softmax", "sigmoid"] | None = "softmax"
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's first floating-point parameter."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """A batch of samples by name, on the model's device and in its dtype; `call` says how the model takes them."""
        return self.moved(self.reader.collate(samples))

    def moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the model's device and in its dtype; to a GPU from pinned memory, so that nobody waits for it."""
        device, dtype = self.device, self.dtype
        if device.type == "cuda":
            batch = {name: x.pin_memory() for name, x in batch.items()}
        return {
            name: x.to(device, dtype if x.is_floating_point() else x.dtype, non_blocking=True) for name, x in batch.items()
        }

    def arguments(self, batch: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """A batch as positional and named arguments of the model: a picture alone goes first, whatever the model calls it."""
        return (tuple(batch.values()), {}) if self.kind == "image" else ((), batch)

    def class_index(self, target: str) -> int:
        """A class given by number, by name or by part of a name.

        Raises:
            InputError: out of range, no such name, or several that fit.
        """
        return class_index(target, self.class_names)

    def fingerprint(self) -> str:
        """sha256 of all parameters and buffers with their names, in hex."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def class_index(target: str, names: Sequence[str]) -> int:
    """A class given by number, by name or by part of a name; see `Loaded.class_index`."""
    if re.fullmatch(r"-?[0-9]{1,18}", target):
        if not 0 <= int(target) < len(names):
            raise InputError(f"target {target} is out of range: the model has {len(names)} classes, 0 to {len(names) - 1}")
        return int(target)
    wanted = target.strip().lower()
    exact = [i for i, name in enumerate(names) if wanted in [part.strip().lower() for part in name.split(",")]]
    found = exact or [i for i, name in enumerate(names) if wanted in name.lower()]
    if len(found) != 1:
        several = ", ".join(f"{i} ({names[i]})" for i in found[:5])
        raise InputError(f"target {target!r} fits {len(found)} classes{': ' + several if found else ''}; give its number")
    return found[0]
