"""The row of the rollout: one row of C = Ā_1 · Ā_2 …, eq. (14), followed from the head down, block by block.

A row is what it would be at a value if all of the explanation went through there; it is handed back unchanged by whatever
leaves tokens where they are. At a sum its operands both get it, and where their ways meet again it counts once: what a residual
connection, a parallel branch, a gate, or a norm that is written out (x minus its mean) adds up to is the identity. An attention
block turns its operand's r into r M; since the other operand of its residual sum still holds r, they make r (I + M).
Where ways do not meet again, as in a model of two texts, each takes a share by its relevance: the parts add up to the whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fastrel.errors import UnsupportedModelError
from fastrel.transform.lanes import Branch, Lane, Part, Path, Row

aten = torch.ops.aten

#: Emits a call in the reverse graph.
Emit = Callable[..., fx.Node]

#: In how many parts a row is followed. Where streams exchange what their blocks add, at every block anew (CoaT's three scales, TNT),
#: the ways by which a row comes are two to four times as many at each. A row is divided among them then and there: r (I + M) is linear
#: in r, so that it is the same as dividing it in the end. Where blocks normalise rows, or r M takes the place of r, all ways are
#: followed, up to a number for which there is time.
MOST_PARTS, MOST_OTHERS = 16, 4096


@dataclass(frozen=True)
class Sum:
    """Adds up lanes of one value [K, …], whose samples lie along dimension `batch`; `inner`: there, after all tokens of a dimension
    that they share."""

    added: Callable[[Sequence[Lane]], Lane]
    batch: int = 0
    inner: bool = False

    def __call__(self, lanes: Sequence[Lane]) -> Lane:
        """Their sum."""
        return self.added(lanes)


@dataclass(frozen=True)
class _Fork:
    """A sum: how many operands take part, and the share of each, [K, B], if it is not the same for all.

    `streams`: each operand is a stream of tokens with attention blocks of its own, which divide the row among them; else the
    operands are what a block adds up to, such as a residual connection and its branch.
    """

    operands: int
    shares: tuple[fx.Node, ...] | None
    streams: bool


@dataclass
class Rollout:
    """Keeps book of forks, and of the ways that end in an attention block; `linear`: whether these make r (I + M) of a row."""

    emit: Emit
    linear: bool
    _forks: list[_Fork] = field(default_factory=list)
    _by_path: dict[Path, list[int]] = field(default_factory=lambda: defaultdict(list))
    _gone: set[Path] = field(default_factory=set)
    _replaced: set[Path] = field(default_factory=set)

    def seed(self, node: fx.Node) -> Row:
        """The row at an output of the model."""
        return Row({(): Part(Lane(node))})

    def fork(self, row: Row, operands: int, shares: tuple[fx.Node, ...] | None = None, streams: bool = False) -> list[Row]:
        """The row for each operand of a sum, be it of streams or of what a block adds up to.

        `shares` [K, B] each: by how much of the row each is charged where they do not meet again; None: equal parts.
        """
        if operands == 1:
            return [row]
        number = len(self._forks)
        self._forks.append(_Fork(operands, shares, streams))
        for path in row.parts:
            self._by_path[path].append(number)
        return [Row({(*path, Branch(number, i)): part for path, part in row.parts.items()}) for i in range(operands)]

    def merge(self, rows: Sequence[Row], add: Sum) -> tuple[Row, bool]:
        """Rows that meet at one value, and whether an attention block's own row and its residual connection's are among them.

        Raises:
            UnsupportedModelError: rows that blocks normalise or replace come by too many ways.
        """
        found: dict[Path, list[Part]] = defaultdict(list)
        for row in rows:
            for path, part in row.parts.items():
                found[path].append(part)
        parts = {path: self._added(several, add) for path, several in found.items()}
        met = False
        for path in sorted(parts, key=len, reverse=True):
            while path and path in parts and (children := self._complete(path, parts)) is not None:
                fork, path = path[-1].fork, path[:-1]
                met = (
                    met
                    or len(children) < self._forks[fork].operands
                    or any(part.settled > len(path) for part in children.values())
                )
                for i in range(self._forks[fork].operands):
                    parts.pop((*path, Branch(fork, i)), None)
                one = self._folded(fork, path, children, add)
                if one.settled and not one.lane:
                    # Nothing is left that could carry this to where the other operands are met.
                    self._gone.add(path)
                    self._replaced.add(path)
                before = [parts[path]] if path in parts else []
                parts[path] = self._added([*before, one], add)
        row = Row(parts)
        if len(parts) > (MOST_PARTS if self.linear else MOST_OTHERS):
            if not self.linear:
                raise UnsupportedModelError(
                    f"the streams of this model exchange what their blocks add, so that its rows come by more than {MOST_OTHERS} ways; "
                    "choose a larger start_layer, or frozen_attribution, whose rows need not be followed by each of them"
                )
            row = self._divided(row, add)
        return row, met

    def whole(self, row: Row, add: Sum) -> Lane:
        """All of the row in one lane, as if the ways that it came were the only ones (but for streams that it is not all of)."""
        return self._gathered(row.parts, (), add, shared=False, stream=self.stream(row)) or self._nothing()

    def share(self, row: Row, add: Sum) -> Lane:
        """The row in one lane, without what goes other ways that do not meet this one."""
        return self._gathered(row.parts, (), add, shared=True) or self._nothing()

    def _divided(self, row: Row, add: Sum) -> Row:
        """The row in one part, by the way that all its parts have in common."""
        at = next(iter(row.parts))
        while any(path[: len(at)] != at for path in row.parts):
            at = at[:-1]
        return Row({at: Part(self._gathered(row.parts, at, add, shared=True) or self._nothing())})

    def end(self, row: Row, replaced: bool = False) -> None:
        """An attention block takes the row and gives back r M: what else it came by leads no further, but for its stream.

        `replaced`: r M takes the place of I, and of all that comes by the other operands of the same sums.
        """
        ended = [path for path in row.parts if path != self._stream(path)]
        self._gone.update(ended)
        self._replaced.update(ended if replaced else ())

    def stream(self, row: Row) -> Path:
        """The streams that all parts of a row came by: where the r M that an attention block makes of it belongs."""
        paths = {self._stream(path) for path in row.parts}
        return paths.pop() if len(paths) == 1 else ()

    def shares(self, path: Path) -> list[fx.Node]:
        """By how much of the row each operand on a path is charged, [K, B], where that is not the same for all of a sum."""
        forks = ((self._forks[branch.fork].shares, branch.operand) for branch in path)
        return [shares[operand] for shares, operand in forks if shares is not None]

    def _stream(self, path: Path) -> Path:
        return tuple(branch for branch in path if self._forks[branch.fork].streams)

    @staticmethod
    def _nothing() -> Lane:
        raise ValueError("a row without any part")

    def _added(self, parts: Sequence[Part], add: Sum) -> Part:
        lanes = [part.lane for part in parts if part.lane]
        return Part(add(lanes) if lanes else None, max(part.settled for part in parts))

    def _complete(self, path: Path, parts: dict[Path, Part]) -> dict[int, Part] | None:
        """The parts that came by the operands of the sum that `path` came by last, if all are here or lead nowhere else.

        Where only some tokens of an operand went into an attention block (a class token) and the others come by, an operand that
        comes whole stands for all.
        """
        fork, before = path[-1].fork, path[:-1]
        children: dict[int, Part] = {}
        pieces: dict[int, Part] = {}
        for i in range(self._forks[fork].operands):
            child = (*before, Branch(fork, i))
            if child in self._replaced:
                children[i] = Part(None, settled=len(child))
            elif child in parts:
                (pieces if child in self._gone and parts[child].settled < len(child) else children)[i] = parts[child]
            elif not self._closed(child):
                return None
        return children or pieces

    def _closed(self, path: Path) -> bool:
        """Whether what came by a path has ended in attention blocks."""
        if path in self._gone:
            return True
        forks = self._by_path.get(path, [])
        return bool(forks) and all(
            self._closed((*path, Branch(fork, i))) for fork in forks for i in range(self._forks[fork].operands)
        )

    def _folded(self, fork: int, path: Path, children: dict[int, Part], add: Sum) -> Part:
        """What came by all operands of a sum is the row of the sum, which came by `path`: once."""
        settled = {i: part for i, part in children.items() if part.settled > len(path)}
        chosen = settled or children
        lanes = {i: part.lane for i, part in chosen.items() if part.lane}
        lane = self._mean(fork, lanes, list(lanes), add) if lanes else None
        outermost = path == self._stream(path)
        return Part(lane, 0 if outermost else min(len(path), max(part.settled for part in chosen.values())))

    def _mean(self, fork: int, lanes: dict[int, Lane], among: Sequence[int], add: Sum) -> Lane:
        """Lanes of some operands, each by its share among the operands `among`."""
        shares, values = self._forks[fork].shares, list(lanes.values())
        if len(lanes) == len(among) and len(set(values)) == 1:
            return values[0]
        if shares is None:
            return Lane(self.emit(aten.div.Tensor, _dense(add(values)), len(among)))
        given = [*(shares[i] for i in lanes), *(shares[i] for i in among)]
        return Lane(self.emit(weighted, len(values), add.batch, add.inner, *map(_dense, values), *given))

    def _gathered(self, parts: dict[Path, Part], at: Path, add: Sum, shared: bool, stream: Path = ()) -> Lane | None:
        """The parts below a path as one lane; `shared`: less what came by operands that are not here, which streams always are
        but those of `stream`."""
        here = parts.get(at)
        lanes = [here.lane] if here and here.lane else []
        below = [path for path in parts if len(path) > len(at) and path[: len(at)] == at]
        for fork in dict.fromkeys(path[len(at)].fork for path in below):
            branches = [Branch(fork, i) for i in range(self._forks[fork].operands)]
            found = {
                branch.operand: lane
                for branch in branches
                if any(path[len(at)] == branch for path in below)
                and (lane := self._gathered(parts, (*at, branch), add, shared, stream))
            }
            less = shared or (self._forks[fork].streams and not any(branch in stream for branch in branches))
            open_ = [b.operand for b in branches if b.operand in found or (less and not self._closed((*at, b)))]
            if found:
                lanes.append(self._mean(fork, found, open_, add))
        return add(lanes) if lanes else None


def _dense(lane: Lane) -> fx.Node:
    if lane.rows is not None:
        raise ValueError("rows of the rollout are dense")
    return lane.node


def weighted(count: int, batch: int, inner: bool, *given: Tensor) -> Tensor:
    """`count` lanes [K, …, B, …], a share [K, B] of each, and the shares of all operands that count: their sum by these."""
    lanes, shares, among = given[:count], torch.stack(given[count : 2 * count]), torch.stack(given[2 * count :])
    total = among.sum(0)
    shares = torch.where(total > 0, shares / torch.where(total > 0, total, 1.0), 1.0 / len(among))
    result = torch.zeros_like(lanes[0])
    for lane, share in zip(lanes, shares, strict=True):
        result = result + times_samples(lane, share, batch, inner)
    return result


def times_samples(lane: Tensor, factors: Tensor, batch: int, inner: bool) -> Tensor:
    """A lane [K, …, B·windows, …], samples along dimension `batch`, times a factor of each sample [K, B]."""
    windows = lane.shape[batch + 1] // factors.shape[1]
    if windows != 1:  # those of one sample are neighbours, unless they share a dimension in which samples come last
        factors = factors.repeat(1, windows) if inner else factors.repeat_interleave(windows, 1)
    return lane * factors.reshape(len(factors), *([1] * batch), -1, *([1] * (lane.dim() - batch - 2)))


def operand_shares(*rel: Tensor) -> tuple[Tensor, ...]:
    """Relevance [K, B, …] of the operands of a sum -> the share of each, [K, B], of absolute sums; equal where all are 0."""
    sums = torch.stack([x.reshape(*x.shape[:2], -1).sum(2).abs() for x in rel])
    total = sums.sum(0)
    return tuple(torch.where(total > 0, sums / torch.where(total > 0, total, 1.0), 1.0 / len(rel)).unbind(0))


def settled_share(lane: Tensor, whole: Tensor, kept: Tensor) -> Tensor:
    """A part of a row [K, B, …], as much of it as normalisation kept of the whole."""
    return lane * torch.where(whole != 0, kept / torch.where(whole != 0, whole, 1.0), 0.0)
