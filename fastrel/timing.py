"""How long a call takes, and how many samples a second that makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of every run of a call on `batch` samples."""

    batch: int
    seconds: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """Milliseconds that this share of the runs stayed below."""
        return 1000 * float(np.quantile(self.seconds, share))

    @property
    def throughput(self) -> float:
        """Samples per second over all runs."""
        return self.batch * len(self.seconds) / sum(self.seconds)


def measure(calls: Mapping[str, tuple[int, Callable[[], Any]]], seconds: float, least: int = 5) -> dict[str, Timing]:
    """Time calls by name, each with its number of samples, in turns, so that what disturbs one disturbs all.

    Every call runs twice before. Then all take turns for about `seconds` per call, at least `least` times.
    """
    for _, call in calls.values():
        call(), call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    end, turns = time.perf_counter() + seconds * len(calls), 0
    while turns < least or time.perf_counter() < end:
        for name, (_, call) in calls.items():
            began = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - began)
        turns += 1
    return {name: Timing(calls[name][0], tuple(values)) for name, values in found.items()}
