"""`fastrel verify`: is the explanation of this model right?"""

import argparse
from typing import Any

import torch

from fastrel import Explainer
from fastrel.commands import images, text
from fastrel.errors import InputError


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 if a check fails."""
    model, given = _subject(options)
    report = Explainer(model, rules=options.rules, start_layer=options.start_layer).verify(**given)
    print(report)
    return 0 if report.ok else 1


def _subject(options: argparse.Namespace) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model and two samples."""
    if options.text is not None:
        if not options.model:
            raise InputError("--text needs --model, the name or folder of a Hugging Face classifier")
        model, tokenizer = text.load(options.model)
        return model, dict(tokenizer([options.text] * 2, return_tensors="pt", truncation=True))
    if options.random:
        import timm

        if options.model not in timm.list_models(options.model or ""):
            raise InputError(
                f"--random needs the name of a timm model, not {options.model!r}; `timm.list_models()` lists them"
            )
        torch.manual_seed(0)
        model = timm.create_model(options.model).eval()
        size: Any = model.pretrained_cfg
        return model, {"x": torch.randn(2, *size["input_size"])}
    vision = images.load(options.model, options.weights)
    if options.image is None:
        size = vision.preprocess(images.Image.new("RGB", (256, 256))).shape
        torch.manual_seed(0)
        return vision.model, {"x": torch.randn(2, *size)}
    try:
        picture = images.Image.open(options.image).convert("RGB")
    except OSError as error:
        raise InputError(f"cannot read the picture {options.image!r}: {error}") from error
    x = vision.preprocess(picture)
    return vision.model, {"x": torch.stack([x, x.flip(-1)])}
