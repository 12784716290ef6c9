"""Capture: an unmodified model and one call of it -> a graph of high-level operators, and where that graph is valid.

torch.export is neither thread-safe nor does it leave a model alone that runs meanwhile, so captures happen one at a time in the
whole process, and on a clone of the model's structure (`fastrel.graph.clone`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv, is_concrete_int
from torch.nn.modules import transformer

from fastrel.errors import CaptureError, InputError, first_line
from fastrel.graph.ambient import casts
from fastrel.graph.canonical import canonicalise
from fastrel.graph.clone import structural_clone
from fastrel.graph.constants import fold_constants
from fastrel.graph.equivalents import as_graphs_can
from fastrel.graph.facts import Facts
from fastrel.graph.functional import functional
from fastrel.graph.guards import Guards
from fastrel.graph.results import returns_plainly

aten = torch.ops.aten

#: Held by whoever captures, in the whole process.
LOCK = threading.RLock()

_TORCH = Path(torch.__file__).parent

#: Graph nodes that only check something at run time; what they check about sizes is among the guards.
_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}


@dataclass(frozen=True)
class Signature:
    """What two calls must share to share a captured graph, but for sizes: structure, dtypes, device, constants, which tensors are one
    (a model may ask, or write into one), ambient modes."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    same: tuple[int, ...]
    ambient: tuple[Any, ...]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Signature, list[Any]]:
        """The signature of a call without any sizes, and the call's leaves.

        Raises:
            InputError: an input is neither a tensor nor a constant.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        first: dict[int, int] = {}
        same = tuple(first.setdefault(id(leaf), i) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        return cls(spec, tuple(_kind(leaf) for leaf in leaves), same, _ambient()), leaves


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.device, leaf.dim()
    try:
        hash(leaf)
    except TypeError as error:
        shown = repr(leaf)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        raise InputError(
            f"input {shown} of type {type(leaf).__name__} is neither a tensor nor a constant; pass tensors"
        ) from error
    return type(leaf), leaf


def _ambient() -> tuple[Any, ...]:
    """Process or thread state that decides what a model computes."""
    return torch.get_default_dtype(), torch.get_default_device(), tuple(casts().items())


def _autocast_inside(model: nn.Module, ambient: dict[str, torch.dtype]) -> None:
    """Let a module do itself what autocast around it does: torch.export notes only what is inside."""
    for kind, dtype in ambient.items():
        forward = model.forward

        @functools.wraps(forward)
        def cast(*args: Any, _kind: str = kind, _dtype: Any = dtype, _forward: Any = forward, **kwargs: Any) -> Any:
            with torch.autocast(_kind, _dtype):
                return _forward(*args, **kwargs)

        model.forward = cast


def _stays_as_it_is(model: nn.Module) -> None:
    """Let `self.router = self.router.to(torch.float32)` in a forward pass, which cannot be traced, be nothing where it is."""
    for module in model.modules():
        module.__dict__["_apply"] = functools.partial(_applied, module)


def _applied(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
    for name, x in itertools.chain(module.named_parameters(), module.named_buffers()):
        found = convert(x)
        if (found.dtype, found.device) != (x.dtype, x.device):
            raise CaptureError(
                f"the forward pass turns {name} of its {type(module).__name__} into {found.dtype} on {found.device}; do that before, "
                "for a graph takes the weights as they are"
            )
    return module


@dataclass(frozen=True)
class Captured:
    """A model's forward pass as a graph.

    Attributes:
        graph: the operators; its placeholders are `owners`, then `inputs`.
        owners: where each parameter, buffer and tensor attribute is found on the live model, or a constant of the code.
        outputs: what the model returns, flat: nodes, or constants such as None.
        out_spec: how the model returns it.
        guards: for which sizes the graph is valid.
        facts: what is known of the graph's values.
        metadata: dtype, device and shape of each owner's value; the graph is valid for these.
    """

    graph: fx.Graph
    inputs: list[fx.Node]
    owners: list[tuple[str, ...] | Tensor]
    outputs: list[Any]
    out_spec: pytree.TreeSpec
    guards: Guards
    facts: Facts
    metadata: list[tuple[torch.dtype, torch.device, torch.Size]]

    def parameters(self, model: nn.Module) -> list[Tensor] | None:
        """The live parameters, buffers and attributes, in the order of the graph's placeholders.

        None where the model has changed so much (structure, dtype, device, shape) that the graph no longer describes it.
        """
        values: list[Tensor] = []
        for owner, expected in zip(self.owners, self.metadata, strict=True):
            value = owner if isinstance(owner, Tensor) else find(model, owner)
            if not isinstance(value, Tensor) or (value.dtype, value.device, value.shape) != expected:
                return None
            values.append(value)
        return values

    def found_by_name(self, model: nn.Module) -> list[Tensor]:
        """The tensors that the graph finds on a model by their names, and reads."""
        nodes = (node for node in self.graph.nodes if node.op == "placeholder")
        named = [owner for owner, node in zip(self.owners, nodes, strict=False) if isinstance(owner, tuple) and node.users]
        return [x for x in (find(model, owner) for owner in named) if isinstance(x, Tensor)]


def find(model: nn.Module, path: tuple[str, ...]) -> Any:
    """What lies at a path of attributes, module names, keys and positions; None where there is nothing."""
    x: Any = model
    for name in path:
        if isinstance(x, nn.Module):
            places: tuple[Any, ...] = (x._modules, x._parameters, x._buffers, x.__dict__)
            x = next((place[name] for place in places if name in place), None)
        elif isinstance(x, dict):
            x = next((value for key, value in x.items() if str(key) == name), None)
        elif isinstance(x, (list, tuple)):
            x = x[int(name)] if name.isdigit() and int(name) < len(x) else None
        else:
            x = getattr(x, "__dict__", {}).get(name)
    return x


def _is_causal(
    mask: Tensor | None,
    is_causal: bool | None = None,
    size: int | None = None,
    detect: Any = transformer._detect_is_causal_mask,
) -> bool:
    """What nn.TransformerEncoder asks of a mask's numbers: not while it is traced; the mask itself then says all."""
    return bool(is_causal) if isinstance(mask, FakeTensor) else detect(mask, is_causal, size)


