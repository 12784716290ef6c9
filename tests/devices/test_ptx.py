"""Every shipped Triton kernel as it is compiled for sm_80 (float8 for sm_89), run on data by an emulator of its PTX (`ptx`)."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from fastrel.triton_kernels import configs

from benchmarks import compiled
from fastrel import ops
from fastrel.backends import triton
from fastrel.ops.library import REFERENCES
from tests.devices import cases
from tests.devices.ptx import host, shipped
from tests.devices.ptx.compiler import Compiled
from tests.devices.ptx.faults import PtxError
from tests.devices.ptx.host import Device, emulated
from tests.devices.ptx.instructions import METHODS
from tests.devices.ptx.scalar import RULES
from tests.devices.ptx.shipped import CALLS


@pytest.fixture(scope="module")
def devices() -> dict[int, Device]:
    """One of each capability, which keep what was compiled for them."""
    return {capability: Device(capability) for capability in (80, 89)}


RAN: set[str] = set()


@pytest.mark.parametrize("name", CALLS)
def test_a_shipped_kernel_as_compiled(devices: dict[int, Device], name: str) -> None:
    """What the real host path launches, on data, within the tolerance of every GPU backend; no access that a rule forbids, and
    nothing read that nothing wrote."""
    call = CALLS[name]
    with emulated(devices[call.capability]):
        call()
    RAN.add(name)


def _all_ran() -> None:
    if set(CALLS) != RAN:
        pytest.skip("only some of the calls were made")


def _key(kernel: str, constants: dict[str, Any], options: Any) -> Any:
    """A variant, apart from sizes that follow from those of the tensors."""
    kept = {name: str(value) for name, value in constants.items() if name not in ("TOPS", "CHUNKS", "BLOCK", "HEADS")}
    return kernel, tuple(sorted(kept.items())), tuple(sorted(dict(options).items()))


def test_all_that_operators_launch_was_emulated(devices: dict[int, Device]) -> None:
    """Every kernel, tile, precision and set of flags that calls of operators make (`benchmarks.compiled`), and float8. What models make
    of them beside is compiled from the same source with other flags together (`Case.of_model`)."""
    _all_ran()
    seen = {_key(x.name, x.constexprs, x.options) for x in devices[80].kernels if x.launches}
    missing = []
    for case in [case for case in compiled.cases("sm_80") if not case.of_model]:
        kernel, constants = case.variant.kernel, dict(case.variant.constants)
        flags = {p.name: constants[i,] for i, p in enumerate(kernel.params) if p.is_constexpr}
        if _key(kernel.fn.__name__, flags, case.variant.options) not in seen:
            missing.append(case.name)
    assert missing == []
    in_float8 = {x.name for x in devices[89].kernels if x.launches and x.constexprs.get("SCALED", True)}
    assert in_float8 == {"scaled_rows_kernel", "zplus_shares_kernel", "zplus_back_kernel"}


def test_the_emulator_knows_nothing_that_is_not_compiled(devices: dict[int, Device]) -> None:
    """A rule that no kernel uses is proved by nothing."""
    _all_ran()
    used = {step.opcode for device in devices.values() for x in device.kernels for step in x.program.kernel.code}
    assert {opcode for opcode in RULES if opcode not in used} == set()
    assert {name for name in METHODS if not any(opcode.startswith(name) for opcode in used)} == set()


@pytest.mark.parametrize(
    "name",
    [
        "linear: float32, tails",
        "attention: bfloat16, d 24, keep",
        "other: residual add, positive",
        "other: layer norm 63",
        "other: attention update gradient_relevance",
        "other: rollout of 70, True",
    ],
)
def test_what_is_not_a_number_is_not_hidden(devices: dict[int, Device], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A compiled maximum drops NaN unless told otherwise. One NaN in a tensor shows where it does in plain PyTorch."""

    def finite(results: Any) -> list[bool]:
        return [bool(x.isfinite().all()) for x in ([results] if isinstance(results, Tensor) else results)]

    def compare(op: Any, *args: Any, operand: Any = None) -> None:
        for i, x in enumerate(args):
            if isinstance(x, Tensor) and x.is_floating_point():
                bad = x.clone(memory_format=torch.preserve_format)
                bad[tuple(size // 2 for size in x.shape)] = torch.nan
                given = (*args[:i], bad, *args[i + 1 :])
                wanted = finite(REFERENCES[op](*(cases.cast(y, torch.float32) for y in given)))
                shown.append(not all(wanted))
                assert finite(triton.kernels()[op](*given)) == wanted, f"argument {i}"

    shown: list[bool] = []
    monkeypatch.setattr(shipped, "compare", compare)
    with emulated(devices[80]):
        CALLS[name]()
    assert any(shown)


@pytest.mark.parametrize(("purpose", "capability"), [("bfloat16", 80), ("float8", 89)])
def test_narrow_operands_hide_no_nan(
    devices: dict[int, Device], monkeypatch: pytest.MonkeyPatch, purpose: str, capability: int
) -> None:
    """Saturation makes the largest number of what is too large, and NaN stays NaN."""
    monkeypatch.setattr(configs, "in_float8", lambda *_: True)
    x, weight, y, lane = torch.randn(2, 37, 100), torch.randn(70, 100), torch.randn(2, 37, 70), torch.rand(2, 2, 37, 70)
    x[0, 3, 5], lane[0, 1, 4, 6] = torch.nan, torch.nan
    with emulated(devices[capability]):
        prepared = triton.kernels()[ops.reduced_weight](weight, purpose)
        w_grad = weight.bfloat16()
        rel_in, grad_in = triton.kernels()[ops.zplus_linear_reduced](x, *prepared, w_grad, y, y[0, 0], lane, lane)
    rows = {(t, *at) for t in range(2) for at in ((0, 3),)} | {(0, 1, 4)}
    assert {tuple(at) for at in (~rel_in.isfinite().all(-1)).nonzero().tolist()} == rows
    assert {tuple(at) for at in (~grad_in.isfinite().all(-1)).nonzero().tolist()} == {(0, 1, 4)}


# Kernels that were tampered with. Whatever the emulator let pass here, it would let pass there.


@functools.cache
def _compiled(name: str) -> dict[str, Compiled]:
    """What a call compiles, by kernel."""
    kept: dict[str, Compiled] = {}
    real = host.compile_to_ptx

    def keep(source: Any, *options: Any) -> Compiled:
        return kept.setdefault(source.fn.fn.__name__, real(source, *options))

    with mock.patch.object(host, "compile_to_ptx", keep), emulated(Device(80)):
        CALLS[name]()
    return kept


def _found_out(name: str, kernel: str, change: Callable[[str], str]) -> bool:
    """Whether a call with a changed kernel raises an error, or is wrong."""
    given = dict(_compiled(name))
    ptx = change(given[kernel].ptx)
    assert ptx != given[kernel].ptx
    given[kernel] = dataclasses.replace(given[kernel], ptx=ptx)
    replaced = mock.patch.object(host, "compile_to_ptx", lambda source, *_: given[source.fn.fn.__name__])
    with replaced, emulated(Device(80)):
        try:
            CALLS[name]()
        except (PtxError, AssertionError):
            return True
    return False


LAYER, ATTENTION = "linear: bfloat16, aligned", "attention: bfloat16, unaligned"

#: What is done to a kernel: the call, the kernel, and what is replaced by what wherever it is found.
CHANGES = {
    "copies are not waited for": (LAYER, "zplus_shares_kernel", r"cp\.async\.wait_group.*", ""),
    "copies are in no group": (LAYER, "zplus_back_kernel", r"cp\.async\.commit_group;", ""),
    "the last group of copies is not waited for": (LAYER, "zplus_back_kernel", r"(wait_group\s+)0", r"\g<1>1"),
    "copies go elsewhere": (LAYER, "zplus_shares_kernel", r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+) 0 ", r"\1 16 "),
    "copies of zeros read": (LAYER, "zplus_shares_kernel", r"(cp\.async\.cg.*0x10), %r\d+;", r"\1, 16;"),
    "rows of matrices are elsewhere": (LAYER, "zplus_shares_kernel", r"(ldmatrix.*\[%r\d+)\]", r"\1+16]"),
    "matrices are not transposed": (LAYER, "zplus_back_kernel", r"(ldmatrix.*)\.trans", r"\1"),
    "operands of products are swapped": (LAYER, "zplus_shares_kernel", r"(mma\.sync.*?\}, \{) (%r\d+), (%r\d+)", r"\1 \3, \2"),
    "sums start elsewhere": (LAYER, "zplus_back_kernel", r"(mma\.sync.*\{) (%r\d+), (%r\d+)", r"\1 \3, \2"),
    "loads have no predicate": (LAYER, "zplus_back_kernel", r"@%p\d+ (ld\.global)", r"\1"),
    "stores have no predicate": (LAYER, "zplus_back_kernel", r"@%p\d+ (st\.global)", r"\1"),
    "halves of pairs are swapped": (LAYER, "zplus_back_kernel", r"(cvt\.rn\.bf16x2.*), (%r\d+), (%r\d+)", r"\1, \3, \2"),
    "sums are of other lanes": (ATTENTION, "attention_rows_kernel", r"(shfl\.sync\.bfly.*), 2, 31", r"\1, 1, 31"),
    "exponents are not negated": (ATTENTION, "attention_rows_kernel", r"ex2\.approx\.f32", "abs.f32"),
    "matrices are not all loaded": (ATTENTION, "attention_lanes_kernel", r"ld\.global\.b16 \{ (%rs\d+) \}.*", r"mov.b16 \1, 0;"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_kernel_that_was_changed_is_found_out(what: str) -> None:
    name, kernel, pattern, replacement = CHANGES[what]
    assert _found_out(name, kernel, lambda ptx: re.sub(pattern, replacement, ptx))


@pytest.mark.parametrize("kernel", ["zplus_shares_kernel", "zplus_back_kernel"])
def test_no_barrier_can_be_left_out(kernel: str) -> None:
    """Each alone, or with the others that could be: of two in a row one may stand for both."""
    barriers = [match.span() for match in re.finditer(r"bar\.sync.*", _compiled(LAYER)[kernel].ptx)]
    assert len(barriers) > 5
    spare = [at for at in barriers if not _found_out(LAYER, kernel, functools.partial(_without, [at]))]
    assert len(spare) <= 2
    assert not spare or _found_out(LAYER, kernel, functools.partial(_without, spare))


def _without(spans: list[tuple[int, int]], ptx: str) -> str:
    for first, last in reversed(spans):
        ptx = ptx[:first] + ptx[last:]
    return ptx
