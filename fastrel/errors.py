"""Errors that fastrel raises. Each message quotes the offending value and says what to do about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class FastrelError(Exception):
    """Base of all errors that fastrel raises on purpose."""


class InputError(FastrelError, ValueError):
    """An input, a target or an option that cannot be used."""


class CaptureError(FastrelError, RuntimeError):
    """The model cannot be captured as a graph.

    Attributes:
        details: what torch said while it tried, in full; empty if nothing.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class UnsupportedModelError(FastrelError, RuntimeError):
    """The captured graph holds something that has no relevance rule here."""


@contextlib.contextmanager
def needed(by: str, extra: str) -> Iterator[None]:
    """Around imports of what only some need: says how to install it.

    Raises:
        InputError: it is not installed, or does not fit what is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f'{by} needs {error.name}: pip install "fastrel[{extra}]"') from error
    except ImportError as error:  # it is there, and does not fit
        raise InputError(f"{by} fails to import what it needs: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: BaseException) -> str:
    """An error on one line; the kind of those that are not fastrel's own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FastrelError) else f"{type(error).__name__}: {text}"
