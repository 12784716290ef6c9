"""The files that `fastrel explain` and `fastrel show` make of an item's rows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastrel.batch.row import Row
from fastrel.data import files
from fastrel.errors import InputError
from fastrel.render.overlay import STYLES, png
from fastrel.render.parts import Part, page, page_of


def endings(rows: Sequence[Row], npz: bool) -> list[str]:
    """How the names of an item's files end: an overlay per target, or a page per window of a text, then the raw maps."""
    windows = sorted({row.window for row in rows})
    if rows[0].tokens is None:
        drawn = [f"-{row.target}.png" for row in rows]
    else:
        drawn = [".html"] if len(windows) == 1 else [f"-part{window + 1}.html" for window in windows]
    return [*drawn, ".npz"] if npz else drawn


def draw(rows: Sequence[Row], picture: Image.Image | None, paths: Sequence[Path], style: str = "blend") -> None:
    """Write an item's files; `paths` end as `endings` says, `picture` is what the model saw.

    Raises:
        InputError: the map does not lie on the picture.
        OSError: a file cannot be written.
    """
    if picture is not None and rows[0].tokens is not None:
        files.write(paths[0], pair_page(rows, picture, style))
    elif picture is None:
        for path, window in zip(paths, sorted({row.window for row in rows}), strict=False):
            files.write(path, text_page([row for row in rows if row.window == window]))
    else:
        for path, row in zip(paths, rows, strict=False):
            files.write(path, png(STYLES[style](picture, _scaled(row, picture))))
    if paths[-1].suffix == ".npz":
        files.write(paths[-1], raw(rows))


def text_page(rows: Sequence[Row]) -> str:
    """One piece of text, a paragraph per target."""
    tokens, maps = rows[0].tokens, [row.relevance for row in rows]
    assert tokens is not None
    return page(tokens, torch.tensor(np.stack(maps)), [title(row) for row in rows])  # type: ignore[arg-type]


def pair_page(rows: Sequence[Row], picture: Image.Image, style: str) -> str:
    """A picture and a text: both maps, with what each holds of the whole."""
    heats = torch.tensor(np.stack([_scaled(row, picture) for row in rows]))[:, None]
    maps = [(np.asarray(row.map), np.asarray(row.relevance)) for row in rows]
    sums = [(float(np.abs(seen).sum()), float(np.abs(read).sum())) for seen, read in maps]
    shares = [[pair[i] / (sum(pair) or 1.0) for pair in sums] for i in range(2)]
    seen, read = (torch.tensor(np.stack([pair[i].reshape(-1) for pair in maps])) for i in range(2))
    parts = [
        Part("picture", seen, shares[0], pictures=[picture], heats=heats),
        Part("text", read, shares[1], rows[0].tokens),
    ]
    return page_of(parts, [title(row) for row in rows], style)


def title(row: Row) -> str:
    """A target with its probability, or its logit where there is none."""
    chance = f"{row.logit:.2f}" if row.probability is None else f"{row.probability:.0%}"
    return f"{row.target_name} ({chance})"


def noise_floor(rows: Sequence[Row]) -> str:
    """A line on how far the maps depend on rounding, where that was measured."""
    if rows[0].noise is None:
        return ""
    floors = ", ".join(f"{100 * (row.noise or 0):.2g} %" for row in rows)
    return (
        f"\n  noise floor: {floors} (how far rounding alone moves these maps; under --rules positive it is next to nothing)"
    )


def _scaled(row: Row, picture: Image.Image) -> np.ndarray:
    """A map [gh, gw] as `Explanation.heatmap` scales it, in the picture's size."""
    if row.map is None:
        raise InputError("this method gives no map over the picture for this model")
    x = torch.tensor(row.map, dtype=torch.float32)[None, None]
    return F.interpolate(x, size=(picture.height, picture.width), mode="bilinear", align_corners=False)[0, 0].numpy()


def raw(rows: Sequence[Row]) -> bytes:
    """target, relevance and (pictures) patches [K, …], logits [C]; of a text in windows the target and window of each row."""
    arrays: dict[str, Any] = {
        "target": [row.target for row in rows],
        "window": [row.window for row in rows],
        "logits": rows[0].logits,
    }
    relevance = [row.relevance for row in rows]
    if len({len(x) for x in relevance if x is not None}) == 1:
        arrays["relevance"] = relevance
    else:
        arrays |= {f"relevance{i}": x for i, x in enumerate(relevance)}
    if rows[0].map is not None:
        arrays["patches"] = [row.map for row in rows]
    return npz(arrays)


def npz(arrays: Mapping[str, Any]) -> bytes:
    """An .npz file of these arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(value) for name, value in arrays.items()})  # type: ignore[arg-type]
    return buffer.getvalue()
