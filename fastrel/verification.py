"""Proof on the user's own model: what can be checked about an explanation without trusting the engine."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastrel import methods
from fastrel.comparison import difference
from fastrel.eager import propagation
from fastrel.engine import Call, Engine
from fastrel.errors import FastrelError, first_line
from fastrel.explanation import Explanation
from fastrel.graph.ambient import plainly
from fastrel.graph.equivalents import equivalent
from fastrel.graph.results import plain
from fastrel.leaves import FrozenLeaves, Leaves
from fastrel.maps import TokenMap
from fastrel.noise import NOISY
from fastrel.options import Options
from fastrel.outputs import logits_index
from fastrel.prediction import Prediction
from fastrel.targets import Target, classes_of
from fastrel.trace import BlockTrace
from fastrel.transform.method import Chain
from fastrel.transform.program import Map, Program


@dataclass(frozen=True)
class Check:
    """One thing checked.

    Attributes:
        name: what was checked; `verify` says what each is.
        value: how far it is off, mostly a relative distance.
        limit: what `value` may be at most; None: for information.
        meaning: for people.
    """

    name: str
    value: float
    limit: float | None
    meaning: str

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return self.limit is None or self.value <= self.limit

    def __str__(self) -> str:
        verdict = "  " if self.limit is None else "ok" if self.ok else "✗ "
        bound = "" if self.limit is None else f" (limit {self.limit:.0e})"
        return f"{verdict} {self.name:<28}{self.value:.2e}{bound}  {self.meaning}"


@dataclass(frozen=True)
class Verification:
    """The report of `Explainer.verify`; prints as a line per check.

    Attributes:
        checks: what was checked.
        generic: operators that took the generic rule.
        blocks: how many attention blocks take part.
        maps: the shape of each input's map, in words.
    """

    checks: tuple[Check, ...]
    generic: tuple[str, ...]
    blocks: int
    maps: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{self.blocks} attention blocks", *(f"   {name}: {shape}" for name, shape in self.maps.items())]
        lines += [str(check) for check in self.checks]
        lines += [f"   generic rule: {name}" for name in self.generic]
        return "\n".join([*lines, "verified" if self.ok else "NOT verified"])


@dataclass(frozen=True)
class _Subject:
    """One explained call, and how to explain it in other ways."""

    engine: Engine
    options: Options
    args: Sequence[Any]
    kwargs: dict[str, Any]
    target: Target
    call: Call
    prediction: Prediction
    explanation: Explanation

    @classmethod
    def of(cls, engine: Engine, options: Options, args: Sequence[Any], kwargs: dict[str, Any], target: Target) -> _Subject:
        call = engine.enter(args, kwargs)
        prediction = _predict(engine, options, call)
        explanation = prediction.explain(target)
        fixed = target if callable(target) else explanation.target
        return cls(engine, options, args, kwargs, fixed, call, prediction, explanation)

    def explain(self, **changes: Any) -> Explanation:
        """The same call, explained with other options."""
        options = replace(self.options, **changes)
        return _predict(self.engine, options, self.call).explain(self.target)

    @functools.cached_property
    def program(self) -> Program:
        """What explains the outputs that the target reads, which need not be those that a class is picked from."""
        return self.program_of(self.options)

    def program_of(self, options: Options) -> Program:
        """The same with other options."""
        return self.engine.program(self.call.entry, options, self.prediction.seeds(self.target).outputs)

    @functools.cached_property
    def widened(self) -> _Subject:
        """The same in float64, by the plain PyTorch backend, on a copy of the model."""

        def wide(x: Any) -> Any:
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        model = copy.deepcopy(self.engine.model).double()
        for module in model.modules():
            module.training = False
        args, kwargs = pytree.tree_map(wide, (tuple(self.args), self.kwargs))
        return _Subject.of(Engine(model), self._plainly, args, kwargs, self.target)

    @property
    def plain(self) -> _Subject:
        """The same in the model's own dtype, by the plain PyTorch backend."""
        return _Subject.of(self.engine, self._plainly, self.args, self.kwargs, self.target)

    @property
    def _plainly(self) -> Options:
        return replace(self.options, backend="torch", precision="float32", memory="normal")

    @property
    def official(self) -> bool:
        """Whether the rules are those whose maps depend on rounding."""
        return self.options.rules != "positive"

    def limit(self, wide: float, single: float, low: float) -> float:
        """What may be off in float64, in float32, and in 16-bit models."""
        made = (node.meta.get("val") for node in self.call.captured.facts.active)
        dtypes = {x.dtype for x in (*self.call.values, *made) if isinstance(x, Tensor) and x.is_floating_point()}
        if dtypes & {torch.float16, torch.bfloat16}:
            return low
        return wide if dtypes == {torch.float64} else single


