"""Writing the two graphs: new nodes of the reverse pass, and what the forward pass must save for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen

aten = torch.ops.aten


def common_lane_dtype(values: Iterable[fx.Node]) -> torch.dtype:
    """The one dtype of all lanes of a graph, so that none meets another's: float64 where any of `values` is, else float32."""
    wide = any(value.meta["val"].dtype == torch.float64 for value in values if isinstance(value.meta["val"], torch.Tensor))
    return torch.float64 if wide else torch.float32


class Emitter:
    """Appends nodes to the reverse graph, whose numbers all have `dtype`, whatever those of the captured graph have.

    Equal calls give the same node, so rules need not avoid repeating work.
    """

    def __init__(self, captured: fx.Graph, recomputed: Callable[[fx.Node], bool], dtype: torch.dtype) -> None:
        self._forward, self._recomputed, self._dtype = captured, recomputed, dtype
        self._reverse = fx.Graph()
        self._calls: dict[Any, fx.Node] = {}
        self._saved: dict[fx.Node, fx.Node] = {}
        self._again: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[str, fx.Node] = {}
        self._inserted: dict[fx.Node, tuple[fx.Node, int]] = {}
        self._last_placeholder: fx.Node | None = None
        #: The captured operator whose rule writes now, as messages name it; None where none does.
        self.source: str | None = None

    def placeholder(self, name: str) -> fx.Node:
        """A new input of the reverse graph."""
        anchor = self._last_placeholder
        if anchor is None:
            context = self._reverse.inserting_before(next(iter(self._reverse.nodes), None))
        else:
            context = self._reverse.inserting_after(anchor)
        with context:
            self._last_placeholder = self._reverse.placeholder(name)
        return self._last_placeholder

    def call(self, fn: Callable[..., Any], *args: Any) -> fx.Node:
        """`fn(*args)` in the reverse graph; fn must be a pure function."""
        key = (fn, _freeze(args))
        if key not in self._calls:
            self._calls[key] = self._reverse.call_function(fn, args)
            if self.source is not None:
                self._calls[key].meta["rule of"] = self.source
        return self._calls[key]

    def parts(self, call: fx.Node, count: int) -> list[fx.Node]:
        """The elements of a node that returns a tuple."""
        return [self.call(operator.getitem, call, i) for i in range(count)]

    def arith(self, op: str, a: Any, b: Any) -> Any:
        """An integer, or a node for it where a size varies."""
        fn = getattr(operator, op)
        return fn(a, b) if isinstance(a, int) and isinstance(b, int) else self.call(fn, a, b)

    def saved(self, x: fx.Node) -> fx.Node:
        """The value of a captured node in the reverse graph, saved or computed again, in the dtype of the lanes."""
        value, own = x.meta["val"], self._own_value(x)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == self._dtype:
            return own
        wide = self.call(aten.to.dtype, own, self._dtype)
        # From what the model has, exactly: kernels that take 16 bits need no cast.
        wide.meta["widened"] = value.dtype in (torch.bfloat16, torch.float16)
        return wide

    def _own_value(self, x: fx.Node) -> fx.Node:
        """The value of a captured node as the model computes it."""
        if self._recomputed(x):
            if x not in self._again:
                args, kwargs = fx.map_arg((x.args, x.kwargs), self._own_value)
                self._again[x] = self._reverse.call_function(x.target, args, kwargs)  # type: ignore[arg-type]
            return self._again[x]
        if x not in self._saved:
            self._saved[x] = self.placeholder(f"saved_{x.name}")
            self._saved[x].meta["dtype"] = getattr(x.meta["val"], "dtype", None)
        return self._saved[x]

    def size(self, x: fx.Node, dim: int) -> Any:
        """A dimension of a captured value: a number, or an input of the reverse graph where it varies."""
        size = x.meta["val"].shape[dim]
        if isinstance(size, int):
            return size
        key = str(size)
        existing = self._sizes.get(key)
        if existing is None:
            existing = self.placeholder(f"size_{len(self._sizes)}")
            self._sizes[key] = existing
            self._inserted[existing] = (x, dim)
        return existing

    def output(self, result: Any) -> None:
        """What the reverse graph returns."""
        self._reverse.output(result)

    def modules(self, outputs: list[Any]) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The finished modules; the forward one returns `outputs` and, in order, what the reverse one takes first."""
        self._reverse.eliminate_dead_code()
        forward = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self._forward.nodes:
            if node.op != "output":
                copies[node] = forward.node_copy(node, copies.__getitem__)
        by_placeholder = {placeholder: x for x, placeholder in self._saved.items()}
        saved: list[fx.Node] = []
        for node in list(self._reverse.nodes):
            if node.op != "placeholder" or not (node in by_placeholder or node in self._inserted):
                continue
            if not node.users:
                self._reverse.erase_node(node)
            elif node in by_placeholder:
                saved.append(copies[by_placeholder[node]])
            else:
                x, dim = self._inserted[node]
                saved.append(forward.call_function(aten.sym_size.int, (copies[x], dim)))
        forward.output((fx.map_arg(tuple(outputs), copies.__getitem__), tuple(saved)))
        # Inputs and parameters stay inputs even where nothing uses them.
        forward.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self._reverse.set_codegen(OneList())
        return tuple(fx.GraphModule(torch.nn.Module(), graph) for graph in (forward, self._reverse))  # type: ignore


class OneList(CodeGen):
    """Code of a function that takes its arguments as one list and empties it, so that each is freed after its last use."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **kwargs: Any) -> str:
        """The head of the function."""
        names = ", ".join(var.split(":")[0].strip() for var in free_vars if var != "self")
        head = f"def {self._func_name}(self, arguments){maybe_return_annotation}:"
        return f"{head}\n    {names}, = arguments\n    arguments.clear()"


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    # 1, 1.0 and True are equal keys but not equal arguments.
    return value if isinstance(value, fx.Node) else (type(value), value)
