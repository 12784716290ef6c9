"""Where results of single items go: never over a file that is not theirs, and known again by the next run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from fastrel.data import files
from fastrel.data.inputs import File, Item
from fastrel.errors import InputError

LEDGER, LOCK = ".fastrel.jsonl", ".fastrel.lock"

#: Bytes of an item's own name in those of its files: file systems take 255, and numbers and endings follow.
_STEM = 200


class Outputs:
    """A folder of output files and the ledger of whose they are.

    A line is written before an item's files are, and another one after, so that a run that was killed between the two does
    the item again under the same names. A line that was cut off counts as not written. A context manager that keeps other
    processes out of the folder.

    Raises:
        InputError: another process is writing to it.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any]) -> None:
        self.folder = files.folder(folder)
        self._settings = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
        self._ledger = self.folder / LEDGER
        self._stack = ExitStack()
        if not self._stack.enter_context(files.locked(self.folder / LOCK)):
            raise InputError(f"another process is writing to {self.folder}; wait for it, or choose another --out")
        self._entries = self._read()
        self._stems = {entry["stem"]: item for item, entry in self._entries.items()}
        self._owner = {name: item for item, entry in self._entries.items() for name in entry["files"]}

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def done(self, item: Item) -> bool:
        """Whether its files are there, made from the same content with the same settings."""
        entry = self._entries.get(_key(item))
        return (
            entry is not None
            and entry["done"]
            and (entry["settings"], entry["content"]) == (self._settings, _content(item))
            and all(os.path.exists(self.folder / name) for name in entry["files"])
        )

    def claim(self, item: Item, endings: Sequence[str]) -> list[Path]:
        """Paths for an item's files, one per ending: its own stem, with a number where that is taken."""
        key = _key(item)
        plain = os.fsencode(Path(item.name).stem)[:_STEM].decode(errors="ignore") or "item"
        entry = self._entries.get(key)
        stem, number = entry["stem"] if entry else plain, 1
        while not self._free(stem, endings, key):
            number += 1
            stem = f"{plain}-{number}"
        self._write(key, item, stem, [stem + ending for ending in endings], done=False)
        return [self.folder / (stem + ending) for ending in endings]

    def finish(self, item: Item) -> None:
        """The item's files are written."""
        entry = self._entries[_key(item)]
        self._write(_key(item), item, entry["stem"], entry["files"], done=True)

    def _free(self, stem: str, endings: Sequence[str], key: str) -> bool:
        if self._stems.get(stem, key) != key:
            return False
        names = [stem + ending for ending in endings]
        return all(self._owner.get(name, None if os.path.exists(self.folder / name) else key) == key for name in names)

    def _write(self, key: str, item: Item, stem: str, names: Sequence[str], done: bool) -> None:
        entry = {
            "item": key,
            "stem": stem,
            "files": list(names),
            "settings": self._settings,
            "content": _content(item),
            "done": done,
        }
        self._entries[key] = entry
        self._stems[stem] = key
        self._owner.update(dict.fromkeys(names, key))
        with self._ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _read(self) -> dict[str, Any]:
        if not self._ledger.exists():
            return {}
        content = self._ledger.read_bytes()
        if content and not content.endswith(b"\n"):
            with self._ledger.open("ab") as file:
                file.write(b"\n")
        entries = {}
        for line in content.splitlines():
            try:
                entry = json.loads(line)
                entries[entry["item"]] = entry
            except (ValueError, KeyError, TypeError):
                continue
        return entries


def _key(item: Item) -> str:
    return os.path.abspath(item.name)


def _content(item: Item) -> str:
    """What tells that the content changed: size and time of a file, the place of what lies inside one."""
    try:
        found = os.stat(item.where.path) if isinstance(item.where, File) else None
    except (OSError, ValueError):
        return "none"
    if found is not None:
        return f"{found.st_size} {found.st_mtime_ns}"
    return hashlib.sha256(repr(item.where).encode(errors="backslashreplace")).hexdigest()
