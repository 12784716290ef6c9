"""Models of several token sequences: each input has its own map, also where one embedding reads them all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrel
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


def test_maps_of_joined_texts_are_parts_of_the_map_of_one() -> None:
    """The same model that is given the joined text itself."""
    join = made(JOINED["ids joined before the embedding"][0])
    alone = made(lambda m, a: m.head(m.encoder(a)[:, 0]))
    first, second = ids(2, 7), ids(2, 5, seed=2)
    maps = fastrel.Explainer(join)(first, second, target=[[0, 1], [2, 1]]).maps
    expected = fastrel.Explainer(alone)(torch.cat((first, second), 1), target=[[0, 1], [2, 1]]).relevance
    torch.testing.assert_close(torch.cat([one.relevance for one in maps.values()], -1), expected)
