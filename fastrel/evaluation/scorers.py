"""From items and their maps to numbers: one function per `--metric`, each giving several metrics by name.

A scorer takes the items of a batch, of one grid and size, and their maps as the subject's `explain` gives them: for each item
"label" and, for pictures, "predicted". It may raise for one of them: then they are scored one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrel import metrics
from fastrel.data import ImageItem, TextItem
from fastrel.errors import InputError
from fastrel.evaluation.subjects import ImageMap, ImageSubject, TextSubject
from fastrel.metrics.perturbation import FRACTIONS

Values = dict[str, float]

#: The maps of an item by the name of the class that they explain.
Maps = dict[str, Any]

#: Words chosen for token F1, as in Chefer et al., figure 6.
TOP_WORDS = tuple(range(10, 90, 10))
#: Shares of the words removed or kept for sufficiency and comprehensiveness, ERASER's bins.
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
#: Shares of the patches in the sets of sensitivity-n, which is their mean.
SET_SHARES = (0.02, 0.1, 0.3, 0.5, 0.7)


def _masks(subject: ImageSubject, items: Sequence[ImageItem], maps: Sequence[Maps]) -> Tensor:
    return torch.stack([_mask(subject, item, found["label"].size) for item, found in zip(items, maps, strict=True)])


def _mask(subject: ImageSubject, item: ImageItem, size: tuple[int, int]) -> Tensor:
    mask = subject.mask(item, size)
    if mask is None:
        raise InputError(f"{item.name} has no mask, which this metric needs")
    if not mask.any():
        raise InputError(f"{item.name}: nothing of the object is left in what the model sees of the picture")
    return mask


def pointing(subject: ImageSubject, items: Sequence[ImageItem], maps: Sequence[Maps]) -> list[Values]:
    """Pointing game, and the share of positive relevance inside the mask."""
    masks, heats = _masks(subject, items, maps), _heats(maps)
    hits, energy = metrics.pointing_game(heats, masks), metrics.energy_inside(heats, masks)
    return [{"pointing": float(hit), "energy inside": float(inside)} for hit, inside in zip(hits, energy, strict=True)]


def segmentation(subject: ImageSubject, items: Sequence[ImageItem], maps: Sequence[Maps]) -> list[Values]:
    """Pixel accuracy, mean average precision and mean IoU of the map cut at its mean."""
    scores = metrics.segmentation(_heats(maps), _masks(subject, items, maps))
    return [
        {"pixel accuracy": float(accuracy), "mAP": float(precision), "mIoU": float(iou)}
        for accuracy, precision, iou in zip(scores.pixel_accuracy, scores.mean_ap, scores.mean_iou, strict=True)
    ]


def _heats(maps: Sequence[Maps]) -> Tensor:
    return torch.stack([found["label"].heat for found in maps])


def perturbation(
    subject: ImageSubject, items: Sequence[ImageItem], maps: Sequence[Maps], baseline: str = "black"
) -> list[Values]:
    """AUC of positive and negative perturbation, of the predicted class and of the label, and the curves' points."""
    values = _curves(subject, [found["predicted"] for found in maps], "predicted", baseline)
    wrong = [i for i, item in enumerate(items) if item.classes and maps[i]["predicted"].predicted not in item.classes]
    labelled = dict(zip(wrong, _curves(subject, [maps[i]["label"] for i in wrong], "label", baseline), strict=True))
    for i, item in enumerate(items):
        if item.classes:
            as_label = {name.replace(" predicted", " label", 1): value for name, value in values[i].items()}
            values[i] |= labelled.get(i, as_label)
    return values


def _curves(subject: ImageSubject, found: Sequence[ImageMap], name: str, baseline: str) -> list[Values]:
    values: list[Values] = [{} for _ in found]
    if not found:
        return values
    x, heat, target = _predicted(subject, found)
    filled = {
        "black": lambda: -subject.mean / subject.std,
        "mean": lambda: subject.mean * 0,
        "blur": lambda: metrics.blurred(x),
    }
    baseline_pixels = filled[baseline]().to(x.device)
    for order in ("positive", "negative"):
        curve = metrics.perturb(subject.logits, x, heat, target, order=order, baseline=baseline_pixels)
        for i, own in enumerate(values):
            one = metrics.Curve(curve.fractions, curve.correct[:, i : i + 1])
            own[f"{order} {name} ({baseline})"] = one.auc
            for fraction, correct in zip(FRACTIONS, one.accuracy, strict=True):
                own[f"{order} {name} ({baseline}) at {fraction:.1f}"] = float(correct)
    return values


def perturbation_mean(subject: ImageSubject, items: Sequence[ImageItem], maps: Sequence[Maps]) -> list[Values]:
    """The same with the mean colour instead of black."""
    return perturbation(subject, items, maps, "mean")


def perturbation_blur(subject: ImageSubject, items: Sequence[ImageItem], maps: Sequence[Maps]) -> list[Values]:
    """The same with a blurred picture instead of black."""
    return perturbation(subject, items, maps, "blur")


