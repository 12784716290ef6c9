"""The transformed program against the reference, autograd and itself."""

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fastrel
from fastrel import reference, rules
from fastrel.reference.rollout import gradient_relevance, rollout
from fastrel.reference.rules import Rules
from fastrel.transform.lanes import Lane
from tests import golden_files as golden
from tests import models
from tests.small import ids, made
from tests.test_reference import bert_embedding

EXACT = 1e-10


def reference_trace(
    name: str, params: dict[str, torch.Tensor], given: models.Inputs, target: torch.Tensor, rules: Rules, frozen: bool
) -> reference.Trace:
    if name == "timm_vit":
        image = given["x"].clone().requires_grad_()
        return reference.trace(lambda tape: reference.vit(tape, params, image, heads=3), target, rules, frozen)
    embedding, mask = bert_embedding(params, given["input_ids"]), given["attention_mask"]
    return reference.trace(
        lambda tape: reference.bert(tape, params, embedding, mask, heads=4, eps=1e-12), target, rules, frozen
    )


@pytest.mark.parametrize("method", ["frozen_attribution", "transformer_attribution"])
@pytest.mark.parametrize("name", ["timm_vit", "hf_bert", "hf_bert_eager"])
def test_positive_equals_the_reference_block_by_block(name: str, method: str) -> None:
    explainer, given, target = models.explainer(name).using(method), models.inputs(name), torch.tensor([1, 5, 0])
    frozen = method == "frozen_attribution"
    expected = reference_trace(name, explainer.model.state_dict(), given, target, "positive", frozen)
    blocks = explainer.trace(**given, target=target)
    assert len(blocks) == len(expected.blocks)
    for i, (ours, theirs) in enumerate(zip(blocks, expected.blocks, strict=True)):
        rows = ours.attention.shape[-2]
        for key in ("gradient", "relevance"):
            value, wanted = getattr(ours, key)[0], getattr(theirs, key)
            assert golden.relative_error(value, wanted[:, :, :rows]) < EXACT, (i, key)
            assert not wanted[:, :, rows:].any(), (i, key)
        assert golden.relative_error(ours.value_relevance[0], theirs.value_relevance) < EXACT, i
        assert golden.relative_error(ours.input_relevance[0], theirs.input_relevance) < EXACT, i
    maps = [gradient_relevance(b.gradient, b.relevance) for b in expected.blocks]
    for start in (0, 1, -1):
        for normalize in (False, True):
            other = explainer.using(start_layer=start, normalize_rollout=normalize)
            row = rollout(maps, start_layer=start, normalize=normalize)[:, 0]
            assert golden.map_error(other(**given, target=target).relevance, row) < EXACT, (start, normalize)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_gradients_equal_autograd(name: str) -> None:
    """∂y_c/∂V, which the gradient lane passes on, from the maps' gradients against autograd on the eager model."""
    explainer, given = models.explainer(name).using("transformer_attribution"), models.inputs(name, batch=2)
    target = torch.tensor([2, 4])
    expected = attention_gradients(explainer.model, given, target)
    blocks = explainer.trace(**given, target=target)
    assert len(blocks) == len(expected) == 3
    for block, wanted in zip(blocks, expected, strict=True):
        assert block.gradient is not None
        rows = block.gradient.shape[-2]
        assert golden.relative_error(block.gradient[0], wanted[:, :, :rows]) < EXACT
        assert not wanted[:, :, rows:].any()


def attention_gradients(model: torch.nn.Module, given: models.Inputs, target: torch.Tensor) -> list[torch.Tensor]:
    """∂y_c/∂A of every block by autograd on the eager model, with fused attention spelled out and softmaxes kept."""
    kept: list[torch.Tensor] = []
    plain_softmax = F.softmax

    def softmax(x, dim=None, **_):  # type: ignore[no-untyped-def]
        kept.append(plain_softmax(x, dim))
        return kept[-1]

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):  # type: ignore[no-untyped-def]
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return softmax(scores, -1) @ v

    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", softmax)
        patch.setattr(F, "scaled_dot_product_attention", attention)
        out = models.logits(model, given)
    torch.backends.mha.set_fastpath_enabled(fastpath)
    return list(torch.autograd.grad(out.gather(1, target[:, None]).sum(), kept))


@pytest.mark.parametrize("rules", ["positive", "official"])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_relevance_is_conserved_through_every_block(name: str, rules: str) -> None:
    """Sum 1 per sample, less what the rules themselves lose: nothing is ever added, and samples keep to themselves."""
    blocks = models.explainer(name).using(rules=rules).trace(**models.inputs(name), target=1)
    above = torch.ones(3, dtype=torch.float64)
    for block in reversed(blocks):
        assert block.input_relevance is not None
        total = block.input_relevance[0].flatten(1).sum(1)
        if rules == "official":
            assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
        else:
            assert (block.input_relevance >= 0).all()
            assert (total <= above + 1e-12).all()
            assert (total > 0).all()
        above = total


@pytest.mark.parametrize("rules", ["positive", "official"])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_batch_equals_its_samples(name: str, rules: str) -> None:
    """Different targets, K targets each, mixed paddings."""
    explainer, given = models.explainer(name).using(rules=rules), models.inputs(name)
    targets = [[0, 3], [5, 5], [2, 1]]
    batch = explainer(**given, target=targets)
    assert batch.relevance.shape[:2] == (3, 2)
    limit = EXACT if rules == "positive" else 1e-7
    for i, sample in enumerate(models.samples(given)):
        for k in range(2):
            single = explainer(**sample, target=targets[i][k])
            assert single.relevance.dim() == 2
            assert golden.map_error(batch.relevance[i, k], single.relevance[0]) < limit, (i, k)
            assert torch.allclose(batch.logits[i], single.logits[0], rtol=1e-12)


