"""An explanation of any number of inputs, as one page or one picture: overlays, coloured words, and by how much each input counts."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastrel.render.overlay import STYLES, drawn, png, show, side_by_side
from fastrel.render.text import PAGE, paragraph, words

#: Words or tokens in a chart, bars from the highest down.
_BARS = 12


@dataclass(frozen=True)
class Part:
    """What one input of the model got, for K targets.

    Attributes:
        name: of the input.
        relevance: [K, T] over its tokens.
        shares: of the whole explanation, one per target.
        tokens: T strings; None: tokens are numbered.
        pictures: what its maps are drawn on, one or one per frame; empty where they do not lie on a picture.
        heats: [K, frames, H, W], each of the picture's size; None without pictures.
    """

    name: str
    relevance: Tensor
    shares: Sequence[float]
    tokens: Sequence[str] | None = None
    pictures: Sequence[Image.Image] = ()
    heats: Tensor | None = None

    @property
    def labels(self) -> list[str]:
        """Its tokens, or their numbers; none for an input of numbers, which holds its share as one value."""
        if self.tokens is not None:
            return list(self.tokens)
        count = self.relevance.shape[1]
        return [str(i) for i in range(count)] if count > 1 else [""]

    def drawn(self, target: int, style: str) -> list[Image.Image]:
        """Its pictures with the maps of one target."""
        if self.heats is None:
            return []
        return [STYLES[style](p, heat) for p, heat in zip(self.pictures, self.heats[target], strict=True)]


def page_of(parts: Sequence[Part], titles: Sequence[str], style: str = "blend") -> str:
    """A web page that needs nothing else: per target a heading, and every input's words or pictures below it."""
    body = []
    for target, title in enumerate(titles):
        body += [f"<h2>{html.escape(title)}</h2>"] if title else []
        for part in parts:
            if len(parts) > 1:
                body.append(f"<h3>{html.escape(part.name)}: {part.shares[target]:.1%} of the whole</h3>")
            if part.heats is None:
                body.append(paragraph(part.labels, part.relevance[target].detach().float().cpu()))
            else:
                body += [_embedded(shown, part.name) for shown in part.drawn(target, style)]
    return PAGE.format(body="\n".join(body))


def page(tokens: Sequence[str], relevance: Tensor, titles: Sequence[str]) -> str:
    """A page with one paragraph of coloured words per target. relevance [K, T], titles: K headings."""
    return page_of([Part("text", relevance, [1.0] * len(titles), tokens)], titles)


def picture_of(parts: Sequence[Part], titles: Sequence[str], style: str = "blend") -> Image.Image:
    """One picture: the overlay itself for one target on one picture; else a row per target with every input's overlays and charts
    of words, or, for several targets on one picture, that picture and the overlays side by side."""
    only = parts[0]
    if len(parts) == 1 and len(only.pictures) == 1 and only.heats is not None:
        if len(titles) == 1:
            return only.drawn(0, style)[0]
        return side_by_side(only.pictures[0], list(only.heats[:, 0]), titles, style=style)
    widths = [len(part.pictures) or 1 for part in parts]
    figure = Figure(figsize=(2.6 * sum(widths), 2.8 * len(titles)), dpi=100, layout="constrained")
    grid = figure.subplots(len(titles), sum(widths), squeeze=False)
    for target, (row, title) in enumerate(zip(grid, titles, strict=True)):
        start = 0
        for part, width in zip(parts, widths, strict=True):
            own, start = row[start : start + width], start + width
            for axis, shown in zip(own, part.drawn(target, style), strict=False):
                show(axis, shown)
            if part.heats is None:
                _chart(own[0], part, target)
            label = f"{part.name}, {part.shares[target]:.0%}" if len(parts) > 1 else part.name
            own[0].set_title(label, fontsize=10, loc="left", parse_math=False)
        if title:
            row[0].set_ylabel(title, fontsize=10, parse_math=False)
    return drawn(figure)


def _chart(axis: Any, part: Part, target: int) -> None:
    """The highest words in the order of the text."""
    found = words(part.labels, part.relevance[target].detach().float().cpu())
    if not found:
        axis.set_axis_off()
        return
    kept = sorted(sorted(range(len(found)), key=lambda i: -found[i][1])[:_BARS])
    axis.barh(range(len(kept)), [found[i][1] for i in kept], color="#c2410c")
    axis.set_yticks(range(len(kept)), [found[i][0] for i in kept], fontsize=8, parse_math=False)
    axis.set_xticks([])
    axis.invert_yaxis()
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _embedded(shown: Image.Image, name: str) -> str:
    data = base64.b64encode(png(shown)).decode()
    return f'<img alt="relevance over {html.escape(name)}" src="data:image/png;base64,{data}">'
