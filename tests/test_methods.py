"""Every method against the official code's baselines, and against the libraries that compute the same."""

from typing import Any

import networkx
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastrel
from benchmarks.baselines.libraries import attnlrp
from fastrel import methods, reference
from fastrel.reference import contributions, gradients
from fastrel.reference import rules as rules_
from fastrel.reference.pooling import evidence
from fastrel.reference.rollout import attention_received, gradient_relevance, per_attention, rollout
from tests import golden_files as golden
from tests import models
from tests.test_reference import trace

GELU = F.gelu

VITS, BERTS = ["vit_a", "vit_b"], ["bert_a", "bert_b_padded"]
VIT_CASES = [(name, target) for name in VITS for target in golden.targets(name)]
BERT_CASES = [(name, target) for name in BERTS for target in golden.targets(name)]


def vit_map(name: str, target: int, method: str, **options: object) -> fastrel.Explanation:
    explainer = models.golden_explainer(name).using(method, **options)
    return explainer(golden.tensor(golden.load(name)["input"]), target=target)


def unit(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min())


@pytest.mark.parametrize(("name", "target"), VIT_CASES)
def test_baselines_equal_the_official_code_on_vit(name: str, target: int) -> None:
    data = golden.load(name)

    def check(ours: Tensor, key: str, limit: float) -> None:
        assert golden.relative_error(ours, golden.tensor(data[key])) < limit, key

    check(vit_map(name, target, "raw_attention").patches.flatten(), f"t{target}/last_layer_attn", 1e-10)
    for start in (0, 1):
        check(
            vit_map(name, target, "rollout", start_layer=start).patches.flatten(), f"attention_rollout/start{start}", 1e-10
        )
        official = vit_map(name, target, "relevance_rollout", start_layer=start, rules="official")
        check(official.patches.flatten(), f"t{target}/lrp_rollout/start{start}", 1e-6)
    for rules, prefix in (("official", f"t{target}"), ("original_lrp", f"t{target}/orig_lrp")):
        check(vit_map(name, target, "partial_lrp", rules=rules).patches.flatten(), f"{prefix}/last_layer", 1e-6)
        pixels = vit_map(name, target, "lrp_pixels", rules=rules)
        check(pixels.patches[0], f"{prefix}/full", 1e-6)
        assert torch.equal(pixels.relevance[0], pixels.patches[0].flatten())
    gradcam = vit_map(name, target, "attention_gradcam").patches.flatten()
    expected = golden.tensor(data[f"t{target}/attention_gradcam"])
    if expected.isnan().all():
        assert not gradcam.any()  # a constant map: zeros, not the official code's NaN
    else:
        assert golden.relative_error(unit(gradcam), expected) < 1e-10


@pytest.mark.parametrize(("name", "target"), BERT_CASES)
def test_baselines_equal_the_official_code_on_bert(name: str, target: int) -> None:
    data = golden.load(name)
    given = {key: golden.tensor(data[key]) for key in ("input_ids", "attention_mask")}
    for method, key in (("partial_lrp", "last_layer"), ("lrp", "full")):
        row = models.golden_explainer(name).using(method, rules="official")(**given, target=target).relevance[0]
        row[0] = 0
        assert golden.relative_error(row, golden.tensor(data[f"t{target}/{key}"])) < 1e-6, key


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("name", ["timm_vit", "timm_vit_mean_pooled", "timm_deit_distilled", "hf_vit"])
def test_every_method_explains_images(name: str, method: str) -> None:
    """Batched, per-sample targets: a batch equals its samples."""
    explainer, given = models.explainer(name).using(method), models.inputs(name, batch=2)
    batch = explainer(**given, target=[[1, 2], [0, 5]])
    for i, sample in enumerate(models.samples(given)):
        single = explainer(**sample, target=[[1, 2], [0, 5]][i][1])
        assert golden.map_error(batch.relevance[i, 1], single.relevance[0]) < 1e-10
        assert golden.relative_error(batch.patches[i, 1], single.patches[0]) < 1e-10
        assert single.patches.shape[0] == 1
        assert single.heatmap().shape == (1, *next(iter(given.values())).shape[2:])


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("name", ["hf_bert", "hf_bert_eager", "hf_roberta"])
def test_every_method_explains_text_or_says_why_not(name: str, method: str) -> None:
    explainer, given = models.explainer(name).using(method), models.inputs(name, batch=2)
    if method == "integrated_gradients":
        with pytest.raises(fastrel.InputError, match="models of one image input"):
            explainer(**given)
    elif method.endswith("_pixels"):
        with pytest.raises(fastrel.UnsupportedModelError, match="read this method at its tokens"):
            explainer(**given)
    else:
        batch = explainer(**given, target=[1, 4])
        assert batch.relevance.shape == (2, 12)
        for i, sample in enumerate(models.samples(given)):
            single = explainer(**sample, target=[1, 4][i])
            assert golden.map_error(batch.relevance[i], single.relevance[0]) < 1e-10


