"""Relevance by autograd: each function against the reference, and maps that can be differentiated themselves."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrel
from fastrel import functional, ops
from fastrel.reference import rules as R
from tests import golden_files as golden
from tests import models

RULES = ["positive", "official"]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rules", RULES)
def test_functions_propagate_what_the_reference_does(rules: R.Rules) -> None:
    x, weight, bias, rel = random(2, 5, 8).requires_grad_(), random(6, 8), random(6), random(2, 5, 6).abs()
    y = functional.linear(x, weight, bias, rules)
    assert torch.equal(y, nn.functional.linear(x, weight, bias))
    (given,) = torch.autograd.grad(y, x, rel)
    assert golden.relative_error(given, R.linear(x.detach(), weight, rel, rules)) < 1e-10

    u, v, rel = random(2, 5, 8).requires_grad_(), random(2, 5, 8).requires_grad_(), random(2, 5, 8).abs()
    for ours, theirs in zip(
        torch.autograd.grad(functional.add(u, v, rules), (u, v), rel), R.add(u, v, rel, rules), strict=True
    ):
        assert golden.relative_error(ours, theirs.detach()) < 1e-10

    attn, v, rel = (
        random(2, 3, 5, 5).softmax(-1).requires_grad_(),
        random(2, 3, 5, 4).requires_grad_(),
        random(2, 3, 5, 4).abs(),
    )
    given = torch.autograd.grad(functional.matmul(attn, v, rules, attention=True), (attn, v), rel)
    for ours, theirs in zip(given, R.attention_value(attn, v, rel, rules), strict=True):
        assert golden.relative_error(ours, theirs.detach()) < 1e-10

    x = random(2, 5, 8).requires_grad_()
    for y in (
        functional.layer_norm(x, (8,)),
        functional.gelu(x),
        functional.softmax(x),
        functional.multiply_constant(x, 3.0),
    ):
        rel = random(*y.shape)
        assert torch.equal(torch.autograd.grad(y, x, rel)[0], rel)
    (given,) = torch.autograd.grad(functional.mean(x, [1], rules=rules), x, rel[:, 0])
    assert golden.relative_error(given, R.mean(x.detach(), rel[:, :1], [1], rules)) < 1e-10


def _linear_of(rules: str, x: Tensor, weight: Tensor, rel: Tensor, grad: Tensor) -> Any:
    return ops.zplus_linear(x, weight, None, None, rel, grad, rules)


def _add_of(rules: str, u: Tensor, v: Tensor, rel: Tensor) -> Any:
    return ops.residual_add(u, v, rel, 0, rules)


def _attention_of(rules: str, *args: Tensor) -> Any:
    q, k, v, rel, grad, row = args
    options = (0.5, False, 0, rules, "gradient_relevance", True, True, rules == "positive")
    return tuple(x for x in ops.attention_relevance(q, k, v, None, rel, grad, row, *options) if x.numel())


def test_gradients_through_the_fused_operators() -> None:
    """gradcheck in float64: a relevance map may be a part of a loss."""

    def leaf(*shape: int) -> Tensor:
        return random(*shape).requires_grad_()

    def positive(*shape: int) -> Tensor:
        return (random(*shape).abs() + 0.1).requires_grad_()

    def check(function: Any, *args: Any) -> None:
        assert torch.autograd.gradcheck(function, args)

    for rules in RULES:
        linear = functools.partial(_linear_of, rules)
        check(linear, leaf(2, 3, 4), leaf(5, 4), positive(1, 2, 3, 5), leaf(1, 2, 3, 5))
        add = functools.partial(_add_of, rules)
        check(add, positive(2, 6), positive(2, 6), positive(1, 2, 6))
        lanes = (positive(1, 1, 2, 3, 4), leaf(1, 1, 2, 3, 4), positive(1, 1, 3))
        check(functools.partial(_attention_of, rules), *(positive(1, 2, 3, 4) for _ in range(3)), *lanes)
    for frozen in (False, True):
        norm = functools.partial(ops.layer_norm_backward, dims=1, eps=1e-5, frozen=frozen)
        check(norm, leaf(1, 2, 3, 4), leaf(2, 3, 4), leaf(4))
    check(ops.activation_ratio, leaf(1, 2, 3), positive(2, 3), leaf(2, 3))
    check(lambda g, r: ops.attention_update(None, g, r, "gradient_relevance"), leaf(1, 2, 3, 4, 4), positive(1, 2, 3, 4, 4))
    check(lambda row, m: ops.rollout_row(row, m, True), positive(1, 2, 3), positive(1, 2, 3, 3))


@pytest.mark.parametrize("name", ["timm_vit", "hf_bert"])
def test_a_map_is_differentiable_with_respect_to_the_weights(name: str) -> None:
    """The derivative along a random direction, against finite differences."""
    model, given = models.build(name), models.inputs(name)
    explainer, weights = fastrel.Explainer(model), [p for p in model.parameters() if p.dim() > 1]

    def value(create_graph: bool) -> Tensor:
        relevance = explainer(**given, target=1, create_graph=create_graph).relevance
        return (relevance * torch.linspace(0, 1, relevance.shape[1], dtype=relevance.dtype)).sum()

    assert golden.relative_error(value(True).detach(), value(False)) < 1e-10
    direction = [1e-1 * torch.randn_like(p) for p in weights]
    grads = torch.autograd.grad(value(True), weights, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True) if g is not None)
    step = 1e-6
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            for p, d in zip(weights, direction, strict=True):
                p.add_(d, alpha=sign * step)
            ends.append(float(value(False)))
    assert abs((ends[0] - ends[1]) / (2 * step) - slope) < 1e-4 * abs(slope)


def test_training_with_relevance_in_the_loss_brings_it_down() -> None:
    """A few steps that push relevance away from one patch, while the prediction is kept."""
    model, images = models.build("timm_vit"), models.inputs("timm_vit")["x"]
    explainer, classes = fastrel.Explainer(model), torch.tensor([0, 1, 2])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def shares() -> tuple[Tensor, Tensor]:
        explanation = explainer(images, target=classes, create_graph=True)
        patches = explanation.patches.flatten(1)
        return patches[:, 5] / patches.sum(1), nn.functional.cross_entropy(explanation.logits, classes)

    first = shares()
    for _ in range(15):
        share, task = shares()
        optimizer.zero_grad()
        (share.mean() * 20 + task).backward()
        optimizer.step()
    last = shares()
    assert last[0].mean() < 0.5 * first[0].mean()
    assert last[1] < first[1]
