"""Parquet files and Hugging Face data sets on disk (Arrow), through pyarrow."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from fastrel.errors import InputError, needed

with needed("reading and writing tables", "batch"):
    import pyarrow as pa
    import pyarrow.parquet as pq


def columns(path: str) -> Sequence[str]:
    """The names of a file's columns."""
    return _schema(path).names


def column(path: str, name: str | None) -> Iterator[Any] | None:
    """The values of a column; `...` stands for pictures, which `cell` reads one by one. None: there is no such column."""
    if name is None or name not in _schema(path).names:
        return None
    kind = _schema(path).field(name).type
    inside = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)
    return iter([...] * _rows(path)) if inside else _values(path, name)


def cell(path: str, name: str, row: int) -> Any:
    """One value."""
    if not path.endswith(".parquet"):
        return _stream(path).column(name)[row].as_py()
    for i, start in enumerate(starts := _starts(path)):
        if row < (starts[i + 1] if i + 1 < len(starts) else _rows(path)):
            return _group(path, name, i)[row - start].as_py()
    raise InputError(f"{path!r} has no row {row}")


def dataset_files(folder: str) -> Iterator[tuple[str, str]]:
    """(name, Arrow file) of a data set as `save_to_disk` wrote it, of every split if it has several.

    Raises:
        InputError: it holds a selection or another order of its rows, which only its own library can follow.
    """
    splits = os.path.join(folder, "dataset_dict.json")
    if os.path.isfile(splits):
        for split in _json(splits)["splits"]:
            yield from dataset_files(os.path.join(folder, split))
        return
    state = _json(os.path.join(folder, "state.json"))
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise InputError(f"the data set {folder!r} is a selection of rows; save it after .flatten_indices()")
    files = [entry["filename"] for entry in state["_data_files"]]
    for file in files:
        yield folder if len(files) == 1 else os.path.join(folder, file), os.path.join(folder, file)


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path!r} cannot be read: {error}") from error


@functools.lru_cache(4)
def _parquet(path: str) -> Any:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path!r} is no Parquet file that can be read: {error}") from error


@functools.lru_cache(4)
def _stream(path: str) -> Any:
    try:
        return pa.ipc.open_stream(pa.memory_map(path)).read_all()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path!r} is no Arrow stream that can be read: {error}") from error


@functools.lru_cache(2)
def _group(path: str, name: str, index: int) -> Any:
    return _parquet(path).read_row_group(index, columns=[name]).column(name)


def _schema(path: str) -> Any:
    return _parquet(path).schema_arrow if path.endswith(".parquet") else _stream(path).schema


def _rows(path: str) -> int:
    return _parquet(path).metadata.num_rows if path.endswith(".parquet") else _stream(path).num_rows


@functools.lru_cache(4)
def _starts(path: str) -> list[int]:
    metadata = _parquet(path).metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _values(path: str, name: str) -> Iterator[Any]:
    if not path.endswith(".parquet"):
        yield from (value.as_py() for value in _stream(path).column(name))
        return
    for batch in _parquet(path).iter_batches(columns=[name]):
        yield from (value.as_py() for value in batch.column(0))
