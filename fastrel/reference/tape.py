"""A forward pass that can be replayed backwards with the relevance rules."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrel.reference import gradients
from fastrel.reference import rules as R
from fastrel.reference.convolution import pixel_convolution
from fastrel.reference.operators import index_map


class Tape:
    """Calls layers and remembers how each turns the relevance of its output into that of its inputs.

    A value may be consumed once; where a model uses one several times it calls `clone`, as the published code does.
    Gradients come from autograd, which the tape does not disturb; or, `frozen`, from AttnLRP's rules (`gradients`).
    """

    def __init__(self, rules: R.Rules = "positive", frozen: bool = False) -> None:
        self.rules, self._frozen = rules, frozen
        self._steps: list[tuple[list[Tensor], list[Tensor], Callable[..., Any]]] = []

    def record(self, outputs: list[Tensor], inputs: list[Tensor], step: Callable[..., Any]) -> None:
        """A step of a rule's own: `step(*relevance of outputs)` -> relevance of the inputs."""
        self._steps.append((outputs, inputs, step))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Eq. (5)."""
        y = F.linear(x, weight, bias)
        self.record([y], [x], lambda rel: [R.linear(x, weight, rel, self.rules)])
        return y

    def add(self, u: Tensor, v: Tensor) -> Tensor:
        """Residual add."""
        y = u + v
        self.record([y], [u, v], lambda rel: R.add(u, v, rel, self.rules))
        return y

    def query_key(self, q: Tensor, k: Tensor) -> Tensor:
        """Q·Kᵀ."""
        y = self._half(q) @ self._half(k).mT
        self.record([y], [q, k], lambda rel: R.query_key(q, k, rel, self.rules))
        return y

    def attention_value(self, attn: Tensor, v: Tensor, signed: bool = False) -> Tensor:
        """A·V; `signed`: with a map that is no softmax, whose entries may have both signs."""
        y = attn @ self._half(v)
        rule = R.mixed_attention_value if signed else R.attention_value
        self.record([y], [attn, v], lambda rel: rule(attn, v, rel, self.rules))
        return y

    def softmax(self, scores: Tensor) -> Tensor:
        """Attention maps from scores."""
        return self.map(lambda t: t.softmax(-1), scores)

    def map(self, f: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
        """Maps that any function makes of scores. What eq. (13) reads is the whole gradient of a map; the half of it that A V leaves
        goes on."""
        y = self._half(f(scores))
        self.record([y], [scores], lambda rel: [R.softmax(rel, self.rules)])
        return y

    def clone(self, x: Tensor, count: int) -> list[Tensor]:
        """A value that is used `count` times."""
        copies = [x.view_as(x) for _ in range(count)]
        self.record(copies, [x], lambda *rels: [R.clone(x, list(rels), self.rules)])
        return copies

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """LayerNorm: relevance passes unchanged."""
        if self._frozen:
            return self.identity(lambda t: gradients.layer_norm(t, weight, bias, eps), x)
        return self.identity(lambda t: F.layer_norm(t, weight.shape, weight, bias, eps), x)

    def activation(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """An activation function: relevance passes unchanged."""
        return self.identity((lambda t: gradients.activation(f, t)) if self._frozen else f, x)

    def _half(self, x: Tensor) -> Tensor:
        return gradients.half(x) if self._frozen else x

    def identity(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Scaling and the like: relevance passes unchanged."""
        y = f(x)
        self.record([y], [x], lambda rel: [R.identity(rel)])
        return y

    def rearrange(self, f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        """A pure rearrangement of entries: relevance goes back where its entry came from."""
        y, vjp = torch.func.vjp(f, *xs)[:2]
        self.record([y], list(xs), lambda rel: list(vjp(rel)))
        return y

    def select_token(self, x: Tensor, index: int) -> Tensor:
        """One token of x [B, T, D]."""
        y = x[:, index]
        self.record([y], [x], lambda rel: [index_map(lambda t: t[:, index], x, rel, self.rules)])
        return y

    def pixel_conv(self, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int]) -> Tensor:
        """Patch embedding of an image."""
        y = F.conv2d(x, weight, bias, stride)
        self.record([y], [x], lambda rel: [pixel_convolution(x, weight, rel, stride)])
        return y

    def relprop(self, output: Tensor, seed: Tensor) -> dict[int, Tensor]:
        """Relevance of every recorded value, by `id`, for the relevance `seed` of `output`."""
        rel = {id(output): seed}
        with torch.no_grad():
            for outputs, inputs, step in reversed(self._steps):
                given = [rel.get(id(y)) for y in outputs]
                if all(r is None for r in given):
                    continue
                filled = [torch.zeros_like(y) if r is None else r for r, y in zip(given, outputs, strict=True)]
                rel.update((id(x), r) for x, r in zip(inputs, step(*filled), strict=True))
        return rel
