"""The compiled CPU kernels: found, compiled at first use, or the reason why they are not there."""

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

library.declare("instruction_set() -> str")


@functools.cache
def load() -> str | None:
    """Load the kernels of `torch.ops.fastrel_cpu`, compiling them first if need be. None, or the reason why it failed."""
    try:
        torch.ops.load_library(str(_find() or _compile()))
    except (build.BuildError, OSError) as error:
        log.warning("fastrel runs without its compiled kernels: %s", error)
        return str(error)
    return None


def instruction_set() -> str:
    """The instruction set that the loaded kernels use: avx512, avx2 or generic."""
    return torch.ops.fastrel_cpu.instruction_set()


def origin() -> str:
    """How the kernels got here: built at install time, in the cache, or not yet compiled."""
    if os.environ.get(LIBRARY_VARIABLE):
        return f"{LIBRARY_VARIABLE}={os.environ[LIBRARY_VARIABLE]}"
    if _packaged():
        return f"built at install time, {_packaged()}"
    try:
        path = build.cached()
    except build.BuildError as error:
        return str(error)
    return f"compiled at first use, {path}" if path.exists() else "not compiled yet: `fastrel build` does it now"


def _packaged() -> Path | None:
    return next(Path(__file__).resolve().parent.glob("_C*.so"), None)


def _find() -> Path | None:
    """The library asked for, one built with the package, or one compiled before."""
    if os.environ.get(LIBRARY_VARIABLE):
        return Path(os.environ[LIBRARY_VARIABLE])
    packaged = _packaged()
    if packaged:
        return packaged
    path = build.cached()
    return path if path.exists() else None


def _compile() -> Path:
    if os.environ.get(JIT_VARIABLE) == "0":
        raise build.BuildError(f"{JIT_VARIABLE}=0 forbids compiling at first use; run `fastrel build`, or unset it")
    path, start = build.cached(), time.perf_counter()
    log.warning("fastrel compiles its CPU kernels, once, into %s", path.parent)
    build.compile_library(path)
    log.warning("compiled in %.0f s", time.perf_counter() - start)
    return path
