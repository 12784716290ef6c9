"""What a forward pass may reach: from the model's modules, hooks and attributes through the code that they run to what this names.

Code is followed by name: a function where one that is followed mentions it, a method where its class was reached and its name is
mentioned, in any file but those of torch, of numpy and of Python itself. Of namespaces (modules of Python, classes) the names that
code mentions count; objects and containers are entered whole.
"""

from __future__ import annotations

import argparse
import array
import collections
import dis
import functools
import itertools
import os
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastrel.errors import CaptureError
from fastrel.graph.clone import is_own, package
from fastrel.graph.watched import (
    ALL,
    LARGE,
    MISSING,
    Absent,
    Cell,
    Code,
    Environment,
    Items,
    Key,
    Kind,
    Local,
    Memory,
    Names,
    Numbers,
    Places,
    Slots,
    content,
    has_memory,
    held_in,
)

#: Attributes of a module that no forward pass in eval mode depends on.
IGNORED = frozenset(
    {
        "training",
        "_is_full_backward_hook",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_non_persistent_buffers_set",
        "_compiled_call_impl",
    }
)

CONTAINERS = (list, tuple, set, frozenset, collections.deque)
NUMBERS = (str, bytes, int, float, complex, bool, type(None))

#: Attributes by which torch itself runs a module.
_RUN_BY_TORCH = frozenset(vars(nn.Module())) | {"forward"}

#: Hooks on every module of the process.
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)

#: Packages whose code is taken to stay what it is. pytest's stands in every assertion of a test file, and leads to the whole session.
_FOREIGN = frozenset({"torch", "numpy", "fastrel", "_pytest", *sys.stdlib_module_names}) - {"__main__"}

#: What keeps its items in dicts.
_AROUND_DICTS = (collections.ChainMap, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)

#: What of these holds options of a model nevertheless.
_ENTERED = (nn.Module, types.SimpleNamespace, argparse.Namespace)

#: Names that leave the names of attributes open.
_DYNAMIC = frozenset({"getattr", "__dict__", "vars", "attrgetter"})

#: Names by which code asks how it is run.
_HOW = frozenset(
    f"is_{how}" for how in ("compiling", "dynamo_compiling", "torchdynamo_compiling", "exporting", "tracing", "scripting")
)

#: Names by which code makes text of numbers, and so branches on what no guard sees; and the instructions of f-strings.
_TEXT = frozenset({"str", "repr", "format"})
_FORMATTING = frozenset(
    dis.opmap[name] for name in ("FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC") if name in dis.opmap
)

#: Libraries that ask so only to leave out warnings and short cuts to the same numbers.
_SAME_EITHER_WAY = frozenset({"accelerate", "huggingface_hub", "peft", "timm", "torchvision", "transformers"})

#: Methods that Python calls without naming them, but for those that make and show objects.
_UNNAMED = frozenset(
    f"__{name}__"
    for name in (
        "call", "getattr", "getattribute", "getitem", "missing", "contains", "iter", "next", "len", "bool", "float", "int", "index",
        "enter", "exit", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "neg", "eq", "ne", "lt", "le",
        "gt", "ge", "torch_function",
    )
) | {"forward", "_call_impl"}  # fmt: skip


