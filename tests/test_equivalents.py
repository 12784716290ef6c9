"""Library code that no graph holds: what takes its place gives the live model's results."""

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastrel
from fastrel.graph.equivalents import as_graphs_can, equivalent


def vilt(dtype: torch.dtype = torch.float64, **changes: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
    config = transformers.ViltConfig(
        **sizes, image_size=32, patch_size=8, max_position_embeddings=16, num_labels=3, **changes
    )
    model = transformers.ViltForQuestionAnswering(config).to(dtype).eval()
    for weight in model.parameters():  # as delivered, positions are zeros and attention is level
        weight.data.normal_(0, 0.3)
    return model


def given(height: int = 32, width: int = 32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (3, 6))
    pictures = torch.randn(3, 3, height, width, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures}


def sizes(height: int, width: int) -> Tensor:
    """A mask of three pictures: a whole one, a low one and a narrow one."""
    mask = torch.ones(3, height, width, dtype=torch.long)
    mask[1, height // 2 :] = 0
    mask[2, :, 8:] = 0
    return mask


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24)])
def test_patches_in_order_give_what_patches_in_any_order_give(height: int, width: int) -> None:
    model, inputs = vilt(), {**given(height, width), "pixel_mask": sizes(height, width)}
    live, ordered = model(**inputs).logits, equivalent(model)(**inputs).logits
    assert (live - ordered).norm() < 1e-12 * live.norm()
    whole = {**inputs, "pixel_mask": torch.ones(3, height, width, dtype=torch.long)}
    assert (live - equivalent(model)(**whole).logits).norm() > 1e-3 * live.norm()  # the masks do matter


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_that_draws_its_patches_at_random_is_explained(masked: bool) -> None:
    inputs = given(40, 24) if masked else given()
    if masked:
        inputs["pixel_mask"] = sizes(40, 24)
    explainer = fastrel.Explainer(vilt())
    report = explainer.verify(**inputs, target=1)
    assert report.ok, f"\n{report}"
    assert not any("not checked" in check.meaning for check in report.checks), f"\n{report}"
    explanation = explainer(**inputs, target=1)
    assert list(explanation.maps) == ["input_ids", "pixel_values"]  # a mask is no evidence
    patches = explanation.maps["pixel_values"].grid
    assert patches is not None
    assert patches.shape == ((3, 5, 3) if masked else (3, 4, 4))
    if masked:
        assert patches[0].count_nonzero() == 15
        assert not patches[1, 3:].any()
        assert not patches[2, :, 1:].any()
        assert patches[2, :, 0].all()
    again = explainer(**inputs, target=1).maps["pixel_values"].relevance
    assert torch.equal(again, explanation.maps["pixel_values"].relevance)


def test_patches_that_are_left_out_at_random_are_refused() -> None:
    model = vilt(max_image_length=7)
    with pytest.raises(
        fastrel.CaptureError, match=r"draws 7 of 4 × 4 patches at random.*set model\.config\.max_image_length = -1"
    ):
        fastrel.Explainer(model)(**given(), target=1)


def test_only_the_librarys_own_code_is_replaced() -> None:
    """A forward pass that somebody changed is what is explained."""
    model = vilt()
    embeddings = model.vilt.embeddings  # type: ignore[union-attr]
    own = type("Own", (type(embeddings),), {"visual_embed": lambda self, *given, **named: 1 / 0})
    embeddings.__class__ = own
    assert not as_graphs_can(model)
    assert equivalent(model) is model
    embeddings.__class__ = own.__mro__[1]
    embeddings.visual_embed = lambda *given, **named: 1 / 0
    assert not as_graphs_can(model)
    del embeddings.visual_embed
    assert equivalent(model) is not model
    assert "visual_embed" not in embeddings.__dict__
