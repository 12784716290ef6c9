"""Every kernel through Triton's front end with every integer argument as Triton may specialise it, and how large its integers get."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrel import ops
from fastrel.backends import triton
from tests import models
from tests.devices.programs import Launches, lowered
from tests.devices.recorder import GRID_LIMITS, Variant, recorded, to_ttir
from tests.devices.test_launches import DEVICE, every_operator

pytestmark = pytest.mark.slow

TARGET = GPUTarget("cuda", 90, 32)


@pytest.fixture(scope="module")
def variants() -> list[Variant]:
    """One variant of every kernel and set of constants that the launchers make."""
    with recorded(capability=90) as seen, FakeTensorMode():
        for n in (48, 4096):
            every_operator(n)
        for mask in (None, torch.bool, torch.float32):
            _official_attention(mask)
    unique: dict[Any, Variant] = {}
    for variant in seen.kernels:
        flags = tuple((key, str(value)) for key, value in variant.constants)
        unique.setdefault((variant.kernel.fn.__name__, flags), variant)
    return list(unique.values())


def _official_attention(mask: torch.dtype | None) -> None:
    q = torch.empty(2, 3, 17, 32, device="cuda:1")
    lane, row = torch.empty(2, 2, 3, 17, 32, device="cuda:1"), torch.empty(2, 2, 17, device="cuda:1")
    given = None if mask is None else torch.empty(2, 1, 17, 17, dtype=mask, device="cuda:1")
    options = (0.125, mask is None, 0, "official", "gradient_relevance", True, True)
    triton.kernels()[ops.attention_relevance](q, q, q, given, lane, lane, row, *options)


def _sweep(variant: Variant) -> Iterator[tuple[str, ASTSource]]:
    """The variant with all integers that Triton specialises as the constant 1, and with all of 64 bits."""
    signature = dict(variant.signature)
    names = list(signature)
    integers = [name for name, kind in signature.items() if kind in ("i32", "i64")]
    special = [name for name in integers if not variant.kernel.params[names.index(name)].do_not_specialize]
    ones = {**dict(variant.constants), **{(names.index(name),): 1 for name in special}}
    yield "1", ASTSource(variant.kernel, {**signature, **dict.fromkeys(special, "constexpr")}, ones, {})
    wide = {**signature, **dict.fromkeys(integers, "i64")}
    yield "64 bits", ASTSource(variant.kernel, wide, dict(variant.constants), {})


def test_every_kernel_passes_the_front_end_however_its_integers_are_specialised(variants: list[Variant]) -> None:
    """An argument that is 1 is a Python number inside a kernel, and has no methods."""
    assert len({variant.kernel.fn.__name__ for variant in variants}) >= 15
    failures = []
    for variant in variants:
        for what, source in _sweep(variant):
            try:
                to_ttir(source, TARGET, dict(variant.options))
            except Exception as error:
                failures.append(f"{variant.kernel.fn.__name__} with integers of {what}: {str(error).splitlines()[-1]}")
    assert failures == []


#: The largest that sizes may be on a device of 192 GB; strides of rows, heads and the like are as large as they like.
LARGEST = {
    "n": 1 << 26, "lanes": 1 << 26, "targets": 1 << 12, "heads": 1 << 10, "queries": 1 << 20, "keys": 1 << 20,
    "query_start": 1 << 20, "ins": 1 << 18, "outs": 1 << 18, "width": 1 << 16, "d": 1 << 7, "tops": 1 << 14, "chunks": 1 << 18,
    "tile": 1 << 20, "tiles": 1 << 20, "columns": 1 << 14, "first": 1 << 22, "rows": 1 << 22,
}  # fmt: skip

UNKNOWN = 1 << 31


def overflows(module: str) -> list[str]:
    """32-bit multiplications of a TTIR module that may exceed 32 bits, by intervals of magnitudes from `LARGEST`.

    What the intervals do not follow counts as 2^31: a multiplication in 32 bits has to be seen to fit.
    """
    found = []
    for function in module.split("tt.func")[1:]:
        bound: dict[str, int] = {}

        def of(name: str, bound: dict[str, int] = bound) -> int:
            base = re.sub(r"(_\d+)?(#\d+)?$", "", name.removeprefix("%"))
            return min(bound.get(name, UNKNOWN), LARGEST.get(base, UNKNOWN))

        for line in function.splitlines():
            if loop := re.search(r"scf\.for (%\w+) = \S+ to (%\w+)", line):
                bound[loop.group(1)] = of(loop.group(2))
            assigned = re.match(r"\s*(%\w+)(?::\d)? = (\S+) (.*)", line)
            if not assigned:
                continue
            result, op, rest = assigned.groups()
            operands = [of(name) for name in re.findall(r"%[\w#]+", rest)]
            if op == "arith.constant":
                number = re.match(r"(?:dense<)?(-?\d+)>? :", rest)
                bound[result] = abs(int(number.group(1))) if number else UNKNOWN
            elif op == "tt.get_program_id":
                bound[result] = GRID_LIMITS["xyz".index(rest[0])]
            elif op == "tt.call" and "tile_of" in rest:
                bound[f"{result}#0"], bound[f"{result}#1"] = LARGEST["rows"], LARGEST["columns"]
            elif op == "tt.make_range":
                bound[result] = int(re.search(r"end = (\d+)", rest).group(1))  # type: ignore[union-attr]
            elif op in ("arith.remsi", "arith.minsi"):
                bound[result] = min(operands)
            elif op in ("arith.divsi", "arith.extsi", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape"):
                bound[result] = operands[0]
            elif op == "arith.addi":
                bound[result] = sum(operands)
            elif op == "arith.muli":
                bound[result] = operands[0] * operands[1]
                if bound[result] >= 1 << 31 and re.search(r": (i32|tensor<[\dx]+xi32>)", rest):
                    found.append(line.strip())
    return found


def test_the_search_for_overflows_finds_one() -> None:
    """Else it would prove nothing."""
    module = """tt.func public @f(%targets: i32, %rel_target: i32) {
      %0 = arith.muli %targets, %rel_target : i32
      %1 = arith.extsi %targets : i32 to i64
      %2 = arith.extsi %rel_target : i32 to i64
      %3 = arith.muli %1, %2 : i64
    }"""
    assert overflows(module) == ["%0 = arith.muli %targets, %rel_target : i32"]


def test_no_address_is_computed_in_32_bits_that_may_not_fit(variants: list[Variant]) -> None:
    """`t * rel_target` with many targets of a large batch is beyond 2^31 on devices that have the memory for it."""
    found = set()
    for variant in variants:
        module = str(to_ttir(variant.source(), TARGET, dict(variant.options)))
        found |= {f"{variant.kernel.fn.__name__}: {re.sub(' loc.*', '', line)}" for line in overflows(module)}
    assert found == set()


#: Models of 17 and of 12 tokens, and how they are explained.
WHOLE = {
    "timm_vit": (torch.float32, {}),
    "timm_vit in bfloat16": (torch.bfloat16, {"precision": "mixed"}),
    "timm_vit official": (torch.float32, {"rules": "official"}),
    "hf_bert": (torch.float32, {}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_is_compiled_once_for_all_sizes_of_a_batch(name: str) -> None:
    """The first explanation, be it of one sample, compiles what others take; so does the first where layers have many rows."""
    (dtype, options), family = WHOLE[name], name.split()[0]
    given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in models.inputs(family).items()}
    with recorded(capability=90, checked=False) as seen:
        launches = Launches(seen, *lowered(models.build(family).to(dtype), given, DEVICE, **options), DEVICE, len(given))
        for sizes in ((1, 2, 16, 17), (512, 777)):
            launches.explain(sizes[0])
            assert seen.kernels
            for size in sizes[1:]:
                launches.explain(size)
                assert [variant.kernel.fn.__name__ for variant in seen.kernels] == [], f"{size} samples after {sizes[0]}"
                assert seen.launches
        launches.explain(2, targets=3)
        assert seen.kernels == []
