"""What a fingerprint sees of a model and of the code around it: changes, one by one, and what is none. Nothing is captured here."""

from __future__ import annotations

import array
import collections
import dataclasses
import functools
import logging
import os
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastrel.graph.fingerprint import Fingerprint
from fastrel.graph.reach import Reach
from fastrel.graph.watched import Code

scale = 2.0
options = types.SimpleNamespace(strength=1.0)
nested = {"a": {"b": [1.0, 2.0]}}
per_thread = threading.local()
per_thread.gain = 1.0
raw, octets = array.array("d", [1.0]), bytearray([1])
chained = collections.ChainMap({}, {"gain": 1.0})
behind = {"gain": 1.0}
proxied = types.MappingProxyType(behind)
STEERED: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()
REGISTRY: dict[str, Callable[[Tensor], Tensor]] = {"act": torch.relu}


def helper(x: Tensor) -> Tensor:
    return x * inner_helper.factor


class Inner:
    factor = 3.0


inner_helper = Inner()


class Base:
    def strength(self) -> float:
        return 1.0


class Plain(Base):
    shared = 1.0

    def __init__(self) -> None:
        self.inner = types.SimpleNamespace(deep=Inner())


class Slotted:
    __slots__ = ("of", "strength")

    def __init__(self) -> None:
        self.strength, self.of = 1.0, [1.0]


class Meta(type):
    gain = property(lambda cls: cls._gain)


class Measured(metaclass=Meta):
    _gain = 1.0


def odd_gains() -> float:
    return per_thread.gain * raw[0] * octets[0] * chained["gain"] * proxied["gain"] * Measured.gain


@dataclasses.dataclass
class Config:
    gain: float = 1.0


class Model(nn.Module):
    limit = 5.0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(3, 3), nn.GELU()
        self.plain, self.slotted, self.config = Plain(), Slotted(), Config()
        self.queue = collections.deque([nn.Linear(3, 3)])
        self.part = functools.partial(F.softmax, dim=-1)
        self.__dict__["teacher"] = nn.Linear(3, 3)
        self.table, self.numbers = {"a": 1.0}, np.ones(3)
        self.aside = [torch.ones(3)]
        self.choose = "act"

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.linear(x)) * self.plain.strength() * self.plain.inner.deep.factor * self.slotted.strength
        x = x * options.strength * nested["a"]["b"][0] + self.limit * scale + self.teacher(x) * self.config.gain
        x = x * odd_gains() * STEERED.get(self.linear, 1.0)
        x = (
            REGISTRY[self.choose](helper(x)).softmax(-1) * self.table["a"] * float(self.numbers[0])
            + self.aside[0] * Plain.shared
        )
        return self.part(x * self.slotted.of[0] * float(os.environ.get("GAIN_OF_MODEL", "1"))) + self.queue[0](x)


def sae(x: Any) -> nn.Module:
    """A hook with a module in its closure, as sparse autoencoders have it."""
    module = nn.Linear(3, 3)

    def hook(_module: nn.Module, _args: Any, result: Tensor) -> Tensor:
        return module(result)

    x.linear.register_forward_hook(hook)
    return module


def other_forward(x: Tensor) -> Tensor:
    return x


