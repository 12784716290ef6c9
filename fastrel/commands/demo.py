"""`fastrel demo`: the embedded model explained on the shipped samples."""

from __future__ import annotations

import argparse
import io

import numpy as np
import torch
from PIL import Image

from fastrel.commands import options as shared
from fastrel.data import files
from fastrel.demo import CLASSES, sample_paths, to_input
from fastrel.demo.score import score_table
from fastrel.render.overlay import as_picture, side_by_side

HELP = "explain the shipped samples with the embedded model, offline"
EPILOG = ""
_SHOWN_SIZE = 256


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--out", default="fastrel-demo", metavar="DIR", help="where the overlays go (default: %(default)s)")
    parser.add_argument("--score", action="store_true", help="score the maps on held-out scenes instead, as a table")
    shared.device(parser)
    shared.explaining(parser, several=False)


def run(options: argparse.Namespace) -> int:
    """Explain each sample for the two classes the model is surest of, or print the score table."""
    settings = shared.settings(options)
    loaded = settings.load()
    if options.score:
        print(score_table(loaded.model, **{name: getattr(settings, name) for name in ("precision", "backend", "memory")}))
        return 0
    out = files.folder(options.out)
    explainer = settings.explainer(loaded)
    for path in sample_paths():
        with Image.open(path) as file:
            scene = np.asarray(file.convert("L"))
        prediction = explainer.predict(to_input(scene[None]).to(loaded.device))
        classes = prediction.logits[0].topk(2).indices.tolist()
        explanation = prediction.explain([classes])
        names = [CLASSES[c] for c in classes]
        chances = torch.sigmoid(prediction.logits[0, classes]).tolist()
        picture = as_picture(scene).resize((_SHOWN_SIZE, _SHOWN_SIZE), Image.Resampling.NEAREST)
        maps = list(explanation.heatmap(_SHOWN_SIZE)[0])
        buffer = io.BytesIO()
        side_by_side(picture, maps, names).save(buffer, "png")
        files.write(out / path.name, buffer.getvalue())
        described = ", ".join(f"{name} ({chance:.0%})" for name, chance in zip(names, chances, strict=True))
        print(f"{out / path.name}: {described}")
    return 0
