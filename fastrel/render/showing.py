"""From the maps of one sample, and what the user gave to show them on, to what is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastrel.errors import InputError
from fastrel.maps import TokenMap
from fastrel.render.overlay import as_picture
from fastrel.render.parts import Part


def parts_of(maps: Mapping[str, TokenMap], image: Any, tokens: Any) -> list[Part]:
    """What is drawn of the maps of one sample, [1, T] or [1, K, T] each.

    image: the picture of the only input whose tokens lie on one, or {input: picture}; of an input with frames one picture or a
    list of them. tokens: strings of the only other input, or {input: strings}.

    Raises:
        InputError: a picture is missing, a name is wrong, or strings or frames are not as many as the map has.
    """
    pictures = _by_name("image", image, maps, [name for name, one in maps.items() if one.grid is not None])
    sequences = [name for name, one in maps.items() if one.grid is None and one.relevance.shape[-1] > 1]
    texts = _by_name("tokens", tokens, maps, sequences)
    rows = {name: one.relevance.reshape(-1, one.relevance.shape[-1]) for name, one in maps.items()}
    if unused := next((name for name in pictures if maps[name].grid is None), None):
        raise InputError(f"image for {unused!r}, whose tokens do not lie on one; pass tokens={{{unused!r}: strings}}")
    whole = sum(row.abs().sum(1) for row in rows.values())
    parts = []
    for name, one in maps.items():
        shares = [float(x) for x in (rows[name].abs().sum(1) / whole).nan_to_num()]
        if one.grid is not None and name not in texts:
            if name not in pictures:
                raise InputError(f"the map of {name} lies on a picture; pass it: image={{{name!r}: picture}}")
            parts.append(_on_pictures(name, one, rows[name], shares, pictures[name]))
            continue
        strings = texts.get(name)
        if strings is not None and len(strings) != rows[name].shape[1]:
            raise InputError(f"{len(strings)} tokens for {name}, whose map has {rows[name].shape[1]}")
        parts.append(Part(name, rows[name], shares, None if strings is None else list(strings)))
    return parts


def _by_name(what: str, given: Any, maps: Mapping[str, TokenMap], fitting: Sequence[str]) -> dict[str, Any]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        if wrong := next((name for name in given if name not in maps), None):
            raise InputError(f"{what} for {wrong!r}, but the maps are of {', '.join(maps)}")
        return dict(given)
    if len(fitting) != 1:
        known = "; ".join(f"{name}: {'a grid' if one.grid is not None else 'tokens'}" for name, one in maps.items())
        raise InputError(f"which input is {what}= for? pass {{input: …}}; the maps are {known}")
    return {fitting[0]: given}


def _on_pictures(name: str, one: TokenMap, relevance: Tensor, shares: list[float], given: Any) -> Part:
    patches = one.patches
    frames = patches.shape[-3] if patches.dim() - one.relevance.dim() == 2 else 1
    several = isinstance(given, (list, tuple)) or (isinstance(given, (np.ndarray, Tensor)) and given.ndim == 4)
    pictures = [as_picture(x) for x in given] if several else [as_picture(given)] * frames
    if not pictures or len(pictures) % frames:
        raise InputError(f"{len(pictures)} pictures for the {frames} frames of {name}")
    pictures = pictures[:: len(pictures) // frames]
    size = (pictures[0].height, pictures[0].width)
    heats = one.heatmap(size).reshape(len(relevance), frames, *size)
    return Part(name, relevance, shares, pictures=_same_size(name, pictures), heats=heats)


def _same_size(name: str, pictures: list[Image.Image]) -> list[Image.Image]:
    if len({picture.size for picture in pictures}) > 1:
        raise InputError(f"the pictures of {name} differ in size: {pictures[0].size} and others")
    return pictures
