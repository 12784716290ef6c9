"""`fastrel build`: compile the CPU kernels."""

import argparse

from fastrel import build, native
from fastrel.errors import FastrelError


def run(options: argparse.Namespace) -> int:
    """Compile and load them, and say where they lie."""
    try:
        path = build.cached()
        if not path.exists():
            build.compile_library(path)
    except build.BuildError as error:
        raise FastrelError(f"the kernels could not be built: {error}") from error
    reason = native.load()
    if reason:
        raise FastrelError(f"the kernels were built but cannot be loaded: {reason}")
    print(f"{path} ({native.instruction_set()})")
    return 0
