"""Architectures beyond the plain ones, small: each verified on itself, its map where the evidence is."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models.nest import Nest
from timm.models.volo import VOLO
from torch import Tensor, nn

import fastrel
from fastrel.rules import RULES, pointwise

Case = tuple[nn.Module, dict[str, Tensor]]

_TEXT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": 0, "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip
_SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4, "image_size": 64}


def hf_text(name: str, **changes: Any) -> Case:
    config = getattr(transformers, f"{name}Config")(**{**_TEXT, **changes})
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    ids = torch.randint(5, 60, (2, 9))
    return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def hf_swin(version: str = "") -> Case:
    config = getattr(transformers, f"Swin{version}Config")(**_SWIN, num_labels=3)
    model = transformers.AutoModelForImageClassification.from_config(config)
    return model.eval(), {"pixel_values": torch.randn(2, 3, 64, 64)}


def image_model(name: str, size: int = 64, **options: Any) -> Case:
    model = timm.create_model(name, num_classes=5, **options)
    return model.eval(), {"x": torch.randn(2, 3, size, size)}


CASES: dict[str, Callable[[], Case]] = {
    "rotary, gated, sub-norm (EVA-02)": lambda: image_model("eva02_tiny_patch14_224", 56, img_size=56, depth=2),
    "talking heads, class attention (CaiT)": lambda: image_model("cait_xxs24_224", 64, img_size=64, depth=2),
    "relative position bias (BEiT)": lambda: image_model("beit_base_patch16_224", 64, img_size=64, depth=2, embed_dim=96, num_heads=3),
    "bias from the queries, windows (SAM)": lambda: image_model("samvit_base_patch16_224", 64, img_size=64, depth=2, embed_dim=96, num_heads=3),
    "channel attention (XCiT)": lambda: image_model("xcit_nano_12_p16_224", 64, img_size=64, depth=2),
    "attention and MLP through one layer (ViT-22B)": lambda: image_model("vit_base_patch16_xp_224", 32, img_size=32, depth=2, embed_dim=48, num_heads=3),
    "differences of maps (DIFF)": lambda: image_model("vit_dpwee_patch16_reg1_gap_256", 32, img_size=32, depth=2, embed_dim=48, num_heads=3),
    "windows, shifts (Swin)": hf_swin,
    "V Aᵀ, one head (SHViT)": lambda: image_model("shvit_s1", 128, depth=(1, 2, 1), embed_dim=(64, 96, 128), partial_dim=(16, 24, 32)),
    "maps written into, gated with positions (ConViT)": lambda: image_model("convit_tiny", 64, img_size=64, depth=2, local_up_to_layer=1),
    "tokens within tokens (TNT)": lambda: image_model("tnt_s_legacy_patch16_224", 64, img_size=64, depth=2),
    "outlook attention, maxima (VOLO)": lambda: (VOLO([2, 1, 1, 1], 64, num_classes=5, embed_dims=[48, 96, 96, 96], num_heads=[2, 4, 4, 4]).eval(), {"x": torch.randn(2, 3, 64, 64)}),
    "halos around windows (HaloNet)": lambda: image_model("halonet26t", 256),
    "one window at the top (NesT)": lambda: (Nest(64, embed_dims=(24, 48, 96), num_heads=(1, 2, 4), depths=(1, 1, 2), num_classes=5).eval(), {"x": torch.randn(2, 3, 64, 64)}),
    "cosine attention (Swin v2)": lambda: hf_swin("v2"),
    "causal, x W + b (GPT-2)": lambda: hf_text("GPT2", n_embd=32, n_layer=2, n_head=4),
    "grouped keys, RMSNorm, rotary, gated (Llama)": lambda: hf_text("Llama"),
    "norms of queries and keys (Qwen 3)": lambda: hf_text("Qwen3", head_dim=8),
    "disentangled terms (DeBERTa)": lambda: hf_text("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "heads merged with the batch (Bloom)": lambda: hf_text("Bloom", n_layer=2, n_head=4),
    "grouped convolutions as layers (SqueezeBERT)": lambda: hf_text("SqueezeBert", embedding_size=32),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_verifies_itself(name: str) -> None:
    torch.manual_seed(0)
    model, given = CASES[name]()
    report = fastrel.Explainer(model).verify(**given)
    assert report.ok, f"\n{report}"
    unchecked = [check.name for check in report.checks if "not checked" in check.meaning]
    assert not unchecked, f"\n{report}"
    assert report.blocks >= 2


def test_verify_finds_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that could not fail would prove nothing."""
    model, given = image_model("vit_tiny_patch16_224", 32, img_size=32, depth=2)
    monkeypatch.setattr(pointwise, "gelu_backward", lambda lane, x, approximate="none": lane)
    report = fastrel.Explainer(model).verify(**given)
    assert not report.ok
    assert [check.name for check in report.checks if not check.ok] == ["gradient"]
    assert str(report).endswith("NOT verified")


