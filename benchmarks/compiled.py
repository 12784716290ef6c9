"""Every Triton kernel compiled for GPUs that are not here: registers, spills, shared memory, tensor-core instructions.

`python -m benchmarks.compiled` prints the table; `--write` keeps it as tests/golden/triton_resources.json, which
tests/test_triton.py compares with. What is kept there and was compiled of the same text for the same constants is not compiled again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from fastrel.triton_kernels import layer_norm_backward, zplus_sums
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from benchmarks import zoo
from fastrel import ops
from fastrel.backends import triton as triton_backend
from tests.devices.recorder import Variant, recorded

TABLE = Path(__file__).resolve().parent.parent / "tests" / "golden" / "triton_resources.json"

#: Shared memory that one block may have, KiB, by target.
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}

TARGETS = {
    **{name: GPUTarget("cuda", int(name.removeprefix("sm_")), 32) for name in SHARED_LIMIT if name.startswith("sm_")},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

DEVICE = torch.device("cuda:0")


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched on a target, under the name of the launch; `of_model`: no call of one operator launches it, but a
    model does."""

    name: str
    variant: Variant
    of_model: bool = False


def multiplies(name: str) -> bool:
    """Whether the kernel of a case of this name has products, which belong in tensor cores."""
    kernel = name.split()[0]
    return ("zplus" in kernel or (kernel.startswith("attention_") and "update" not in kernel)) and "ieee fp32" not in name


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers per thread, spilled bytes, shared memory in bytes, products in tensor cores; and of
    its loop over tiles, the instructions that every warp issues (0 where there is none, and for AMD). `source`: of what, by
    `source`."""

    registers: int
    spills: int
    shared: int
    tensor_cores: int
    loop: int
    source: str


#: What tells variants of a kernel apart, in their names.
FLAGS = ("REL_IN", "GRAD_IN", "DIVIDE", "APART", "SLOPE", "DIVISOR", "THROUGH")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def _linear(n: int, dtype: torch.dtype, purpose: Any = None, rules: str = "positive", width: int = 768) -> None:
    kernels = triton_backend.kernels()
    x, w, y, bias = (_empty(*shape, dtype=dtype) for shape in ((n, width), (width, width), (n, width), (width,)))
    lane = _empty(1, n, width)
    if purpose is None:
        kernels[ops.zplus_linear](x, w, y, bias, lane, lane, rules)
        return
    parts = kernels[ops.reduced_weight](w, purpose)
    w_grad = parts[0] if purpose == "bfloat16" else kernels[ops.reduced_weight](w, "gradient")[0]
    kernels[ops.zplus_linear_reduced](x, *parts, w_grad, y, bias, lane, lane)


def _block(dtype: torch.dtype, purpose: Any = None, n: int = 197, d: int = 768) -> None:
    """The layers of a block as fusion makes them: with Z formed before where there are few rows, gelu's slope, and more gradients."""
    kernels, hidden = triton_backend.kernels(), 4 * d
    op = kernels[ops.zplus_linear_reduced if purpose else ops.zplus_linear]
    qkv = _empty(3 * d, d, dtype=dtype)
    sizes = ((hidden, d), (d, hidden), (d, d), (d, d))
    weights = [_empty(outs, ins, dtype=dtype) for ins, outs in sizes[:3]] + [qkv.narrow(0, 2 * d, d)]
    prepared = [kernels[ops.reduced_weight](w, purpose) if purpose else (w,) for w in weights]
    values = [(_empty(1, n, ins, dtype=dtype), _empty(1, n, outs, dtype=dtype), _empty(outs, dtype=dtype))
              for ins, outs in sizes]  # fmt: skip
    parts = [x for (x, y, bias), w in zip(values, prepared, strict=True) for x in (x, w[1 if purpose else 0], y, bias)]
    sums = zplus_sums.zplus_sums(*parts, reduced=bool(purpose))
    for i, ((x, y, bias), w, z) in enumerate(zip(values, prepared, sums, strict=True)):
        lane, given = (
            _empty(1, *y.shape),
            {"sums": z, "formed": i < 3, **({"slope": x, "frozen": True, "divisor": sums[1]} if i == 0 else {})},
        )
        grad = _empty(1, 1, n, 3 * d) if i == 3 else lane
        if purpose:
            w_grad = kernels[ops.reduced_weight](qkv, "gradient")[0] if i == 3 else w[0]
            op(x, *w, w_grad, y, bias, lane, grad, **given)
        else:
            op(x, *w, y, bias, lane, grad, "positive", **given, **({"w_grad": qkv} if i == 3 else {}))


