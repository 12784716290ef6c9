"""Backends, precision and memory as users choose them."""

import os
from pathlib import Path

import pytest
import torch

import fastrel
from fastrel import build, demo
from fastrel.backends import native
from tests import golden_files as golden
from tests import models


@pytest.mark.slow
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
    given = models.inputs(name)
    for start in (0, -1):
        explainer = models.explainer(name).using(rules=rules, start_layer=start)
        plain, compiled = (x(**given, target=1) for x in (explainer.using(backend="torch"), explainer))
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
    monkeypatch.setattr(native, "_packaged", lambda part: None)
    monkeypatch.delenv(native.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv(native.JIT_VARIABLE, "0")
    native.load.cache_clear()
    try:
        assert "run `fastrel build`" in str(native.load())
        monkeypatch.delenv(native.JIT_VARIABLE)
        native.load.cache_clear()
        assert "no-such-compiler cannot be run" in str(native.load())
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