def test_gradient_methods_equal_captum() -> None:
    from captum.attr import InputXGradient, IntegratedGradients

    explainer, x = models.explainer("timm_vit"), models.inputs("timm_vit", batch=2)["x"]
    model, target = explainer.model, torch.tensor([3, 1])
    theirs = InputXGradient(model).attribute(x.clone().requires_grad_(), target=target).sum(1)
    ours = explainer.using("input_x_gradient_pixels")(x, target=target).patches
    assert golden.relative_error(ours, theirs) < 1e-10
    theirs = IntegratedGradients(model).attribute(x, target=target, n_steps=50).sum(1)
    ours = explainer.using("integrated_gradients")(x, target=target).patches
    assert golden.relative_error(ours, theirs) < 1e-10


def test_embedding_times_gradient_equals_captum() -> None:
    from captum.attr import LayerGradientXActivation

    explainer, given = models.explainer("hf_bert"), models.inputs("hf_bert", batch=2)
    model, target = explainer.model, torch.tensor([3, 1])

    def logits(input_ids: Tensor) -> Tensor:
        return model(input_ids=input_ids, attention_mask=given["attention_mask"]).logits

    layer = LayerGradientXActivation(logits, model.bert.embeddings)  # type: ignore[arg-type]
    theirs = layer.attribute(given["input_ids"], target=target).sum(-1)
    ours = explainer.using("input_x_gradient")(**given, target=target).relevance
    assert golden.relative_error(ours, theirs) < 1e-10


def test_attnlrp_equals_its_rules_by_autograd() -> None:
    """The same rules as custom gradients in eager PyTorch: relevance is the token's embedding times that gradient."""
    explainer, x, target = models.explainer("timm_vit"), models.inputs("timm_vit", batch=2)["x"], torch.tensor([2, 4])
    ours, model = explainer.using("attnlrp")(x, target=target).relevance, explainer.model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "layer_norm", frozen_layer_norm)
        patch.setattr(F, "gelu", identity_gelu)
        patch.setattr(F, "scaled_dot_product_attention", halved_attention)
        tokens = model._pos_embed(model.patch_embed(x)).detach().requires_grad_()  # type: ignore[operator]
        logits = model.forward_head(model.norm(model.blocks(tokens)))  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), tokens)
    assert golden.relative_error(ours, (tokens * gradient).sum(-1)) < 1e-10


