"""A folder of results: Parquet parts of a few hundred items each, whole or not there, so that nothing is lost or done twice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fastrel.batch import table as tables
from fastrel.data import files
from fastrel.data.inputs import Item
from fastrel.data.tables import pa, pq
from fastrel.errors import InputError

SETTINGS = "_settings.json"

#: Items of a part: what a kill can cost, and what is held in memory.
PART = 256


@dataclass(frozen=True)
class Task:
    """Items that become the file `name`, or that replace their failures in it."""

    name: str
    items: tuple[Item, ...]


class Store:
    """The results of a run over a data set, of one shard of it; a context manager that keeps other processes out.

    Raises:
        InputError: the folder holds results of other settings, or another process is writing this shard.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any], shard: tuple[int, int] = (0, 1)) -> None:
        self.folder = files.folder(folder)
        self.shard = shard
        self._stack = ExitStack()
        self._settle(json.loads(json.dumps(dict(settings))))

    def __enter__(self) -> Store:
        name = self._prefix()
        if not self._stack.enter_context(files.locked(self.folder / f".{name}.lock")):
            raise InputError(f"another process is writing {name} of {self.folder}")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def tasks(self, items: Sequence[Item], retry: bool, size: int = PART) -> list[Task]:
        """What is left to do of these items, in their order; with `retry`, also what failed.

        A part is `size` neighbours, whichever of them were done before it: an item is always explained in the same company,
        so that its numbers do not depend on where a run was interrupted.
        """
        mine = items[self.shard[0] :: self.shard[1]]
        wanted = {item.name: item for item in mine}
        done: set[str] = set()
        again = []
        for path in parts(self.folder):
            table = pq.read_table(path, columns=["item", "error"])
            names, errors = table.column("item").to_pylist(), table.column("error").to_pylist()
            done.update(names)
            failed = dict.fromkeys(n for n, error in zip(names, errors, strict=True) if error is not None and n in wanted)
            if retry and failed:
                again.append(Task(path.name, tuple(wanted[name] for name in failed)))
        used = {number for path in parts(self.folder) if (number := self._number(path.name)) is not None}
        whole: dict[int, Sequence[Item]] = {}
        single: list[Item] = []
        for number, at in enumerate(range(0, len(mine), size)):
            part = mine[at : at + size]
            left = [item for item in part if item.name not in done]
            if len(left) == len(part) and number not in used:
                whole[number] = part
            else:  # the data set was another one when its neighbours were done
                single += left
        first = 1 + max({*used, *whole}, default=-1)
        whole |= {first + i: single[at : at + size] for i, at in enumerate(range(0, len(single), size))}
        return again + [Task(f"{self._prefix()}-{number:06d}.parquet", tuple(part)) for number, part in whole.items()]

    def put(self, task: Task, table: Any) -> None:
        """Keep the rows of a task."""
        path = self.folder / task.name
        if path.exists():
            table = _merged(pq.read_table(path), table)
        files.write(path, tables.encode(table))

    def _settle(self, wanted: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        if not path.exists() and any(parts(self.folder)):
            raise InputError(f"{self.folder} holds results but no {SETTINGS}; choose another --out")
        files.create(path, json.dumps(wanted, indent=1) + "\n")  # other shards may be starting
        made_from = settings(self.folder)
        different = sorted(key for key in {*made_from, *wanted} if made_from.get(key) != wanted.get(key))
        if different:
            was, now = ({key: found.get(key) for key in different} for found in (made_from, wanted))
            raise InputError(f"{self.folder} holds results made with {was}, not {now}; choose another --out")

    def _prefix(self) -> str:
        return f"shard-{self.shard[0]}-of-{self.shard[1]}"

    def _number(self, name: str) -> int | None:
        found = re.fullmatch(re.escape(self._prefix()) + r"-(\d+)\.parquet", name)
        return int(found[1]) if found else None


def parts(folder: Path) -> list[Path]:
    """The files of results, in order."""
    return sorted(folder.glob("shard-*-of-*-*.parquet"))


def settings(folder: Path) -> dict[str, Any]:
    """What the results in a folder were made from.

    Raises:
        InputError: it is no folder of results.
    """
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no folder of results: {SETTINGS}: {error}") from error


def failures(folder: Path) -> Iterator[tuple[str, str]]:
    """(item, reason) of every item that failed."""
    for path in parts(folder):
        table = pq.read_table(path, columns=["item", "error"])
        for item, error in zip(table.column("item").to_pylist(), table.column("error").to_pylist(), strict=True):
            if error is not None:
                yield item, error


def _merged(old: Any, new: Any) -> Any:
    """The old rows, those of the new items replaced where they stood."""
    names = old.column("item").to_pylist()
    places: dict[str, list[int]] = {}
    for i, name in enumerate(new.column("item").to_pylist()):
        places.setdefault(name, []).append(i)
    pieces = []
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name not in places:
            pieces.append(old.slice(i, 1))
        elif name not in seen:
            seen.add(name)
            pieces += [new.slice(j, 1) for j in places[name]]
    return pa.concat_tables([piece.cast(new.schema) for piece in pieces]).combine_chunks()
