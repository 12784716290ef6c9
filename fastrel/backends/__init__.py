"""Which implementation of the fused operators runs, and why another cannot: one file per backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fastrel import ops, weights
from fastrel.backends import cpp, cuda, fusion, triton
from fastrel.backends.common import Call, as_the_model_has_it
from fastrel.errors import InputError, UnsupportedModelError
from fastrel.ops.library import CPU_KERNELS, REFERENCES


@dataclass(frozen=True)
class Backend:
    """An implementation of the fused operators.

    `unavailable()` is None, or why it cannot run on this machine; `runs_on(device)` why not on this device;
    `kernels()` maps operators to functions of the same arguments; `supports(call)` says why it cannot compute a call: no reasons, no
    objection. `narrow`: its kernels take 16-bit values as they are, and form the slope of a gelu from x alone. `digest`: tells a
    weight's value in less time than preparing it takes, so that what was prepared is kept.
    """

    name: str
    unavailable: Callable[[], str | None]
    runs_on: Callable[[torch.device], str | None]
    kernels: Callable[[], dict[Any, Callable[..., Any]]]
    supports: Callable[[Call], list[str]]
    narrow: bool = False
    digest: Callable[..., Any] | None = None


#: In the order in which "auto" prefers them.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("triton", triton.unavailable, triton.runs_on, triton.kernels, triton.supports, narrow=True),
        Backend("cuda", cuda.unavailable, cuda.runs_on, cuda.kernels, cuda.supports, narrow=True),
        Backend("cpp", cpp.unavailable, cpp.runs_on, cpp.kernels, cpp.supports, digest=CPU_KERNELS[ops.row_digest]),
        Backend("torch", lambda: None, lambda device: None, lambda: REFERENCES, lambda call: []),
    )
}


def require(name: str) -> None:
    """Raise InputError unless `name` is "auto" or a backend that can run."""
    if name == "auto":
        return
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}; choose auto or one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable()
    if reason:
        raise InputError(f"backend {name!r} cannot run: {reason}")


def candidates(name: str, device: torch.device) -> list[Backend]:
    """The backends that may compute on a device, the preferred one first; whether they can at all is yet to be asked.

    Raises:
        InputError: a backend asked for by name does not run on this device.
    """
    if name == "auto":
        return [backend for backend in BACKENDS.values() if backend.runs_on(device) is None]
    reason = BACKENDS[name].runs_on(device)
    if reason:
        raise InputError(f"backend {name!r} cannot run: {reason}")
    return [BACKENDS[name]]


def choose(call: Call, allowed: list[Backend]) -> tuple[Backend, list[str]]:
    """The first backend that computes a call, torch if none does, and what spoke against those before it."""
    against: list[str] = []
    for candidate in allowed:
        reasons = candidate.supports(call)
        # Availability last: it may compile a library for minutes, which must be for something.
        if not reasons and call.op in candidate.kernels() and not candidate.unavailable():
            return candidate, against
        against += [f"{candidate.name} {reason}" for reason in reasons]
    return BACKENDS["torch"], against


def lower(
    reverse: fx.GraphModule, backend: str, device: torch.device, dtype: torch.dtype, keep_weights: bool = True
) -> None:
    """Choose, once and for every operator of a reverse graph with lanes of `dtype`, what computes it on this device.

    Weights in reduced precision are kept from call to call (`fastrel.weights`) if `keep_weights`.

    Raises:
        InputError: a backend asked for by name does not run on this device.
        UnsupportedModelError: it cannot compute an operator that this explanation needs, with the reasons.
    """
    allowed, fused = candidates(backend, device), False
    digests: dict[Any, fx.Node] = {}
    for node in reverse.graph.nodes:
        op = node.target
        if op not in REFERENCES and op not in _PLAIN:
            continue
        chosen, against = choose(Call.of(node, dtype), allowed)
        if against and backend != "auto":
            raise UnsupportedModelError(
                f"backend {backend!r} cannot run: {op} {'; '.join(against)}; with 'auto', torch does it"
            )
        if chosen.narrow:
            with reverse.graph.inserting_before(node):
                node.args = tuple(as_the_model_has_it(x) for x in node.args)
            if op is ops.activation_ratio and node.args[3]:
                node.args = (*node.args[:2], node.args[1], node.args[3])  # no need for its value
        node.target = chosen.kernels().get(op, op)
        node.meta["of a weight"] = op is ops.reduced_weight
        if keep_weights and op is ops.reduced_weight:
            _keep(node, chosen, device, digests)
        fused = fused or chosen.name == "triton"
    if fused:
        fusion.fuse(reverse.graph)
    reverse.graph.eliminate_dead_code()
    reverse.recompile()


#: Products of lanes alone, which are no operators of ours but which a backend may know how to multiply.
_PLAIN = (ops.reduced_matmul, torch.matmul)


def _keep(node: fx.Node, chosen: Backend, device: torch.device, digests: dict[Any, fx.Node]) -> None:
    """What is made of a weight is kept from call to call, on a CPU while its digest is the same (one for all its uses)."""
    target: Any = node.target
    if not chosen.digest:
        node.target = weights.kept_by_version(target) if device.type != "cpu" else target
        return
    weight, purpose = node.args
    if weight not in digests:
        with node.graph.inserting_before(node):
            digests[weight] = node.graph.call_function(weights.digested(chosen.digest), (weight,))
    node.target, node.args = weights.kept(target), (weight, purpose, digests[weight])
