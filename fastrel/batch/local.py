"""A run over a data set in this process, with others that decode ahead of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastrel.batch import table as tables
from fastrel.batch.decoding import decoded
from fastrel.batch.explain import Explain
from fastrel.batch.row import Row
from fastrel.batch.store import Store, Task

#: Called with how many items were done, and how many of them failed.
Progress = Callable[[int, int], None]


def run(explain: Explain, tasks: Sequence[Task], store: Store, schema: Any, workers: int, progress: Progress) -> None:
    """Do the tasks in their order; each is kept when it is whole."""
    size = explain.settings.batch_size
    batches = [[task.items[at : at + size] for at in range(0, len(task.items), size)] for task in tasks]
    stream = decoded([batch for own in batches for batch in own], explain.loaded.reader, explain.loaded.kind, workers)
    for task, own in zip(tasks, batches, strict=True):
        rows: list[Row] = []
        for batch in own:
            found = explain.rows(next(stream))
            rows += found
            progress(len(batch), len({row.item for row in found if row.error is not None}))
        store.put(task, tables.table(rows, schema))
