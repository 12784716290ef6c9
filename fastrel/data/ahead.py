"""A function of items, read and decoded say, computed in processes of their own ahead of what is done with the results.

Not torch's DataLoader: it raises a worker's death from a signal handler, in whatever line the main process is at. Here it
is known where it happened, so that an item that kills its worker is found, tried once more alone, and reported.
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fastrel.errors import FastrelError, InputError, reason

T = TypeVar("T")
R = TypeVar("R")

#: Batches that a worker may be ahead.
_AHEAD = 2

#: Deaths in a row without an item to blame before it is given up.
_PATIENCE = 3

KILLS = "it kills the process that reads it (tried twice)"


@dataclass(frozen=True)
class Failed:
    """Instead of a result: what went wrong with this item."""

    reason: str


def ahead(batches: Sequence[Sequence[T]], function: Callable[[T], R], workers: int) -> Iterator[list[R | Failed]]:
    """The results of the batches in their order, computed by `workers` processes; 0: by one, and none before it is asked for.

    Never in this process, so that nothing that an item does to its process ends the run. Items and results must be picklable;
    where processes are not forked (on all but Linux), the function too.

    Raises:
        InputError: they are not.
        FastrelError: the processes die again and again, and it is no item's doing.
    """
    flat = [item for batch in batches for item in batch]
    if flat:
        _require_picklable(flat[0])
    if _context().get_start_method() != "fork":
        _require_picklable(function)
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + len(batch))
    doomed: set[int] = set()
    position = deaths = 0
    while position < len(batches):
        before = position
        pool = _Pool(workers, function)
        try:
            numbered = [
                [(i, None if i in doomed else flat[i]) for i in range(starts[p], starts[p + 1])]
                for p in range(position, len(batches))
            ]
            for found in pool.run(numbered):
                yield found
                position += 1
        except BrokenProcessPool:
            killers = {i for i in pool.at_work() if _dies(flat[i], function)}
            doomed |= killers
            deaths = 0 if killers or position > before else deaths + 1
            if deaths >= _PATIENCE:
                raise FastrelError("the processes that read die without an item to blame; is there memory left?") from None
        finally:
            pool.close()


class _Pool:
    """Processes that work, each writing down which item it is at."""

    def __init__(self, workers: int, function: Callable[[Any], Any]) -> None:
        self.context = _context()
        count = max(1, workers)
        self.at = self.context.RawArray("q", [-1] * count)
        self.ahead = workers * _AHEAD
        arguments = (function, self.at, self.context.Value("i", 0), os.getpid())
        self.executor = ProcessPoolExecutor(count, self.context, _begin, arguments)

    def run(self, batches: Sequence[Sequence[tuple[int, Any]]]) -> Iterator[list[Any]]:
        """Raises BrokenProcessPool if a process dies."""
        flight: collections.deque[Future[list[Any]]] = collections.deque()
        for batch in batches:
            flight.append(self.executor.submit(_work, batch))
            if len(flight) > self.ahead:
                yield flight.popleft().result()
        while flight:
            yield flight.popleft().result()

    def at_work(self) -> list[int]:
        """The items that the processes were at."""
        return [i for i in self.at if i >= 0]

    def close(self) -> None:
        """End the processes."""
        self.executor.shutdown(cancel_futures=True)


#: What a process works with, from `_begin` on.
_mine: dict[str, Any] = {}


def _begin(function: Callable[[Any], Any], at: Any, counter: Any, parent: int) -> None:
    with counter.get_lock():
        _mine.update(function=function, at=at, slot=counter.value)
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


def _work(batch: Sequence[tuple[int, Any]]) -> list[Any]:
    """An item that is not there is one that kills."""
    found = []
    for number, item in batch:
        _mine["at"][_mine["slot"]] = number
        found.append(Failed(KILLS) if item is None else _result(_mine["function"], item))
        _mine["at"][_mine["slot"]] = -1
    return found


def _result(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:  # whatever is wrong with one item must not end the others
        return Failed(reason(error))


def _dies(item: Any, function: Callable[[Any], Any]) -> bool:
    """Whether a process that does this alone does not come to an end of its own."""
    context = _context()
    survived = context.RawValue("b", 0)
    process = context.Process(target=_alone, args=(item, function, survived), daemon=True)
    process.start()
    process.join()
    return not survived.value


def _alone(item: Any, function: Callable[[Any], Any], survived: Any) -> None:
    _one_thread()
    _result(function, item)
    survived.value = 1


def _require_picklable(given: Any) -> None:
    try:
        pickle.dumps(given)
    except Exception as error:  # PicklingError, AttributeError, TypeError: as what it holds has it
        raise InputError(
            f"{given!s:.200} cannot be sent to the processes that read: {reason(error)}; use functions and classes of a module's "
            "top level (functools.partial for arguments) instead of lambdas and those defined inside a function"
        ) from error


def _context() -> Any:
    """Forking where it is usual: it starts at once, and what reads uses neither torch's threads nor a device."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
