"""What a service tells Prometheus. No label is a class or a client."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from fastrel.artefact.metadata import Metadata
from fastrel.serving.wire import Answer

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counters and histograms of one service."""

    def __init__(self, about: Metadata) -> None:
        self._registry = registry = CollectorRegistry()
        self._pids: set[int] = set()
        self.requests = Counter("fastrel_requests", "Answers by route and status", ["route", "code"], registry=registry)
        self.rejected = Counter("fastrel_rejected", "Requests refused, by reason", ["reason"], registry=registry)
        self.expired = Counter("fastrel_expired", "Requests whose deadline passed", registry=registry)
        self.not_ok = Counter("fastrel_not_ok", "Maps that could not be made", registry=registry)
        self.seconds = Histogram("fastrel_seconds", "Seconds by stage", ["stage"], buckets=_SECONDS, registry=registry)
        self.batch = Histogram(
            "fastrel_batch_size", "Samples explained together", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.admitted = Gauge("fastrel_admitted", "Requests admitted and not answered yet", registry=registry)
        self.ready = Gauge("fastrel_ready", "Whether requests can be answered", registry=registry)
        self.explained = Gauge(
            "fastrel_explained", "Samples that went through the model, by worker", ["pid"], registry=registry
        )
        self.canary = Gauge(
            "fastrel_canary_error", "Last distance of the self-test from its results at export", registry=registry
        )
        Info("fastrel_model", "What is served", registry=registry).info(
            {
                "weights": about.weights,
                "fastrel": about.versions["fastrel"],
                "torch": about.versions["torch"],
                **{name: str(about.options[name]) for name in ("method", "rules", "precision")},
            }
        )

    def note(self, answer: Answer) -> None:
        """What an answer says about how it was made."""
        header = answer.header
        for stage in ("decode", "explain"):
            if f"{stage}_seconds" in header:
                self.seconds.labels(stage).observe(header[f"{stage}_seconds"])
        if "batch" in header:
            self.batch.observe(header["batch"])
        if "done" in header:
            self.explained.labels(str(header["pid"])).set(header["done"])
            self._pids.add(header["pid"])
        if "ok" in answer.arrays:
            self.not_ok.inc(int((~answer.arrays["ok"]).sum()))

    def _forget_the_dead(self) -> None:
        for pid in [pid for pid in self._pids if not _is_alive(pid)]:
            self._pids.discard(pid)
            self.explained.remove(str(pid))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        self._forget_the_dead()
        return generate_latest(self._registry)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
