"""The model that ships with fastrel."""

from __future__ import annotations

from fastrel import demo
from fastrel.data.preprocessing import Preprocessing
from fastrel.errors import InputError
from fastrel.models.loaded import Loaded
from fastrel.models.readers import Pictures
from fastrel.models.request import Request


def claims(name: str) -> bool:
    """No name at all."""
    return not name


def load(request: Request) -> Loaded:
    """The embedded model; its ten classes are independent of one another."""
    if request.weights or request.random:
        raise InputError("other weights need a model's name: the architecture that they are for")
    prepare = Preprocessing((demo.SIZE, demo.SIZE), mean=(demo.MEAN,) * 3, std=(demo.STD,) * 3)
    return Loaded(demo.load_model(), "image", Pictures(prepare), demo.CLASSES, "sigmoid", {"family": "embedded"})
