"""Engine: a model, what was captured of it, and the programs made of that. Everything that explains stands on it.

A captured graph is a cache, never an authority: it is used where its guards hold and while its fingerprint matches, and its
outputs are compared with the model's own the first time that it runs, the first time that it runs on a batch of one or on inputs
laid out in another way; some more times where the model writes to something that it may read again; at every call where it looks
at the numbers in its tensors, since these may decide what it does; and now and then, since no fingerprint sees everything.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastrel import backends
from fastrel import precision as precision_
from fastrel.comparison import Looking, converts, difference, is_training, run_model
from fastrel.errors import CaptureError
from fastrel.graph.ambient import outside_inference
from fastrel.graph.capture import LOCK, Captured, Signature, capture, check_weights, in_order
from fastrel.graph.clone import unwrapped
from fastrel.graph.fingerprint import Fingerprint
from fastrel.inputs import Checks, check_inputs, input_names, is_device_error, rejected
from fastrel.options import Options
from fastrel.outputs import logits_index
from fastrel.transform.lanes import lane_dtype
from fastrel.transform.program import Program
from fastrel.transform.walk import transform

log = logging.getLogger("fastrel")

#: How many captured graphs of one model are kept.
CAPTURES = 16

#: How many captures of one kind of call are a reason to say so.
MANY = 5

#: For how many calls after the first a model is compared that writes to itself or to what is around it.
WRITES = 3

#: At every how manieth call a graph is compared with the model whatever is known: this bounds what a fingerprint misses.
NOW_AND_THEN = 64

#: What calls share that one comparison with the model holds for: sizes where they matter (or None), which inputs are contiguous.
Kind = tuple[tuple[torch.Size, ...] | None, tuple[bool, ...]]


@dataclass(eq=False)
class Entry:
    """A captured graph with what it is valid for, and the programs made of it."""

    signature: Signature
    captured: Captured
    fingerprint: Fingerprint
    programs: dict[Any, Program] = field(default_factory=dict)
    #: Whether its outputs were found equal to the model's, by kind of call.
    compared: dict[Kind, bool] = field(default_factory=dict)
    #: For how many more calls one comparison is not enough.
    doubts: float = 0
    #: Numbers its calls.
    calls: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def is_single(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are a batch of one, which was captured as two."""
        return self.captured.guards.is_single(tensors)

    def kind(self, tensors: Sequence[Tensor]) -> Kind:
        """What must have been compared for these inputs: captured as two, a batch of one is not what the guards speak of; nor do they
        speak of what code did because it was captured, or of strides."""
        sized = self.is_single(tensors) or self.fingerprint.asks_how_it_is_run
        return tuple(x.shape for x in tensors) if sized else None, tuple(x.is_contiguous() for x in tensors)


@dataclass(frozen=True)
class Call:
    """A call of the model, and the graph that takes it.

    Attributes:
        entry: the captured graph.
        values: what its placeholders hold: parameters, then inputs.
        tensors: the tensors among the inputs, and `names`, what each input is called.
    """

    entry: Entry
    values: list[Any]
    tensors: list[Tensor]
    names: list[str]

    @property
    def captured(self) -> Captured:
        """The captured graph."""
        return self.entry.captured

    @property
    def batch(self) -> int:
        """The number of samples."""
        return next((len(x) for x in self.tensors if x.dim()), 1)


