"""`fastrel compare`: one picture, several methods, a row per class."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from fastrel.batch.settings import count_of_highest
from fastrel.commands import options as shared
from fastrel.data import files, pictures
from fastrel.data.preprocessing import shown
from fastrel.errors import InputError
from fastrel.options import RULES
from fastrel.render.overlay import table

HELP = "one picture, several methods, a row per class"
EPILOG = """\
example:
  fastrel compare cat-and-dog.jpg --model vit_base_patch16_224 --target 281 207 --out compare.png
"""
DEFAULT = ("frozen_attribution", "transformer_attribution", "attention_gradcam", "partial_lrp", "rollout", "raw_attention")
_SHOWN_SIZE = 224


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", default=list(DEFAULT), help="default: %(default)s")
    parser.add_argument("--rules", default="positive", choices=RULES, help="default: %(default)s")
    parser.add_argument(
        "--target", nargs="+", metavar="CLASS", help="class numbers or names, or topK; default: the top two"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the figure, for instance compare.png")
    shared.model(parser)
    shared.explaining(parser, several=False)


def run(options: argparse.Namespace) -> int:
    """Write the figure."""
    out = Path(options.out)
    if out.exists() and out.samefile(options.image):
        raise InputError(f"--out {options.out!r} is the picture itself")
    if out.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"--out {options.out!r} must end like a picture, compare.png for instance")
    settings = shared.settings(options, method=options.methods[0])
    loaded = settings.load()
    if loaded.kind != "image":
        raise InputError(f"{options.model!r} is a model of {loaded.kind}; compare needs one of pictures")
    (sample,) = loaded.reader(pictures.read(options.image).image)
    args, kwargs = loaded.arguments(loaded.inputs([sample]))
    first = settings.explainer(loaded)
    explainers = [first, *(first.using(name, rules=options.rules) for name in options.methods[1:])]
    predictions = [explainer.predict(*args, **kwargs) for explainer in explainers]
    logits = predictions[0].logits[0]
    highest = 2 if settings.target is None else count_of_highest(settings.target)
    if highest:
        classes = logits.topk(min(highest, len(logits))).indices.tolist()
    else:
        classes = [loaded.class_index(word) for word in settings.target or ()]
    (x,) = sample.values()
    picture = shown(x, loaded.reader.prepare.mean, loaded.reader.prepare.std)
    if picture.width < _SHOWN_SIZE:
        picture = picture.resize((_SHOWN_SIZE, _SHOWN_SIZE), Image.Resampling.NEAREST)
    maps = [prediction.explain([classes]).heatmap((picture.height, picture.width))[0] for prediction in predictions]
    names = [f"{loaded.class_names[c]} ({logits[c]:.1f})" for c in classes]
    figure = table(picture, [[m[i] for m in maps] for i in range(len(classes))], ["input", *options.methods], names)
    buffer = io.BytesIO()
    figure.save(buffer, Image.registered_extensions()[out.suffix.lower()])
    files.folder(out.parent)
    files.write(out, buffer.getvalue())
    print(f"-> {options.out}: {', '.join(names)}")
    return 0