def own_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Parameters and buffers, by id."""
    found = (x for module in model.modules() for held in (module._parameters, module._buffers) for x in held.values())
    return {id(x): x for x in found if x is not None}


class Reach:
    """Everything that a model's forward pass may reach.

    Attributes:
        held: places on the model, whose content may be replaced by what means the same.
        around: places in code and what it names.
        names: what the code mentions, words in it included.
        asks_how_it_is_run: whether the code may do something else while it is captured.
        makes_text: whether it may make text of numbers, which it may compare.
        tells_apart: what tells the model's modules from copies of them, if anything does: code refers to one of them, or asks for ids.
        elsewhere: ids of parameters and buffers that are also held beside the model's modules.
    """

    def __init__(self, model: nn.Module, volatile: frozenset[Key]) -> None:
        self._volatile = volatile
        self.held, self.around = Places(), Places()
        self.names: set[str] = set()
        self.asks_how_it_is_run = self.makes_text = False
        self.tells_apart: str | None = None
        self.elsewhere: set[int] = set()
        self._modules = {id(module) for module in model.modules()}
        self._own = own_tensors(model)
        self._by_place = {x.data_ptr(): x for x in self._own.values() if has_memory(x)}
        self._seen: dict[int, Any] = {}
        self._attributes: list[tuple[dict[str, Any], Places]] = []
        self._classes: list[type] = []
        self._spaces: list[Mapping[str, Any]] = []  # of modules of Python and classes
        self._behind_code: list[Any] = []
        self._enter_all([model], self.held)
        self._behind_code += _GLOBAL_HOOKS
        self._follow_names()
        self._watch_names()

    def _follow_names(self) -> None:
        """Enter what code names in namespaces and classes, until nothing new is named."""
        done: frozenset[str] = frozenset()
        searched = 0
        self._enter_all(self._behind_code, self.around)
        while len(self._spaces) > searched or not self.names <= done:
            names, spaces = _UNNAMED | self.names, list(self._spaces)
            new = names - done
            for i, space in enumerate(spaces):
                named = (new if i < searched else names).intersection(space)
                self._behind_code += [_behind(space[name]) for name in named if _is_read(space, name)]
            self._enter_all(self._behind_code, self.around)
            done, searched = names, len(spaces)

    def _watch_names(self) -> None:
        """Watch namespaces and classes, and the attributes of objects that code may mean."""
        used = _UNNAMED | self.names
        for space in self._spaces:
            named = [name for name in used.intersection(space) if _is_read(space, name)]
            self.around.add(Names(space, self._lasting(space, named)))
        for cls in self._classes:
            inherited = used.intersection(itertools.chain.from_iterable(map(vars, cls.__mro__[1:]))).difference(vars(cls))
            self.around.add(Absent(vars(cls), inherited))
        methods = used.intersection(dir(Tensor))
        self.around.add(Names(vars(Tensor), methods.intersection(vars(Tensor))))
        self.around.add(Absent(vars(Tensor), methods.difference(vars(Tensor))))
        known = None if self.names & _DYNAMIC else self.names | _RUN_BY_TORCH
        for d, places in self._attributes:
            keys = self._lasting(d, [key for key in list(d) if key not in IGNORED])
            if known is None or len(keys) > LARGE:
                places.add(Names(d, keys if len(keys) <= LARGE else (), whole=(id(d), ALL) not in self._volatile))
            else:
                places.add(Names(d, [key for key in keys if key in known]))
                places.add(Absent(d, self._lasting(d, known.difference(d))))
        if not self.names.isdisjoint(("environ", "getenv")):
            self.around.add(Environment(os.environ, [n for n in self.names if n in os.environ or n.isupper()]))

    def _lasting(self, d: Mapping[Any, Any], keys: Iterable[Any]) -> list[Any]:
        """Those of the keys that the model does not write itself."""
        return [key for key in keys if (id(d), key) not in self._volatile] if self._volatile else list(keys)

    def _enter_all(self, todo: list[Any], places: Places) -> None:
        """Watch objects and all that hangs on them."""
        while todo:
            x = todo.pop()
            if places is self.around and id(x) in self._modules:
                self.tells_apart = f"refers to its own {type(x).__name__}"
            if (
                id(x) in self._seen
                or x is MISSING
                or type(x) in weakref.ProxyTypes
                or isinstance(x, (*NUMBERS, types.BuiltinFunctionType))
                or is_own(x)
            ):
                continue
            self._seen[id(x)] = x
            todo += self._enter(x, places)

    def _enter(self, x: Any, places: Places) -> list[Any]:
        """Watch one object; what hangs on it."""
        if isinstance(x, types.ModuleType):
            self._spaces.append(vars(x))
            return []
        if isinstance(x, type):
            return self._class(x)
        if isinstance(x, types.FunctionType):
            self._function(x)
            return []
        if isinstance(x, types.MethodType):
            return [x.__self__, x.__func__]
        if isinstance(x, functools.partial):
            return [x.func, x.args, x.keywords]
        if isinstance(x, (np.ndarray, array.array, bytearray)):
            if (id(x), ALL) not in self._volatile:
                self.around.add(Numbers(x))
            return []
        if isinstance(x, types.MappingProxyType):
            self.around.add(Names(x, x, whole=True))
            return list(x.values())
        if isinstance(x, threading.local):
            self.around.add(Local(x))
            return [type(x), *vars(x).values()]
        if isinstance(x, _AROUND_DICTS):
            return [x.maps if isinstance(x, collections.ChainMap) else vars(x)["data"]]
        if isinstance(x, weakref.ref):
            return [x()]
        if isinstance(x, Tensor):
            self._tensor(x)
            return []
        if isinstance(x, dict):
            keys = self._lasting(x, list(x)) if len(x) <= LARGE else []  # a copy: other threads may write
            places.add(Names(x, keys, whole=(id(x), ALL) not in self._volatile))
            if places is self.around:
                found = (key() if isinstance(key, weakref.ref) else key for key in keys)
                self._behind_code += [key for key in found if isinstance(key, nn.Module)]
            return [dict.get(x, key, MISSING) for key in keys]
        if isinstance(x, CONTAINERS):
            if (id(x), ALL) in self._volatile:
                return []
            if not isinstance(x, (tuple, frozenset)):  # which nothing can change
                places.add(Items(x))
            return list(x) if len(x) <= LARGE else []
        return self._object(x, places)

    def _object(self, x: Any, places: Places) -> list[Any]:
        cls = type(x)
        if isinstance(x, functools._lru_cache_wrapper):
            return [x.__wrapped__]
        if is_elsewhere(x):
            return []
        self.around.add(Kind(x))
        found: list[Any] = [cls]
        members = [one for base in cls.__mro__ for one in slots(base) if (id(x), one.__name__) not in self._volatile]
        if members:
            places.add(Slots(x, members))
            found += [held_in(x, member) for member in members]
        try:
            attributes = getattr(x, "__dict__", None)
        except Exception:  # what has none may say so in its own way, as pydantic's stand-ins do
            return found
        if not isinstance(attributes, dict):
            return found
        self._attributes.append((attributes, places))
        if isinstance(x, nn.Module):
            for held in (x._parameters, x._buffers):
                if not isinstance(held, dict):
                    raise CaptureError(
                        f"{cls.__name__} is compiled, and its code cannot be read; pass the module it was made of"
                    )
                self._seen[id(held)] = held
                places.add(Names(held, held, whole=True))
                found += [one for one in held.values() if id(one) not in self._own]
        return found + [
            attributes.get(key, MISSING) for key in self._lasting(attributes, list(attributes)) if key not in IGNORED
        ]

    def _class(self, cls: type) -> list[Any]:
        if cls in (nn.Module, type) or (_is_foreign(cls) and not issubclass(cls, nn.Module)):
            return []
        self._classes.append(cls)
        self._spaces.append(vars(cls))
        return [type(cls), *cls.__bases__]

    def _holds_own(self, x: Any) -> bool:
        """Whether something is a module of the model, or holds one: a list of layers, a dict of models."""
        inside = x.values() if isinstance(x, dict) else x if isinstance(x, CONTAINERS) else (x,)
        return any(id(one) in self._modules for one in itertools.islice(inside, LARGE))

    def _tensor(self, x: Tensor) -> None:
        """Watch where a tensor is that lies beside the parameters and buffers, or is one of them there."""
        if id(x) in self._own:
            self.elsewhere.add(id(x))
        elif has_memory(x):
            original = self._by_place.get(x.data_ptr())
            self.elsewhere |= set() if original is None else {id(original)}
            self.around.add(Memory(x, original))

    def _function(self, function: types.FunctionType) -> None:
        """Watch what a function's code reads from around it."""
        foreign = _is_foreign(function)
        if foreign and not function.__module__.startswith("torch.nn.modules."):
            return
        self.around.add(Code(function))
        mentioned = mentioned_in(function.__code__)
        self.names |= mentioned
        if not foreign and package(function.__module__) not in _SAME_EITHER_WAY:
            self.asks_how_it_is_run = self.asks_how_it_is_run or not mentioned.isdisjoint(_HOW)
            self.makes_text = self.makes_text or not mentioned.isdisjoint(_TEXT) or _formats(function.__code__)
            if "id" in _globals_of(function.__code__) and "id" not in function.__globals__:
                self.tells_apart = "asks for the id of objects"
        space = function.__globals__
        here = self._lasting(space, mentioned.intersection(space))
        if foreign:  # what torch's layers call may be another one: F.gelu
            self._behind_code += [space[name] for name in here if isinstance(space[name], types.ModuleType)]
            return
        self.around.add(Names(space, here))
        cells = [cell for cell in function.__closure__ or () if (id(cell), ALL) not in self._volatile]
        for cell in cells:
            self.around.add(Cell(cell))
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        # An attribute that is called as a global is, such as `model`, does not refer to it.
        own = _globals_of(function.__code__)
        here = [name for name in here if name in own or not self._holds_own(space[name])]
        self._behind_code += [*map(content, cells), *(space[name] for name in here), *defaults]


