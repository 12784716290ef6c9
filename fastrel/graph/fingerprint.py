"""What a captured graph is of: everything that a forward pass reads besides its inputs and the values of its weights.

A graph froze the model's modules, forwards, hooks, attributes and ties, and what its code reads around itself (`fastrel.graph.reach`).
`Fingerprint.matches()` asks, at every call, whether all of it is still the same: first object by object, which takes about a
millisecond for a large model, and only where an object on the model was replaced, by meaning. Values of tensors are not part of it:
the graph reads them live, and a model that takes numbers out of them is compared at every call (`fastrel.engine`).
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch._dynamo  # it replaces functions of torch (manual_seed) when it is imported, which would look like a change
from torch import Tensor, nn

from fastrel.graph.clone import is_own
from fastrel.graph.reach import CONTAINERS, IGNORED, NUMBERS, Reach, is_elsewhere, own_tensors, slots
from fastrel.graph.watched import ALL, LARGE, LARGE_ARRAY, Key, held_in

_CONSTANTS = (*NUMBERS, type, types.ModuleType, types.BuiltinFunctionType, types.FunctionType)

#: Names by which code makes arrays or lists of tensors.
_CONVERTING = frozenset({"tolist", "numpy", "__array__", "array", "asarray"})


class Fingerprint:
    """The state of a model when it was captured."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._volatile: frozenset[Key] = frozenset()
        self._by_name: Callable[[], Iterable[Tensor]] = tuple
        self._describe()

    def matches(self) -> bool:
        """Whether the model is still what it was."""
        reach = self._reach
        if not reach.around.same():
            return False
        if reach.held.same():
            return True
        if not reach.elsewhere <= own_tensors(self._model).keys():
            return False  # code goes on with a parameter that is the model's no more
        if self._meant() != self._meaning:
            return False
        self._describe()  # other objects that mean the same
        return True

    def reads(self, by_name: Callable[[], Iterable[Tensor]]) -> None:
        """To be called when the graph is there: what gives the tensors that it finds on the model by their names, at every call."""
        self._by_name = by_name
        if self._reach.around.same() and self._reach.held.same():
            self._describe()

    def undo(self) -> None:
        """To be called right after the capture: takes out what hooks and forwards kept of it."""
        self._reach.held.restore()
        self._reach.around.restore()

    def ignore_what_the_model_writes(self) -> bool:
        """To be called right after the model ran: what it replaced itself (a kept attention map) does not count. Whether it did."""
        written = {*self._reach.held.changed(), *self._reach.around.changed()}
        if written:
            self._volatile |= written
            self._describe()
        return bool(written)

    @property
    def asks_how_it_is_run(self) -> bool:
        """Whether the model's code may do something else while it is captured, or than for inputs of another size."""
        return self._reach.asks_how_it_is_run or self._reach.makes_text

    @property
    def converts_tensors(self) -> bool:
        """Whether the model's code may make arrays, lists or text of tensors."""
        return self._reach.makes_text or not self._reach.names.isdisjoint(_CONVERTING)

    @property
    def tells_apart(self) -> str | None:
        """What tells the model's modules from copies of them, if anything does."""
        return self._reach.tells_apart

    def _describe(self) -> None:
        self._reach = Reach(self._model, self._volatile)
        # Of the model's own tensors, a graph finds by their names those that it reads; the others it does not read.
        self._meaning = self._meant([*self._by_name(), *own_tensors(self._model).values()])

    def _meant(self, by_name: Iterable[Tensor] = ()) -> Any:
        try:
            return _Meaning(self._volatile, by_name).of(self._model)
        except RecursionError:  # a long chain of objects: none that is replaced means the same
            return object()


class _Meaning:
    """A description of a model that is equal for models which compute alike: structure, options, dtypes, ties."""

    def __init__(self, volatile: frozenset[Key], by_name: Iterable[Tensor] = ()) -> None:
        self._volatile = volatile
        self._by_name = frozenset(map(id, by_name))
        self._numbers: dict[int, int] = {}

    def of(self, x: Any) -> Any:
        """The description of one object; seen again, only its number, which tells ties from copies."""
        if type(x) in weakref.ProxyTypes:
            return "weak", id(x)
        if isinstance(x, NUMBERS):
            return type(x), x
        if id(x) in self._numbers:
            return "again", self._numbers[id(x)]
        if isinstance(x, types.MethodType):
            return "method", _Same(x.__func__), self.of(x.__self__)
        self._numbers[id(x)] = len(self._numbers)
        if isinstance(x, functools.partial):
            return "partial", self.of(x.func), self.of(x.args), self.of(x.keywords)
        if isinstance(x, Tensor):
            return _Tensor(x, id(x) in self._by_name)
        if isinstance(x, np.ndarray):
            return np.ndarray, x.dtype.str, x.shape, x.tobytes() if x.nbytes <= LARGE_ARRAY else _Same(x)
        if isinstance(x, dict):
            return dict, self._items(x)
        if isinstance(x, CONTAINERS):
            if (id(x), ALL) in self._volatile:
                return "volatile"
            return type(x), len(x) if len(x) > LARGE else tuple(self.of(y) for y in x)
        held = [one for base in type(x).__mro__ for one in slots(base) if (id(x), one.__name__) not in self._volatile]
        attributes = getattr(x, "__dict__", None)
        if isinstance(x, _CONSTANTS) or is_own(x) or is_elsewhere(x) or not (isinstance(attributes, dict) or held):
            return _Same(x)
        described = tuple((member.__name__, self.of(held_in(x, member))) for member in held)
        return _Same(type(x)), described, self._items(attributes) if isinstance(attributes, dict) else None

    def _items(self, d: dict[Any, Any]) -> Any:
        if len(d) > LARGE:
            return len(d)
        items = [
            (key, value) for key, value in list(dict.items(d)) if key not in IGNORED and (id(d), key) not in self._volatile
        ]
        return tuple((key if isinstance(key, (str, int)) else _Same(key), self.of(value)) for key, value in items)


class _Tensor:
    """A tensor: equal to itself; one that a graph finds by its name to any of its kind, which is found there then."""

    def __init__(self, x: Tensor, by_name: bool) -> None:
        self.x, self.by_name = x, by_name

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Tensor):
            return False
        if not (self.by_name or other.by_name):
            return self.x is other.x
        return _kind(self.x) == _kind(other.x)

    def __hash__(self) -> int:
        return hash(_kind(self.x))


def _kind(x: Tensor) -> Any:
    return type(x), x.dtype, x.device, tuple(x.shape)


class _Same:
    """Equal to itself alone."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (self.x is other.x or _equal_constants(self.x, other.x))

    def __hash__(self) -> int:
        return id(self.x)


def _equal_constants(a: Any, b: Any) -> bool:
    kinds = (torch.dtype, torch.device, torch.Size, slice, range)
    return isinstance(a, kinds) and isinstance(b, kinds) and a == b
