"""Relevance through an eager model, without export and without touching it: the second path, independent of the first.

    with fastrel.propagation() as tape:
        logits = model(images.requires_grad_())
    relevance = torch.autograd.grad(logits, tape.attention, one_hot)   # of every attention map, from the input to the output

Inside, torch's functions are replaced by those of `fastrel.functional`, and whatever only moves numbers is left to autograd. An
activation is a tensor that requires grad and is no parameter: images must require it, embeddings of token ids do of themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastrel import functional
from fastrel.eager import arithmetic, kinds, names, places, products  # noqa: F401  (registration)
from fastrel.eager.tape import HANDLERS, Saved, Tape, activations
from fastrel.reference.rules import Rules

#: Operands that may be given by keyword, in torch's order.
_OPERANDS = ("input", "other", "mat1", "mat2", "batch1", "batch2", "tensor1", "tensor2")


class propagation(TorchFunctionMode):
    """The context in which an eager model propagates relevance backwards.

    Args:
        rules: the rule set.
        inputs: the model's inputs, if it is to be told from constants which token ids are made of them; default all are.

    Attributes:
        attention: the attention maps that the forward pass made, as tensors of its graph, [B, h, Tq, Tk] (windows as the model has
            them; maps that a product takes as [B·h, Tq, Tk] are split as their values were merged); maps over channels too.
        generic: functions without a rule of their own that relevance has met, which took the generic one, x ⊙ ((R ⊘ f(x)) J).

    Raises:
        UnsupportedModelError: inside, at a function of activations that has no rule here, at a value used after it was overwritten
            in place, and at one made by what torch's function modes do not see (scripted code, an autograd.Function).
    """

    def __init__(self, rules: Rules = "positive", inputs: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._tape = Tape(rules, inputs)

    @property
    def attention(self) -> list[Tensor]:
        """The attention maps so far."""
        return self._tape.attention

    @property
    def generic(self) -> list[str]:
        """The functions that relevance has met so far and that took the generic rule."""
        return self._tape.generic

    def __enter__(self) -> propagation:
        self._tape = Tape(self._tape.rules, self._tape.inputs)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._tape.save, Saved.get)
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._hooks.__exit__(*reason)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of torch's."""
        tape, kwargs = self._tape, dict(kwargs or {})
        args = (*args, *(kwargs.pop(key) for key in _OPERANDS if key in kwargs))
        name, in_place = _name(func)
        if name in names.LIKE_ANOTHER and len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], args[1].detach(), *args[2:])
        if name in names.AUTOGRAD or (_is_attribute(func) and name not in names.UNCHANGED | names.MOVES):
            return func(*args, **kwargs)
        if name == "embedding" and any(tape.varies(x) for x in (*args, *kwargs.values())):
            return kinds.embedding(tape, func, args, kwargs)
        if not activations((args, kwargs)) or name in names.CONSTANTS:
            result = kinds.constant(tape, name, func, args, kwargs)
            return tape.vary(result, args, kwargs, in_place or name == "setitem")
        left = not torch.is_grad_enabled()
        with torch.enable_grad():
            result = self._followed(name, in_place, func, args, kwargs)
            for x in activations(result) if left else ():
                tape.leave(x)
        return result

    def _followed(self, name: str, in_place: bool, func: Any, args: Any, kwargs: Any) -> Any:
        """A function of activations."""
        tape = self._tape
        args, kwargs = pytree.tree_map(lambda x: tape.as_made(x) if isinstance(x, Tensor) else x, (args, kwargs))
        found = activations((args, kwargs))
        writes = name in names.WRITES and (in_place or name == "setitem") and not places.accumulates(name, args, kwargs)
        tape.accept(name, found, args[:1] if writes else ())
        if writes:
            return kinds.write(tape, name, func, args, kwargs)
        if in_place and isinstance(args[0], Tensor) and not activations(args[0]):
            # A constant becomes an activation: what is written into it comes from the function's result.
            result = _call(tape, name, func, found, (args[0].clone(), *args[1:]), kwargs)
            tape.write(args[0], None)
            return tape.know(args[0].copy_(result))
        result = _call(tape, name, func, found, args, kwargs)
        if name in names.UNCHANGED or name in names.ARITHMETIC:
            tape.keep_pairs(result, name, args, name in names.COPIES)
        if in_place:
            tape.overwrite(args[0], result if isinstance(result, Tensor) else None)
        for x in activations(result):
            if not tape.knows(x):
                tape.know(x)
        return result


def _name(func: Any) -> tuple[str, bool]:
    """A function's name without underscores, and whether it overwrites its first argument: relu_, __iadd__."""
    name: str = getattr(func, "__name__", str(func))
    if _is_attribute(func):
        return func.__self__.__name__, False
    operator = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__", "__iter__")
    return (name[3:] if operator else name).strip("_"), operator or (name.endswith("_") and not name.startswith("__"))


def _is_attribute(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"


def _call(tape: Tape, name: str, func: Any, found: list[Tensor], args: Any, kwargs: Any) -> Any:
    if name in HANDLERS:
        return HANDLERS[name](tape, *args, **kwargs)
    first = bool(args) and found[0] is args[0]
    if name in names.UNCHANGED and first and (len(found) == 1 or name in names.COPIES):
        return kinds.unchanged(tape, name, func, args, kwargs)
    if name in names.MOVES:
        return kinds.move(tape, name, func, args, kwargs)
    if name in names.POOLING and first and len(found) == 1:
        return functional.pooling(lambda x: func(x, *args[1:], **kwargs), args[0])
    return kinds.generic(tape, name, func, args, kwargs)


__all__ = ["propagation"]
