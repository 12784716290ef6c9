"""Relevance rules of convolutions: linear layers over windows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrel.reference.operators import layer
from fastrel.reference.rules import OFFICIAL_EPSILON, Rules

#: The convolution for a weight [out, in / groups, *window], and the transposed one for [in, out / groups, *window], by dimensions.
CONVOLUTIONS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
TRANSPOSED: dict[int, Any] = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def convolution(x: Tensor, weight: Tensor, rel: Tensor, rules: Rules = "positive", *options: Any) -> Tensor:
    """Eq. (5), as for a linear layer; the bias takes no part, and zeros of the padding contribute nothing.

    Z = x⁺∗W⁺ + x⁻∗W⁻,  S = R ⊘ Z,  R' = x⁺ ⊙ (S ∗ᵀ W⁺) + x⁻ ⊙ (S ∗ᵀ W⁻).   x [B, C, *tokens], weight [D, C / groups, *window],
    rel [..., B, D, *windows], options: stride, padding, dilation, groups.
    """

    return layer(lambda a, w: CONVOLUTIONS[weight.dim()](a, w, None, *options), x, weight, rel, rules)


def transposed_convolution(x: Tensor, weight: Tensor, rel: Tensor, rules: Rules = "positive", *options: Any) -> Tensor:
    """The same for a transposed convolution, weight [C, D / groups, *window]; options: stride, padding, output padding, groups,
    dilation."""
    return layer(lambda a, w: TRANSPOSED[weight.dim()](a, w, None, *options), x, weight, rel, rules)


def pixel_convolution(x: Tensor, weight: Tensor, rel: Tensor, stride: tuple[int, int]) -> Tensor:
    """The first convolution, whose inputs are bounded by the image's own range [l, h]: the z^B rule.

    S = R ⊘ (x∗W − l∗W⁺ − h∗W⁻),  R' = x ⊙ (S∗W) − l ⊙ (S∗W⁺) − h ⊙ (S∗W⁻).   x [B, 3, H, W], no padding, rel [..., B, D, gh, gw];
    pixels that no window reaches get 0.
    """
    used = tuple((n - 1) * s + k for n, s, k in zip(rel.shape[-2:], stride, weight.shape[2:], strict=True))
    seen = x[..., : used[0], : used[1]]
    low, high = (t.expand_as(seen) for t in (seen.amin((1, 2, 3), keepdim=True), seen.amax((1, 2, 3), keepdim=True)))
    terms = ((seen, weight, 1), (low, weight.clamp(min=0), -1), (high, weight.clamp(max=0), -1))
    z = sum(sign * F.conv2d(value, w, stride=stride) for value, w, sign in terms)
    ratios = (rel / (z + OFFICIAL_EPSILON)).reshape(rel.shape[:-4].numel(), *rel.shape[-4:])
    parts = [sum(sign * value * F.conv_transpose2d(s, w, stride=stride) for value, w, sign in terms) for s in ratios]
    full = F.pad(torch.stack(parts), (0, x.shape[-1] - used[1], 0, x.shape[-2] - used[0]))  # type: ignore[arg-type]
    return full.reshape(*rel.shape[:-4], *x.shape)
