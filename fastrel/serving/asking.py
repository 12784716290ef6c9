"""What a request asks for, from its query and body; whatever is wrong is said with the value that is."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrel.artefact.metadata import RANK, Metadata
from fastrel.errors import FastrelError, InputError
from fastrel.models.loaded import class_index
from fastrel.serving.answers import TOP
from fastrel.serving.service import Service

#: What a request may say besides the picture or the text, in its query or in JSON.
OPTIONS = ("target", "top", "timeout_ms", "opacity", "method")


class Refusal(FastrelError):
    """A request that is not answered: HTTP status, reason for the metrics, and a message for the client."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Asked:
    """Bytes of a picture, or of a text in UTF-8; classes, ranks among them; how long the client waits; how strong an overlay is; by
    which of the service's artefacts; how many of the highest classes are named; a second text that is read with the first."""

    body: bytes
    classes: tuple[int, ...]
    timeout_ms: int
    opacity: float = 0.75
    method: int = 0
    top: int = TOP
    pair: bytes = b""


def asked(
    query: Sequence[tuple[str, str]],
    content_type: str,
    body: bytes,
    about: Metadata,
    service: Service,
    explains: bool,
    methods: Sequence[str] = (),
) -> Asked:
    """What a request asks for; `methods` are the names of the service's artefacts.

    Raises:
        Refusal: 400 where the request itself is malformed, 422 where what it names does not exist or does not fit.
    """
    if not body:
        raise Refusal(400, "empty", 'the body is empty; send a picture\'s bytes, or JSON with "image" (base64) or "text"')
    content, named = _content(content_type, body, about)
    given: dict[str, Any] = {name: named[name] for name in OPTIONS if name in named}
    for name in OPTIONS:
        values = [value for key, value in query if key == name]
        if values and name in given:
            raise Refusal(
                422, "query", f"{name} is {given[name]!r} in the JSON and {values[-1]!r} in the query; give it once"
            )
        if len(values) > 1 and name != "target":
            raise Refusal(422, "query", f"{name} is given as {' and as '.join(values)}; give it once")
        if values:
            given[name] = values if name == "target" else values[-1]
    pair = _pair(named, about)
    unknown = sorted(({key for key, _ in query} | {*named}) - {*OPTIONS, "image", "text", "text_pair"})
    if unknown:
        raise Refusal(400, "query", f"unknown option {unknown[0]!r}; there are {', '.join(OPTIONS)}")
    timeout = _whole(given.get("timeout_ms", service.timeout_ms), "timeout_ms", 1, service.timeout_ms)
    try:
        opacity = float(given.get("opacity", 0.75))
    except (TypeError, ValueError, OverflowError):
        opacity = -1.0
    if not 0 <= opacity <= 1:
        raise Refusal(422, "query", f"opacity {given['opacity']!r} is no number from 0 to 1")
    method = given.get("method")
    if method is not None and method not in methods:
        raise Refusal(
            422, "query", f"method {method!r} is not served; there are {', '.join(methods) or 'none to choose from'}"
        )
    number = 0 if method is None else methods.index(method)
    if explains:
        return Asked(content, _classes(given, about, service), timeout, opacity, number, pair=pair)
    for name in ("target", "opacity", "method"):
        if name in given:
            raise Refusal(422, "query", f"{name}={given[name]!r} is for /explain; /predict takes top and timeout_ms")
    top = _whole(given.get("top", min(TOP, about.classes)), "top", 1, about.classes)
    return Asked(content, (), timeout, top=top, pair=pair)


def _pair(named: Mapping[str, Any], about: Metadata) -> bytes:
    """The second text of JSON, in UTF-8; nothing where none is given."""
    if "text_pair" not in named:
        return b""
    given = named["text_pair"]
    if about.kind != "text":
        what = "pictures" if about.kind == "image" else "one text"
        raise Refusal(422, "query", f"text_pair is for classifiers of two texts; this model reads {what}")
    if not isinstance(given, str) or not given.strip():
        raise Refusal(422, "query", f"text_pair {given!r:.60} is no text")
    return given.encode("utf-8", "replace")


def _content(content_type: str, body: bytes, about: Metadata) -> tuple[bytes, Mapping[str, Any]]:
    text = about.kind != "image"
    wanted = "text" if text else "image"
    if content_type != "application/json":
        if content_type == "multipart/form-data":
            raise Refusal(400, "malformed", "a form; send the bytes themselves (curl --data-binary @FILE), or JSON")
        if not text and body.lstrip()[:1] == b"{":
            raise Refusal(400, "malformed", "JSON without its name; say Content-Type: application/json")
        if text:
            try:
                body.decode()
            except UnicodeDecodeError as error:
                raise Refusal(400, "malformed", f"the body is no text in UTF-8: {error}") from error
        return body, {}
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "malformed", f"the body is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get(wanted), str):
        shown = (
            {key: type(value).__name__ for key, value in found.items()} if isinstance(found, dict) else type(found).__name__
        )
        raise Refusal(400, "malformed", f'the JSON must be an object in which "{wanted}" is a string; given was {shown}')
    if text:
        return found["text"].encode("utf-8", "replace"), found
    try:
        return base64.b64decode(re.sub(r"^data:[\w/+.-]+;base64,", "", found["image"]), validate=True), found
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, "malformed", f'"image" is not base64: {error}') from error


def _classes(given: Mapping[str, Any], about: Metadata, service: Service) -> tuple[int, ...]:
    if "target" in given and "top" in given:
        raise Refusal(422, "target", f"give target={given['target']!r} or top={given['top']!r}, not both")
    if "target" not in given:
        return tuple(range(RANK, RANK + _whole(given.get("top", 1), "top", 1, min(service.max_targets, about.classes))))
    words = given["target"] if isinstance(given["target"], list) else [given["target"]]
    parts = [part for word in words for part in (str(word).split(",") if re.fullmatch(r"[\d,\s-]+", str(word)) else [word])]
    if (
        not parts
        or any(part == "" for part in parts)
        or not all(isinstance(part, (str, int)) and not isinstance(part, bool) for part in parts)
    ):
        raise Refusal(422, "target", f"target {given['target']!r} is no class, and no list of classes")
    if len(parts) > service.max_targets:
        raise Refusal(422, "target", f"{len(parts)} targets; at most {service.max_targets} are explained at a time")
    names = about.class_names or tuple(map(str, range(about.classes)))
    try:
        return tuple(class_index(str(part).strip(), names) for part in parts)
    except InputError as error:
        raise Refusal(422, "target", str(error)) from error


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if not re.fullmatch(r"\d{1,9}", str(value)) or not low <= int(value) <= high:
        raise Refusal(422, "query", f"{name} {value!r} is no whole number from {low} to {high}")
    return int(value)
