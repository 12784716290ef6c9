"""Results of a run over a data set, read back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastrel.batch import store, table
from fastrel.batch.row import Row
from fastrel.data.tables import pa, pq


@dataclass(frozen=True)
class Results:
    """A folder that `fastrel batch` wrote: one row per item and target, in the order of the data set (per shard).

    Any reader of Parquet reads it too; the maps are Arrow's fixed-shape tensors.
    """

    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the results were made from."""
        return store.settings(self.folder)

    @cached_property
    def failures(self) -> dict[str, str]:
        """Items that could not be explained, with the reason."""
        return dict(store.failures(self.folder))

    def table(self, columns: list[str] | None = None) -> Any:
        """The rows without an error, as an Arrow table (memory-mapped)."""
        wanted = None if columns is None else [*dict.fromkeys([*columns, "error"])]
        found = [pq.read_table(path, columns=wanted, memory_map=True) for path in store.parts(self.folder)]
        if not found:
            return pa.table({name: [] for name in columns or ["item"]})
        fine = _without_errors(pa.concat_tables(found))
        return fine.drop_columns(["error"]) if columns is None or "error" not in columns else fine

    def batches(self) -> Iterator[list[Row]]:
        """The rows without an error, a list per file."""
        for path in store.parts(self.folder):
            yield table.rows(_without_errors(pq.read_table(path, memory_map=True)))

    def __len__(self) -> int:
        return self.table(["item"]).num_rows

    def numpy(self, columns: list[str] | None = None) -> dict[str, Any]:
        """Columns as arrays: map [N, gh, gw] float32, numbers [N]; strings and maps of their own length as lists."""
        found = self.table(columns)
        return {name: _array(found.column(name)) for name in found.column_names}

    def torch(self, columns: list[str] | None = None) -> dict[str, Any]:
        """`numpy`, its arrays as tensors."""
        found = self.numpy(columns)
        return {name: torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for name, x in found.items()}

    def pandas(self, columns: list[str] | None = None) -> Any:
        """A pandas DataFrame; a map is an array in its cell."""
        import pandas

        return pandas.DataFrame({name: list(values) for name, values in self.numpy(columns).items()})


def read(folder: str | os.PathLike[str]) -> Results:
    """The results in a folder.

    Raises:
        InputError: there are none.
    """
    found = Results(Path(folder))
    _ = found.settings
    return found


def _without_errors(found: Any) -> Any:
    """Runs of rows without an error, put together."""
    fine = [error is None for error in found.column("error").to_pylist()]
    if all(fine):
        return found
    edges = np.flatnonzero(np.diff([False, *fine, False]))
    pieces = [found.slice(start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return pa.concat_tables(pieces) if pieces else found.slice(0, 0)


def _array(column: Any) -> Any:
    if isinstance(column.type, pa.FixedShapeTensorType):
        pieces = [chunk.to_numpy_ndarray() for chunk in column.chunks if len(chunk)]
        return np.concatenate(pieces) if pieces else np.zeros((0, *column.type.shape), np.float32)
    if pa.types.is_list(column.type):
        return [
            None if x is None else np.asarray(x) if pa.types.is_floating(column.type.value_type) else x
            for x in column.to_pylist()
        ]
    if pa.types.is_string(column.type):
        return column.to_pylist()
    return column.to_numpy()
