"""The loop over items, configurations and scorers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastrel import methods
from fastrel.data import ImageItem, TextItem
from fastrel.errors import FastrelError, InputError
from fastrel.evaluation import scorers
from fastrel.evaluation.store import Score, Store
from fastrel.evaluation.subjects import ImageSubject, TextSubject
from fastrel.explainer import Explainer

Failures = dict[str, str]


@dataclass(frozen=True)
class Configuration:
    """A method with its options, under the name that tables give it."""

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
    """Every method, once per rule set where its relevance depends on one. Options apply to transformer attribution alone.

    Raises:
        InputError: an unknown method.
    """
    found = []
    for name in names:
        method = methods.get(name)
        own = (start_layer, normalize) if name == "transformer_attribution" else (None, None)
        for chosen in rules if method.needs_relevance else rules[:1]:
            label = f"{name}, {chosen}" if method.needs_relevance and len(rules) > 1 else name
            found.append(Configuration(label, name, chosen, *own))
    return found


def evaluate(
    subject: ImageSubject | TextSubject,
    items: Sequence[ImageItem] | Sequence[TextItem],
    chosen: Sequence[Configuration],
    metrics: Sequence[str],
    store: Store,
    progress: Callable[[str], None] = lambda item: None,
) -> Failures:
    """Score every item with every configuration; scores already in the store are not computed again.

    Calls `progress` with the name of each item that is done with. Returns the items that could not be scored, with the
    reason; all others were.

    Raises:
        InputError: items of a kind that the subject does not take, or an unknown metric.
        UnsupportedModelError, CaptureError: the model cannot be explained.
    """
    if any(not isinstance(item, subject.kind) for item in items):
        raise InputError(f"this model takes {subject.kind.__name__}s, the data holds {type(items[0]).__name__}s")
    functions = {name: scorers.get(subject.kind, name) for name in metrics}
    shared = Explainer(subject.model)
    explainers = {configuration.name: configuration.explainer(shared) for configuration in chosen}
    failures: Failures = {}
    for item in items:
        for configuration in chosen:
            explain: Any = functools.cache(functools.partial(subject.explain, explainers[configuration.name], item))  # type: ignore
            for name, function in functions.items():
                if store.done(item.name, configuration.name, name):
                    continue
                try:
                    values = function(subject, item, explain)
                except (InputError, OSError, ValueError, SyntaxError) as error:
                    failures[item.name] = f"{configuration.name}: {' '.join(str(error).split())}"
                    continue
                except FastrelError as error:
                    raise type(error)(f"{configuration.name}: {error}") from error
                store.add(
                    [Score(item.name, item.group, configuration.name, name, metric, v) for metric, v in values.items()]
                )
        progress(item.name)
    if len(failures) == len(items) and not store.scores:
        name, reason = next(iter(failures.items()))
        raise InputError(f"none of {len(items)} items could be scored; {name}: {reason}")
    return failures
