"""Weights in reduced precision, kept from one explanation to the next: they depend on the model alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: How many megabytes of prepared weights to keep over all models; 0 keeps none. Default: 2048.
LIMIT_VARIABLE = "FASTREL_WEIGHTS_MB"

#: Values of a weight that are compared before what was made of it is used again: writes through `.data` leave no other trace.
SAMPLES = 64


@dataclass(frozen=True)
class _Prepared:
    version: int
    sample: Tensor | None
    result: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.result)


#: Per parameter, by what was asked for; gone with the parameter.
_kept: Any = WeakTensorKeyDictionary()
_lock = threading.Lock()


def limit() -> int:
    """Bytes that may be kept."""
    return int(float(os.environ.get(LIMIT_VARIABLE, "2048")) * 1e6)


def kept_bytes() -> int:
    """Bytes that are kept now."""
    with _lock:
        return sum(prepared.bytes for entry in _kept.values() for prepared in entry.values())


def kept(prepare: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`prepare(weight, purpose)`, its results kept until the weight changes, within `limit`."""

    def prepared(weight: Tensor, purpose: str) -> tuple[Tensor, ...]:
        if weight.is_inference() or limit() == 0:
            return prepare(weight, purpose)
        owner = weight if weight._base is None else weight._base
        key = (purpose, prepare, weight.data_ptr(), weight.shape, weight.stride())
        found = _kept.get(owner, {}).get(key)
        if found and found.version == weight._version and _unchanged(found.sample, weight):
            return found.result
        result = prepare(weight, purpose)
        if any(x is weight for x in result):  # nothing was made; and what is kept must not keep its own key alive
            return result
        made = _Prepared(weight._version, _sample_to_keep(weight), result)
        if kept_bytes() + made.bytes <= limit():
            with _lock:
                _kept.setdefault(owner, {})[key] = made
        return made.result

    return prepared


def _sample_to_keep(weight: Tensor) -> Tensor | None:
    """None on a GPU, where comparing would wait for all that was launched: there only autograd's version tells of a change."""
    return _sample(weight).clone() if weight.device.type == "cpu" else None


def _unchanged(sample: Tensor | None, weight: Tensor) -> bool:
    return sample is None or torch.equal(sample, _sample(weight))


def _sample(weight: Tensor) -> Tensor:
    """Some values from all over a weight [out, in], each of another row and column."""
    rows = weight[:: max(1, weight.shape[0] // SAMPLES)]
    columns = rows[:, :: max(1, weight.shape[1] // SAMPLES)]
    return columns.diagonal()
