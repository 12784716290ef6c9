"""A home-made encoder to build small models of, and what must hold of every explanation."""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrel
from fastrel.graph.capture import Captured, capture

#: How many random transformers are tried, and so how thorough some other tests are; before a release 300.
EXAMPLES = int(os.environ.get("FASTREL_EXAMPLES", "30"))

#: Whether nothing is left out, as before a release.
RELEASE = EXAMPLES >= 300

#: pytest in a process of its own where kernels take long, interpreted or sanitized: on some of their many cases
#: (`tests.conftest.ONE_IN`).
ON_SOME_KERNELS = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider"]
ON_SOME_KERNELS += [] if RELEASE else ["-m", "not slow"]

WIDTH = 16


class Attention(nn.Module):
    """Multi-head attention, also over another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            self.heads(layer(y))
            for layer, y in zip((self.q, self.k, self.v), (x, *[x if other is None else other] * 2), strict=True)
        )
        return self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))

    @staticmethod
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Token ids [B, T] -> [B, T, D], two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, WIDTH), nn.Sequential(Block(), Block())
        self.position = nn.Parameter(0.3 * torch.randn(64, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks(self.embed(ids) + self.position[: ids.shape[1]])


class Made(nn.Module):
    """Two encoders and some layers, used by a function f(model, *inputs)."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.encoder, self.second, self.block, self.cross = f, Encoder(), Encoder(), Block(), Attention()
        self.head, self.wide, self.layer, self.score = (
            nn.Linear(*sizes) for sizes in ((16, 3), (32, 3), (16, 16), (16, 1))
        )
        self.numbers, self.patches = nn.Linear(4, WIDTH), nn.Conv2d(3, WIDTH, 4, 4)

    def forward(self, first: Tensor, second: Tensor | None = None) -> Any:
        return self.f(self, first) if second is None else self.f(self, first, second)


def made(f: Callable[..., Any]) -> nn.Module:
    """A model of f, in float64."""
    return Made(f).double().eval()


def ids(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    """Token ids [batch, length]."""
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def whole(
    model: nn.Module, *inputs: Tensor, target: Any = None, normalize: bool = False, start: int = 0, **named: Tensor
) -> Tensor:
    """What all maps of the rollout of attention maps add up to, [B]: 2ⁿ, or 1 where rows are normalised."""
    explainer = fastrel.Explainer(model, "rollout", normalize_rollout=normalize, start_layer=start, backend="torch")
    maps = explainer(*inputs, target=target, **named).maps
    return sum(one.relevance.flatten(1).sum(1) for one in maps.values())  # type: ignore[return-value]


def remembered() -> Callable[..., Captured]:
    """`capture`, once for every kind of call: for explainers of one model and its copies, none of which changes."""
    known: dict[Any, Captured] = {}

    def captured(model: nn.Module, args: Any, kwargs: Any, batch_varies: bool = True) -> Captured:
        sizes = [(x.shape, x.dtype) for x in args]
        key = (*sizes, batch_varies, next(model.parameters()).dtype)
        if key not in known:
            known[key] = capture(model, args, kwargs, batch_varies)
        return known[key]

    return captured
