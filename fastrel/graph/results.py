"""What a model returns, as a graph can return it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

_CONSTANTS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


def plain(output: Any) -> Any:
    """An output without what a graph cannot return, and need not: caches of keys and values and other objects are None."""
    return pytree.tree_map(_leaf, output, is_leaf=_is_cache)


def with_paths(tree: Any) -> list[tuple[pytree.KeyPath, Any]]:
    """Leaves with their paths. Outputs of transformers before 5.13 are mappings that do not tell pytree their keys."""
    return pytree.tree_flatten_with_path(_keyed(tree))[0]


def _keyed(tree: Any) -> Any:
    return pytree.tree_map(
        lambda x: {key: _keyed(value) for key, value in x.items()} if _is_mapping(x) else x, tree, is_leaf=_is_mapping
    )


def _is_mapping(x: Any) -> bool:
    return isinstance(x, Mapping)


def _is_cache(x: Any) -> bool:
    return any(base.__name__ == "Cache" and base.__module__.startswith("transformers.") for base in type(x).__mro__)


def _leaf(x: Any) -> Any:
    if isinstance(x, (Tensor, *_CONSTANTS)):
        return x
    if dataclasses.is_dataclass(x) and not isinstance(x, type) and not _is_cache(x):
        torch.export.register_dataclass(type(x))
        return plain(x)
    return None


def returns_plainly(model: nn.Module) -> None:
    """Let a module return what `plain` leaves of its output."""
    forward = model.forward

    @functools.wraps(forward)
    def plainly(*args: Any, **kwargs: Any) -> Any:
        return plain(forward(*args, **kwargs))

    model.forward = plainly
