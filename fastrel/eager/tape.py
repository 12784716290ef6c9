"""What is known of the values of a forward pass: the attention maps among them, and what each is made of."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastrel import functional
from fastrel.eager.runs import Run
from fastrel.errors import UnsupportedModelError
from fastrel.reference.rules import Rules

#: The functions that have a rule of their own, by name without underscores: handler(tape, *arguments of the function).
HANDLERS: dict[str, Callable[..., Any]] = {}


def handles(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a handler for one or more of torch's functions."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def activations(tree: Any) -> list[Tensor]:
    """The tensors in arguments or results that require grad and are no parameters, each once."""
    leaves = [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]
    return list({id(x): x for x in leaves if x.requires_grad and not isinstance(x, nn.Parameter)}.values())


def is_activation(x: Any) -> bool:
    """Whether x is a tensor that requires grad and no parameter."""
    return bool(activations((x,)))


def refuse_activations(name: str, *constants: Any) -> None:
    """Raise where a weight or bias is made of the input."""
    if activations(constants):
        raise UnsupportedModelError(f"no relevance function for {name} with a weight or bias that depends on the input")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a value.

    `root`: the activation of which alone it is a pointwise function. `keys`: of an attention map, its dimension of keys, counted from
    the end; `mixed`: over heads. `pairs`: the same of a product of two activations and what is made of it entry by entry, scores or
    maps that are no softmax; `scaled`: nothing but scaled since. `scale`: one number per token, made of all its features. `merged`:
    what its first dimension was. `tokens`: of what a layer made of one token each, their dimension, counted from the end; `shaped`: by
    a function since. `turned`: whether its features come before its last dimension.
    """

    tensor: Tensor  # kept, so that no other tensor gets its id
    seen: bool  # made here as an activation
    root: Tensor
    keys: int | None = None
    mixed: bool = False
    pairs: int | None = None
    scaled: bool = False
    scale: bool = False
    merged: tuple[int, int] | None = None
    tokens: int | None = None
    shaped: bool = False
    whole: Tensor | None = None  # of a part of a weight, that weight
    layer: Any = None  # `fastrel.eager.parts.Layer`
    origin: Tensor | None = None  # of what a layer made, and of parts of it: what went in
    head: tuple[Any, ...] | None = None  # of A V of one head: what tells its attention
    stacked: tuple[tuple[Tensor, ...], int] | None = None  # of parts of a layer: these, and along which dimension
    softmax: Any = None  # `fastrel.eager.exponentials.Part`
    run: Run | None = None  # of what tokens of another value it is made
    turned: bool | None = False
    alias: Tensor | None = None  # the same value, of an autograd.Function's forward pass


class Saved:
    """A tensor that autograd keeps for the backward pass, copied before the model writes into it."""

    def __init__(self, x: Tensor) -> None:
        self.tensor, self.version = x.detach(), x._version

    def get(self) -> Tensor:
        """The tensor as it was."""
        if self.tensor._version != self.version:
            raise RuntimeError(f"a tensor {tuple(self.tensor.shape)} that relevance needs was overwritten")
        return self.tensor

    def copy(self) -> None:
        """Keep a copy instead."""
        self.tensor, self.version = self.get().clone(), 0


