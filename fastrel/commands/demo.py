"""`fastrel demo`: the embedded model explained on the shipped samples."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastrel import Explainer
from fastrel.demo import CLASSES, load_model, sample_paths, to_input
from fastrel.demo.score import score_table
from fastrel.render.overlay import as_picture, side_by_side

_SHOWN_SIZE = 256


def run(options: argparse.Namespace) -> int:
    """Explain each sample for the two classes the model is surest of, or print the score table."""
    model = load_model()
    if options.score:
        print(score_table(model))
        return 0
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    explainer = Explainer(model)
    for path in sample_paths():
        with Image.open(path) as file:
            scene = np.asarray(file.convert("L"))
        prediction = explainer.predict(to_input(scene[None]))
        classes = prediction.logits[0].topk(2).indices.tolist()
        explanation = prediction.explain([classes])
        names = [CLASSES[c] for c in classes]
        chances = torch.sigmoid(prediction.logits[0, classes]).tolist()
        picture = as_picture(scene).resize((_SHOWN_SIZE, _SHOWN_SIZE), Image.Resampling.NEAREST)
        maps = list(explanation.heatmap(_SHOWN_SIZE)[0])
        target = out / path.name
        side_by_side(picture, maps, names).save(target)
        described = ", ".join(f"{name} ({chance:.0%})" for name, chance in zip(names, chances, strict=True))
        print(f"{target}: {described}")
    return 0
