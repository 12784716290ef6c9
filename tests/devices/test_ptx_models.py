"""Explanations of small whole models, every launch of the real host path emulated as it is compiled (`ptx`)."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import fastrel
from fastrel.graphed import run
from tests import golden_files as golden
from tests import models
from tests.devices import simulated
from tests.devices.programs import Launches, lowered
from tests.devices.ptx.host import Device, emulated
from tests.devices.recorder import recorded
from tests.small import RELEASE

DEVICE = torch.device("cuda:0")
CLASSES = torch.tensor([[1, 4]])


def explained(capability: int, model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The maps [B, K, T] that a GPU of this capability would give, all that is launched for them emulated."""
    device = Device(capability)
    with recorded(capability) as seen:
        program, values = lowered(model, given, DEVICE)
        Launches(seen, program, values, DEVICE, len(given)).explain(len(CLASSES), CLASSES.shape[1])
        expected = Counter(launch.name for launch in seen.launches)
    with emulated(device), torch.no_grad():
        _, _, relevance, _ = run(program, values, CLASSES)
    launched: Counter[str] = Counter()
    for kernel in device.kernels:
        launched[kernel.name] += kernel.launches
    assert launched == expected
    return relevance[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm_vit", "hf_bert"] if RELEASE else ["hf_bert"])
def test_a_model_in_float32(name: str) -> None:
    """Against float64 in plain PyTorch, by the rule that every kernel is held to (`cases.compare`)."""
    model, given = models.build(name), models.inputs(name, batch=1)
    exact = fastrel.Explainer(model, backend="torch")(**given, target=CLASSES).relevance
    model.float()
    given = {key: x.float() if x.is_floating_point() else x for key, x in given.items()}
    plain = fastrel.Explainer(model, backend="torch")(**given, target=CLASSES).relevance
    ours = explained(80, model, given)
    assert golden.map_error(ours, exact) <= max(2 * golden.map_error(plain, exact), 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm_vit", "hf_bert"] if RELEASE else ["timm_vit"])
def test_a_model_in_bfloat16(name: str) -> None:
    """Against the same operators without any rounding: twice what their rounding on tensor cores makes of a map (`simulated`)."""
    model, given = models.build(name).bfloat16(), models.inputs(name, batch=1)
    given = {key: x.bfloat16() if x.is_floating_point() else x for key, x in given.items()}
    exact = simulated.explained(model, given, CLASSES, exact=True)
    rounded = simulated.explained(model, given, CLASSES)
    ours = explained(80, model, given)
    assert golden.map_error(ours, exact) <= 2 * golden.map_error(rounded, exact)
