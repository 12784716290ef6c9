"""`fastrel explain PICTURE --text TEXT`: a picture and a text that a model reads together, both maps on one page or picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastrel.commands import options as shared
from fastrel.commands.drawing import npz
from fastrel.data import files, pictures
from fastrel.data.preprocessing import shown
from fastrel.errors import InputError
from fastrel.models.matching import score_of

_SUFFIXES = (".html", ".htm", ".png")


def run(options: argparse.Namespace) -> int:
    """Explain why a picture and a text fit (CLIP, SigLIP, retrieval models), with respect to both."""
    settings = shared.settings(options)
    if options.classes:
        raise InputError("--classes makes a classifier of pictures; give it without --text")
    loaded = settings.load(pairs=True)
    if loaded.kind != "multimodal":
        raise InputError(f"give images or --text, not both ({options.inputs[0]!r} was given as an image)")
    out = Path(options.out)
    if out.suffix.lower() not in _SUFFIXES:
        raise InputError(f"with a picture and --text, --out must name an .html or .png file, not {options.out!r}")
    if len(options.inputs) > 1:
        raise InputError(f"--text goes with one picture, and {len(options.inputs)} were given; run it once for each")
    if not options.text.strip():
        raise InputError("--text is empty")
    if options.text_pair is not None:
        raise InputError("--text-pair is for models of two texts; with a picture give --text alone")
    if options.target:
        raise InputError(f"--target {' '.join(options.target)}: of a picture and a text, how well they fit is explained")
    reader: Any = loaded.reader
    samples = reader((pictures.read(options.inputs[0]).image, options.text))
    given = loaded.inputs(samples)
    prediction = settings.explainer(loaded).predict(**given)
    name, score = score_of(prediction.output)
    (explanation,) = prediction.explain(score)
    processor = reader.processor.image_processor
    seen = shown(samples[0]["pixel_values"], processor.image_mean, processor.image_std)
    tokens = reader.processor.tokenizer.convert_ids_to_tokens(samples[0]["input_ids"].tolist())
    value = float(score(prediction.output)[0])
    files.folder(out.parent)
    explanation.save(out, image=seen, tokens=tokens, names=[f"{name} {value:.2f}"], style=options.style)
    if options.npz:
        held: dict[str, Any] = {"score": value}
        held |= {key: one.relevance[0].float().cpu() for key, one in explanation.maps.items()}
        held |= {f"{key}.patches": x.grid[0].float().cpu() for key, x in explanation.maps.items() if x.grid is not None}
        files.write(out.with_suffix(".npz"), npz(held))
    sums = {key: float(one.relevance.float().abs().sum()) for key, one in explanation.maps.items()}
    total = sum(sums.values()) or 1.0
    print(f"{name} of {options.inputs[0]} and {options.text!r}: {value:.2f}")
    print("relevance: " + ", ".join(f"{key} {x / total:.0%}" for key, x in sums.items()))
    print(f"-> {out}")
    return 0
