"""The stage that turns bytes into what the model reads. Its processes never import torch."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from mosec import Worker
from mosec.errors import ValidationError

from fastrel.artefact import metadata
from fastrel.artefact.reading import ReadsTexts, reader
from fastrel.data import pictures
from fastrel.errors import InputError
from fastrel.serving import wire
from fastrel.serving.service import Service
from fastrel.serving.wire import Work


class Decoding:
    """From what the front admitted to work for the explain stage; what cannot be read is refused here, and reaches no batch."""

    def __init__(self, service: Service) -> None:
        self._read: Any = reader(service.artefact, metadata.read(service.artefact))
        self._max_pixels = service.max_pixels

    def __call__(self, data: bytes | bytearray) -> Work:
        """Decode one request.

        Raises:
            InputError: it cannot be read; the message is for the client.
        """
        began = time.monotonic()
        header, arrays = wire.unpack(data)
        if header["want"] == "canary":
            return Work("canary", (), header["deadline"])
        if header["deadline"] < began:  # nobody waits for it
            raise InputError("the deadline passed before the request was decoded")
        text = isinstance(self._read, ReadsTexts)
        notes: tuple[str, ...] = ()
        picture, tokens = None, None
        if text:
            given, pair = arrays["body"].decode(), arrays["pair"].decode()
            (sample,) = [self._read((given, pair) if pair else given)]
            tokens = self._read.tokens(sample[0])
        else:
            found = pictures.read(arrays["body"], self._max_pixels)
            sample, notes = self._read(found.image), found.notes
            if header["picture"]:
                picture = np.asarray(self._read.prepare.seen(found.image).convert("RGB"))
        facts: dict[str, Any] = {"notes": list(notes), "decode_seconds": time.monotonic() - began}
        if text:
            facts["tokens"] = tokens
        classes, deadline, method = tuple(header["classes"]), header["deadline"], header.get("method", 0)
        return Work(header["want"], classes, deadline, tuple(sample), facts, picture, method)


class Decode(Worker):
    """`Decoding` as a stage of mosec."""

    def __init__(self) -> None:
        super().__init__()
        self._decoding = Decoding(Service.from_environment())

    def deserialize(self, data: bytes) -> bytes:
        """As it came."""
        return data

    def forward(self, data: bytes) -> Work:
        """Decode, or end the request with status 422, for mosec has no others, and the answer as its message."""
        try:
            return self._decoding(data)
        except InputError as error:
            raise ValidationError(json.dumps({"error": str(error)})) from error
