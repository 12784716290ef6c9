"""What several test files share."""

import logging
import os
from pathlib import Path

import pytest
import torch

import fastrel
from tests import tiny

# pytest listens to loggers that do not propagate, and torch formats its traces of every capture as soon as anybody listens.
logging.getLogger("torch.__trace").propagate = True

# One thread per worker: two workers with two threads each wait for each other on two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


#: Files that take longest, the longest first: begun last, one of them would be all that one worker has left to do.
LONG = (
    "test_triton.py",
    "test_properties.py",
    "test_live_model.py",
    "test_coverage.py",
    "test_second_path.py",
    "test_artefact.py",
    "test_engine.py",
    "test_spellings.py",
    "test_verification.py",
    "test_stability.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; xdist hands files out in this order (--no-loadscope-reorder)."""
    places = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def vit_artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tests.tiny:vit` as an artefact with its preprocessing, which takes long to export."""
    loaded = fastrel.models.load("tests.tiny:vit")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("artefact") / "vit.pt2"
    return fastrel.export(fastrel.Explainer(tiny.vit()), images, path=path, targets=2, loaded=loaded)