def cell_of_highest(explainer: fastrel.Explainer, shape: tuple[int, int], row: int, column: int) -> tuple[int, int]:
    """Where on a grid of 32-pixel cells a map changes most, in proportion, when one cell of a black image is filled."""
    image = torch.zeros(1, 3, *shape)
    blank = explainer(image, target=0).heatmap()
    image[..., row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = 4 * torch.randn(3, 32, 32)
    moved = explainer(image, target=0).heatmap()
    change = (moved / moved.sum() - blank / blank.sum()).abs()
    cells = torch.nn.functional.avg_pool2d(change[None], 32)[0, 0]
    best = int(cells.argmax())
    return best // cells.shape[1], best % cells.shape[1]


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "CLS token, not square": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=(96, 160), depth=3), (96, 160)),
    "register tokens": (lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=112, patch_size=16, depth=2), (112, 112)),
    "distillation token": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=96), (96, 96)),
    "no CLS token": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=96, class_token=False, global_pool="avg"), (96, 96)),
    "windows and shifts": (
        lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**{**_SWIN, "image_size": 128})), (128, 128),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_map_lies_where_the_evidence_is(name: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYOUTS[name]
    explainer = fastrel.Explainer(build().eval(), "gradient_attention")
    for row, column in ((0, 1), (1, 0), (shape[0] // 32 - 1, shape[1] // 32 - 1), (1, 2)):
        assert cell_of_highest(explainer, shape, row, column) == (row, column)


class Unusual(nn.Module):
    """A transformer block and an operator that nobody wrote a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            x = x + torch.cumprod(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), -1)
        return self.head(x[:, 0])


def test_operators_without_a_rule_are_reported_not_hidden() -> None:
    torch.manual_seed(0)
    explanation = fastrel.Explainer(Unusual().eval())(torch.randn(2, 5, 6))
    assert explanation.relevance.isfinite().all()
    assert len(explanation.report) == 1
    assert all("aten.cumprod" in name for name in explanation.report)
    assert torch.ops.aten.cumprod.default not in RULES


def test_models_without_attention_are_refused_by_name() -> None:
    model, given = image_model("resnet18", 64)
    with pytest.raises(fastrel.UnsupportedModelError, match="no attention was found"):
        fastrel.Explainer(model)(**given)


def test_token_classification_and_regression_are_target_functions() -> None:
    config = transformers.BertConfig(**_TEXT)
    ids = torch.randint(5, 60, (2, 9))
    tagger = transformers.BertForTokenClassification(config).eval()
    third = fastrel.Explainer(tagger)(input_ids=ids, target=lambda out: out.logits[:, 3, 1])
    assert third.relevance.shape == (2, 9)
    assert (third.relevance.argmax(1) == 3).all()  # the rollout starts at the token that is classified
    config.num_labels = 1
    scorer = transformers.BertForSequenceClassification(config).eval()
    assert fastrel.Explainer(scorer)(input_ids=ids, target=lambda out: out.logits[:, 0]).relevance.isfinite().all()


def test_similarity_to_a_text_is_a_target_function() -> None:
    """CLIP zero-shot, without its weights: the cosine of an image embedding with a given vector."""
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    }
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision, projection_dim=16)).eval()
    text = nn.functional.normalize(torch.randn(16), dim=0)
    explanation = fastrel.Explainer(model)(
        pixel_values=torch.randn(2, 3, 32, 32),
        target=lambda out: nn.functional.cosine_similarity(out.image_embeds, text[None]),
    )
    assert explanation.patches.shape == (2, 4, 4)
