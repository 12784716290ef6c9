"""What users rely on: targets, errors, the model left alone, capture once, threads."""

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrel
from tests import golden_files as golden
from tests import models


@pytest.fixture(scope="module")
def vit(explainer: fastrel.Explainer) -> nn.Module:
    return explainer.model


@pytest.fixture(scope="module")
def explainer() -> fastrel.Explainer:
    return models.explainer("timm_vit")


@pytest.fixture
def images() -> Tensor:
    return models.inputs("timm_vit")["x"]


def test_targets_of_every_kind_agree(explainer: fastrel.Explainer, images: Tensor) -> None:
    prediction = explainer.predict(images)
    predicted = prediction.explain()
    assert torch.equal(predicted.target, prediction.logits.argmax(1))
    classes = predicted.target.tolist()
    for target in (predicted.target, classes, tuple(classes), torch.tensor(classes, dtype=torch.int32)):
        assert torch.equal(prediction.explain(target).relevance, predicted.relevance)
    by_class = torch.stack([prediction.explain(c).relevance[i] for i, c in enumerate(classes)])
    assert golden.map_error(by_class, predicted.relevance) < 1e-12
    several = prediction.explain([[c, 0] for c in classes])
    assert several.relevance.shape == (3, 2, 17)
    assert several.patches.shape == (3, 2, 4, 4)
    assert several.heatmap().shape == (3, 2, 32, 32)
    assert golden.map_error(several.relevance[:, 0], predicted.relevance) < 1e-12


def test_a_class_picked_by_a_function_is_explained_like_the_class(explainer: fastrel.Explainer, images: Tensor) -> None:
    by_function = explainer(images, target=lambda out: out[:, 3])
    assert by_function.target is None
    assert golden.map_error(by_function.relevance, explainer(images, target=3).relevance) < 1e-12
    two = explainer(images, target=lambda out: out[:, [3, 1]])
    assert golden.map_error(two.relevance, explainer(images, target=[[3, 1]] * 3).relevance) < 1e-12
    assert explainer(images, target=lambda out: out).relevance.shape == (3, 6, 17)  # K = all classes
    contrast = explainer(images, target=lambda out: out[:, 3] - out[:, 1])
    assert golden.map_error(contrast.relevance, by_function.relevance) > 1e-3


def test_predict_then_explain_equals_one_call(explainer: fastrel.Explainer, images: Tensor) -> None:
    prediction = explainer.predict(images)
    assert torch.equal(prediction.explain(2).relevance, explainer(images, target=2).relevance)
    assert torch.equal(prediction.output, prediction.logits)


def test_rollout_of_the_distilled_model_reads_both_tokens() -> None:
    row = (
        models.explainer("timm_deit_distilled").using("raw_attention")(models.inputs("timm_deit_distilled")["x"]).relevance
    )
    assert row.shape == (3, 6)
    assert torch.allclose(row.sum(1), torch.ones(3, dtype=row.dtype))


def test_mean_pooling_reads_all_tokens_equally() -> None:
    explainer = models.explainer("timm_vit_mean_pooled")
    explanation = explainer.using("raw_attention")(models.inputs("timm_vit_mean_pooled")["x"])
    blocks = explainer.trace(models.inputs("timm_vit_mean_pooled")["x"])
    assert torch.allclose(explanation.relevance, blocks[-1].attention.mean((1, 2)))
    assert explanation.patches.shape == (3, 4, 4)


@pytest.mark.parametrize("name", models.VISION)
def test_patches_are_the_tokens_that_come_from_the_image(name: str) -> None:
    """Evidence that sits in one patch: its own embedding is perturbed, and only that patch's value is its token's."""
    explanation = models.explainer(name)(**models.inputs(name))
    patches = explanation.patches.flatten(1)
    side = int(patches.shape[1] ** 0.5)
    assert explanation.patches.shape == (3, side, side)
    assert torch.equal(patches, explanation.relevance[:, -side * side :])


