"""What `pip install fastrel` alone brings runs the commands that need no extra, and names the extra for those that do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastrel

#: Runs the command where the packages of extras are not to be found. torch asks of some whether they are there, so they are absent
#: as not installed, not broken.
WITHOUT_EXTRAS = """
import importlib.machinery, sys
names = {"pyarrow", "pandas", "transformers", "tokenizers", "sklearn", "scipy", "h5py", "ray", "onnx", "onnxscript",
    "onnxruntime", "mosec", "aiohttp", "uvloop", "prometheus_client", "captum", "peft", "quantus"}
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in names else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
from fastrel.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(fastrel.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_pictures_are_explained(tmp_path: Path) -> None:
    picture = str(Path(fastrel.__file__).parent / "demo" / "scene1-tshirt-dress-trousers-sneaker.png")
    done = run(tmp_path, "explain", picture, "--out", "maps")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "maps").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("batch . --out out", "batch"),
        ("show .", "batch"),
        ("serve explain.pt2", "serve"),
        ("explain --text hello --model x --out a.html", "text"),
        ("export --format onnx --out a.onnx", "onnx"),
        ("evaluate --data mosaics --metric segmentation --methods rollout --limit 1 --out out", "evaluate"),
    ],
)
def test_what_is_missing_is_named_with_the_extra_that_brings_it(command: str, extra: str, tmp_path: Path) -> None:
    done = run(tmp_path, *command.split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("fastrel: ")
    assert f'pip install "fastrel[{extra}]"' in done.stderr.splitlines()[-1]
