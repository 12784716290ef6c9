"""The pictures of docs/gallery: `python scripts/gallery.py`.

What ships with fastrel is always drawn. Photographs (CLIP ViT-B/16) and sentences (MiniLM) are where their weights are, as
tests/real_models.py says, and the photographs where scikit-image is installed, which holds them: both are CC0. What cannot be drawn
keeps its old picture.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastrel
from fastrel import demo
from fastrel.render.overlay import table

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "shared" if (ROOT / "shared").is_dir() else ROOT.parent / "shared"))

#: Bytes of a picture at most, and its width.
LARGEST, WIDEST = 100_000, 1000

Draw = Callable[[], Image.Image]


class Missing(Exception):
    """What a picture needs and is not here."""


def write(folder: Path, name: str, picture: Image.Image) -> None:
    """A small file: PNG where few colours are all there is, else JPEG, worse until it fits."""
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    drawn = picture.getcolors(256) is not None
    for quality in (90, 85, 80, 70):
        buffer = io.BytesIO()
        if drawn:
            picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
        else:
            picture.save(buffer, "jpeg", quality=quality, subsampling=0, optimize=True, progressive=True)
        if len(buffer.getvalue()) < LARGEST:
            break
    path = folder / f"{name}.{'png' if drawn else 'jpg'}"
    path.write_bytes(buffer.getvalue())
    print(f"{path.name}: {picture.width} x {picture.height}, {len(buffer.getvalue())} bytes")


def scene(path: Path) -> tuple[torch.Tensor, Image.Image]:
    """A shipped scene as the model takes it and as a person sees it."""
    grey = np.asarray(Image.open(path).convert("L"))
    return demo.to_input(grey[None]), Image.fromarray(grey).convert("RGB").resize((256, 256), Image.Resampling.NEAREST)


def classes() -> Image.Image:
    """Four classes of one scene."""
    x, picture = scene(demo.sample_paths()[3])
    prediction = fastrel.Explainer(demo.load_model()).predict(x)
    chosen = [demo.CLASSES.index(name) for name in ("dress", "bag", "sneaker", "pullover")]
    heats = prediction.explain([chosen]).heatmap(256)[0]
    return table(picture, [list(heats)], ["input", *(demo.CLASSES[c] for c in chosen)], [""])


def contrast() -> Image.Image:
    """A class, another one, and each rather than the other."""
    x, picture = scene(demo.sample_paths()[1])
    prediction = fastrel.Explainer(demo.load_model()).predict(x)
    one, other = "dress", "trousers"
    a, b = (demo.CLASSES.index(name) for name in (one, other))
    targets: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda out: out[:, a],
        lambda out: out[:, b],
        lambda out: out[:, a] - out[:, b],
        lambda out: out[:, b] - out[:, a],
    ]
    heats = [prediction.explain(target).heatmap(256)[0] for target in targets]
    return table(picture, [heats], ["input", one, other, f"{one} rather than {other}", f"{other} rather than {one}"], [""])


def methods() -> Image.Image:
    """Five methods, two classes of one scene; of maps with signs the positive part."""
    names = ("frozen_attribution", "gradient_attention", "attnlrp", "rollout", "raw_attention")
    x, picture = scene(demo.sample_paths()[2])
    explainer = fastrel.Explainer(demo.load_model())
    chosen = [demo.CLASSES.index(name) for name in ("ankle boot", "bag")]
    heats = [explainer.using(name)(x, target=[chosen]).heatmap(256)[0].clamp(min=0) for name in names]
    rows = [[heat[k] for heat in heats] for k in range(len(chosen))]
    return table(picture, rows, ["input", *names], [demo.CLASSES[c] for c in chosen])


def randomised() -> Image.Image:
    """The map of the trained model and that of the same architecture with random weights: they must differ."""
    x, picture = scene(demo.sample_paths()[1])
    torch.manual_seed(0)
    models = {"trained": demo.load_model(), "random weights": demo.build_model()}
    target = demo.CLASSES.index("trousers")
    heats = [fastrel.Explainer(model)(x, target=target).heatmap(256)[0] for model in models.values()]
    return table(picture, [heats], ["input", *models], ["trousers"])


def real_models() -> Any:
    """../shared/models/real_models.py."""
    folder = Path(sys.path[-1]) / "models"
    if not (folder / "real_models.py").is_file():
        raise Missing(f"no {folder / 'real_models.py'}")
    sys.path.insert(0, str(folder))
    import real_models

    return real_models


def photograph(name: str) -> Image.Image:
    """One of scikit-image's, the middle square of 224 pixels: what CLIP sees of it."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise Missing("scikit-image is not installed")
    image = Image.open(Path(found.submodule_search_locations[0]) / "data" / f"{name}.png").convert("RGB")
    scale = 224 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return image.crop((left, top, left + 224, top + 224))


def on_photograph(name: str, chosen: dict[str, int], names: tuple[str, ...]) -> Image.Image:
    """A row per class, a column per method; the last one is the default by the published rules."""
    picture, explainer = photograph(name), fastrel.Explainer(clip())
    x = real_models().clip_preprocess(picture)[None]
    explainers = {one.replace("_", " "): explainer.using(one) for one in names}
    explainers["the paper's method and rules"] = explainer.using("transformer_attribution", rules="official")
    heats = [one(x, target=[list(chosen.values())]).heatmap()[0] for one in explainers.values()]
    return table(picture, [[heat[k] for heat in heats] for k in range(len(chosen))], ["input", *explainers], list(chosen))


def cat() -> Image.Image:
    """CLIP on a cat."""
    return on_photograph(
        "chelsea", {"tabby": 281}, ("frozen_attribution", "gradient_attention", "rollout", "raw_attention")
    )


def coffee() -> Image.Image:
    """CLIP on a cup of coffee and a spoon."""
    return on_photograph(
        "coffee", {"espresso": 967, "wooden spoon": 910}, ("frozen_attribution", "gradient_attention", "rollout")
    )


def sentence() -> Image.Image:
    """MiniLM on a review that has both sides."""
    try:
        model, tokenizer = real_models().minilm_sst2()
    except FileNotFoundError as error:
        raise Missing(str(error)) from error
    batch = tokenizer(["the story is thin, but the acting is wonderful"], return_tensors="pt")
    prediction = fastrel.Explainer(model).predict(**batch)
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    drawn = [
        prediction.explain(c)[0].picture(tokens=tokens, names=[name]) for c, name in enumerate(("negative", "positive"))
    ]
    both = Image.new("RGB", (sum(one.width + 20 for one in drawn), drawn[0].height), "white")
    for i, one in enumerate(drawn):
        both.paste(one, (i * (one.width + 20), 0))
    return both


@functools.cache
def clip() -> Any:
    """CLIP ViT-B/16 with a zero-shot head over ImageNet's classes."""
    try:
        return real_models().clip_imagenet()
    except FileNotFoundError as error:
        raise Missing(str(error)) from error


PICTURES: dict[str, Draw] = {
    "classes": classes,
    "contrast": contrast,
    "methods": methods,
    "randomised": randomised,
    "cat": cat,
    "coffee": coffee,
    "sentence": sentence,
}


def main() -> int:
    """Draw all of them, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(PICTURES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gallery", metavar="DIR")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        try:
            write(options.out, name, PICTURES[name]())
        except Missing as error:
            print(f"{name}: not drawn, {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