def test_an_image_that_is_not_square() -> None:
    torch.manual_seed(0)
    model = models._vit(img_size=(16, 40))().double().eval()
    explanation = fastrel.Explainer(model)(torch.randn(2, 3, 16, 40, dtype=torch.float64))
    assert explanation.patches.shape == (2, 2, 5)
    assert explanation.heatmap().shape == (2, 16, 40)


@dataclass
class Everything:
    """The state of a model that an explanation must not touch."""

    parameters: dict[str, Tensor]
    modes: list[bool]
    grads: list[Any]
    required: list[bool]
    hooks: list[int]

    @classmethod
    def of(cls, model: nn.Module) -> "Everything":
        return cls(
            {name: value.clone() for name, value in model.state_dict().items()},
            [module.training for module in model.modules()],
            [parameter.grad for parameter in model.parameters()],
            [parameter.requires_grad for parameter in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        )


@pytest.mark.parametrize("name", ["timm_vit", "hf_bert", "torchvision_vit"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = models.build(name)
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    identities = [id(parameter) for parameter in model.parameters()]
    before = Everything.of(model)
    fastrel.Explainer(model)(**models.inputs(name))
    after = Everything.of(model)
    assert identities == [id(parameter) for parameter in model.parameters()]
    assert all(torch.equal(before.parameters[key], after.parameters[key]) for key in before.parameters)
    before.parameters = after.parameters = {}
    assert before == after


def test_a_model_in_training_mode_is_explained_as_it_predicts_in_eval_mode(images: Tensor) -> None:
    model = models._vit(proj_drop_rate=0.5, attn_drop_rate=0.5)().double()
    in_eval = fastrel.Explainer(model.eval())(images, target=1)
    in_training = fastrel.Explainer(model.train())(images, target=1)
    assert torch.equal(in_eval.logits, in_training.logits)
    assert torch.equal(in_eval.relevance, in_training.relevance)


def test_weights_changed_after_capture_are_seen(images: Tensor) -> None:
    model = models.build("timm_vit", seed=3)
    explainer = fastrel.Explainer(model)
    explainer(images)
    model.load_state_dict(models.build("timm_vit", seed=4).state_dict())
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    assert torch.equal(explainer(images).logits, model(images))
    model.float()
    assert explainer(images.float()).relevance.dtype == torch.float32
    model.head = nn.Linear(48, 9)
    assert explainer(images.float(), target=8).logits.shape == (3, 9)


def test_a_second_call_does_no_capture_work(
    explainer: fastrel.Explainer, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    explainer(images)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("captured again")

    monkeypatch.setattr("fastrel.engine.capture", refuse)
    monkeypatch.setattr("fastrel.engine.transform", refuse)
    for batch in (1, 2, 7):
        assert explainer(torch.randn(batch, 3, 32, 32, dtype=torch.float64)).relevance.shape == (batch, 17)


def test_text_length_may_vary_without_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = fastrel.Explainer(models.build("hf_bert"))
    explainer(**models.inputs("hf_bert"))
    monkeypatch.setattr("fastrel.engine.capture", None)
    for length in (2, 5, 40):
        ids = torch.randint(3, 60, (1, length))
        assert explainer(input_ids=ids, attention_mask=torch.ones_like(ids)).relevance.shape == (1, length)
        assert explainer(attention_mask=torch.ones_like(ids), input_ids=ids).relevance.shape == (1, length)


def test_a_single_token_and_more_than_one_input_size() -> None:
    explainer = fastrel.Explainer(models.build("hf_bert"))
    for length in (1, 4, 1):
        ids = torch.randint(3, 60, (2, length))
        explanation = explainer(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert explanation.relevance.shape == (2, length)


def test_two_threads_share_one_explainer(images: Tensor) -> None:
    model = models.build("timm_vit")
    expected = fastrel.Explainer(model)(images, target=1).relevance
    explainer, results = fastrel.Explainer(model), {}

    def work(number: int) -> None:
        for _ in range(5):
            results[number] = explainer(images, target=1).relevance

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results.values())


# Bad input: a clear error that quotes it, before any work.


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (6, "target 6 is out of range: the model has 6 classes, 0 to 5"),
        (-1, "target -1 is out of range"),
        ([0, 1], r"shape \(2,\) does not fit a batch of 3"),
        ([[0], [1], [99]], "target 99 is out of range"),
        (1.5, "class indices"),
        (torch.tensor([True, False, True]), "class indices"),
        (lambda out: out[:, 0] * 0, "zero gradient for sample 0"),
        (lambda out: out[:2, 0], r"returned shape \(2,\); expected \[3\]"),
        (lambda out: out.sum(), r"returned shape \(\)"),
        (lambda out: torch.ones(3), "does not depend"),
        (lambda out: 3, "floating-point tensor, not int"),
    ],
)
def test_targets_that_do_not_fit(explainer: fastrel.Explainer, images: Tensor, target: Any, message: str) -> None:
    if (
        callable(target)
        and target(torch.ones(3, 6)) is not None
        and getattr(target(torch.ones(3, 6)), "shape", 0) == (3, 6)
    ):
        assert explainer(images, target=target).relevance.shape == (3, 6, 17)  # K = all classes is a legal target
        return
    with pytest.raises(fastrel.InputError, match=message):
        explainer(images, target=target)


def test_inputs_that_do_not_fit(explainer: fastrel.Explainer, images: Tensor) -> None:
    with pytest.raises(fastrel.InputError, match="NaN or infinity in sample 1"):
        explainer(torch.where(torch.arange(3)[:, None, None, None] == 1, torch.nan, images))
    with pytest.raises(fastrel.InputError, match=r"Input (height|width|size).*64"):
        explainer(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    with pytest.raises(fastrel.InputError, match=r"rejects these inputs.*type"):
        explainer(images.float())
    with pytest.raises(fastrel.InputError, match=r"\(0, 3, 32, 32\) holds no samples"):
        explainer(images[:0])
    with pytest.raises(fastrel.InputError, match="no tensor"):
        explainer("cat.jpg")
    with pytest.raises(fastrel.InputError, match=r"cannot be called like this: .* 'x'"):
        explainer(pixels=images)
    with pytest.raises(fastrel.InputError, match="cannot be called like this"):
        explainer()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "saliency"}, "unknown method 'saliency'; choose one of frozen_attribution"),
        ({"rules": "both"}, "unknown rules 'both'"),
        ({"backend": "tpu"}, "unknown backend 'tpu'"),
        ({"backend": "cuda"}, "backend 'cuda' cannot run: "),
        ({"precision": "fp4"}, "precision 'fp4'"),
    ],
)
def test_options_that_do_not_exist(vit: nn.Module, options: dict[str, str], message: str) -> None:
    with pytest.raises(fastrel.InputError, match=message):
        fastrel.Explainer(vit, **options)


