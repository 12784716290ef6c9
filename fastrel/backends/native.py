"""The compiled kernels: found, compiled at first use, or the reason why they are not there."""

from __future__ import annotations

import functools
import logging
import os
import time
from pathlib import Path

import torch

from fastrel import build
from fastrel.ops import library

log = logging.getLogger("fastrel")

#: Set to 0 to forbid compiling at first use.
JIT_VARIABLE = "FASTREL_JIT"

#: A library to load instead of any other.
LIBRARY_VARIABLE = "FASTREL_LIBRARY"

#: The same for the CUDA passes. Without a GPU it names a library whose kernels run on a CPU (tests/shim).
CUDA_LIBRARY_VARIABLE = "FASTREL_CUDA_LIBRARY"

library.declare("instruction_set() -> str")
library.declare("int8_matmul(Tensor a, Tensor b) -> Tensor")


@functools.cache
def load() -> str | None:
    """Load the kernels of `torch.ops.fastrel_cpu`, compiling them first if need be. None, or the reason why it failed."""
    return _load(build.CPU, LIBRARY_VARIABLE)


@functools.cache
def load_cuda() -> str | None:
    """Load the passes of `torch.ops.fastrel_cuda`, compiling them first if need be. None, or the reason why it failed."""
    return _load(build.CUDA, CUDA_LIBRARY_VARIABLE)


def shimmed() -> bool:
    """Whether CUDA passes were asked for where there is no GPU: those of the tests' shim, which run on a CPU."""
    return bool(os.environ.get(CUDA_LIBRARY_VARIABLE)) and not torch.cuda.is_available()


def _load(part: build.Part, variable: str) -> str | None:
    try:
        _open(part, variable)
    except (build.BuildError, OSError) as error:
        log.warning("fastrel runs without its compiled %s kernels: %s", part.name, str(error).partition("\n")[0])
        return str(error)
    return None


def _open(part: build.Part, variable: str) -> None:
    """Load the library asked for, the one built with the package, or the one in the cache, compiled if need be."""
    given = os.environ.get(variable) or _packaged(part)
    if given:
        torch.ops.load_library(str(given))
    else:
        path = _cache(part)
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            log.warning("%s was compiled for another system: %s", path, error)
            torch.ops.load_library(str(_cache(part, again=True)))
    if part is build.CPU:
        _probe(given or path)


def _probe(path: Path | str) -> None:
    try:
        instruction_set()
    except RuntimeError as error:
        raise build.BuildError(f"{path} holds no kernels of fastrel") from error


def _cache(part: build.Part, again: bool = False) -> Path:
    path, start = build.cached(part), time.perf_counter()
    if build.is_intact(path) and not again:
        return path
    if os.environ.get(JIT_VARIABLE) == "0":
        raise build.BuildError(f"{JIT_VARIABLE}=0 forbids compiling at first use; run `fastrel build`, or unset it")
    if os.path.lexists(path):
        log.warning("%s is damaged or from elsewhere, and is compiled again", path)
    build.compiler(part)  # or there is nothing to announce
    log.warning("fastrel compiles its %s kernels, once, into %s", part.name, path.parent)
    build.cache(part, again)
    log.warning("compiled in %.0f s", time.perf_counter() - start)
    return path


def instruction_set() -> str:
    """The instruction set that the loaded kernels use: avx512, avx2 or generic."""
    return torch.ops.fastrel_cpu.instruction_set()


def origin(part: build.Part = build.CPU, variable: str = LIBRARY_VARIABLE) -> str:
    """How the kernels got here: with the package, in the cache, or not yet compiled."""
    if os.environ.get(variable):
        return f"{variable}={os.environ[variable]}"
    if _packaged(part):
        return f"prebuilt, {_packaged(part)}"
    try:
        path = build.cached(part)
    except build.BuildError as error:
        return str(error)
    return f"compiled at first use, {path}" if build.is_intact(path) else "not compiled yet: `fastrel build` does it now"


def _packaged(part: build.Part) -> Path | None:
    return next(Path(__file__).resolve().parent.parent.glob(f"{part.library}.*so"), None)
