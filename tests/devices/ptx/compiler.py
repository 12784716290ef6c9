"""Kernels compiled to PTX by Triton's own stages, for a GPU that is not here; the assembler is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.devices.recorder import front_end


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX, and how many bytes of shared memory a block of it has."""

    ptx: str
    shared: int


def compile_to_ptx(source: ASTSource, capability: int, options: dict[str, Any]) -> Compiled:
    """What `triton.compile` does, up to PTX."""
    target = GPUTarget("cuda", capability, 32)
    backend, parsed, module = front_end(source, target, options)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    metadata: dict[str, Any] = {"target": target, **parsed.__dict__}
    for name in ("ttir", "ttgir", "llir", "ptx"):
        module = stages[name](module, metadata)
    return Compiled(str(module), metadata["shared"])
