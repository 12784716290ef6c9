"""Whether Triton runs: asked of every GPU by a launch on it, and taken for an answer by whoever chooses a backend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not launched", allow_module_level=True)

from fastrel.triton_kernels import launch

from fastrel import InputError, backends
from fastrel.backends import triton
from tests.devices.recorder import recorded

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


def adds_one(x: Tensor) -> None:
    """What the trial kernel does."""
    x += 1


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.Mock]:
    """Two GPUs, of capability 9.0 and 7.5, whose trial is a function that a test sets; it works until then."""
    capabilities, zeros = {0: (9, 0), 1: (7, 5)}, torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capabilities[int(device)])
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.setattr(launch, "trial", tried := mock.Mock(side_effect=adds_one))
    triton._fails_on.cache_clear()
    yield tried
    triton._fails_on.cache_clear()


def test_a_trial_kernel_goes_to_the_device_it_is_about() -> None:
    with recorded(devices=2) as seen, FakeTensorMode():
        launch.trial(torch.zeros(16, device=SECOND))
    assert [(one.name, one.device) for one in seen.launches] == [("trial_kernel", 1)]


def test_a_device_is_tried_once(trial: mock.Mock) -> None:
    assert [triton.runs_on(device) for device in (FIRST, FIRST, torch.device("cuda"))] == [None] * 3
    assert trial.call_count == 1


def test_every_device_is_asked_for_its_own_capability(trial: mock.Mock) -> None:
    assert triton.runs_on(SECOND) == "compute capability 7.5 of cuda:1 is below 8.0"
    assert triton.runs_on(FIRST) is None
    assert trial.call_count == 1


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
            "Failed to find C compiler",
        ),
        (PermissionError(13, "Permission denied", "/.triton"), "[Errno 13] Permission denied"),
        (AssertionError(), "AssertionError"),  # says nothing
    ],
    ids=["no compiler", "no cache", "no message"],
)
def test_what_a_trial_fails_with_is_the_reason_and_auto_goes_on(
    trial: mock.Mock, caplog: pytest.LogCaptureFixture, failure: Exception, reason: str
) -> None:
    trial.side_effect = failure
    assert "triton" not in [backend.name for backend in backends.candidates("auto", FIRST)]
    assert f"a trial kernel failed on cuda:0: {reason}" in caplog.text
    with pytest.raises(InputError, match="backend 'triton' cannot run: a trial kernel failed on cuda:0"):
        backends.candidates("triton", FIRST)


def test_a_kernel_that_computes_something_else_is_not_trusted(trial: mock.Mock) -> None:
    trial.side_effect = lambda x: None
    assert triton.runs_on(FIRST) == "a trial kernel computed nonsense on cuda:0"