def frozen_layer_norm(x: Tensor, shape: object, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return gradients.layer_norm(x, weight, bias, eps)


def identity_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return gradients.activation(GELU, x)


def halved_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    half = gradients.half
    return half((half(q) @ half(k).mT * q.shape[-1] ** -0.5).softmax(-1)) @ half(v)


@pytest.mark.parametrize("rules", ["positive", "official"])
@pytest.mark.parametrize(("name", "target"), VIT_CASES)
def test_frozen_attribution_equals_the_reference_on_vit(name: str, target: int, rules: rules_.Rules) -> None:
    ours = vit_map(name, target, "frozen_attribution", rules=rules).relevance
    assert golden.relative_error(ours, chained(trace(name, target, rules, frozen=True))) < 1e-10
    assert golden.relative_error(ours, chained(trace(name, target, rules))) > 1e-3


@pytest.mark.parametrize("rules", ["positive", "official"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "target"), BERT_CASES)
def test_frozen_attribution_equals_the_reference_on_bert(
    name: str, target: int, attention: str, rules: rules_.Rules
) -> None:
    given = {key: golden.tensor(golden.load(name)[key]) for key in ("input_ids", "attention_mask")}
    explainer = models.golden_explainer(name, attention).using("frozen_attribution", rules=rules, normalize_rollout=False)
    assert (
        golden.relative_error(explainer(**given, target=target).relevance, chained(trace(name, target, rules, True)))
        < 1e-10
    )


@pytest.mark.parametrize(("name", "target"), VIT_CASES)
def test_relevance_per_attention_equals_its_definition(name: str, target: int) -> None:
    """E_h[(∇A ⊙ R)⁺] of the reference's R and frozen ∇A, chained, per attention received."""
    traced = trace(name, target, "positive", frozen=True)
    expected = per_attention(chained(traced), [attention_received(b.attention) for b in traced.blocks])
    assert golden.relative_error(vit_map(name, target, "relevance_per_attention").relevance, expected) < 1e-10


def chained(traced: reference.Trace) -> Tensor:
    return rollout([gradient_relevance(b.gradient, b.relevance) for b in traced.blocks])[:, 0]


@pytest.mark.parametrize("rules", ["positive", "official"])
@pytest.mark.parametrize("spelling", ["mean", "sum", "masked"])
def test_frozen_attribution_reads_pooled_tokens_by_their_part_of_eq_13_and_counts_blocks_by_them(
    spelling: str, rules: rules_.Rules
) -> None:
    torch.manual_seed(3)
    vit = VisionTransformer(16, 4, embed_dim=12, depth=2, num_heads=2, num_classes=5, global_pool="avg", class_token=False)
    vit.fc_norm = nn.Identity()

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit
            self.register_buffer("seen", (torch.arange(16) != 4).double()[:, None])

        def forward(self, images: Tensor) -> Tensor:
            x = self.vit.forward_features(images)
            pooled = {
                "mean": lambda: x.mean(1),
                "sum": lambda: x.sum(1) / 16,
                "masked": lambda: (x * self.seen).sum(1) / 15,
            }
            return self.vit.head(pooled[spelling]())

    model, images, target = Pooled().double().eval(), torch.randn(3, 3, 16, 16, dtype=torch.float64), 2
    explainer = fastrel.Explainer(model, "frozen_attribution", rules=rules)
    explanation = explainer(images, target=target)
    with torch.no_grad():
        x = vit.forward_features(images)
        x, count = (x * model.seen, 15) if spelling == "masked" else (x, 16)
        grad = (vit.head.weight[target] / count).expand_as(x)[None]
        one_hot = F.one_hot(torch.full((3,), target), 5).double()
        pooled = rules_.linear(x.sum(1) / count, vit.head.weight, one_hot, rules)
        rel = rules_.mean(x, pooled[:, None], [1], rules)[None]
        shares = (((x * grad).sum(-1) * rel.sum(-1)).clamp(min=0))[0]
        row = shares / shares.sum(1, keepdim=True)
        assert (shares > 0).any(1).all()
        assert (shares == 0).any()
        read = 1 / row.square().sum(1)
        for block in reversed(explainer.trace(images, target=target)):
            m = gradient_relevance(block.gradient[0], block.relevance[0]) * read[:, None, None] ** 2
            row = row + (row[:, None] @ m)[:, 0]
    assert golden.map_error(explanation.relevance, row) < 1e-10


def test_what_is_pooled_is_read_in_equal_parts_where_nothing_speaks_for_it() -> None:
    x, grad, rel = torch.ones(1, 3, 2), -torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2)
    assert torch.allclose(evidence(x, grad, rel, [1], [2]), torch.full((1, 1, 3, 1), 1 / 3))
    masked = x * torch.tensor([1, 0, 1])[:, None]  # what is masked takes no part
    assert torch.allclose(evidence(masked, grad, rel, [1], [2])[0, 0, :, 0], torch.tensor([0.5, 0, 0.5]))
    x[0, 1], rel[0, 0, 1] = -1, 4
    x[0, 2] = -1
    assert torch.allclose(evidence(x, grad, rel, [1], [2])[0, 0, :, 0], torch.tensor([0, 0.8, 0.2]))


