"""torchvision: `torchvision/NAME`, and its own names where timm has no model of that name."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn

from fastrel.data.preprocessing import Prepare, Preprocessing, Wrapped
from fastrel.errors import InputError, first_line
from fastrel.models import state
from fastrel.models.loaded import Loaded
from fastrel.models.readers import Pictures
from fastrel.models.request import Request

_PREFIX = "torchvision/"


def claims(name: str) -> bool:
    """A classifier that torchvision has."""
    if name.startswith(_PREFIX):
        return True
    if "/" in name or find_spec("torchvision") is None:
        return False
    from torchvision import models

    return name in models.list_models(models)


def load(request: Request) -> Loaded:
    """A torchvision classifier with the preprocessing of its default weights."""
    name = request.name.removeprefix(_PREFIX)
    try:
        from torchvision import models
    except ImportError as error:
        raise InputError(f"{request.name!r} needs torchvision: pip install torchvision") from error
    if name not in models.list_models(models):
        raise InputError(f"torchvision has no classifier {name!r}; torchvision.models.list_models() lists names")
    weights: Any = models.get_model_weights(name).DEFAULT
    names = tuple(weights.meta["categories"])
    model, names = _build(models, name, weights, names, request)
    source = {"family": "torchvision", "name": name}
    return Loaded(model, "image", Pictures(_preprocessing(weights.transforms())), names, "softmax", source)


def _build(models: Any, name: str, weights: Any, names: tuple[str, ...], request: Request) -> tuple[nn.Module, tuple]:
    if request.random:
        return models.get_model(name, weights=None), names
    if request.weights is None:
        try:
            return models.get_model(name, weights=weights), names
        except Exception as error:  # no network, a broken cache: whatever the download raises
            said = first_line(error)
            raise InputError(f"no pretrained weights for {request.name!r} ({said}); pass --weights FILE") from error
    found = state.read(request.weights)
    head = [value for key, value in found.items() if key.endswith(".weight") and value.dim() == 2][-1:]
    count = len(head[0]) if head else len(names)
    model = models.get_model(name, weights=None, num_classes=count)
    state.fill(model, found, request.name)
    return model, names if count == len(names) else tuple(map(str, range(count)))


def _preprocessing(transform: Any) -> Prepare:
    """torchvision's `ImageClassification` preset as numbers."""
    try:
        (resize,), (crop,) = transform.resize_size, transform.crop_size
        resample, mean, std = transform.interpolation.name, tuple(transform.mean), tuple(transform.std)
    except (AttributeError, ValueError):
        return Wrapped(transform)
    return Preprocessing(resize, (crop, crop), resample, mean, std)
