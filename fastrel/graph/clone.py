"""A model's structure again, with the same parameters: what is captured, so that the model itself is left alone."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastrel.errors import InputError

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.FunctionType, types.BuiltinFunctionType)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and data-parallel wrappers.

    Raises:
        InputError: hooks on a wrapper, which are no part of the module inside.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        if model._forward_hooks or model._forward_pre_hooks:
            raise InputError(
                f"there are forward hooks on the {type(model).__name__} around {type(inner).__name__}; fastrel explains the module "
                "inside, so register them there"
            )
        model = inner


def structural_clone(model: nn.Module) -> nn.Module:
    """New modules in eval mode around the model's own tensors: parameters, buffers and tensors among attributes are shared.

    Objects that cannot be copied (locks, open files, generators) are shared as well.

    Raises:
        TypeError: a module refuses to be copied.
    """
    found = list(_reachable(model))
    shared = {id(x): x for x in found if isinstance(x, Tensor) or is_own(x)}
    try:
        clone = copy.deepcopy(model, dict(shared))
    except Exception:
        # Something in it has no copy: then only modules and what may hold them are copied.
        structure = (nn.Module, dict, list, tuple, set, types.MethodType)
        clone = copy.deepcopy(model, {id(x): x for x in found if not isinstance(x, structure)})
    for module in clone.modules():
        module.training = False  # not .eval(), which some models overwrite and merge weights in
    return clone


def package(module: Any) -> str:
    """The package that a module of Python belongs to, by its name; some code has none."""
    return str(module).partition(".")[0]


def is_own(x: Any) -> bool:
    """Whether an object is fastrel's own: a model may hold an explainer."""
    return package(type(x).__module__) == "fastrel" and not isinstance(x, nn.Module)


def _reachable(model: nn.Module) -> Iterator[Any]:
    """Everything that hangs on a model by attributes and in containers, each object once."""
    seen: set[int] = set()
    todo: list[Any] = [model]
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, _PLAIN):
            continue
        seen.add(id(x))
        yield x
        if isinstance(x, Tensor) or is_own(x):
            continue
        if isinstance(x, dict):
            todo += dict.values(x)  # not what a lazy one makes of it
        elif isinstance(x, (list, tuple, set, frozenset)):
            todo += x
        elif isinstance(x, types.MethodType):
            todo.append(x.__self__)
        elif isinstance(getattr(x, "__dict__", None), dict):
            todo += x.__dict__.values()
