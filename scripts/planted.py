"""Evidence planted into a model: is it where the map is highest?

One of two things is put somewhere into an input of noise: one of two words, a square of one of two patterns, a low or a high tone.
A small model (of Hugging Face's) learns in a few seconds to tell which; what is explained is one answer against the other, and
only the place tells. A large one (of timm's) stays untrained: explained is the direction in which the thing moves its answer, on a
background of nearly nothing, so that nothing else speaks for it. The map must be highest there. Where a text is read (its first and
last token) keeps a share of every map, and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo import Case

import fastrel

#: Cells of a picture, along each side; pieces of a series.
CELLS, PIECES = 4, 8

#: Training: steps at most, samples of each, samples that are explained.
STEPS, BATCH, EXPLAINED = 400, 32, 8

#: Methods that are tried beside the default.
OTHERS = ("transformer_attribution", "attnlrp")

#: Larger pictures take too long to learn from.
LEARNT = 64

#: Integers of these names tell nothing about the text.
_BESIDE = ("mask", "type", "position", "bbox")


@dataclass
class Place:
    """One input of a model in regions: those where evidence is planted and looked for.

    noise(count, strength): samples without evidence; write(sample, region, kind): evidence of one of two kinds, in place;
    read(map): a value per region, [B, regions].
    """

    regions: list[int]
    noise: Callable[[int, float], Tensor]
    write: Callable[[Tensor, int, int], None]
    read: Callable[[fastrel.TokenMap], Tensor]

    def planted(self, count: int, strength: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Samples, the kind of evidence in each, and where, counted among `regions`."""
        x = self.noise(count, strength)
        kinds = torch.randint(2, (count,), generator=generator)
        order = torch.cat([torch.randperm(len(self.regions), generator=generator) for _ in range(count)])
        for b in range(count):
            self.write(x[b], self.regions[int(order[b])], int(kinds[b]))
        return x, kinds, order[:count]


def planted(case: Case) -> Iterator[tuple[str, str]]:
    """(map, in how many samples the default method finds the evidence) for each map of the model."""
    explainer = fastrel.Explainer(case.model)
    for name, one in explainer(**case.inputs, target=lambda out: _answer(case, out).sum(1)).maps.items():
        place = _place_of(name, case.inputs, one)
        large = (
            max((x.shape[-1] for x in case.inputs.values() if isinstance(x, Tensor) and x.dim() > 3), default=0) > LEARNT
        )
        yield name, "not tried" if place is None else (_untrained if large else _learnt)(explainer, case, name, place)


def _learnt(explainer: fastrel.Explainer, case: Case, name: str, place: Place) -> str:
    own = name.partition(" in ")[0]
    generator = torch.Generator().manual_seed(1)
    inputs = {key: _repeated(x, BATCH) for key, x in case.inputs.items()}
    parameters = [p for p in case.model.parameters() if p.is_floating_point()]
    for p in parameters:
        p.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    low = 0
    for _ in range(STEPS):
        x, kinds, _ = place.planted(BATCH, 0.3, generator)
        loss = F.cross_entropy(_two(_answer(case, case.model(**{**inputs, own: x}))), kinds)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        low = low + 1 if float(loss) < 0.02 else 0
        if low == 10:
            break
    x, kinds, where = place.planted(EXPLAINED, 0.3, generator)
    given = {key: _repeated(x, EXPLAINED) for key, x in case.inputs.items()} | {own: x}
    with torch.no_grad():
        right = _two(_answer(case, case.model(**given))).argmax(1) == kinds
    if low < 10 or not bool(right.all()):
        return "not learnt"
    sign = kinds.float() * 2 - 1
    return _hits(explainer, given, name, place, where, lambda out: _two(_answer(case, out)).diff(dim=1)[:, 0] * sign)


def _untrained(explainer: fastrel.Explainer, case: Case, name: str, place: Place) -> str:
    own, generator = name.partition(" in ")[0], torch.Generator().manual_seed(1)
    count = len(case.inputs[own])
    x, _, where = place.planted(count, 0.02, generator)
    given = case.inputs | {own: x}
    with torch.no_grad():
        before, after = (_answer(case, case.model(**{**given, own: y})) for y in (place.noise(count, 0.02), x))
    towards = after - before
    if float(towards.norm(dim=1).min()) < 1e-6:
        return "it moves nothing"
    towards = towards / towards.norm(dim=1, keepdim=True)
    return "untrained: " + _hits(explainer, given, name, place, where, lambda out: (_answer(case, out) * towards).sum(1))


