"""Items read, decoded and prepared in processes of their own, ahead of what is being explained.

Not torch's DataLoader: it raises a worker's death from a signal handler, in whatever line the main process is at. Here it
is known where it happened, so that an item that kills its worker is found, tried once more alone, and reported.
"""

from __future__ import annotations

import collections
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch

from fastrel.data import pictures
from fastrel.data.inputs import Item
from fastrel.errors import FastrelError
from fastrel.models import Kind, Sample

#: Batches that a worker may be ahead.
_AHEAD = 2

#: Deaths in a row without an item to blame before it is given up.
_PATIENCE = 3

KILLS = "it kills the process that decodes it (tried twice)"


@dataclass
class Decoded:
    """An item as the model reads it, one or (long texts) several samples; or the reason why not."""

    item: str
    sha256: str | None = None
    samples: list[Sample] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    error: str | None = None


def decode(item: Item, reader: Any, kind: Kind) -> Decoded:
    """One item; never raises."""
    digest = None
    try:
        content = item.where.load()
        digest = hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
        if kind == "image":
            assert isinstance(content, bytes)
            picture = pictures.read(content)
            return Decoded(item.name, digest, reader(picture.image), picture.notes)
        return Decoded(item.name, digest, reader(content if isinstance(content, str) else content.decode("utf-8-sig")))
    except Exception as error:  # whatever is wrong with one item must not end the others
        return Decoded(item.name, digest, error=reason(error))


def reason(error: BaseException) -> str:
    """An error on one line; the kind of those that are not fastrel's own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FastrelError) else f"{type(error).__name__}: {text}"


def decoded(batches: Sequence[Sequence[Item]], reader: Any, kind: Kind, workers: int) -> Iterator[list[Decoded]]:
    """The batches in their order; with `workers`, that many processes decode ahead.

    Raises:
        FastrelError: the processes die again and again, and it is no item's doing.
    """
    if workers < 1:
        yield from ([decode(item, reader, kind) for item in batch] for batch in batches)
        return
    doomed: set[Item] = set()
    position = deaths = 0
    while position < len(batches):
        before = position
        pool = _Pool(workers, reader, kind)
        try:
            for found in pool.run(batches[position:], doomed):
                yield found
                position += 1
        except BrokenProcessPool:
            flat = [item for batch in batches[position:] for item in batch]
            killers = {flat[i] for i in pool.at_work() if _dies(flat[i], reader, kind)}
            doomed |= killers
            deaths = 0 if killers or position > before else deaths + 1
            if deaths >= _PATIENCE:
                raise FastrelError(
                    "the processes that decode die without an item to blame; is there memory left?"
                ) from None
        finally:
            pool.close()


class _Pool:
    """Processes that decode, each writing down which item it is at."""

    def __init__(self, workers: int, reader: Any, kind: Kind) -> None:
        self.context = _context()
        self.at = self.context.RawArray("q", [-1] * workers)
        self.ahead = workers * _AHEAD
        arguments = (reader, kind, self.at, self.context.Value("i", 0), os.getpid())
        self.executor = ProcessPoolExecutor(workers, self.context, _begin, arguments)

    def run(self, batches: Sequence[Sequence[Item]], doomed: set[Item]) -> Iterator[list[Decoded]]:
        """Raises BrokenProcessPool if a process dies."""
        flight: collections.deque[Future[list[Decoded]]] = collections.deque()
        number = 0
        for batch in batches:
            numbered = [(number + i, None if item in doomed else item, item.name) for i, item in enumerate(batch)]
            flight.append(self.executor.submit(_work, numbered))
            number += len(batch)
            if len(flight) > self.ahead:
                yield flight.popleft().result()
        while flight:
            yield flight.popleft().result()

    def at_work(self) -> list[int]:
        """What the processes were at, by its number in `run`."""
        return [i for i in self.at if i >= 0]

    def close(self) -> None:
        """End the processes."""
        self.executor.shutdown(cancel_futures=True)


#: What a process works with, from `_begin` on.
_mine: dict[str, Any] = {}


def _begin(reader: Any, kind: Kind, at: Any, counter: Any, parent: int) -> None:
    with counter.get_lock():
        _mine.update(reader=reader, kind=kind, at=at, slot=counter.value)
        counter.value += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process says when to stop
    _one_thread()
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _one_thread() -> None:
    """Threads of a forked process wait for ever for those that its parent had."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _follow(parent: int) -> None:
    """End with the main process, however it ends."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(numbered: Sequence[tuple[int, Item | None, str]]) -> list[Decoded]:
    found = []
    for number, item, name in numbered:
        _mine["at"][_mine["slot"]] = number
        found.append(Decoded(name, error=KILLS) if item is None else decode(item, _mine["reader"], _mine["kind"]))
        _mine["at"][_mine["slot"]] = -1
    return found


def _dies(item: Item, reader: Any, kind: Kind) -> bool:
    """Whether a process that decodes this alone does not come to an end of its own."""
    context = _context()
    survived = context.RawValue("b", 0)
    process = context.Process(target=_alone, args=(item, reader, kind, survived), daemon=True)
    process.start()
    process.join()
    return not survived.value


def _alone(item: Item, reader: Any, kind: Kind, survived: Any) -> None:
    _one_thread()
    decode(item, reader, kind)
    survived.value = 1


def _context() -> Any:
    """Forking where it is usual: it starts at once, and what decodes uses neither torch's threads nor a device."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
