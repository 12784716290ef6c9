"""The table that a run over a data set writes: one row per item and target, failures included."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrel.batch.row import Row
from fastrel.data.tables import pa, pq


def schema(shape: tuple[int, ...] | None, metadata: dict[str, Any], texts: bool = False) -> Any:
    """Columns of a run whose maps all have one shape, or (texts) have their own length, with tokens, or (pairs) both."""
    maps: list[Any] = [] if shape is None else [pa.field("map", pa.fixed_shape_tensor(pa.float32(), shape))]
    if shape is None or texts:
        maps += [pa.field("relevance", pa.list_(pa.float32())), pa.field("tokens", pa.list_(pa.string()))]
    columns = [
        pa.field("item", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("window", pa.int32()),
        pa.field("target", pa.int32()),
        pa.field("target_name", pa.string()),
        pa.field("logit", pa.float32()),
        pa.field("probability", pa.float32()),
        pa.field("predicted", pa.int32()),
        *maps,
        pa.field("notes", pa.list_(pa.string())),
        pa.field("error", pa.string()),
    ]
    return pa.schema(columns, {"fastrel": json.dumps(metadata)})


def table(rows: Sequence[Row], to: Any) -> Any:
    """Rows as an Arrow table of a schema."""
    columns = []
    for field in to:
        if field.name == "map":
            columns.append(_tensors([row.map for row in rows], field.type))
        elif field.name == "relevance":
            columns.append(
                pa.array([None if row.relevance is None else row.relevance.tolist() for row in rows], field.type)
            )
        else:
            columns.append(pa.array([getattr(row, field.name) for row in rows], field.type))
    return pa.Table.from_arrays(columns, schema=to)


def rows(made: Any) -> list[Row]:
    """The rows of a table; `logits` and, beside a map, `relevance` are not kept in it."""
    plain = made.drop_columns(["map"]) if "map" in made.column_names else made
    found = [Row(**{**record, "notes": tuple(record["notes"] or ())}) for record in plain.to_pylist()]
    if "map" in made.column_names:
        column = made.column("map").combine_chunks()
        maps = column.to_numpy_ndarray() if len(column) else ()
        for row, values in zip(found, maps, strict=True):
            row.map = values
    for row in found:
        if row.relevance is not None:
            row.relevance = np.array(row.relevance, np.float32)
    return found


def _tensors(maps: Sequence[np.ndarray | None], kind: Any) -> Any:
    """Fixed-shape tensors, null where there is no map."""
    size = int(np.prod(kind.shape))
    flat = np.stack([np.zeros(size, np.float32) if m is None else m.reshape(-1).astype(np.float32) for m in maps])
    missing = pa.array([m is None for m in maps])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), size, mask=missing)
    return pa.ExtensionArray.from_storage(kind, storage)


def encode(made: Any) -> bytes:
    """A table as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(made, buffer, compression="zstd")
    return buffer.getvalue()


def decode(content: bytes) -> Any:
    """A table from a Parquet file."""
    return pq.read_table(pa.BufferReader(content))
