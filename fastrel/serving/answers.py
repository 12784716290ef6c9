"""Answers in the type that the client accepts: JSON, an overlay as PNG, an Arrow stream."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastrel.artefact.metadata import Metadata
from fastrel.errors import InputError
from fastrel.render.overlay import overlay
from fastrel.serving.wire import Answer

JSON, PNG, ARROW = "application/json", "image/png", "application/vnd.apache.arrow.stream"

#: How many classes an answer names besides those explained.
TOP = 5

#: Pixels between pictures of several classes, and of the line with their names.
GAP, LINE = 8, 22

#: Smaller pictures are shown enlarged, a whole number of times.
SMALLEST = 224


def chosen(accept: str, about: Metadata, want: str) -> str | None:
    """The first type that is accepted and can be had; None: none."""
    possible = [JSON]
    if want == "explain":
        possible += [PNG] * (about.kind == "image" and about.maps[0].grid) + [ARROW]
    parts = [_weighed(part) for part in (accept.split(",") if accept.strip() else ["*/*"])]
    refused = {kind for weight, kind in parts if weight <= 0}
    for _, kind in sorted(parts, key=lambda part: -part[0]):
        for one in possible:
            if not refused & {one, kind} and kind in ("*/*", one, f"{one.partition('/')[0]}/*"):
                return one
    return None


def _weighed(part: str) -> tuple[float, str]:
    """A part of an Accept header: its weight, and the type."""
    kind, *parameters = (word.strip().lower() for word in part.split(";"))
    found = [word[2:] for word in parameters if word.startswith("q=")]
    try:
        return (float(found[0]) if found else 1.0), kind
    except ValueError:
        return 1.0, kind


def rendered(answer: Answer, about: Metadata, kind: str, opacity: float, top: int = TOP) -> bytes:
    """An answer with status 200 as bytes of a type; JSON names the `top` highest classes besides those explained.

    Raises:
        InputError: a picture is asked for of a map that could not be made.
    """
    return _RENDERERS[kind](answer, about, opacity, top)


def _named(about: Metadata, c: int) -> str:
    return about.class_names[c] if 0 <= c < len(about.class_names) else str(c)


def _chances(logits: np.ndarray, about: Metadata) -> np.ndarray | None:
    if about.probabilities == "softmax":
        e = np.exp(logits.astype(np.float64) - logits.max())
        return e / e.sum()
    return 1 / (1 + np.exp(-logits.astype(np.float64))) if about.probabilities == "sigmoid" else None


def _class(about: Metadata, logits: np.ndarray, chances: np.ndarray | None, c: int) -> dict[str, Any]:
    found: dict[str, Any] = {"class": c, "name": _named(about, c), "logit": _number(logits[c])}
    if chances is not None:
        found["probability"] = _number(chances[c])
    return found


def _number(x: Any) -> float | None:
    """As JSON has it, which knows no NaN."""
    return float(x) if np.isfinite(x) else None


def described(answer: Answer, about: Metadata, count: int = TOP) -> dict[str, Any]:
    """An answer as JSON."""
    logits = answer.arrays["logits"]
    chances = _chances(logits, about)
    top = [int(c) for c in logits.argsort()[::-1][:count]]
    found: dict[str, Any] = {"top": [_class(about, logits, chances, c) for c in top]}
    if "map" in answer.arrays:
        maps = []
        for c, ok, one in zip(*(answer.arrays[name] for name in ("classes", "ok", "map")), strict=True):
            entry = _class(about, logits, chances, int(c))
            entry |= {"ok": bool(ok), ("patches" if one.ndim == 2 else "relevance"): one.tolist() if ok else None}
            maps.append(entry)
        found["maps"] = maps
    for name in ("tokens", "notes"):
        if answer.header.get(name):
            found[name] = answer.header[name]
    return found | {"model": about.weights[:16], "method": about.options["method"]}


def _json(answer: Answer, about: Metadata, opacity: float, top: int) -> bytes:
    return json.dumps(described(answer, about, top), ensure_ascii=False).encode()


@functools.cache
def _font() -> Any:
    """For names of classes; it comes with Pillow."""
    return ImageFont.load_default(14)


def _png(answer: Answer, about: Metadata, opacity: float, top: int) -> bytes:
    """The picture as the model sees it with an overlay; of several classes one beside the other."""
    if not answer.arrays["ok"].all():
        raise InputError("the map could not be made: a value of the input or of the model's output is not finite")
    picture = Image.fromarray(answer.arrays["picture"])
    times = -(-SMALLEST // min(picture.size))
    picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    panels, names = [], [_named(about, int(c)) for c in answer.arrays["classes"]]
    for one in answer.arrays["map"]:
        heat = Image.fromarray(np.ascontiguousarray(one, np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
        panels.append(overlay(picture, np.asarray(heat), opacity))
    several = len(panels) > 1  # which then have their names below
    step = picture.width + GAP
    whole = Image.new("RGB", (step * len(panels) - GAP, picture.height + LINE * several), "white")
    draw = ImageDraw.Draw(whole)
    for i, (panel, name) in enumerate(zip(panels, names, strict=True)):
        whole.paste(panel, (i * step, 0))
        if several:
            fitting = next(
                (name[:n] for n in range(len(name), 0, -1) if draw.textlength(name[:n], _font()) <= picture.width), ""
            )
            draw.text((i * step, picture.height + 3), fitting, "black", _font())
    buffer = io.BytesIO()
    whole.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _arrow(answer: Answer, about: Metadata, opacity: float, top: int) -> bytes:
    """One row per class; the map a tensor [gh, gw], or (texts) a list beside the list of tokens."""
    import pyarrow as pa

    arrays, logits = answer.arrays, answer.arrays["logits"]
    chances = _chances(logits, about)
    classes = [int(c) for c in arrays["classes"]]
    columns: dict[str, Any] = {
        "target": pa.array(classes, pa.int64()),
        "target_name": pa.array([_named(about, c) for c in classes]),
        "logit": pa.array([float(logits[c]) for c in classes], pa.float32()),
        "probability": pa.array([None if chances is None else float(chances[c]) for c in classes], pa.float32()),
        "ok": pa.array(arrays["ok"].tolist()),
    }
    maps = np.ascontiguousarray(arrays["map"], np.float32)
    if maps.ndim == 3:
        columns["map"] = pa.FixedShapeTensorArray.from_numpy_ndarray(maps)
    else:
        columns["relevance"] = pa.array(list(maps), pa.list_(pa.float32()))
        if "tokens" in answer.header:
            columns["tokens"] = pa.array([answer.header["tokens"]] * len(classes))
    facts = {"weights": about.weights, **{name: str(value) for name, value in about.options.items()}}
    table = pa.table(columns).replace_schema_metadata(facts)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


_RENDERERS: dict[str, Callable[[Answer, Metadata, float, int], bytes]] = {JSON: _json, PNG: _png, ARROW: _arrow}
