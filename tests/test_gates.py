"""Gates and activation functions by AttnLRP's rules, which the default method's gradient follows, also of functions that are not 0
at 0 (sigmoid, exp, softplus): against the same rules by autograd, and as steady under rounding as the plain gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrel
from fastrel.reference import gradients
from fastrel.rules import pointwise
from tests import golden_files as golden

MLPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid gate": lambda x, g: x * g.sigmoid(),
    "glu": lambda x, g: F.glu(torch.cat([x, g], -1), -1),
    "silu gate": lambda x, g: x * F.silu(g),
    "exp": lambda x, _: (-x.abs()).exp(),
    "softplus": lambda x, _: F.softplus(x),
    "softplus written out": lambda x, _: torch.log1p(x.exp()),
    "cosine": lambda x, _: x.cos(),
    "swish written out": lambda x, _: x * (x * 1.702).sigmoid(),
    "a product that is not 0 at 0": lambda x, _: x.cos() * x.exp(),
    "a quotient": lambda x, _: x / (1 + (-x).exp()),
    "hardsigmoid gate": lambda x, g: x * F.hardsigmoid(g),
    "steps": lambda x, g: g + x.sign() + x.ceil() * 0.1,
    "a quotient of what is 0 at 0": lambda x, _: x.sin() / x,
}

activation, half = gradients.activation, gradients.half
#: The same with AttnLRP's gradient behind them.
RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid gate": lambda x, g: half(x) * half(activation(torch.sigmoid, g)),
    "glu": lambda x, g: half(x) * half(activation(torch.sigmoid, g)),
    "silu gate": lambda x, g: half(x) * half(activation(F.silu, g)),
    "exp": lambda x, _: activation(torch.exp, -activation(torch.abs, x)),
    "softplus": lambda x, _: activation(F.softplus, x),
    "softplus written out": lambda x, _: activation(torch.log1p, activation(torch.exp, x)),
    "cosine": lambda x, _: activation(torch.cos, x),
    "swish written out": lambda x, _: activation(lambda x: x * (x * 1.702).sigmoid(), x),
    "a product that is not 0 at 0": lambda x, _: activation(torch.cos, x) * activation(torch.exp, x),
    "a quotient": lambda x, _: activation(F.silu, x),
    "hardsigmoid gate": lambda x, g: half(x) * half(activation(F.hardsigmoid, g)),
    "steps": lambda x, g: g + x.sign() + x.ceil() * 0.1,
    "a quotient of what is 0 at 0": lambda x, _: activation(torch.sin, x) / x,
}


class Gated(nn.Module):
    """Two blocks [B, T, 8]; with `rules` what autograd finds are AttnLRP's rules."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.embed, self.head = name, nn.Embedding(20, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({key: nn.Linear(8, 24 if key == "qkv" else 8) for key in ("qkv", "out", "up", "gate", "down")})
            for _ in range(2)
        )

    def forward(self, ids: Tensor, *, rules: bool = False) -> Tensor:
        return self.read(self.embed(ids), rules)

    def read(self, x: Tensor, rules: bool) -> Tensor:
        """The logits of embeddings."""
        norm = partial(gradients.layer_norm, weight=None, bias=None, eps=1e-5) if rules else lambda x: F.layer_norm(x, (8,))
        part = half if rules else lambda x: x
        mlp = (RULES if rules else MLPS)[self.name]
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            q, k, v = block["qkv"](norm(x)).chunk(3, -1)
            x = x + block["out"](part((part(q) @ part(k).mT / 8**0.5).softmax(-1)) @ part(v))
            y = norm(x)
            x = x + block["down"](mlp(block["up"](y), block["gate"](y)))
        return self.head(x.mean(1))


IDS = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MLPS)
def test_gradient_equals_the_rules_by_autograd(name: str) -> None:
    model = Gated(name).double().eval()
    x = model.embed(IDS).detach().requires_grad_()
    score = model.read(x, rules=True)
    torch.testing.assert_close(score, model(IDS))
    (gradient,) = torch.autograd.grad(score[:, 1].sum(), x)
    ours = fastrel.Explainer(model, "attnlrp", backend="torch")(IDS, target=1).relevance
    assert golden.relative_error(ours, (x * gradient).sum(-1).detach()) < 1e-9


@pytest.mark.parametrize("name", MLPS)
def test_default_is_steady(name: str) -> None:
    """y/x of a function that is not 0 at 0 multiplied gradients by up to 1e5 in four blocks, and maps moved by 1e-2."""
    model = Gated(name).eval()
    single = fastrel.Explainer(model)(IDS, target=1).relevance
    exact = fastrel.Explainer(model.double(), backend="torch")(IDS, target=1).relevance
    assert golden.map_error(single, exact) < 1e-5
    plain, frozen = (
        torch.stack([one.gradient.norm() for one in fastrel.Explainer(model, method).trace(IDS, target=1)])
        for method in ("transformer_attribution", "frozen_attribution")
    )
    assert (frozen < 3 * plain).all()


def test_a_secant_is_the_mean_slope_and_has_a_gradient() -> None:
    x = torch.tensor([-3.0, -1e-4, -1e-7, 0.0, 1e-9, 1e-5, 2.0], dtype=torch.float64, requires_grad=True)
    expected = torch.where(x == 0, 1.0, torch.expm1(x) / torch.where(x == 0, 1.0, x))
    torch.testing.assert_close(gradients.secant(torch.exp, x), expected, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(partial(gradients.secant, torch.sigmoid), x[[0, 1, 6]].detach().requires_grad_())


class Mixed(Gated):
    """Keys mixed by a learned matrix."""

    def __init__(self) -> None:
        super().__init__("silu gate")
        self.mix = nn.Parameter(torch.randn(7, 7))

    def read(self, x: Tensor, rules: bool) -> Tensor:
        """The logits of embeddings."""
        for block in self.blocks:
            q, k, v = block["qkv"](F.layer_norm(x, (8,))).chunk(3, -1)  # type: ignore[index]
            x = x + (q @ (self.mix.expand(len(x), 7, 7) @ k).mT / 8**0.5).softmax(-1) @ v
        return self.head(x.mean(1))


def test_a_product_with_a_constant_takes_the_whole_gradient() -> None:
    report = fastrel.Explainer(Mixed().double().eval(), backend="torch").verify(IDS, target=1)
    assert report.ok, report


def test_verify_sees_a_wrong_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = pointwise.ops.activation_ratio
    monkeypatch.setattr(pointwise.ops, "activation_ratio", lambda *args: ratio(*args) * 1.01)
    report = fastrel.Explainer(Gated("silu gate").double().eval(), backend="torch").verify(IDS, target=1)
    assert [check.name for check in report.checks if not check.ok] == ["gradient by AttnLRP"]
