"""Library code that takes sizes from numbers or draws them at random, which no graph can hold, and what gives the same result
without: it takes its place on the clone that is captured, whose results are compared with the live model's."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrel.errors import CaptureError
from fastrel.graph.clone import structural_clone


def as_graphs_can(model: nn.Module) -> bool:
    """Put what a graph can hold in the place of methods in `EQUIVALENTS`, but for those that somebody has replaced; whether there
    were any."""
    found = [
        (module, name) for module in model.modules() for name in vars(type(module)) if _name(module, name) in EQUIVALENTS
    ]
    found = [(module, name) for module, name in found if name not in module.__dict__]
    for module, name in found:
        module.__dict__[name] = types.MethodType(EQUIVALENTS[_name(module, name)], module)
    return bool(found)


def equivalent(model: nn.Module) -> nn.Module:
    """The model itself, or a clone of it where its own code draws at random what does not matter."""
    return clone if as_graphs_can(clone := structural_clone(model)) else model


def _name(module: nn.Module, name: str) -> str:
    method = vars(type(module))[name]
    return f"{getattr(method, '__module__', None)}.{getattr(method, '__qualname__', None)}"


def _vilt_patches(
    self: Any, pixel_values: Tensor, pixel_mask: Tensor, max_image_length: int | None = 200
) -> tuple[Tensor, Tensor, tuple[None, tuple[int, int]]]:
    """The patches of `ViltEmbeddings` in their order, those outside a picture masked; the library draws their order at random and
    leaves out what no picture of the batch has. pixel_values [B, C, H, W], pixel_mask [B, H, W].

    Raises:
        CaptureError: there are more patches than the model takes, so that it draws which it sees.
    """
    x = self.patch_embeddings(pixel_values)
    height, width = x.shape[-2:]
    if isinstance(max_image_length, int) and 0 <= max_image_length < height * width:
        raise CaptureError(
            f"the model draws {max_image_length} of {height} × {width} patches at random at every call "
            f"(max_image_length={max_image_length}); set model.config.max_image_length = -1, or give smaller pictures"
        )
    mask = F.interpolate(pixel_mask[:, None].float(), size=(height, width))[:, 0].long()
    across = self.config.image_size // self.config.patch_size
    learned = self.position_embeddings[0, 1:].unflatten(0, (across, across))
    down, right = _bilinear(height, across, mask[:, :, 0].sum(1)), _bilinear(width, across, mask[:, 0].sum(1))
    positions = torch.einsum("bip,bjq,pqd->bijd", down.to(learned), right.to(learned), learned).flatten(1, 2)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1)
    positions = torch.cat([self.position_embeddings[:, :1].expand(len(x), -1, -1), positions], 1)
    mask = mask.flatten(1)
    return self.dropout(x + positions), torch.cat([torch.ones_like(mask[:, :1]), mask], 1), (None, (height, width))


def _bilinear(size: int, known: int, used: Tensor) -> Tensor:
    """Weights [B, size, known] of `known` values that are interpolated to the first `used` [B] of `size` places, corners at corners."""
    places, sizes, values = (torch.arange(n, device=used.device) for n in (size, size + 1, known))
    at = places * (known - 1) / (sizes[:, None] - 1).clamp(min=1)
    weights = (1 - (at[..., None] - values).abs()).clamp(min=0) * (places < sizes[:, None])[..., None]
    chosen = used[:, None] == sizes  # how large a picture is chooses weights; it is not what the model sees
    return torch.where(chosen[..., None, None], weights, 0.0).sum(1)


#: What takes the place of a method, by its module and qualified name.
EQUIVALENTS: dict[str, Callable[..., Any]] = {
    "transformers.models.vilt.modeling_vilt.ViltEmbeddings.visual_embed": _vilt_patches,
}
