"""What the harnesses of other libraries call, by the real libraries where they are at hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastrel
from tests import models, tiny
from tests.small import ids, made


@pytest.fixture(scope="module")
def vit() -> tuple[Any, Tensor]:
    return models.build("timm_vit"), models.inputs("timm_vit")["x"][:2].contiguous()


def test_captum_attributes_sum_to_the_heatmap(vit: tuple[Any, Tensor]) -> None:
    from captum.attr import Attribution

    from fastrel.adapters.captum import Relevance

    model, images = vit
    relevance = Relevance(model)
    assert isinstance(relevance, Attribution)
    found = relevance.attribute(images, target=2)
    assert isinstance(found, Tensor)
    assert found.shape == images.shape
    torch.testing.assert_close(found.sum(1), fastrel.Explainer(model)(images, target=2).heatmap())
    (in_tuple,) = relevance.attribute((images,), target=torch.full((len(images),), 2))
    torch.testing.assert_close(in_tuple, found)


def test_captum_takes_indices_further_inputs_and_tokens() -> None:
    from fastrel.adapters.captum import Relevance

    model = made(lambda m, x, y: m.head(m.encoder(x) * y))  # [B, T, C]
    given, factor = ids(2, 7), torch.full((), 2.0, dtype=torch.float64)
    relevance = Relevance(model, method="frozen_attribution")
    found = relevance.attribute(given, target=(3, 1), additional_forward_args=factor)
    expected = fastrel.Explainer(model)(given, factor, target=lambda out: out[:, 3, 1]).relevance
    torch.testing.assert_close(found, expected)
    each = relevance.attribute(given, target=[(3, 1), (4, 0)], additional_forward_args=(factor,))
    torch.testing.assert_close(each[0], expected[0])
    with pytest.raises(fastrel.InputError, match="has no map of its own"):
        relevance.attribute((given, factor), target=(3, 1))


def test_captums_own_metrics_take_it(vit: tuple[Any, Tensor]) -> None:
    from captum.metrics import sensitivity_max

    from fastrel.adapters.captum import Relevance

    model, images = vit
    worst = sensitivity_max(
        Relevance(model).attribute,
        images,
        perturb_func=lambda x: x + 1e-3 * torch.randn_like(x),
        n_perturb_samples=2,
        target=1,
    )
    assert worst.shape == (len(images),)
    assert 0 < float(worst.max()) < 1


def test_quantus_scores_it(vit: tuple[Any, Tensor]) -> None:
    import quantus

    from fastrel.adapters.quantus import Explain

    model, images = vit
    size = images.shape[-1]
    explain = Explain(method="frozen_attribution")
    maps = explain(model=model, inputs=images.numpy(), targets=np.array([1, 2]), device="cpu")
    torch.testing.assert_close(
        torch.from_numpy(maps[:, 0]), fastrel.Explainer(model)(images, target=torch.tensor([1, 2])).heatmap()
    )
    metric = quantus.PixelFlipping(features_in_step=size, disable_warnings=True, display_progressbar=False)
    scores = metric(
        model=model.float(), x_batch=images.float().numpy(), y_batch=np.array([1, 2]), explain_func=explain, device="cpu"
    )
    model.double()
    assert np.isfinite(np.asarray(scores, dtype=float)).all()


class ClassifierOutputTarget:
    """As pytorch-grad-cam has it."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, output: Tensor) -> Tensor:
        return output[self.category]


def test_the_call_of_grad_cam(vit: tuple[Any, Tensor]) -> None:
    from fastrel.adapters.cam import RelevanceCAM

    model, images = vit
    expected = fastrel.Explainer(model)(images, target=torch.tensor([1, 2])).heatmap().numpy()
    with RelevanceCAM(model) as cam:
        found = cam(input_tensor=images, targets=[ClassifierOutputTarget(1), ClassifierOutputTarget(2)])
        likely = cam(images)
        with pytest.raises(fastrel.InputError, match="1 targets for 2 pictures"):
            cam(images, [ClassifierOutputTarget(1)])
    assert found.shape == likely.shape == expected.shape
    assert found.min() == 0
    assert found.max() == pytest.approx(1)
    low, high = expected.min((1, 2), keepdims=True), expected.max((1, 2), keepdims=True)
    np.testing.assert_allclose(found, (expected - low) / (high - low), atol=1e-6)


def test_a_pipeline_says_which_words_made_it(tmp_path: Path) -> None:
    from fastrel.adapters.pipeline import Pipeline

    tiny.bert_folder(tmp_path)
    pipeline = Pipeline(str(tmp_path), target=("top2",))
    one: Any = pipeline("a clever film")
    assert [set(answer) for answer in one] == [{"label", "score", "words"}] * 2
    assert [word for word, _ in one[0]["words"]] == ["a", "clever", "film"]
    several: Any = pipeline(["a clever film", "bad"])
    assert len(several) == 2
    assert [answer["label"] for answer in several[0]] == [answer["label"] for answer in one]
    np.testing.assert_allclose([x for _, x in several[0][0]["words"]], [x for _, x in one[0]["words"]], rtol=1e-4)
    with pytest.raises(fastrel.InputError, match="input 1: "):
        pipeline(["a clever film", ""])


def test_a_pipeline_takes_pictures() -> None:
    from fastrel.adapters.pipeline import Pipeline

    pictures: Any = Pipeline()(np.zeros((64, 64, 3), np.uint8))
    assert pictures[0]["map"].ndim == 2
    assert 0 < pictures[0]["score"] <= 1


def test_virelay_finds_what_it_looks_for(vit: tuple[Any, Tensor], tmp_path: Path) -> None:
    import h5py

    from fastrel.adapters import virelay

    model, images = vit
    explainer = fastrel.Explainer(model)
    batches = [explainer(images), explainer(images, target=1)]
    virelay.save_inputs(tmp_path / "input.h5", torch.cat([images, images]), [0, 1, 2, 3])
    virelay.save_attributions(tmp_path / "attribution.h5", batches)
    count = 2 * len(images)
    with h5py.File(tmp_path / "attribution.h5") as file:
        assert file["attribution"].shape == (count, 1, *images.shape[2:])
        assert file["label"].shape == file["prediction"].shape
        assert file["label"][-1].argmax() == 1
        assert list(file["index"]) == list(range(count))
        np.testing.assert_allclose(file["attribution"][0, 0], batches[0].heatmap()[0], rtol=1e-5)
    with h5py.File(tmp_path / "input.h5") as file:
        assert file["data"].shape == (count, *images.shape[1:])
    with pytest.raises(fastrel.InputError, match="one class per sample"):
        virelay.save_attributions(tmp_path / "more.h5", [explainer(images, target=[[0, 1]] * len(images))])
