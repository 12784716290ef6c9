"""What a run over a data set is asked for: everything that its numbers depend on, and where it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from fastrel import methods
from fastrel.errors import InputError
from fastrel.explainer import Explainer
from fastrel.graph.facts import Memory
from fastrel.models import Loaded, load
from fastrel.options import Backend
from fastrel.precision import Precision
from fastrel.reference.rules import Rules
from fastrel.version import __version__

#: Fields that say where and how fast, not what.
_PLACE = frozenset({"device", "backend", "batch_size", "memory"})


@dataclass(frozen=True)
class Settings:
    """A model as `fastrel.models.load` takes it, a method as `Explainer` takes it, and the targets.

    method: None is the default of `Explainer`.
    target: class numbers or names, or one word such as "top3": that many of the highest classes; None: the highest one.
    """

    model: str | None = None
    weights: str | None = None
    random: bool = False
    classes: tuple[str, ...] = ()
    dtype: str = "float32"
    device: str = "cpu"
    long: Literal["refuse", "window"] = "refuse"
    method: str | None = None
    rules: Rules = "positive"
    start_layer: int | None = None
    normalize_rollout: bool | None = None
    precision: Precision = "float32"
    backend: Backend = "auto"
    memory: Memory = "normal"
    target: tuple[str, ...] | None = None
    batch_size: int = 8

    def load(self, pairs: bool = False) -> Loaded:
        """The model with what feeds it; `pairs`: it may read pictures with texts.

        Raises:
            InputError: as `fastrel.models.load`, and for a model of pictures with texts whose classes are not given.
        """
        loaded = load(
            self.model,
            weights=self.weights,
            random=self.random,
            dtype=self.dtype,
            device=self.device,
            long=self.long,
            classes=self.classes,
        )
        if loaded.kind == "multimodal" and not pairs:
            raise InputError(
                f"{self.model!r} compares pictures with texts: give its classes in words (--classes 'a photo of a cat' 'a photo of "
                "a dog'), and it classifies pictures; or explain one pair, fastrel explain PICTURE --text TEXT; anything else "
                "takes a loop of your own with fastrel.Explainer"
            )
        return loaded

    @property
    def method_name(self) -> str:
        """The name of the method."""
        return self.method or methods.default(self.rules).name

    def explainer(self, loaded: Loaded) -> Explainer:
        """Its explainer."""
        return Explainer(
            loaded.model,
            self.method_name,
            rules=self.rules,
            start_layer=self.start_layer,
            normalize_rollout=self.normalize_rollout,
            precision=self.precision,
            backend=self.backend,
            memory=self.memory,
        )

    def describe(self, loaded: Loaded) -> dict[str, Any]:
        """What the numbers depend on, as JSON: runs that differ in it must not be mixed."""
        own = {name: value for name, value in asdict(self).items() if name not in _PLACE}
        own["method"] = self.method_name
        own["target"] = None if self.target is None else list(self.target)
        return own | {"kind": loaded.kind, "reader": loaded.reader.describe(), "sha256": loaded.fingerprint()}

    def circumstances(self) -> dict[str, Any]:
        """What the numbers depend on by rounding at most."""
        return {
            "fastrel": __version__,
            "torch": torch.__version__,
            **{name: value for name, value in asdict(self).items() if name in _PLACE},
        }


def count_of_highest(target: tuple[str, ...] | None) -> int | None:
    """K of "topK", 1 if no target is given, None if classes are.

    Raises:
        InputError: "top0", or "topK" among classes.
    """
    if target is None:
        return 1
    counts = [word[3:] for word in target if word.startswith("top") and word[3:].isdigit()]
    if not counts:
        return None
    if len(target) > 1 or int(counts[0]) < 1:
        raise InputError(f"target {' '.join(target)!r}: give topK alone, with K from 1 on, or classes")
    return int(counts[0])
