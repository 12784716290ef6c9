"""`fastrel verify`: is the explanation of this model right?"""

from __future__ import annotations

import argparse

import numpy as np
from torch import Tensor

from fastrel.commands import options as shared
from fastrel.data import pictures
from fastrel.errors import InputError
from fastrel.models import Loaded, Sample
from fastrel.options import RULES

HELP = "check on a model of yours that its explanations are right; exit code 1 if not"
EPILOG = """\
examples:
  fastrel verify --model swin_tiny_patch4_window7_224 --random
  fastrel verify --model ./my-bert --text "not bad at all"
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--random", action="store_true", help="random weights: nothing is loaded but the architecture")
    parser.add_argument("--image", metavar="FILE", help="a picture to check on (default: noise)")
    parser.add_argument("--text", help="a text to check a model of texts on")
    parser.add_argument("--rules", choices=RULES, default="positive", help="(default: %(default)s)")
    parser.add_argument("--start-layer", type=int, metavar="N", help="first block of the chain (default: 0)")
    shared.model(parser)
    shared.explaining(parser, several=False)


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 if a check fails."""
    settings = shared.settings(options, random=options.random)
    loaded = settings.load()
    args, kwargs = _samples(options, loaded)
    report = settings.explainer(loaded).verify(*args, **kwargs)
    print(report)
    return 0 if report.ok else 1


def _samples(options: argparse.Namespace, loaded: Loaded) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Two of them, as arguments of the model."""
    samples: list[Sample]
    if loaded.kind == "image":
        if options.text is not None:
            raise InputError(f"{options.model!r} is a model of pictures; give --image or nothing, not --text")
        image = pictures.noise() if options.image is None else pictures.read(options.image).image
        (one,) = loaded.reader(image)
        samples = [one, {name: np.ascontiguousarray(x[..., ::-1]) for name, x in one.items()}]
    elif options.text is None or loaded.kind == "multimodal":
        raise InputError(f"{options.model!r} is a model of texts: give --text")
    else:
        samples = [loaded.reader(options.text)[0]] * 2
    return loaded.arguments(loaded.inputs(samples))
