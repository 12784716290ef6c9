"""What an explanation is: relevance over the tokens of each input, and its views on images and text."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.utils._pytree as pytree
from torch import Tensor

from fastrel.errors import InputError
from fastrel.maps import TokenMap

if TYPE_CHECKING:
    from PIL import Image

    from fastrel.render.parts import Part


@dataclass(frozen=True, eq=False)
class Explanation:
    """The explanation of a batch of predictions. Tensors live on the model's device, in its dtype (maps of 16-bit models in
    float32). It holds neither the model nor its inputs: it can be pickled, copied and sent.

    Attributes:
        logits: the model's prediction, [B, C] (or the shape of its first output).
        target: the classes explained, [B] or [B, K]; None if the target was a function.
        maps: for each input that holds tokens its map, by the input's name. Only ratios have a meaning; what the maps of one
            sample hold adds up, so that they tell by how much each input counts.
        output: what the model returned.
        report: operators of the model that have no relevance rule of their own and took the generic one, whose sums have
            signs; empty for most transformers.
        ok: [B] or [B, K], of an artefact (`fastrel.load`): where it is false, the map could not be made and is NaN. None: all
            maps could.
    """

    logits: Tensor
    target: Tensor | None
    maps: dict[str, TokenMap]
    output: Any
    report: tuple[str, ...] = ()
    ok: Tensor | None = None
    _prediction: weakref.ref[Any] | None = field(default=None, repr=False)
    _asked: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.logits)

    def __iter__(self) -> Iterator[Explanation]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice) -> Explanation:
        """The explanation of one sample, as a batch of one, or of a run of them. Holds copies: the batch may go."""
        if isinstance(index, str):
            raise InputError(
                f"explanations are indexed by sample, not by {index!r}; there are the maps {', '.join(self.maps)}: use .maps"
            )
        if isinstance(index, slice):
            part = index
        elif -len(self) <= int(index) < len(self):
            part = slice(int(index), int(index) + 1 or None)
        else:
            raise IndexError(f"sample {index} of {len(self)}")
        batch = len(self)

        def cut(x: Any) -> Any:
            return x[part].clone() if isinstance(x, Tensor) and x.dim() and len(x) == batch else x

        return replace(
            self,
            logits=cut(self.logits),
            target=cut(self.target),
            maps={name: one.map(cut) for name, one in self.maps.items()},
            output=pytree.tree_map(cut, self.output),
            ok=cut(self.ok),
            _prediction=None,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prediction": None, "_asked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def to(self, *args: Any, **kwargs: Any) -> Explanation:
        """The explanation with its tensors moved as by `Tensor.to`."""

        def moved(x: Any) -> Any:
            return x.to(*args, **kwargs) if isinstance(x, Tensor) else x

        return replace(
            self,
            logits=moved(self.logits),
            target=None if self.target is None else self.target.to(moved(self.logits).device),
            maps={name: one.map(moved) for name, one in self.maps.items()},
            output=pytree.tree_map(moved, self.output),
            ok=None if self.ok is None else self.ok.to(moved(self.logits).device),
            _prediction=None,
        )

    def cpu(self) -> Explanation:
        """The explanation in the processor's memory."""
        return self.to("cpu")

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(one.relevance.shape)}" for name, one in self.maps.items())
        classes = "a function" if self.target is None else self.target.tolist()
        return f"Explanation(target={classes}, maps={{{shapes}}})"

    @property
    def only(self) -> TokenMap:
        """The map of the only input that holds tokens.

        Raises:
            InputError: there are several; the message names them.
        """
        if len(self.maps) != 1:
            names = ", ".join(repr(name) for name in self.maps)
            raise InputError(f"this explanation has {len(self.maps)} maps; choose one: explanation.maps[name] with {names}")
        return next(iter(self.maps.values()))

    @property
    def relevance(self) -> Tensor:
        """The map over all tokens of the only sequence, raw: [B, T] or [B, K, T]. Where tokens lie on a grid all along (no CLS
        token), T runs over it row by row."""
        return self.only.relevance

    @property
    def grid(self) -> Tensor | None:
        """The part of the map that lies on image patches, [B, gh, gw] or [B, K, gh, gw]; None for text."""
        return self.only.grid

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the images explained; None for text."""
        return self.only.image_size

    @property
    def patches(self) -> Tensor:
        """Relevance of the image patches, [B, gh, gw] or [B, K, gh, gw]; see `TokenMap.patches`."""
        return self.only.patches

    def heatmap(self, size: int | tuple[int, int] | None = None) -> Tensor:
        """The patches scaled up to pixels, [B, H, W] or [B, K, H, W], per frame where there are frames; see `TokenMap.heatmap`."""
        return self.only.heatmap(size)

    def noise_floor(self, draws: int = 2) -> Tensor:
        """How far each map moves when every input and parameter changes by as little as its dtype can tell, [B] or [B, K].

        See `fastrel.noise`. Needs the prediction that this explains, which holds model and inputs: an explanation does not.

        Raises:
            InputError: that prediction is gone (keep it: `prediction = explainer.predict(x)`), or changed; or draws < 1.
        """
        prediction = None if self._prediction is None else self._prediction()
        if prediction is None:
            raise InputError(
                "noise_floor needs the prediction, which holds model and inputs: prediction = explainer.predict(x), "
                "then prediction.noise_floor(target)"
            )
        return prediction.noise_of(self.maps, self._asked, draws)

    def picture(
        self, image: Any = None, *, tokens: Any = None, names: Sequence[str] | None = None, style: str = "blend"
    ) -> Image.Image:
        """The explanation of one sample as a PIL image.

        For one target of one picture the overlay, of its size; for several the picture and an overlay each; where there are other
        inputs, or frames, a row per target with the overlays, charts of the highest words, and what each input holds of the whole.

        Args:
            image: the picture that was explained, of any size but as the model saw it, cropped if that was: a PIL image, an array
                [H, W, 3] or [H, W] of uint8 or of floats in 0 … 1, or a tensor [3, H, W] in 0 … 1; a list of them for the frames of
                a film; {input: picture} where several inputs are.
            tokens: the T strings that a tokenizer made; {input: strings} where several inputs are texts.
            names: titles of the K targets.
            style: "blend" or "contours".

        Raises:
            InputError: the batch holds several samples (take `explanation[i]`), or what is to be shown is missing or does not fit.
        """
        from fastrel.render.parts import picture_of

        return picture_of(self._parts(image, tokens, style), self._titles(names), style)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        image: Any = None,
        tokens: Any = None,
        names: Sequence[str] | None = None,
        style: str = "blend",
    ) -> None:
        """Write the explanation of one sample: a web page that needs nothing else if `path` ends in .html, else `picture(…)`.

        Arguments are those of `picture`. A page has every input's words or overlays below the heading of each target.

        Raises:
            InputError: as `picture`.
        """
        if not str(path).lower().endswith((".html", ".htm")):
            self.picture(image, tokens=tokens, names=names, style=style).save(path)
            return
        from fastrel.render.parts import page_of

        parts = self._parts(image, tokens, style)
        if len(parts) == 1 and parts[0].tokens is None and parts[0].heats is None:
            raise InputError("saving as HTML needs tokens=[...], one string per token")
        Path(path).write_text(page_of(parts, self._titles(names), style), encoding="utf-8")

    def _parts(self, image: Any, tokens: Any, style: str) -> list[Part]:
        from fastrel.render.overlay import STYLES
        from fastrel.render.showing import parts_of

        if len(self) != 1:
            raise InputError(f"this explanation holds {len(self)} samples; save one of them: explanation[0].save(...)")
        if style not in STYLES:
            raise InputError(f"style {style!r}; choose {' or '.join(STYLES)}")
        return parts_of(self.maps, image, tokens)

    def _titles(self, names: Sequence[str] | None) -> list[str]:
        one = next(iter(self.maps.values())).relevance
        count = 1 if one.dim() == 2 else one.shape[1]
        if names is not None:
            if len(names) != count:
                raise InputError(f"{len(names)} names for {count} targets")
            return list(names)
        if self.target is None:
            return [""] * count if count == 1 else [f"target {i}" for i in range(count)]
        return [f"class {int(c)}" for c in self.target.flatten()]
