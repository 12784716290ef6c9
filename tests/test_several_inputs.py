"""Models of several token sequences: each input has its own map, also where one embedding reads them all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrel
from fastrel.reference import rules
from fastrel.reference.pooling import evidence_of_entries
from tests.small import ids, made, whole


def separated(m: Any, a: Tensor, b: Tensor) -> Tensor:
    """[CLS] a [SEP] b [SEP], made inside."""
    cls, sep = torch.full_like(a[:, :1], 2), torch.full_like(a[:, :1], 3)
    return m.head(m.encoder(torch.cat((cls, a, sep, b, sep), 1))[:, 0])


def fixed(m: Any, a: Tensor, b: Tensor) -> Tensor:
    """Positions for 7 tokens, so that both inputs have that length for ever."""
    parts = [m.encoder.embed(x) + m.encoder.position[:7] for x in (a, b)]
    return m.head(m.encoder.blocks(torch.cat(parts, 1))[:, 0])


#: A model of two texts, and how many tokens it adds to the map of each.
JOINED: dict[str, tuple[Callable[..., Tensor], tuple[int, int]]] = {
    "ids joined before the embedding": (lambda m, a, b: m.head(m.encoder(torch.cat((a, b), 1))[:, 0]), (0, 0)),
    "ids joined with separators": (separated, (2, 1)),
    "embeddings joined, lengths fixed": (fixed, (0, 0)),
    "two towers of one encoder": (lambda m, a, b: m.wide(torch.cat((m.encoder(a)[:, 0], m.encoder(b)[:, 0]), -1)), (0, 0)),
}


@pytest.mark.parametrize("name", JOINED)
def test_texts_that_share_an_embedding_have_a_map_each(name: str) -> None:
    model, added = made(JOINED[name][0]), JOINED[name][1]
    first, second = ids(2, 7), ids(2, 7 if "fixed" in name else 5, seed=2)
    explainer = fastrel.Explainer(model, backend="torch")
    maps = explainer(first, second, target=1).maps
    shapes = {key: one.relevance.shape[1] for key, one in maps.items()}
    assert shapes == {"first": 7 + added[0], "second": second.shape[1] + added[1]}
    report = explainer.verify(first, second, target=1)
    assert report.ok, report
    torch.testing.assert_close(whole(model, first, second, target=1), torch.full((2,), 4.0).double())


@pytest.mark.parametrize("how", ["beside each other", "added"])
def test_two_texts_share_what_the_head_reads_by_evidence(how: str) -> None:
    """Attention gives nothing here: a map is its text's share, at the token that is read. The paper's method shares by relevance."""
    added = how == "added"

    def towers(m: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return m.encoder(a)[:, 0], m.second(b)[:, 0]

    def joined(m: Any, a: Tensor, b: Tensor) -> Tensor:
        u, v = towers(m, a, b)
        return m.head(u + v) if added else m.wide(torch.cat((u, v), -1))

    model: Any = made(joined)
    for block in (*model.encoder.blocks, *model.second.blocks):
        nn.init.zeros_(block.attention.v.weight)
        nn.init.zeros_(block.attention.v.bias)
    texts = ids(2, 7), ids(2, 5, seed=2)
    with torch.no_grad():
        u, v = towers(model, *texts)
        weight = (model.head if added else model.wide).weight
        one_hot = F.one_hot(torch.full((2,), 1), 3).double()
        rel = rules.linear(u + v if added else torch.cat((u, v), -1), weight, one_hot, "positive")
        rels = rules.add(u, v, rel, "positive") if added else rel.split(16, 1)
        grads = (weight[1], weight[1]) if added else weight[1].split(16)
        parts = [evidence_of_entries(*lanes).sum(1) for lanes in zip((u, v), grads, rels, strict=True)]
    by = {"frozen_attribution": parts, "transformer_attribution": [one.sum(1) for one in rels]}
    for method, (a, b) in by.items():
        maps = fastrel.Explainer(model, method, backend="torch")(*texts, target=1).maps
        for one, share in zip((maps["first"], maps["second"]), (a / (a + b), b / (a + b)), strict=True):
            expected = F.pad(share[:, None], (0, one.relevance.shape[1] - 1))
            torch.testing.assert_close(one.relevance, expected, rtol=1e-10, atol=1e-12)


def cosine(m: Any, a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(m.encoder(a).mean(1), m.encoder(b).mean(1))


def normalised(m: Any, a: Tensor, b: Tensor) -> Tensor:
    return (F.normalize(m.encoder(a).mean(1), dim=-1) * F.normalize(m.encoder(b).mean(1), dim=-1)).sum(-1)


@pytest.mark.slow
def test_cosine_similarity_is_a_product_of_units() -> None:
    """Also on the second path, which once took the generic rule for it."""
    first, second = ids(2, 7), ids(2, 5, seed=2)
    maps = []
    for f in (cosine, normalised):
        explainer = fastrel.Explainer(made(f), backend="torch")
        report = explainer.verify(first, second, target=lambda o: o)
        assert report.ok, report
        maps.append(explainer(first, second, target=lambda o: o).maps)
    for name in ("first", "second"):
        torch.testing.assert_close(maps[0][name].relevance, maps[1][name].relevance)


def test_ids_at_the_same_positions_are_named() -> None:
    model = made(lambda m, a, b: m.head(m.encoder.blocks(m.encoder.embed(a) + m.second.embed(b))[:, 0]))
    explainer = fastrel.Explainer(model, backend="torch")
    explanation = explainer(ids(2), ids(2, seed=2), target=1)
    assert explanation.maps["first"].beside == ("second",)
    assert "each of first and second" in str(explainer.verify(ids(2), ids(2, seed=2), target=1).maps)


class SequenceFirst(nn.Module):
    """[T, B, D] -> [B, 3], by PyTorch's default layout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(16, 2, 32), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(0))


