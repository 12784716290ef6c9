"""timm: its own names, `hf-hub:…`, `local-dir:…`, and folders in which it wrote a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from fastrel.data.preprocessing import Prepare, Preprocessing, Wrapped
from fastrel.errors import InputError, first_line
from fastrel.models import state
from fastrel.models.loaded import Loaded
from fastrel.models.readers import Pictures
from fastrel.models.request import Request

_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


def claims(name: str) -> bool:
    """A name or folder of timm's."""
    if name.startswith(_PREFIXES) or name.startswith("timm/"):
        return True
    if (config := Path(name) / "config.json").is_file():
        try:
            return "pretrained_cfg" in json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{config} is not JSON: {error}") from error
    return "/" not in name and timm.is_model(name)


def load(request: Request) -> Loaded:
    """A timm model with the preprocessing of its pretrained weights."""
    name = request.name
    if Path(name).is_dir():
        name = f"local-dir:{name}"
    elif name.startswith("timm/"):
        name = f"hf-hub:{name}"
    model = _build(name, request)
    names = _class_names(model)
    return Loaded(
        model, "image", Pictures(preprocessing(model)), names, "softmax", {"family": "timm", "name": request.name}
    )


def preprocessing(model: nn.Module) -> Prepare:
    """What timm itself does to pictures for this model, following its `pretrained_cfg` if it has one."""
    config: dict[str, Any] = resolve_model_data_config(model)
    channels, *size = config["input_size"]
    mean, std = tuple(map(float, config["mean"])), tuple(map(float, config["std"]))
    scaled = [math.floor(x / config["crop_pct"]) for x in size]
    mode = config["crop_mode"]
    if channels in (1, 3) and len(mean) == channels and (mode == "squash" or (mode == "center" and scaled[0] == scaled[1])):
        resize = (scaled[0], scaled[1]) if mode == "squash" else scaled[0]
        return Preprocessing(resize, (size[0], size[1]), config["interpolation"].upper(), mean, std)
    return Wrapped(create_transform(**config, is_training=False), mean, std)


def _build(name: str, request: Request) -> nn.Module:
    if request.random:
        return _architecture(name)
    if request.weights is None:
        try:
            return timm.create_model(name, pretrained=True)
        except Exception as error:  # no network, no such weights, a broken cache: whatever the hub's client raises
            said = first_line(error)
            raise InputError(f"no pretrained weights for {request.name!r} ({said}); pass --weights FILE") from error
    found = state.read(request.weights)
    plain = _architecture(name)
    config: Any = plain.pretrained_cfg
    head = config.get("classifier")
    head = head[0] if isinstance(head, (list, tuple)) else head
    count = len(found[f"{head}.weight"]) if f"{head}.weight" in found else None
    model = plain if count in (None, plain.num_classes) else _architecture(name, num_classes=count)
    state.fill(model, found, request.name)
    return model


def _architecture(name: str, **options: Any) -> nn.Module:
    """Without weights; of a name on the hub the configuration is there."""
    try:
        return timm.create_model(name, pretrained=False, **options)
    except Exception as error:  # as above
        raise InputError(f"timm cannot make {name!r}: {first_line(error)}") from error


def _class_names(model: Any) -> tuple[str, ...]:
    count = model.num_classes
    labels = model.pretrained_cfg.get("label_names") or ()
    if len(labels) == count:
        return tuple(map(str, labels))
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        if info.num_classes() == count:
            return tuple(info.index_to_description(i) for i in range(count))
    return tuple(map(str, range(count)))
