"""Heat maps over pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastrel.errors import InputError

COLORMAP = "turbo"


def as_picture(image: Any) -> Image.Image:
    """An RGB picture from a PIL image, an array [H, W] or [H, W, 3] (uint8, or floats in 0 … 1), or a tensor [3, H, W].

    Raises:
        InputError: anything else, or floats outside 0 … 1 (a normalised model input, say).
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if isinstance(image, Tensor) and array.ndim == 3 and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise InputError(f"cannot show an image of shape {array.shape}; expected [H, W], [H, W, 3] or a tensor [3, H, W]")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if low < -1e-6 or high > 1 + 1e-6:
            raise InputError(f"image values run from {low:.3g} to {high:.3g}; pass the picture in 0 … 1, not normalised")
        array = (array * 255).round().clip(0, 255)
    return Image.fromarray(array.astype(np.uint8)).convert("RGB")


def unit(heat: np.ndarray) -> np.ndarray:
    """A map scaled to 0 … 1; one that is constant, but for rounding in float32, is all zeros."""
    low, high = heat.min(), heat.max()
    flat = high - low <= 1e-5 * max(abs(low), abs(high))
    return np.zeros_like(heat) if flat else (heat - low) / (high - low)


def _level(picture: Image.Image, heat: Tensor | np.ndarray) -> np.ndarray:
    """A map [H, W] of the picture's size, scaled to 0 … 1."""
    heat = heat.detach().float().cpu().numpy() if isinstance(heat, Tensor) else np.asarray(heat, np.float32)
    if heat.shape != (picture.height, picture.width):
        raise InputError(f"a map of shape {heat.shape} does not fit a picture of {picture.height} x {picture.width}")
    return unit(heat)


def overlay(picture: Image.Image, heat: Tensor | np.ndarray, opacity: float = 0.75) -> Image.Image:
    """The picture, tinted where the map [H, W] (the picture's size) is high and left as it is where it is zero."""
    level = _level(picture, heat)
    colour = matplotlib.colormaps[COLORMAP](level)[..., :3] * 255
    alpha = (opacity * np.sqrt(level))[..., None]
    blend = np.asarray(picture, np.float32) * (1 - alpha) + colour * alpha
    return Image.fromarray(blend.round().astype(np.uint8))


def contours(picture: Image.Image, heat: Tensor | np.ndarray, levels: Sequence[float] = (0.25, 0.5, 0.75)) -> Image.Image:
    """The picture with lines of equal relevance, at shares of the way from the map's lowest to its highest value.

    heat: [H, W], the picture's size. A constant map has no lines.
    """
    level = _level(picture, heat)
    figure = Figure(figsize=(picture.width / 100, picture.height / 100), dpi=100)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.imshow(np.asarray(picture), interpolation="nearest")
    shown = [x for x in levels if level.min() < x < level.max()]
    if shown:
        colours = matplotlib.colormaps[COLORMAP](np.array(shown))
        axes.contour(level, levels=shown, colors="white", linewidths=2.6, alpha=0.7)
        axes.contour(level, levels=shown, colors=colours, linewidths=1.4)
    return drawn(figure)


#: How a map is drawn on a picture.
STYLES: dict[str, Callable[..., Image.Image]] = {"blend": overlay, "contours": contours}


def side_by_side(
    picture: Image.Image,
    heats: Sequence[Tensor | np.ndarray],
    titles: Sequence[str],
    title: str = "input",
    style: str = "blend",
) -> Image.Image:
    """The picture and one overlay per map, in one row with titles."""
    return table(picture, [heats], [title, *titles], [""], style)


def table(
    picture: Image.Image,
    rows: Sequence[Sequence[Tensor | np.ndarray]],
    columns: Sequence[str],
    names: Sequence[str],
    style: str = "blend",
) -> Image.Image:
    """One row of overlays per target, each beginning with the picture; `columns` are titles, `names` those of the rows."""
    width, height = len(columns), len(rows)
    figure = Figure(
        figsize=(3 * width, (3 * picture.height / picture.width + 0.25) * height), dpi=100, layout="constrained"
    )
    grid = figure.subplots(height, width, squeeze=False)
    for axes, heats, name in zip(grid, rows, names, strict=True):
        panels = [picture, *(STYLES[style](picture, heat) for heat in heats)]
        for axis, panel in zip(axes, panels, strict=True):
            show(axis, panel)
        axes[0].set_ylabel(name, fontsize=11, parse_math=False)
    for axis, title in zip(grid[0], columns, strict=True):
        axis.set_title(title.replace("_", " "), fontsize=11, parse_math=False)
    return drawn(figure)


def show(axis: Any, picture: Image.Image) -> None:
    """A picture without a frame."""
    axis.imshow(np.asarray(picture))
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def drawn(figure: Figure) -> Image.Image:
    """A figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def png(picture: Image.Image) -> bytes:
    """A picture as a file, written quickly."""
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=3)
    return buffer.getvalue()
