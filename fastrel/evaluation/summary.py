"""Means, intervals and paired tests over scores."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastrel.evaluation.scorers import lower_is_better
from fastrel.evaluation.store import Score

_CURVE_POINT = re.compile(r".* at 0\.\d$")
_RESAMPLES = 100_000

#: Numbers drawn at a time: what is held in memory of the resamples.
_DRAWN = 1 << 22


class Row(NamedTuple):
    """One configuration by one metric. Groups (items that share a picture) are the observations.

    error: standard error, NaN for a single group. low, high: 95 % interval of the mean, by the bootstrap over groups.
    difference and p: the first configuration's mean minus this one's over the groups that both have, and the two-sided
    probability of a mean difference as large under random signs; NaN for the first itself and for points of curves. corrected: p
    after Holm's correction for all tests of the table (Scandinavian Journal of Statistics, 1979).
    """

    metric: str
    configuration: str
    mean: float
    error: float
    low: float
    high: float
    groups: int
    difference: float
    p: float
    corrected: float


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
            tested = configuration != order[0] and not is_curve_point(metric)
            shared = [group for group in first if group in found] if tested else []
            difference, p = paired(np.array([first[g] - found[g] for g in shared]))
            mean, (low, high) = float(values.mean()), interval(values)
            rows.append(Row(metric, configuration, mean, error, low, high, len(values), difference, p, p))
    return [row._replace(corrected=p) for row, p in zip(rows, holm([row.p for row in rows]), strict=True)]


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean, by the percentile bootstrap; NaN for a single value."""
    if len(values) < 2:
        return float("nan"), float("nan")
    rng, count = np.random.default_rng(0), len(values)
    means = [values[rng.integers(0, count, (rows, count))].mean(1) for rows in _chunks(_RESAMPLES // 10, count)]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def paired(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences, and its two-sided sign-flip permutation test: all signs where few, else random ones; at least two
    pairs."""
    count = len(differences)
    if count < 2:
        return float(differences.mean()) if count else float("nan"), float("nan")
    reached = abs(differences.sum()) * (1 - 1e-12)
    if 2**count <= _RESAMPLES:
        signs = 1 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return float(differences.mean()), float((abs(signs @ differences) >= reached).mean())
    rng, extreme = np.random.default_rng(0), 1
    for rows in _chunks(_RESAMPLES, count):
        signs = 1 - 2.0 * rng.integers(0, 2, (rows, count), np.int8)
        extreme += int((abs(signs @ differences) >= reached).sum())
    return float(differences.mean()), extreme / (_RESAMPLES + 1)


def _chunks(resamples: int, count: int) -> Iterator[int]:
    """How many resamples of `count` numbers to draw at a time: in fours, as many bytes as numpy takes from one random word."""
    rows = max(4, _DRAWN // count // 4 * 4)
    yield from (min(rows, resamples - done) for done in range(0, resamples, rows))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of the tests among `ps`: the k-th smallest of m times m - k + 1, never below a smaller one's; NaN stays."""
    order = [i for i in np.argsort(ps) if not np.isnan(ps[i])]
    corrected, highest = list(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, ps[i] * (len(order) - rank)))
        corrected[i] = highest
    return corrected


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
    counts = {metric: max(row.groups for row in shown if row.metric == metric) for metric in metrics}
    same = len(set(counts.values())) == 1
    heads = [f"{m} {'↓' if lower_is_better(m) else '↑'}{'' if same else f', n = {counts[m]}'}" for m in metrics]
    lines = [
        f"| | {' | '.join(heads)} |",
        "|---" * (len(metrics) + 1) + "|",
    ]
    for name in names:
        texts = [_cell(cells.get((name, metric)), best[metric], digits[metric]) for metric in metrics]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    count = f"{counts[metrics[0]]}" if same else "n"
    tests = sum(not np.isnan(row.p) for row in shown)
    note = (
        f"Mean and 95 % interval (bootstrap) over {count} pictures or texts. ∗ p < 0.05, ∗∗ p < 0.01 against {names[0]} on the same "
        f"ones: paired sign-flip permutation test, two-sided, Holm's correction for the {tests} tests of the table."
    )
    return "\n".join([*lines, "", note])


def _cell(row: Row | None, best: float, digits: int) -> str:
    if row is None:
        return "–"
    mean = f"{row.mean:.{digits}f}"
    stars = "" if not row.corrected < 0.05 else " ∗∗" if row.corrected < 0.01 else " ∗"
    error = "" if np.isnan(row.low) else f" [{row.low:.{digits}f}, {row.high:.{digits}f}]"
    return (f"**{mean}**" if row.mean == best else mean) + error + stars
