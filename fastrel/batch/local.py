"""A run over a data set in this process; others decode ahead of it, and threads move and keep what it need not wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastrel.batch import table as tables
from fastrel.batch.decoding import Decoded, decoded
from fastrel.batch.explain import Batch, Explain
from fastrel.batch.row import Row
from fastrel.batch.store import Store, Task
from fastrel.data.inputs import Item

#: Called with how many items were done, and how many of them failed.
Progress = Callable[[int, int], None]


def explained(
    explain: Explain, batches: Sequence[Sequence[Item]], workers: int, noise: bool = False
) -> Iterator[tuple[list[Decoded], list[Row]]]:
    """Batches with their rows, in their order; the next one is collated and on its way to the device meanwhile."""
    stream = decoded(batches, explain.loaded.reader, explain.loaded.kind, workers)

    def following() -> tuple[list[Decoded], Batch | None] | None:
        items = next(stream, None)
        return None if items is None else (items, explain.moved(items))

    with ThreadPoolExecutor(1) as mover:
        coming = mover.submit(following)
        while (ready := coming.result()) is not None:
            coming = mover.submit(following)
            items, moved = ready
            yield items, explain.rows(items, moved, noise)


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
