"""From an item and its map to numbers: one function per `--metric`, each giving several metrics by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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

#: The item's map, computed once for all scorers; "predicted" as argument for the predicted class instead of the label.
Explain = Callable[..., Any]

#: Words chosen for token F1, as in Chefer et al., figure 6.
TOP_WORDS = tuple(range(10, 90, 10))
#: Shares of the words removed or kept for sufficiency and comprehensiveness, ERASER's bins.
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)


def _mask(subject: ImageSubject, item: ImageItem) -> Tensor:
    mask = subject.mask(item)
    if mask is None:
        raise InputError(f"{item.name} has no mask, which this metric needs")
    if not mask.any():
        raise InputError(f"{item.name}: nothing of the object is left in what the model sees of the picture")
    return mask


def pointing(subject: ImageSubject, item: ImageItem, explain: Explain) -> Values:
    """Pointing game, and the share of positive relevance inside the mask."""
    mask = _mask(subject, item)[None]
    heat = explain().heat[None]
    return {
        "pointing": float(metrics.pointing_game(heat, mask)[0]),
        "energy inside": float(metrics.energy_inside(heat, mask)[0]),
    }


def segmentation(subject: ImageSubject, item: ImageItem, explain: Explain) -> Values:
    """Pixel accuracy, mean average precision and mean IoU of the map cut at its mean."""
    mask = _mask(subject, item)[None]
    scores = metrics.segmentation(explain().heat[None], mask)
    return {
        "pixel accuracy": float(scores.pixel_accuracy[0]),
        "mAP": float(scores.mean_ap[0]),
        "mIoU": float(scores.mean_iou[0]),
    }


def perturbation(subject: ImageSubject, item: ImageItem, explain: Explain, baseline: str = "black") -> Values:
    """AUC of positive and negative perturbation, of the predicted class and of the label, and the curves' points."""
    filled = -subject.mean / subject.std if baseline == "black" else torch.zeros_like(subject.mean)
    found = explain("predicted")
    values = _curves(subject, found, "predicted", baseline, filled)
    if item.classes:
        labelled = explain() if found.predicted not in item.classes else None
        if labelled is None:
            values |= {name.replace(" predicted", " label", 1): value for name, value in values.items()}
        else:
            values |= _curves(subject, labelled, "label", baseline, filled)
    return values


def _curves(subject: ImageSubject, found: ImageMap, name: str, baseline: str, filled: Tensor) -> Values:
    values = {}
    target = torch.tensor([found.explained])
    for order in ("positive", "negative"):
        curve = metrics.perturb(subject.logits, found.x[None], found.heat[None], target, order=order, baseline=filled)
        values[f"{order} {name} ({baseline})"] = curve.auc
        for fraction, correct in zip(FRACTIONS, curve.accuracy, strict=True):
            values[f"{order} {name} ({baseline}) at {fraction:.1f}"] = float(correct)
    return values


def perturbation_mean(subject: ImageSubject, item: ImageItem, explain: Explain) -> Values:
    """The same with the mean colour instead of black."""
    return perturbation(subject, item, explain, "mean")


def rationale(subject: TextSubject, item: TextItem, explain: Explain) -> Values:
    """Agreement with the words that people marked."""
    words = explain().words
    chosen = metrics.top_tokens(words, int(item.rationale.sum()))
    values = {
        "average precision": metrics.average_precision(words, item.rationale),
        "IoU F1": metrics.iou_f1(metrics.spans(chosen), metrics.spans(item.rationale)),
    }
    for k in TOP_WORDS:
        if k < len(words):
            values[f"token F1 at {k}"] = metrics.token_f1(words, item.rationale, k)
    return values


def faithfulness(subject: TextSubject, item: TextItem, explain: Explain) -> Values:
    """Comprehensiveness and sufficiency, ERASER's AOPC over its bins."""
    words = explain().words
    ks = sorted({max(1, int(np.ceil(share * len(words)))) for share in SHARES})
    probability = subject.probability(item)
    return {
        "comprehensiveness": metrics.comprehensiveness(probability, words, ks),
        "sufficiency": metrics.sufficiency(probability, words, ks),
    }


IMAGE_SCORERS: dict[str, Callable[..., Values]] = {
    "pointing": pointing,
    "segmentation": segmentation,
    "perturbation": perturbation,
    "perturbation-mean": perturbation_mean,
}
TEXT_SCORERS: dict[str, Callable[..., Values]] = {"rationale": rationale, "faithfulness": faithfulness}


def needs_predicted(names: Iterable[str]) -> bool:
    """Whether one of these scorers asks for the map of the predicted class beside that of the label."""
    return any(name.startswith("perturbation") for name in names)


def lower_is_better(metric: str) -> bool:
    """Whether small values of a metric are good."""
    return metric.startswith(("positive ", "sufficiency"))


def get(kind: Any, name: str) -> Callable[..., Values]:
    """The scorer called `name` for items of a kind.

    Raises:
        InputError: there is none.
    """
    known = IMAGE_SCORERS if kind is ImageItem else TEXT_SCORERS
    if name not in known:
        raise InputError(f"no metric {name!r} for this data; choose from {', '.join(known)}")
    return known[name]