def verify(engine: Engine, options: Options, args: Sequence[Any], kwargs: dict[str, Any], target: Target) -> Verification:
    """Check the explanation of one batch, for its predicted classes or any target:

    - prediction: the captured graph's outputs against the live model's, on these inputs;
    - finite: entries of the maps that are not;
    - relevance: that of every attention map, in float64 where the model runs in it, against the second path,
      `fastrel.propagation`, which runs the model itself and shares formulas with nobody but `fastrel.reference` (relative L2, the
      worst map);
    - gradient: the engine's gradient lane times the value where a map is read, summed over features, against torch.autograd
      through the captured forward graph (L2, relative to the sums of absolute terms);
    - gradient by AttnLRP: the same of the gradient that the method has, if it is this one, with the rules as custom gradients;
    - rows: a block adds I + M to the rollout, so that with M = A, whose rows sum to 1, it at most doubles it: by how much
      more it grew;
    - exactness: the maps against the same in float64 by the plain PyTorch backend (relative L2 without the highest token);
    - batch: the map of the first sample alone against the batch;
    - rounding: `fastrel.noise`;
    - relevance that arrives: the sum of relevance where the map is read, of 1 at the logits. Under the positive rules none
      is created, and what is missing met sums of 0 or constants.

    A check that cannot be made on this model says why.
    """
    subject = _Subject.of(engine, options, args, kwargs, target)
    explanation = subject.explanation
    checks = [check for make in _CHECKS for check in make(subject)]
    shapes = {
        name: f"{tuple(one.relevance.shape[1:])} tokens"
        + (f", on a grid of {' × '.join(map(str, one.grid.shape[-2:]))} patches" if one.grid is not None else "")
        + (f", each of {name} and {' and '.join(one.beside)}" if one.beside else "")
        for name, one in explanation.maps.items()
    }
    return Verification(tuple(checks), subject.program.generic, subject.program.blocks, shapes)


def _predict(engine: Engine, options: Options, call: Call, trace: bool = False) -> Prediction:
    program = engine.explaining(call, options, trace)
    return Prediction(engine, options, call, program)


def _prediction(subject: _Subject) -> Iterator[Check]:
    found = difference(
        subject.engine.model, subject.call.captured, subject.call.values, tuple(subject.args), subject.kwargs
    )
    yield Check("prediction", float(found is not None), 0, found or "the live model's, on these inputs")


def _finite(subject: _Subject) -> Iterator[Check]:
    bad = sum(int((~one.relevance.isfinite()).sum()) for one in subject.explanation.maps.values())
    yield Check("finite", float(bad), 0, "entries of the map that are not finite")


