"""The stage that explains: requests with different targets in one batch, an answer for each, and nothing is raised."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mosec import Worker
from torch import Tensor

from fastrel.artefact.loading import Artefact, load
from fastrel.artefact.metadata import RANK
from fastrel.artefact.reading import collate
from fastrel.data import files
from fastrel.errors import first_line
from fastrel.serving.service import REASON, Service
from fastrel.serving.wire import Answer, Work

log = logging.getLogger("fastrel")


class Explaining:
    """Answers batches of work by an artefact, or by others `beside` it, which read the same."""

    def __init__(self, artefact: Artefact, clock: Any = time.monotonic, beside: Sequence[Artefact] = ()) -> None:
        self._artefacts, self._clock = (artefact, *beside), clock
        self._done = 0  # samples that went through the model

    def warm(self, batch: int) -> None:
        """Run what requests will run, for all sizes of a batch up to `batch`."""
        stored = self._artefacts[0].stored
        read = self._artefacts[0].metadata.inputs
        sample = tuple(stored[f"input{i}"][0].to(_as_decoded(x.dtype)).numpy() for i, x in enumerate(read))
        predicted = Work("predict", (RANK,), float("inf"), sample)
        explained = [replace(predicted, want="explain", method=i) for i in range(len(self._artefacts))]
        for size in range(1, batch + 1):
            for work in (*explained, predicted):
                self([work] * size)

    def __call__(self, works: Sequence[Work]) -> list[Answer]:
        """An answer for each."""
        answers: list[Answer | None] = [None] * len(works)
        groups: dict[tuple[str, int, int], list[int]] = {}
        for i, work in enumerate(works):
            if work.deadline < self._clock():
                answers[i] = Answer(408, "the deadline passed before the request was explained", {"expired": True})
            elif work.want == "canary":
                answers[i] = self._canary()
            else:
                groups.setdefault((work.want, _size(len(work.classes)), work.method), []).append(i)
        for (want, size, method), places in groups.items():
            chosen = [works[i] for i in places]
            for i, answer in zip(places, self._answered(self._artefacts[method], want, size, chosen), strict=True):
                answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _canary(self) -> Answer:
        try:
            worst = max(artefact.self_test() for artefact in self._artefacts)
            return Answer(header={"error_of_self_test": worst, **self._facts()})
        except Exception:  # requests in the same batch are answered
            log.exception("the self-test failed")
            return Answer(500, "the self-test failed")

    def _answered(self, artefact: Artefact, want: str, size: int, works: Sequence[Work]) -> list[Answer]:
        began = self._clock()
        try:
            about = artefact.metadata
            inputs = [
                torch.from_numpy(array).to(about.device, getattr(torch, x.dtype))
                for array, x in zip(collate([list(work.sample) for work in works], about), about.inputs, strict=True)
            ]
            found = _predicted(artefact, inputs) if want == "predict" else _explained(artefact, inputs, size, works)
        except Exception as error:  # whatever the model raises; the request is answered, the worker goes on
            log.exception("a batch of %d failed", len(works))
            if len(works) > 1:
                return [answer for work in works for answer in self._answered(artefact, want, size, [work])]
            return [Answer(500, f"the model failed on this input: {type(error).__name__}")]
        self._done += len(works)
        facts = {"explain_seconds": self._clock() - began, "batch": len(works), **self._facts()}
        return [Answer(header={**work.header, **facts}, arrays=arrays) for work, arrays in zip(works, found, strict=True)]

    def _facts(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "done": self._done}


def _predicted(artefact: Artefact, inputs: list[Tensor]) -> list[dict[str, np.ndarray]]:
    by_name = {x.name: value for x, value in zip(artefact.metadata.inputs, inputs, strict=True)}
    return [{"logits": row} for row in artefact.predict(**by_name).float().cpu().numpy()]


def _explained(artefact: Artefact, inputs: list[Tensor], size: int, works: Sequence[Work]) -> list[dict[str, np.ndarray]]:
    """Rows of classes are filled up by their last one, so that all have `size`."""
    rows = [[*work.classes, *[work.classes[-1]] * (size - len(work.classes))] for work in works]
    explanation = artefact.explain(inputs, torch.tensor(rows))
    one = explanation.only
    maps = (one.relevance if one.grid is None else one.grid).float().cpu().numpy()
    logits, classes = explanation.logits.float().cpu().numpy(), explanation.target
    assert classes is not None
    assert explanation.ok is not None
    found = []
    for b, work in enumerate(works):
        count = len(work.classes)
        tokens = work.header.get("tokens")
        own = maps[b, :count] if tokens is None else maps[b, :count, : len(tokens)]
        arrays = {"logits": logits[b], "classes": classes[b, :count].cpu().numpy(), "map": own}
        arrays["ok"] = explanation.ok[b, :count].cpu().numpy()
        found.append(arrays | ({} if work.picture is None else {"picture": work.picture}))
    return found


def _as_decoded(dtype: str) -> torch.dtype:
    """In what numbers the decode stage gives what the model reads in `dtype`."""
    return torch.float32 if getattr(torch, dtype).is_floating_point else getattr(torch, dtype)


def _size(count: int) -> int:
    """The next power of two: requests of similar numbers of targets share a batch, and none is filled up to twice its own."""
    return 1 << (count - 1).bit_length() if count else 0


class Explain(Worker):
    """`Explaining` as a stage of mosec. It takes requests when it is warm."""

    def __init__(self) -> None:
        super().__init__()
        service = Service.from_environment()
        torch.set_num_threads(service.threads)
        try:
            self._explaining = Explaining(load(service.artefact), beside=[load(path) for path in service.beside])
            self._explaining.warm(service.batch)
        except Exception as error:
            with files.replaced(Path(os.environ[REASON])) as path:  # mosec would try for ever
                path.write_text(first_line(error))
            raise
        self._several = service.batch > 1

    def forward(self, data: Any) -> Any:
        """Explain a batch."""
        return self._explaining(data) if self._several else self._explaining([data])[0]

    def serialize(self, data: Answer) -> bytes:
        """For the front."""
        return data.to_bytes()
