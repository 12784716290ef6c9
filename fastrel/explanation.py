"""What an explanation is: relevance over tokens, and its views on images and text."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrel.errors import InputError

#: Above this noise floor a map is said to be in the noise.
NOISY = 0.01


@dataclass(frozen=True)
class Explanation:
    """The explanation of a batch of predictions. Tensors live on the model's device, in its dtype (maps of 16-bit models in
    float32).

    Attributes:
        logits: the model's prediction, [B, C] (or the shape of its first output).
        target: the classes explained, [B] or [B, K]; None if the target was a function.
        relevance: the map over all tokens, raw: [B, T], or [B, K, T] for K targets per sample. Only ratios within one map
            have a meaning. Where tokens lie on a grid all along (no CLS token), T runs over it row by row.
        grid: the part of it that lies on image patches, [B, gh, gw] or [B, K, gh, gw]; None for text.
        image_size: (height, width) in pixels of the images explained; None for text.
        output: what the model returned.
        report: operators of the model that have no relevance rule of their own and took the generic one, whose sums have
            signs; empty for most transformers.
    """

    logits: Tensor
    target: Tensor | None
    relevance: Tensor
    grid: Tensor | None
    image_size: tuple[int, int] | None
    output: Any
    report: tuple[str, ...] = ()
    _perturbed: Callable[[int], Explanation] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.relevance)

    def __getitem__(self, index: int) -> Explanation:
        """The explanation of one sample, as a batch of one."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        one = slice(index, index + 1 or None)
        target = None if self.target is None else self.target[one]
        grid = None if self.grid is None else self.grid[one]
        perturbed = None if self._perturbed is None else functools.partial(_sample, self._perturbed, index)
        return replace(
            self, logits=self.logits[one], target=target, relevance=self.relevance[one], grid=grid, _perturbed=perturbed
        )

    def noise_floor(self, draws: int = 2) -> Tensor:
        """How far each map moves when every input and parameter changes by as little as its dtype can tell, [B] or [B, K].

        The largest relative L2 distance, over `draws` random perturbations (factors 1 ± eps), between this map and the
        perturbed one. Over the patches of an image; for text over all tokens but the highest, which in a rollout is
        usually the one that the head reads, holding its own 1. Costs `draws` explanations and a copy of the parameters.

        Warns where a map moves by more than 1 %: it then shows rounding as much as the model.

        Raises:
            InputError: the explanation was not made by an Explainer (it was loaded, say), or draws < 1.
        """
        if self._perturbed is None or draws < 1:
            raise InputError(f"noise_floor needs an explanation as an Explainer made it, and draws >= 1 (got {draws})")
        kept = self._without_highest(self.relevance, self.relevance) if self.grid is None else self.grid.flatten(-2)
        floor = torch.zeros(kept.shape[:-1], dtype=kept.dtype, device=kept.device)
        for seed in range(draws):
            other = self._perturbed(seed)
            moved = self._without_highest(other.relevance, self.relevance) if other.grid is None else other.grid.flatten(-2)
            norm = kept.norm(dim=-1)
            floor = torch.maximum(floor, (moved - kept).norm(dim=-1) / norm.where(norm > 0, 1))
        if bool((floor > NOISY).any()):
            warnings.warn(
                f"this map moves by {float(floor.max()):.1%} under perturbations of rounding size, so its details "
                'are noise; rules="positive" and float64 models move less',
                stacklevel=2,
            )
        return floor

    @staticmethod
    def _without_highest(relevance: Tensor, by: Tensor) -> Tensor:
        return relevance.scatter(-1, by.argmax(-1, keepdim=True), 0.0)

    @property
    def patches(self) -> Tensor:
        """Relevance of the image patches, [B, gh, gw] or [B, K, gh, gw].

        Raises:
            InputError: the tokens of this model do not come from a grid of patches.
        """
        if self.grid is None:
            raise InputError("this model's tokens do not lie on an image; use `relevance`, one value per token")
        return self.grid

    def heatmap(self, size: int | tuple[int, int] | None = None) -> Tensor:
        """The patches scaled up bilinearly to `size` (height, width) pixels, default that of the input image.

        Returns [B, H, W] or [B, K, H, W].

        Raises:
            InputError: the tokens of this model do not come from a grid of patches.
        """
        patches = self.patches
        target = self.image_size if size is None else (size, size) if isinstance(size, int) else tuple(size)
        if target is None:
            raise InputError("the size of the image is not known; pass size=(height, width)")
        flat = patches.reshape(-1, 1, *patches.shape[-2:])
        scaled = F.interpolate(flat, size=target, mode="bilinear", align_corners=False)
        return scaled.reshape(*patches.shape[:-2], *target)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        image: Any = None,
        tokens: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        style: str = "blend",
    ) -> None:
        """Write the explanation of one sample as a picture.

        `path` ending in .html writes coloured words and needs `tokens`, the T strings a tokenizer made. Any other suffix is
        that of a picture: an overlay, or for several targets the picture and one overlay each, side by side. It needs
        `image`: a PIL image, an array [H, W, 3] or [H, W] of uint8 or of floats in 0 … 1, or a tensor [3, H, W] in 0 … 1.
        `names` are the titles of the K targets; `style` is "blend" or, for one target, "contours".

        Raises:
            InputError: the batch holds several samples (save `explanation[i]`), or what the format needs is missing.
        """
        if len(self) != 1:
            raise InputError(f"this explanation holds {len(self)} samples; save one of them: explanation[0].save(...)")
        titles = self._titles(names)
        if str(path).lower().endswith((".html", ".htm")):
            if tokens is None:
                raise InputError("saving as HTML needs tokens=[...], one string per token")
            from fastrel.render.text import save_page

            save_page(path, list(tokens), self.relevance.reshape(-1, self.relevance.shape[-1]), titles)
            return
        if image is None:
            raise InputError("saving an overlay needs image=, the picture that was explained")
        from fastrel.render.overlay import STYLES, as_picture, side_by_side

        picture = as_picture(image)
        maps = self.heatmap((picture.height, picture.width)).reshape(-1, picture.height, picture.width)
        if style not in STYLES or (style != "blend" and len(maps) > 1):
            raise InputError(f"style {style!r} for {len(maps)} targets; choose blend, or contours for one target")
        rendered = STYLES[style](picture, maps[0]) if len(maps) == 1 else side_by_side(picture, list(maps), titles)
        rendered.save(path)

    def _titles(self, names: Sequence[str] | None) -> list[str]:
        count = 1 if self.relevance.dim() == 2 else self.relevance.shape[1]
        if names is not None:
            if len(names) != count:
                raise InputError(f"{len(names)} names for {count} targets")
            return list(names)
        if self.target is None:
            return [""] * count if count == 1 else [f"target {i}" for i in range(count)]
        return [f"class {int(c)}" for c in self.target.flatten()]


@dataclass(frozen=True)
class BlockTrace:
    """What passed through one attention block, for study and tests. Lanes carry a leading K, the number of targets.

    attention [B, h, Tq, Tk]; gradient and relevance of it [K, B, h, Tq, Tk]; value_relevance [K, B, h, Tk, d];
    input_relevance: relevance of what the block reads [K, B, T, D]. Where the head reads one token, the last block has
    Tq = 1: the other rows are exactly zero and are never computed.
    """

    attention: Tensor
    gradient: Tensor | None
    relevance: Tensor | None
    value_relevance: Tensor | None
    input_relevance: Tensor | None


def _sample(perturbed: Callable[[int], Explanation], index: int, seed: int) -> Explanation:
    return perturbed(seed)[index]


def check_finite(name: str, x: Tensor) -> None:
    """Raise InputError if x [B, …] holds NaN or infinity, naming the first sample that does."""
    if not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).reshape(len(x), -1).any(1) if x.dim() else torch.ones(1)
        raise InputError(f"{name} holds NaN or infinity in sample {int(bad.nonzero()[0, 0])}")
