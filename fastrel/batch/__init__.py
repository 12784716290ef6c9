"""Whole data sets: `fastrel batch`, `Explain` for loops and clusters of one's own, `read` for what they wrote.

Needs pyarrow: pip install "fastrel[batch]"; on Ray, pip install "fastrel[ray]".
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fastrel.batch.explain import Explain

if TYPE_CHECKING:
    from fastrel.batch.reading import Results


def read(folder: str | os.PathLike[str]) -> Results:
    """The results that `fastrel batch` wrote to a folder: `numpy()`, `torch()`, `pandas()`, `table()`, `failures`.

    Raises:
        InputError: there are none, or pyarrow is not installed.
    """
    from fastrel.batch import reading

    return reading.read(folder)


__all__ = ["Explain", "read"]
