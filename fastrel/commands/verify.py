"""`fastrel verify`: is the explanation of this model right?"""

from __future__ import annotations

import argparse

import numpy as np
from torch import Tensor

from fastrel.commands import options as shared
from fastrel.data import pictures
from fastrel.errors import InputError
from fastrel.models import Loaded, Sample
from fastrel.models.matching import score_of
from fastrel.options import RULES

HELP = "check on a model of yours that its explanations are right; exit code 1 if not"
EPILOG = """\
examples:
  fastrel verify --model swin_tiny_patch4_window7_224 --random
  fastrel verify --model ./my-bert --text "not bad at all"
  fastrel verify --model ./my-nli --text "A man sleeps." --text-pair "Nobody sleeps."
  fastrel verify --model ./my-clip --image cat.jpg --text "a photo of a cat"
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--random", action="store_true", help="random weights: nothing is loaded but the architecture")
    parser.add_argument("--image", metavar="FILE", help="a picture to check on (default: noise)")
    parser.add_argument("--text", help="a text to check a model of texts on")
    parser.add_argument("--text-pair", metavar="TEXT", help="a second text, which the model reads together with --text")
    parser.add_argument("--rules", choices=RULES, default="positive", help="(default: %(default)s)")
    parser.add_argument("--start-layer", type=int, metavar="N", help="first block of the chain (default: 0)")
    shared.model(parser)
    shared.explaining(parser, several=False)


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 if a check fails."""
    settings = shared.settings(options, random=options.random)
    loaded = settings.load(pairs=options.text is not None)
    args, kwargs = _samples(options, loaded)
    explainer = settings.explainer(loaded)
    target = None
    if loaded.kind == "multimodal":
        _, target = score_of(explainer.predict(*args, **kwargs).output)
    report = explainer.verify(*args, target=target, **kwargs)
    print(report)
    return 0 if report.ok else 1


def _samples(options: argparse.Namespace, loaded: Loaded) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Two of them, as arguments of the model."""
    samples: list[Sample]
    if loaded.kind == "image":
        if options.text is not None:
            name = options.model or "the embedded model"
            raise InputError(f"{name} is a model of pictures; give --image or nothing, not --text")
        image = pictures.noise() if options.image is None else pictures.read(options.image).image
        (one,) = loaded.reader(image)
        samples = [one, {name: np.ascontiguousarray(x[..., ::-1]) for name, x in one.items()}]
    elif options.text is None:
        raise InputError(f"{options.model!r} is a model of texts: give --text")
    elif loaded.kind == "multimodal":
        image = pictures.noise() if options.image is None else pictures.read(options.image).image
        samples = loaded.reader((image, options.text)) * 2
    elif options.text_pair is not None and loaded.kind != "text":
        raise InputError(f"--text-pair: {options.model!r} is no classifier of texts; give it --text alone")
    else:
        samples = [loaded.reader(options.text if options.text_pair is None else (options.text, options.text_pair))[0]] * 2
    return loaded.arguments(loaded.inputs(samples))
