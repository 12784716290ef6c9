"""`fastrel explain PICTURE --text TEXT`: a picture and a text that a model reads together, both maps on one page or picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrel.commands import options as shared
from fastrel.data import files, pictures
from fastrel.data.preprocessing import shown
from fastrel.errors import InputError

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
    if options.target:
        raise InputError(f"--target {' '.join(options.target)}: of a picture and a text, how well they fit is explained")
    reader: Any = loaded.reader
    samples = reader((pictures.read(options.inputs[0]).image, options.text))
    given = loaded.inputs(samples)
    prediction = settings.explainer(loaded).predict(**given)
    name, score = _score(prediction.output)
    (explanation,) = prediction.explain(score)
    processor = reader.processor.image_processor
    seen = shown(samples[0]["pixel_values"], processor.image_mean, processor.image_std)
    tokens = reader.processor.tokenizer.convert_ids_to_tokens(samples[0]["input_ids"].tolist())
    value = float(score(prediction.output)[0])
    files.folder(out.parent)
    explanation.save(out, image=seen, tokens=tokens, names=[f"{name} {value:.2f}"], style=options.style)
    sums = {key: float(one.relevance.float().abs().sum()) for key, one in explanation.maps.items()}
    total = sum(sums.values()) or 1.0
    print(f"{name} of {options.inputs[0]} and {options.text!r}: {value:.2f}")
    print("relevance: " + ", ".join(f"{key} {x / total:.0%}" for key, x in sums.items()))
    print(f"-> {out}")
    return 0


def _score(output: Any) -> tuple[str, Callable[[Any], Tensor]]:
    """How well each picture and its text fit, and what that is called."""
    if getattr(output, "logits_per_image", None) is not None:
        return "similarity", lambda out: out.logits_per_image.diagonal()
    for name in ("itm_score", "logits"):
        found = getattr(output, name, None)
        if isinstance(found, torch.Tensor) and found.dim() == 2 and found.shape[1] == 2:
            return "match", lambda out, name=name: getattr(out, name)[:, 1] - getattr(out, name)[:, 0]
    raise InputError(
        f"{type(output).__name__} holds neither logits_per_image nor scores [B, 2] of a match; explain it in Python: "
        "fastrel.Explainer(model)(**inputs, target=lambda out: …)"
    )