def test_evidence_planted_in_mean_pooled_models_is_found() -> None:
    """A patch of stripes in nearly nothing, in an untrained model: explained is what it does to the answer."""
    found = {"frozen_attribution": 0, "transformer_attribution": 0}
    for seed in range(6):
        torch.manual_seed(seed)
        model = VisionTransformer(
            32, 8, embed_dim=48, depth=4, num_heads=3, num_classes=20, global_pool="avg", class_token=False
        ).eval()
        images = 0.02 * torch.randn(1, 3, 32, 32)
        place = int(torch.randint(16, ()))
        planted = images.clone()
        planted.unfold(2, 8, 8).unfold(3, 8, 8)[:, :, place // 4, place % 4] = 3.0 * (torch.arange(8) // 2 % 2 * 2.0 - 1)
        with torch.no_grad():
            towards = model(planted) - model(images)
        for name in found:
            explanation = fastrel.Explainer(model, name)(planted, target=lambda out, by=towards: (out * by).sum(1))
            found[name] += int(explanation.patches.flatten().argmax() == place)
    assert found["frozen_attribution"] == 6
    assert found["transformer_attribution"] < 6  # else this says nothing


def test_attention_received_counts_queries_that_see_a_token() -> None:
    causal = torch.tensor([[[[1.0, 0, 0], [0.4, 0.6, 0], [0.1, 0.3, 0.6]]]])
    assert torch.allclose(attention_received(causal), torch.tensor([[0.5, 0.45, 0.6]]))
    padded = torch.tensor([[[[0.25, 0.75, 0], [0.5, 0.5, 0], [0.9, 0.1, 0]]]])  # nobody attends to the last
    assert torch.allclose(attention_received(padded), torch.tensor([[0.375, 0.625, 0]]))
    row = per_attention(torch.tensor([[3.0, 1, 5]]), [attention_received(padded)] * 2)
    assert torch.allclose(row, torch.tensor([[8.0, 1.6, 0]]))


def test_relevance_per_attention_is_for_one_sequence_of_tokens() -> None:
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5
    ).eval()
    for method in ("relevance_per_attention", "legrad"):
        with pytest.raises(fastrel.InputError, match="one and the same sequence of tokens"):
            fastrel.Explainer(model, method)(torch.randn(1, 3, 32, 32))


def test_attnlrp_equals_lxt() -> None:
    """The same model written with the functions of lxt, whose backward passes propagate relevance."""
    pytest.importorskip("lxt.explicit.functional", reason="lxt is not installed")
    explainer, x, target = models.explainer("timm_vit"), models.inputs("timm_vit", batch=2)["x"], torch.tensor([2, 4])
    ours, theirs = explainer.using("attnlrp")(x, target=target).relevance, attnlrp(explainer.model)(x, target)
    assert golden.relative_error(ours, theirs) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradient_attention", "transformer_attribution"])
