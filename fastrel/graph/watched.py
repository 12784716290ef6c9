"""Places whose content may be replaced: dicts, containers, slots, closures, functions, arrays, and memory of tensors.

Each remembers what it held, tells whether it still does (`same`), which of its keys do not (`changed`), and can take out what a
capture left there (`restore`).
"""

from __future__ import annotations

import collections
import functools
import itertools
import threading
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

#: A place: the id of what holds it, and its name there; the name is ALL for everything a container holds.
Key = tuple[int, Any]
ALL = "*all*"

#: Of larger containers (vocabularies, say) only the length counts.
LARGE = 2048

#: Of larger numpy arrays (bytes) only the object and its shape count.
LARGE_ARRAY = 2**20

#: What stands for a key that is not there.
MISSING = object()


def holds_fake(x: Any) -> bool:
    """Whether a tensor of a capture is in x."""
    return any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(x))


class Place:
    """Something that is watched; most of it no model writes itself, and a capture leaves nothing there."""

    of: Any

    def same(self) -> bool:
        """Whether it holds what it did."""
        raise NotImplementedError

    def changed(self) -> Iterator[Key]:
        """Where it does not."""
        return iter(())

    def restore(self) -> None:
        """Put back what a capture replaced, and take out what it added."""


class Names(Place):
    """Some keys of a mapping: names in a namespace, attributes of an object, entries of a dict.

    `whole`: and no others; in this order where these are all.
    """

    def __init__(self, d: Mapping[Any, Any], keys: Iterable[Any], whole: bool = False) -> None:
        self.of, self.keys = d, tuple(keys)
        # A registry's own `get` may look elsewhere.
        self.get = functools.partial(dict.get, d) if isinstance(d, dict) else d.get
        self.values = tuple(self.get(key, MISSING) for key in self.keys)
        self.count = len(d) if whole else None
        self.ordered = whole and len(self.keys) == len(d)

    def same(self) -> bool:
        """Whether it holds what it did."""
        d, keys = self.of, self.keys
        return (
            (self.count is None or len(d) == self.count)
            and all(map(is_, map(self.get, keys, itertools.repeat(MISSING)), self.values))
            and (not self.ordered or all(map(is_, d, keys)))
        )

    def changed(self) -> Iterator[Key]:
        """Where it does not."""
        for key, value in zip(self.keys, self.values, strict=True):
            if self.get(key, MISSING) is not value:
                yield id(self.of), key
        if self.count is not None and len(self.of) != self.count:
            yield id(self.of), ALL
            yield from ((id(self.of), key) for key in set(self.of).difference(self.keys))

    def restore(self) -> None:
        """Put back what a capture replaced, and take out what it added."""
        d: Any = self.of
        if not isinstance(d, dict):
            return  # of a class
        before = dict(zip(self.keys, self.values, strict=True))
        looked_at = [(key, self.get(key, MISSING)) for key in (list(d) if self.count is not None else self.keys)]
        for key, now in looked_at:
            value = before.get(key, MISSING)
            if now is value or not holds_fake(now):
                continue
            if value is MISSING:
                del d[key]
            else:
                d[key] = value


class Absent(Place):
    """Names that a mapping does not hold: attributes that an object or class would find elsewhere."""

    def __init__(self, d: Mapping[str, Any], names: Iterable[str]) -> None:
        self.of, self.count, self.names = d, len(d), frozenset(names)

    def same(self) -> bool:
        """Whether it holds none of them."""
        return len(self.of) == self.count or self.names.isdisjoint(self.of)

    def changed(self) -> Iterator[Key]:
        """Those that it holds."""
        if len(self.of) != self.count:
            yield from ((id(self.of), name) for name in self.names.intersection(self.of))

    def restore(self) -> None:
        """Take out what a capture added."""
        d: Any = self.of
        if isinstance(d, dict):
            for name in [name for name in self.names.intersection(d) if holds_fake(d[name])]:
                del d[name]