def _hits(explainer: fastrel.Explainer, given: dict[str, Any], name: str, place: Place, where: Tensor, target: Any) -> str:
    def hits(how: fastrel.Explainer) -> int:
        maps = how(**given, target=target).maps
        return int((place.read(maps[name])[:, place.regions].argmax(1) == where).sum())

    def of(method: str) -> str:
        try:
            return f"{method} {hits(explainer.using(method))}"
        except fastrel.FastrelError:
            return f"{method} refused"

    return f"{hits(explainer)} of {len(where)} ({', '.join(map(of, OTHERS))})"


def _answer(case: Case, out: Any) -> Tensor:
    """What the model says, [B, C]."""
    if case.answer is not None:
        found = case.answer(out)
    elif case.target is not None:
        found = case.target(out)
    else:
        found = out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out[0]
    return found.float().reshape(len(found), -1)


def _two(answer: Tensor) -> Tensor:
    """The answer as two logits."""
    return answer[:, :2] if answer.shape[1] > 1 else torch.cat([-answer, answer], 1)


def _repeated(x: Any, samples: int) -> Any:
    return torch.cat([x] * (samples // len(x))) if isinstance(x, Tensor) and x.dim() else x


def _place_of(name: str, inputs: dict[str, Any], one: fastrel.TokenMap) -> Place | None:
    x = inputs.get(name.partition(" in ")[0])
    if not isinstance(x, Tensor) or any(word in name.partition(" in ")[0] for word in _BESIDE):
        return None
    tokens = one.relevance.shape[-1]
    if not x.is_floating_point():
        return _words(x) if x.dim() == 2 and tokens == x.shape[1] >= 3 else None
    if one.grid is not None and one.image_size is not None and x.dim() in (4, 5) and min(x.shape[-2:]) >= CELLS:
        return _cells(x)
    if x.dim() == 3 and tokens == x.shape[1]:  # features, one row per token

        def row(sample: Tensor, region: int, kind: int) -> None:
            sample[region] = 3.0 * (torch.arange(sample.shape[1]) // (kind + 1) % 2 * 2.0 - 1)

        return Place(list(range(tokens)), _noise(x), row, lambda found: found.relevance)
    return _pieces(x, one)


def _noise(x: Tensor) -> Callable[[int, float], Tensor]:
    return lambda count, strength: strength * torch.randn(count, *x.shape[1:])


def _words(x: Tensor) -> Place:
    def noise(count: int, strength: float) -> Tensor:
        return torch.cat(
            [x[:1, :1].expand(count, 1), torch.randint(5, 50, (count, x.shape[1] - 2)), x[:1, -1:].expand(count, 1)], 1
        )

    def write(sample: Tensor, region: int, kind: int) -> None:
        sample[region] = 57 + kind

    return Place(list(range(1, x.shape[1] - 1)), noise, write, lambda found: found.relevance)


def _cells(x: Tensor) -> Place:
    height, width = x.shape[-2] // CELLS, x.shape[-1] // CELLS

    def write(sample: Tensor, region: int, kind: int) -> None:
        top, left = region // CELLS * height, region % CELLS * width
        lines = torch.arange(width)[None] if kind else torch.arange(height)[:, None]
        sample[..., top : top + height, left : left + width] = 3.0 * (lines // 2 % 2 * 2.0 - 1)

    def read(found: fastrel.TokenMap) -> Tensor:
        heat = found.heatmap().float()
        return F.adaptive_avg_pool2d(heat.sum(1) if heat.dim() == 4 else heat, CELLS).flatten(1)

    return Place(list(range(CELLS * CELLS)), _noise(x), write, read)


def _pieces(x: Tensor, one: fastrel.TokenMap) -> Place | None:
    """Sound: a waveform [B, T], features [B, mel, T], or a spectrogram [B, T, mel] on a grid of bands × times."""
    time = {2: 0, 3: 0 if one.grid is not None else 1}.get(x.dim())
    if time is None:
        return None
    count = min(PIECES, one.grid.shape[-1] if one.grid is not None else PIECES)
    length = x.shape[time + 1] // count

    def write(sample: Tensor, region: int, kind: int) -> None:
        wave = 3.0 * (torch.arange(length) // (1 + 2 * kind) % 2 * 2.0 - 1)
        sample.narrow(time, region * length, length)[:] = wave if time == sample.dim() - 1 else wave[:, None]

    def read(found: fastrel.TokenMap) -> Tensor:
        over = found.relevance if found.grid is None else found.grid.sum(-2)
        return F.adaptive_avg_pool1d(over.float(), count)

    return Place(list(range(count)), _noise(x), write, read)