def test_encoder_decoder_attention_of_detr(method: str) -> None:
    """A query's map: cross-attention hands the row of a query to the picture's tokens, block by block."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4))}
    config = DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=32, num_queries=5, num_labels=6,
        encoder_ffn_dim=64, decoder_ffn_dim=64, attn_implementation="eager", **sizes,
    )  # fmt: skip
    model, x = DetrForObjectDetection(config).double().eval(), torch.randn(2, 3, 64, 96).double()
    with torch.no_grad():
        model.model.query_position_embeddings.weight.mul_(50)  # so that queries differ
    query, label = 3, 2

    def score(out: Any) -> Tensor:
        return out.logits[:, query, label]

    explainer = fastrel.Explainer(model, method)
    explanation = explainer(pixel_values=x, target=score)
    assert explanation.patches.shape == (2, 8, 12)
    if method == "gradient_attention":
        out = model(pixel_values=x, output_attentions=True)
        groups = (out.encoder_attentions, out.decoder_attentions, out.cross_attentions)
        maps = [m for group in groups for m in group]
        gradients = iter(torch.autograd.grad(score(out).sum(), maps))
        encoder, decoder, cross = ([(next(gradients) * m).clamp(min=0).mean(1) for m in group] for group in groups)
        queries = torch.zeros(2, 1, 5).double()
        queries[..., query] = 1
        tokens = torch.zeros(2, 1, 96).double()
        for own, between in zip(reversed(decoder), reversed(cross), strict=True):
            tokens = tokens + queries @ between
            queries = queries + queries @ own
        for m in reversed(encoder):
            tokens = tokens + tokens @ m
        assert golden.relative_error(explanation.relevance, tokens[:, 0].detach()) < 1e-10
    other = explainer(pixel_values=x, target=lambda out: out.logits[:, query - 1, label])
    assert golden.relative_error(explanation.relevance, other.relevance) > 1e-3
    assert explanation.relevance.abs().sum() > 0


@pytest.mark.parametrize("name", ["timm_vit", "timm_vit_mean_pooled"])
def test_legrad_is_the_positive_gradient_of_all_maps_by_autograd(name: str) -> None:
    """The authors' sum over blocks of the mean over heads and queries, the score being the model's output in every block."""
    explainer, x, target = models.explainer(name), models.inputs(name, batch=2)["x"], torch.tensor([2, 4])
    maps: list[Tensor] = []

    def kept_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        maps.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
        return maps[-1] @ v

    ours = explainer.using("legrad")(x, target=target).relevance
    late = explainer.using("legrad", start_layer=-1)(x, target=target).relevance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", kept_attention)
        score = explainer.model(x).gather(1, target[:, None]).sum()
    gradients = torch.autograd.grad(score, maps)
    expected = torch.stack([g.clamp(min=0).mean((1, 2)) for g in gradients])
    assert golden.relative_error(ours, expected.sum(0)) < 1e-10
    assert golden.relative_error(late, expected[-1]) < 1e-10


@pytest.mark.parametrize("name", ["timm_vit", "timm_vit_mean_pooled"])
@pytest.mark.parametrize("spelling", ["fused", "products"])
def test_attention_guided_cam_is_its_authors_sum_over_blocks_and_heads(name: str, spelling: str) -> None:
    """relu(∇A) ⊙ sigmoid(S) of the class token's row, summed over heads and blocks; without a class token, of every token's."""
    model, x, target = models.build(name), models.inputs(name, batch=2)["x"], torch.tensor([2, 4])
    maps: list[tuple[Tensor, Tensor]] = []

    def kept_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        maps.append((scores, scores.softmax(-1)))
        return maps[-1][1] @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", kept_attention)
        score = model(x).gather(1, target[:, None]).sum()
        if spelling == "products":
            ours = fastrel.Explainer(model, "attention_guided_cam")(x, target=target)
    if spelling == "fused":
        ours = fastrel.Explainer(model, "attention_guided_cam")(x, target=target)
    scores, attention = zip(*maps[: len(model.blocks)], strict=True)
    gradients = torch.autograd.grad(score, attention)
    weights = torch.eye(17, dtype=x.dtype)[0] if name == "timm_vit" else torch.full((16,), 1 / 16, dtype=x.dtype)
    expected = sum(
        (weights[:, None] * g.clamp(min=0) * s.sigmoid()).sum((1, 2)) for g, s in zip(gradients, scores, strict=True)
    )
    assert golden.relative_error(ours.relevance, expected.detach()) < 1e-10


class Halved(nn.Module):
    """Attention whose map is half a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT).softmax(-1) * 0.5) @ v
        return self.head((x + mixed.transpose(1, 2).flatten(2))[:, 0])


def test_attention_guided_cam_needs_the_scores_of_its_maps() -> None:
    explainer = fastrel.Explainer(Halved().eval(), "attention_guided_cam")
    with pytest.raises(fastrel.UnsupportedModelError, match="reads the scores of attention maps"):
        explainer(torch.randn(1, 5, 8), target=1)


@pytest.mark.parametrize("name", ["hf_bert", "hf_bert_eager"])
def test_attcat_equals_its_definition_and_ignores_padding(name: str) -> None:
    """Gradient times what each block reads, times the attention that the token receives: the authors' code, text by text."""
    given, target = models.inputs(name, batch=2), torch.tensor([3, 1])
    eager = models.build("hf_bert_eager")
    explainer = models.explainer(name).using("attcat")
    eager.load_state_dict(explainer.model.state_dict())
    given["attention_mask"][1, 8:] = 0
    ours = explainer(**given, target=target).relevance
    for i, length in enumerate((12, 8)):
        alone = {key: x[i : i + 1, :length] for key, x in given.items()}
        out = eager(**alone, output_attentions=True, output_hidden_states=True)
        hidden = out.hidden_states[:-1]
        gradients = torch.autograd.grad(out.logits[0, target[i]], hidden)
        expected = sum((g * h).sum(-1) * a.mean((1, 2)) for g, h, a in zip(gradients, hidden, out.attentions, strict=True))
        assert golden.relative_error(ours[i, :length], expected[0].detach()) < 1e-10
    assert not ours[1, 8:].any()