class Items(Place):
    """The items of a list, set or queue."""

    def __init__(self, x: Any) -> None:
        self.of, self.count = x, len(x)
        self.items = tuple(x) if len(x) <= LARGE else ()

    def same(self) -> bool:
        """Whether it holds what it did."""
        return len(self.of) == self.count and (not self.items or all(map(is_, self.of, self.items)))

    def changed(self) -> Iterator[Key]:
        """Where it does not."""
        if not self.same():
            yield id(self.of), ALL

    def restore(self) -> None:
        """Put back what a capture replaced."""
        x = self.of
        if isinstance(x, set):
            x.difference_update([one for one in x if holds_fake(one)])
        if not isinstance(x, (list, collections.deque)):
            return
        for i in reversed([i for i, one in enumerate(x) if holds_fake(one)]):
            if len(x) == len(self.items):
                x[i] = self.items[i]
            else:
                del x[i]


class Kind(Place):
    """The class of an object."""

    def __init__(self, x: Any) -> None:
        self.of, self.cls = x, type(x)

    def same(self) -> bool:
        """Whether it is what it was."""
        return type(self.of) is self.cls


class Slots(Place):
    """Attributes that an object has in slots."""

    def __init__(self, x: Any, members: Sequence[types.MemberDescriptorType]) -> None:
        self.of, self.members = x, members
        self.values = tuple(held_in(x, member) for member in members)

    def same(self) -> bool:
        """Whether it holds what it did."""
        return all(held_in(self.of, member) is value for member, value in zip(self.members, self.values, strict=True))

    def changed(self) -> Iterator[Key]:
        """Where it does not."""
        for member, value in zip(self.members, self.values, strict=True):
            if held_in(self.of, member) is not value:
                yield id(self.of), member.__name__

    def restore(self) -> None:
        """Put back what a capture replaced."""
        for member, value in zip(self.members, self.values, strict=True):
            if value is not MISSING and holds_fake(held_in(self.of, member)):
                member.__set__(self.of, value)


class Cell(Place):
    """A variable that a function closes over."""

    def __init__(self, cell: types.CellType) -> None:
        self.of, self.value = cell, content(cell)

    def same(self) -> bool:
        """Whether it holds what it did."""
        return content(self.of) is self.value

    def changed(self) -> Iterator[Key]:
        """Where it does not."""
        if not self.same():
            yield id(self.of), ALL

    def restore(self) -> None:
        """Put back what a capture replaced."""
        if holds_fake(content(self.of)) and self.value is not MISSING:
            self.of.cell_contents = self.value


class Code(Place):
    """What a function is made of besides its name."""

    def __init__(self, function: types.FunctionType) -> None:
        self.of = function
        self.parts = function.__code__, function.__defaults__, function.__kwdefaults__

    def same(self) -> bool:
        """Whether it is what it was."""
        f = self.of
        code, defaults, named = self.parts
        return f.__code__ is code and f.__defaults__ is defaults and f.__kwdefaults__ is named


class Numbers(Place):
    """The numbers in an array, of numpy or of Python."""

    def __init__(self, x: Any) -> None:
        size = x.nbytes if hasattr(x, "nbytes") else len(x) * getattr(x, "itemsize", 1)
        self.of, self.bytes = x, _bytes(x) if size <= LARGE_ARRAY else None

    def same(self) -> bool:
        """Whether they are what they were."""
        return self.bytes is None or _bytes(self.of) == self.bytes

    def changed(self) -> Iterator[Key]:
        """Where they are not."""
        if not self.same():
            yield id(self.of), ALL


def _alike(a: Any, b: Any) -> bool:
    plain = (str, bytes, int, float, bool)
    return a is b or (type(a) is type(b) and isinstance(a, plain) and a == b)


def _bytes(x: Any) -> bytes:
    if isinstance(x, bytearray):
        return bytes(x)
    if isinstance(x, np.ma.MaskedArray):  # whose own method writes what fills it into `np.ma.masked`
        return np.asarray(x).tobytes() + np.ma.getmaskarray(x).tobytes()
    return x.tobytes()


class Local(Place):
    """The attributes that this thread sees of an object which has others in every thread."""

    def __init__(self, x: threading.local) -> None:
        self.of, self.values = x, dict(vars(x))

    def same(self) -> bool:
        """Whether they are what they were in the thread that looked first."""
        now = vars(self.of)
        return now.keys() == self.values.keys() and all(_alike(now[name], value) for name, value in self.values.items())

    def changed(self) -> Iterator[Key]:
        """Nothing that can be told from what another thread sees."""
        return iter(())


