"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def long_fields(limit: int) -> Iterator[None]:
    """Fields of CSV may have so many characters in the block; Python's limit, 131,072, is one for the whole process."""
    before = csv.field_size_limit(limit)
    try:
        yield
    finally:
        csv.field_size_limit(before)


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path of the same suffix beside `path`, moved there if the block ends well and removed if not.

    No other process has the same one, on whatever machine that shares the folder.

    Raises:
        OSError: as the file system has it, with `path` in it; one that is not the file system's (without `errno`) as it is.
    """
    target = Path(path)
    temporary = _temporary(target)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a whole file, text in UTF-8."""
    with replaced(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def create(path: str | os.PathLike[str], content: str) -> None:
    """Write a whole file unless there is one; of several who try at once the first one's stays."""
    target = Path(path)
    temporary = _temporary(target)
    try:
        temporary.write_bytes(content.encode())
        try:
            os.link(temporary, target)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not target.exists():
                os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    """A path beside it that no other process has, on whatever machine that shares the folder."""
    return target.with_name(f".tmp-{uuid.uuid4().hex}{target.suffix}")


def folder(path: str | os.PathLike[str]) -> Path:
    """The folder at `path`, made if there is none.

    Raises:
        OSError: a file is in the way, or it cannot be made.
    """
    found = Path(path)
    if found.exists() and not found.is_dir():
        raise NotADirectoryError(20, "is a file, a folder is needed", str(found))
    found.mkdir(parents=True, exist_ok=True)
    return found


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[bool]:
    """Hold the lock file at `path`, released even by a kill; False: another process has it. True where there are no locks."""
    try:
        import fcntl
    except ImportError:
        yield True
        return
    with open(path, "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError:  # a file system without locks
            yield True
            return
        yield True
