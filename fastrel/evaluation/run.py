"""The loop over items, configurations and scorers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastrel import methods
from fastrel.data import ImageItem, TextItem
from fastrel.data.ahead import Failed, ahead
from fastrel.errors import CaptureError, FastrelError, InputError, UnsupportedModelError, reason
from fastrel.evaluation import scorers
from fastrel.evaluation.store import Score, Store
from fastrel.evaluation.subjects import ImageSubject, TextSubject
from fastrel.explainer import Explainer
from fastrel.transform.method import Chain

Failures = dict[str, str]

#: What reading an item's mask may raise: files that are not there, or not what they should be.
_UNREADABLE = (InputError, OSError, ValueError, SyntaxError)


@dataclass(frozen=True)
class Configuration:
    """A method with its options, under the name that scores are kept by: that of the method, and of the rules if they matter."""

    name: str
    method: str
    rules: str
    start_layer: int | None = None
    normalize: bool | None = None

    def explainer(self, shared: Explainer) -> Explainer:
        """An explainer of the same model."""
        return shared.using(self.method, rules=self.rules, start_layer=self.start_layer, normalize_rollout=self.normalize)


def configurations(
    names: Sequence[str], rules: Sequence[str], start_layer: int | None = None, normalize: bool | None = None
) -> list[Configuration]:
    """Every method, once per rule set where its relevance depends on one. Options apply to those that chain eq. (13) alone.

    Raises:
        InputError: an unknown method.
    """
    found = []
    for name in names:
        method = methods.get(name)
        own = (start_layer, normalize) if method.reading == Chain("gradient_relevance") else (None, None)
        for chosen in rules if method.needs_relevance else rules[:1]:
            found.append(Configuration(f"{name}, {chosen}" if method.needs_relevance else name, name, chosen, *own))
    return found


def labels(chosen: Sequence[Configuration]) -> dict[str, str]:
    """What tables call configurations, by their names: the method alone where it has one set of rules among these."""
    names: dict[str, set[str]] = {}
    for one in chosen:
        names.setdefault(one.method, set()).add(one.name)
    return {one.name: one.method if len(names[one.method]) == 1 else one.name for one in chosen}


def evaluate(
    subject: ImageSubject | TextSubject,
    items: Sequence[ImageItem] | Sequence[TextItem],
    chosen: Sequence[Configuration],
    metrics: Sequence[str],
    store: Store,
    progress: Callable[[str], None] = lambda item: None,
    *,
    explainer: Explainer | None = None,
    batch_size: int = 1,
    workers: int = 0,
) -> Failures:
    """Score every item with every configuration; scores already in the store are not computed again.

    Calls `progress` with the name of each item that is done with. Returns the items that could not be scored, with the
    reason; all others were.

    Args:
        explainer: of the subject's model, with the options that all configurations share; default: a plain one.
        batch_size: how many items are explained at a time.
        workers: processes that read and decode ahead; 0: one, which does not.

    Raises:
        InputError: items of a kind that the subject does not take, an unknown metric, or none of the items could be scored.
        CaptureError: the model cannot be captured.
        UnsupportedModelError: the model cannot be explained.
    """
    if any(not isinstance(item, subject.kind) for item in items):
        raise InputError(f"this model takes {subject.kind.__name__}s, the data holds {type(items[0]).__name__}s")
    functions = {name: scorers.get(subject.kind, name) for name in metrics}
    shared = explainer or Explainer(subject.loaded.model)
    explainers = {configuration.name: configuration.explainer(shared) for configuration in chosen}
    failures: Failures = {}
    left = []
    for item in items:
        if all(store.done(item.name, c, m) for c in explainers for m in functions):
            progress(item.name)
        else:
            left.append(item)
    for batch in _read(subject, left, batch_size, workers, failures):
        for name, own in explainers.items():
            missing = [(i, s) for i, s in batch if any(not store.done(i.name, name, m) for m in functions)]
            explained = list(_explained(subject, own, missing, scorers.needs_predicted(metrics), name, failures))
            for metric, function in functions.items():
                todo = [pair for pair in explained if not store.done(pair[0].name, name, metric)]
                for item, values in _scored(subject, function, todo, name, failures):
                    store.add([Score(item.name, item.group, name, metric, key, value) for key, value in values.items()])
        for item, _ in batch:
            progress(item.name)
    wanted = {item.name for item in items}
    scored = any(s.item in wanted and s.configuration in explainers and s.scorer in functions for s in store.scores)
    if failures and not scored:
        first, why = next(iter(failures.items()))
        raise InputError(f"none of {len(items)} items could be scored; {first}: {why}")
    return failures


def _read(
    subject: Any, items: Sequence[Any], size: int, workers: int, failures: Failures
) -> Iterator[list[tuple[Any, Any]]]:
    """Batches of (item, sample), read ahead; unreadable items go to the failures."""
    batches = [items[at : at + size] for at in range(0, len(items), size)]
    for batch, samples in zip(batches, ahead(batches, subject.read, workers), strict=True):
        failures |= {
            item.name: sample.reason for item, sample in zip(batch, samples, strict=True) if isinstance(sample, Failed)
        }
        yield [pair for pair in zip(batch, samples, strict=True) if not isinstance(pair[1], Failed)]


def _explained(
    subject: Any, explainer: Explainer, batch: Sequence[tuple[Any, Any]], predicted: bool, name: str, failures: Failures
) -> Iterator[tuple[Any, Any]]:
    """The maps of a batch; if that fails, of each item alone, and those that fail alone are failures."""
    if not batch:
        return
    items, samples = zip(*batch, strict=True)
    try:
        yield from zip(items, subject.explain(explainer, items, samples, predicted), strict=True)
    except (CaptureError, UnsupportedModelError) as error:
        raise type(error)(f"{name}: {error}") from error
    except (FastrelError, ValueError, RuntimeError) as error:
        if len(batch) == 1:
            failures[items[0].name] = f"{name}: {reason(error)}"
            return
        for one in batch:
            yield from _explained(subject, explainer, [one], predicted, name, failures)


def _scored(
    subject: Any, function: Any, batch: Sequence[tuple[Any, Any]], name: str, failures: Failures
) -> Iterator[tuple[Any, scorers.Values]]:
    """The values of a batch by one scorer; if that fails, of each item alone, and those that fail alone are failures."""
    if not batch:
        return
    items, maps = zip(*batch, strict=True)
    try:
        found = function(subject, items, maps)
    except (*_UNREADABLE, RuntimeError) as error:
        if len(batch) == 1:
            failures[items[0].name] = f"{name}: {reason(error)}"
            return
        for one in batch:
            yield from _scored(subject, function, [one], name, failures)
        return
    yield from ((item, values) for item, values in zip(items, found, strict=True) if values)
