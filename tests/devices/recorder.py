"""Launches recorded without a GPU: Triton's own host path, binder, specialisation and front end, on a fake driver.

    with recorded(capability=90) as seen:
        with FakeTensorMode():
            kernels()[ops.zplus_linear](x, …)   # tensors "on" any CUDA device
    seen.launches, seen.kernels, seen.operators

What is not there: a compiled binary and a device. Everything before them is what a user's process does.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastrel.backends import triton as triton_backend

#: What a CUDA device takes in each direction of a grid.
GRID_LIMITS = (2**31 - 1, 65535, 65535)

aten = torch.ops.aten


@dataclass(frozen=True)
class Launch:
    """A kernel launched: on which device, while which one held its first tensor, with what grid, arguments and options."""

    kernel: JITFunction
    device: int
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def on_its_tensors_device(self) -> bool:
        devices = {x.device.index for x in self.arguments.values() if isinstance(x, Tensor)}
        return devices == {self.device}


@dataclass(frozen=True)
class Variant:
    """A kernel as it would be compiled: what Triton specialised it to."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[Any, Any], ...]
    attributes: tuple[tuple[Any, Any], ...]
    options: tuple[tuple[str, Any], ...]

    def source(self) -> ASTSource:
        attributes = {key: [list(pair) for pair in value] for key, value in self.attributes}
        return ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)


@dataclass
class Recorded:
    """What was launched, what had to be compiled for it, and how many of torch's own operators ran on the device."""

    capability: int
    device: int = 0
    launches: list[Launch] = field(default_factory=list)
    kernels: list[Variant] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)

    # What Triton asks of a driver.
    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def front_end(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The backend for a target, its options, and the kernel as its front end has it.

    Raises:
        triton.CompilationError: as at a user's first call.
    """
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation = backend.get_codegen_implementation(parsed)
    return backend, parsed, source.make_ir(target, parsed, implementation, backend.get_module_map(), context)


def to_ttir(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Any:
    """The kernel through Triton's front end, as `front_end`."""
    return front_end(source, target, options)[2]


class _Compiled:
    """In the place of a compiled kernel: launching it writes it down."""

    function = packed_metadata = None

    def __init__(self, seen: Recorded, kernel: JITFunction, options: dict[str, Any]) -> None:
        self._seen, self._kernel, self._options = seen, kernel, options

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, _stream: int, _f: Any, _p: Any, _m: Any, _e: Any, _x: Any, *values: Any) -> None:
        arguments = dict(zip(self._kernel.arg_names, values, strict=True))
        self._seen.launches.append(Launch(self._kernel, self._seen.device, (x, y, z), arguments, self._options))


class _Operators(TorchDispatchMode):
    """Counts what torch itself launches: operators that make or write a CUDA tensor, views aside."""

    def __init__(self, seen: Recorded) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        makes_nothing = func in NOTHING or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        unchanged = first is (args[0] if args else None) and not func._schema.is_mutable
        if isinstance(first, Tensor) and first.device.type == "cuda" and not makes_nothing and not unchanged:
            self._seen.operators.append(str(func))
        return result


#: Operators that launch nothing, views aside.
NOTHING = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
            aten.detach.default, aten.new_empty_strided.default, aten._unsafe_view.default}  # fmt: skip


@contextlib.contextmanager
def recorded(capability: int = 90, devices: int = 2, checked: bool = True) -> Iterator[Recorded]:
    """Everything inside runs as on a machine with GPUs of this capability, device 0 being the current one.

    checked: whether every kernel goes through Triton's front end, as at a user's first call.
    """
    seen = Recorded(capability)

    def exchange(index: int) -> int:
        before, seen.device = seen.device, seen.device if index < 0 else index
        return before

    def compile_(
        self: JITFunction, key: Any, signature: Any, device: int, constants: Any, options: Any, attrs: Any, _: bool
    ) -> Any:
        kept = options.__dict__
        shown = {name: kept[name] for name in ("num_warps", "num_stages", "maxnreg") if kept.get(name) is not None}
        if checked:
            to_ttir(ASTSource(self, signature, constants, attrs), seen.get_current_target(), shown)
        frozen = tuple((k, tuple(tuple(pair) for pair in v)) for k, v in attrs.items())
        seen.kernels.append(Variant(self, tuple(signature.items()), tuple(constants.items()), frozen, tuple(shown.items())))
        kernel = self.device_caches[device][0][key] = _Compiled(seen, self, shown)
        return kernel

    before = None if driver._active is None else driver.active
    fresh: dict[JITFunction, Any] = {}

    def caches(self: JITFunction) -> Any:
        return fresh.setdefault(self, defaultdict(self.create_binder))

    number = (capability // 10, capability % 10)
    with (
        FakeTensorMode()
    ):  # a first guard of a device finds out that there is none, which it may not once there seem to be some
        torch.empty(2, device="cuda")[:1]
    with (
        mock.patch.object(JITFunction, "_do_compile", compile_),
        mock.patch.object(JITFunction, "device_caches", property(caches, lambda self, value: None), create=True),
        mock.patch.object(FakeTensor, "data_ptr", return_value=0x7F0000000000),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=devices),
        mock.patch.object(torch.cuda, "current_device", seen.get_current_device),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=number),
        mock.patch.object(torch.cuda, "_exchange_device", exchange),
        mock.patch.object(torch.cuda, "_maybe_exchange_device", exchange),
        mock.patch.object(triton_backend, "_fails_on", return_value=None),
        _Operators(seen),
    ):
        driver.set_active(seen)
        try:
            yield seen
        finally:
            driver._active = before
