"""What is asked of a family of models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastrel.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "float64", "stored")


@dataclass(frozen=True)
class Request:
    """A model by name, with weights from elsewhere (a path), random ones, or its own; dtype "stored": as they are kept.

    classes: in words, for models of pictures with text.
    """

    name: str
    weights: str | None = None
    random: bool = False
    dtype: str = "float32"
    classes: tuple[str, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """As torch has it; None for "stored".

        Raises:
            InputError: no such dtype.
        """
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        return None if self.dtype == "stored" else getattr(torch, self.dtype)
