"""Launchers that run on CPU tensors as on a GPU: Triton's own host path, its compiler up to PTX, and the emulator as the device.

device = Device(80)
with emulated(device):
    kernels()[ops.zplus_linear](x, …)
device.kernels
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.devices.ptx.compiler import compile_to_ptx
from tests.devices.ptx.instructions import Program


class Device:
    """A GPU of a compute capability: what Triton asks of a driver, and the kernels that were loaded."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.kernels: list[Loaded] = []
        self.caches: dict[JITFunction, Any] = {}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Loaded:
    """A compiled kernel: launching it emulates it.

    Attributes:
        name: of the kernel
        options: that it was compiled with
        constexprs: its arguments that are constants by its signature
        launches: how many there were
        program: what the emulator made of it
    """

    function = packed_metadata = None

    def __init__(self, source: ASTSource, capability: int, options: dict[str, Any]) -> None:
        self.name, self.options, self.launches = source.fn.fn.__name__, options, 0
        names = source.fn.arg_names
        self.constexprs = {names[at[0]]: x for at, x in source.constants.items() if source.fn.params[at[0]].is_constexpr}
        self._passed = [name for name, kind in source.signature.items() if kind != "constexpr"]
        self._names = list(source.signature)
        self._compiled = compile_to_ptx(source, capability, options)
        self.program = Program.of(self._compiled.ptx)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, _stream: int, _f: Any, _p: Any, _m: Any, _e: Any, _x: Any, *values: Any) -> None:
        assert z == 1
        self.launches += 1
        given = dict(zip(self._names, values, strict=True))
        passed = [given[name] for name in self._passed]
        addresses = [value.data_ptr() if isinstance(value, Tensor) else value for value in passed]
        extents = [_extent(value) for value in passed if isinstance(value, Tensor) and value.numel()]
        scratch = [0] * (len(self.program.kernel.parameters) - len(addresses))  # of Triton's own, which no kernel here uses
        self.program.run((x, y), self._compiled.shared, [*addresses, *scratch], extents)


def _extent(x: Tensor) -> tuple[int, int]:
    """The first byte of a tensor, and the one behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


@contextlib.contextmanager
def emulated(device: Device) -> Iterator[None]:
    """Everything inside is launched on an emulated GPU. What launchers allocate is NaN until a kernel writes it."""

    def compile_(
        self: JITFunction, key: Any, signature: Any, index: int, constants: Any, options: Any, attrs: Any, _: bool
    ) -> Loaded:
        shown = {name: getattr(options, name) for name in ("num_warps", "num_stages", "maxnreg")}
        given = {name: value for name, value in shown.items() if value is not None}
        loaded = Loaded(ASTSource(self, signature, constants, attrs), device.capability, given)
        device.kernels.append(loaded)
        self.device_caches[index][0][key] = loaded
        return loaded

    def caches(self: JITFunction) -> Any:
        return device.caches.setdefault(self, defaultdict(self.create_binder))

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **options: Any) -> Tensor:
            x = allocate(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() and x.numel() else x

        return empty

    before = None if driver._active is None else driver.active
    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(JITFunction, "_do_compile", compile_),
        mock.patch.object(JITFunction, "device_caches", property(caches, lambda self, value: None), create=True),
    ):
        driver.set_active(device)
        try:
            yield
        finally:
            driver._active = before
