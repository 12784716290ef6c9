"""MODULE:FUNCTION: a function of the user's, also from the current folder."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from torch import nn

from fastrel.data.preprocessing import Preprocessing, Wrapped
from fastrel.errors import InputError
from fastrel.models import from_timm, from_transformers, state
from fastrel.models.loaded import Loaded
from fastrel.models.readers import TEXTS, Pictures
from fastrel.models.request import Request


def claims(name: str) -> bool:
    """MODULE:FUNCTION, which is neither a hub's prefix nor a path."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load(request: Request) -> Loaded:
    """What the function returns: a model, (model, preprocessing), (model, tokenizer) or a `Loaded`.

    A tokenizer is called as Hugging Face's and has `convert_ids_to_tokens`, `model_input_names` and `pad_token_id`; the model
    beside it has a Hugging Face config. A preprocessing is a `Preprocessing` or a callable, picture -> [C, H, W]. A model alone
    reads pictures as timm would prepare them: by its `pretrained_cfg`, or 224 x 224 pixels normalised as for ImageNet.
    """
    found = call(request.name)
    loaded = _loaded(request.name, found)
    if request.weights:
        state.fill(loaded.model, state.read(request.weights), request.name)
    return loaded


def call(name: str) -> Any:
    """What the function at MODULE:FUNCTION returns; modules in the current folder are found like installed ones.

    Raises:
        InputError: there is no such function, or it fails.
    """
    module, _, function = name.partition(":")
    here = os.getcwd()
    known = here in sys.path or "" in sys.path
    if not known:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), function)()
    except Exception as error:  # the user's own code, which may fail in any way
        raise InputError(f"cannot load {name!r}: {type(error).__name__}: {error}") from error
    finally:
        if not known:
            sys.path.remove(here)


def _loaded(name: str, found: Any) -> Loaded:
    source = {"family": "function", "name": name}
    if isinstance(found, Loaded):
        return found if found.source else Loaded(**{**vars(found), "source": source})
    model, extra = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{name} returned {type(found).__name__}, not a model, (model, preprocessing) or (model, tokenizer)"
        )
    if hasattr(extra, "convert_ids_to_tokens"):
        if not hasattr(model, "config"):
            raise InputError(
                f"{name} returned a tokenizer and a model without a config, which would name its classes; {TEXTS}"
            )
        return from_transformers.text(model, extra, source)
    if extra is None:
        prepare = from_timm.preprocessing(model)
    elif callable(extra):
        prepare = extra if isinstance(extra, Preprocessing) else Wrapped(extra)
    else:
        raise InputError(f"{name} returned a model and {type(extra).__name__}; expected a preprocessing or a tokenizer")
    labels = getattr(getattr(model, "config", None), "id2label", None)
    names = tuple(str(labels[i]) for i in sorted(labels)) if labels else ()
    count = getattr(model, "num_classes", None)
    names = names or tuple(map(str, range(count if isinstance(count, int) else 0)))
    return Loaded(model, "image", Pictures(prepare), names, "softmax", source)
