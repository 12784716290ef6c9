"""Batches explained: the same callable for a loop of one's own, Ray, Spark, and `fastrel batch`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastrel.batch.decoding import Decoded, decode
from fastrel.batch.row import Row
from fastrel.batch.settings import Settings, count_of_highest
from fastrel.data import pictures
from fastrel.data.inputs import File, Item, Pair, Value
from fastrel.errors import CaptureError, InputError, UnsupportedModelError, reason
from fastrel.explainer import Explainer
from fastrel.models import Loaded, Sample
from fastrel.models.matching import score_of
from fastrel.prediction import Prediction

#: A batch of samples by name.
Batch: TypeAlias = dict[str, Tensor]

#: Perturbations by which a noise floor is measured.
_DRAWS = 2

_NOTHING = "the model's reader makes no sample of it"


class Explain:
    """Explains batches of pictures or texts; light to send to another process, where it loads its model at the first call.

        explain = fastrel.batch.Explain("vit_base_patch16_224", target=("top3",), device="cuda")
        rows = explain({"item": ["a.jpg", "b.jpg"]})                     # by path
        rows = explain({"image": [jpeg_bytes, pil_image, array]})        # or by content; texts: {"text": […]}
        rows = explain({"text": […], "pair": […]})                       # pairs of texts, or of pictures and texts
        dataset.map_batches(explain, batch_size=32)                      # Ray Data

    Args:
        model: a name, a folder or `MODULE:FUNCTION`, as `fastrel.models.load` takes it; None: the one that ships with fastrel.
        pairs: items are pairs, so that models of pictures with texts explain how well both fit.
        options: the fields of `fastrel.batch.settings.Settings` by name; a target may also be a class number, or several.

    Raises:
        InputError: an option that does not exist.
    """

    def __init__(self, model: str | None = None, *, pairs: bool = False, **options: Any) -> None:
        known = {field.name for field in fields(Settings)}
        unknown = sorted({*options} - known)
        if unknown:
            raise InputError(f"unknown options {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        target = options.get("target")
        if target is not None:
            several = [target] if isinstance(target, (str, int, np.integer)) else target
            options["target"] = tuple(str(word) for word in several)
        self.__setstate__({"settings": Settings(model, **options), "pairs": pairs})

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "pairs": self.pairs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.settings: Settings = state["settings"]
        self.pairs: bool = state["pairs"]
        self._lock = threading.Lock()
        self._shape: tuple[int, ...] | None = None
        self._ready: tuple[Loaded, Explainer, list[int] | None, int] | None = None

    @property
    def loaded(self) -> Loaded:
        """The model with what feeds it."""
        return self._prepared()[0]

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """One row per item and target, by column; an item that fails has one row with an `error`, and nothing is raised.

        Args:
            batch: "item" (or "path"): names; "image" (or "bytes", as `ray.data.read_binary_files` calls it): the bytes of
                files, PIL images (of several frames the one they are at) or arrays [H, W, 3] of uint8; or "text": strings.
                Without these, items are paths. "pair": the text that goes with each.

        Returns:
            The columns that `fastrel batch` writes, of `fastrel.batch.row.Row`: "map" [N, gh, gw] float32, or (texts) lists of
            "relevance" and "tokens". Where there is an error, maps and logits are NaN or empty and targets -1.

        Raises:
            InputError: the batch has none of these columns.
        """
        names, given = _items(batch)
        try:
            shape = self.shape()
            rows = self.rows_of(names, given)
        except Exception as error:  # the model itself; every row says so
            return _columns([Row(name, error=reason(error)) for name in names], None)
        return _columns(rows, shape)

    def rows_of(self, names: Sequence[str], contents: Sequence[Any] | None = None) -> list[Row]:
        """The rows of items by name, whose contents are given or (None) in files of these names.

        Raises:
            InputError: the model cannot be loaded.
            CaptureError: the model cannot be captured.
            UnsupportedModelError: the model cannot be explained.
        """
        loaded = self.loaded
        return self.rows([_decode(name, None if contents is None else contents[i], loaded) for i, name in enumerate(names)])

    def moved(self, items: Sequence[Decoded]) -> Batch | None:
        """The samples of a batch on the model's device; None if they make no batch. For `rows`, beforehand."""
        samples = [sample for item in items for sample in item.samples]
        try:
            return self.loaded.inputs(samples) if samples else None
        except Exception:  # whose fault it is will be seen when they are explained one by one
            return None

    def rows(self, items: Sequence[Decoded], moved: Batch | None = None, noise: bool = False) -> list[Row]:
        """The rows of a batch.

        A batch that fails is tried one by one, so that nothing but what is wrong fails.

        Args:
            items: what `fastrel.batch.decoding.decode` made of them.
            moved: what `moved` gave for these items.
            noise: measure the noise floor of every map, which takes three times as long.

        Raises:
            InputError: the model cannot be loaded.
            CaptureError: the model cannot be captured.
            UnsupportedModelError: the model cannot be explained.
        """
        self._prepared()
        places = [(item, window) for item in items for window in range(len(item.samples))]
        try:
            made = self._explained(places, moved, noise)
        except (CaptureError, UnsupportedModelError):
            raise
        except Exception:
            made = [rows for place in places for rows in self._one(place, noise)]
        following, rows = iter(made), []
        for item in items:
            if item.error is not None or not item.samples:
                rows.append(Row(item.item, item.sha256, notes=item.notes, error=item.error or _NOTHING))
            for _ in item.samples:
                rows += next(following)
        return rows

    def shape(self) -> tuple[int, ...] | None:
        """That of this model's maps over pictures, None if they are not; explains noise, so that what cannot work fails now."""
        loaded = self.loaded
        if loaded.kind not in ("image", "multimodal"):
            return None
        if self._shape is not None:
            return self._shape
        noise: Any = pictures.noise() if loaded.kind == "image" else (pictures.noise(), "a text")
        (row, *_) = self._explained([(Decoded("noise", samples=loaded.reader(noise)), 0)])[0]
        self._shape = None if row.map is None else row.map.shape
        return self._shape

    def _one(self, place: tuple[Decoded, int], noise: bool) -> list[list[Row]]:
        item, window = place
        try:
            return self._explained([place], None, noise)
        except Exception as error:
            return [[Row(item.item, item.sha256, window, notes=item.notes, error=reason(error))]]

    def _explained(
        self, places: Sequence[tuple[Decoded, int]], moved: Batch | None = None, noise: bool = False
    ) -> list[list[Row]]:
        """The rows of every sample."""
        if not places:
            return []
        loaded, explainer, classes, highest = self._prepared()
        samples = [item.samples[window] for item, window in places]
        args, kwargs = loaded.arguments(loaded.inputs(samples) if moved is None else moved)
        prediction = explainer.predict(*args, **kwargs)
        if loaded.kind == "multimodal":
            return self._of_pairs(places, samples, prediction, noise)
        logits = prediction.logits
        if logits.dim() != 2:
            raise UnsupportedModelError(f"logits of shape {tuple(logits.shape)}, not [B, C]; these take a loop of your own")
        if classes is None:
            targets = logits.topk(min(highest, logits.shape[1])).indices
        else:
            targets = torch.tensor(classes, device=logits.device).expand(len(logits), -1)
        explanation = prediction.explain(targets)
        grid = None if explanation.grid is None else explanation.grid.float().cpu().numpy()
        relevance = explanation.relevance.float().cpu().numpy()
        made = self._rows(places, samples, logits.float().cpu(), targets.cpu(), relevance, grid)
        if noise:
            for own, floors in zip(made, prediction.noise_of(explanation.maps, targets, _DRAWS).tolist(), strict=True):
                for row, floor in zip(own, floors, strict=True):
                    row.noise = floor
        return made

    def _of_pairs(
        self, places: Sequence[tuple[Decoded, int]], samples: Sequence[Sample], prediction: Prediction, noise: bool
    ) -> list[list[Row]]:
        """The rows of pictures with texts: how well both fit, the picture's map and the words'."""
        name, score = score_of(prediction.output)
        explanation = prediction.explain(score)
        values = score(prediction.output).float().cpu().numpy()
        picture = next((one.grid for one in explanation.maps.values() if one.grid is not None), None)
        words = explanation.maps.get("input_ids")
        if picture is None or words is None:
            raise UnsupportedModelError(f"its maps are of {', '.join(explanation.maps)}, not of a picture and input_ids")
        found = []
        for b, (item, window) in enumerate(places):
            tokens = self.loaded.reader.tokens(samples[b])
            row = Row(item.item, item.sha256, window, target=0, target_name=name, logit=float(values[b]), predicted=0)
            row.map, row.tokens = picture[b].float().cpu().numpy(), tokens
            row.relevance = words.relevance[b, : len(tokens)].float().cpu().numpy()
            row.logits, row.notes = values[b : b + 1], item.notes
            found.append([row])
        if noise:
            for (row,), floor in zip(found, prediction.noise_of(explanation.maps, score, _DRAWS).tolist(), strict=True):
                row.noise = floor
        return found

    def _rows(
        self,
        places: Sequence[tuple[Decoded, int]],
        samples: Sequence[Sample],
        logits: Tensor,
        targets: Tensor,
        relevance: np.ndarray,
        grid: np.ndarray | None,
    ) -> list[list[Row]]:
        loaded = self.loaded
        chances = None
        if loaded.probabilities is not None:
            chances = logits.softmax(1) if loaded.probabilities == "softmax" else logits.sigmoid()
        names = loaded.class_names
        found = []
        for b, (item, window) in enumerate(places):
            ids = samples[b].get("input_ids")
            tokens = None if ids is None else loaded.reader.tokens(ids.tolist())
            predicted = int(logits[b].argmax())
            found.append(
                [
                    Row(
                        item.item,
                        item.sha256,
                        window,
                        target=c,
                        target_name=names[c] if c < len(names) else str(c),
                        logit=float(logits[b, c]),
                        probability=None if chances is None else float(chances[b, c]),
                        predicted=predicted,
                        map=None if grid is None else grid[b, k],
                        relevance=relevance[b, k] if tokens is None else relevance[b, k, : len(tokens)],
                        tokens=tokens,
                        logits=logits[b].numpy(),
                        notes=item.notes,
                    )
                    for k, c in enumerate(targets[b].tolist())
                ]
            )
        return found

    def _prepared(self) -> tuple[Loaded, Explainer, list[int] | None, int]:
        with self._lock:
            if self._ready is None:
                settings = self.settings
                highest = count_of_highest(settings.target)
                loaded = settings.load(pairs=self.pairs)
                classes = None if highest else [loaded.class_index(word) for word in settings.target or ()]
                self._ready = loaded, settings.explainer(loaded), classes, highest or 0
        return self._ready


