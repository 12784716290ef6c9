"""Explaining picture files with a timm model."""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from fastrel import Explainer, Explanation
from fastrel.errors import InputError
from fastrel.explanation import NOISY
from fastrel.render.overlay import STYLES, as_picture

Failures = list[tuple[str, str]]


@dataclass(frozen=True)
class Vision:
    """A model with its preprocessing and the names of its classes."""

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]  # -> [3, H, W]
    mean: Tensor  # [3, 1, 1]
    std: Tensor
    names: list[str]

    def shown(self, x: Tensor) -> Image.Image:
        """The picture as the model saw it, resized and cropped."""
        return as_picture((x * self.std + self.mean).clamp(0, 1))


def run(options: argparse.Namespace) -> Failures:
    """Explain every readable picture; returns those that were not, each with the reason."""
    from tqdm import tqdm

    vision = load(options.model, options.weights)
    targets = None if options.target is None else [class_index(t, vision.names) for t in options.target]
    explainer = build_explainer(vision.model, options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    failures: Failures = []
    stems = unique_stems(options.images)
    progress = tqdm(total=len(options.images), unit="image", disable=len(options.images) < 2)
    with progress:
        for paths, batch in batches(options.images, vision.preprocess, max(1, options.batch_size), failures, progress):
            prediction = explainer.predict(batch)
            classes = prediction.logits.argmax(1, keepdim=True) if targets is None else torch.tensor([targets] * len(batch))
            explanation = prediction.explain(classes)
            if options.rules == "official":
                progress.write(_noise(explanation))
            for i, path in enumerate(paths):
                written = write(explanation[i], vision, batch[i], out / stems[path], options.npz, options.style)
                progress.write(report(path, explanation.logits[i], vision.names, written))
            progress.update(len(paths))
    return failures


def _noise(explanation: Explanation) -> str:
    """What is to be said about maps of rules that depend on rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        floor = float(explanation.noise_floor(1).max())
    verdict = "more than 1 %: rounding shows in them" if floor > NOISY else "below 1 %"
    return f"noise floor of these maps under the official rules: {floor:.1%}, {verdict}"


def build_explainer(model: nn.Module, options: argparse.Namespace) -> Explainer:
    """The explainer that the options of `fastrel explain` ask for."""
    return Explainer(
        model, options.method, rules=options.rules, start_layer=options.start_layer, normalize_rollout=options.normalize
    )


def load(name: str | None, weights: str | None) -> Vision:
    """The model called `name` (default: the embedded one), with timm's own preprocessing for it.

    MODULE:FUNCTION is a function that returns a model; timm's preprocessing follows its `pretrained_cfg` if it has one.

    Raises:
        InputError: there is no such model, or its weights cannot be had.
    """
    if name is None:
        return _embedded(weights)
    import timm

    if ":" in name:
        model = from_function(name, nn.Module).eval()
    elif timm.is_model(name):
        model = _with_weights(name, weights) if weights else _pretrained(name)
    else:
        raise InputError(f"timm knows no model {name!r}; timm.list_models('*vit*') lists names")
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    mean, std = (torch.tensor(config[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    count = getattr(model, "num_classes", 0)
    names = [str(i) for i in range(count)]
    if count == 1000:
        info = timm.data.ImageNetInfo()
        names = [info.index_to_description(i) for i in range(count)]
    return Vision(model.eval(), transform, mean, std, names)


def from_function(name: str, kind: type[Any]) -> Any:
    """What the function at MODULE:FUNCTION returns.

    Raises:
        InputError: there is no such function, it fails, or it returns something other than `kind`.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)()
    except Exception as error:
        raise InputError(f"cannot load {name!r}: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise InputError(f"{name} returned {type(found).__name__}, not {kind.__name__}")
    return found


def _embedded(weights: str | None) -> Vision:
    from fastrel import demo

    if weights:
        raise InputError("--weights needs --model, the timm name of the architecture")

    def preprocess(picture: Image.Image) -> Tensor:
        return demo.to_input(np.asarray(picture.convert("RGB").resize((demo.SIZE, demo.SIZE)))[None])[0]

    mean, std = (torch.full((3, 1, 1), value) for value in (demo.MEAN, demo.STD))
    return Vision(demo.load_model(), preprocess, mean, std, list(demo.CLASSES))


def _pretrained(name: str) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:
        raise InputError(f"no pretrained weights for {name!r} ({error}); pass --weights FILE") from error


def _with_weights(name: str, weights: str) -> nn.Module:
    import timm
    from timm.models import load_state_dict

    if not Path(weights).is_file():
        raise InputError(f"no weights file {weights!r}")
    try:
        state = load_state_dict(weights)
        config: Any = timm.create_model(name).default_cfg
        head = config.get("classifier")
        head = head[0] if isinstance(head, (list, tuple)) else head
        count = len(state[f"{head}.weight"]) if f"{head}.weight" in state else 1000
        model = timm.create_model(name, num_classes=count)
        model.load_state_dict(state)
    except Exception as error:
        raise InputError(f"the weights in {weights!r} do not fit {name!r}: {error}") from error
    return model


def class_index(target: str, names: list[str]) -> int:
    """A class given by number, by name or by part of a name.

    Raises:
        InputError: out of range, no such name, or several that fit.
    """
    if target.lstrip("-").isdigit():
        if not 0 <= int(target) < len(names):
            raise InputError(f"target {target} is out of range: the model has {len(names)} classes, 0 to {len(names) - 1}")
        return int(target)
    wanted = target.lower()
    exact = [i for i, name in enumerate(names) if wanted in [part.strip().lower() for part in name.split(",")]]
    found = exact or [i for i, name in enumerate(names) if wanted in name.lower()]
    if len(found) != 1:
        several = ", ".join(f"{i} ({names[i]})" for i in found[:5])
        raise InputError(f"target {target!r} fits {len(found)} classes{': ' + several if found else ''}; give its number")
    return found[0]


def batches(
    paths: list[str], preprocess: Callable[[Image.Image], Tensor], size: int, failures: Failures, progress: object
) -> Iterator[tuple[list[str], Tensor]]:
    """Readable pictures in batches [B, 3, H, W]; the others are added to `failures`."""
    ready: list[tuple[str, Tensor]] = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                ready.append((path, preprocess(picture.convert("RGB"))))
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
            failures.append((path, " ".join(str(error).split())))
            progress.update(1)  # type: ignore[attr-defined]
        if len(ready) == size:
            yield [p for p, _ in ready], torch.stack([x for _, x in ready])
            ready = []
    if ready:
        yield [p for p, _ in ready], torch.stack([x for _, x in ready])


def unique_stems(paths: list[str]) -> dict[str, str]:
    """A name for each picture's output files; pictures of the same name in different folders get a number."""
    stems: dict[str, str] = {}
    used: set[str] = set()
    for path in paths:
        stem, number = Path(path).stem, 1
        while stem in used:
            number += 1
            stem = f"{Path(path).stem}-{number}"
        used.add(stem)
        stems[path] = stem
    return stems


def write(explanation: Explanation, vision: Vision, x: Tensor, stem: Path, npz: bool, style: str) -> list[Path]:
    """One overlay per target, and the raw maps if asked for."""
    picture = vision.shown(x)
    assert explanation.target is not None
    heats = explanation.heatmap((picture.height, picture.width))[0]
    written = []
    for target, heat in zip(explanation.target[0].tolist(), heats, strict=True):
        path = stem.with_name(f"{stem.name}-{target}.png")
        STYLES[style](picture, heat).save(path)
        written.append(path)
    if npz:
        path = stem.with_name(f"{stem.name}.npz")
        np.savez(
            path,
            target=explanation.target[0].numpy(),
            relevance=explanation.relevance[0].numpy(),
            patches=explanation.patches[0].numpy(),
            logits=explanation.logits[0].numpy(),
        )
        written.append(path)
    return written


def report(path: str, logits: Tensor, names: list[str], written: list[Path]) -> str:
    """The top classes of a picture and where its overlays are."""
    top = logits.topk(min(5, len(logits)))
    classes = ", ".join(f"{c} {names[c]} {v:.2f}" for v, c in zip(top.values.tolist(), top.indices.tolist(), strict=True))
    return f"{path}\n  top classes (logits): {classes}\n  -> " + ", ".join(str(p) for p in written)