class _Aside(io.TextIOBase):
    """Takes what one thread writes aside; other threads write where they did."""

    def __init__(self, stream: Any, said: list[str]) -> None:
        self._stream, self._said, self._thread = stream, said, threading.get_ident()

    def write(self, text: str) -> int:
        """Keep or pass on."""
        if threading.get_ident() != self._thread:
            return int(self._stream.write(text))
        self._said.append(text)
        return len(text)


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Keeps torch's own logs and warnings off stderr and collects them; to be used under `LOCK`."""
    said: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    collect = Collect()
    known = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] == "torch"]
    loggers = [logging.getLogger("torch"), *(x for x in known if x.handlers and x.name != "torch.__trace")]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    detect = transformer._detect_is_causal_mask
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [collect], False
        # The fast path hides a whole encoder layer in one operator.
        torch.backends.mha.set_fastpath_enabled(False)
        transformer._detect_is_causal_mask = _is_causal
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(_Aside(sys.stderr, said)):
            warnings.simplefilter("always")
            yield said
            said += [str(warning.message) for warning in warned]
    finally:
        transformer._detect_is_causal_mask = detect
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate


def _varying(tensor: Tensor, batch: bool) -> dict[int, Any]:
    """Dimensions that may vary between calls: the batch, and the length of token sequences ([B, T], [B, T, D])."""
    dims = [0] if tensor.dim() and batch else []
    if tensor.dim() in (2, 3) and tensor.shape[1] > 1:
        dims.append(1)
    return dict.fromkeys(dims, torch.export.Dim.AUTO)


def _examples(call: Any) -> Any:
    """torch.export treats size 1 as fixed; a batch of one is captured as a batch of two."""
    batched = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()]
    if any(leaf.shape[0] != 1 for leaf in batched):
        return call
    return pytree.tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x, call)


def _apart(call: Any) -> Any:
    """The inputs as tensors of their own: torch.export takes one tensor given twice, or one of the model's, for one value for ever."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, call)


def in_order(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword inputs in the order of the model's signature, which is that of the captured graph.

    Raises:
        InputError: the model takes no such inputs.
    """
    try:
        signature = inspect.signature(model.forward)
    except ValueError as error:
        raise InputError(f"{type(model).__name__} has no Python forward; pass the model it was made of") from error
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([type(x).__name__ for x in args] + list(kwargs)) or "nothing"
        takes = ", ".join(name for name in signature.parameters)
        raise InputError(
            f"{type(model).__name__} cannot be called like this: {error}; it takes ({takes}) and was given {given}"
        ) from error
    position = {name: i for i, name in enumerate(signature.parameters)}
    return dict(sorted(kwargs.items(), key=lambda item: position.get(item[0], len(position))))


def capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch_varies: bool = True) -> Captured:
    """Capture `model(*args, **kwargs)` with `torch.export`, in eval mode and without gradients.

    Raises:
        CaptureError: the model cannot be exported; the message carries torch's own reason, `details` what torch logged.
    """
    call = (tuple(args), dict(kwargs))
    example_args, example_kwargs = _apart(_examples(call) if batch_varies else call)
    with LOCK, quiet() as said:
        try:
            clone = structural_clone(model)
            returns_plainly(clone)
            _stays_as_it_is(clone)
            as_graphs_can(clone)
            ambient = casts()
            _autocast_inside(clone, ambient)
            dynamic = pytree.tree_map(
                lambda x: _varying(x, batch_varies) if isinstance(x, Tensor) else None,
                _by_name(clone, example_args, example_kwargs),
            )
            with torch.no_grad(), contextlib.ExitStack() as outside:
                for kind in ambient:
                    outside.enter_context(torch.autocast(kind, enabled=False))
                program = torch.export.export(clone, example_args, example_kwargs, dynamic_shapes=dynamic)
            captured = _read(program, clone)
            _release(captured.graph)
            return captured
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                _reason(model, error),
                details="\n".join([*said, str(error)]),
            ) from error
        finally:
            _forget()


def check_weights(model: nn.Module) -> None:
    """Refuse a model whose weights have no numbers, or none that anything can be derived from.

    Raises:
        CaptureError: naming the first.
    """
    for name, x in itertools.chain(model.named_parameters(), model.named_buffers()):
        if x.is_inference() and isinstance(x, nn.Parameter):
            raise CaptureError(
                f"{name} of {type(model).__name__} was made in inference mode, so nothing can be derived from it; make or load the "
                "model outside of torch.inference_mode()"
            )
        if x.device.type == "meta":
            raise CaptureError(
                f"{name} of {type(model).__name__} is on device meta and has no numbers; load its weights first"
            )


def _reason(model: nn.Module, error: Exception) -> str:
    name, place = type(model).__name__, _place_of(error)
    if "data-dependent" not in str(error):
        advice = "Check that model(*inputs) runs in eval mode and that its code computes with torch alone; --debug shows torch's log."
        return f"torch.export could not capture {name}{place}: {first_line(error).rstrip('.')}. {advice}"
    return (
        f"torch.export could not capture {name}: its code chooses or sizes something by the numbers in its tensors{place}, which a "
        "graph cannot; use torch.where, or make the choice an argument (a check of numbers: leave it out)"
    )