class OneBlock(nn.Module):
    """Attention whose output reaches the head in several forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.qkv, self.proj, self.mlp, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT).softmax(-1) @ v
        out = self.proj((mixed.permute(0, 2, 3, 1) if self.form == "turned" else mixed.transpose(1, 2)).flatten(2))
        if self.form == "gated":
            out = out * x.sigmoid()
        if self.form == "parallel":
            out = out + self.mlp(x).relu()
        out = x + out
        return self.head((out if self.form == "ends" else self.norm(out))[:, 0])


def alti_of_block(
    a: Tensor, v: Tensor, dense: Any, x: Tensor, total: Tensor, y: Tensor, norm: nn.LayerNorm | None
) -> Tensor:
    """c_ij of the paper, vector by vector: A [h, T, T], v [h, T, d], x, total, y [T, D] -> [T, T]."""
    heads, tokens, _ = a.shape
    weights = dense.weight.unflatten(1, (heads, -1))  # W_O^h
    result = torch.zeros(tokens, tokens, dtype=x.dtype)
    for i in range(tokens):
        whole = y[i].norm(p=1)
        for j in range(tokens):
            part = sum(a[h, i, j] * weights[:, h] @ v[h, j] for h in range(heads)) + (x[i] if i == j else 0)
            if norm is not None:
                deviation = ((total[i] - total[i].mean()).square().mean() + norm.eps).sqrt()
                part = (part - part.mean()) * norm.weight / deviation
            result[i, j] = (whole - (y[i] - part).norm(p=1)).clamp(min=0)
    return result / result.sum(1, keepdim=True)


@pytest.mark.parametrize("name", ["hf_bert", "hf_bert_eager"])
def test_alti_equals_its_definition_and_ignores_padding(name: str) -> None:
    """Post-norm blocks: the authors' T_i(x_j), the layer norm's deviation being that of the model; text by text."""
    given, kept = models.inputs(name, batch=2), dict[str, Any]()
    given["attention_mask"][1, 8:] = 0
    explainer = models.explainer(name).using("alti")
    ours = explainer(**given, target=[1, 4]).relevance
    last = explainer.using(start_layer=-1)(**given).relevance
    eager = models.build("hf_bert_eager")
    eager.load_state_dict(explainer.model.state_dict())
    layers = eager.bert.encoder.layer  # type: ignore[union-attr]
    for i, layer in enumerate(layers):  # type: ignore[arg-type]
        layer.attention.self.value.register_forward_hook(lambda m, x, y, i=i: kept.update({f"v{i}": y}))
        layer.attention.output.LayerNorm.register_forward_hook(lambda m, x, y, i=i: kept.update({f"y{i}": (x[0], y)}))
    for sample, length in enumerate((12, 8)):
        out = eager(
            **{key: x[sample : sample + 1, :length] for key, x in given.items()},
            output_attentions=True,
            output_hidden_states=True,
        )
        row = torch.eye(length, dtype=torch.float64)[:1]
        for i in reversed(range(len(layers))):  # type: ignore[arg-type]
            dense, norm = layers[i].attention.output.dense, layers[i].attention.output.LayerNorm  # type: ignore
            value = kept[f"v{i}"][0].unflatten(-1, (4, -1)).transpose(0, 1)
            total, y = (x[0] for x in kept[f"y{i}"])
            row = row @ alti_of_block(out.attentions[i][0], value, dense, out.hidden_states[i][0], total, y, norm)
            if i == len(layers) - 1:  # type: ignore[arg-type]
                assert golden.relative_error(last[sample, :length], row[0].detach()) < 1e-10
        assert golden.relative_error(ours[sample, :length], row[0].detach()) < 1e-10
        assert float(row.detach().sum()) == pytest.approx(1)
    assert not ours[1, 8:].any()


def test_alti_of_blocks_that_end_in_their_sum() -> None:
    """Pre-norm blocks with layer scale: T_i(x_j) is the part itself; the class token and registers are tokens like others."""
    explainer, x = models.explainer("timm_vit_registers"), models.inputs("timm_vit_registers", batch=1)["x"]
    model, maps, row = explainer.model, list[tuple[Tensor, Tensor]](), torch.eye(20, dtype=torch.float64)[:1]

    def kept_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        maps.append(((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), v))
        return maps[-1][0] @ v

    ours, inputs = explainer.using("alti")(x).relevance, list[Tensor]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", kept_attention)
        h = model.norm_pre(model._pos_embed(model.patch_embed(x)))  # type: ignore[operator]
        for block in model.blocks:  # type: ignore[union-attr]
            inputs.append(h)
            h = block(h)
    for block, h, (a, v) in reversed(list(zip(model.blocks, inputs, maps, strict=True))):  # type: ignore[arg-type]
        y = h + block.ls1(block.attn.proj((a @ v).transpose(1, 2).flatten(2)))
        dense = nn.Linear(48, 48).double()
        dense.weight.data = block.ls1.gamma[:, None] * block.attn.proj.weight
        row = row @ alti_of_block(a[0], v[0], dense, h[0], y[0], y[0], None)
    assert golden.relative_error(ours, row.detach()) < 1e-10


def test_contributions_are_the_same_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries at a time, as long sequences have them."""
    torch.manual_seed(0)
    a, v = torch.rand(2, 3, 7, 7).softmax(-1), torch.randn(2, 3, 7, 4)
    given = (a, v, torch.randn(12, 12), *(torch.randn(2, 7, 12) for _ in range(3)), (None, 1e-5))
    whole = contributions.contributions(*given)
    monkeypatch.setattr(contributions, "_ENTRIES", 2 * 7 * 12 * 3)
    assert torch.allclose(contributions.contributions(*given), whole)


