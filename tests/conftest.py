"""What several test files share."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastrel
from tests import tiny
from tests.small import RELEASE

# pytest listens to loggers that do not propagate, and torch formats its traces of every capture as soon as anybody listens.
logging.getLogger("torch.__trace").propagate = True

# One thread per worker: two workers with two threads each wait for each other on two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


#: Files that take longest, the longest first: begun last, one of them would be all that one worker has left to do.
LONG = (
    "test_triton.py",
    "test_live_model.py",
    "test_ptx.py",
    "test_coverage.py",
    "test_properties.py",
    "test_artefact.py",
    "test_serving.py",
    "test_batch_ray.py",
    "test_second_path.py",
    "test_spellings.py",
    "test_verification.py",
    "test_stability.py",
    "test_engine.py",
)

#: Files and tests with many cases of one kind: of so many one is quick, and runs with `-m "not slow"`. Other tests that take
#: seconds are marked slow where they are.
ONE_IN = {
    "test_adapters.py": 2,
    "test_architectures.py": 5,
    "test_artefact.py": 3,
    "test_backends.py": 5,
    "test_baselines.py": 2,
    "test_batch.py": 4,
    "test_cache.py": 4,
    "test_cli.py": 4,
    "test_coverage.py": 18,
    "test_cuda_shimmed.py": 8,
    "test_docs.py": 6,
    "test_dtypes.py": 6,
    "test_engine.py": 8,
    "test_evaluation.py": 4,
    "test_experts.py": 5,
    "test_explainer.py": 4,
    "test_export.py": 4,
    "test_gates.py": 9,
    "test_golden.py": 2,
    "test_inputs.py": 8,
    "test_launches.py": 7,
    "test_layouts.py": 6,
    "test_live_model.py": 14,
    "test_masks.py": 5,
    "test_methods.py": 10,
    "test_mixing.py": 12,
    "test_ops.py": 2,
    "test_pairs.py": 3,
    "test_poolings.py": 16,
    "test_properties.py": 4,
    "test_ptx.py": 40,
    "test_questions.py": 6,
    "test_second_path.py": 14,
    "test_several_inputs.py": 8,
    "test_spellings.py": 18,
    "test_stability.py": 4,
    "test_text_pairs.py": 4,
    "test_triton.py": 2,
    "test_triton_interpreted.py": 7,
    "test_verification.py": 5,
    "test_waiting.py": 6,
    "test_weights.py": 2,
    # Numbers that share no factor with those of the parameters, so that each of these is met.
    "test_attention_relevance": 5,
    "test_no_explanation_adds_up_in_an_order_of_the_gpus": 4,
    "test_zplus_linear": 3,
}

#: Tests with many cases of one kind that take long: of so many one runs in CI, and all before a release.
FEWER = {
    "test_all_other_methods": 3,
    "test_heads_of_one_attention_are_one_block": 2,
    "test_it_verifies_itself": 2,
    "test_mixtures_of_experts_are_verified": 2,
    "test_official_maps_of_clip_equal_golden": 2,
    "test_other_architectures": 2,
    "test_poolings_are_verified": 2,
    "test_texts_that_share_an_embedding_have_a_map_each": 2,
    "test_the_last_token_is_found_by_one_hot_codes": 2,
    "test_three_inputs_of_one_encoder_share_the_row": 2,
}

#: Fixtures that take long: tests that use one are slow.
LONG_MADE = {"server", "browser", "subject"}

#: Seconds of processor time, its children's with it, above which a test that is not marked slow is named among the warnings.
QUICK = 15


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, since xdist hands files out in this order (--no-loadscope-reorder); which tests are slow, and which are for
    releases."""
    if not RELEASE:
        _leave_out(config, items)
    places = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))
    seen: Counter[str] = Counter()
    for item in items:
        kind = item.originalname if item.originalname in ONE_IN else item.path.name  # type: ignore[attr-defined]
        turn = seen[kind] % ONE_IN.get(kind, 1)
        if item.get_closest_marker("load") or LONG_MADE & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        if not item.get_closest_marker("slow"):
            seen[kind] += 1
            if turn != ONE_IN.get(kind, 1) - 1:
                item.add_marker("slow")


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out of the items those cases of `FEWER` that are for releases; a case that is asked for by name stays."""
    named = {arg.rpartition("::")[2] for arg in config.args}
    seen: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        name: str = getattr(item, "originalname", item.name)
        fewer = seen[name] % FEWER.get(name, 1) and item.name not in named
        (left_out if fewer else kept).append(item)
        seen[name] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def _seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What takes long says so, lest the quick tests become slow ones."""
    before = _seconds()
    yield
    if _seconds() - before > QUICK and not item.get_closest_marker("slow"):
        item.warn(pytest.PytestWarning(f"took more than {QUICK} seconds of processor time: mark it slow"))


@pytest.fixture(scope="session")
def vit_artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tests.tiny:vit` as an artefact with its preprocessing, which takes long to export."""
    loaded = fastrel.models.load("tests.tiny:vit")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("artefact") / "vit.pt2"
    return fastrel.export(fastrel.Explainer(tiny.vit()), images, path=path, targets=2, loaded=loaded)
