"""Backends, precision and memory as users choose them."""

import copy
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fastrel
from fastrel import build, demo, weights
from fastrel.backends import native
from tests import golden_files as golden
from tests import models


def test_a_thousand_explanations_leave_memory_flat() -> None:
    """Nothing is kept alive after an explanation."""
    model, image = demo.load_model(), demo.to_input(demo.held_out()[0][:1])
    explainer = fastrel.Explainer(model)

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    for _ in range(100):
        explainer(image, target=1)
    before = resident()
    for _ in range(1000):
        explainer(image, target=1)
    assert resident() - before < 8


@pytest.mark.parametrize("name", ["timm_vit", "hf_bert", "torchvision_vit"])
def test_low_memory_gives_the_same_map_from_fewer_saved_values(name: str) -> None:
    model, given = models.build(name), models.inputs(name)
    maps, saved = [], []
    for memory in ("normal", "low"):
        prediction = fastrel.Explainer(model, memory=memory).predict(**given)
        owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {x.untyped_storage().data_ptr(): x for x in prediction._saved if isinstance(x, torch.Tensor)}
        saved.append(sum(x.untyped_storage().nbytes() for key, x in storages.items() if key not in owned))
        maps.append(prediction.explain(0).relevance)
    assert golden.relative_error(maps[1], maps[0]) < 1e-12
    assert saved[1] < saved[0] / 2


@pytest.mark.parametrize("rules", ["positive", "official"])
@pytest.mark.parametrize("name", ["timm_vit", "hf_bert", "hf_bert_eager", "torchvision_vit"])
def test_both_backends_give_the_same_map(name: str, rules: str) -> None:
    if native.load():
        pytest.skip(f"no compiled kernels: {native.load()}")
    model, given = models.build(name), models.inputs(name)
    for start in (0, -1):
        plain = fastrel.Explainer(model, rules=rules, start_layer=start, backend="torch")(**given, target=1)
        compiled = fastrel.Explainer(model, rules=rules, start_layer=start)(**given, target=1)
        assert golden.relative_error(compiled.relevance, plain.relevance) < 1e-8


def test_a_backend_that_cannot_run_says_why() -> None:
    model, given = models.build("timm_vit"), models.inputs("timm_vit")
    with pytest.raises(fastrel.InputError, match="unknown backend 'gpu'; choose auto or one of triton, cuda, cpp, torch"):
        fastrel.Explainer(model, backend="gpu")
    with pytest.raises(
        fastrel.UnsupportedModelError, match=r"backend 'cpp' cannot run: .* no kernel for rules 'original_lrp'"
    ):
        fastrel.Explainer(model, "lrp", rules="original_lrp", backend="cpp")(**given)
    with pytest.raises(fastrel.InputError, match="precision 'low' needs rules='positive'"):
        fastrel.Explainer(model, rules="official", precision="low")


def test_without_a_compiler_or_permission_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And the reason says what to do."""
    monkeypatch.setattr(native, "_find", lambda part, variable: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "cached", lambda part: tmp_path / "fastrel" / "_C.so")
    monkeypatch.setenv(native.JIT_VARIABLE, "0")
    native.load.cache_clear()
    try:
        assert "run `fastrel build`" in str(native.load())
        monkeypatch.delenv(native.JIT_VARIABLE)
        native.load.cache_clear()
        assert "no-such-compiler" in str(native.load())
        model, given = models.build("timm_vit"), models.inputs("timm_vit")
        with pytest.raises(fastrel.InputError, match="backend 'cpp' cannot run"):
            fastrel.Explainer(model, backend="cpp")
        assert fastrel.Explainer(model)(**given).relevance.isfinite().all()
    finally:
        native.load.cache_clear()


def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match=r"false .* failed"):
        build.compile_library(tmp_path / "_C.so")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def wide_vit(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.nn.Module, torch.Tensor]:
    """Layers wide enough for products in reduced precision, on any processor."""
    from timm.models.vision_transformer import VisionTransformer

    monkeypatch.setenv("FASTREL_BF16", "1")
    gc.collect()  # models of earlier tests, and what was kept for them
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=256, depth=2, num_heads=4, num_classes=6).eval()
    return model, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("precision", ["mixed", "low"])
def test_weights_in_reduced_precision_are_kept_until_they_change(wide_vit: Any, precision: str, backend: str) -> None:
    """Also when they are changed behind autograd's back; and gone with the model."""
    model, images = wide_vit
    before = weights.kept_bytes()
    explainer = fastrel.Explainer(model, precision=precision, backend=backend)
    first = explainer(images, target=1).relevance
    kept = weights.kept_bytes()
    assert kept > before
    assert torch.equal(explainer(images, target=1).relevance, first)
    assert weights.kept_bytes() == kept
    for change in (lambda w: w.mul_(-1), lambda w: w.data.neg_(), lambda w: setattr(w, "data", torch.randn_like(w))):
        with torch.no_grad():
            change(model.blocks[1].mlp.fc1.weight)
        fresh = fastrel.Explainer(model, precision=precision, backend=backend, memory="low")(images, target=1).relevance
        assert torch.equal(explainer(images, target=1).relevance, fresh)
    assert weights.kept_bytes() <= kept * 1.01


def test_kept_weights_have_a_limit_and_a_way_to_do_without(wide_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = wide_vit
    before = weights.kept_bytes()
    expected = fastrel.Explainer(model, precision="mixed", memory="low")(images, target=1).relevance
    assert weights.kept_bytes() == before
    for limit, allowed in (("0", before), (str((before + 1e6) / 1e6), before + 1_000_000)):
        monkeypatch.setenv(weights.LIMIT_VARIABLE, limit)
        explainer = fastrel.Explainer(model, precision="mixed")
        assert torch.equal(explainer(images, target=1).relevance, expected)
        assert torch.equal(explainer(images, target=1).relevance, expected)
        assert weights.kept_bytes() <= allowed


def test_kept_weights_go_with_their_model(wide_vit: Any) -> None:
    model, images = wide_vit
    before = weights.kept_bytes()
    other = copy.deepcopy(model)
    fastrel.Explainer(other, precision="mixed")(images, target=1)
    assert weights.kept_bytes() > before
    del other
    gc.collect()
    assert weights.kept_bytes() == before
