"""Which reading of the blocks' maps finds what people mark?

    python -m studies.readings [SUBJECT …] [--readings NAME …] [--half WHICH]     SUBJECT: clip | mosaics | sst | movies; default: all

It explains every item once and keeps what all readings are made of: per block E_h[(∇A ⊙ R)⁺], E_h[(∇A ⊙ A)⁺] [T, T], E_h of ∇A⁺
and of A per token [T], in studies/results/readings/SUBJECT, one file per item. It goes on where it was interrupted. Then it
prints the scores of every reading (studies/blends.py) over one half of the items: `development`, or `held-out`, for which a choice
must have been made; or over `both`. Holm's correction is for all tests printed. About 40 minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastrel
from fastrel import data, metrics, models
from fastrel.data import ImageItem, TextItem
from fastrel.evaluation import ImageSubject, TextSubject
from fastrel.evaluation.store import Score
from fastrel.evaluation.summary import Row, holm, summarise
from fastrel.methods import AllMaps, Method
from fastrel.trace import BlockTrace
from fastrel.transform.method import Chain
from studies.blends import READINGS, Blocks
from studies.pooling import ratio, share
from tests.real_models import SHARED

RESULTS = Path(__file__).parent / "results" / "readings"
SUBJECTS = {
    "clip": (f"coco:{SHARED}/data/coco_masks", "real_models:clip_imagenet"),
    "mosaics": ("mosaics", None),
    "sst": (f"sst:{SHARED}/data/sst/trees_dev.txt.gz", "real_models:minilm_sst2"),
    "movies": (f"eraser:{SHARED}/data/eraser_movies/val.jsonl.gz", "real_models:minilm_sst2"),
}
LIMITS = {"clip": None, "mosaics": 300, "sst": 400, "movies": 60}
HALVES = {"development": slice(0, None, 2), "held-out": slice(1, None, 2), "both": slice(None)}
#: The default, whose gradient lane follows AttnLRP's rules.
FROZEN = Method("frozen", "", "", cost="5", reading=Chain("gradient_relevance"), attnlrp=True)


def attention_maps(explainer: fastrel.Explainer, args: Any, kwargs: Any) -> list[Tensor]:
    """A of every block [h, T, T] of one sample, all queries."""
    found: list[Tensor] = []

    def keep(read: Tensor, maps: list[Tensor]) -> Tensor:
        found.extend(m[0] for m in maps)
        return read

    explainer.using(Method("keep", "", "", cost="1", reading=AllMaps(keep)))(*args, **kwargs)
    return found


def square(m: Tensor, tokens: int) -> np.ndarray:
    """A map of the first queries [Tq, Tk] with zeros for the others."""
    out = np.zeros((tokens, tokens), np.float32)
    out[: m.shape[0]] = m.numpy()
    return out


def blocks(explainer: fastrel.Explainer, args: Any, kwargs: Any, target: int) -> Blocks:
    """What every reading is made of, [L, T, T] or [L, T]."""
    traced = explainer.trace(*args, **kwargs, target=target)
    frozen = explainer.using(FROZEN).trace(*args, **kwargs, target=target)
    attention = attention_maps(explainer, args, kwargs)
    tokens = attention[0].shape[-1]

    def positive(one: Tensor, other: Tensor) -> np.ndarray:
        return square((one * other)[0, 0].clamp(min=0).mean(0), tokens)

    return Blocks(
        relevance=np.stack([positive(b.gradient, b.relevance) for b in traced]),
        attention=np.stack([positive(b.gradient, b.attention[None]) for b in traced]),
        frozen=np.stack([positive(b.gradient, b.relevance) for b in frozen]),
        gradient=np.stack([b.gradient[0, 0].clamp(min=0).mean(0).sum(0).numpy() / tokens for b in traced]),
        received=np.stack([m.mean((0, 1)).numpy() for m in attention]),
        read=np.stack([b.attention[0].mean((0, 1)).numpy() for b in traced]),
        shares=np.stack([_padded(shares(b), tokens) for b in frozen]),
        came=np.stack([_padded(s, tokens) for s in came(frozen)]),
    )


def shares(block: BlockTrace) -> Tensor:
    """Each query's share of the block's relevance times its share of |∇A|, [Tq]."""
    assert block.relevance is not None
    assert block.gradient is not None
    return (share(block.relevance[0].sum(1)) * share(block.gradient[0].abs().sum(1)))[0]


def came(traced: Sequence[BlockTrace]) -> list[Tensor]:
    """The share of each query's relevance, behind the residual add, that came by attention, [Tq] per block."""
    found = []
    for block in traced:
        assert block.relevance is not None
        assert block.input_relevance is not None
        relevance = block.relevance[0, 0].sum(0)
        by_attention = relevance.sum(-1)
        # What a block reads is what it carried to its columns, and what passed it by the residual connection.
        past = (block.input_relevance[0, 0].sum(-1) - relevance.sum(0))[: len(by_attention)].clamp(min=0)
        found.append(ratio(by_attention, by_attention + past))
    return found


def _padded(row: Tensor, tokens: int) -> np.ndarray:
    return np.pad(row.numpy(), (0, tokens - len(row)))