CHANGES: dict[str, Callable[[Model, pytest.MonkeyPatch], Any]] = {
    "a weight of a module among a queue": lambda m, p: setattr(m.queue[0], "weight", nn.Parameter(torch.ones(3, 3))),
    "a module of a queue": lambda m, p: m.queue.__setitem__(0, nn.Linear(3, 3)),
    "a weight of a module in __dict__": lambda m, p: setattr(m.teacher, "weight", nn.Parameter(torch.ones(3, 3))),
    "the data of a module in __dict__": lambda m, p: setattr(m.teacher.weight, "data", torch.ones(3, 3)),
    "a hook on a module in __dict__": lambda m, p: m.teacher.register_forward_hook(lambda *_: None),
    "the class of a module": lambda m, p: setattr(m.act, "__class__", nn.SiLU),
    "a forward on a module": lambda m, p: setattr(m.act, "forward", other_forward),
    "a forward of a class": lambda m, p: p.setattr(nn.GELU, "forward", lambda self, x: x),
    "an option of a layer": lambda m, p: setattr(m.act, "approximate", "tanh"),
    "a number of a plain object's object": lambda m, p: setattr(m.plain.inner.deep, "factor", 4.0),
    "a number of an object's class": lambda m, p: p.setattr(Inner, "factor", 5.0),
    "a number of a class": lambda m, p: p.setattr(Model, "limit", 6.0),
    "a method of an object": lambda m, p: setattr(m.plain, "strength", lambda: 2.0),
    "a method of an object's class": lambda m, p: p.setattr(Plain, "strength", lambda self: 2.0, raising=False),
    "a method of an object's base": lambda m, p: p.setattr(Base, "strength", lambda self: 2.0),
    "a slot": lambda m, p: setattr(m.slotted, "strength", 2.0),
    "a list in a slot": lambda m, p: m.slotted.of.__setitem__(0, 2.0),
    "a field of a dataclass": lambda m, p: setattr(m.config, "gain", 2.0),
    "a partial": lambda m, p: setattr(m, "part", functools.partial(F.softmax, dim=0)),
    "a keyword in a partial": lambda m, p: m.part.keywords.__setitem__("dim", 0),
    "an entry of a dict": lambda m, p: m.table.__setitem__("a", 2.0),
    "a number of an array": lambda m, p: m.numbers.__setitem__(0, 2.0),
    "a tensor of a list": lambda m, p: m.aside.__setitem__(0, torch.zeros(3)),
    "the data of a tensor of a list": lambda m, p: setattr(m.aside[0], "data", torch.zeros(3)),
    "a global": lambda m, p: p.setitem(globals(), "scale", 3.0),
    "an attribute of a global": lambda m, p: p.setattr(options, "strength", 2.0),
    "a list deep in a global": lambda m, p: p.setitem(nested["a"], "b", [2.0, 2.0]),
    "a helper": lambda m, p: p.setitem(globals(), "helper", other_forward),
    "what a helper reads": lambda m, p: p.setattr(inner_helper, "factor", 2.0),
    "a helper's code": lambda m, p: p.setattr(helper, "__code__", other_forward.__code__),
    "an entry of a registry": lambda m, p: p.setitem(REGISTRY, "act", torch.tanh),
    "a function of torch": lambda m, p: p.setattr(F, "gelu", lambda x, approximate="none": x),
    "a variable of the environment": lambda m, p: p.setenv("GAIN_OF_MODEL", "2"),
    "a hook": lambda m, p: m.linear.register_forward_hook(lambda *_: None),
    "a hook before": lambda m, p: m.linear.register_forward_pre_hook(lambda *_: None),
    "a hook on every module": lambda m, p: p.setitem(torch_module._global_forward_hooks, 0, lambda *_: None),
    "a hook before every module": lambda m, p: p.setitem(torch_module._global_forward_pre_hooks, 0, lambda *_: None),
    "an attribute of this thread": lambda m, p: p.setattr(per_thread, "gain", 2.0),
    "an array of Python's": lambda m, p: raw.__setitem__(0, raw[0] + 1),
    "bytes": lambda m, p: octets.__setitem__(0, octets[0] + 1),
    "a chain of dicts": lambda m, p: p.setitem(chained, "gain", 2.0),
    "a dict behind a proxy": lambda m, p: p.setitem(behind, "gain", 2.0),
    "what a property of a class's class reads": lambda m, p: p.setattr(Measured, "_gain", 2.0),
    "an entry by module": lambda m, p: STEERED.__setitem__(m.linear, 2.0),
    "a method of tensors": lambda m, p: p.setattr(Tensor, "softmax", lambda x, dim: x, raising=False),
    "an operator of tensors": lambda m, p: p.setattr(Tensor, "__mul__", lambda x, y: x),
    "how modules are called": lambda m, p: p.setattr(nn.GELU, "_call_impl", lambda self, x: x, raising=False),
    "a weight that becomes another's": lambda m, p: setattr(m.queue[0], "weight", m.linear.weight),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().eval()
    print_ = Fingerprint(model)
    print_.reads(lambda: list(model.parameters()))
    assert print_.matches()
    CHANGES[name](model, monkeypatch)
    assert not print_.matches()


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module, "weight", nn.Parameter(torch.ones(3, 3))),
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: setattr(module, "forward", other_forward),
        lambda module: setattr(module.weight, "data", torch.ones(3, 3)),
    ],
)
def test_a_module_in_a_hook_s_closure_is_part_of_the_model(change: Callable[[Any], Any]) -> None:
    model = Model().eval()
    module = sae(model)
    print_ = Fingerprint(model)
    assert print_.matches()
    change(module)
    assert not print_.matches()


NO_CHANGES: dict[str, Callable[[Model, pytest.MonkeyPatch], Any]] = {
    "nothing": lambda m, p: None,
    "a weight, where the graph finds it by name": lambda m, p: setattr(m.linear, "weight", nn.Parameter(torch.ones(3, 3))),
    "numbers of a weight": lambda m, p: m.linear.weight.data.zero_(),
    "an equal table": lambda m, p: setattr(m, "table", {"a": 1.0}),
    "an equal object": lambda m, p: setattr(m, "config", Config()),
    "what nobody mentions": lambda m, p: setattr(m, "note_of_nobody", 1.0),
    "a global that nobody mentions": lambda m, p: p.setitem(globals(), "global_of_nobody", 1.0),
    "a variable of somebody else": lambda m, p: p.setenv("somebody_else_s", "1"),
    "a hook for gradients": lambda m, p: m.linear.register_full_backward_hook(lambda *_: None),
    "training and back": lambda m, p: m.train().eval(),
    "a state dict": lambda m, p: m.load_state_dict(m.state_dict()),
}


