"""Batches explained one after the other in this process, while others decode ahead of it and a thread moves the next one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from fastrel.batch.decoding import Decoded, decoded
from fastrel.batch.explain import Batch, Explain
from fastrel.batch.row import Row
from fastrel.data.inputs import Item


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