def _half_block(dtype: torch.dtype, width: int = 768) -> None:
    value, lane = _empty(1, 197, width, dtype=dtype), _empty(1, 1, 197, width)
    through, row, weight = _empty(1, 1, 12, 197), _empty(1, 1, 197), _empty(width, dtype=dtype)
    z = _empty(197, width)
    layer_norm_backward.half_block(lane, value, weight, 1, 1e-6, lane, value, value, lane, lane, None, None, z, frozen=True)
    layer_norm_backward.half_block(
        lane, value, weight, 1, 1e-6, lane, value, value, lane, lane, through, row, z, frozen=True
    )


def _attention(d: int, dtype: torch.dtype, rules: str, masked: bool, batch: int = 2) -> None:
    q = _empty(batch, 197, 12, d, dtype=dtype).transpose(1, 2)
    lane = _empty(1, batch, 197, 12, d).transpose(2, 3)
    mask = _empty(batch, 1, 1, 197, dtype=dtype) if masked else None
    options = (d**-0.5, False, 0, rules, "gradient_relevance", masked, True, rules == "positive")
    kernel = triton_backend.kernels()[ops.attention_relevance]
    kernel(q, q, q, mask, lane, lane, _empty(1, batch, 197), *options)


def launches(float8: bool) -> Iterator[tuple[str, Any]]:
    """What models of the zoo make of every operator: ViT-B's and BERT's layers and heads, in every dtype and precision; layers of many
    rows as wide as `configs` has it for tiles of float8 (512), for other tiles (256) and for torch's own products (1024)."""
    kernels = triton_backend.kernels()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield name, lambda dtype=dtype: _linear(197, dtype)
        yield f"{name} block", lambda dtype=dtype: _block(dtype)
        if dtype != torch.float16:
            yield f"{name} mixed", lambda dtype=dtype: _linear(197, dtype, "bfloat16")
            yield f"{name} mixed block", lambda dtype=dtype: _block(dtype, "bfloat16")
            yield name, lambda dtype=dtype: _half_block(dtype)
            if float8:
                yield f"{name} low", lambda dtype=dtype: _linear(12608, dtype, "float8", width=512)
                yield f"{name} low block", lambda dtype=dtype: _block(dtype, "float8", n=12608, d=512)
    yield "float32 official", lambda: _linear(197, torch.float32, rules="official")
    yield "float32 many rows", lambda: _linear(12608, torch.float32)
    for dtype in (torch.float32, torch.float16):
        name = f"{str(dtype).removeprefix('torch.')} block, many rows"
        yield name, lambda dtype=dtype: _block(dtype, n=12608)
    yield "narrow block, many rows", lambda: _block(torch.bfloat16, n=12608, d=256)
    yield "narrow mixed block, many rows", lambda: _block(torch.bfloat16, "bfloat16", n=12608, d=256)
    yield "many rows", lambda: _linear(12608, torch.bfloat16, width=1024)
    yield "many rows mixed", lambda: _linear(12608, torch.bfloat16, "bfloat16", width=1024)
    x, lane = (64, 197, 768), (1, 64, 197, 768)
    for rules in ("positive", "official"):
        yield rules, lambda rules=rules: kernels[ops.residual_add](_empty(*x), _empty(*x), _empty(*lane), 0, rules)
    norm, update, rollout = (kernels[op] for op in (ops.layer_norm_backward, ops.attention_update, ops.rollout_row))
    yield "768", lambda: norm(_empty(*lane), _empty(*x), _empty(768), 1, 1e-6, True)
    yield "", lambda: kernels[ops.activation_ratio](_empty(*lane), _empty(*x), _empty(*x))
    yield "frozen", lambda: kernels[ops.activation_ratio](_empty(*lane), _empty(*x), _empty(*x), "none")
    widest = layer_norm_backward.WIDEST
    yield "widest", lambda: norm(_empty(1, 1, 5, widest), _empty(1, 5, widest), _empty(widest), 1, 1e-6, True)
    yield "widest", lambda: _half_block(torch.float32, widest)
    yield "", lambda: update(None, _empty(1, 2, 12, 197, 197), _empty(1, 2, 12, 197, 197), "gradient_relevance")
    yield "", lambda: rollout(_empty(1, 2, 197), _empty(1, 2, 197, 197), True)
    for d in (32, 64, 128):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{str(dtype).removeprefix('torch.')} d={d}"
            yield name, lambda d=d, dtype=dtype: _attention(d, dtype, "positive", d == 64, 8)
            yield f"{name} unmasked", lambda d=d, dtype=dtype: _attention(d, dtype, "positive", False, 8)
            yield f"{name} few rows", lambda d=d, dtype=dtype: _attention(d, dtype, "positive", False)
            if d <= triton_backend.MAX_HEAD_OFFICIAL:
                yield f"{name} official", lambda d=d, dtype=dtype: _attention(d, dtype, "official", True)


