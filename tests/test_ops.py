"""Operators: torch's own checks of each registration, and the rows that need not be computed."""

import operator

import pytest
import torch
from torch import Tensor

import fastrel
from fastrel import demo, ops
from fastrel.ops.library import CPU_KERNELS, REFERENCES
from fastrel.reference import gradients
from fastrel.reference import rules as R
from tests import golden_files as golden
from tests import models

RULES = ["positive", "official", "original_lrp"]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def check(op: torch._ops.OpOverload, *args: object) -> None:
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("rules", RULES)
def test_zplus_linear(rules: R.Rules) -> None:
    x, weight, bias = random(2, 5, 8), random(6, 8), random(6)
    y, rel, grad = x @ weight.T + bias, random(3, 2, 5, 6), random(3, 2, 5, 6)
    expected = R.linear(x, weight, rel, rules)
    for given in ((y, bias), (y - bias, None), (None, None)):
        rel_in, grad_in = ops.zplus_linear(x, weight, *given, rel, grad, rules)
        assert golden.relative_error(rel_in, expected) < 1e-10
        assert golden.relative_error(grad_in, grad @ weight) < 1e-12
        check(ops.zplus_linear, x, weight, *given, rel, grad, rules)
    assert ops.zplus_linear(x, weight, y, bias, rel, None, rules)[1].numel() == 0


@pytest.mark.parametrize("rules", RULES)
def test_residual_add(rules: R.Rules) -> None:
    u, v, rel = random(4, 3, 5), random(4, 3, 5), random(2, 4, 3, 5)
    expected = R.add(u, v, rel, rules)
    for ours, theirs in zip(ops.residual_add(u, v, rel, 0, rules), expected, strict=True):
        assert golden.relative_error(ours, theirs) < 1e-12
    moved = ops.residual_add(u.movedim(0, 1), v.movedim(0, 1), rel.movedim(1, 2), 1, rules)
    for ours, theirs in zip(moved, expected, strict=True):
        assert golden.relative_error(ours.movedim(2, 1), theirs) < 1e-12
    check(ops.residual_add, u, v, rel, 0, rules)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_attention_relevance(rules: R.Rules, mask: str) -> None:
    q, k, v = random(2, 3, 5, 4), random(2, 3, 7, 4), random(2, 3, 7, 4)
    given = {"none": None, "causal": None, "bool": torch.rand(2, 1, 5, 7) > 0.3, "float": random(2, 1, 5, 7)}[mask]
    rel, grad, row = random(2, 2, 3, 5, 4).abs(), random(2, 2, 3, 5, 4), random(2, 2, 5)
    for inputs, halves in ((True, False), (True, True), (False, False)):
        options = (0.5, mask == "causal", 0, rules, "gradient_relevance", True, inputs, halves)
        check(ops.attention_relevance, q, k, v, given, rel, grad, row, *options)
    *_, kept, through = ops.attention_relevance(q, k, v, given, rel, grad, row, *options)
    some = ops.attention_relevance(
        q[:, :, 2:], k, v, None if given is None else given[:, :, 2:], rel[..., 2:, :], grad[..., 2:, :], row[..., 2:],
        0.5, mask == "causal", 2, rules, "gradient_relevance", True, True
    )  # fmt: skip
    assert golden.relative_error(some[6], kept[..., 2:]) < 1e-12
    assert some[7].shape == through.shape


@pytest.mark.parametrize("update", ops.UPDATES)
def test_attention_update_and_rollout_row(update: str) -> None:
    attn, grad, rel, row = random(2, 3, 5, 5).abs(), random(4, 2, 3, 5, 5), random(4, 2, 3, 5, 5), random(4, 2, 5)
    check(ops.attention_update, attn, grad, rel, update)
    m = ops.attention_update(attn, grad, rel, update)
    for normalize in (False, True):
        check(ops.rollout_row, row, m.expand(4, 2, 5, 5), normalize)
        kept, through = ops.rollout_row(row, m, normalize)
        step = torch.eye(5) + m
        step = step / step.sum(-1, keepdim=True) if normalize else step
        total = (kept if normalize else row) + through
        assert golden.relative_error(total, (row.unsqueeze(-2) @ step).squeeze(-2)) < 1e-10


def test_layer_norm_backward() -> None:
    x, weight, grad = random(2, 5, 8).requires_grad_(), random(8), random(3, 2, 5, 8)
    y = torch.nn.functional.layer_norm(x, (8,), weight, None, 1e-5)
    expected = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grad])
    with torch.no_grad():
        assert golden.relative_error(ops.layer_norm_backward(grad, x, weight, 1, 1e-5), expected) < 1e-12
        check(ops.layer_norm_backward, grad, x.detach(), weight, 1, 1e-5)
        check(ops.layer_norm_backward, grad, x.detach(), weight, 1, 1e-5, True)


