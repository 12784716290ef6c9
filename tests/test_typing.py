"""What a user's type checker makes of fastrel, which says by py.typed that its annotations count."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastrel

#: A user's code; what a line is wrong in stands behind it.
SNIPPET = """
import fastrel
import torch
from torch import Tensor, nn

model: nn.Module = nn.Linear(2, 2)
explainer = fastrel.Explainer(model, rules="official", precision="float32", memory="low", backend="torch")
explanation = explainer.using("rollout")(torch.zeros(1, 3), target=[1])
explanation = explainer.predict(torch.zeros(1, 3)).explain(lambda out: out[:, 0])
patches: Tensor = explanation.patches
text: str = explanation.relevance  # assignment
scores: Tensor = fastrel.metrics.pointing_game(patches, patches)
number: int = fastrel.metrics.segmentation(patches, patches)  # assignment
names: list[tuple[str, float]] = fastrel.render.words(["a"], patches[0])
items = fastrel.data.read("mosaics")
artefact: fastrel.Artefact = fastrel.load("explain.pt2")
fastrel.Explainer(model, rules="offical")  # arg-type
fastrel.Explainer(model, precision="half")  # arg-type
fastrel.Explainer(model, start_layer="last")  # arg-type
fastrel.Explaner(model)  # attr-defined
explanation.relevence  # attr-defined
fastrel.metrics.pointing_gain  # attr-defined
"""


def test_py_typed_lets_mypy_find_misspellings(tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    # On PYTHONPATH a package counts as installed, and without py.typed it would have no types.
    folder = str(Path(fastrel.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": folder},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"^snippet.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    lines = [line.partition("  # ")[2] for line in SNIPPET.splitlines()]
    wrong = [(str(i + 1), code) for i, code in enumerate(lines) if code]
    assert found == wrong, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["batch", "data", "functional", "methods", "metrics", "models", "render"])
def test_import_fastrel_gives_its_packages(name: str) -> None:
    code = (
        f"import sys, fastrel; assert 'fastrel.{name}' not in sys.modules; fastrel.{name}; assert {name!r} in dir(fastrel)"
    )
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(Path(fastrel.__file__).parents[1])}, check=True
    )
