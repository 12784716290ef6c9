"""Convolutions: the patch embedding that reads the image."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastrel.errors import UnsupportedModelError
from fastrel.lanes import Lane, Lanes, arguments
from fastrel.reference import rules as reference
from fastrel.rules import rule
from fastrel.transform import Transform, describe

aten = torch.ops.aten


@rule(aten.conv2d.default)
def conv2d(t: Transform, node: fx.Node, out: Lanes) -> None:
    """The first convolution of an image: relevance by the z^B rule, the ordinary gradient."""
    x, weight, _, stride, padding, dilation, groups = arguments(node, None, [1, 1], [0, 0], [1, 1], 1, count=7)
    if not t.wants(x):
        return
    if x.op != "placeholder" or any(padding) or any(d != 1 for d in dilation) or groups != 1:
        raise UnsupportedModelError(f"no relevance rule for {describe(node)}, unless it is a patch embedding of the image")
    value, kernel, steps = t.value(x), t.value(weight), list(stride)
    grad = rel = None
    if out.grad:
        grad = Lane(t.emit.call(conv_backward, t.dense(out.grad, node).node, value, kernel, steps))
    if out.rel:
        rel = Lane(t.emit.call(pixel_relevance, t.dense(out.rel, node).node, value, kernel, steps))
    t.give(x, grad, rel)


def conv_backward(grad: Tensor, x: Tensor, weight: Tensor, stride: list[int]) -> Tensor:
    """grad [K, B, D, gh, gw] through a convolution of x [B, C, H, W] -> [K, B, C, H, W]."""
    back = F.conv_transpose2d(grad.flatten(0, 1), weight, stride=stride)
    return F.pad(back, (0, x.shape[3] - back.shape[3], 0, x.shape[2] - back.shape[2])).unflatten(0, grad.shape[:2])


def pixel_relevance(rel: Tensor, x: Tensor, weight: Tensor, stride: list[int]) -> Tensor:
    """rel [K, B, D, gh, gw] -> [K, B, C, H, W] by `reference.rules.pixel_conv`, target by target."""
    height, width = ((n - 1) * s + k for n, s, k in zip(rel.shape[3:], stride, weight.shape[2:], strict=True))
    used = (..., slice(height), slice(width))
    out = rel.new_zeros(rel.shape[0], *x.shape)
    for k, target in enumerate(rel):
        out[k][used] = reference.pixel_conv(x[used], weight, target, (stride[0], stride[1]))
    return out