def test_layer_norm_backward_by_a_constant_deviation() -> None:
    x, weight, grad = random(2, 5, 8).requires_grad_(), random(8), random(3, 2, 5, 8)
    y = gradients.layer_norm(x, weight, None, 1e-5)
    expected = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grad])
    assert golden.relative_error(ops.layer_norm_backward(grad, x.detach(), weight, 1, 1e-5, True), expected) < 1e-12


def test_activation_ratio() -> None:
    x, grad = random(5, 8), random(3, 5, 8)
    y = torch.nn.functional.silu(x)
    ours = ops.activation_ratio(grad, x, y)
    assert golden.relative_error(ours, grad * torch.sigmoid(x)) < 1e-12
    assert not ops.activation_ratio(grad, torch.zeros_like(x), y).any()
    check(ops.activation_ratio, grad, x, y, "none")


def test_nothing_is_divided_by_zero() -> None:
    """All-zero and all-negative inputs, masked rows, vanishing sums: relevance is lost, never NaN."""
    weight = random(4, 6)
    for x in (torch.zeros(2, 6, dtype=torch.float64), -random(2, 6).abs(), torch.full((2, 6), 1e-310, dtype=torch.float64)):
        rel = torch.ones(1, 2, 4, dtype=torch.float64)
        for rules in RULES:
            assert ops.zplus_linear(x, weight, None, None, rel, rel, rules)[0].isfinite().all()
    u = random(2, 6)
    for part in ops.residual_add(u, -u, torch.ones(1, 2, 6, dtype=torch.float64), 0, "positive"):
        assert not part.any()
    q, v, mask = random(1, 1, 3, 4), -random(1, 1, 3, 4).abs(), torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    lanes = torch.ones(1, 1, 1, 3, 4, dtype=torch.float64)
    row = torch.ones(1, 1, 3, dtype=torch.float64)
    for given in (None, mask):
        options = (0.5, False, 0, "positive", "gradient_relevance", False, True)
        assert all(t.isfinite().all() for t in ops.attention_relevance(q, q, v, given, lanes, lanes, row, *options))


def calls(program: object) -> int:
    return sum(node.target is not operator.getitem for node in program.reverse.graph.nodes if node.op == "call_function")  # type: ignore[attr-defined]


def test_only_what_reaches_the_map_is_computed() -> None:
    """With a CLS head, the last block's lanes are one token wide, and nothing below start_layer is touched."""
    model, x = models.build("timm_vit"), models.inputs("timm_vit")["x"]
    sizes = {}
    for start in (0, 1, 2):
        explainer = fastrel.Explainer(model, start_layer=start)
        explainer(x)
        (program,) = models.programs(explainer)
        sizes[start] = calls(program)
        fused = (CPU_KERNELS[ops.attention_relevance], REFERENCES[ops.attention_relevance])
        last = next(node for node in program.reverse.graph.nodes if node.target in fused)
        assert last.args[0].target is torch.ops.aten.narrow.default
        assert last.args[0].args[2:] == (0, 1)
    assert sizes[2] < sizes[1] < sizes[0]
    linears = (CPU_KERNELS[ops.zplus_linear], REFERENCES[ops.zplus_linear])
    assert not any(node.target in linears and "qkv" in str(node.args[1]) for node in program.reverse.graph.nodes)


def test_looking_at_an_operator_seeds_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this one nor those of GPUs, which nothing would restore: a training run goes on with its own random numbers."""

    class Unusual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 2)
            self.block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.sinc(self.block(self.embed(ids)))[:, 0])

    model, seeds = Unusual().eval(), []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    before = torch.get_rng_state()
    explanation = fastrel.Explainer(model)(torch.tensor([[1, 2, 3]]))
    assert "aten.sinc" in str(explanation.report)
    assert not seeds
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_float32_on_the_shipped_weights() -> None:
    """positive: within 1e-4 of float64; official: typically at most twice the reference's own
    error (a geometric mean over scenes; one scene says little, for these rules amplify rounding)."""
    from fastrel import reference
    from fastrel.reference.rollout import gradient_relevance, rollout

    single, exact = demo.load_model(), demo.load_model().double()
    x = demo.to_input(demo.held_out()[0][:40])
    target = single(x).argmax(1)
    wanted = fastrel.Explainer(exact)(x.double(), target=target).relevance
    assert golden.map_error(fastrel.Explainer(single)(x, target=target).relevance, wanted) < 1e-4

    def by_reference(model: torch.nn.Module, image: Tensor) -> Tensor:
        params = dict(model.state_dict())
        image = image.clone().requires_grad_()
        result = reference.trace(lambda tape: reference.vit(tape, params, image, heads=3), target, "official")
        return rollout([gradient_relevance(b.gradient, b.relevance) for b in result.blocks])[:, 0]

    wanted = by_reference(exact, x.double())
    theirs = (by_reference(single, x) - wanted)[:, 1:].norm(dim=1)
    ours = (fastrel.Explainer(single, rules="official")(x, target=target).relevance - wanted)[:, 1:].norm(dim=1)
    assert float((ours / theirs).log().mean().exp()) <= 2
