"""What is to be explained: from the user's `target` to the seeds of the reverse pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastrel.errors import FastrelError, InputError, first_line
from fastrel.inputs import Checks, check_finite, is_device_error, waits
from fastrel.transform.lanes import lane_dtype

#: None (predicted class) · int · [B] · [B, K] · callable(output) -> [B] or [B, K]
Target: TypeAlias = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class Seeds:
    """Where the reverse pass starts: ∂y/∂leaf and the relevance of each leaf, [K, B, …] each.

    `outputs` says which of the model's outputs the leaves are. `classes` is [B] or [B, K], or None for a callable; `several` says
    whether the caller asked for a dimension K.
    """

    outputs: tuple[int, ...]

    gradient: list[Tensor]
    relevance: list[Tensor]
    classes: Tensor | None
    several: bool


def class_seeds(logits: Tensor, index: int, target: Target, checks: Checks | None = None) -> Seeds:
    """Seeds for classes of logits [B, C], which are output `index`: a one-hot vector (value 1, not the logit). Of an output [B], a
    regression's say, the value itself. With `checks`, numbers on a GPU are looked at when these are settled; until then a class
    that does not exist is explained by NaN.

    Raises:
        InputError: the target's type, shape or range does not fit the logits, or these hold NaN.
    """
    look = check_finite if checks is None else checks.finite
    look("the model's output", logits, allowed=-torch.inf)
    classes = classes_of(logits, target, checks)
    columns, scores = classes.reshape(len(logits), -1), logits.reshape(len(logits), -1)
    unknown = None
    if checks is not None and waits(columns):
        unknown = (columns < 0) | (columns >= scores.shape[1])
        columns = columns.clamp(0, scores.shape[1] - 1)
    look("the model's output for the target", scores.gather(1, columns))
    zeros = torch.zeros(columns.shape[1], *scores.shape, dtype=lane_dtype(logits.dtype), device=logits.device)
    one_hot = zeros.scatter(2, columns.T.unsqueeze(-1), 1.0)  # [K, B, C]
    if unknown is not None:
        one_hot = one_hot.masked_fill(unknown.T.unsqueeze(-1), torch.nan)
    one_hot = one_hot.reshape(len(one_hot), *logits.shape)
    return Seeds((index,), [one_hot], [one_hot], classes, classes.dim() == 2)


def classes_of(logits: Tensor, target: Any, checks: Checks | None = None) -> Tensor:
    """The classes that a target other than a function names, [B] or [B, K]; InputError where it does not fit logits [B, C].

    An output [B] has one class. With `checks`, classes that are on a GPU already are looked at when these are settled.
    """
    logits = logits.unsqueeze(1) if logits.dim() == 1 else logits
    if logits.dim() != 2:
        raise InputError(
            f"the model's output has shape {tuple(logits.shape)}, not [B, C], so a class cannot be picked from it; pass "
            "target as a function of the output that returns one value per sample, such as lambda out: out.logits[:, 0, 3]"
        )
    batch, count = logits.shape
    if target is None:
        return logits.argmax(1)
    classes = class_indices(target, batch)
    outside = (classes < 0) | (classes >= count)

    def look() -> None:
        wrong = classes[outside]
        if len(wrong):
            raise InputError(f"target {int(wrong[0])} is out of range: the model has {count} classes, 0 to {count - 1}")

    if checks is not None and waits(classes):
        checks.later(~outside.any(), look)
    else:
        look()
    return classes.to(logits.device, non_blocking=True)


def class_indices(target: Any, batch: int) -> Tensor:
    """A class, [B] or [B, K] classes, given as anything that holds numbers, as int64 [B] or [B, K].

    Raises:
        InputError: it holds no class indices, or not for a batch of that size.
    """
    try:
        classes = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"target must be a class, [{batch}] classes, [{batch}, K] classes or a function, not {target!r}"
        ) from error
    if not classes.numel():
        raise InputError(f"target {target!r} holds no classes; pass a class, [{batch}] or [{batch}, K] classes, or None")
    if classes.dtype == torch.bool or classes.is_floating_point() or classes.is_complex():
        raise InputError(f"target must hold class indices, not {classes.dtype}: {target!r}")
    if classes.dim() == 0:
        classes = classes.expand(batch)
    if classes.dim() not in (1, 2) or len(classes) != batch or classes.numel() == 0:
        raise InputError(
            f"target of shape {tuple(classes.shape)} does not fit a batch of {batch}: pass one class, [{batch}] classes, "
            f"or [{batch}, K] for K targets per sample (several classes of one sample: [[281, 207]])"
        )
    return classes.long()


def even_seeds(output: Tensor, index: int) -> Seeds:
    """Seeds of equal size over all of an output [B, …], for methods that ask for no class."""
    even = torch.full_like(output, 1 / max(output[0].numel(), 1), dtype=lane_dtype(output.dtype))[None]
    return Seeds((index,), [even], [even], None, False)


def function_seeds(outputs: list[Any], rebuild: Callable[[list[Any]], Any], function: Any, batch: int) -> Seeds:
    """Seeds for a function of the model's output.

    The sign lives in the gradient, w = ∂f/∂output; the relevance is |w| / Σ|w| per sample, a share of attention to pay: so a
    class picked by a function is explained like the class itself, and f and −f are evidence for and against.

    Raises:
        InputError: f does not return one finite floating-point value (or K) per sample, or does not depend on the output.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in outputs]
        output = rebuild(leaves)
        try:
            value = function(output)
        except FastrelError:
            raise
        except Exception as error:
            if is_device_error(error):
                raise
            given = f"{type(output).__name__} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            what = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"the target function failed on the model's output, a {given}: {what}") from error
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = f"one of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__} {str(value)[:50]}"
            raise InputError(
                f"the target function must return a floating-point tensor, not {found}; return scores, not classes"
            )
        if value.dim() not in (1, 2) or len(value) != batch:
            raise InputError(f"the target function returned shape {tuple(value.shape)}; expected [{batch}] or [{batch}, K]")
        check_finite("what the target function returned", value)
        floats = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        columns = value.reshape(batch, -1).unbind(1)
        per_target = [_gradients(column, [leaves[i] for i in floats]) for column in columns]
    used = [j for j in range(len(floats)) if any(grads[j] is not None for grads in per_target)]
    if not used:
        raise InputError("the target function does not depend on the model's output, so there is nothing to explain")
    if any(leaves[floats[j]].dim() == 0 for j in used):
        raise InputError(
            "the target function reads an output that is one number for the whole batch, such as a loss, not one per sample; let it "
            "read what that is made of (lambda out: out.logits[:, 0])"
        )
    gradient = [torch.stack([_or_zeros(grads[j], leaves[floats[j]]) for grads in per_target]) for j in used]
    gradient = [g.to(lane_dtype(g.dtype)) for g in gradient]
    for g in gradient:
        check_finite("the gradient of the target function", g.transpose(0, 1))
    scale = sum(g.abs().reshape(*g.shape[:2], -1).sum(2) for g in gradient)  # [K, B]
    assert isinstance(scale, Tensor)
    if not bool((scale > 0).all()):
        sample = int((scale == 0).nonzero()[0, 1])
        raise InputError(f"the target function has a zero gradient for sample {sample}, so there is nothing to explain")
    relevance = [g.abs() / scale.reshape(*scale.shape, *([1] * (g.dim() - 2))) for g in gradient]
    return Seeds(tuple(floats[j] for j in used), gradient, relevance, None, value.dim() == 2)


def _gradients(column: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
    if not column.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(column.sum(), leaves, retain_graph=True, allow_unused=True)


def _or_zeros(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if gradient is None else gradient