def _place_of(error: Exception) -> str:
    """The line of a model's code that an error comes from, if it does."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not Path(frame.filename).is_relative_to(_TORCH) and frame.filename != __file__]
    own = [frame for frame in own if Path(frame.filename).is_file()]
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}, `{own[-1].line}`" if own else ""


def _release(graph: fx.Graph) -> None:
    """Let go of what torch keeps of a tracing: the sizes' ShapeEnv holds fake tensors whose sizes, in C++, hold it, which no garbage
    collector sees."""
    values = [value for node in graph.nodes for value in pytree.tree_leaves(node.meta.get("val"))]
    sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    known: set[Any] = {size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)}  # type: ignore[attr-defined]
    for shape_env in known:
        shape_env.tracked_fakes = None
        shape_env.fake_tensor_cache.clear()


def _forget() -> None:
    """Let functions of ShapeEnv forget their arguments, which they remember without a limit."""
    for member in vars(ShapeEnv).values():
        if forget := getattr(member, "cache_clear", None):
            forget()


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
    assert program.call_spec.out_spec is not None
    out_spec = program.call_spec.out_spec
    program = functional(program)
    signature, graph = program.graph_signature, program.graph_module.graph
    kept = (OutputKind.USER_OUTPUT, OutputKind.USER_INPUT_MUTATION)
    changed = [spec.target for spec in signature.output_specs if spec.kind not in kept]
    if changed:
        raise CaptureError(f"the forward pass changes the model's state ({changed[0]}), which cannot be explained")
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in _ASSERTIONS:
            graph.erase_node(node)
    owners: list[tuple[str, ...] | Tensor] = []
    inputs: list[fx.Node] = []
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    attributes = dict(_tensor_attributes(model))
    # A forward that was put on the model speaks of the model's own modules, not of those of the clone: torch takes aliases of these.
    named = {_place(x): tuple(name.split(".")) for name, x in (*model.named_parameters(), *model.named_buffers())}
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
            continue
        assert spec.target is not None
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            owners.append(tuple(spec.target.split(".")))
        else:
            constant = program.constants[spec.target]
            path = attributes.get(id(constant)) or named.get(_place(constant)) if isinstance(constant, Tensor) else None
            owners.append(path or constant)
    output = next(iter(reversed(graph.nodes)))
    # What the model writes into its own inputs is no output.
    results = zip(output.args[0], signature.output_specs, strict=True)
    output.args = (tuple(x for x, spec in results if spec.kind is OutputKind.USER_OUTPUT),)
    graph.eliminate_dead_code()
    owners += fold_constants(graph, inputs[0] if inputs else output)
    guards = Guards(inputs)
    _check_batch(guards, inputs, output.args[0])

    def facts() -> Facts:
        return Facts(graph, inputs, guards.batch_names)

    canonicalise(graph, lambda: facts().axes)
    values = [owner if isinstance(owner, Tensor) else find(model, owner) for owner in owners]
    return Captured(
        graph=graph,
        inputs=inputs,
        owners=owners,
        outputs=list(output.args[0]),
        out_spec=out_spec,
        guards=guards,
        facts=facts(),
        metadata=[(value.dtype, value.device, value.shape) for value in values],
    )


def _check_batch(guards: Guards, inputs: Sequence[fx.Node], outputs: Sequence[Any]) -> None:
    """Raise CaptureError where the samples of the outputs lie along another dimension of an input than the first, or nowhere."""
    values = [x.meta.get("val") for x in outputs if isinstance(x, fx.Node)]
    leading = [x.shape[0] for x in values if isinstance(x, Tensor) and x.dim()]
    varying = {str(size) for size in leading if not is_concrete_int(size)}
    if varying & guards.batch_names:
        _check_places(filter(_is_looked_up, inputs), varying)
        return
    sizes = [x.meta["val"].shape[0] for x in inputs if _has_dims(x)]
    given = {size.node.hint for size in sizes if isinstance(size, torch.SymInt)}
    if leading and not varying and given and not given & {int(size) for size in leading}:
        raise CaptureError(
            f"the outputs have {leading[0]} samples however long dimension 0 of {inputs[0].name} is, and fastrel takes samples along "
            "it; give one sample as a batch of one, [1, T, …], to a module that turns it into what the model takes"
        )
    _check_places(inputs, varying)


def _check_places(inputs: Iterable[fx.Node], samples: Collection[str]) -> None:
    """Raise CaptureError where `samples`, sizes of the outputs' first dimensions, are those of another dimension of an input."""
    for node in inputs:
        value = node.meta.get("val")
        sizes = [str(size) for size in value.shape] if isinstance(value, Tensor) else []
        found = [dim for dim, size in enumerate(sizes) if size in samples]
        if found and found[0] > 0:
            raise CaptureError(
                f"the samples lie along dimension {found[0]} of input {node.name}, and fastrel takes them along the first; "
                "explain a module that takes [B, T, …], transposes it for the model, and returns samples first"
            )


def _is_looked_up(x: fx.Node) -> bool:
    """Whether an input holds token ids that an embedding looks up, as they are."""
    return any(user.target is aten.embedding.default and user.args[1] is x for user in x.users)


def _has_dims(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0


def _place(x: Tensor) -> Any:
    """Where a tensor's numbers are, and how they lie there; an empty one is itself."""
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) if x.numel() and x.device.type != "meta" else id(x)


def _tensor_attributes(model: nn.Module) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Tensors among the attributes of modules, also in lists, tuples and dicts: id, and path."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        seen.update((id(module._parameters), id(module._buffers), id(module._modules)))
        todo: list[Any] = [(tuple(name.split(".")) if name else (), key, x) for key, x in module.__dict__.items()]
        while todo:
            place, key, x = todo.pop()
            path = (*place, str(key))
            if isinstance(x, Tensor):
                yield id(x), path
            elif isinstance(x, (dict, list, tuple)) and id(x) not in seen:
                seen.add(id(x))
                todo += [(path, k, y) for k, y in (x.items() if isinstance(x, dict) else enumerate(x))]