@functools.cache
def cases(target: str) -> tuple[Case, ...]:
    """What would be launched on a target, recorded: by calls of every operator, and on NVIDIA's by models of the zoo (`zoo`), of
    whose kernels every set of constants is one case."""
    amd = target.startswith("gfx")
    capability = 80 if amd else int(target.removeprefix("sm_"))
    found: dict[str, Case] = {}
    seen_variants: set[Any] = set()
    with mock.patch.object(torch.version, "hip", "6.4" if amd else None):
        with recorded(capability, devices=1) as seen, FakeTensorMode():
            for label, launch in launches(float8=capability >= 89):
                seen.kernels.clear()
                launch()
                for variant in seen.kernels:
                    if (key := repr(variant)) not in seen_variants:
                        seen_variants.add(key)
                        name = _name(variant, label)
                        found[name] = Case(name, variant)
        known = {by_constants(case.variant) for case in found.values()}
        for use, batch, variant in () if amd else zoo.variants(capability):
            if (key := by_constants(variant)) not in known:
                known.add(key)
                name = _name(variant, f"{use.name} batch {batch}")
                name += f" {sum(other.startswith(name) for other in found)}" * (name in found)
                found[name] = Case(name, variant, of_model=True)
    return tuple(found.values())


def by_constants(variant: Variant) -> str:
    """What a variant was made for, apart from sizes that follow from those of the tensors."""
    names = [param.name for param in variant.kernel.params]
    constants = {names[i]: str(value) for (i,), value in variant.constants if variant.kernel.params[i].is_constexpr}
    kept = sorted(
        (name, value) for name, value in constants.items() if name not in ("TOPS", "CHUNKS", "BLOCK", "HEADS", "SHARE")
    )
    return repr((variant.kernel.fn.__name__, kept, sorted(variant.options)))


def _name(variant: Variant, label: str) -> str:
    constants = dict(zip(variant.kernel.arg_names, range(1000), strict=False))
    values = {name: dict(variant.constants).get((i,)) for name, i in constants.items()}
    flags = "".join(f" {flag.lower()}" for flag in FLAGS if values.get(flag))
    dot = values.get("DOT")
    how = f" {values['PRECISION']}" if values.get("PRECISION") else ""
    how += f" {dot.name}" if dot is not None else " fp32" if how else ""
    return " ".join(f"{variant.kernel.fn.__name__} {label}{how}{flags}".split())


