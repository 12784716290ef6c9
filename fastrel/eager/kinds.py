"""Kinds of functions: those that pass relevance unchanged, that move numbers, that write in place, and all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastrel import functional
from fastrel.eager import runs
from fastrel.eager.names import BROADCASTS, COPIES, FILLS, MOVES, OVER_FEATURES, PICKS, REARRANGEMENTS
from fastrel.eager.tape import Tape, activations
from fastrel.errors import UnsupportedModelError


def constant(tape: Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """What depends on parameters alone is a constant; maps that do stay maps, which others may be added to."""
    with torch.no_grad():
        result = func(*args, **kwargs)
    if activations(result):  # a view of a parameter requires grad all the same
        result = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) and x._is_view() else x, result)
    if name in MOVES and isinstance(args[0], Tensor) and args[0].is_floating_point():
        whole = tape.facts(args[0]).whole
        whole = args[0] if whole is None else whole
        for x in pytree.tree_leaves(result):
            if x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                tape.know(x, whole=whole)
    if name == "softmax":
        tape.know(result, keys=_softmax_keys(args[0], args, kwargs))
    elif name in ("mul", "rmul") and len(args) == 2:
        for x, factor in (args, args[::-1]):
            tape.keep_map(result, x, factor)
    return result


def embedding(tape: Tape, func: Any, args: Any, kwargs: Any) -> Tensor:
    """What token ids stand for is where activations begin."""
    with torch.no_grad():
        out = func(*args, **kwargs)
    tape.batch = out.shape[0] if tape.batch is None else tape.batch
    return tape.know(out.requires_grad_().clone())  # no leaf, so that models may write into it


def unchanged(tape: Tape, name: str, func: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
    """Activation functions, norms, copies."""
    x: Tensor = args[0]
    given = x.detach().clone()
    with torch.no_grad():
        value = func(given, *args[1:], **kwargs)
    if value is given and not given._version:
        return x
    facts, out = tape.facts(x), functional.identity(value, x)
    if given._version:  # inplace=True
        tape.overwrite(x, out)
    pointwise = name not in OVER_FEATURES and value.shape == x.shape
    keys = facts.keys if name in COPIES else _softmax_keys(x, args, kwargs) if name == "softmax" else None
    return tape.know(
        out,
        root=facts.root if pointwise else out,
        keys=keys,
        mixed=facts.mixed and name in COPIES,
        scale=facts.scale and pointwise,
        head=facts.head if name in COPIES else None,
        softmax=facts.softmax if name in COPIES else None,
        tokens=facts.tokens if pointwise else None,
        shaped=facts.shaped or name not in COPIES,
    )


def _softmax_keys(x: Tensor, args: Any, kwargs: Any) -> int | None:
    """The dimension of keys of a softmax: the last, or it makes no attention map."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return -1 if dim in (-1, x.dim() - 1) else None


def move(tape: Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Autograd follows the numbers; the facts of the first argument go along where they hold of the result."""
    try:
        result = func(*args, **kwargs)
    except RuntimeError:  # products may leave other strides than the model's own
        if name != "view":
            raise
        result = args[0].reshape(*args[1:])
    if name in FILLS and len(found := activations(args)) == 1 and found[0].shape == result.shape:
        facts = tape.facts(found[0])
        return tape.know(result, keys=facts.keys, mixed=facts.mixed, scale=facts.scale, pairs=facts.pairs)
    if not isinstance(args[0], Tensor) or not activations(args[0]):
        return result
    x, facts = args[0], tape.facts(args[0])
    results = [result] if isinstance(result, Tensor) else list(result)
    nowhere: list[int | None] = [None] * len(results)
    keys = tokens = nowhere
    place = facts.keys or facts.pairs
    if place and name not in PICKS:
        keys = _moved_keys(func, x, place, args[1:], kwargs)
    if facts.tokens and not place and name in REARRANGEMENTS:
        tokens = _moved_keys(func, x, facts.tokens, args[1:], kwargs)
    keys, pairs = (keys, nowhere) if facts.keys else (nowhere, keys)
    for y, key, pair, of_tokens in zip(results, keys, pairs, tokens, strict=True):
        if not activations(y):
            continue
        merged = facts.merged if y.dim() == 3 and len(y) == len(x) else None
        if y.dim() == 3 and x.dim() == 4 and y.shape == (x.shape[0] * x.shape[1], *x.shape[2:]):
            merged = (x.shape[0], x.shape[1])
        scale = facts.scale and name in BROADCASTS and (name != "getitem" or y.numel() == x.numel())
        kept: dict[str, Any] = {
            "pairs": pair,
            "scaled": facts.scaled and pair is not None,
            "tokens": of_tokens,
            "shaped": facts.shaped,
        }
        kept |= {"run": runs.cut(name, x, y), "turned": runs.turned(name, x, y, facts.turned)}
        tape.know(
            y, keys=key, mixed=facts.mixed and key is not None, scale=scale, merged=merged, origin=facts.origin, **kept
        )
        if scale:
            tape.also(y, softmax=facts.softmax)
    return result


def _moved_keys(func: Any, x: Tensor, keys: int, args: Any, kwargs: Any) -> list[int | None]:
    """Where the dimension of keys, or a run of them, is in each result of a move: tried on a map that holds the number of each key."""
    numbers = torch.arange(1, 1 + x.shape[keys], device=x.device)
    moved = func(numbers.reshape(-1, *(1,) * (-keys - 1)).expand(x.shape), *args, **kwargs)

    def dimension(y: Tensor) -> int | None:
        if y.dim() == x.dim() and y.shape[keys] <= len(numbers) and _runs_along(y, keys):
            return keys
        whole = (dim for dim in range(-1, -y.dim() - 1, -1) if y.shape[dim] == len(numbers))
        return next((dim for dim in whole if _runs_along(y, dim)), None)

    return [dimension(y) for y in ([moved] if isinstance(moved, Tensor) else moved)]


def _runs_along(y: Tensor, dim: int) -> bool:
    """Whether a value holds consecutive numbers along a dimension, the same everywhere."""
    start = y.flatten()[:1]
    numbers = start + torch.arange(y.shape[dim], device=y.device)
    return bool(start.numel() and start > 0 and (y == numbers.reshape(-1, *(1,) * (-dim - 1))).all())


def write(tape: Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A write into a tensor, which autograd follows."""
    target = args[0]
    tape.write(target, target.detach()[args[1]] if name == "setitem" else None)
    result = func(*args, **kwargs)
    tape.know(target, keys=tape.facts(target).keys, mixed=tape.facts(target).mixed)
    return result


def generic(tape: Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Anything else: the generic rule, if it is a differentiable function with one result."""
    found = activations((args, kwargs))
    with torch.no_grad():
        plain = func(*args, **kwargs)
    if not any(isinstance(x, Tensor) and x.is_floating_point() for x in pytree.tree_leaves(plain)):
        return plain
    if not isinstance(plain, Tensor) or any(plain is x for x in found):
        raise UnsupportedModelError(f"no relevance function for {name}; fastrel.Explainer knows more operators")
    places = {id(x): i for i, x in enumerate(found)}

    def of_activations(*xs: Tensor) -> Tensor:
        given = pytree.tree_map(lambda x: xs[places[id(x)]] if id(x) in places else x, (args, kwargs))
        return func(*given[0], **given[1])

    def note(rel: Tensor) -> None:
        if name not in tape.generic and bool((rel != 0).any()):
            tape.generic.append(name)

    out = functional.generic(of_activations, *found)
    out.register_hook(note)
    return out
