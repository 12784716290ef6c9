"""Capture: an unmodified model and one call of it -> a graph of high-level operators, valid for every batch size."""

import contextlib
import functools
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from fastrel.errors import CaptureError, InputError, UnsupportedModelError

aten = torch.ops.aten

#: Graph nodes that only check something at run time.
_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}


@dataclass(frozen=True)
class Signature:
    """What two calls must share to share a captured graph: structure, dtypes, device, constants, static sizes."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple["Signature", list[Any]]:
        """The signature of a call without any sizes, and the call's leaves."""
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        return cls(spec, tuple(_kind(leaf) for leaf in leaves)), leaves


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.device, leaf.dim()
    try:
        hash(leaf)
    except TypeError as error:
        raise InputError(f"input {leaf!r} of type {type(leaf).__name__} is neither a tensor nor a constant") from error
    return type(leaf), leaf


@dataclass(frozen=True)
class Captured:
    """A model's forward pass as a graph.

    `sizes` holds, per input tensor, what each dimension may be: a number, or the name of a size that varies; `ranges`
    bounds those names. `owners` says where each parameter and buffer is found on the live model.
    """

    graph: fx.Graph
    inputs: list[fx.Node]
    owners: list["tuple[str, ...] | Tensor"]
    outputs: list[fx.Node]
    out_spec: pytree.TreeSpec
    sizes: list[tuple[int | str, ...]]
    ranges: dict[str, tuple[int, int | None]]
    kinds: frozenset[tuple[torch.dtype, torch.device]]

    @functools.cached_property
    def logits_index(self) -> int:
        """Which output holds the logits: the one so named, else the first floating-point tensor."""
        named = pytree.tree_unflatten(list(range(len(self.outputs))), self.out_spec)
        logits = named.get("logits") if isinstance(named, Mapping) else getattr(named, "logits", None)
        if isinstance(logits, int):
            return logits
        for i, node in enumerate(self.outputs):
            value = getattr(node, "meta", {}).get("val")
            if isinstance(value, Tensor) and value.is_floating_point():
                return i
        raise UnsupportedModelError("the model returns no floating-point tensor to explain")

    def accepts(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors of these sizes may run through this graph."""
        bound: dict[str, int] = {}
        for tensor, sizes in zip(tensors, self.sizes, strict=True):
            for given, expected in zip(tensor.shape, sizes, strict=True):
                if isinstance(expected, int):
                    if given != expected:
                        return False
                    continue
                low, high = self.ranges[expected]
                if bound.setdefault(expected, given) != given or given < low or (high is not None and given > high):
                    return False
        return True

    def parameters(self, model: nn.Module) -> list[Tensor] | None:
        """The live parameters, buffers and constants, in the order of the graph's inputs.

        None where the model has changed so much (structure, dtype, device) that the graph no longer describes it.
        """
        values: list[Tensor] = []
        for owner in self.owners:
            if isinstance(owner, Tensor):
                values.append(owner)
                continue
            module: nn.Module | None = model
            for name in owner[:-1]:
                module = module._modules.get(name) if module is not None else None
            found = None
            if module is not None:
                found = module._parameters.get(owner[-1], module._buffers.get(owner[-1]))
            if found is None:
                return None
            values.append(found)
        return values if kinds(values) == self.kinds else None


def kinds(values: Sequence[Tensor]) -> frozenset[tuple[torch.dtype, torch.device]]:
    """Dtypes and devices of a model's parameters; a graph is valid for one set of them."""
    return frozenset((value.dtype, value.device) for value in values)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside, every module's own mode restored outside."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export's own warnings say nothing that a user of fastrel can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        # The fast path hides a whole encoder layer in one operator.
        torch.backends.mha.set_fastpath_enabled(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _varying(tensor: Tensor) -> dict[int, Any]:
    """Dimensions that may vary between calls: the batch, and the length of token sequences ([B, T], [B, T, D])."""
    dims = [0] if tensor.dim() else []
    if tensor.dim() in (2, 3) and tensor.shape[1] > 1:
        dims.append(1)
    return dict.fromkeys(dims, torch.export.Dim.AUTO)


def _examples(call: Any) -> Any:
    """torch.export treats size 1 as fixed; a batch of one is captured as a batch of two."""
    batched = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()]
    if any(leaf.shape[0] != 1 for leaf in batched):
        return call
    return pytree.tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x, call)


def in_order(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword inputs in the order of the model's signature, which is that of the captured graph.

    Raises:
        InputError: the model takes no such inputs.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{type(model).__name__} cannot be called like this: {error}") from error
    position = {name: i for i, name in enumerate(signature.parameters)}
    return dict(sorted(kwargs.items(), key=lambda item: position.get(item[0], len(position))))


def capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Captured:
    """Capture `model(*args, **kwargs)` with `torch.export`, in eval mode and without gradients.

    Raises:
        CaptureError: the model cannot be exported; the message carries torch's own reason.
    """
    example_args, example_kwargs = _examples((tuple(args), dict(kwargs)))
    dynamic = pytree.tree_map(
        lambda x: _varying(x) if isinstance(x, Tensor) else None, _by_name(model, example_args, example_kwargs)
    )
    try:
        with evaluation_mode(model), torch.no_grad(), _quiet():
            program = torch.export.export(model, example_args, example_kwargs, dynamic_shapes=dynamic)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"torch.export could not capture {type(model).__name__}: {reason}. "
            "Check that model(*inputs) runs in eval mode; data-dependent control flow cannot be captured."
        ) from error
    return _read(program, model)