def test_a_start_layer_out_of_range(explainer: fastrel.Explainer, images: Tensor) -> None:
    with pytest.raises(fastrel.InputError, match=r"start_layer 3 is out of range: the model has 3 attention blocks"):
        explainer.using(start_layer=3)(images)
    last, second = (explainer.using(start_layer=i)(images).relevance for i in (-1, 2))
    assert torch.equal(last, second)


def test_only_modules_can_be_explained() -> None:
    with pytest.raises(fastrel.InputError, match=r"must be a torch\.nn\.Module, not function"):
        fastrel.Explainer(lambda x: x)  # type: ignore[arg-type]


class Unusual(nn.Module):
    """A transformer with something in its middle."""

    def __init__(self, middle: Any) -> None:
        super().__init__()
        self.body, self.head, self.middle = models.build("timm_vit"), nn.Linear(48, 3).double(), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.body.forward_features(x))[:, 0])


def test_unsupported_operators_are_refused_by_name(images: Tensor) -> None:
    with pytest.raises(fastrel.UnsupportedModelError, match=r"aten.cumprod.default \(.*, 17, 48\).* mixes tokens"):
        fastrel.Explainer(Unusual(lambda x: x.cumprod(1)))(images)


class Head(nn.Module):
    """A classifier that may overwrite its values."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.body = models.build("timm_vit")
        torch.manual_seed(0)
        self.first, self.act, self.second = nn.Linear(48, 20).double(), nn.ReLU(in_place), nn.Linear(20, 3).double()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body.forward_features(x)
        if self.in_place:
            tokens += 0.5
        else:
            tokens = tokens + 0.5
        return self.second(self.act(self.first(tokens[:, 0])))


def test_models_that_overwrite_values_in_place_are_explained_like_those_that_do_not(images: Tensor) -> None:
    plain, in_place = (fastrel.Explainer(Head(flag))(images, target=1) for flag in (False, True))
    assert torch.equal(plain.logits, in_place.logits)
    assert torch.equal(plain.relevance, in_place.relevance)

    def zeroed(tokens: Tensor) -> Tensor:
        tokens = tokens.clone()
        tokens[:, 1] = 0
        return tokens

    def masked(tokens: Tensor) -> Tensor:
        return tokens * (torch.arange(17) != 1).to(tokens)[:, None]

    written, plain = (fastrel.Explainer(Unusual(middle))(images, target=1) for middle in (zeroed, masked))
    assert torch.equal(written.logits, plain.logits)
    assert torch.allclose(written.relevance, plain.relevance, rtol=1e-10)


def test_models_without_attention_are_refused(images: Tensor) -> None:
    with pytest.raises(fastrel.UnsupportedModelError, match=r"no attention was found"):
        fastrel.Explainer(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4).double()))(images)


def test_data_dependent_models_are_refused_by_the_line_that_asks(images: Tensor) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    class Sizing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[: len(x[x > 0])]

    for model, line in (
        (Branching(), r"return x if x\.sum\(\) > 0 else -x"),
        (Sizing(), r"return x\[: len\(x\[x > 0\]\)\]"),
    ):
        said = rf"could not capture {type(model).__name__}: its code chooses .* at test_explainer\.py:\d+, `{line}`.*use torch\.where"
        with pytest.raises(fastrel.CaptureError, match=said):
            fastrel.Explainer(model)(images)


def test_a_model_that_returns_nan_gives_an_error_not_a_map(images: Tensor) -> None:
    model = models.build("timm_vit")
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(fastrel.InputError, match="the model's output holds NaN"):
        fastrel.Explainer(model)(images)


def test_saving_needs_one_sample_and_what_is_shown(explainer: fastrel.Explainer, images: Tensor, tmp_path: Any) -> None:
    explanation = explainer(images)
    with pytest.raises(fastrel.InputError, match="holds 3 samples"):
        explanation.save(tmp_path / "map.png", image=torch.rand(3, 32, 32))
    with pytest.raises(fastrel.InputError, match="lies on a picture; pass it: image="):
        explanation[0].save(tmp_path / "map.png")
    with pytest.raises(fastrel.InputError, match="not normalised"):
        explanation[0].save(tmp_path / "map.png", image=images[0])
    explanation[-1].save(tmp_path / "map.png", image=torch.rand(3, 32, 32))
    assert (tmp_path / "map.png").stat().st_size > 100
    text = fastrel.Explainer(models.build("hf_bert"))(**models.inputs("hf_bert", batch=1))
    with pytest.raises(fastrel.InputError, match="do not lie on an image"):
        _ = text.patches
    with pytest.raises(fastrel.InputError, match="2 tokens for input_ids, whose map has 12"):
        text.save(tmp_path / "map.html", tokens=["a", "b"])
