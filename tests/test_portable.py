"""The kernels for processors other than x86, compiled for aarch64 and run by an emulator: the same numbers as x86's generic ones,
which tests/test_poison.py compares with plain PyTorch."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fastrel import build

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("g++", "aarch64-linux-gnu-g++", "qemu-aarch64")
#: Largest difference over the largest number of a line: fused multiplications and sums round elsewhere. The published rules divide
#: by sums near 0.
BOUNDS = {"float": 1e-6, "double": 1e-14, "float official": 1e-3, "double official": 1e-12, "narrow": 1e-6, "int8": 1e-6}


def results(compiler: str, tmp_path: Path, *run: str) -> list[tuple[str, list[float]]]:
    """What every kernel makes of the same numbers, by name."""
    program = tmp_path / compiler
    sources = [ROOT / "csrc/cpu/dispatch.cpp", ROOT / "tests/portable/kernels.cpp", *(ROOT / "csrc/cpu").glob("isa_*.cpp")]
    flags = [*build.FLAGS, *build.CPU.flags, f"-I{ROOT}/csrc/include", "-static"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    printed = subprocess.run(
        [*run, str(program)], env={"FASTREL_ISA": "generic"}, check=True, capture_output=True, text=True
    )
    isa, *lines = printed.stdout.splitlines()
    assert isa == "generic"
    return [(name, [float(x) for x in values.split()]) for name, values in (line.split(":") for line in lines)]


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason=f"needs {', '.join(NEEDED)}")
def test_aarch64_computes_what_x86_does(tmp_path: Path) -> None:
    ours, theirs = results("aarch64-linux-gnu-g++", tmp_path, "qemu-aarch64"), results("g++", tmp_path)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert len(ours) > 900
    assert {name.split()[0] for name, _ in ours} == {"float", "double", "narrow", "int8"}
    apart: dict[str, float] = {}
    for (name, own), (_, other) in zip(ours, theirs, strict=True):
        official = "attention" in name and name.split(",")[2:3] == ["1"]
        kind = name.split()[0] + " official" * official
        largest = max(map(abs, other)) or 1.0
        apart[kind] = max(apart.get(kind, 0.0), *(abs(a - b) / largest for a, b in zip(own, other, strict=True)))
    assert {kind: value for kind, value in apart.items() if not value <= BOUNDS[kind]} == {}
