"""Where a captured graph is valid: every condition on sizes that torch.export met while it traced the model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.printers import PythonPrinter


class Guards:
    """Sizes of a graph's inputs, relations between them, and ranges, as one predicate.

    torch.export notes them as expressions over symbols, one per size that varies: branches that the model took
    (`T % 2`, `B * T > 40`), sizes that it computed with as Python numbers (which fixes them), and bounds. It never traces a size
    of 1 as one that varies and says "2 or more" of each. A batch of one is accepted nevertheless: whoever runs the graph on
    one must compare it with the model first (`fastrel.engine`).
    """

    def __init__(self, inputs: Sequence[fx.Node]) -> None:
        """Read the guards from the fake tensors of a graph's inputs; those that are no tensors have no sizes."""
        fakes = [node.meta["val"] for node in inputs if isinstance(node.meta.get("val"), Tensor)]
        self._sizes = [tuple(_expression(size) for size in fake.shape) for fake in fakes]
        dims = [size for sizes in self._sizes for size in sizes]
        #: The symbols of sizes that vary, in the order in which they appear.
        self.symbols = tuple(dict.fromkeys(size for size in dims if isinstance(size, sympy.Symbol)))
        #: The symbols that are sizes of a batch.
        self.batch = frozenset(sizes[0] for sizes in self._sizes if sizes and isinstance(sizes[0], sympy.Symbol))
        conditions = self._conditions(fakes)
        #: Whether the batch times another size is a number, as the model computed with it as with a number of Python's
        #: (`len(ids.view(-1, T))`): the graph is of no other batch.
        self.divides_batch = any(_is_product(x, self.batch) for x in conditions)
        self._holds = functools.lru_cache(maxsize=256)(_predicate(conditions, self.symbols))

    def _conditions(self, fakes: Sequence[Any]) -> list[Any]:
        """Everything that must hold, as expressions over the symbols."""
        env = next((fake.fake_mode.shape_env for fake in fakes if fake.fake_mode.shape_env is not None), None)
        if env is None:
            return []
        found = [env.simplify(guard.expr) for guard in env.guards]
        found += [env.simplify(a.expr) for asserts in env.deferred_runtime_asserts.values() for a in asserts]
        for symbol in self.symbols:
            bounds = env.bound_sympy(symbol)
            if bounds.lower != -sympy.oo and not (symbol in self.batch and bounds.lower <= 2):
                found.append(sympy.Ge(symbol, bounds.lower, evaluate=False))
            if bounds.upper.is_Integer and bounds.upper < 2**62:
                found.append(sympy.Le(symbol, bounds.upper, evaluate=False))
        known = set(self.symbols)
        return [x for x in dict.fromkeys(found) if x not in (sympy.true, True) and x.free_symbols <= known]

    @property
    def batch_names(self) -> set[str]:
        """Names of the symbols that are sizes of a batch."""
        return {str(symbol) for symbol in self.batch}

    def accept(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors of these sizes may run through the graph."""
        bound: dict[Any, int] = {}
        derived: list[tuple[Any, int]] = []
        for tensor, sizes in zip(tensors, self._sizes, strict=True):
            for given, expected in zip(tensor.shape, sizes, strict=True):
                if isinstance(expected, int):
                    if given != expected:
                        return False
                elif isinstance(expected, sympy.Symbol):
                    if bound.setdefault(expected, given) != given:
                        return False
                else:
                    derived.append((expected, given))
        if any(expression.xreplace(bound) != given for expression, given in derived):
            return False
        return bool(self._holds(*(bound[symbol] for symbol in self.symbols)))

    def is_single(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are a batch of one, in a graph whose batch varies."""
        return any(
            sizes and sizes[0] in self.batch and len(tensor) == 1
            for tensor, sizes in zip(tensors, self._sizes, strict=True)
        )


def _expression(size: Any) -> Any:
    """A size as a number, or as the expression over symbols that it is."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression


def _is_product(condition: Any, batch: frozenset[Any]) -> bool:
    """Whether a condition says that the batch times another size is a number."""
    if not isinstance(condition, sympy.Eq) or not any(side.is_Integer for side in condition.args):
        return False
    return bool(batch & condition.free_symbols) and any(side.is_Mul for side in condition.args)


def _predicate(conditions: Sequence[Any], symbols: Sequence[Any]) -> Any:
    """`f(*sizes) -> bool`: whether all conditions hold."""
    names = [f"s{i}" for i in range(len(symbols))]
    plain = {symbol: sympy.Symbol(name, integer=True) for symbol, name in zip(symbols, names, strict=True)}
    source = " and ".join(f"({PythonPrinter().doprint(x.xreplace(plain))})" for x in conditions) or "True"
    try:
        return eval(f"lambda {', '.join(names)}: {source}", {"math": __import__("math"), "torch": torch})
    except SyntaxError:  # an expression that torch does not print as Python
        return lambda *sizes: all(
            bool(x.xreplace({s: sympy.Integer(n) for s, n in zip(symbols, sizes, strict=True)})) for x in conditions
        )