class Memory(Place):
    """Where a tensor's numbers are, of one that is no parameter or buffer of the model by name: a graph reads them there for ever;
    and, where it is an alias of a parameter, that this one is still there."""

    def __init__(self, x: Tensor, alias_of: Tensor | None) -> None:
        self.of, self.place, self.alias_of = x, x.data_ptr(), alias_of

    def same(self) -> bool:
        """Whether they are where they were."""
        return all(has_memory(x) and x.data_ptr() == self.place for x in (self.of, self.alias_of) if x is not None)


class Environment(Place):
    """Variables of the environment."""

    def __init__(self, variables: Mapping[str, str], names: Iterable[str]) -> None:
        self.of = variables
        self.values = {name: variables.get(name) for name in names}

    def same(self) -> bool:
        """Whether they are what they were."""
        return all(self.of.get(name) == value for name, value in self.values.items())


class Places:
    """Many places, asked together: a large model has thousands, nearly all of them dicts and lists, which a few passes over flat
    lists compare."""

    def __init__(self) -> None:
        self.all: list[Place] = []

    def add(self, place: Place) -> None:
        """Watch one more."""
        self.all.append(place)

    @functools.cached_property
    def _flat(self) -> _Flat:
        return _Flat(self.all)

    def same(self) -> bool:
        """Whether all hold what they did."""
        try:
            return self._flat.same() and all(place.same() for place in self._flat.others)
        except RuntimeError:  # another thread adds to one of them
            return False

    def changed(self) -> Iterator[Key]:
        """Where they do not."""
        return itertools.chain.from_iterable(place.changed() for place in self.all)

    def restore(self) -> None:
        """Put back what a capture replaced, and take out what it added."""
        for place in self.all:
            place.restore()


class _Flat:
    """The dicts and containers among some places, in flat lists, and the `others`."""

    def __init__(self, places: Iterable[Place]) -> None:
        self.others: list[Place] = []
        self._empty: list[Any] = []  # hooks, mostly
        self._sized: list[Any] = []
        self._counts: list[int] = []
        self._dicts: list[dict[Any, Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._ordered: list[Any] = []
        self._order: list[Any] = []
        self._absent: list[Absent] = []
        self._objects: list[Any] = []
        self._classes: list[type] = []
        for place in places:
            if isinstance(place, Names) and isinstance(place.of, dict):
                self._dicts += [place.of] * len(place.keys)
                self._keys += place.keys
                self._values += place.values
                if place.count is not None:
                    self._size(place.of, place.count, place.keys if place.ordered else ())
            elif isinstance(place, Items):
                self._size(place.of, place.count, place.items)
            elif isinstance(place, Absent) and isinstance(place.of, dict):
                self._absent.append(place)
            elif isinstance(place, Kind):
                self._objects.append(place.of)
                self._classes.append(place.cls)
            else:
                self.others.append(place)
        self._places, self._lengths = [place.of for place in self._absent], [place.count for place in self._absent]

    def _size(self, x: Any, count: int, order: Sequence[Any]) -> None:
        if not count and not hasattr(type(x), "__bool__"):
            self._empty.append(x)
            return
        self._sized.append(x)
        self._counts.append(count)
        if order:
            self._ordered.append(x)
            self._order += order

    def same(self) -> bool:
        """Whether they hold what they did."""
        return (
            not any(self._empty)
            and list(map(len, self._sized)) == self._counts
            and all(map(is_, map(type, self._objects), self._classes))
            and all(map(is_, itertools.chain.from_iterable(self._ordered), self._order))
            and all(map(is_, map(dict.get, self._dicts, self._keys, itertools.repeat(MISSING)), self._values))
            and (list(map(len, self._places)) == self._lengths or all(place.same() for place in self._absent))
        )


def has_memory(x: Tensor) -> bool:
    """Whether a tensor's numbers lie somewhere: not sparse, not empty, of no capture."""
    return x.layout is torch.strided and x.device.type != "meta" and not isinstance(x, FakeTensor) and x.numel() > 0


def held_in(x: Any, member: types.MemberDescriptorType) -> Any:
    """What a slot of an object holds; a mark of its own where it is empty."""
    try:
        return member.__get__(x)
    except AttributeError:
        return MISSING


def content(cell: types.CellType) -> Any:
    """What a cell holds; a mark of its own where it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING
