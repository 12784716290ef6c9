"""Do maps of trained models that pool their tokens find the word that decides, and do sums of maps tell which text decides?

    python -m studies.pooling [POOLING …] [--against]

Small models (two pre-norm blocks, 32 features) learn a planted task: of ten words one is a key, and which of two keys it is decides the
class. They differ in how tokens become one vector. In how many of 32 new texts is the key the highest word? Occlusion puts a word that
means nothing in the place of each word. Beside the methods stand candidates: other readings of what the default has of each block.
Models of two texts learn whether both keys are equal, or the key of the second text alone; how much the answer falls without each key
stands beside the sums of the two maps. About four minutes on one core.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrel
from fastrel import methods
from fastrel.methods import AllMaps
from fastrel.reference import pooling as reference

WORDS, LENGTH, FEATURES, HEADS, BLOCKS = 20, 10, 32, 4, 2
KEYS, PADDING = 2, 0  # words 1 and 2 are keys, 0 is padding, from 3 on they mean nothing
STEPS, BATCH, EXPLAINED = 250, 64, 32

METHODS = (
    "frozen_attribution",
    "transformer_attribution",
    "relevance_per_attention",
    "attnlrp",
    "gradient_attention",
    "legrad",
    "attcat",
)


class Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.qkv, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.mlp = nn.Sequential(nn.Linear(FEATURES, 2 * FEATURES), nn.GELU(), nn.Linear(2 * FEATURES, FEATURES))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(FEATURES // HEADS)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Ids [B, T] -> tokens [B, T, D], behind a class token if asked for."""

    def __init__(self, class_token: bool = False, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, FEATURES)
        self.places = nn.Parameter(torch.randn(LENGTH, FEATURES) * 0.02)
        self.token = nn.Parameter(torch.randn(1, 1, FEATURES) * 0.02) if class_token else None
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(FEATURES)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens after the last norm."""
        x = self.words(ids) + self.places
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


#: Tokens x [B, T, D], a score s [B, T, 1] of each, and the mask [B, T] -> [B, D].
Pooling = Callable[[Tensor, Tensor, Tensor], Tensor]
POOLINGS: dict[str, Pooling] = {
    "class token": lambda x, s, m: x[:, 0],
    "mean": lambda x, s, m: x.mean(1),
    "masked mean": lambda x, s, m: (x * m[..., None]).sum(1) / m.sum(1, keepdim=True),
    "adaptive_avg_pool1d": lambda x, s, m: F.adaptive_avg_pool1d(x.mT, 1).squeeze(-1),
    "mean, unit length": lambda x, s, m: F.normalize(x.mean(1), dim=-1) * 5,
    "sum, softmax weights": lambda x, s, m: (s.softmax(1) * x).sum(1),
    "bmm, softmax weights": lambda x, s, m: torch.bmm(s.softmax(1).mT, x).squeeze(1),
    "mean, sigmoid gates": lambda x, s, m: (s.sigmoid() * x).mean(1),
    "max": lambda x, s, m: x.amax(1),
    "mean of top 2": lambda x, s, m: x.topk(2, 1).values.mean(1),
    "median": lambda x, s, m: x.median(1).values,
    "logsumexp": lambda x, s, m: x.logsumexp(1),
    "root of mean square": lambda x, s, m: x.pow(2).mean(1).sqrt(),
    "standard deviation": lambda x, s, m: x.std(1),
}


class Classifier(nn.Module):
    """Two logits of pooled tokens."""

    def __init__(self, pooling: str, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.encoder, self.pool = Encoder(pooling == "class token", blocks), POOLINGS[pooling]
        self.score, self.head = nn.Linear(FEATURES, 1), nn.Linear(FEATURES, 2)
        self.masked = pooling == "masked mean"

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, 2]."""
        mask = (ids != PADDING).to(self.head.weight.dtype)
        x = self.encoder(ids, mask if self.masked else None)
        return self.head(self.pool(x, self.score(x.tanh()), mask))


