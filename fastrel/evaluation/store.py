"""Scores on disk, one line each, written as they come."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from fastrel.data import files
from fastrel.errors import InputError

_FIELDS = ["item", "group", "configuration", "scorer", "metric", "value"]
_END = "end"


class Score(NamedTuple):
    """One number: what `configuration` reached on `item` by `metric`, one of those that `scorer` gives."""

    item: str
    group: str
    configuration: str
    scorer: str
    metric: str
    value: float


Key = tuple[str, str, str]


class Store:
    """The scores of one evaluation in a folder: scores.csv, and settings.json with what they were made from.

    An item's scores by one scorer are a group: its lines are written together, and a last one holds their number. Whatever is
    no whole group (a line cut off by a full disk, bytes that are no text, two runs at once) is dropped as a whole, and the file
    then put in order at once (written beside it and moved), so that a run that goes on computes exactly what is missing. A
    context manager that keeps other processes out of the folder.

    Raises:
        InputError: the folder holds scores made from other settings, or another run is writing to it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        files.folder(folder)
        self.path = folder / "scores.csv"
        self._stack = ExitStack()
        if not self._stack.enter_context(files.locked(folder / ".lock")):
            raise InputError(f"another evaluation is writing to {folder}")
        try:
            _settle(folder, json.loads(json.dumps(dict(settings))), self.path.exists())
            self.scores = self._load()
        except BaseException:
            self._stack.close()
            raise
        self._done = {(s.item, s.configuration, s.scorer) for s in self.scores}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def done(self, item: str, configuration: str, scorer: str) -> bool:
        """Whether these scores are there."""
        return (item, configuration, scorer) in self._done

    def add(self, scores: Sequence[Score]) -> None:
        """Keep the scores that one scorer gives for one item and configuration.

        Raises:
            OSError: they cannot be written; the file is as before.
        """
        before = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(_lines(_group(scores)))
                file.flush()
        except OSError:
            os.truncate(self.path, before)
            raise
        self.scores += scores
        self._done.add((scores[0].item, scores[0].configuration, scores[0].scorer))

    def _load(self) -> list[Score]:
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = dict(_groups(content))
        ordered = _lines([_FIELDS, *(line for scores in whole.values() for line in _group(scores))])
        if content != ordered:
            files.write(self.path, ordered)
        return [score for scores in whole.values() for score in scores]


def _settle(folder: Path, wanted: dict[str, Any], scores: bool) -> None:
    """Keep the settings, or compare them with those that are kept."""
    path = folder / "settings.json"
    made_from = None
    if path.exists():
        try:
            made_from = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            if scores:
                raise InputError(f"{path} is damaged ({error}), so what made the scores is not known; mend it, or choose "
                                 "another --out") from error  # fmt: skip
    if made_from is None:
        files.write(path, json.dumps(wanted, indent=1) + "\n")
    elif made_from != wanted:
        different = sorted(key for key in {*made_from, *wanted} if made_from.get(key) != wanted.get(key))
        was, now = ({key: found.get(key) for key in different} for found in (made_from, wanted))
        raise InputError(f"{folder} holds scores made with {was}, not {now}; choose another --out")


def _group(scores: Sequence[Score]) -> Iterator[Sequence[Any]]:
    """The scores, and a last line with their number."""
    yield from scores
    yield scores[0]._replace(metric=_END, value=len(scores))


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _groups(content: bytes) -> Iterator[tuple[Key, list[Score]]]:
    """The whole groups of a file; a group that is there twice counts as it was first."""
    found: dict[Key, list[Score]] = {}
    pending: list[Score] = []
    for score in _scores(content):
        if pending and (score is None or _key(score) != _key(pending[0])):
            pending = []
        if score is None:
            continue
        if score.metric != _END:
            pending.append(score)
            continue
        if pending and score.value == len(pending):
            found.setdefault(_key(score), pending)
        pending = []
    yield from found.items()


def _key(score: Score) -> Key:
    return (score.item, score.configuration, score.scorer)


def _scores(content: bytes) -> Iterator[Score | None]:
    """The lines of a file; None for one that is not as `Store` writes them."""
    text = content.decode("utf-8", "replace").replace("\0", "\ufffd")
    with files.long_fields(len(text) + 1):  # a stray quote makes a field of all that follows
        rows = list(csv.reader(io.StringIO(text, newline="")))
    for row in filter(None, rows):
        try:
            score = Score(row[0], row[1], row[2], row[3], row[4], float(row[5])) if len(row) == 6 else None
        except ValueError:
            score = None
        yield None if score is None or any("\ufffd" in field for field in row) else score