class Tape:
    """The facts of every value, the attention maps in order, and the functions that took the generic rule."""

    def __init__(self, rules: Rules, inputs: Sequence[Tensor] | None = None) -> None:
        self.rules: Rules = rules
        self.inputs = inputs
        self._varying = {id(x): x for x in inputs or ()}
        self.attention: list[Tensor] = []
        self.generic: list[str] = []
        self.batch: int | None = None
        self._facts: dict[int, Facts] = {}
        self._overwritten: list[Tensor] = []
        self._became: dict[int, Tensor] = {}
        self._saved: weakref.WeakSet[Saved] = weakref.WeakSet()
        with torch.enable_grad():
            self._began = torch.zeros(1, requires_grad=True).view(1).grad_fn._sequence_nr()  # type: ignore[union-attr]

    def facts(self, x: Any) -> Facts:
        """What is known of x."""
        return self._facts.get(id(x)) or Facts(x, False, x)

    def knows(self, x: Tensor) -> bool:
        """Whether x was made inside, not given from outside."""
        return self.facts(x).seen

    def know(self, x: Tensor, **facts: Any) -> Tensor:
        """Keep facts of x, which is returned."""
        self._facts[id(x)] = Facts(x, x.requires_grad, **{"root": x, **facts})
        return x

    def also(self, x: Tensor, **facts: Any) -> Tensor:
        """Keep more facts of x, which is returned."""
        self._facts[id(x)] = dataclasses.replace(self.facts(x), seen=x.requires_grad, **facts)
        return x

    def varies(self, x: Any) -> bool:
        """Whether a tensor of integers is made of the model's inputs, or may be."""
        whole = isinstance(x, Tensor) and not x.is_floating_point()
        return whole and (self.inputs is None or id(x) in self._varying)

    def vary(self, result: Any, args: Any, kwargs: Any, writes: bool) -> Any:
        """What a function makes of values that vary does, too, and so does what it writes into; the result is returned."""
        if self.inputs is not None and any(id(x) in self._varying for x in pytree.tree_leaves((args, kwargs))):
            changed = [x for x in pytree.tree_leaves((result, args[:1] if writes else ())) if isinstance(x, Tensor)]
            self._varying.update({id(x): x for x in changed if not isinstance(x, nn.Parameter)})
        return result

    def accept(self, name: str, found: list[Tensor], writes: Sequence[Tensor]) -> None:
        """Refuse values that are not what the model would have here; `writes` are only written into."""
        for x in found:
            self.batch = x.shape[0] if self.batch is None and x.dim() else self.batch
            if not self.knows(x) and x.grad_fn is not None and x.grad_fn._sequence_nr() > self._began:
                raise UnsupportedModelError(
                    f"{name} takes a tensor {tuple(x.shape)} of {type(x.grad_fn).__name__} that fastrel.propagation has not seen made: "
                    "by scripted code or by an autograd.Function of the model's own"
                )
            if not any(x is y for y in writes) and any(_overlap(x, y) for y in self._overwritten):
                raise UnsupportedModelError(
                    f"{name} takes a tensor {tuple(x.shape)} that was overwritten in place; write the model without"
                )

    def batch_dim(self, shape: Sequence[int]) -> int:
        """The dimension of samples in a value of this shape."""
        if not self.batch or shape[0] % self.batch == 0 or self.batch not in shape:
            return 0
        return list(shape).index(self.batch)

    def overwrite(self, x: Tensor, by: Tensor | None = None) -> None:
        """x is no longer what the model has: the result of the function that overwrote it took its place."""
        self._overwritten.append(x)
        if by is not None and by is not x:
            self._became[id(x)] = by

    def write(self, target: Tensor, part: Tensor | None) -> None:
        """The model writes into the target, where `part` of it then holds again what it should."""
        storage = target.untyped_storage().data_ptr()
        for saved in self._saved:
            if saved.tensor.untyped_storage().data_ptr() == storage:
                saved.copy()
        if part is not None:
            self._overwritten = [x for x in self._overwritten if not _same_place(x, part)]

    def save(self, x: Tensor) -> Saved:
        """What autograd keeps of x."""
        saved = Saved(x)
        self._saved.add(saved)
        return saved

    def leave(self, x: Tensor) -> None:
        """x may be a result of an autograd.Function, which replaces its place in the graph by its own gradient."""
        self._facts[id(x)] = dataclasses.replace(self.facts(x), alias=x.view_as(x))

    def as_made(self, x: Tensor) -> Tensor:
        """x as it was before an autograd.Function returned it, and after functions that overwrote it; parameters without what makes
        an activation of all that is made of them."""
        if isinstance(x, nn.Parameter):
            return x.detach()
        while id(x) in self._became:
            x = self._became[id(x)]
        alias = self.facts(x).alias
        if alias is None or alias.grad_fn.next_functions[0][0] is x.grad_fn:  # type: ignore[union-attr]
            return x
        self._facts[id(alias)] = dataclasses.replace(self.facts(x), tensor=alias, alias=None)
        return alias

    # Values made of one activation.

    def pointwise(self, value: Tensor, x: Tensor) -> Tensor:
        """`value`, made of x and constants entry by entry."""
        facts, out = self.facts(x), functional.identity(value, x)
        return self.know(out, root=facts.root if value.shape == x.shape else out, scale=facts.scale)

    def of_root(self, value: Tensor, x: Tensor) -> Tensor:
        """`value`, a function of the activation of which x is one."""
        root = self.facts(x).root
        return self.know(functional.identity(value, root), root=root)

    def keep_pairs(self, out: Any, name: str, args: Any, copies: bool) -> None:
        """`out`, made entry by entry, holds scores, or maps that are no softmax, where an operand does."""
        if not isinstance(out, Tensor) or self.facts(out).keys is not None:
            return
        found = [self.facts(x) for x in activations(args) if x.shape == out.shape]
        places = {one.keys if one.pairs is None else one.pairs for one in found} - {None}
        if len(places) == 1:
            numbers = all(not isinstance(x, Tensor) or x.numel() == 1 or is_activation(x) for x in args)
            scaled = (
                len(found) == 1 and found[0].scaled and (copies or (name in ("mul", "rmul", "div", "truediv") and numbers))
            )
            known = dataclasses.replace(self.facts(out), seen=out.requires_grad, pairs=places.pop(), scaled=scaled)
            self._facts[id(out)] = known
            return
        tokens = {one.tokens for one in found}
        if not places and len(tokens) == 1:
            self.also(out, tokens=tokens.pop(), shaped=self.facts(out).shaped or all(one.shaped for one in found))

    def keep_map(self, out: Tensor, x: Tensor, factor: Any) -> Tensor:
        """`out`, x times a factor, still is an attention map where x is one and the factor the same for all keys, or a mask."""
        facts = self.facts(x)
        one = (
            not isinstance(factor, Tensor) or not facts.keys or factor.dim() < -facts.keys or factor.shape[facts.keys] == 1
        )
        if facts.keys and (one or (not is_activation(factor) and bool(((factor == 0) | (factor == 1)).all()))):
            known = self.facts(out)
            self.know(out, root=known.root, scale=known.scale, keys=facts.keys, mixed=facts.mixed)
        return out


def _same_place(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same entries of the same storage."""
    return (x.data_ptr(), x.shape, x.stride()) == (y.data_ptr(), y.shape, y.stride())


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors share entries."""
    if x is y:
        return True
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False
    places = torch.arange(x.untyped_storage().nbytes() // x.element_size())
    entries = [places.as_strided(t.shape, t.stride(), t.storage_offset()).flatten() for t in (x, y)]
    return bool(torch.isin(*entries).any())
