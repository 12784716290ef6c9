"""How requests and answers pass between processes: a JSON header and arrays or bytes, nothing that could run code."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

#: What is asked for: an explanation, a prediction, or the self-test of the artefact.
Want: TypeAlias = Literal["explain", "predict", "canary"]


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray | bytes] | None = None) -> bytes:
    """A header and named arrays as bytes."""
    parts: list[bytes] = []
    listed = []
    for name, value in (arrays or {}).items():
        data = value if isinstance(value, (bytes, bytearray)) else np.ascontiguousarray(value)
        raw = bytes(data) if isinstance(data, (bytes, bytearray)) else data.tobytes()
        kind = None if isinstance(data, (bytes, bytearray)) else [str(data.dtype), list(data.shape)]
        listed.append([name, len(raw), kind])
        parts.append(raw)
    head = json.dumps({"header": dict(header), "arrays": listed}).encode()
    return b"".join([struct.pack("!I", len(head)), head, *parts])


def unpack(data: bytes | bytearray) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `pack` packed: the header, and arrays and bytes by name."""
    (size,) = struct.unpack_from("!I", data)
    content = json.loads(bytes(data[4 : 4 + size]))
    at, arrays = 4 + size, {}
    for name, length, kind in content["arrays"]:
        raw = bytes(data[at : at + length])
        arrays[name] = raw if kind is None else np.frombuffer(raw, kind[0]).reshape(kind[1])
        at += length
    return content["header"], arrays


@dataclass(frozen=True)
class Work:
    """A decoded request.

    Attributes:
        classes: those to explain, ranks among them as `fastrel.artefact.metadata.RANK` has it.
        deadline: on the monotonic clock of this machine, after which nobody waits.
        sample: one array per input of the artefact, without its batch.
        header: goes back with the answer: notes, times, and (texts) tokens.
        picture: RGB as the model sees it, if it was asked for.
        method: which of the artefacts of the service explains it.
    """

    want: Want
    classes: tuple[int, ...]
    deadline: float
    sample: tuple[np.ndarray, ...] = ()
    header: Mapping[str, Any] = field(default_factory=dict)
    picture: np.ndarray | None = None
    method: int = 0


@dataclass(frozen=True)
class Answer:
    """What a request gets: `status` 200 with logits [C] and, if explained, classes [K], ok [K] and maps [K, gh, gw] or [K, T]; or
    another status, with `error`."""

    status: int = 200
    error: str = ""
    header: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """For the wire."""
        return pack({"status": self.status, "error": self.error, **self.header}, self.arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> Answer:
        """From the wire."""
        header, arrays = unpack(data)
        return cls(header.pop("status"), header.pop("error"), header, arrays)
