"""What fastrel is timed against computes what it is said to."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import fastrel
from benchmarks import peers
from benchmarks.baselines import ViT
from tests import golden_files as golden
from tests import models


def small_vit() -> VisionTransformer:
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=6).eval()


@pytest.mark.parametrize("name", ["vit_a", "vit_b"])
def test_the_official_baseline_is_the_official_code(name: str) -> None:
    baseline, image = ViT(models.golden_vit(name)), golden.tensor(golden.load(name)["input"])  # type: ignore[arg-type]
    for target in golden.targets(name):
        expected = golden.tensor(golden.load(name)[f"t{target}/transformer_attribution/start0"])
        assert golden.relative_error(baseline.explain(image, target)[1:], expected) < 1e-10, target


def test_the_official_baseline_equals_the_official_rules() -> None:
    torch.manual_seed(0)
    model, images = small_vit(), torch.randn(2, 3, 32, 32)
    before = [parameter.clone() for parameter in model.parameters()]
    theirs = ViT(model).maps(images, 4)
    ours = fastrel.Explainer(model, rules="official")(images, target=4).relevance
    assert golden.map_error(theirs, ours) < 1e-4
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_peers_are_timed_side_by_side_or_say_why_not() -> None:
    torch.manual_seed(0)
    found, batches = peers.build(small_vit().requires_grad_(False)), (1, 2)
    for batch in batches:
        peers.measure(found, torch.randn(batch, 3, 32, 32))
    header, _, forward, *others = peers.table(found, batches)
    assert header == "| images/s (forward passes) | batch 1 | batch 2 |"
    assert "–" not in "".join([forward, *others])
    assert [line.split(" | ")[0].strip("| ") for line in others] == list(peers.PEERS)
    for name, peer in found.items():
        assert (set(peer.own) == {1, 2}) != peer.missing.startswith("not installed: "), name
    official = found["the paper's official code"]
    assert official.own[1] == official.own[2]
    (axes,) = peers.plot(found, "small").axes
    assert len(axes.lines) == sum(not peer.missing for peer in found.values())
