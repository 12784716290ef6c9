"""Which family a name belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from fastrel.errors import InputError
from fastrel.models import embedded, from_function, from_timm, from_torchvision, from_transformers
from fastrel.models.loaded import Loaded
from fastrel.models.readers import Texts
from fastrel.models.request import Request
from fastrel.models.zero_shot import ZeroShot

#: Asked in this order whether a name is theirs; the last takes every name of a model on the Hugging Face hub.
FAMILIES = (embedded, from_function, from_timm, from_torchvision, from_transformers)


def load(
    name: str | None = None,
    *,
    weights: str | None = None,
    random: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    long: Literal["refuse", "window"] = "refuse",
    classes: Sequence[str] = (),
) -> Loaded:
    """The model called `name`, in eval mode, with its preprocessing or tokenizer and its classes.

    Args:
        name: a timm name (`vit_base_patch16_224`, `hf-hub:…`), a folder as timm or transformers write it, a name on the
            Hugging Face hub, a torchvision name (`torchvision/vit_b_16`), or MODULE:FUNCTION, also from the current
            folder: a function that returns a model, (model, preprocessing), (model, tokenizer) or a `Loaded`. None: the
            embedded model.
        weights: a file (.safetensors, .pth, .bin), an index of parts, or a folder of them, instead of the model's own.
        random: random weights instead: nothing is loaded but the architecture.
        dtype: "float32", "bfloat16", "float16", "float64", or "stored": as the weights are kept.
        device: where it shall run: "cpu", "cuda", "cuda:1", …, "auto": a GPU if there is one.
        long: what becomes of texts that are longer than the model reads, "refuse" or "window".
        classes: in words, which makes a classifier of pictures of a model of pictures with text (CLIP, SigLIP).

    Raises:
        InputError: there is no such model or device, its weights cannot be had or do not fit, or what it needs is not
            installed.
    """
    if long not in ("refuse", "window"):
        raise InputError(f"unknown long {long!r}; choose refuse or window")
    if weights and random:
        raise InputError("weights are either loaded or random, not both")
    where = torch_device(device)
    request = Request(name or "", weights, random, dtype, tuple(classes))
    wanted = request.torch_dtype
    family = next(family for family in FAMILIES if family.claims(request.name))
    loaded = family.load(request)
    if request.classes and not isinstance(loaded.model, ZeroShot):
        raise InputError(
            f"{name!r} has classes of its own; only models of pictures with text (CLIP, SigLIP) take them in words"
        )
    loaded.model.to(where, wanted).eval()
    return replace(loaded, reader=replace(loaded.reader, long=long)) if isinstance(loaded.reader, Texts) else loaded


def torch_device(name: str) -> torch.device:
    """A device by name; "auto" is the first GPU, or the CPU.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each kind of device has its own way of saying that it is not there
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here: {reason}; `fastrel doctor` lists those that can") from error
    return device
