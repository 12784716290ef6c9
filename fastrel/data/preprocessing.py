"""From a picture to what a model of pictures reads, described by numbers alone. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from fastrel.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


#: A picture that would be this many times as large as its crop, one of 1 x 60000 pixels say, is cropped before it is resized.
_STRIP = 16


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the centre, scale to 0 … 1, normalise.

    resize: (height, width), or the length of the shorter edge, the other one following (rounded down, as in torchvision).
    crop: (height, width) of the centre that is kept; None keeps all. resample: a name in `PIL.Image.Resampling`.
    mean, std: per channel, of values in 0 … 1; one of each makes a grey picture.

    Raises:
        InputError: values that do not make sense, such as a crop larger than the picture it is taken from.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None = None
    resample: str = "BICUBIC"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        smallest = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if self.crop is None and isinstance(self.resize, int):
            raise InputError(f"resizing the shorter edge to {self.resize} without a crop gives pictures of several sizes")
        if self.crop is not None and (self.crop[0] > smallest[0] or self.crop[1] > smallest[1]):
            raise InputError(f"a crop of {self.crop} is larger than pictures resized to {self.resize}")
        if self.resample not in Image.Resampling.__members__:
            raise InputError(
                f"unknown resampling {self.resample!r}; choose one of {', '.join(Image.Resampling.__members__)}"
            )
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or min(self.std) <= 0:
            raise InputError(f"mean {self.mean} and std {self.std} must be 1 or 3 values each, std above 0")

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Preprocessing:
        """From what `describe` gave, after JSON made lists of its tuples."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(**fields)

    def describe(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what the model reads."""
        size = self.crop or self.resize
        assert isinstance(size, tuple)
        return size

    def seen(self, image: Image.Image) -> Image.Image:
        """The part of a picture that the model sees, in the size in which it sees it, RGB or grey."""
        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        if isinstance(self.resize, tuple):
            height, width = self.resize
        else:
            short, long = self.resize, int(self.resize * max(image.size) / min(image.size))
            height, width = (short, long) if image.height <= image.width else (long, short)
        crop_height, crop_width = self.size
        top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)  # torchvision's CenterCrop
        resample = Image.Resampling[self.resample]
        if height * width <= _STRIP * crop_height * crop_width:
            return image.resize((width, height), resample).crop((left, top, left + crop_width, top + crop_height))
        across, down = image.width / width, image.height / height
        right, bottom = min(image.width, (left + crop_width) * across), min(image.height, (top + crop_height) * down)
        return image.resize((crop_width, crop_height), resample, (left * across, top * down, right, bottom))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """[C, H, W] float32."""
        values = np.atleast_3d(np.asarray(self.seen(image), np.float32) / np.float32(255))
        return ((values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)).transpose(2, 0, 1)


@dataclass(frozen=True)
class Wrapped:
    """A preprocessing that is some library's own callable, picture -> [C, H, W] as array or tensor."""

    transform: Callable[[Image.Image], Any]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image.Image) -> np.ndarray:
        """[C, H, W] float32."""
        x = np.asarray(self.transform(image), np.float32)
        if x.ndim != 3:
            raise InputError(f"the preprocessing gave shape {x.shape}, not [C, H, W]")
        return x

    def describe(self) -> dict[str, Any]:
        """How the callable shows itself, but for where it lies in memory."""
        return {"transform": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self.transform)), "mean": self.mean, "std": self.std}


#: From a picture in RGB to [C, H, W] float32, its mean taken off, divided by its deviation.
Prepare: TypeAlias = Preprocessing | Wrapped


def shown(x: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The RGB picture that a normalised [C, H, W] was made from, as the model sees it."""
    values = x.transpose(1, 2, 0) * np.array(std, np.float32) + np.array(mean, np.float32)
    levels = (values * 255).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels).convert("RGB")
