"""A run over a data set in this process, which keeps its rows as it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastrel.batch import table as tables
from fastrel.batch.explain import Explain
from fastrel.batch.row import Row
from fastrel.batch.store import Store, Task
from fastrel.batch.stream import explained

#: Called with how many items were done, and how many of them failed.
Progress = Callable[[int, int], None]


def run(explain: Explain, tasks: Sequence[Task], store: Store, schema: Any, workers: int, progress: Progress) -> None:
    """Do the tasks in their order; each is kept when it is whole, while the next one is worked on."""
    size = explain.settings.batch_size
    batches = [[task.items[at : at + size] for at in range(0, len(task.items), size)] for task in tasks]
    stream = explained(explain, [batch for own in batches for batch in own], workers)

    def keep(task: Task, rows: Sequence[Row]) -> None:
        store.put(task, tables.table(rows, schema))

    with ThreadPoolExecutor(1) as writer:
        keeping: Future[None] | None = None
        for task, own in zip(tasks, batches, strict=True):
            rows: list[Row] = []
            for batch in own:
                _, found = next(stream)
                rows += found
                progress(len(batch), len({row.item for row in found if row.error is not None}))
            if keeping is not None:
                keeping.result()
            keeping = writer.submit(keep, task, rows)
        if keeping is not None:
            keeping.result()
