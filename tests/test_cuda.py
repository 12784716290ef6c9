"""The CUDA half without a GPU: its passes through a host shim under sanitizers, and nvcc's word on the sources."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from fastrel import build
from tests.small import ON_SOME_KERNELS, RELEASE

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
#: The same sources for the host: one fiber per CUDA thread.
SHIM = build.Part(
    "CUDA shim", "_C_cuda", "cuda/*.cu", ("-fPIC", "-xc++", "-Wno-psabi", f"-I{ROOT}/tests/shim"), ("-ltorch_cpu",)
)


def _compiler_library(name: str) -> str:
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("threads", [64, 256] if RELEASE else [256])
def test_the_passes_through_a_host_shim_with_sanitizers(tmp_path: Path, threads: int) -> None:
    """In blocks of the size that a device gets, and in smaller ones, of which rows take several."""
    build.compile_library(tmp_path / "_C_cuda.so", SHIM, (*SANITIZERS, f"-DFASTREL_THREADS={threads}"))
    preload = ":".join(map(_compiler_library, ("libasan.so", "libubsan.so", "libstdc++.so")))
    environment = {
        **os.environ,
        "FASTREL_CUDA_LIBRARY": str(tmp_path / "_C_cuda.so"),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # Python leaks at exit; fibers change stacks
    }
    command = [*ON_SOME_KERNELS, "tests/devices/test_cuda_shimmed.py"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout


def test_a_thread_that_misses_a_barrier_is_found(tmp_path: Path) -> None:
    """The shim counts who arrives; a check that could not fail would prove nothing."""
    source = tmp_path / "diverge.cpp"
    source.write_text(
        """#include "cuda_shim.h"
        __global__ void diverge(bool wrong) {
          __shfl_xor_sync(0xffffffffu, 1.0f, 1);
          if (wrong && threadIdx.x == 3) __shfl_xor_sync(0xffffffffu, 1.0f, 1); else __syncthreads();
        }
        int main(int count, char**) { cuda_shim::launch(dim3(1), 64, [&] { diverge(count > 1); }); }"""
    )
    program = tmp_path / "diverge"
    subprocess.run(["g++", "-std=c++20", f"-I{ROOT}/tests/shim", str(source), "-o", str(program)], check=True)
    assert subprocess.run([program]).returncode == 0
    wrong = subprocess.run([program, "wrong"], capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "threads diverge at a barrier" in wrong.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_nvcc_compiles_the_passes_without_spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the oldest architecture, and before a release for every one."""
    archs = build.CUDA_ARCHS if RELEASE else build.CUDA_ARCHS[:1]
    monkeypatch.setenv(build.ARCHS_VARIABLE, ";".join(archs))
    library = tmp_path / "_C_cuda.so"
    build.compile_library(library, build.CUDA, ("-Xptxas=-warn-spills,-Werror", "-Werror=all-warnings"))
    if torch.version.cuda:
        torch.ops.load_library(str(library))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = subprocess.run([tool, "--list-elf", library], capture_output=True, text=True, check=True)
    assert all(f"sm_{arch}" in found.stdout for arch in archs)