class Siamese(nn.Module):
    """Two logits of two texts read by one encoder."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.encoder, self.pool = Encoder(pooling == "class token"), POOLINGS[pooling]
        self.score, self.head = nn.Linear(FEATURES, 1), nn.Linear(4 * FEATURES, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[B, T], [B, T] -> [B, 2]."""
        u, v = (self.pool(x, self.score(x.tanh()), x) for x in (self.encoder(a), self.encoder(b)))
        return self.head(torch.cat([u, v, (u - v).abs(), u * v], -1))


def texts(count: int, generator: torch.Generator, padded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [count, LENGTH], the kind of their key, and its place; `padded`: up to four words are missing at the end."""
    ids = torch.randint(1 + KEYS, WORDS, (count, LENGTH), generator=generator)
    lengths = (
        torch.randint(LENGTH - 4, LENGTH + 1, (count,), generator=generator) if padded else torch.full((count,), LENGTH)
    )
    places = (torch.rand(count, generator=generator) * lengths).long()
    kinds = torch.randint(KEYS, (count,), generator=generator)
    ids[torch.arange(count), places] = 1 + kinds
    return ids.masked_fill(torch.arange(LENGTH) >= lengths[:, None], PADDING), kinds, places


def learn(model: nn.Module, samples: Callable[[torch.Generator], tuple[tuple[Tensor, ...], Tensor]]) -> float:
    """Train on samples (inputs, classes); the last loss."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        inputs, classes = samples(generator)
        loss = F.cross_entropy(model(*inputs), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


class Lanes(NamedTuple):
    """What the default computes: the row where the head reads the last block [B, Tq]; per block, from the input, (∇A ⊙ R)⁺, R and
    |∇A| of the map, mean over heads [B, Tq, Tk], and the relevance of what it reads [B, Tk], where it is carried so far."""

    read: Tensor
    parts: list[Tensor]
    relevance: list[Tensor]
    gradient: list[Tensor]
    inputs: list[Tensor | None]


def lanes(explainer: fastrel.Explainer, args: Any, kwargs: Any, target: Any) -> Lanes:
    """The default's lanes for one target per sample."""
    found: list[Any] = []

    def keep(read: Tensor, gradients: list[Tensor], relevances: list[Tensor]) -> Tensor:
        found.extend((read[0], gradients, relevances))
        return torch.zeros_like(relevances[0][:, :, 0, 0])

    reading = AllMaps(keep, of=("gradient", "relevance"))
    method = replace(methods.METHODS["frozen_attribution"], name="lanes", reading=reading)
    traced = explainer.using(method).trace(*args, **kwargs, target=target)
    read, gradients, relevances = found
    return Lanes(
        read,
        [(g[0] * r[0]).clamp(min=0).mean(1) for g, r in zip(gradients, relevances, strict=True)],
        [r[0].mean(1) for r in relevances],
        [g[0].abs().mean(1) for g in gradients],
        [None if block.input_relevance is None else block.input_relevance[0].sum(-1) for block in traced],
    )


def chained(own: Lanes, maps: list[Tensor], keep: list[Tensor] | None = None) -> Tensor:
    """r ← keep ⊙ r + r M from the last block to the first; a block of one query is a pooling, and keeps nothing."""
    row = own.read
    for number in reversed(range(len(maps))):
        m = maps[number]
        through = torch.einsum("bi,bij->bj", row, m)
        row = through if m.shape[1] != m.shape[2] else through + row * (1 if keep is None else keep[number])
    return row


def normalised(m: Tensor) -> Tensor:
    """Rows scaled to sum 1; rows of 0 stay."""
    return ratio(m, m.sum(-1, keepdim=True))


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def of_one_query(own: Lanes) -> list[Tensor]:
    """M with each query's row as if all relevance and gradient came to it: divided by its shares of both."""
    return [ratio(m, both[..., None]) for m, both in zip(own.parts, shares(own), strict=True)]


def shares(own: Lanes) -> list[Tensor]:
    """Each query's share of a block's relevance times that of its gradient, [B, Tq]."""
    return [share(r) * share(g) for r, g in zip(own.relevance, own.gradient, strict=True)]


def share(lane: Tensor) -> Tensor:
    """The share of each query, [B, Tq]."""
    return ratio(lane.sum(-1), lane.sum((-2, -1))[:, None])


def times(own: Lanes, factors: list[Tensor]) -> Tensor:
    """r ← r (I + f M), a factor [B] for each block; a pooling, which has no I, is left as it is."""
    return chained(
        own,
        [m if m.shape[1] != m.shape[2] else m * f[:, None, None] for m, f in zip(own.parts, factors, strict=True)],
    )


def tokens(own: Lanes, power: int) -> list[Tensor]:
    """A power of the number of tokens of each block."""
    return [torch.full((len(m),), float(m.shape[2] ** power), dtype=m.dtype) for m in own.parts]


def tokens_read(own: Lanes) -> list[Tensor]:
    """Over how many tokens the row that enters the last block is spread, for each block."""
    *_, last = own.parts
    row = torch.einsum("bi,bij->bj", own.read, last) if last.shape[1] == 1 < last.shape[2] else own.read
    return [reference.tokens_read(row[None])[0]] * len(own.parts)


def by_shares(own: Lanes) -> list[Tensor]:
    """1/Σ of the products of each query's shares of a block's relevance and gradient."""
    return [ratio(torch.ones(len(both)), both.sum(-1)) for both in shares(own)]


def of_attention(own: Lanes) -> list[Tensor]:
    """The share [B, Tq] of each token's relevance, after the residual add, that came by attention: rows of R in what the next block
    reads, or in what they and what is not in its columns make. A pooling has no residual connection."""
    found = []
    for number, r in enumerate(own.relevance):
        r, reads = r * HEADS, own.inputs[number]
        came = r.sum(-1)
        if r.shape[1] != r.shape[2]:
            found.append(torch.ones_like(came))
            continue
        after = own.inputs[number + 1] if reads is None else came + (reads - r.sum(1)).clamp(min=0)
        assert after is not None
        found.append(ratio(came, after).clamp(max=1))
    return found


def conserving(own: Lanes) -> Tensor:
    """r ← r (1 − s) + (r s) M̂: M̂ with rows of sum 1, s the share of attention."""
    shares = of_attention(own)
    maps = [normalised(m) * s[..., None] for m, s in zip(own.parts, shares, strict=True)]
    kept = [1 - s * (m.sum(-1) > 0) for m, s in zip(own.parts, shares, strict=True)]
    return chained(own, maps, kept)


#: Other readings of the default's lanes.
CANDIDATES: dict[str, Callable[[Lanes], Tensor]] = {
    "once": lambda own: chained(own, own.parts),
    "N times": lambda own: times(own, tokens_read(own)),
    "T times": lambda own: times(own, tokens(own, 1)),
    "T² times": lambda own: times(own, tokens(own, 2)),
    "by shares": lambda own: times(own, by_shares(own)),
    "rows of one query": lambda own: chained(own, of_one_query(own)),
    "conserving": conserving,
    "pool alone": lambda own: (
        own.read if own.parts[-1].shape[1] > 1 else torch.einsum("bi,bij->bj", own.read, own.parts[-1])
    ),
    "rows of sum 1": lambda own: chained(own, [normalised(m) for m in own.parts]),
}


def occlusion(score: Callable[..., Tensor], ids: Tensor) -> Tensor:
    """How much a score falls when a word is replaced by one that means nothing, [B, T]."""
    with torch.no_grad():
        whole, every = score(ids), []
        for place in range(ids.shape[1]):
            other = ids.clone()
            other[:, place] = torch.where(ids[:, place] == PADDING, PADDING, WORDS - 1)
            every.append(whole - score(other))
    return torch.stack(every, 1)


def of_class(classes: Tensor, logits: Tensor) -> Tensor:
    """The answer's logit."""
    return logits.gather(1, classes[:, None])[:, 0]


def against_other(classes: Tensor, logits: Tensor) -> Tensor:
    """Less the other logit."""
    return of_class(classes, logits) - of_class(1 - classes, logits)


def hits(relevance: Tensor, places: Tensor) -> str:
    """In how many samples the key is the highest word (the last LENGTH tokens are the words)."""
    return f"{float((relevance[:, -LENGTH:].argmax(1) == places).float().mean()):.2f}"


def row_of(pooling: str, question: Callable[[Tensor, Tensor], Tensor], blocks: int = BLOCKS) -> list[str]:
    """What each method and candidate finds in a trained classifier."""
    model, (ids, classes, places) = trained(pooling, blocks)
    target = functools.partial(question, classes)
    explainer = fastrel.Explainer(model)
    cells = [hits(occlusion(lambda x: target(model(x)), ids), places)]
    for name in METHODS:
        try:
            cells.append(hits(explainer.using(name)(ids, target=target).relevance, places))
        except fastrel.FastrelError:
            cells.append("–")
    own = lanes(explainer, (ids,), {}, target)
    return cells + [hits(candidate(own), places) for candidate in CANDIDATES.values()]


def trained(pooling: str, blocks: int = BLOCKS) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """A classifier that has learnt the task, and new texts."""
    torch.manual_seed(0)
    model, padded = Classifier(pooling, blocks), pooling == "masked mean"

    def samples(generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        ids, kinds, _ = texts(BATCH, generator, padded)
        return (ids,), kinds

    learn(model, samples)
    return model, texts(EXPLAINED, torch.Generator().manual_seed(2), padded)


def two_texts(pooling: str, only_second: bool) -> list[str]:
    """How much the answer falls without the key of each text, and the sums of the maps by two methods."""
    torch.manual_seed(0)
    model = Siamese(pooling)

    def pairs(count: int, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        (a, of_a, at_a), (b, of_b, at_b) = (texts(count, generator) for _ in range(2))
        return (a, b), (at_a, at_b), of_b if only_second else (of_a == of_b).long()

    def samples(generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        inputs, _, classes = pairs(BATCH, generator)
        return inputs, classes

    learn(model, samples)
    inputs, places, classes = pairs(EXPLAINED, torch.Generator().manual_seed(2))
    target = functools.partial(against_other, classes)
    explainer = fastrel.Explainer(model)
    cells = []
    with torch.no_grad():
        whole = target(model(*inputs))
        for i, at in enumerate(places):
            other = [x.clone() for x in inputs]
            other[i][torch.arange(EXPLAINED), at] = WORDS - 1
            cells.append(f"{float((whole - target(model(*other))).mean()):.2f}")
    for name in ("frozen_attribution", "attnlrp"):
        maps = explainer.using(name)(*inputs, target=target).maps
        for key, at in zip("ab", places, strict=True):
            one = maps[key].relevance
            cells += [hits(one, at), f"{float(one.sum(1).mean()):.2f}", f"{float(one[:, -LENGTH:].sum(1).mean()):.2f}"]
    return cells


def line(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Train, explain, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("poolings", nargs="*", default=list(POOLINGS), metavar="POOLING")
    parser.add_argument("--against", action="store_true", help="ask for the answer's logit less the other one")
    given = parser.parse_args()
    question = against_other if given.against else of_class
    head = ["pooling", "occlusion", *METHODS, *CANDIDATES]
    print(f"{line(head)}\n{line(['---'] * len(head))}")
    for name in given.poolings:
        print(line([name, *row_of(name, question)]), flush=True)
    for name in given.poolings[:2]:
        print(line([f"{name}, {2 * BLOCKS} blocks", *row_of(name, question, 2 * BLOCKS)]), flush=True)
    each = [
        f"{method}, {text}: {what}"
        for method in ("default", "attnlrp")
        for text in "ab"
        for what in ("found", "sum", "sum of words")
    ]
    head = ["two texts", "falls without a's key", "without b's", *each]
    print(f"\n{line(head)}\n{line(['---'] * len(head))}")
    for pooling in ("class token", "mean"):
        for only_second in (True, False):
            name = f"{pooling}, {'only b decides' if only_second else 'whether keys are equal'}"
            print(line([name, *two_texts(pooling, only_second)]), flush=True)


if __name__ == "__main__":
    main()