#: Columns of a batch that name its items, and that hold them.
_NAMES, _CONTENTS = ("item", "path"), ("image", "bytes", "text")


def _items(batch: Mapping[str, Sequence[Any]]) -> tuple[list[str], Sequence[Any] | None]:
    """The names of a batch's items, and their contents unless these are in files."""
    if not isinstance(batch, Mapping) or not {*_NAMES, *_CONTENTS} & {*batch}:
        held = f"columns {', '.join(map(str, batch)) or 'none'}" if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(f"a batch of {held} holds no items: name one of its columns {', '.join((*_NAMES, *_CONTENTS))}")
    given = next((batch[name] for name in _CONTENTS if name in batch), None)
    items = next((batch[name] for name in _NAMES if name in batch), None)
    items = range(len(given)) if items is None and given is not None else items
    if items is None or isinstance(items, (str, bytes)) or (given is not None and len(given) != len(items)):
        raise InputError(f"items {items!r:.80} must be a list of names, as many as there are contents")
    if "pair" in batch:
        first = list(items) if given is None else given
        if len(batch["pair"]) != len(first):
            raise InputError(f"{len(batch['pair'])} texts in pair for {len(first)} items")
        given = [(one, str(other)) for one, other in zip(first, batch["pair"], strict=True)]
    return [str(name) for name in items], given


