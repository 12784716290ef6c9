"""The captured graph against the model itself: the same inputs, the same outputs, or where they part."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from types import FrameType, FunctionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastrel.graph.ambient import plainly
from fastrel.graph.capture import LOCK, Captured
from fastrel.graph.clone import package, structural_clone
from fastrel.graph.reach import mentioned_in
from fastrel.graph.results import plain

#: How far outputs may lie apart, relative to the largest: operators are the same, but some fuse in another order.
LIMITS = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}

#: Methods by which code takes numbers out of a tensor with no operator run for them that `Looking` sees.
_CONVERTS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__repr__, Tensor.__format__)

#: Library code that looks at numbers only to choose between ways to compute the same: a mask that hides nothing is left out.
_HARMLESS = (None, "transformers.masking_utils", "transformers.modeling_attn_mask_utils", "transformers.modeling_utils")

#: Outputs whose largest value is below this are compared with it.
SMALL = 1e-2


def run_model(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the model returns, as in eval mode. A model in training mode is left as it is: a clone of its structure runs.

    It gets copies of the inputs, which it may write to.
    """
    copies: dict[int, Tensor] = {}  # one that is given twice is one tensor

    def copy(x: Any) -> Any:
        return copies.setdefault(id(x), x.clone()) if isinstance(x, Tensor) else x

    args, kwargs = pytree.tree_map(copy, (tuple(args), dict(kwargs)))
    if is_training(model):
        with LOCK:
            model = structural_clone(model)
    with torch.no_grad():
        return model(*args, **kwargs)


def is_training(model: nn.Module) -> bool:
    """Whether a part of the model is in training mode that may do something else there: a layer of torch's only if it asks."""
    return any(module.training and _asks_for_mode(type(module)) for module in model.modules())


def _asks_for_mode(cls: type) -> bool:
    if package(cls.__module__) != "torch":
        return True
    functions = (x for base in cls.__mro__ if base is not nn.Module for x in vars(base).values())
    return any("training" in mentioned_in(x.__code__) for x in functions if isinstance(x, FunctionType))


class Looking(TorchDispatchMode):
    """Notes whether code looks at the numbers in tensors (`if x.mean() > 0`, `.item()`), which may decide what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator as it is."""
        if torch.Tag.data_dependent_output in func.tags and not self.looked:
            self.looked = _asked_by() not in _HARMLESS
        return func(*args, **(kwargs or {}))


class _Converting(TorchFunctionMode):
    """Notes whether code turns tensors into arrays, lists or text."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function as it is."""
        if func in _CONVERTS and not self.looked:
            self.looked = _asked_by() not in _HARMLESS
        return func(*args, **(kwargs or {}))


def _asked_by() -> str | None:
    """The module of Python whose code called torch; None where that is torch itself."""
    frame: FrameType | None = sys._getframe(2)
    while frame and package(frame.f_globals.get("__name__")) in ("torch", "fastrel"):
        frame = frame.f_back
    return None if frame is None else frame.f_globals.get("__name__", "")


def converts(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the model turns tensors into arrays, lists or text, whose numbers may decide what it does."""
    with _Converting() as mode:
        run_model(model, args, kwargs)
    return mode.looked


def difference(
    model: nn.Module,
    captured: Captured,
    values: list[Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    looking: Looking | None = None,
) -> str | None:
    """Where the outputs of a captured graph and of the model part on these inputs; None if they are equal. `looking` is told whether
    the model looks at numbers."""
    with looking or contextlib.nullcontext():
        expected = _tensors(run_model(model, args, kwargs))
    graph = _module(captured, captured.outputs)
    with plainly():
        found = _tensors(graph(*values))
    if len(found) != len(expected):
        return f"it returns {len(found)} tensors, the model {len(expected)}"
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        off = _apart(ours, theirs)
        if off is None:
            continue
        again = _tensors(run_model(model, args, kwargs))
        if _apart(again[i], theirs) is not None:
            return f"output {i} differs from call to call on the same inputs; make the model deterministic in eval mode"
        return f"output {i} is {off}{_place(model, captured, values, args, kwargs)}"
    return None


def _module(captured: Captured, outputs: Any) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in captured.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(tuple(outputs), copies.__getitem__))
    return fx.GraphModule(nn.Module(), graph)


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(plain(output)) if isinstance(x, Tensor)]


def _apart(ours: Tensor, theirs: Tensor) -> str | None:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {tuple(ours.shape)}, the model's {theirs.dtype} {tuple(theirs.shape)}"
    if not ours.is_floating_point():
        return None if torch.equal(ours, theirs) else "other integers"
    a, b = (x.double() for x in (ours, theirs))
    same = (a == b) | (a.isnan() & b.isnan())
    distance = torch.where(same, 0.0, (a - b).abs())
    finite = b[b.isfinite()].abs()
    scale = max(float(finite.max()) if finite.numel() else 0.0, SMALL)
    worst = float(distance.nan_to_num(torch.inf).max()) / scale if distance.numel() else 0.0
    return None if worst <= LIMITS.get(ours.dtype, 1e-4) else f"off by {worst:.1e} of its largest value"


def _place(model: nn.Module, captured: Captured, values: list[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The first module whose result is another in the graph than in the model."""
    own: dict[str, Tensor] = {}
    with LOCK:
        clone = structural_clone(model)
    for name, module in clone.named_modules():

        def keep(_module: Any, _args: Any, result: Any, name: str = name) -> None:
            if isinstance(result, Tensor):
                own.setdefault(name, result.detach().clone())

        module.register_forward_hook(keep)
    with torch.no_grad():
        clone(*args, **kwargs)
    last: dict[str, fx.Node] = {}
    for node in captured.graph.nodes:
        for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
            if isinstance(node.meta.get("val"), Tensor):
                last[path] = node
    names = [name for name in own if name in last]
    with plainly():
        results = _module(captured, [last[name] for name in names])(*values)
    for name, result in zip(names, results, strict=True):
        if result.shape == own[name].shape and _apart(result, own[name]):
            return f"; the first module that differs is {name!r} ({type(model.get_submodule(name)).__name__})"
    return ""
