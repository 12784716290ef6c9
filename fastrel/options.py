"""How an explainer explains: everything that the user may choose, frozen, in types."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from fastrel import backends, methods
from fastrel import precision as precision_
from fastrel.errors import InputError
from fastrel.graph.facts import MEMORIES, Memory
from fastrel.precision import Precision
from fastrel.reference.rules import Rules
from fastrel.transform.method import Method

#: Which implementation computes: the first that can, or one by name.
Backend = Literal["auto", "triton", "cuda", "cpp", "torch"]

RULES: tuple[Rules, ...] = get_args(Rules)


@dataclass(frozen=True)
class Options:
    """What `Explainer` takes, checked. `start_layer` and `normalize_rollout` are None where the method's own holds, `base` where
    the rules' own method does.

    Raises:
        InputError: an option that does not exist, or a backend that cannot run, with the reason.
    """

    base: Method | None = None
    rules: Rules = "positive"
    start_layer: int | None = None
    normalize_rollout: bool | None = None
    precision: Precision = "float32"
    backend: Backend = "auto"
    memory: Memory = "normal"
    output: str | int | None = None
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.rules not in RULES:
            raise InputError(f"unknown rules {self.rules!r}; choose one of {', '.join(RULES)}")
        start = self.start_layer
        if start is not None and (isinstance(start, bool) or not isinstance(start, int)):
            raise InputError(f"start_layer must be an int (a block, negative from the output), not {start!r}")
        if self.normalize_rollout not in (None, True, False):
            raise InputError(f"normalize_rollout must be True, False or None, not {self.normalize_rollout!r}")
        if self.memory not in MEMORIES:
            raise InputError(f"unknown memory {self.memory!r}; choose {' or '.join(MEMORIES)}")
        if self.output is not None and (isinstance(self.output, bool) or not isinstance(self.output, (str, int))):
            raise InputError(f"output must be the name or the place of one of the model's outputs, not {self.output!r}")
        if self.grid is not None:
            object.__setattr__(self, "grid", _checked_grid(self.grid))
        precision_.check(self.precision, self.rules)
        backends.require(self.backend)

    @property
    def method(self) -> Method:
        """The method, with what was chosen in the place of its own."""
        base = self.base or methods.default(self.rules)
        return replace(
            base,
            start_layer=base.start_layer if self.start_layer is None else self.start_layer,
            normalize=base.normalize if self.normalize_rollout is None else self.normalize_rollout,
        )

    @classmethod
    def of(cls, method: str | Method, **others: Any) -> Options:
        """Options with a method given by name or as such."""
        return cls(method_of(method), **others)


def _checked_grid(grid: Any) -> tuple[int, ...]:
    sizes = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(sizes) not in (2, 3) or not all(type(size) is int and size > 0 for size in sizes):
        raise InputError(f"grid must be (rows, columns) of patches, or (frames, rows, columns), not {grid!r}")
    return sizes


def method_of(method: str | Method) -> Method:
    """A method by name, or as it is.

    Raises:
        InputError: there is none of that name.
    """
    return method if isinstance(method, Method) else methods.get(method)
