"""From an item to what the model reads of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastrel.data import pictures
from fastrel.data.ahead import Failed, ahead
from fastrel.data.inputs import Item
from fastrel.errors import InputError, reason
from fastrel.models import Kind, Sample


@dataclass
class Decoded:
    """An item as the model reads it, one or (long texts) several samples; or the reason why not."""

    item: str
    sha256: str | None = None
    samples: list[Sample] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    error: str | None = None


def decode(item: Item, reader: Any, kind: Kind) -> Decoded:
    """One item; never raises."""
    digest = None
    try:
        content: Any = item.where.load()
        digest = _digest(content)
        if kind == "multimodal":
            picture = pictures.read(content[0])
            return Decoded(item.name, digest, reader((picture.image, content[1])), picture.notes)
        if isinstance(content, tuple):
            first, second = content
            return Decoded(item.name, digest, reader((_text(first), second)))
        if kind == "image":
            if not isinstance(content, bytes):
                raise InputError("this is a text, and the model reads pictures")
            picture = pictures.read(content)
            return Decoded(item.name, digest, reader(picture.image), picture.notes)
        return Decoded(item.name, digest, reader(_text(content)))
    except Exception as error:  # whatever is wrong with one item must not end the others
        return Decoded(item.name, digest, error=reason(error))


def _text(content: str | bytes) -> str:
    return content if isinstance(content, str) else content.decode("utf-8-sig")


def _digest(content: Any) -> str:
    """sha256 in hex; of a pair that of both digests."""
    if isinstance(content, tuple):
        content = "".join(map(_digest, content))
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def decoded(batches: Sequence[Sequence[Item]], reader: Any, kind: Kind, workers: int) -> Iterator[list[Decoded]]:
    """The batches in their order, decoded ahead in `workers` processes of their own; see `fastrel.data.ahead`."""
    stream = ahead(batches, partial(decode, reader=reader, kind=kind), workers)
    for batch, found in zip(batches, stream, strict=True):
        yield [
            Decoded(item.name, error=one.reason) if isinstance(one, Failed) else one
            for item, one in zip(batch, found, strict=True)
        ]
