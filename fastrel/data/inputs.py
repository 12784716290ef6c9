"""What is to be explained, as people name it: files, folders, patterns, lists, tables, archives, data sets on disk.

`find` turns it into items: a name that nothing else has and where the content is; nothing is opened but tables and the
directories of archives. Needs no torch; tables need pyarrow.
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fastrel.data import files, pictures
from fastrel.errors import InputError

#: What the items hold.
Content: TypeAlias = Literal["image", "text"]

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
TEXTS = frozenset({".txt", ".md"})


@dataclass(frozen=True)
class File:
    """A file of its own."""

    path: str

    def load(self) -> bytes:
        """Its bytes."""
        return pictures.file_bytes(self.path)


@dataclass(frozen=True)
class Slice:
    """A part of a file: a member of a tar archive."""

    path: str
    offset: int
    size: int

    def load(self) -> bytes:
        """Its bytes."""
        if self.size > pictures.MAX_BYTES:
            raise InputError(f"{self.size} bytes; at most {pictures.MAX_BYTES} are read")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            found = file.read(self.size)
        if len(found) < self.size:
            raise InputError(f"the archive ends {self.size - len(found)} bytes too early")
        return found


@dataclass(frozen=True)
class Value:
    """Content that is already here: a text, or the bytes of a picture."""

    content: str | bytes

    def load(self) -> str | bytes:
        """It."""
        return self.content


@dataclass(frozen=True)
class Cell:
    """A picture inside a Parquet file or a data set on disk."""

    path: str
    column: str
    row: int

    def load(self) -> bytes:
        """Its bytes, or those of the file that it names."""
        from fastrel.data import tables

        found = tables.cell(self.path, self.column, self.row)
        if isinstance(found, dict):  # the picture type of Hugging Face data sets
            found = found.get("bytes") or found.get("path")
        if isinstance(found, str):
            return pictures.file_bytes(os.path.join(os.path.dirname(self.path), found))
        if not isinstance(found, bytes):
            raise InputError(f"column {self.column!r} holds {type(found).__name__}, not a picture's bytes or path")
        return found


@dataclass(frozen=True)
class Broken:
    """An item that is known to be there and cannot be had."""

    reason: str

    def load(self) -> bytes:
        """Raises InputError with the reason."""
        raise InputError(self.reason)


@dataclass(frozen=True)
class Pair:
    """A text or a picture, and the text that a model reads together with it."""

    first: File | Slice | Value | Cell
    second: str

    def load(self) -> tuple[str | bytes, str]:
        """Both."""
        return self.first.load(), self.second


Where: TypeAlias = File | Slice | Value | Cell | Pair | Broken


@dataclass(frozen=True)
class Item:
    """One thing to explain. Its name is how it was given: a path, ARCHIVE/MEMBER, or TABLE:ROW, rows counted from 0."""

    name: str
    where: Where


@dataclass(frozen=True)
class Found:
    """Items in a fixed order, each name once; ignored: how many files in folders and archives hold something else."""

    items: list[Item]
    ignored: int


def find(given: Sequence[str], content: Content, column: str | None = None, pair: str | None = None) -> Found:
    """The items in what was given.

    Args:
        given: files, folders (searched for files of the kind, sub-folders too), patterns, `@FILE` (a list of these, one a
            line), .csv, .tsv, .jsonl and .parquet tables, .tar archives, and data sets as Hugging Face's `save_to_disk`
            writes them. What does not exist becomes an item that fails.
        content: "image" or "text".
        column: of tables and data sets: paths (relative to the table) or pictures, or texts.
        pair: of tables and data sets: the column of texts that go with these.

    Raises:
        InputError: a list or table that cannot be read, or without such a column; files of their own where pairs are asked for.
    """
    items: dict[str, Item] = {}
    ignored = 0
    for argument in _arguments(given):
        for item in _items(argument, content, column, pair):
            if item is not None and pair is not None and not isinstance(item.where, (Pair, Broken)):
                raise InputError(f"{item.name!r} is no table; pairs are read from columns of tables and data sets")
            if item is None:
                ignored += 1
            else:
                name = os.fsencode(item.name).decode("utf-8", "backslashreplace")  # file names need not be UTF-8
                items.setdefault(name, replace(item, name=name))
    return Found(list(items.values()), ignored)


def locate(name: str, content: Content, column: str | None = None, pair: str | None = None) -> Item:
    """The item that `find` gave this name.

    Raises:
        InputError: it is not there any more.
    """
    if content == "image" and os.path.isfile(name):
        return Item(name, File(name))
    container = name
    while container and not os.path.isfile(container):
        shorter = container[: max(container.rfind(":"), container.rfind("/"))]
        if len(shorter) == len(container) - 1 or os.path.isdir(container):
            break
        container = shorter
    for item in find([container], content, column, pair).items:
        if item.name == name:
            return item
    raise InputError(f"{name!r} is not there any more, seen from this folder")


def _arguments(given: Iterable[str]) -> Iterator[str]:
    for argument in given:
        if not argument.startswith("@") or os.path.lexists(argument):
            yield argument
            continue
        try:
            lines = Path(argument[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the list {argument[1:]!r} cannot be read: {error}") from error
        yield from (line.strip() for line in lines if line.strip())


def _items(argument: str, content: Content, column: str | None, pair: str | None) -> Iterator[Item | None]:
    path = os.path.normpath(argument) if argument else argument
    if os.path.isdir(path):
        dataset = any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json"))
        yield from _dataset(path, content, column, pair) if dataset else _folder(path, content)
    elif not os.path.lexists(path) and glob.has_magic(argument):
        matches = sorted(glob.glob(argument, recursive=True))
        if not matches:
            yield Item(argument, Broken("no file fits this pattern"))
        for match in matches:
            yield from _items(match, content, column, pair)
    elif os.path.isfile(path) and path.lower().endswith(TABLES):
        yield from _table(path, content, column, pair)
    elif os.path.isfile(path) and _is_archive(path):
        yield from _archive(path, content)
    else:
        yield Item(path, File(path))


def _wanted(name: str, content: Content) -> bool:
    return os.path.splitext(name)[1].lower() in (pictures.SUFFIXES if content == "image" else TEXTS)


def _folder(folder: str, content: Content) -> Iterator[Item | None]:
    unreadable: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=unreadable.append):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(parent, name)
            yield Item(path, File(path)) if _wanted(name, content) else None
    yield from (Item(str(e.filename), Broken(f"this folder cannot be read: {e.strerror}")) for e in unreadable)


def _is_archive(path: str) -> bool:
    return path.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"))


def _archive(path: str, content: Content) -> Iterator[Item | None]:
    if not path.lower().endswith(".tar"):
        yield Item(path, Broken("a compressed archive cannot be read at any place; unpack it to a .tar"))
        return
    members: dict[str, Slice | Broken | None] = {}  # of several of one name the last, as unpacking leaves it
    torn = None
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isdir():
                    members[member.name] = _member(path, member, members)
    except (tarfile.TarError, OSError) as error:
        torn = Item(path, Broken(f"not a whole tar archive: {error}"))
    for name, where in members.items():
        yield None if where is None or not _wanted(name, content) else Item(f"{path}/{name}", where)
    if torn is not None:
        yield torn


def _member(path: str, member: tarfile.TarInfo, before: Mapping[str, Slice | Broken | None]) -> Slice | Broken | None:
    """Where its content is; of a hard link that of the member that it names; None: it is no file whose bytes lie together."""
    if member.islnk():
        return before.get(member.linkname, Broken(f"a link to {member.linkname!r}, which is not before it in the archive"))
    return Slice(path, member.offset_data, member.size) if member.isfile() and not member.issparse() else None


def _table(path: str, content: Content, column: str | None, pair: str | None) -> Iterator[Item]:
    if path.lower().endswith(".parquet"):
        from fastrel.data import tables

        found = [tables.column(path, name) for name in (column, pair)]
        yield from _rows(path, path, tables.columns(path), found, content, (column, pair))
        return
    try:
        with files.long_fields(pictures.MAX_BYTES), open(path, newline="", encoding="utf-8-sig") as file:
            if path.lower().endswith((".csv", ".tsv")):
                rows: list[Any] = list(csv.DictReader(file, delimiter="\t" if path.lower().endswith(".tsv") else ","))
            else:
                rows = [_object(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"the table {path!r} cannot be read: {error}") from error
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row if name is not None))
    values: list[Any] = [None if name is None else [_entry(row, name) for row in rows] for name in (column, pair)]
    yield from _rows(path, path, names, values, content, (column, pair))


def _object(number: int, line: str) -> dict[str, Any] | Broken:
    """A line of a table of JSON objects."""
    try:
        found = json.loads(line)
    except ValueError as error:
        return Broken(f"line {number} is not JSON: {error}")
    return found if isinstance(found, dict) else Broken(f"line {number} is no JSON object, but {found!r:.60}")


def _entry(row: dict[str, Any] | Broken, column: str) -> Any:
    if isinstance(row, Broken):
        return row
    return row[column] if column in row else Broken(f"there is no {column!r}, but {', '.join(map(str, row)) or 'nothing'}")


def _dataset(folder: str, content: Content, column: str | None, pair: str | None) -> Iterator[Item]:
    from fastrel.data import tables

    for name, file in tables.dataset_files(folder):
        values = [tables.column(file, one) for one in (column, pair)]
        yield from _rows(name, file, tables.columns(file), values, content, (column, pair))


def _rows(
    name: str,
    file: str,
    names: Sequence[str],
    values: Sequence[Iterable[Any] | None],
    content: Content,
    columns: tuple[str | None, str | None],
) -> Iterator[Item]:
    """An item per row; `columns` of what is explained and of the texts that go with it, which need not be there, and their values."""
    column, pair = columns
    for one, asked in ((column, "say which column holds what is to be explained"), (pair, None)):
        if (one is None and asked) or (one is not None and one not in names):
            raise InputError(
                f"{name!r}: {asked if one is None else f'there is no column {one!r}'}; its columns are {', '.join(names)}"
            )
    assert column is not None
    first = values[0] or ()
    second: Iterable[Any] = itertools.repeat(None) if pair is None else values[1] or ()
    for row, (value, text) in enumerate(zip(first, second, strict=False)):
        where = _where(file, column, row, value, content)
        yield Item(f"{name}:{row}", where if pair is None else _with(where, pair, text))


def _with(where: Where, column: str, text: Any) -> Where:
    """What is explained together with a text."""
    if isinstance(where, (Broken, Pair)):
        return where
    if isinstance(text, Broken):
        return text
    return Pair(where, text) if isinstance(text, str) else Broken(f"{column!r} holds {text!r:.60}, not a text")


def _where(file: str, column: str, row: int, value: Any, content: Content) -> Where:
    if isinstance(value, Broken):
        return value
    if content == "text":
        return Value(value) if isinstance(value, str) else Broken(f"{column!r} holds {value!r:.60}, not a text")
    if isinstance(value, str) and value:
        return File(os.path.join(os.path.dirname(file), value))
    if value is Ellipsis:  # a picture inside the table, left there until it is asked for
        return Cell(file, column, row)
    return Broken(f"{column!r} holds {value!r}, neither a path nor a picture")
