"""What a user's type checker makes of fastrel, which says by py.typed that its annotations count."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fastrel

#: A user's code, and which lines of it are wrong.
SNIPPET = """
import fastrel
import torch
from torch import Tensor, nn

model: nn.Module = nn.Linear(2, 2)
explainer = fastrel.Explainer(model, rules="official", precision="float32", memory="low", backend="torch")
explanation = explainer.using("rollout")(torch.zeros(1, 3), target=[1])
explanation = explainer.predict(torch.zeros(1, 3)).explain(lambda out: out[:, 0])
patches: Tensor = explanation.patches
text: str = explanation.relevance  # wrong
scores: Tensor = fastrel.metrics.pointing_game(patches, patches)
number: int = fastrel.metrics.segmentation(patches, patches)  # wrong
names: list[tuple[str, float]] = fastrel.render.words(["a"], patches[0])
items = fastrel.data.read("mosaics")
artefact: fastrel.Artefact = fastrel.load("explain.pt2")
fastrel.Explainer(model, rules="offical")  # wrong
fastrel.Explainer(model, precision="half")  # wrong
fastrel.Explainer(model, start_layer="last")  # wrong
fastrel.Explaner(model)  # wrong
explanation.relevence  # wrong
fastrel.metrics.pointing_gain  # wrong
"""


#: How a checker is called, and what it prints for an error: the number of its line.
CHECKERS = {
    "mypy": (["-m", "mypy", "--cache-dir", "cache"], r"^snippet.py:(\d+): error: "),
    # pyright, as a wheel that brings all it needs; its own additions are off.
    "basedpyright": (["-m", "basedpyright"], r"snippet.py:(\d+):\d+ - error: "),
}


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_py_typed_lets_a_checker_find_misspellings(checker: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "standard", "reportMissingTypeStubs": False})
    )
    command, pattern = CHECKERS[checker]
    # On PYTHONPATH a package counts as installed, and without py.typed it would have no types.
    folder = str(Path(fastrel.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *command, "snippet.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": folder},
        capture_output=True,
        text=True,
        check=False,
    )
    wrong = [str(i + 1) for i, line in enumerate(SNIPPET.splitlines()) if line.endswith("  # wrong")]
    assert re.findall(pattern, done.stdout, re.MULTILINE) == wrong, done.stdout + done.stderr


@pytest.mark.slow
def test_import_fastrel_gives_its_packages_when_they_are_asked_for() -> None:
    code = """
        import sys, fastrel
        names = "batch", "data", "functional", "methods", "metrics", "models", "render"
        assert not [name for name in names if f"fastrel.{name}" in sys.modules]
        for name in names:
            assert getattr(fastrel, name) is sys.modules[f"fastrel.{name}"]
        assert set(names) <= set(dir(fastrel))
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(fastrel.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)
