"""Which of a model's outputs a class is picked from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from fastrel.errors import InputError, UnsupportedModelError
from fastrel.graph.capture import Captured
from fastrel.graph.results import with_paths

#: What outputs of features are called, from which nobody picks a class.
_FEATURES = ("pooler_output", "embeds", "hidden_state", "hidden_states", "features")


@dataclass(frozen=True)
class _Output:
    index: int
    name: str
    shape: tuple[Any, ...]

    def __str__(self) -> str:
        sizes = [str(size) if isinstance(size, int) else "T" if dim else "B" for dim, size in enumerate(self.shape)]
        return f"{self.name} [{', '.join(sizes)}]"


def logits_in(output: Any) -> Any:
    """The logits in what a model returned: the one tensor, else what is called so; None where nothing is."""
    if isinstance(output, Tensor):
        return output
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def logits_index(captured: Captured, output: str | int | None = None) -> int:
    """Which output a class is picked from: the one that is asked for, else that of `candidates`, the first of several.

    Raises:
        InputError: there is no such output.
        UnsupportedModelError: the model returns no floating-point tensor.
    """
    return candidates(captured, output)[0].index


def unclear(captured: Captured, output: str | int | None, headless: bool) -> str | None:
    """Why no class can be picked without asking; None where it is clear what the logits are. `headless`: the model says that it has
    no classes."""
    found = candidates(captured, output)
    if output is None and (headless or all(_is_features(one) for one in found)):
        return f"the model returns features, not logits: {', '.join(map(str, found))}; {_ASK}"
    if len(found) == 1:
        return None
    return f"a class could be picked from {len(found)} of the model's outputs: {', '.join(map(str, found))}; {_ASK}"


_ASK = "say which with Explainer(model, output=NAME), or pass target as a function of the output"


def candidates(captured: Captured, output: str | int | None = None) -> list[_Output]:
    """The outputs that may hold the logits: the one that is asked for or called `logits`; else those with "logits" in their name;
    else those of shape [B, C], else [B], else any that holds floating-point numbers; features only where there is nothing else.

    Raises:
        InputError: there is no such output.
        UnsupportedModelError: the model returns no floating-point tensor.
    """
    every = _floats(captured)
    if output is not None:
        found = [one for one in every if one.name == str(output)]
        if not found:
            raise InputError(f"the model has no output {output!r} to explain; it returns {', '.join(map(str, every))}")
        return found
    called = [one for one in every if one.name == "logits"] or [one for one in every if "logits" in one.name]
    if called:
        return called
    for dims in (2, 1):
        found = [one for one in every if len(one.shape) == dims and not _is_features(one)]
        if found:
            return found
    return [one for one in every if one.shape] or every


def _floats(captured: Captured) -> list[_Output]:
    numbers = list(range(len(captured.outputs)))
    paths = with_paths(pytree.tree_unflatten(numbers, captured.out_spec))
    values: list[Any] = [getattr(node, "meta", {}).get("val") for node in captured.outputs]
    found = [
        _Output(i, _name(path), tuple(values[i].shape))
        for path, i in paths
        if isinstance(i, int) and isinstance(values[i], Tensor) and values[i].is_floating_point()
    ]
    if not found:
        raise UnsupportedModelError("the model returns no floating-point tensor to explain")
    return found


def _name(path: tuple[Any, ...]) -> str:
    """`logits`, `1`, `decoder.hidden_states.0`: keys, fields and places; `output` where the model returns one tensor."""
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return ".".join(parts) or "output"


def _is_features(one: _Output) -> bool:
    return any(part.endswith(_FEATURES) for part in one.name.split("."))
