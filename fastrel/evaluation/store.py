"""Scores on disk, one line each, written as they come."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastrel.errors import InputError

_FIELDS = ["item", "group", "configuration", "scorer", "metric", "value"]


class Score(NamedTuple):
    """One number: what `configuration` reached on `item` by `metric`, one of those that `scorer` gives."""

    item: str
    group: str
    configuration: str
    scorer: str
    metric: str
    value: float


class Store:
    """The scores of one evaluation in a folder: scores.csv, and settings.json with what they were made from.

    An item's scores by one scorer are written together and flushed. A line that was cut off is dropped, together with the
    scores that came with it, so that a run that goes on computes exactly what is missing.

    Raises:
        InputError: the folder holds scores made from other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "scores.csv"
        settings_path = folder / "settings.json"
        wanted = json.loads(json.dumps(dict(settings)))
        if settings_path.exists():
            made_from = json.loads(settings_path.read_text(encoding="utf-8"))
            different = sorted(key for key in {*made_from, *wanted} if made_from.get(key) != wanted.get(key))
            if different:
                was, now = ({key: found.get(key) for key in different} for found in (made_from, wanted))
                raise InputError(f"{folder} holds scores made with {was}, not {now}; choose another --out")
        settings_path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        self.scores = self._load()
        self._done = {(s.item, s.configuration, s.scorer) for s in self.scores}

    def _load(self) -> list[Score]:
        if not self.path.exists():
            self._write([_FIELDS], "w")
            return []
        groups: dict[tuple[str, str, str], list[Score]] = {}
        with self.path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                if line["metric"] == "end":
                    continue
                try:
                    score = Score(**{**line, "value": float(line["value"])})  # type: ignore[arg-type]
                except (TypeError, ValueError):
                    continue
                groups.setdefault((score.item, score.configuration, score.scorer), []).append(score)
        with self.path.open(newline="", encoding="utf-8") as file:
            ended = {
                (line["item"], line["configuration"], line["scorer"])
                for line in csv.DictReader(file)
                if line["metric"] == "end"
            }
        whole = {key: scores for key, scores in groups.items() if key in ended}
        if len(whole) < len(groups):
            self._write([_FIELDS], "w")
            for scores in whole.values():
                self._write(_lines(scores), "a")
        return [score for scores in whole.values() for score in scores]

    def done(self, item: str, configuration: str, scorer: str) -> bool:
        """Whether these scores are there."""
        return (item, configuration, scorer) in self._done

    def add(self, scores: list[Score]) -> None:
        """Keep the scores that one scorer gives for one item and configuration."""
        self._write(_lines(scores), "a")
        self.scores += scores
        self._done.add((scores[0].item, scores[0].configuration, scores[0].scorer))

    def _write(self, lines: list[Any], mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)


def _lines(scores: list[Score]) -> list[Any]:
    """The scores, and a last line that says they are complete."""
    return [*scores, scores[0]._replace(metric="end", value=len(scores))]
