"""Data sets to evaluate explanations on: pictures with labels or object masks, texts with human rationales.

`read("coco:FOLDER")` and the like give a list of items; pictures and masks are opened only when an item is asked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastrel.data.images import coco_masks, image_folder, imagenet_segmentation, mosaics
from fastrel.data.items import ImageItem, TextItem
from fastrel.data.texts import eraser, sst
from fastrel.errors import InputError

#: kind -> (reader, what it reads). `mosaics` needs no path.
READERS: dict[str, tuple[Callable[..., list[ImageItem] | list[TextItem]], str]] = {
    "mosaics": (mosaics, "the held-out scenes that ship with fastrel, a cell per object"),
    "images": (
        image_folder,
        "a folder of pictures whose file names begin with the class number, or a folder per class, named by number, by a class "
        "of the model or by WordNet number, else numbered in order",
    ),
    "coco": (coco_masks, "a folder with manifest.json, pictures and <name>_mask.png"),
    "imagenet-seg": (imagenet_segmentation, "ImageNet-Segmentation, gtsegs_ijcv.mat"),
    "eraser": (eraser, "an ERASER .jsonl or .jsonl.gz, its documents beside it in docs/ or in the file"),
    "sst": (sst, "Stanford Sentiment Treebank trees, one per line, .txt or .txt.gz"),
}


def read(spec: str, class_names: Sequence[str] = ()) -> list[ImageItem] | list[TextItem]:
    """The items of KIND:PATH, for instance `coco:data/coco_masks`; `mosaics` stands alone. class_names: the model's.

    Raises:
        InputError: no such kind or file, or its content is not what the kind says.
    """
    kind, _, path = spec.partition(":")
    if kind not in READERS:
        known = "; ".join(f"{name}: {what}" for name, (_, what) in READERS.items())
        raise InputError(f"unknown data {spec!r}; give KIND:PATH with one of these kinds. {known}")
    if kind != "mosaics" and not (path and Path(path).exists()):
        raise InputError(f"{spec!r}: there is no file or folder {path!r}")
    given: list[Any] = [Path(path)] if path else []
    items = READERS[kind][0](*given, *([class_names] if kind == "images" else []))
    if not items:
        raise InputError(f"{spec!r} holds no items")
    return items


__all__ = ["READERS", "ImageItem", "TextItem", "read"]
