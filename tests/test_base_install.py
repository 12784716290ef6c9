"""What `pip install fastrel` alone brings runs the commands that need no extra, and names the extra for those that do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import fastrel

pytestmark = pytest.mark.slow

#: Runs commands where the packages of extras are not to be found. torch asks of some whether they are there, so they are absent as
#: not installed, not broken. Each command has a process of its own, forked where torch and timm are loaded, which takes longest.
WITHOUT_EXTRAS = """
import importlib.machinery, os, sys
names = {"pyarrow", "pandas", "transformers", "tokenizers", "sklearn", "scipy", "h5py", "ray", "onnx", "onnxscript",
    "onnxruntime", "mosec", "aiohttp", "uvloop", "prometheus_client", "captum", "peft", "quantus"}
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in names else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
import timm
from fastrel.cli import main
for i, command in enumerate(sys.argv[1:]):
    child = os.fork()
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(f"{i}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
        code = main(command.split())
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # without the seconds in which Python forgets torch
    open(f"{i}.code", "w").write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""

EXPLAIN = f"explain {Path(fastrel.__file__).parent / 'demo' / 'scene1-tshirt-dress-trousers-sneaker.png'} --out maps"

#: Commands, and the extra that each needs.
NEEDS = {
    "batch . --out out": "batch",
    "show .": "batch",
    "serve explain.pt2": "serve",
    "explain --text hello --model x --out a.html": "text",
    "export --format onnx --out a.onnx": "onnx",
    "evaluate --data mosaics --metric segmentation --methods rollout --limit 1 --out out": "evaluate",
}


class Done(NamedTuple):
    """What a command ended with and wrote."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all the commands were run."""
    folder = tmp_path_factory.mktemp("base")
    environment = {**os.environ, "PYTHONPATH": str(Path(fastrel.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, EXPLAIN, *NEEDS], cwd=folder, env=environment, check=True)
    return folder


def done(folder: Path, command: str) -> Done:
    i = [EXPLAIN, *NEEDS].index(command)
    code, out, err = ((folder / f"{i}.{name}").read_text() for name in ("code", "1", "2"))
    return Done(int(code), out, err)


def test_pictures_are_explained(folder: Path) -> None:
    found = done(folder, EXPLAIN)
    assert found.code == 0, found.err
    assert len(list((folder / "maps").glob("*.png"))) == 1


@pytest.mark.parametrize("command", NEEDS)
def test_what_is_missing_is_named_with_the_extra_that_brings_it(folder: Path, command: str) -> None:
    found = done(folder, command)
    assert found.code == 2, found.out + found.err
    assert found.err.splitlines()[-1].startswith("fastrel: ")
    assert f'pip install "fastrel[{NEEDS[command]}]"' in found.err.splitlines()[-1]
