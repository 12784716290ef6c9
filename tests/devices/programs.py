"""Whole explanations on fake tensors "on" a GPU: what they launch, with nothing computed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from fastrel import backends, methods
from fastrel import precision as precision_
from fastrel.graph.capture import Captured, capture, in_order
from fastrel.graphed import run
from fastrel.outputs import logits_index
from fastrel.transform.lanes import lane_dtype
from fastrel.transform.program import Program
from fastrel.transform.walk import transform
from tests.devices.recorder import Recorded

aten = torch.ops.aten


def captured_on(device: torch.device, model: nn.Module, given: dict[str, Any]) -> tuple[Captured, dict[str, Any]]:
    """The graph of a model that was moved to a GPU, as `model.cuda()` would move it, and its inputs there: fake tensors."""

    def moved(x: Any) -> Any:
        return torch.empty(x.shape, dtype=x.dtype, device=device) if isinstance(x, Tensor) else x

    # Without a driver, what an empty list becomes on a GPU cannot be computed ahead (`torch.tensor([], device="cuda")`).
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=False),
        mock.patch.object(proxy_tensor, "CONSTANT_NUMEL_LIMIT", -1),
        FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True),
    ):
        for module in model.modules():
            module._parameters |= {name: nn.Parameter(moved(x)) for name, x in module._parameters.items() if x is not None}
            module._buffers |= {name: moved(x) for name, x in module._buffers.items()}
        inputs = {name: moved(x) for name, x in in_order(model, (), given).items()}
        return capture(model, (), inputs), inputs


def lowered(
    model: nn.Module,
    given: dict[str, Any],
    device: torch.device,
    *,
    precision: str = "float32",
    rules: str = "positive",
    kept_as_on: str | None = None,
    backend: str = "triton",
    moved: bool = False,
) -> tuple[Program, list[Any]]:
    """The program that explains a model, its operators chosen for a backend on `device`, and the values it takes.

    kept_as_on: the kind of device on which the reverse pass finds what this one does, if not `device`'s. moved: the model is moved to
    `device` before it is captured, for what its code makes there; the values are then fake.
    """
    given = in_order(model, (), given)
    captured, given = captured_on(device, model, given) if moved else (capture(model, (), given), given)
    logits = logits_index(captured)
    dtype = lane_dtype(captured.outputs[logits].meta["val"].dtype)
    kept = device if kept_as_on is None else torch.device(kept_as_on)
    products = precision_.products(precision, rules, dtype, device, backend)
    program = transform(captured, methods.default(rules), rules=rules, leaves=(logits,), products=products, device=kept)
    backends.lower(program.reverse, backend, device, program.dtype)
    values = captured.parameters(model)
    assert values is not None
    return program, [*values, *given.values()]


class _AsOnAGpu(TorchFunctionMode):
    """torch's fused attention as the one launch that it is on a GPU; without one it would fall apart into its parts. And its own
    gradients, whose threads want a device, as what they give."""

    def __init__(self, seen: Recorded) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.scaled_dot_product_attention.default:
            self._seen.operators.append("fused attention")
            q, v = args[0], args[2]
            return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
        if func is torch.autograd.grad:
            self._seen.operators.append("gradient")
            return tuple(torch.empty_like(x) for x in ([args[1]] if isinstance(args[1], Tensor) else args[1]))
        return func(*args, **(kwargs or {}))


class Launches:
    """Runs a program on fake tensors of any batch size; `explain` forgets what earlier runs launched."""

    def __init__(self, seen: Recorded, program: Program, values: list[Any], device: torch.device, inputs: int = 1) -> None:
        self._seen, self._program, self._device, self._inputs = seen, program, device, inputs
        self._mode = FakeTensorMode()
        with self._mode:
            self._values = [self._fake(x) for x in values]

    def _fake(self, x: Any, batch: int | None = None) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if batch is not None:
            return torch.empty((batch, *x.shape[1:]), dtype=x.dtype, device=self._device)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self._device)

    def explain(self, batch: int, targets: int = 0) -> None:
        """One explanation, for the predicted class or for `targets` classes."""
        self._seen.operators.clear()
        self._seen.launches.clear()
        self._seen.kernels.clear()
        with self._mode, _AsOnAGpu(self._seen):
            inputs = [self._fake(x, batch) for x in self._values[-self._inputs :]]
            classes = torch.empty(batch, targets, dtype=torch.long, device=self._device) if targets else None
            run(self._program, [*self._values[: -self._inputs], *inputs], classes)

    @property
    def count(self) -> int:
        return len(self._seen.operators) + len(self._seen.launches)
