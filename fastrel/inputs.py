"""The inputs of a call: what they are called, and what cannot be explained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastrel.errors import InputError, first_line
from fastrel.graph.results import with_paths

#: How plain RuntimeErrors begin that a device is to blame for: Triton's launcher, and libraries such as cuBLAS.
_DEVICE_ERRORS = ("Triton Error [", "CUDA error", "CUDA driver error", "HIP error")

#: What to do about numbers that a model made, none of which were among its inputs.
_OVERFLOW = "look for NaN in its weights, for values that overflow its dtype, and for rows that a mask hides whole"


def is_device_error(error: BaseException) -> bool:
    """Whether a device reports it, so that neither a model nor a rule is to blame: such errors are passed on as they are."""
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or str(error).startswith(_DEVICE_ERRORS)


class Checks:
    """What one call asks of numbers. On a GPU it asks at its end, all at once: looking waits for everything launched before.

    `wanted`: False looks at nothing; NaN in is then NaN out.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._wanted = wanted
        self._later: list[tuple[Tensor, Callable[[], None]]] = []

    def finite(self, name: str, x: Tensor, allowed: float | None = None, advice: str = _OVERFLOW) -> None:
        """`check_finite`, now or at the end."""
        if not self._wanted:
            return
        if waits(x):
            self.later(_is_finite(x, allowed).all(), lambda: check_finite(name, x, allowed, advice))
        else:
            check_finite(name, x, allowed, advice)

    def later(self, fine: Tensor, look: Callable[[], None]) -> None:
        """At the end call `look`, which says what is wrong, unless `fine` [] holds."""
        if self._wanted:
            self._later.append((fine, look))

    def settle(self) -> None:
        """The end of a call.

        Raises:
            InputError: of the first check that fails.
        """
        pending, self._later = self._later, []
        if pending and not bool(torch.stack([fine.to(pending[0][0].device) for fine, _ in pending]).all()):
            for _, look in pending:
                look()


def waits(x: Tensor) -> bool:
    """Whether looking at the numbers of a tensor waits for a device."""
    return x.device.type == "cuda"


def _is_finite(x: Tensor, allowed: float | None) -> Tensor:
    return torch.isfinite(x) if allowed is None else torch.isfinite(x) | (x == allowed)


def check_inputs(named: Sequence[tuple[str, Tensor]], checks: Checks | None = None) -> None:
    """Refuse what cannot be explained: nothing at all, empty batches, NaN, layouts and devices without numbers.

    −inf may stand in a mask that is added to scores. With `checks`, numbers on a GPU are looked at when these are settled.

    Raises:
        InputError: naming the input.
    """
    if not named:
        raise InputError("no tensor among the inputs; call the explainer as you call the model")
    for name, x in named:
        if x.layout is not torch.strided or x.is_nested or x.is_quantized or x.device.type == "meta" or _is_fake(x):
            kind = "a nested tensor" if x.is_nested else f"{type(x).__name__} of layout {x.layout} on {x.device}"
            raise InputError(f"{name} is {kind}; pass ordinary tensors (x.to_dense(), say)")
        if x.dim() and len(x) == 0:
            raise InputError(f"{name} of shape {tuple(x.shape)} holds no samples")
        if x.is_floating_point():
            look = check_finite if checks is None else checks.finite
            look(name, x, allowed=-torch.inf, advice="mask or replace it")


def _is_fake(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor)


def check_finite(name: str, x: Tensor, allowed: float | None = None, advice: str = _OVERFLOW) -> None:
    """Raise InputError if x [B, …] holds NaN or infinity (other than `allowed`), naming the first place, and what to do."""
    fine = torch.isfinite(x)
    if bool(fine.all()):
        return
    fine = _is_finite(x, allowed)
    if not bool(fine.all()):
        place = (~fine).nonzero()[0].tolist()
        sample = f" in sample {place[0]}, at {place}" if place else ""
        raise InputError(f"{name} holds NaN or infinity{sample}: {x[tuple(place)].item()}; {advice}")


def rejected(model: nn.Module, error: Exception, leaves: Sequence[Any]) -> InputError:
    """What to say of inputs that a model fails on: its own words, what the inputs are, and what may be meant."""
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    numbers = [torch.tensor(x) for x in leaves if isinstance(x, int) and not isinstance(x, bool)]
    given = ", ".join(_described(x) for x in tensors)
    return InputError(
        f"{type(model).__name__} rejects these inputs: {first_line(error)} (given: {given}){_meant([*tensors, *numbers])}"
    )


def _meant(tensors: Sequence[Tensor]) -> str:
    """What was probably meant by inputs that a model fails on: one picture or text without a dimension of samples, or a class."""
    first = tensors[0] if tensors else torch.empty(1)
    picture = first.dim() == 3 and len(first) == 3 and first.shape[1] == first.shape[2]
    if picture or (first.dim() == 1 and not first.is_floating_point()):
        return "; inputs are batches: x[None] is a batch of one"
    last = tensors[-1] if len(tensors) > 1 else first
    classes = not last.is_floating_point() and last.shape in ((), first.shape[:1])
    return "; if the last one is a class, give it as target=" if len(tensors) > 1 and classes else ""


def _described(x: Tensor) -> str:
    """dtype and shape, and of numbers of classes, tokens and the like the range."""
    kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    ids = not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool and x.numel()
    return f"{kind} of {int(x.min())} to {int(x.max())}" if ids else kind


def input_names(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """What each input is called: the model's own name of the argument, with the place inside it if it is a container."""
    names = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    names += [f"input {i}" for i in range(len(names), len(args))]
    found: list[str] = []
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        found += [name + pytree.keystr(path) for path, _ in with_paths(value)]
    return found


def image_size(x: Any, dims: Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width of an input of pictures, films or volumes, which lie along `dims`; None for others."""
    return None if dims is None else (x.shape[dims[0]], x.shape[dims[1]])