@pytest.mark.parametrize("name", models.TEXT)
def test_padding_gets_zero_and_changes_nothing(name: str) -> None:
    explainer, given = models.explainer(name), models.inputs(name)
    padded = explainer(**given, target=2)
    assert not padded.relevance[given["attention_mask"] == 0].any()
    longer = {key: torch.cat((x, torch.zeros(3, 7, dtype=x.dtype)), 1) for key, x in given.items()}
    longest = explainer(**longer, target=2)
    assert not longest.relevance[:, 12:].any()
    assert golden.map_error(longest.relevance[:, :12], padded.relevance) < EXACT


@pytest.mark.parametrize("name", models.FAMILIES)
def test_logits_are_the_models_own(name: str) -> None:
    explainer, given = models.explainer(name), models.inputs(name)
    with torch.no_grad():
        expected = models.logits(explainer.model, given)
    explanation = explainer(**given)
    if name == "torchvision_vit":  # its eager fast path rounds differently
        assert golden.relative_error(explanation.logits, expected) < 1e-12
    else:
        assert torch.equal(explanation.logits, expected)
    assert torch.equal(explanation.target, expected.argmax(1))


@pytest.mark.parametrize("name", models.FAMILIES)
def test_float32_is_within_1e_4_of_float64(name: str) -> None:
    given = models.inputs(name)
    exact = models.explainer(name)(**given, target=1).relevance
    single = {key: x.float() if x.is_floating_point() else x for key, x in given.items()}
    assert golden.map_error(fastrel.Explainer(models.build(name).float())(**single, target=1).relevance, exact) < 1e-4


@pytest.mark.parametrize("name", ["timm_vit", "hf_bert"])
def test_official_in_float32_errs_at_most_twice_as_much_as_the_reference(name: str) -> None:
    """The official rules amplify rounding, so one input says little (ratios from 0.3 to 4): the mean over eight decides."""
    ours, theirs = 0.0, 0.0
    explainer = fastrel.Explainer(models.build(name).float(), rules="official")
    for seed in range(8):
        model, given, target = models.build(name, seed), models.inputs(name, seed=100 + seed), torch.tensor([1, 5, 0])
        exact = reference_map(name, model, given, target, torch.float64)
        theirs += golden.map_error(reference_map(name, model, given, target, torch.float32), exact)
        single = {key: x.float() if x.is_floating_point() else x for key, x in given.items()}
        explainer.model.load_state_dict(model.state_dict())
        ours += golden.map_error(explainer(**single, target=target).relevance, exact)
    assert ours <= 2 * theirs


def reference_map(
    name: str, model: torch.nn.Module, given: models.Inputs, target: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The map over all blocks by the reference with the official rules."""
    params = {key: x.to(dtype) for key, x in model.state_dict().items()}
    given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}
    result = reference_trace(name, params, given, target, "official", frozen=False)
    return rollout([gradient_relevance(b.gradient, b.relevance) for b in result.blocks])[:, 0]


def test_what_a_graph_fails_on_is_said_of_the_inputs() -> None:
    given = models.inputs("hf_bert")
    explainer, beyond = fastrel.Explainer(models.build("hf_bert")), {**given, "input_ids": given["input_ids"].clone()}
    beyond["input_ids"][0, 0] = 10**6
    for _ in range(2):  # as the first call, and once there is a graph
        with pytest.raises(fastrel.InputError, match=r"rejects these inputs: index out of range.* to 1000000"):
            explainer(**beyond, target=0)
        explainer(**given, target=0)


def test_a_rule_that_fails_while_it_runs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rules.RULES[torch.ops.aten.gelu.default]

    def failing(t: Any, node: torch.fx.Node, out: Any) -> None:
        plain(t, node, out._replace(grad=Lane(t.emit.call(torch.ops.aten.reshape.default, out.grad.node, [7]))))

    monkeypatch.setitem(rules.RULES, torch.ops.aten.gelu.default, failing)
    model = made(lambda m, x: m.head(m.encoder(x).mean(1)))
    with pytest.raises(
        fastrel.UnsupportedModelError, match=r"the rule of aten.gelu.default .* in encoder.blocks.1.mlp.1 does"
    ):
        fastrel.Explainer(model, backend="torch")(ids(2, 7), target=1)


def test_a_prediction_explained_once_says_so() -> None:
    prediction = models.explainer("hf_bert").predict(**models.inputs("hf_bert"))
    prediction.explain_once(0)
    with pytest.raises(fastrel.InputError, match="explained by explain_once"):
        prediction.explain(0)


def test_a_capture_that_is_forgotten_leaves_nothing_of_its_sizes() -> None:
    def kept() -> int:
        gc.collect()
        return sum(type(x) is ShapeEnv for x in gc.get_objects())

    before = kept()
    for _ in range(4):
        fastrel.Explainer(made(lambda m, x: m.head(m.encoder(x).mean(1))))(ids(), target=1)
    assert kept() <= before + 1  # torch may hold on to the last one
