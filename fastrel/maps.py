"""The map over the tokens of one input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from fastrel.errors import InputError


@dataclass(frozen=True)
class TokenMap:
    """The map over the tokens of one input of the model.

    Attributes:
        relevance: over all tokens, raw: [B, T], or [B, K, T] for K targets per sample.
        grid: the part of it that lies on patches of an image, [B, gh, gw] or [B, K, gh, gw], of the frames of a film or of a volume,
            [B, (K,) frames, gh, gw]; None for text.
        image_size: (height, width) in pixels of the images explained; None for text.
        beside: names of other inputs at the same positions, which the model takes together with this one before any attention (token
            types, aspects, a second set of ids that is embedded and added): the map is over the positions of all of them.
    """

    relevance: Tensor
    grid: Tensor | None = None
    image_size: tuple[int, int] | None = None
    beside: tuple[str, ...] = ()

    @property
    def patches(self) -> Tensor:
        """Relevance of the image patches, [B, gh, gw] or [B, K, gh, gw]; of films and volumes [B, (K,) frames, gh, gw].

        Raises:
            InputError: the tokens of this input do not come from a grid of patches.
        """
        if self.grid is None:
            raise InputError(
                "this model's tokens do not lie on an image, as far as is known; pass grid=(rows, columns) or use `relevance`"
            )
        return self.grid

    def heatmap(self, size: int | tuple[int, int] | None = None) -> Tensor:
        """The patches scaled up bilinearly.

        Args:
            size: (height, width) in pixels, or one number for both; default that of the input image.

        Returns:
            [B, H, W] or [B, K, H, W]; one such map per frame of a film or slice of a volume, [B, (K,) frames, H, W].

        Raises:
            InputError: the tokens of this input do not come from a grid of patches, or the image's size is not known.
        """
        patches = self.patches
        target = self.image_size if size is None else (size, size) if isinstance(size, int) else tuple(size)
        if target is None:
            raise InputError("the size of the image is not known; pass size=(height, width)")
        flat = patches.reshape(-1, 1, *patches.shape[-2:])
        scaled = F.interpolate(flat, size=target, mode="bilinear", align_corners=False)
        return scaled.reshape(*patches.shape[:-2], *target)

    def map(self, f: Callable[[Tensor], Tensor]) -> TokenMap:
        """The map with f applied to its tensors."""
        return replace(self, relevance=f(self.relevance), grid=None if self.grid is None else f(self.grid))