def source(case: Case) -> str:
    """A digest of what is compiled: the text of the kernel and of ours that it calls, the constants that these read, and for what it
    is specialised."""
    texts: dict[str, str] = {}
    pending = [case.variant.kernel]
    while pending:
        function = pending.pop()
        texts[str(function)] = function.src
        for name in function.fn.__code__.co_names:
            value = function.fn.__globals__.get(name)
            if isinstance(value, triton.JITFunction) and value.__module__.startswith("fastrel") and str(value) not in texts:
                pending.append(value)
            elif isinstance(value, triton.language.constexpr):
                texts[name] = repr(value)
    return hashlib.sha256(repr((sorted(texts.items()), case.variant)).encode()).hexdigest()[:16]


def compiled(case: Case, target: str) -> Any:
    """The binary and all its stages."""
    options = dict(case.variant.options)
    if target.startswith("gfx"):
        options.pop("maxnreg", None)
    return triton.compile(case.variant.source(), target=TARGETS[target], options=options)


def resources(case: Case, target: str, digest: str) -> Resources:
    """What the compiled kernel takes, of the source of this digest."""
    binary = compiled(case, target)
    if target.startswith("gfx"):
        text = binary.asm["amdgcn"]

        def number(key: str) -> int:
            return int(re.findall(rf"\.{key}:\s+(\d+)", text)[0])

        spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
        return Resources(number("vgpr_count"), spills, binary.metadata.shared, len(re.findall(r"v_mfma", text)), 0, digest)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage.stdout + usage.stderr))
    instructions = len(re.findall(r"\b(?:wgmma|mma\.sync|tcgen05\.mma)", binary.asm["ptx"]))
    spilled = int(found["LOCAL"]) + int(found["STACK"])
    return Resources(int(found["REG"]), spilled, binary.metadata.shared, instructions, loop_instructions(code), digest)


def loop_instructions(code: str) -> int:
    """Instructions of the loop that holds most products, from its branch back; loops within it count once."""
    addresses, products, branches = [], [], []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", code):
        at = int(address, 16)
        addresses.append(at)
        if re.search(r"\b(?:[HQIU]?[A-Z]*MMA|FFMA)\b", text):
            products.append(at)
        if back := re.search(r"\bBRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)", text):
            target = int(back.group(1), 16)
            if target < at:
                branches.append((target, at))
    if not branches or not products:
        return 0
    first, last = max(branches, key=lambda b: (sum(b[0] <= at <= b[1] for at in products), b[0] - b[1]))
    return sum(first <= at <= last for at in addresses)


def table(targets: list[str], kept: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, dict[str, Resources]]:
    """Resources by target and case; those of a table that is `kept` where they are of the same source."""
    jobs = [(target, case) for target in targets for case in cases(target)]

    def found_for(job: tuple[str, Case]) -> Resources:
        target, case = job
        known, digest = (kept or {}).get(target, {}).get(case.name), source(case)
        return Resources(**known) if known and known["source"] == digest else resources(case, target, digest)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(found_for, jobs))
    result: dict[str, dict[str, Resources]] = {target: {} for target in targets}
    for (target, case), used in zip(jobs, found, strict=True):
        result[target][case.name] = used
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"keep the table in {TABLE.name}")
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    kept = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    found = table(options.target, kept)
    print(
        "| target | kernel | registers | spilled bytes | shared, KiB | tensor-core instructions |\n|---|---|---|---|---|---|"
    )
    for target, rows in found.items():
        for name, used in rows.items():
            print(
                f"| {target} | {name} | {used.registers} | {used.spills} | {used.shared / 1024:.1f} | {used.tensor_cores} |"
            )
    if options.write:
        kept |= {target: {name: asdict(used) for name, used in rows.items()} for target, rows in found.items()}
        TABLE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