def _decode(name: str, content: Any, loaded: Loaded) -> Decoded:
    if isinstance(content, (np.ndarray, Image.Image)):
        try:
            if isinstance(content, np.ndarray):
                if content.dtype != np.uint8 or content.ndim not in (2, 3):
                    raise InputError(f"an array {content.shape} of {content.dtype} is no picture; [H, W, 3] of uint8 is")
                content = Image.fromarray(content)
            picture = pictures.seen(content)
            return Decoded(name, samples=loaded.reader(picture.image), notes=picture.notes)
        except Exception as error:  # whatever is no picture
            return Decoded(name, error=reason(error))
    where: Any = File(name) if content is None else Value(content)
    if isinstance(content, tuple):
        first, second = content
        where = Pair(
            Value(first) if isinstance(first, (str, bytes)) and loaded.kind != "multimodal" else _picture(first), second
        )
    return decode(Item(name, where), loaded.reader, loaded.kind)


def _picture(given: Any) -> File | Value:
    """A picture by path or as the bytes of a file."""
    return Value(given) if isinstance(given, bytes) else File(str(given))


def _columns(rows: Sequence[Row], shape: tuple[int, ...] | None) -> dict[str, Any]:
    """Columns of one type each, whatever failed: what Arrow and Ray make blocks of."""
    columns: dict[str, Any] = {
        name: [getattr(row, name) for row in rows] for name in ("item", "sha256", "target_name", "error")
    }
    for name, missing, kind in (
        ("window", 0, np.int64),
        ("target", -1, np.int64),
        ("predicted", -1, np.int64),
        ("logit", np.nan, np.float32),
        ("probability", np.nan, np.float32),
    ):
        found = [getattr(row, name) for row in rows]
        columns[name] = np.array([missing if value is None else value for value in found], kind)
    if shape is None or any(row.tokens is not None for row in rows):
        nothing = np.zeros(0, np.float32)
        columns["relevance"] = [nothing if row.relevance is None else row.relevance for row in rows]
        columns["tokens"] = [row.tokens or [] for row in rows]
    if shape is not None:
        maps = [np.full(shape, np.nan, np.float32) if row.map is None else row.map for row in rows]
        columns["map"] = np.stack(maps).astype(np.float32) if maps else np.zeros((0, *shape), np.float32)
    columns["notes"] = [list(row.notes) for row in rows]
    return columns
