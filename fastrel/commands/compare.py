"""`fastrel compare`: one picture, several methods, a row per class."""

import argparse
from pathlib import Path

from PIL import Image

from fastrel import Explainer
from fastrel.commands.images import class_index, load
from fastrel.render.overlay import table

DEFAULT = ("transformer_attribution", "attention_gradcam", "partial_lrp", "rollout", "raw_attention")
_SHOWN_SIZE = 224


def run(options: argparse.Namespace) -> int:
    """Write the figure."""
    vision = load(options.model, options.weights)
    with Image.open(options.image) as file:
        x = vision.preprocess(file.convert("RGB"))
    first = Explainer(vision.model, options.methods[0], rules=options.rules)
    explainers = [first, *(first.using(name, rules=options.rules) for name in options.methods[1:])]
    predictions = [explainer.predict(x[None]) for explainer in explainers]
    logits = predictions[0].logits[0]
    if options.target is None:
        classes = logits.topk(min(2, len(logits))).indices.tolist()
    else:
        classes = [class_index(target, vision.names) for target in options.target]
    picture = vision.shown(x)
    if picture.width < _SHOWN_SIZE:
        picture = picture.resize((_SHOWN_SIZE, _SHOWN_SIZE), Image.Resampling.NEAREST)
    maps = [prediction.explain([classes]).heatmap((picture.height, picture.width))[0] for prediction in predictions]
    names = [f"{vision.names[c]} ({logits[c]:.1f})" for c in classes]
    figure = table(picture, [[m[i] for m in maps] for i in range(len(classes))], ["input", *options.methods], names)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    figure.save(options.out)
    print(f"-> {options.out}: {', '.join(names)}")
    return 0
