"""Every shipped Triton kernel as it is compiled for sm_80 (float8 for sm_89), run on data by an emulator of its PTX (`ptx`)."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from benchmarks import compiled
from tests.devices.ptx.host import Device, emulated
from tests.devices.ptx.shipped import CALLS


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What launchers allocate is NaN until a kernel writes it."""
    empty, like = torch.empty, torch.empty_like

    def poison(x: Tensor) -> Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() and x.numel() else x

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(empty(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(like(*args, **options)))


@pytest.fixture(scope="module")
def devices() -> dict[int, Device]:
    """One of each capability, which keep what was compiled for them."""
    return {capability: Device(capability) for capability in (80, 89)}


RAN: set[str] = set()


@pytest.mark.parametrize("name", CALLS)
def test_a_shipped_kernel_as_compiled(devices: dict[int, Device], poisoned: None, name: str) -> None:
    """What the real host path launches, on data, within the tolerance of every GPU backend; no access that a rule forbids."""
    call = CALLS[name]
    with emulated(devices[call.capability]):
        call()
    RAN.add(name)


def _key(kernel: str, constants: dict[str, Any], options: Any) -> Any:
    """A variant, apart from sizes that follow from those of the tensors."""
    kept = {name: str(value) for name, value in constants.items() if name not in ("TOPS", "CHUNKS", "BLOCK")}
    return kernel, tuple(sorted(kept.items())), tuple(sorted(dict(options).items()))


def test_all_that_models_launch_was_emulated(devices: dict[int, Device]) -> None:
    """Every kernel, tile, precision and set of flags of the table of compiled kernels (`benchmarks.compiled`)."""
    if set(CALLS) != RAN:
        pytest.skip("only some of the calls were made")
    seen = {_key(x.name, x.constexprs, x.options) for device in devices.values() for x in device.kernels if x.launches}
    missing = []
    for capability in (80, 89):
        for case in compiled.cases(f"sm_{capability}"):
            kernel = case.variant.kernel
            names = {name for name, param in zip(kernel.arg_names, kernel.params, strict=True) if param.is_constexpr}
            constants = {kernel.arg_names[at[0]]: value for at, value in case.variant.constants}
            constants = {name: value for name, value in constants.items() if name in names}
            float8 = "fp8" in case.name or kernel.fn.__name__ == "scaled_rows_kernel"
            if (capability == 80 or float8) and _key(kernel.fn.__name__, constants, case.variant.options) not in seen:
                missing.append(case.name)
    assert missing == []
