"""Agreement with human rationales, and faithfulness to the model, after ERASER (DeYoung et al., ACL 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastrel.errors import InputError, needed

Span = tuple[int, int]


def _check(scores: np.ndarray, rationale: np.ndarray) -> None:
    if scores.shape != rationale.shape or scores.ndim != 1:
        raise InputError(f"scores of shape {scores.shape} for a rationale of shape {rationale.shape}; expected [T] both")


def top_tokens(scores: np.ndarray, k: int) -> np.ndarray:
    """The k highest tokens; of equal ones the first.

    Args:
        scores: [T].
        k: how many; all if T is smaller.

    Returns:
        [T] of bool.
    """
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-scores, kind="stable")[:k]] = True
    return chosen


def token_f1(scores: np.ndarray, rationale: np.ndarray, k: int) -> float:
    """F1 of the k highest tokens against a rationale.

    Args:
        scores: [T].
        rationale: what people marked, [T] of bool.
        k: how many of the highest tokens count as chosen.

    Returns:
        In 0 … 1; 0 where nothing is chosen or marked.

    Raises:
        InputError: shapes that do not fit.
    """
    _check(scores, rationale)
    chosen = top_tokens(scores, k)
    both = (chosen & rationale).sum()
    return float(2 * both / (chosen.sum() + rationale.sum())) if both else 0.0


def average_precision(scores: np.ndarray, rationale: np.ndarray) -> float:
    """Area under the precision-recall curve (scikit-learn's average precision, which must be installed).

    Args:
        scores: [T].
        rationale: what people marked, [T] of bool.

    Returns:
        In 0 … 1; NaN for an empty rationale.

    Raises:
        InputError: shapes that do not fit.
    """
    with needed("average precision", "evaluate"):
        from sklearn.metrics import average_precision_score

    _check(scores, rationale)
    return float(average_precision_score(rationale, scores)) if rationale.any() else float("nan")


def spans(tokens: np.ndarray) -> list[Span]:
    """Runs of True in `tokens`, [T] of bool, as (start, stop), `stop` not included."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], tokens.astype(int), [0]))))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def iou_f1(predicted: Sequence[Span], truth: Sequence[Span], threshold: float = 0.5) -> float:
    """F1 of spans, a predicted and a true one matching where their intersection over union reaches the threshold.

    Args:
        predicted: (start, stop) of each.
        truth: (start, stop) of each.
        threshold: in 0 … 1.

    Returns:
        In 0 … 1; 0 where either is empty.
    """

    def iou(a: Span, b: Span) -> float:
        shared = max(0, min(a[1], b[1]) - max(a[0], b[0]))
        return shared / (a[1] - a[0] + b[1] - b[0] - shared)

    if not predicted or not truth:
        return 0.0
    precision = np.mean([max(iou(p, t) for t in truth) >= threshold for p in predicted])
    recall = np.mean([max(iou(p, t) for p in predicted) >= threshold for t in truth])
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def comprehensiveness(probability: Callable[[np.ndarray], float], scores: np.ndarray, ks: Sequence[int]) -> float:
    """How far the prediction falls without the k highest tokens, averaged over `ks`: higher is better.

    Args:
        probability: kept [T] of bool -> the model's probability of the explained class with only those tokens.
        scores: [T].
        ks: how many tokens to take out.

    Returns:
        In -1 … 1, a difference of probabilities.
    """
    whole = probability(np.ones(len(scores), bool))
    return float(np.mean([whole - probability(~top_tokens(scores, k)) for k in ks]))


def sufficiency(probability: Callable[[np.ndarray], float], scores: np.ndarray, ks: Sequence[int]) -> float:
    """How far the prediction falls with nothing but the k highest tokens, averaged over `ks`: lower is better.

    Args:
        probability: kept [T] of bool -> the model's probability of the explained class with only those tokens.
        scores: [T].
        ks: how many tokens to keep.

    Returns:
        In -1 … 1, a difference of probabilities.
    """
    whole = probability(np.ones(len(scores), bool))
    return float(np.mean([whole - probability(top_tokens(scores, k)) for k in ks]))
