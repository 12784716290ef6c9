"""The golden files: outputs of the method's official code in float64 (tests/golden/README.md)."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@cache
def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return dict(archive)


def tensor(array: np.ndarray) -> Tensor:
    value = torch.from_numpy(np.asarray(array))
    return value.double() if value.is_floating_point() else value


def parameters(name: str) -> dict[str, Tensor]:
    return {key.removeprefix("param/"): tensor(a) for key, a in load(name).items() if key.startswith("param/")}


def config(name: str) -> dict[str, Any]:
    return json.loads(str(load(name)["config"]))


def targets(name: str) -> list[int]:
    return sorted({int(key[1 : key.index("/")]) for key in load(name) if key[0] == "t" and key[1].isdigit()})


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance; exact zeros must be zero."""
    ours, theirs = ours.double(), theirs.double()
    norm = theirs.norm()
    return float((ours - theirs).norm() / norm) if norm > 0 else float(ours.norm())


def map_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative error of maps [..., T] without their first token.

    A rollout starts with 1 at the CLS token; with it in the norm, errors of everything else would look small.
    """
    return relative_error(ours[..., 1:], theirs[..., 1:])
