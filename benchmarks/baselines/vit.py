"""Transformer attribution of a ViT as the official code computes it: one image at a time, everything kept, block by block."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import layers


class TimmViT(Protocol):
    """What is taken over of a timm `VisionTransformer` with a class token: weights, and the sizes that they do not show."""

    patch_embed: Any
    cls_token: Any
    pos_embed: Any
    blocks: Any
    norm: Any
    head: Any


class Attention(nn.Module):
    """Attention that keeps its map, the map's gradient and the map's relevance."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = layers.Linear(width, 3 * width), layers.Linear(width, width)
        self.scores, self.softmax, self.mixing = layers.Matmul(), layers.Softmax(), layers.Matmul()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        self.map = self.softmax(self.scores([q, k.mT]) * self.scale)
        self.map.register_hook(self._keep_gradient)
        return self.proj(self.mixing([self.map, v]).transpose(1, 2).flatten(2))

    def _keep_gradient(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def relprop(self, rel: Tensor) -> Tensor:
        """R of the output [1, T, D] -> R of the input."""
        rel = self.proj.relprop(rel).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        self.relevance, of_v = (part / 2 for part in self.mixing.relprop(rel))
        of_q, of_k = (part / 2 for part in self.scores.relprop(self.softmax.relprop(self.relevance)))
        return self.qkv.relprop(torch.stack([of_q, of_k.mT, of_v]).permute(1, 3, 0, 2, 4).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with gelu between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = layers.Linear(width, hidden), layers.Activation(F.gelu), layers.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def relprop(self, rel: Tensor) -> Tensor:
        """R of the output [1, T, D] -> R of the input."""
        return self.fc1.relprop(self.act.relprop(self.fc2.relprop(rel)))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = layers.LayerNorm(width, eps=eps), layers.LayerNorm(width, eps=eps)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, hidden)
        self.add1, self.add2, self.clone1, self.clone2 = layers.Add(), layers.Add(), layers.Clone(), layers.Clone()

    def forward(self, x: Tensor) -> Tensor:
        stays, goes = self.clone1(x)
        x = self.add1([stays, self.attn(self.norm1(goes))])
        stays, goes = self.clone2(x)
        return self.add2([stays, self.mlp(self.norm2(goes))])

    def relprop(self, rel: Tensor) -> Tensor:
        """R of the output [1, T, D] -> R of the input."""
        stays, goes = self.add2.relprop(rel)
        rel = self.clone2.relprop([stays, self.norm2.relprop(self.mlp.relprop(goes))])
        stays, goes = self.add1.relprop(rel)
        return self.clone1.relprop([stays, self.norm1.relprop(self.attn.relprop(goes))])


class ViT(nn.Module):
    """A ViT with a class token, with a copy of a timm model's weights."""

    def __init__(self, model: TimmViT) -> None:
        super().__init__()
        first, width = model.blocks[0], model.pos_embed.shape[-1]
        embedding = model.patch_embed, model.cls_token, model.pos_embed
        self.patch_embed, self.cls_token, self.pos_embed = copy.deepcopy(embedding)
        self.blocks = nn.ModuleList(
            Block(width, first.attn.num_heads, first.mlp.fc1.out_features, first.norm1.eps) for _ in model.blocks
        )
        self.norm, self.pool = layers.LayerNorm(width, eps=model.norm.eps), layers.FirstToken()
        self.head = layers.Linear(width, model.head.out_features)
        self.to(self.pos_embed.dtype).load_state_dict(model.state_dict())  # type: ignore[attr-defined]
        self.requires_grad_().eval()

    def forward(self, image: Tensor) -> Tensor:
        """Logits [1, C] of an image [1, 3, H, W]."""
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), self.patch_embed(image)], 1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(self.norm(x)).squeeze(1))

    def relprop(self, rel: Tensor) -> None:
        """R of the logits [1, C] to every attention map."""
        rel = self.norm.relprop(self.pool.relprop(self.head.relprop(rel).unsqueeze(1)))
        for block in reversed(self.blocks):
            rel = block.relprop(rel)

    def explain(self, image: Tensor, target: int) -> Tensor:
        """The map of `target` over the tokens of an image [1, 3, H, W], [T]: the class token's row of ∏ (I + E_h[(∇A ⊙ R_A)⁺]).

        The gradient comes from `backward`, which computes that of the weights, too.
        """
        logits = self(image)
        one_hot = torch.zeros_like(logits)
        one_hot[0, target] = 1
        self.zero_grad()
        (one_hot * logits).sum().backward(retain_graph=True)
        self.relprop(one_hot)
        eye = torch.eye(self.pos_embed.shape[1], dtype=logits.dtype, device=logits.device)
        maps = [(b.attn.gradient * b.attn.relevance)[0].clamp(min=0).mean(0).detach() + eye for b in self.blocks]
        joint = maps[0]
        for own in maps[1:]:
            joint = own @ joint
        return joint[0]

    def maps(self, images: Tensor, target: int) -> Tensor:
        """Of images [B, 3, H, W], one by one, [B, T]."""
        return torch.stack([self.explain(image[None], target) for image in images])