def items_of(subject: str, limit: int | None) -> tuple[Any, list[Any]]:
    """The subject and its items, a random `limit` of them."""
    spec, name = SUBJECTS[subject]
    loaded = models.load(name)
    items = data.read(spec, loaded.class_names)
    chosen = np.random.default_rng(0).permutation(len(items))[:limit]
    return (ImageSubject if loaded.kind == "image" else TextSubject)(loaded), [items[i] for i in sorted(chosen)]


def file_of(subject: str, item: ImageItem | TextItem) -> Path:
    return RESULTS / subject / (item.name.replace("/", "_") + ".npz")


def collect(subject: str, limit: int | None) -> None:
    """Keep what readings are made of, for every item that has none yet."""
    (RESULTS / subject).mkdir(parents=True, exist_ok=True)
    own, items = items_of(subject, limit)
    explainer = fastrel.Explainer(own.loaded.model, "transformer_attribution")
    for number, item in enumerate(items):
        path = file_of(subject, item)
        if path.exists():
            continue
        sample, words = own.read(item)
        args, kwargs = own.loaded.arguments(own.loaded.inputs([sample]))
        if isinstance(item, TextItem):
            target = item.label
        else:
            logits = own.logits(own.loaded.inputs([sample])["x"] if not args else args[0])[0]
            target = max(item.classes, key=lambda c: float(logits[c]))
        found = blocks(explainer, args, kwargs, target)
        part = path.with_suffix(".part.npz")
        words = words if isinstance(item, TextItem) else ()
        np.savez(part, words=np.array([-1 if w is None else w for w in words]), **found._asdict())
        part.rename(path)
        print(f"{number + 1}/{len(items)} {item.name}", file=sys.stderr, flush=True)


def image_scores(
    own: ImageSubject, item: ImageItem, kept: Any, readings: dict[str, np.ndarray]
) -> Iterator[tuple[str, str, float]]:
    picture = item.picture()
    mask = own.mask(item, (picture.height, picture.width))
    if mask is None or not mask.any():
        return
    for name, row in readings.items():
        side = round((len(row) - 1) ** 0.5)
        heat = torch.from_numpy(row[1:]).reshape(1, side, side)
        found = metrics.segmentation(heat, mask[None])
        yield name, "pointing", float(metrics.pointing_game(heat, mask[None])[0])
        yield name, "energy", float(metrics.energy_inside(heat, mask[None])[0])
        yield name, "energy above the mean", float(metrics.energy_inside(heat - heat.mean(), mask[None])[0])
        yield name, "mAP", float(found.mean_ap[0])
        yield name, "mIoU", float(found.mean_iou[0])


def text_scores(
    own: TextSubject, item: TextItem, kept: Any, readings: dict[str, np.ndarray]
) -> Iterator[tuple[str, str, float]]:
    for name, row in readings.items():
        best = np.full(len(item.words), row.min())
        for token, word in enumerate(kept["words"]):
            if word >= 0:
                best[word] = max(best[word], row[token])
        yield name, "average precision", metrics.average_precision(best, item.rationale)


def half(groups: Sequence[str], which: str) -> set[str]:
    """Every other group in a random order (items of one picture stay together), or all."""
    names = sorted(set(groups))
    order = np.random.default_rng(1).permutation(len(names))
    return {names[i] for i in order[HALVES[which]]}


def scores(subject: str, limit: int | None, which: str, names: Sequence[str]) -> list[Score]:
    """The scores of readings over a half of the items."""
    own, items = items_of(subject, limit)
    inside = half([item.group for item in items], which)
    score: Callable[..., Iterator[tuple[str, str, float]]] = image_scores if isinstance(own, ImageSubject) else text_scores
    found = []
    for item in items:
        if item.group not in inside:
            continue
        with np.load(file_of(subject, item)) as kept:
            given = Blocks(**{name: kept[name].astype(np.float64) for name in Blocks._fields})
            readings = {name: READINGS[name](given) for name in names}
            for name, metric, value in score(own, item, kept, readings):
                found.append(Score(item.name, item.group, name, "study", metric, value))
    return found


def table(subject: str, rows: Sequence[Row]) -> str:
    """A line per reading: mean, its 95 % interval, and p before and after correction."""
    columns = list(dict.fromkeys(row.metric for row in rows))
    found = {(row.configuration, row.metric): row for row in rows}
    lines = [
        f"**{subject}**, {rows[0].groups} pictures or texts",
        "",
        f"| reading | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in dict.fromkeys(row.configuration for row in rows):
        lines.append(f"| {name} | {' | '.join(_cell(found[name, metric]) for metric in columns)} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    tested = "" if np.isnan(row.p) else f" (p {row.p:.4f}, corrected {row.corrected:.3f})"
    return f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]{tested}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", default=list(SUBJECTS))
    parser.add_argument(
        "--readings", nargs="+", default=list(READINGS), metavar="NAME", help="the first is compared with the others"
    )
    parser.add_argument("--half", choices=HALVES, default="development")
    given = parser.parse_args()
    tables = []
    for subject in given.subjects:
        collect(subject, LIMITS[subject])
        tables.append(summarise(scores(subject, LIMITS[subject], given.half, given.readings), given.readings))
    corrected = iter(holm([row.p for rows in tables for row in rows]))
    for subject, rows in zip(given.subjects, tables, strict=True):
        print(table(subject, [row._replace(corrected=next(corrected)) for row in rows]), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
