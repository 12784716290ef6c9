"""Weights in reduced precision, kept from one explanation to the next: they depend on the model alone.

What was made of a weight is used again only while every bit of the weight is what it was. Nothing else tells: a write through
`.data`, a numpy view or another process changes no version and no address. So the whole weight is read before each use and
compared by a digest of every row (`fastrel.ops.row_digest`): a sum over the row of squares of its numbers' bits, each moved by a
random key of its column.

- A change of one number always changes its row's digest: each term is one-to-one in the bits of its number.
- Rows that change places change the list of digests.
- Any other change within a row, numbers that change places among them, goes unseen with a probability of 2⁻³¹ at most: given all
  keys but one, two values of that one let the sums agree at most. Keys are drawn anew in every process: no weight can fit them.

It is read once per explanation whatever was made of it, with C++ kernels at the speed of memory: on ViT-B/16 in 6 % of a forward
pass at batch one, less with more samples, and in 0.35 of the time of preparing it (int8 for relevance, bfloat16 for the gradient; 0.6
of either alone; one thread, AVX2). In plain PyTorch that would take longer than preparing it, so there nothing is kept.
"""

from __future__ import annotations

import functools
import math
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastrel.errors import InputError

#: How many megabytes of prepared weights to keep over all models; 0 keeps none. Default: 2048.
LIMIT_VARIABLE = "FASTREL_WEIGHTS_MB"


@dataclass(frozen=True)
class _Prepared:
    """What was made of a weight; None stands for that itself, which would keep its own key alive."""

    mark: Tensor | tuple[int, int]
    made: tuple[Tensor | None, ...]

    def of(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The same with the weight in its places."""
        return tuple(weight if x is None else x for x in self.made)


#: Per parameter, by what was asked for; gone with the parameter.
_kept: Any = WeakTensorKeyDictionary()
_total = 0
#: How often `forget` was called.
_forgotten = 0
_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)
#: Finalizers may run wherever memory is allocated, also while it is held.
_lock = threading.RLock()


def limit() -> int:
    """Bytes that may be kept.

    Raises:
        InputError: FASTREL_WEIGHTS_MB is no number of megabytes.
    """
    asked = os.environ.get(LIMIT_VARIABLE, "2048")
    try:
        megabytes = float(asked)
    except ValueError:
        megabytes = math.nan
    if not 0 <= megabytes < math.inf:
        raise InputError(
            f"{LIMIT_VARIABLE}={asked!r} is no number of megabytes; set 0 to keep nothing, or unset it for 2048"
        )
    return int(megabytes * 1e6)


def kept_bytes() -> int:
    """Bytes that are kept now."""
    return _total


def digested(digest: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor | None]:
    """What tells a weight's value, by `digest(weight, keys)`; None where what is made of it is not kept."""

    def digest_of(weight: Tensor) -> Tensor | None:
        # On a GPU, comparing digests would wait for it, and converting is quick there.
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or limit() == 0:
            return None
        weight = weight.detach()
        weight = weight.T if weight.stride(0) == 1 else weight  # rows are what lies side by side in memory
        return digest(weight, _keys(weight.shape[1]))

    return digest_of


def kept(prepare: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`prepare(weight, purpose)`, its results kept within `limit` until the weight's digest changes."""

    def prepared(weight: Tensor, purpose: str, digest: Tensor | None) -> tuple[Tensor, ...]:
        if digest is None:
            return prepare(weight, purpose)
        owner = weight if weight._base is None else weight._base
        key = (purpose, prepare, weight.storage_offset(), weight.shape, weight.stride())
        found = _kept.get(owner, {}).get(key)
        if found and torch.equal(found.mark, digest):
            return found.of(weight)
        return _made(owner, key, digest, prepare(weight, purpose), weight)

    return prepared


def kept_by_version(prepare: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The same on a GPU, where comparing digests would wait for all that was launched: until autograd's version of the weight or
    its place changes. What is written through `.data` changes neither: call `forget()` after that.

    While a CUDA graph is captured (`recording`), the graph computes what is not kept yet, and nothing of that is kept: its memory
    is filled at every replay."""

    def prepared(weight: Tensor, purpose: str) -> tuple[Tensor, ...]:
        if weight.is_inference() or limit() == 0:
            return prepare(weight, purpose)
        owner = weight if weight._base is None else weight._base
        key = (purpose, prepare, weight.storage_offset(), weight.shape, weight.stride())
        recording = _recording.get()
        found = _kept.get(owner, {}).get(key)
        if found and found.mark == _mark(weight):
            if recording is not None:
                recording.read.append(
                    _Read(weight, functools.partial(prepare, weight, purpose), found.made, _state(weight))
                )
            return found.of(weight)
        if recording is not None:
            return prepare(weight, purpose)
        return _made(owner, key, _mark(weight), prepare(weight, purpose), weight)

    return prepared


def forget() -> None:
    """Keep nothing of what was prepared so far, and let CUDA graphs that were captured before prepare theirs anew."""
    global _forgotten
    with _lock:
        _kept.clear()
        _forgotten += 1


@dataclass
class _Read:
    """What was made of a weight when it was in a state, and what makes it anew."""

    weight: Tensor
    prepare: Callable[[], tuple[Tensor, ...]]
    made: tuple[Tensor | None, ...]
    state: tuple[int, ...]


class Recording:
    """What a CUDA graph reads of kept weights, where it lies: alive as long as this, and up to date by `refresh`."""

    def __init__(self) -> None:
        self.read: list[_Read] = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Before a replay: prepare anew, in the same places, what was made of weights that were written since or forgotten."""
        for one in self.read:
            state = _state(one.weight)
            if state != one.state:
                for old, new in zip(one.made, one.prepare(), strict=True):
                    if old is not None:
                        old.copy_(new)
                one.state = state


@contextmanager
def recording() -> Iterator[Recording]:
    """While a CUDA graph is captured in this thread."""
    found = Recording()
    token = _recording.set(found)
    try:
        yield found
    finally:
        _recording.reset(token)


def _mark(weight: Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()


def _state(weight: Tensor) -> tuple[int, ...]:
    return *_mark(weight), _forgotten


def _made(owner: Tensor, key: Any, mark: Any, result: tuple[Tensor, ...], weight: Tensor) -> tuple[Tensor, ...]:
    """What was just prepared, kept if anything was made."""
    made = tuple(None if x is weight else x for x in result)
    if any(x is not None for x in made):
        _keep(owner, key, _Prepared(mark, made))
    return result


@functools.cache
def _keys(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    return torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int32)


def _keep(owner: Tensor, key: Any, made: _Prepared) -> None:
    size = sum(x.untyped_storage().nbytes() for x in made.made if x is not None)
    with _lock:
        entries = _kept.setdefault(owner, {})
        entries.pop(key, None)
        if _total + size <= limit():
            _count(size)
            weakref.finalize(made, _count, -size).atexit = False
            entries[key] = made


def _count(size: int) -> None:
    global _total
    with _lock:
        _total += size
