"""Programs of one launch must not store where another does: checked in Triton's interpreter, which runs them one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter


def conflicts(stores: list[tuple[Any, np.ndarray]]) -> int:
    """How many addresses, of (program, addresses stored to), belong to several programs."""
    if not stores:
        return 0
    numbers = {program: i for i, program in enumerate(dict.fromkeys(program for program, _ in stores))}
    at = np.concatenate([addresses for _, addresses in stores])
    own = np.concatenate([np.full(len(addresses), numbers[program]) for program, addresses in stores])
    order = np.lexsort((own, at))
    at, own = at[order], own[order]
    return int(((at[1:] == at[:-1]) & (own[1:] != own[:-1])).sum())


@pytest.fixture(autouse=True)
def disjoint_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of the test has stores of different programs apart from each other."""
    seen: list[tuple[Any, np.ndarray]] = []
    store, call = interpreter.InterpreterBuilder.create_masked_store, interpreter.GridExecutor.__call__

    def recorded(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses, inside = np.broadcast_arrays(pointers.data, np.asarray(mask.data, bool))
        seen.append((self.grid_idx, addresses[inside].ravel()))
        return store(self, pointers, value, mask, *rest)

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        result = call(self, *args, **kwargs)
        assert conflicts(seen) == 0, f"programs of {self.fn.__name__} store to the same places"
        return result

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", recorded)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked)
