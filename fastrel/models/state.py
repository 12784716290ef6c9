"""Weights from files: safetensors, one or many (sharded), and torch checkpoints without code in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastrel.errors import InputError

State = dict[str, Tensor]
_INDEX = ".index.json"
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")


def read(path: str) -> State:
    """The tensors of a file, of the parts that an `….index.json` lists, or of a folder that holds one or the other.

    Raises:
        InputError: nothing there, not weights, or parts missing.
    """
    file = _file(Path(path))
    try:
        if file.name.endswith(_INDEX):
            parts = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [part for part in parts if not (file.parent / part).is_file()]
            if missing:
                raise InputError(f"{file}: its parts {', '.join(missing)} are missing")
            state = {name: value for part in parts for name, value in _one(file.parent / part).items()}
        else:
            state = _one(file)
    except InputError:
        raise
    except Exception as error:  # readers raise anything on what is not theirs
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file} holds no weights that can be read: {reason}") from error
    return state


def fill(model: nn.Module, state: State, what: str) -> None:
    """Put weights into a model that they fit exactly.

    Raises:
        InputError: names or shapes differ.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the weights do not fit {what!r}: {' '.join(str(error).split())[:500]}") from error


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"no weights file {str(path)!r}")
    for pattern in ("*.safetensors" + _INDEX, "*.bin" + _INDEX, "*.safetensors", "*.bin", "*.pth", "*.pt"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise InputError(f"{path} holds several files of weights: {', '.join(f.name for f in found[:5])}; name one")
        if found:
            return found[0]
    raise InputError(f"{path} holds no weights (.safetensors, .bin, .pth or an index of parts)")


def _one(path: Path) -> State:
    if path.suffix == ".safetensors":
        return load_file(path)
    found: Any = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path} holds {type(found).__name__}, not a dictionary of tensors")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found
