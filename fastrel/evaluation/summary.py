"""Means, standard errors and paired tests over scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastrel.evaluation.scorers import lower_is_better
from fastrel.evaluation.store import Score

_CURVE_POINT = re.compile(r".* at 0\.\d$")


class Row(NamedTuple):
    """One configuration by one metric. Groups (items that share a picture) are the observations.

    difference and p: the first configuration's mean minus this one's over the groups that both have, and the two-sided
    probability of a mean difference as large under random signs; NaN for the first itself.
    """

    metric: str
    configuration: str
    mean: float
    error: float  # standard error; NaN for a single group
    groups: int
    difference: float
    p: float


def is_curve_point(metric: str) -> bool:
    """Whether a metric is a point of a perturbation curve rather than a score of its own."""
    return _CURVE_POINT.match(metric) is not None


def per_group(scores: Sequence[Score]) -> dict[tuple[str, str], dict[str, float]]:
    """(metric, configuration) -> group -> mean over its items, undefined (NaN) scores left out."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for score in scores:
        if not np.isnan(score.value):
            groups = values.setdefault((score.metric, score.configuration), {})
            groups.setdefault(score.group, []).append(score.value)
    return {key: {group: float(np.mean(v)) for group, v in groups.items()} for key, groups in values.items()}


def summarise(scores: Sequence[Score], order: Sequence[str]) -> list[Row]:
    """A row per metric and configuration; `order` lists these, and all others are tested against the first."""
    grouped = per_group(scores)
    rows = []
    for metric in dict.fromkeys(metric for metric, _ in grouped):
        first = grouped.get((metric, order[0]), {})
        for configuration in order:
            found = grouped.get((metric, configuration))
            if not found:
                continue
            values = np.array(list(found.values()))
            error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
            shared = [group for group in first if group in found] if configuration != order[0] else []
            difference, p = paired(np.array([first[g] - found[g] for g in shared]))
            rows.append(Row(metric, configuration, float(values.mean()), error, len(values), difference, p))
    return rows


def paired(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences, and its two-sided sign-flip permutation test (scipy; at least two pairs)."""
    from scipy.stats import permutation_test

    if len(differences) < 2:
        return float(differences.mean()) if len(differences) else float("nan"), float("nan")
    test = permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=9999, vectorized=True, rng=np.random.default_rng(0)
    )
    return float(differences.mean()), float(test.pvalue)


def markdown(rows: Sequence[Row]) -> str:
    """A line per configuration, a column per metric, the best mean in bold."""
    shown = [row for row in rows if not is_curve_point(row.metric)]
    metrics = list(dict.fromkeys(row.metric for row in shown))
    names = list(dict.fromkeys(row.configuration for row in shown))
    cells = {(row.configuration, row.metric): row for row in shown}
    best, digits = {}, {}
    for metric in metrics:
        means = {name: cells[name, metric].mean for name in names if (name, metric) in cells}
        digits[metric] = 1 if max(map(abs, means.values())) >= 10 else 3
        best[metric] = min(means.values()) if lower_is_better(metric) else max(means.values())
    lines = [
        "| | " + " | ".join(f"{metric} {'↓' if lower_is_better(metric) else '↑'}" for metric in metrics) + " |",
        "|---" * (len(metrics) + 1) + "|",
    ]
    for name in names:
        texts = [_cell(cells.get((name, metric)), best[metric], digits[metric]) for metric in metrics]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    counts = sorted({row.groups for row in shown})
    count = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = (
        f"Mean ± standard error over {count} pictures or texts. ∗ p < 0.05, ∗∗ p < 0.01 against {names[0]} on the same "
        "ones (paired sign-flip permutation test, two-sided, not corrected for the number of comparisons)."
    )
    return "\n".join([*lines, "", note])


def _cell(row: Row | None, best: float, digits: int) -> str:
    if row is None:
        return "–"
    mean = f"{row.mean:.{digits}f}"
    stars = "" if np.isnan(row.p) or row.p >= 0.05 else " ∗∗" if row.p < 0.01 else " ∗"
    error = "" if np.isnan(row.error) else f" ± {row.error:.{digits}f}"
    return (f"**{mean}**" if row.mean == best else mean) + error + stars