class Texts(nn.Module):
    """Ids [T, B] -> what `read` makes of [T, B, 16], by PyTorch's default layout."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.layer, self.read = nn.Embedding(9, 16), nn.TransformerEncoderLayer(16, 2, 32), read

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids) if ids.dim() == 2 else ids
        return self.read(self.layer(x, src_key_padding_mask=mask))


class InBatch(nn.Module):
    """Two pictures, read as one batch of twice as many."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 3)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        u, v = self.layer(self.patches(torch.cat((a, b))).flatten(2).mT).mean(1).chunk(2)
        return self.head((u - v).abs())


def in_batch(m: Any, a: Tensor, b: Tensor) -> Tensor:
    return m.wide(m.encoder(torch.cat((a, b)))[:, 0].unflatten(0, (2, -1)).transpose(0, 1).flatten(1))


def choices(m: Any, a: Tensor) -> Tensor:
    return m.score(m.encoder(a.flatten(0, 1))[:, 0]).view(-1, a.shape[1])


#: What was explained as if samples lay where they do not, and what is said of it instead.
ELSEWHERE: dict[str, tuple[nn.Module, Any, str]] = {
    "sequence first": (SequenceFirst(), (torch.randn(7, 3, 16),), "samples lie along dimension 1 of input x"),
    "sequence first, as many samples as tokens": (
        SequenceFirst(),
        (torch.randn(5, 5, 16),),
        "samples lie along dimension 1",
    ),
    "sequence first, one sample": (SequenceFirst(), (torch.randn(7, 1, 16),), "1 samples however long dimension 0 of x is"),
    "texts first, with a mask": (
        Texts(lambda x: x[0]),
        (torch.ones(7, 3, dtype=torch.long), torch.zeros(3, 7, dtype=torch.bool)),
        "samples lie along dimension 1 of input ids",
    ),
    "texts first, with a mask of numbers": (
        Texts(lambda x: x[0]),
        (torch.ones(7, 3, dtype=torch.long), torch.zeros(3, 7)),
        "samples lie along dimension 1 of input ids",
    ),
    "sequence first, with a mask": (
        Texts(lambda x: x[0]),
        (torch.randn(7, 3, 16), torch.zeros(3, 7, dtype=torch.bool)),
        "attends to samples.*dimension 0 of ids",
    ),
    "texts first, an output per token": (
        Texts(lambda x: x[..., 0]),
        (torch.ones(7, 3, dtype=torch.long),),
        r"attends to samples.*dimension 0 of ids.*takes \[B, T, …\]",
    ),
    "samples first, where sequences belong": (
        Texts(lambda x: x[:, 0]),
        (torch.ones(3, 7, dtype=torch.long),),
        "attends to samples.*dimension 0 of ids",
    ),
    "two texts in the batch": (made(in_batch), (ids(2), ids(2, seed=2)), "map of first has 4 samples and the prediction 2"),
    "choices in the batch": (made(choices), (ids(8).view(2, 4, 7),), "map of first has 8 samples and the prediction 2"),
    "two pictures in the batch": (InBatch(), (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)), "joined along the batch"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_samples_that_lie_elsewhere_are_refused(name: str) -> None:
    model, given, message = ELSEWHERE[name]
    with pytest.raises(fastrel.FastrelError, match=message):
        fastrel.Explainer(model.eval(), backend="torch")(*given, target=1)


def test_maps_of_joined_texts_are_parts_of_the_map_of_one() -> None:
    """The same model that is given the joined text itself."""
    join = made(JOINED["ids joined before the embedding"][0])
    alone = made(lambda m, a: m.head(m.encoder(a)[:, 0]))
    first, second = ids(2, 7), ids(2, 5, seed=2)
    maps = fastrel.Explainer(join)(first, second, target=[[0, 1], [2, 1]]).maps
    expected = fastrel.Explainer(alone)(torch.cat((first, second), 1), target=[[0, 1], [2, 1]]).relevance
    torch.testing.assert_close(torch.cat([one.relevance for one in maps.values()], -1), expected)


#: What a model says of an anchor, a positive and a negative example, read by one encoder.
TRIPLETS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "distances": lambda a, p, n: F.pairwise_distance(a, n) - F.pairwise_distance(a, p),
    "squares": lambda a, p, n: (a - n).pow(2).sum(-1) - (a - p).pow(2).sum(-1),
    "norms": lambda a, p, n: (a - n).norm(dim=-1) - (a - p).norm(dim=-1),
    "cosines": lambda a, p, n: F.cosine_similarity(a, p) - F.cosine_similarity(a, n),
}


class Triplet(nn.Module):
    """One block of attention, mean over tokens, and what is said of three."""

    def __init__(self, said: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.said, self.embed = said, nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return self.said(*(self.layer(self.embed(x)).mean(1) for x in (anchor, positive, negative)))


@pytest.mark.parametrize("name", TRIPLETS)
def test_three_inputs_of_one_encoder_share_the_row(name: str) -> None:
    """Also where the row starts at the last block alone, which one of the three streams holds."""
    torch.manual_seed(0)
    model = Triplet(TRIPLETS[name]).double().eval()
    given = [torch.randn(3, 5, 6, dtype=torch.float64) for _ in range(3)]
    report = fastrel.Explainer(model, backend="torch").verify(*given, target=lambda out: out)
    assert report.ok, report
    assert not report.generic, report
    assert not any("not checked" in check.meaning for check in report.checks), report
    last = fastrel.Explainer(model, "raw_attention", start_layer=-1, backend="torch")(*given, target=lambda out: out)
    total = sum(one.relevance.sum(1) for one in last.maps.values())
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64))
