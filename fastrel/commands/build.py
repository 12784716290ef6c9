"""`fastrel build`: compile the kernels."""

import argparse

from fastrel import build
from fastrel.backends import native
from fastrel.errors import FastrelError


def run(options: argparse.Namespace) -> int:
    """Compile them, load those that can run here, and say where they lie."""
    part = build.CUDA if options.cuda else build.CPU
    try:
        path = build.cache(part)
    except build.BuildError as error:
        raise FastrelError(f"the kernels could not be built: {error}") from error
    reason = native.load_cuda() if options.cuda else native.load()
    if reason:
        raise FastrelError(f"the kernels were built but cannot be loaded: {reason}")
    print(f"{path} ({'sm_' + ', sm_'.join(build.cuda_archs()) if options.cuda else native.instruction_set()})")
    return 0
