"""The engine equals the method's official code on golden inputs."""

import pytest
import torch
from torch import Tensor

from tests import golden_files as golden
from tests.models import golden_explainer

VITS, BERTS = ["vit_a", "vit_b"], ["bert_a", "bert_b_padded"]
LIMIT = 1e-6


def maps(name: str, kind: str) -> list[tuple[int, int, Tensor]]:
    """(target, start_layer, map) of every golden map of a kind."""
    found = []
    for key, array in golden.load(name).items():
        if f"/{kind}/start" in key:
            found.append((int(key[1 : key.index("/")]), int(key.rpartition("start")[2]), golden.tensor(array)))
    assert found
    return found


@pytest.mark.parametrize("name", VITS)
def test_vit_maps(name: str) -> None:
    official, image = golden_explainer(name).using(rules="official"), golden.tensor(golden.load(name)["input"])
    for target, start, expected in maps(name, "transformer_attribution"):
        explanation = official.using(start_layer=start)(image, target=target)
        assert golden.relative_error(explanation.relevance[0, 1:], expected) < LIMIT, (target, start)
        assert torch.equal(explanation.patches.flatten(), explanation.relevance[0, 1:])
        assert golden.relative_error(explanation.logits, golden.tensor(golden.load(name)["logits"])) < 1e-12


@pytest.mark.parametrize("name", VITS)
def test_vit_rollout(name: str) -> None:
    image = golden.tensor(golden.load(name)["input"])
    for start in (0, 1):
        explanation = golden_explainer(name).using("rollout", start_layer=start)(image)
        expected = golden.tensor(golden.load(name)[f"attention_rollout/start{start}"])
        assert golden.relative_error(explanation.relevance[0, 1:], expected) < 1e-10


@pytest.mark.parametrize("name", VITS)
def test_vit_raw_attention(name: str) -> None:
    explanation = golden_explainer(name).using("raw_attention")(golden.tensor(golden.load(name)["input"]))
    expected = golden.tensor(golden.load(name)[f"t{golden.targets(name)[0]}/last_layer_attn"])
    assert golden.relative_error(explanation.relevance[0, 1:], expected) < 1e-10


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BERTS)
def test_bert_maps(name: str, attention: str) -> None:
    published = golden_explainer(name, attention).using(rules="official", normalize_rollout=True)
    data = golden.load(name)
    given = {key: golden.tensor(data[key]) for key in ("input_ids", "attention_mask")}
    for target, start, expected in maps(name, "transformer_attribution"):
        row = published.using(start_layer=start)(**given, target=target).relevance[0]
        row = torch.cat((row.min()[None], row[1:]))  # the published code overwrites the CLS entry
        assert golden.relative_error(row, expected) < LIMIT, (target, start)


@pytest.mark.parametrize("name", VITS + BERTS)
def test_official_blocks(name: str) -> None:
    """Attention, its gradient and its relevance, block by block; rows that the head cannot see are left out."""
    data = golden.load(name)
    if name in VITS:
        given = {"x": golden.tensor(data["input"])}
    else:
        given = {key: golden.tensor(data[key]) for key in ("input_ids", "attention_mask")}
    for target in golden.targets(name):
        blocks = golden_explainer(name).using(rules="official").trace(**given, target=target)
        for i, block in enumerate(blocks):
            for key, ours in (("gradient", block.gradient), ("relevance", block.relevance)):
                assert ours is not None
                expected = golden.tensor(data[f"t{target}/block{i}/attention_{key}"])
                rows = ours.shape[-2]
                assert golden.relative_error(ours[0, 0], expected[:, :rows]) < LIMIT, (i, key)
                assert not expected[:, rows:].any()
            assert (
                golden.relative_error(block.attention[0], golden.tensor(data[f"t{target}/block{i}/attention"])[:, :rows])
                < 1e-12
            )
            if name in VITS:
                assert block.value_relevance is not None
                expected = golden.tensor(data[f"t{target}/block{i}/value_relevance"])
                assert golden.relative_error(block.value_relevance[0, 0], expected) < LIMIT