@pytest.mark.parametrize("name", NO_CHANGES)
def test_what_is_no_change_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().eval()
    print_ = Fingerprint(model)
    print_.reads(lambda: [x for n, x in model.named_parameters()])
    NO_CHANGES[name](model, monkeypatch)
    assert print_.matches()


class Counts(nn.Module):
    """Keeps things in all the places that code writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.kept, self.slotted, self.maps = 0, {"strength": 1.0}, Slotted(), collections.OrderedDict()
        self.count = self._counter()

    def _counter(self) -> Callable[[], int]:
        n = 0

        def count() -> int:
            nonlocal n
            n += 1
            return n

        return count

    def forward(self, x: Tensor) -> Tensor:
        global last_seen
        last_seen = x
        self.calls += 1
        self.kept["last"] = x
        self.slotted.of = [x]
        self.maps[f"map{self.calls}"] = x
        self.count()
        return x * self.kept["strength"]


last_seen: Any = None


def test_what_a_model_writes_is_no_change_and_what_lies_beside_it_still_is() -> None:
    model = Counts().eval()
    print_ = Fingerprint(model)
    model(torch.ones(3))
    assert print_.ignore_what_the_model_writes()
    for _ in range(3):
        model(torch.ones(3))
        assert print_.matches()
    model.kept["strength"] = 2.0
    assert not print_.matches()


def test_an_alias_of_a_weight_goes_stale_with_it() -> None:
    model = nn.Linear(3, 3)
    model.alias = [model.weight.detach()]  # type: ignore[assignment]
    print_ = Fingerprint(model)
    print_.reads(lambda: [model.weight, model.bias])
    assert print_.matches()
    model.weight = nn.Parameter(torch.ones(3, 3))
    assert not print_.matches()


def test_a_large_model_is_asked_in_a_few_passes() -> None:
    """The cost per module stays that of flat lists: no Python call per attribute."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(300))).eval()
    print_ = Fingerprint(model)
    assert print_.matches()
    calls = 0

    def count(frame: types.FrameType, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        assert print_.matches()
    finally:
        sys.setprofile(None)
    assert calls < 300


# Objects that are unlike others.


@functools.lru_cache
def kept_by_a_cache() -> float:
    return options.strength


class Private:
    __slots__ = ("__strength", "__weakref__")

    def __init__(self) -> None:
        self.__strength = 1.0

    def set(self, value: float) -> None:
        self.__strength = value

    def get(self) -> float:
        return self.__strength


class Odd(nn.Module):
    last: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(3).to_sparse())
        self.private, self.log, self.lazy = Private(), logging.getLogger("tests.reach"), Lazy(a=1)
        self.weak = weakref.proxy(self.private)
        self.chain: Any = types.SimpleNamespace()
        for _ in range(2000):
            self.chain = types.SimpleNamespace(next=self.chain)
        self.filters = 1

    def forward(self, x: Tensor) -> Tensor:
        Odd.last = x
        warnings.warn("once", stacklevel=1)
        self.log.info("%s", self.filters)
        return x * kept_by_a_cache() * self.private.get()


class Lazy(dict[str, int]):
    def __getitem__(self, key: str) -> int:
        raise ImportError(key)


def test_odd_objects_are_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd().eval()
    print_ = Fingerprint(model)
    assert print_.matches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.log.info("makes loggers remember their level")
        assert print_.matches()
    print_.undo()
    model.private.set(2.0)
    assert not print_.matches()
    print_ = Fingerprint(model)
    monkeypatch.setattr(options, "strength", 3.0)
    assert not print_.matches()


class Wrapping(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.global_model = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.global_model(x)


class Referring(Wrapping):
    def forward(self, x: Tensor) -> Tensor:
        return global_model(x)


global_model = nn.Linear(3, 3)


@pytest.mark.parametrize(("cls", "refers"), [(Wrapping, False), (Referring, True)])
def test_code_refers_to_a_module_of_the_model_by_a_global_not_by_an_attribute_of_its_name(cls: type, refers: bool) -> None:
    assert (Fingerprint(cls(global_model)).tells_apart is not None) == refers


class Attributes(Wrapping):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.id(x))


layers, dates = [global_model], np.array(["2020-01-01"], dtype="datetime64[D]")


def test_names_of_attributes_are_no_references_and_odd_arrays_no_obstacle() -> None:
    """`layers` may be a list of the model's own in a notebook, and `self.id` asks for nobody's id."""
    class_of = type("Dated", (Attributes,), {"forward": lambda self, x: Attributes.forward(self, x) * len(dates)})
    model = class_of(global_model)
    assert Fingerprint(model).tells_apart is None
    assert Fingerprint(model).matches()


class Asserting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 1, "which pytest has written anew"
        return helper(x)


def test_an_assertion_does_not_lead_to_the_session_of_pytest() -> None:
    """By way of it all that was ever collected was within reach, and every capture took half a minute."""
    code = [place.of for place in Reach(Asserting(), frozenset()).around.all if isinstance(place, Code)]
    assert helper in code
    assert {function.__module__.partition(".")[0] for function in code} <= {"tests", "torch"}
