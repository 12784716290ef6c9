"""Guard bands of NaN around buffers: a kernel that reads past an end computes NaN, one that writes there is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

BAND = 97


class Guards:
    """Buffers with bands, and whether the bands are as they were."""

    def __init__(self, empty: Callable[..., Tensor]) -> None:
        self._empty = empty
        self._bands: list[Tensor] = []

    def around(self, x: Tensor) -> Tensor:
        """A copy of x, strides and all, in the middle of a buffer of NaN (of ones for integers)."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        buffer = self.buffer(extent, x.dtype)
        inner = buffer[BAND : BAND + extent].as_strided(x.shape, x.stride(), BAND)
        return inner.copy_(x)

    def buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        """`count` numbers that nobody has set yet, between bands."""
        buffer = self._empty(count + 2 * BAND, dtype=dtype)
        buffer.fill_(torch.nan if dtype.is_floating_point else 1)
        if dtype.is_floating_point:
            self._bands += [buffer[:BAND], buffer[BAND + count :]]
        return buffer

    def empty(self, *shape: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        """In the place of torch.empty."""
        size = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(size).numel()
        return self.buffer(count, dtype or torch.get_default_dtype())[BAND : BAND + count].view(size)

    def check(self) -> None:
        """Nothing was written outside of the buffers."""
        assert all(bool(band.isnan().all()) for band in self._bands), "a kernel wrote past the end of a buffer"


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Guards around every buffer that launchers make, and around what a test wraps."""
    made = Guards(torch.empty)
    monkeypatch.setattr(torch, "empty", made.empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: made.empty(x.shape, dtype=x.dtype))
    yield made
    made.check()
