"""The `fastrel::` operator namespace.

Schemas are defined here in Python, once. The reference implementation is registered for every device; a compiled backend
registers a kernel for its own dispatch key and takes precedence there, so rules never know which one runs.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("fastrel", "DEF")

#: The implementation in plain PyTorch of every operator.
REFERENCES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


def declare(schema: str) -> None:
    """An operator that only a compiled backend implements."""
    _LIBRARY.define(schema)


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register `fastrel::<name>` from its schema, its implementation in plain PyTorch and its shape function."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastrel::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fastrel, name).default
    REFERENCES[op] = reference
    return op
