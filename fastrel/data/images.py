"""Pictures with labels or masks."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fastrel.data import pictures
from fastrel.data.items import ImageItem
from fastrel.errors import InputError, needed


def _open(path: Path) -> Image.Image:
    return pictures.read(path).image


def _picture(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(grey).convert("RGB")


def _same(mask: np.ndarray) -> np.ndarray:
    return mask


def mosaics() -> list[ImageItem]:
    """Every object of the held-out scenes that ship with fastrel; its mask is the quarter of the scene that holds it."""
    from fastrel.demo import CLASSES, held_out

    scenes, cells = held_out()
    half = scenes.shape[1] // 2
    items = []
    for i, (scene, classes) in enumerate(zip(scenes, cells, strict=True)):
        for position in np.flatnonzero(classes >= 0):
            row, column = divmod(int(position), 2)
            mask = np.zeros(scene.shape, bool)
            mask[row * half : (row + 1) * half, column * half : (column + 1) * half] = True
            label = int(classes[position])
            name = f"scene{i}"
            items.append(
                ImageItem(
                    f"{name}/{position}-{CLASSES[label]}", name, partial(_picture, scene), (label,), partial(_same, mask)
                )
            )
    return items


def image_folder(folder: Path, class_names: Sequence[str] = ()) -> list[ImageItem]:
    """Pictures `<class number>_….jpg`, or one folder per class.

    The number of a folder's class is the one that its name begins with, if all do; else the place of its name among the
    model's `class_names`, or of its WordNet number among ImageNet's, if all are there; else its position among all folders,
    those without a picture included.

    Raises:
        InputError: a folder in it cannot be read, or a picture has no number.
    """
    paths = sorted(p for p in _files(folder) if p.suffix.lower() in pictures.SUFFIXES)
    numbers = _folder_numbers(sorted(p.name for p in folder.iterdir() if p.is_dir()), class_names)
    items = []
    for path in paths:
        name = path.relative_to(folder)
        number = re.match(r"\d+(?=[_.])", path.name) if path.parent == folder else None
        if number is None and path.parent == folder:
            raise InputError(f"{path.name}: pictures must be named <class number>_<anything>, or lie in a folder per class")
        label = int(number[0]) if number else numbers[name.parts[0]]
        items.append(ImageItem(str(name), str(name), partial(_open, path), (label,)))
    return items


def _files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"the folder {error.filename!r} cannot be read: {error.strerror}") from error

    for parent, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(parent, name) for name in names)


def _folder_numbers(folders: Sequence[str], class_names: Sequence[str]) -> dict[str, int]:
    leading = [re.match(r"\d+(?=[_. -]|$)", name) for name in folders]
    if all(leading):
        return {name: int(found[0]) for name, found in zip(folders, leading, strict=True) if found}
    known = {_plain(part): i for i, name in enumerate(class_names) for part in (name, *name.split(","))}
    if all(_plain(name) in known for name in folders):
        return {name: known[_plain(name)] for name in folders}
    if all(re.fullmatch(r"n\d{8}", name) for name in folders):
        from timm.data import ImageNetInfo

        places = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
        if all(name in places for name in folders):
            return {name: places[name] for name in folders}
    return {name: i for i, name in enumerate(folders)}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().lower()


def coco_masks(folder: Path) -> list[ImageItem]:
    """One item per picture and category of manifest.json: {picture: {classes: {name: {mask_value, imagenet: [ids]}}}}.

    `<picture's stem>_mask.png` holds `mask_value` where the category is.
    """

    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return [
            ImageItem(
                f"{picture}/{category}",
                picture,
                partial(_open, folder / picture),
                tuple(found["imagenet"]),
                partial(_category, folder / f"{Path(picture).stem}_mask.png", found["mask_value"]),
            )
            for picture, entry in sorted(manifest.items())
            for category, found in sorted(entry["classes"].items())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'manifest.json'} is not a manifest of masks: {error!r}") from error


def _category(path: Path, value: int) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file) == value


def imagenet_segmentation(path: Path) -> list[ImageItem]:
    """ImageNet-Segmentation (Guillaumin et al., IJCV 2014), gtsegs_ijcv.mat: pictures with a mask and without a label.

    Raises:
        InputError: h5py is not installed, or the file is something else.
    """
    with needed("reading .mat files", "evaluate"):
        import h5py

    try:
        with h5py.File(path) as file:
            count = len(file["value/img"])
    except (OSError, KeyError) as error:
        raise InputError(f"{path} is not gtsegs_ijcv.mat: {error}") from error
    return [
        ImageItem(f"{i:04d}", f"{i:04d}", partial(_matlab_picture, path, i), (), partial(_matlab_mask, path, i))
        for i in range(count)
    ]


def _matlab_picture(path: Path, i: int) -> Image.Image:
    import h5py

    with h5py.File(path) as file:
        return Image.fromarray(np.array(file[file["value/img"][i, 0]]).T)


def _matlab_mask(path: Path, i: int) -> np.ndarray:
    import h5py

    with h5py.File(path) as file:
        cells = file[file["value/gt"][i, 0]]
        return np.array(file[cells[0, 0]]).T != 0