def insertion(subject: ImageSubject, items: Sequence[ImageItem], maps: Sequence[Maps]) -> list[Values]:
    """Area under the probability of the predicted class: pixels that come into a blurred picture, and that go to the mean colour."""
    x, heat, target = _predicted(subject, [found["predicted"] for found in maps])
    inserted = metrics.insertion(subject.logits, x, heat, target)
    deleted = metrics.deletion(subject.logits, x, heat, target)
    return [{"insertion": float(i), "deletion": float(d)} for i, d in zip(inserted, deleted, strict=True)]


def road(subject: ImageSubject, items: Sequence[ImageItem], maps: Sequence[Maps]) -> list[Values]:
    """Probability of the predicted class, mean over fractions, as pixels go that are filled from their neighbours."""
    x, heat, target = _predicted(subject, [found["predicted"] for found in maps])
    both = [metrics.road(subject.logits, x, heat, target, order=order).mean(0) for order in ("positive", "negative")]
    return [{"positive ROAD": float(most), "negative ROAD": float(least)} for most, least in zip(*both, strict=True)]


def sensitivity(subject: ImageSubject, items: Sequence[ImageItem], maps: Sequence[Maps]) -> list[Values]:
    """Correlation of the relevance of sets of patches with what the predicted class' logit loses without them (mean colour)."""
    x, heat, target = _predicted(subject, [found["predicted"] for found in maps])
    patches = heat.shape[1] * heat.shape[2]
    sizes = sorted({max(1, min(patches - 1, round(patches * share))) for share in SET_SHARES})
    found = metrics.sensitivity_n(subject.logits, x, heat, target, sizes=sizes)
    return [{"sensitivity-n": float(own.mean())} for own in found]


def _predicted(subject: ImageSubject, found: Sequence[ImageMap]) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, maps and the classes that these explain, on the model's device."""
    x, heat = (torch.stack(tensors) for tensors in zip(*((one.x, one.heat) for one in found), strict=True))
    target = torch.tensor([one.explained for one in found])
    return x.to(subject.loaded.device), heat.to(subject.loaded.device), target.to(subject.loaded.device)


def rationale(subject: TextSubject, items: Sequence[TextItem], maps: Sequence[Maps]) -> list[Values]:
    """Agreement with the words that people marked."""
    return [_rationale(item, found["label"].words) for item, found in zip(items, maps, strict=True)]


def _rationale(item: TextItem, words: np.ndarray) -> Values:
    chosen = metrics.top_tokens(words, int(item.rationale.sum()))
    values = {
        "average precision": metrics.average_precision(words, item.rationale),
        "IoU F1": metrics.iou_f1(metrics.spans(chosen), metrics.spans(item.rationale)),
    }
    for k in TOP_WORDS:
        if k < len(words):
            values[f"token F1 at {k}"] = metrics.token_f1(words, item.rationale, k)
    return values


def faithfulness(subject: TextSubject, items: Sequence[TextItem], maps: Sequence[Maps]) -> list[Values]:
    """Comprehensiveness and sufficiency, ERASER's AOPC over its bins."""
    return [_faithfulness(subject, item, found["label"].words) for item, found in zip(items, maps, strict=True)]


def _faithfulness(subject: TextSubject, item: TextItem, words: np.ndarray) -> Values:
    ks = sorted({max(1, int(np.ceil(share * len(words)))) for share in SHARES})
    chosen = [metrics.top_tokens(words, k) for k in ks]
    kept = [np.ones(len(words), bool), *chosen, *(~own for own in chosen)]
    known = {own.tobytes(): p for own, p in zip(kept, subject.probabilities(item, kept), strict=True)}
    probability = lambda own: known[own.tobytes()]  # noqa: E731
    return {
        "comprehensiveness": metrics.comprehensiveness(probability, words, ks),
        "sufficiency": metrics.sufficiency(probability, words, ks),
    }


IMAGE_SCORERS: dict[str, Callable[..., list[Values]]] = {
    "pointing": pointing,
    "segmentation": segmentation,
    "perturbation": perturbation,
    "perturbation-mean": perturbation_mean,
    "perturbation-blur": perturbation_blur,
    "insertion": insertion,
    "road": road,
    "sensitivity": sensitivity,
}
TEXT_SCORERS: dict[str, Callable[..., list[Values]]] = {"rationale": rationale, "faithfulness": faithfulness}


def needs_predicted(names: Iterable[str]) -> bool:
    """Whether one of these scorers asks for the map of the predicted class beside that of the label."""
    return any(name.startswith(("perturbation", "insertion", "road", "sensitivity")) for name in names)


def lower_is_better(metric: str) -> bool:
    """Whether small values of a metric are good."""
    return metric.startswith(("positive ", "sufficiency", "deletion"))


def get(kind: Any, name: str) -> Callable[..., list[Values]]:
    """The scorer called `name` for items of a kind.

    Raises:
        InputError: there is none.
    """
    known = IMAGE_SCORERS if kind is ImageItem else TEXT_SCORERS
    if name not in known:
        raise InputError(f"no metric {name!r} for this data; choose from {', '.join(known)}")
    return known[name]
