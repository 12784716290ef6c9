"""Libraries that do related work, as their documentation has one call them, on timm's ViTs: a model -> a call of images [B, 3, H, W].

All explain class 0. Each raises ImportError where its library is not installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]


def captum_input_x_gradient(model: nn.Module) -> Call:
    """Each pixel times its gradient."""
    from captum.attr import InputXGradient

    attribute = InputXGradient(model)
    return lambda images: attribute.attribute(images.clone().requires_grad_(), target=0)


def zennit_lrp(model: nn.Module) -> Call:
    """LRP-ε and z+ of linear layers and convolutions; attention has the plain gradient."""
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus

    def relevance(images: Tensor) -> Tensor:
        one_hot = torch.eye(model.num_classes)[[0] * len(images)]  # type: ignore[call-overload, index]
        with Gradient(model=model, composite=EpsilonPlus()) as attributor:
            return attributor(images.clone().requires_grad_(), one_hot)[1]

    return relevance


def grad_cam(model: Any) -> Call:
    """Of the last block; on a copy whose weights require gradients, for it reads them off a layer."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = copy.deepcopy(model).requires_grad_()
    height, width = model.patch_embed.grid_size

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2)

    cam = GradCAM(model=model, target_layers=[model.blocks[-1].norm1], reshape_transform=grid)
    return lambda images: cam(input_tensor=images, targets=[ClassifierOutputTarget(0)] * len(images))


def lxt_attnlrp(model: nn.Module) -> Call:
    """AttnLRP of the tokens, as `attnlrp` below."""
    relevance = attnlrp(model)
    return lambda images: relevance(images, torch.zeros(len(images), dtype=torch.long))


def attnlrp(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """AttnLRP of images [B, 3, H, W] and targets [B], [B, T]: the ViT written with lxt's functions, whose backward passes propagate it.

    `lxt.efficient` patches models of other libraries; timm's are not among them.
    """
    import lxt.explicit.functional as lxt
    from lxt.explicit.rules import identity

    epsilon = 1e-12

    def linear(layer: nn.Module, x: Tensor) -> Tensor:
        return lxt.linear_epsilon(x, layer.weight, layer.bias, epsilon)

    def norm(layer: nn.Module, x: Tensor) -> Tensor:
        return lxt.layer_norm_grad_fn.apply(x, layer.weight, layer.bias, layer.eps, epsilon)

    def relevance(images: Tensor, target: Tensor) -> Tensor:
        tokens = model._pos_embed(model.patch_embed(images)).detach().requires_grad_()
        h = tokens
        for block in model.blocks:
            qkv = linear(block.attn.qkv, norm(block.norm1, h)).unflatten(-1, (3, block.attn.num_heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            scores = identity(partial(torch.mul, other=q.shape[-1] ** -0.5), lxt.matmul(q, k.mT, False, epsilon))
            mixed = lxt.matmul(lxt.softmax(scores, -1), v, False, epsilon).transpose(1, 2).flatten(2)
            h = lxt.add2(h, linear(block.attn.proj, mixed), False, epsilon)
            hidden = identity(F.gelu, linear(block.mlp.fc1, norm(block.norm2, h)))
            h = lxt.add2(h, linear(block.mlp.fc2, hidden), False, epsilon)
        picked = linear(model.head, norm(model.norm, h)[:, 0]).gather(1, target[:, None])
        return torch.autograd.grad(picked, tokens, picked.detach())[0].sum(-1)

    return relevance
