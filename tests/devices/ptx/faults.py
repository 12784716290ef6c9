"""What goes wrong in a kernel, and where."""

from __future__ import annotations

import numpy as np


class PtxError(Exception):
    """A kernel that did what no kernel may, with its name, the line of PTX, its source, and one thread that did."""


class UnknownInstructionError(PtxError):
    """An instruction that the emulator has no semantics for."""


class Fault(Exception):
    """Raised where the rule is known; the machine adds what was executed.

    Attributes:
        threads: numbers of the threads that broke the rule, among those of all blocks
    """

    def __init__(self, message: str, threads: np.ndarray) -> None:
        super().__init__(message)
        self.threads = threads


def require(holds: np.ndarray, threads: np.ndarray, message: str) -> None:
    """A rule for every one of `threads`.

    Raises:
        Fault: it does not hold for some.
    """
    if not holds.all():
        raise Fault(message, threads[~holds])