def test_contributions_keep_nan_and_give_tokens_that_are_not_seen_nothing() -> None:
    torch.manual_seed(0)
    causal = torch.rand(1, 3, 7, 7).tril()
    rest = torch.randn(1, 3, 7, 4), torch.randn(12, 12), *(torch.randn(1, 7, 12) for _ in range(3))
    found = contributions.contributions(causal, *rest)
    assert not found.triu(1).any()
    rest[-1][0, 2, 5] = torch.nan
    assert contributions.contributions(causal, *rest)[0, 2, :3].isnan().all()


@pytest.mark.slow
def test_alti_says_which_blocks_it_cannot_take_apart() -> None:
    x = torch.randn(1, 5, 8)
    with pytest.raises(fastrel.UnsupportedModelError, match="no output layer reads the heads' values side by side"):
        fastrel.Explainer(Halved().eval(), "alti")(x, target=1)
    for form, message in (
        ("turned", "heads side by side"),
        ("gated", "its output is not added to what the block reads"),
        ("parallel", "its output is not added to what the block reads"),
        ("ends", "goes neither on nor into a layer norm"),
    ):
        with pytest.raises(fastrel.FastrelError, match=message):
            fastrel.Explainer(OneBlock(form).eval(), "alti")(x, target=1)
    assert fastrel.Explainer(OneBlock("normalised").eval(), "alti")(x, target=1).relevance.sum() == pytest.approx(1)


def test_methods_that_read_all_maps_give_padding_nothing() -> None:
    given = models.inputs("hf_bert", batch=2)
    given["attention_mask"][1, 8:] = 0
    for name in ("legrad", "attention_guided_cam", "attcat", "alti"):
        relevance = models.explainer("hf_bert").using(name)(**given, target=[1, 4]).relevance
        assert relevance[1, :8].any()
        assert not relevance[1, 8:].any()


def test_attention_flow_equals_networkx() -> None:
    explainer, x = models.explainer("timm_vit"), models.inputs("timm_vit", batch=1)["x"]
    blocks = explainer.using("rollout").trace(x)
    ours = explainer.using("attention_flow")(x).relevance[0]
    graph = networkx.DiGraph()
    for depth, block in enumerate(blocks):
        step = (block.attention[0].mean(0) + torch.eye(17)) / 2
        for query in range(17):
            for key in range(17):
                graph.add_edge((depth + 1, query), (depth, key), capacity=float(step[query, key]))
    for token in (0, 1, 9):
        flow = networkx.maximum_flow_value(graph, (len(blocks), 0), (0, token))
        assert abs(float(ours[token]) - flow) < 1e-4


def test_attention_flow_refuses_what_would_take_minutes() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224").eval()
    with pytest.raises(fastrel.InputError, match="12 blocks of 197 tokens has 465708 edges, more than 400000"):
        fastrel.Explainer(model, "attention_flow")(torch.randn(1, 3, 224, 224))


def test_rules_say_which_they_are() -> None:
    with pytest.raises(fastrel.InputError, match="choose one of positive, official, original_lrp"):
        fastrel.Explainer(models.build("timm_vit"), rules="zplus")