def _relevance(subject: _Subject) -> Iterator[Check]:
    """The relevance of attention maps by the second path."""
    meaning = "of attention maps, against propagation through the model itself"
    limit = 1e-4 if subject.official else 1e-7
    try:
        try:
            wide = subject.widened
        except (FastrelError, RuntimeError):
            if subject.official:  # whose maps no other dtype has
                raise
            wide, limit = subject.plain, subject.limit(1e-7, 1e-3, 5e-2)
            meaning += ", in the model's own dtype, for it does not run in float64"
        options = replace(wide.options, base=methods.METHODS["transformer_attribution"], start_layer=0)
        ours = _predict(wide.engine, options, wide.call, trace=True).trace(wide.target)
        theirs = _second_path(wide)
        worst, left = _apart(ours, theirs)
        if left:
            meaning += f"; {left} more of those are over channels"
    except (FastrelError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        yield Check("relevance", float("nan"), None, f"not checked, the second path does not take it: {first_line(error)}")
        return
    yield Check("relevance", worst, limit, meaning)


def _second_path(wide: _Subject) -> list[Tensor]:
    """The relevance [K, B, h, Tq, Tk] of every attention map, from the input, by autograd through the eager model."""

    def entering(x: Any) -> Any:
        return x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x

    args, kwargs = pytree.tree_map(entering, (tuple(wide.args), wide.kwargs))
    with plainly(grad=True):
        with propagation(
            wide.options.rules, [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ) as tape:
            output = equivalent(wide.engine.model)(*args, **kwargs)
        seeds = _relevance_seeds(wide, output)
        leaves = pytree.tree_leaves(plain(output))
        found = []
        for k in range(len(seeds[0][1])):
            ends = [leaves[i] for i, _ in seeds]
            given = [seed[k] for _, seed in seeds]
            found.append(torch.autograd.grad(ends, tape.attention, given, retain_graph=True, allow_unused=True))
    reached = [i for i, parts in enumerate(zip(*found, strict=True)) if any(part is not None for part in parts)]
    return [
        torch.stack([torch.zeros_like(tape.attention[i]) if parts[i] is None else parts[i] for parts in found])
        for i in reached
    ]


def _relevance_seeds(wide: _Subject, output: Any) -> list[tuple[int, Tensor]]:
    """The relevance of the outputs that the target reads, [K, B, …], by their place in the output."""
    seeds = wide.prediction.seeds(wide.target)
    return list(zip(seeds.outputs, seeds.relevance, strict=True))


def _apart(ours: list[BlockTrace], theirs: list[Tensor]) -> tuple[float, int]:
    """The worst distance between maps in order, and how many of theirs belong to none of ours: those over channels, which are no
    attention blocks. Heads that the model computes one by one are one block of ours, and a map each of theirs."""
    if len(ours) > len(theirs):
        raise FastrelError(f"it finds {len(theirs)} attention maps, the engine {len(ours)}")
    worst, place, left = 0.0, 0, len(theirs)
    for i, one in enumerate(ours):
        last = len(theirs) - (len(ours) - i) + 1
        fitting = {k: _heads_from(theirs[k:], one) for k in range(place, last)}
        apart = {k: _maps_apart(one, torch.cat(found, 2)) for k, found in fitting.items() if found}
        if not apart:
            raise FastrelError(f"it has no map for the engine's {tuple(one.attention.shape)}")
        place = min(apart, key=lambda k: apart[k])
        worst, left, place = max(worst, apart[place]), left - len(fitting[place]), place + len(fitting[place])
    return worst, left


def _heads_from(theirs: list[Tensor], ours: BlockTrace) -> list[Tensor]:
    """The first of some maps, or as many of one head each as make up ours; none where it is of other keys."""
    first, size = theirs[0], ours.attention.shape
    if first.shape[-1] != size[-1]:
        return []
    alone = first.dim() == 5 and first.shape[2] == 1 and first.numel() < ours.attention.numel()
    heads = size[-3] if alone else 1
    same = [x for x in theirs[:heads] if x.shape == first.shape]
    return same if len(same) == heads else []


def _maps_apart(ours: BlockTrace, theirs: Tensor) -> float:
    """Relative L2 distance; queries that nothing reads are zero in theirs and absent in ours, and heads may come after windows."""
    own = ours.relevance
    if own is None or own.shape[-1] != theirs.shape[-1] or own.numel() > theirs.numel():
        raise FastrelError(f"it finds a map {tuple(theirs.shape)} where the engine has another")
    if own.shape[-2] < theirs.shape[-2]:
        own, theirs = own.sum(-2), theirs.sum(-2)
    norm = float(theirs.norm()) or 1.0
    orders = [theirs, theirs.transpose(2, 3)] if theirs.dim() > 4 else [theirs]
    return min(float((own.reshape(x.shape) - x).norm()) / norm for x in orders)


def _gradient(subject: _Subject) -> Iterator[Check]:
    """The gradient lane times the value, where a map is read, against autograd."""
    yield _gradient_apart(subject, "gradient", "input_x_gradient", Leaves)


def _frozen_gradient(subject: _Subject) -> Iterator[Check]:
    """The same of AttnLRP's gradient, where the method has it."""
    if subject.options.method.attnlrp:
        yield _gradient_apart(subject, "gradient by AttnLRP", "attnlrp", FrozenLeaves)


def _gradient_apart(subject: _Subject, name: str, method: str, kind: type[Leaves]) -> Check:
    changes: dict[str, Any] = {"base": methods.METHODS[method], "start_layer": subject.options.method.start_layer}
    try:
        ours, program = subject.explain(**changes), subject.program_of(replace(subject.options, **changes))
    except FastrelError as error:
        return Check(name, float("nan"), None, f"not checked: {first_line(error)}")
    worst = 0.0
    for where, own in _by_value(program.maps, ours.maps.values()):
        found = _times_gradient(subject, kind(subject.call.captured, where.nodes), where.features)
        own = own if own.dim() == 3 else own[:, None]
        expected, size = (
            _samples_first(subject, where, x).reshape(own.shape[1], own.shape[0], -1).transpose(0, 1) for x in found
        )
        # Relative to the terms: their sum is nearly 0 before a layer norm.
        worst = max(worst, float((own.double() - expected).norm() / size.norm().clamp_min(1e-300)))
    return Check(name, worst, subject.limit(1e-9, 1e-3, 2e-2), "against torch.autograd")


def _times_gradient(subject: _Subject, run: Leaves, features: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Gradient of the target times the values that are leaves, and its absolute values, summed over features: [K, B, …] each."""
    with plainly(grad=True):
        outputs = list(run.run(*subject.call.values))
        scores = _scores(subject, outputs, pytree.tree_unflatten(outputs, subject.call.captured.out_spec))
        grads = [torch.autograd.grad(score.sum(), run.found, retain_graph=True) for score in scores.unbind(1)]
    product = torch.stack([torch.stack([g * x for g, x in zip(parts, run.found, strict=True)]).sum(0) for parts in grads])
    product = product.detach().double()
    dims = [dim + 1 for dim in features]
    return (product.sum(dims), product.abs().sum(dims)) if dims else (product, product.abs())


def _samples_first(subject: _Subject, where: Map, x: Tensor) -> Tensor:
    """A value [K, …] where a map is read, without features, as [K, B, …]."""
    facts = subject.call.captured.facts
    axes = next(axes for node, axes in facts.axes.items() if node.name == where.nodes[0])
    kept = [axis for dim, axis in enumerate(axes) if dim not in where.features]
    batch = next((i for i, axis in enumerate(kept) if [role for _, role in axis] == ["batch"]), 0)
    return x.movedim(batch + 1, 1)


def _by_value(wheres: Sequence[Map], maps: Iterable[TokenMap]) -> Iterator[tuple[Map, Tensor]]:
    """The relevance that was read at each value: of several inputs where these were joined before."""
    for _, pairs in itertools.groupby(zip(wheres, maps, strict=True), lambda pair: pair[0].nodes):
        found = list(pairs)
        yield found[0][0], torch.cat([one.relevance for _, one in found], -1)


def _scores(subject: _Subject, outputs: list[Any], output: Any) -> Tensor:
    """What is explained, [B, K], from the model's outputs."""
    if callable(subject.target):
        value = subject.target(output)
        return value.reshape(len(value), -1)
    logits = outputs[logits_index(subject.call.captured, subject.options.output)]
    return logits.reshape(len(logits), -1).gather(1, classes_of(logits, subject.target).reshape(len(logits), -1))


def _rows(subject: _Subject) -> Iterator[Check]:
    """The sum of the rollout of attention maps as they are, at most doubled by every block."""
    base = replace(methods.METHODS["rollout"], normalize=False)
    try:
        maps = subject.explain(base=base, start_layer=subject.options.method.start_layer, normalize_rollout=False).maps
        raw = subject.explain(
            base=replace(base, reading=Chain("attention", residual=False)), start_layer=-1, normalize_rollout=False
        )
    except FastrelError as error:
        yield Check("rows", float("nan"), None, f"not checked: {first_line(error)}")
        return
    blocks = subject.program.blocks
    total, last = (sum(_total(one) for one in found.values()) for found in (maps, raw.maps))
    expected = 2.0**blocks
    excess = max(float((total / expected).max()), float(last.max())) - 1  # type: ignore[union-attr]
    lost = 1 - float((total / expected).min())  # type: ignore[union-attr]
    meaning = f"the rollout of {blocks} attention maps adds up to 2ⁿ"
    limit: float | None = subject.limit(1e-9, 1e-4, 2e-2)
    facts = subject.call.captured.facts
    if any(map(facts.is_mixed_value, facts.nodes)):
        limit, meaning = None, f"the rollout of {blocks} attention maps; where they are no softmax, rows need not sum to 1"
    elif lost > 1e-3:
        met = "constant tokens, attention sinks, blocks without a residual or blocks of other sequences"
        meaning += f", less {lost:.0%} that met {met}"
    yield Check("rows", max(excess, 0.0), limit, meaning)


def _total(one: TokenMap) -> Tensor:
    return one.relevance.double().sum(-1)


def _exactness(subject: _Subject) -> Iterator[Check]:
    bound, meaning = None if subject.official else subject.limit(1e-8, 1e-3, 5e-2), "against float64 in plain PyTorch"
    try:
        exact = subject.widened.explanation
    except (FastrelError, RuntimeError, ValueError) as error:
        meaning = f"not to be had, the model does not run in float64: {first_line(error)}"
        yield Check("exactness", float("nan"), None, meaning)
        return
    yield Check("exactness", _farthest(subject.explanation, exact), bound, meaning)


def _batch(subject: _Subject) -> Iterator[Check]:
    def first(x: Any) -> Any:
        return x[:1] if isinstance(x, Tensor) and x.dim() else x

    args, kwargs = pytree.tree_map(first, (tuple(subject.args), subject.kwargs))
    target = subject.target if callable(subject.target) else first(subject.target)
    try:
        alone = _Subject.of(subject.engine, subject.options, args, kwargs, target).explanation
    except FastrelError as error:
        yield Check("batch", float("nan"), None, f"not checked: {first_line(error)}")
        return
    bound = None if subject.official else subject.limit(1e-9, 1e-3, 2e-2)
    yield Check("batch", _farthest(subject.explanation[0], alone), bound, "one sample alone")


def _rounding(subject: _Subject) -> Iterator[Check]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noise = float(subject.explanation.noise_floor(1).max())
    low = subject.limit(0, 0, 1) == 1
    yield Check("rounding", noise, None if subject.official or low else NOISY, "how far rounding moves the map")


def _arriving(subject: _Subject) -> Iterator[Check]:
    try:
        maps = subject.explain(base=methods.METHODS["lrp"], start_layer=subject.options.method.start_layer).maps
        arrives = float(sum(_total(one) for one in maps.values()).mean())  # type: ignore[union-attr]
    except FastrelError as error:
        yield Check("relevance that arrives", float("nan"), None, f"not to be had: {first_line(error)}")
        return
    yield Check("relevance that arrives", arrives, None, "of 1 at the logits")


_CHECKS: tuple[Callable[[_Subject], Iterator[Check]], ...] = (
    _prediction,
    _finite,
    _relevance,
    _gradient,
    _frozen_gradient,
    _rows,
    _exactness,
    _batch,
    _rounding,
    _arriving,
)


def _farthest(ours: Explanation, theirs: Explanation) -> float:
    """Relative L2 distance of maps over all tokens but the highest, the worst sample."""
    worst = 0.0
    for name, one in ours.maps.items():
        a, b = (x.double().reshape(-1, x.shape[-1]) for x in (one.relevance, theirs.maps[name].relevance))
        highest = b.argmax(1, keepdim=True)
        a, b = a.scatter(1, highest, 0.0), b.scatter(1, highest, 0.0)
        norm = b.norm(dim=1)
        worst = max(worst, float(((a - b).norm(dim=1) / norm.where(norm > 0, 1)).max()))
    return worst
