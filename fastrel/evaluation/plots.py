"""Figures of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fastrel.evaluation.summary import Row, is_curve_point

_COLUMNS = 4


def bars(rows: Sequence[Row], path: Path) -> None:
    """A panel per metric, a bar per configuration with its 95 % interval."""
    shown = [row for row in rows if not is_curve_point(row.metric)]
    metrics = list(dict.fromkeys(row.metric for row in shown))
    names = list(dict.fromkeys(row.configuration for row in shown))
    columns = min(_COLUMNS, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(2.5 + 2.6 * columns, lines * (0.7 + 0.27 * len(names))), dpi=110, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    colours = matplotlib.colormaps["tab20"](np.linspace(0, 1, 20))
    for axis, metric in zip(grid.flat, metrics, strict=False):
        found = {row.configuration: row for row in shown if row.metric == metric}
        for place, name in enumerate(names):
            if name in found:
                row = found[name]
                error = np.nan_to_num([[row.mean - row.low], [row.high - row.mean]])
                axis.barh(place, row.mean, xerr=error, color=colours[place % 20], error_kw={"lw": 1})
        axis.set_title(metric, fontsize=9)
        axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    grid[0, 0].invert_yaxis()
    for axis in grid.flat[len(metrics) :]:
        axis.set_visible(False)
    figure.savefig(path)


def curves(rows: Sequence[Row], path: Path) -> bool:
    """Perturbation curves with their 95 % intervals, a panel each; returns whether there were any."""
    points = [row for row in rows if is_curve_point(row.metric)]
    panels = list(dict.fromkeys(row.metric.rpartition(" at ")[0] for row in points))
    if not panels:
        return False
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3 * lines + 0.8), dpi=110, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    colours = matplotlib.colormaps["tab20"](np.linspace(0, 1, 20))
    names = list(dict.fromkeys(row.configuration for row in points))
    for axis, panel in zip(grid.flat, panels, strict=False):
        for place, name in enumerate(names):
            own = [row for row in points if row.configuration == name and row.metric.startswith(f"{panel} at ")]
            own.sort(key=lambda row: row.metric)
            removed = [float(row.metric[-3:]) * 100 for row in own]
            low, high = (
                [value * 100 for value in values] for values in zip(*((row.low, row.high) for row in own), strict=True)
            )
            axis.fill_between(removed, low, high, color=colours[place % 20], alpha=0.1, lw=0)
            axis.plot(
                removed,
                [row.mean * 100 for row in own],
                color=colours[place % 20],
                lw=1.3,
                label=name.replace("_", " "),
            )
        axis.set_title(panel, fontsize=9)
        axis.set_xlabel("% of pixels removed", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in grid[:, 0]:
        axis.set_ylabel("accuracy, %", fontsize=8)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path)
    return True