class Engine:
    """Captures a model when it must, and runs programs on its live parameters. Safe to call from several threads."""

    def __init__(self, model: nn.Module, live: bool = True, checks: bool = True) -> None:
        self.model, self.live, self.checks = unwrapped(model), live, checks
        self._given = model
        self._entries: list[Entry] = []  # the most recently used first
        self._lock = threading.RLock()
        self._warned = False

    def enter(self, args: Sequence[Any], kwargs: Mapping[str, Any], checks: Checks | None = None) -> Call:
        """The captured graph that takes these inputs, made if there is none, and the values of its placeholders.

        `checks`: where numbers are looked at later, if all else is settled.

        Raises:
            InputError: the model rejects these inputs, or they hold NaN.
            CaptureError: torch.export cannot capture the model, or what it captured is not the model.
        """
        self._unwrap()
        kwargs = in_order(self.model, args, kwargs)
        signature, leaves = Signature.of(args, kwargs)
        names = input_names(self.model, args, kwargs)
        now = checks is None
        checks = Checks(self.checks) if checks is None else checks
        check_inputs([(name, leaf) for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)], checks)
        with outside_inference():
            leaves = [_ordinary(leaf) for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        args, kwargs = pytree.tree_unflatten(leaves, signature.spec)
        found = self._find(signature, tensors)
        if found is None or now:
            checks.settle()
        if found is None:
            with LOCK, self._lock:
                found = self._find(signature, tensors) or self._captured(signature, args, kwargs, tensors)
        entry, owned = found
        due = self.live and next(entry.calls) % NOW_AND_THEN == 0
        if due or not self._is_settled(entry, tensors):
            checks.settle()
            with LOCK, self._lock:
                entry, owned = self._compared(entry, owned, args, kwargs, leaves, tensors, due)
        return Call(entry, owned + leaves, tensors, names)

    def program(self, entry: Entry, options: Options, outputs: tuple[int, ...], trace: bool = False) -> Program:
        """The program that explains some outputs of a captured graph, made if there is none.

        Raises:
            UnsupportedModelError: the graph holds something without a relevance rule.
        """
        key = (options, outputs, trace)
        if key not in entry.programs:
            # Shapes of captured values are symbols, whose arithmetic a capture in another thread would record.
            with LOCK, self._lock:
                if key not in entry.programs:
                    entry.programs[key] = _program(entry.captured, options, outputs, trace)
        return entry.programs[key]

    def explaining(self, call: Call, options: Options, trace: bool = False) -> Program:
        """`program` for the output that classes are picked from."""
        return self.program(call.entry, options, (logits_index(call.captured, options.output),), trace)

    def reset(self) -> None:
        """Forget all captured graphs."""
        with self._lock:
            self._entries = []

    def _unwrap(self) -> None:
        """Find the model anew in its wrappers, where another one may be."""
        model = unwrapped(self._given)
        if model is not self.model:
            with self._lock:
                self.model, self._entries = model, []

    def _find(self, signature: Signature, tensors: list[Tensor]) -> tuple[Entry, list[Any]] | None:
        """A graph that is valid for these inputs and the model as it is, and the values of its parameters."""
        fitting = [x for x in self._entries if x.signature == signature and x.captured.guards.accept(tensors)]
        known = [(entry.compared.get(entry.kind(tensors)), entry) for entry in fitting]
        for equal, entry in sorted(known, key=lambda one: not one[0]):  # those that were found equal first
            if equal is False:
                continue  # the model treats these inputs in another way
            if self.live and not entry.fingerprint.matches():
                continue
            owned = entry.captured.parameters(self.model)
            if owned is None:
                continue
            if self._entries[:1] != [entry]:
                with self._lock:
                    if entry in self._entries:  # not forgotten meanwhile
                        self._entries = [entry, *(other for other in self._entries if other is not entry)]
            with outside_inference():
                return entry, [_ordinary(value) for value in owned]
        return None

    def _is_settled(self, entry: Entry, tensors: list[Tensor]) -> bool:
        """Whether the graph needs no comparison with the model at this call."""
        return entry.compared.get(entry.kind(tensors), False) and not (entry.doubts and self.live)

    def _captured(
        self, signature: Signature, args: Any, kwargs: Any, tensors: list[Tensor], batch_varies: bool = True
    ) -> tuple[Entry, list[Any]]:
        check_weights(self.model)
        fingerprint = Fingerprint(self.model)  # before, so that what changes meanwhile is seen
        try:
            with outside_inference():
                captured = capture(self.model, args, kwargs, batch_varies)
        except CaptureError:
            self._try_model(args, kwargs)
            raise
        finally:
            fingerprint.undo()
        if batch_varies and (captured.guards.divides_batch or not captured.guards.accept(tensors)):
            # The model computes with the size of the batch as a number of Python's, and a batch of one was captured as two.
            return self._captured(signature, args, kwargs, tensors, batch_varies=False)
        entry = Entry(signature, captured, fingerprint)
        self._entries = [entry, *self._entries][:CAPTURES]
        alike = sum(other.signature.spec == signature.spec for other in self._entries)
        if alike >= MANY and not self._warned:
            self._warned = True
            log.warning(
                "%s was captured %d times, for inputs of other sizes or other constants each; resize them to a few "
                "sizes, or batch, since every capture takes about a second; the last %d are kept",
                type(self.model).__name__,
                alike,
                CAPTURES,
            )
        owned = captured.parameters(self.model)
        if batch_varies and not captured.guards.accept(tensors) and all(len(x) == 1 for x in tensors if x.dim()):
            # A batch of one was captured as two, and the model treats two in a way of its own.
            return self._captured(signature, args, kwargs, tensors, batch_varies=False)
        if owned is None or not captured.guards.accept(tensors):
            raise CaptureError(
                f"the captured graph does not take inputs of sizes {[tuple(x.shape) for x in tensors]}; "
                "dimension 0 of every tensor input must be the batch"
            )
        fingerprint.reads(functools.partial(captured.found_by_name, self.model))
        with outside_inference():
            return entry, [_ordinary(value) for value in owned]

    def _compared(
        self,
        entry: Entry,
        owned: list[Any],
        args: Any,
        kwargs: Any,
        leaves: list[Any],
        tensors: list[Tensor],
        due: bool = False,
    ) -> tuple[Entry, list[Any]]:
        """The entry, its outputs on these very inputs found equal to the model's own; for a batch of one perhaps another one.

        Raises:
            CaptureError: they are not equal; the message says where.
        """
        if not due and self._is_settled(entry, tensors):
            return entry, owned
        apart = entry.fingerprint.tells_apart
        if apart and is_training(self.model):
            raise CaptureError(
                f"{type(self.model).__name__} is in training mode, where fastrel runs a copy of its modules, and its code {apart}, so "
                "that a copy may compute something else; call model.eval() first"
            )
        kind = entry.kind(tensors)
        stale = entry.compared.get(kind, False) and not entry.doubts
        looking, before = Looking(), bool(entry.compared)
        try:
            if not before and entry.fingerprint.converts_tensors:
                looking.looked = converts(self.model, args, kwargs)
            found = difference(self.model, entry.captured, owned + leaves, args, kwargs, looking)
        except (RuntimeError, IndexError, ValueError):
            self._try_model(args, kwargs)
            raise
        entry.doubts = math.inf if looking.looked else max(0, entry.doubts - 1)
        if not before and entry.fingerprint.ignore_what_the_model_writes() and found is None:
            # What it wrote, it may read at the next call.
            entry.doubts = max(entry.doubts, WRITES)
            found = difference(self.model, entry.captured, owned + leaves, args, kwargs)
        entry.compared[kind] = found is None
        if found is None:
            return entry, owned
        single = entry.is_single(tensors)
        if single or before:
            # Another batch than that of the capture, or other numbers; or a change that the fingerprint did not see.
            if stale:
                self._drop(entry)
                log.warning(
                    "%s is no longer what was captured of it, in a way that its fingerprint does not see: %s. It is captured anew; "
                    "up to %d explanations before this one may be of the model as it was. Call explainer.reset() after such a change",
                    type(self.model).__name__,
                    found,
                    NOW_AND_THEN - 1,
                )
            entry, owned = self._captured(entry.signature, args, kwargs, tensors, batch_varies=not single)
            return self._compared(entry, owned, args, kwargs, leaves, tensors)
        self._drop(entry)
        raise CaptureError(
            f"the captured graph of {type(self.model).__name__} is not the model: {found}; what it computes may "
            "depend on nothing but its inputs, weights and options: not on which object runs, on chance, or on earlier calls"
        )

    def _drop(self, entry: Entry) -> None:
        self._entries = [other for other in self._entries if other is not entry]

    def _try_model(self, args: Any, kwargs: Any) -> None:
        """Tell a model that rejects its inputs from one that cannot be captured."""
        try:
            run_model(self.model, args, kwargs)
        except Exception as error:
            if is_device_error(error):
                raise
            raise rejected(self.model, error, pytree.tree_leaves((args, kwargs))) from error


def _program(captured: Captured, options: Options, outputs: tuple[int, ...], trace: bool) -> Program:
    value = captured.outputs[outputs[0]].meta["val"]
    dtype = lane_dtype(value.dtype)
    program = transform(
        captured,
        options.method,
        rules=options.rules,
        leaves=outputs,
        trace=trace,
        memory=options.memory,
        products=precision_.products(options.precision, options.rules, dtype, value.device, options.backend),
    )
    backends.lower(program.reverse, options.backend, value.device, program.dtype, keep_weights=options.memory == "normal")
    return program


def _ordinary(x: Any) -> Any:
    """A tensor made in inference mode as one that has a version; everything else as it is."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x
