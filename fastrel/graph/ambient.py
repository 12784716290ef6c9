"""Modes of the process or thread around a call: what they make of a model, and how to do without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def casts() -> dict[str, torch.dtype]:
    """Kinds of devices for which autocast is on, and what it casts to."""
    return {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}


@contextlib.contextmanager
def outside_inference() -> Iterator[None]:
    """Outside of `torch.inference_mode`, where tensors know their versions."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            yield
    else:
        yield


@contextlib.contextmanager
def plainly(grad: bool = False) -> Iterator[None]:
    """Where programs run: what the ambient modes make of the model is in its graph already."""
    with outside_inference(), torch.set_grad_enabled(grad), contextlib.ExitStack() as stack:
        for kind in casts():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