def _by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's inputs under the names of the model's parameters, as torch.export wants dynamic shapes."""
    signature = inspect.signature(model.forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def _read(program: torch.export.ExportedProgram, model: nn.Module) -> Captured:
    signature, graph = program.graph_signature, program.graph_module.graph
    mutated = [spec.target for spec in signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
    if mutated:
        raise CaptureError(f"the forward pass changes the model's state ({mutated[0]}), which cannot be explained")
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in _ASSERTIONS:
            graph.erase_node(node)
    _make_functional(graph)
    owners: list[tuple[str, ...] | Tensor] = []
    current: list[Tensor] = []
    inputs: list[fx.Node] = []
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            owners.append(tuple(spec.target.split(".")))
            current.append(_find(model, spec.target))
        else:
            assert spec.target is not None
            owners.append(program.constants[spec.target])
            current.append(program.constants[spec.target])
    result = next(iter(reversed(graph.nodes)))
    outputs: Any = result.args[0]
    assert program.call_spec.out_spec is not None
    graph.eliminate_dead_code()
    sizes = [_sizes(node) for node in inputs if isinstance(node.meta.get("val"), Tensor)]
    batch = {entry[0] for entry in sizes if entry}
    # torch.export always says "2 or more"; nothing in a graph depends on the batch being larger than one.
    ranges = {
        str(symbol): (1 if str(symbol) in batch else _bound(bounds.lower) or 1, _bound(bounds.upper))
        for symbol, bounds in program.range_constraints.items()
    }
    return Captured(
        graph=graph,
        inputs=inputs,
        owners=owners,
        outputs=list(outputs),
        out_spec=program.call_spec.out_spec,
        sizes=sizes,
        ranges={name: ranges.get(name, (1, None)) for entry in sizes for name in entry if isinstance(name, str)},
        kinds=kinds(current),
    )


def _make_functional(graph: fx.Graph) -> None:
    """Replace operators that overwrite their first argument (ReLU(inplace=True), x += y) by those that do not.

    The reverse pass reads values that the forward pass saved; none may change after it was saved.

    Raises:
        CaptureError: an operator overwrites a part of another value, or has no such counterpart.
    """
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        written = node.args[0]
        if node.target is aten.detach_.default:
            node.replace_all_uses_with(written)
            graph.erase_node(node)
            continue
        if node.target is aten.copy_.default and isinstance(written, fx.Node):
            _scatter(graph, node)
            continue
        packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
        overload = getattr(packet, schema.overload_name or "default", None)
        read_later = isinstance(written, fx.Node) and _is_view(written) and _base_is_read_after(written, node)
        if overload is None or overload is node.target or not isinstance(written, fx.Node) or read_later:
            raise CaptureError(f"{node.target} overwrites a value in place, which cannot be explained; write it without")
        node.target = overload
        written.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)  # type: ignore[misc]


def _base_is_read_after(view: fx.Node, node: fx.Node) -> bool:
    """Whether what a view was made of, or another view of it, is read after a node that overwrites the view."""
    base = view
    while base.op == "call_function" and _is_view(base):
        base = base.args[0]  # type: ignore[assignment]
    if base.op == "placeholder":
        return True
    todo, family = [base], {base}
    while todo:
        for user in todo.pop().users:
            if user.op == "call_function" and _is_view(user) and user not in family:
                family.add(user)
                todo.append(user)
    return any(user > node for x in family - {view} for user in x.users)


def _scatter(graph: fx.Graph, node: fx.Node) -> None:
    """x[part] = value: the whole with its part replaced, for everything that reads it from here on.

    Raises:
        CaptureError: the part is not a slice or an entry of a value that the model made.
    """
    view, value = node.args[:2]
    assert isinstance(view, fx.Node)
    assert isinstance(value, fx.Node)
    scatters = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
    with graph.inserting_before(node):
        while view.op == "call_function" and view.target in scatters:
            whole: Any = view.args[0]
            if whole.meta["val"].shape != view.meta["val"].shape or value.meta["val"].shape != view.meta["val"].shape:
                scatter: Any = scatters[view.target]
                if value.meta["val"].shape != view.meta["val"].shape:
                    value = insert_call(graph, aten.expand.default, value, list(view.meta["val"].shape))
                value = insert_call(graph, scatter, whole, value, *view.args[1:])
            view = whole
    if _is_view(view):
        raise CaptureError(
            f"{node.target} overwrites a part of {view} in place, which cannot be explained; write it without"
        )
    view.replace_all_uses_with(value, delete_user_cb=lambda user: user > node)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def insert_call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """`target(*args)` where the graph inserts now, with the value that the captured ones have in their meta."""
    new = graph.call_function(target, args)
    new.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return new


def _is_view(node: fx.Node) -> bool:
    """Whether a value shares memory with another one (or with the model's input or parameters)."""
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return node.op == "placeholder" or shares


def _find(model: nn.Module, name: str) -> Tensor:
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def _sizes(node: fx.Node) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in node.meta["val"].shape)


def _bound(bound: Any) -> int | None:
    """A bound as a number, None for infinity."""
    return int(bound) if isinstance(bound, int) or bound.is_Integer else None
