"""Every Triton kernel compiled for GPUs that are not here: registers, spills, shared memory, tensor-core instructions.

`python -m benchmarks.compiled` prints the table; `--write` keeps it as tests/golden/triton_resources.json, which
tests/test_triton.py compares with.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from fastrel.triton_kernels import (
    attention_relevance,
    attention_update,
    configs,
    layer_norm_backward,
    residual_add,
    rollout_row,
    zplus_linear,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrel.backends import triton as triton_backend

TABLE = Path(__file__).resolve().parent.parent / "tests" / "golden" / "triton_resources.json"

#: Shared memory that one block may have, KiB, by target.
SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: Sizes that are multiples of 16 in usual models; numbers of tokens are not.
_MULTIPLES = ("ins", "outs", "d", "width", "size")

#: Types of runtime arguments that are no float32 pointers.
_FLOATS = {"scale": "fp32", "eps": "fp32"}


@dataclass(frozen=True)
class Case:
    """A kernel with the constants that it is launched with on a target.

    `pointers` names those that are not float32; `dots`: it has products that belong in tensor cores.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    pointers: dict[str, str]
    dots: bool


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers per thread, spilled bytes, shared memory in bytes, products in tensor cores."""

    registers: int
    spills: int
    shared: int
    tensor_cores: int


def cases(target: str) -> Iterator[Case]:
    """What would be launched on a target."""
    amd = target.startswith("gfx")
    capability = 80 if amd else int(target.removeprefix("sm_"))
    full = "ieee" if amd else "tf32x3"
    kinds = {
        "float32": ("fp32", tl.float32, full),
        "tf32": ("bf16", tl.float32, "tf32"),
        "bfloat16": ("bf16", tl.bfloat16, "ieee"),
    }
    if capability >= 89:
        kinds["float8"] = ("fp8e4nv", tl.float8e4nv, "ieee")
    for kind, (weight, dot, precision) in kinds.items():
        if amd and kind == "tf32":
            continue
        value = "bf16" if kind == "tf32" else "fp32"
        table_key = "float32" if kind == "tf32" else kind
        stored = {"s_ptr": "bf16"} if kind in ("bfloat16", "float8") else {}
        tile = configs.of(configs.SHARES[table_key], capability)
        common = {"SCALED": kind == "float8", "DOT": dot, "PRECISION": precision}
        shares = {
            **common, "HAS_OUTPUT": kind == "float32", "HAS_BIAS": kind == "float32", "OFFICIAL": kind == "float32",
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        }  # fmt: skip
        pointers = {"x_ptr": value, "w_ptr": weight, **stored}
        yield Case(
            f"zplus_shares {kind}",
            zplus_linear.zplus_shares_kernel,
            shares,
            tile.warps,
            tile.stages,
            pointers,
            True,
        )
        tile = configs.of(configs.BACK[table_key], capability)
        back = {
            **common, "HAS_GRAD": True, "OWN_WEIGHT": kind != "float8", "DOT_GRAD": dot if kind != "float8" else tl.bfloat16,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        }  # fmt: skip
        pointers |= {"w_grad_ptr": "bf16" if kind == "float8" else weight}
        yield Case(f"zplus_back {kind}", zplus_linear.zplus_back_kernel, back, tile.warps, tile.stages, pointers, True)
    for width in (32, 64, 128):
        official = ("official", 2, full, "fp32"), ("official", 2, "tf32", "bf16")
        for rules, mask, precision, value in (
            ("positive", 0, full, "fp32"),
            ("positive", 0, "tf32", "bf16"),
            *(official if width <= triton_backend.MAX_HEAD_OFFICIAL else ()),
        ):
            if amd and precision == "tf32":
                continue
            if width > attention_relevance.MAX_TF32X3 and precision == full:
                precision = "ieee"
            common = {
                "REL": True, "GRAD": True, "MASK": mask, "CAUSAL": False, "OFFICIAL": rules == "official",
                "PRECISION": precision, "D": width,
            }  # fmt: skip
            pointers = {"q_ptr": value, "k_ptr": value, "v_ptr": value}
            dots = amd or precision != "ieee"
            label = f"{rules}{' masked' if mask else ''} d={width} {precision}"
            yield _tiled(
                f"attention_rows {label}",
                attention_relevance.attention_rows_kernel,
                "rows",
                common,
                capability,
                pointers,
                dots,
            )
            lanes = (
                {"": (True, True)}
                if precision == "tf32" and rules == "positive"
                else {" gradient": (True, False), " relevance": (False, True)}
            )
            for kind, (grad, rel) in lanes.items():
                sweep = {**common, "GRAD_IN": grad, "REL_IN": rel, "GRAD": grad, "SUMS": grad, "ROW": grad, "UPDATE": 0}
                for part in ("queries", "keys"):
                    kernel = getattr(attention_relevance, f"attention_{part}_kernel")
                    if part == "keys" or grad or rules == "official":
                        name = f"attention_{part} {label}{kind}"
                        yield _tiled(name, kernel, part + kind.removesuffix(" gradient"), sweep, capability, pointers, dots)
    block = {"BLOCK": residual_add.BLOCK}
    yield Case("residual_share", residual_add.residual_share_kernel, block, 4, 3, {}, False)
    yield Case("residual_sums", residual_add.residual_sums_kernel, {**block, "RUN": residual_add.RUN}, 4, 3, {}, False)
    yield Case("residual_scale", residual_add.residual_scale_kernel, {**block, "CHUNKS": 64}, 4, 3, {}, False)
    norm = {"WEIGHTED": True, "BLOCK": 1024}
    yield Case("layer_norm_backward 768", layer_norm_backward.layer_norm_backward_kernel, norm, 2, 3, {}, False)
    update = {"ATTN": True, "GRAD": True, "REL": True, "UPDATE": 0, "BLOCK": attention_update.BLOCK}
    yield Case("attention_update", attention_update.attention_update_kernel, update, 4, 3, {}, False)
    roll = {"BLOCK_Q": rollout_row.BLOCK_Q, "BLOCK_K": rollout_row.BLOCK_K}
    yield Case("rollout_kept", rollout_row.rollout_kept_kernel, roll, 4, 3, {}, False)
    yield Case("rollout_through", rollout_row.rollout_through_kernel, roll, 4, 3, {}, False)


def _tiled(
    name: str, kernel: Any, sweep: str, constants: dict[str, Any], capability: int, pointers: dict[str, str], dots: bool
) -> Case:
    tile = configs.attention(constants["PRECISION"], constants["D"], sweep, capability)
    return Case(name, kernel, {**constants, "BLOCK_M": tile.m, "BLOCK_N": tile.n}, tile.warps, tile.stages, pointers, dots)


def compiled(case: Case, target: str) -> Any:
    """The binary and all its stages."""
    # As Triton specialises a launch at usual sizes: unit strides are constants, sizes and other strides multiples of 16.
    unit = dict.fromkeys(("w_col", "w_grad_col", "mask_col"), 1)
    constants = {name: value for name, value in (unit | case.constants).items() if name in case.kernel.arg_names}
    signature = {}
    for name in case.kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{case.pointers.get(name, 'fp32')}"
        else:
            signature[name] = _FLOATS.get(name, "i32")
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(case.kernel.arg_names)
        if name.endswith("_ptr")
        or (name not in constants and name in _MULTIPLES)
        or re.search("_(batch|head|row|target)$", name)
    }
    source = ASTSource(case.kernel, signature, constants, divisible)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    if (
        TARGETS[target].backend == "cuda"
        and case.name.startswith(("attention_rows", "attention_queries", "attention_keys", "rollout"))
        and case.constants.get("PRECISION") != "ieee"
    ):
        options["maxnreg"] = 255  # launch.ALL_REGISTERS
    return triton.compile(source, target=TARGETS[target], options=options)


def resources(case: Case, target: str) -> Resources:
    """What the compiled kernel takes."""
    binary = compiled(case, target)
    if target.startswith("gfx"):
        text = binary.asm["amdgcn"]

        def number(key: str) -> int:
            return int(re.findall(rf"\.{key}:\s+(\d+)", text)[0])

        spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
        return Resources(number("vgpr_count"), spills, binary.metadata.shared, len(re.findall(r"v_mfma", text)))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage.stdout + usage.stderr))
    instructions = len(re.findall(r"\b(?:wgmma|mma\.sync|tcgen05\.mma)", binary.asm["ptx"]))
    return Resources(int(found["REG"]), int(found["LOCAL"]) + int(found["STACK"]), binary.metadata.shared, instructions)


def table(targets: list[str]) -> dict[str, dict[str, Resources]]:
    """Resources by target and case."""
    jobs = [(target, case) for target in targets for case in cases(target)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: resources(job[1], job[0]), jobs))
    result: dict[str, dict[str, Resources]] = {target: {} for target in targets}
    for (target, case), used in zip(jobs, found, strict=True):
        result[target][case.name] = used
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"keep the table in {TABLE.name}")
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    found = table(options.target)
    print(
        "| target | kernel | registers | spilled bytes | shared, KiB | tensor-core instructions |\n|---|---|---|---|---|---|"
    )
    for target, rows in found.items():
        for name, used in rows.items():
            print(
                f"| {target} | {name} | {used.registers} | {used.spills} | {used.shared / 1024:.1f} | {used.tensor_cores} |"
            )
    if options.write:
        kept = {target: {name: asdict(used) for name, used in rows.items()} for target, rows in found.items()}
        TABLE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