def slots(cls: type) -> tuple[types.MemberDescriptorType, ...]:
    """The slots that a class of Python's adds."""
    if "__slots__" not in vars(cls):
        return ()
    return tuple(one for one in vars(cls).values() if isinstance(one, types.MemberDescriptorType))


@functools.lru_cache(maxsize=4096)
def mentioned_in(code: types.CodeType) -> frozenset[str]:
    """Names that a code object and those nested in it look up outside of themselves, and words in it, which may be names."""
    found = set(code.co_names)
    for x in code.co_consts:
        if isinstance(x, types.CodeType):
            found |= mentioned_in(x)
        elif isinstance(x, str) and x.isidentifier():
            found.add(x)
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> frozenset[str]:
    """Names that a code object and those nested in it look up as globals."""
    nested = (_globals_of(x) for x in code.co_consts if isinstance(x, types.CodeType))
    return frozenset(x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL").union(*nested)


@functools.lru_cache(maxsize=4096)
def _formats(code: types.CodeType) -> bool:
    """Whether a code object, or one nested in it, holds an f-string."""
    nested = (x for x in code.co_consts if isinstance(x, types.CodeType))
    return not _FORMATTING.isdisjoint(code.co_code[::2]) or any(map(_formats, nested))


def is_elsewhere(x: Any) -> bool:
    """Whether an object is a logger, a lock, an optimizer: of a library, and nothing that holds a model's options."""
    return _is_foreign(type(x)) and not isinstance(x, _ENTERED) and not type(x).__module__.startswith("torch.nn")


def _is_read(space: Mapping[str, Any], name: str) -> bool:
    """Whether a model may read a name there; what torch's and Python's own modules keep in lists and numbers is no model's."""
    if package(space.get("__name__")) not in _FOREIGN:
        return True
    return isinstance(space[name], (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type))


def _behind(x: Any) -> Any:
    """The function behind a property or a method of a class."""
    if isinstance(x, property):
        return x.fget
    if isinstance(x, functools.cached_property):
        return x.func
    return x.__func__ if isinstance(x, (staticmethod, classmethod)) else x


def _is_foreign(x: Any) -> bool:
    """Whether a function or class is of torch, numpy, fastrel or Python itself."""
    return package(x.__module__) in _FOREIGN
