"""Streams of tokens that exchange at every block what their blocks add (CoaT's scales, TNT): ways of a row that double at each."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrel
from fastrel.transform import rollout

STREAMS = 3


class Exchange(nn.Module):
    """Three streams of tokens [B, T, 8]; each adds what the blocks of all three give. A part of that goes past the attention."""

    def __init__(self, depth: int, width: int = 8) -> None:
        super().__init__()
        self.embeds = nn.ModuleList(nn.Linear(8, width) for _ in range(STREAMS))
        self.qkvs = nn.ModuleList(nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(STREAMS)) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        streams = [embed(x) for embed in self.embeds]
        for qkvs in self.qkvs:
            added = []
            for tokens, qkv in zip(streams, qkvs, strict=True):
                q, k, v = qkv(tokens).unsqueeze(1).chunk(3, -1)
                added.append((F.scaled_dot_product_attention(q, k, v) + q * v).squeeze(1))
            a, b, c = added
            streams = [x + y for x, y in zip(streams, (a + b.roll(1, 1) + c.roll(2, 1), b + a + c, c + b + a), strict=True)]
        return self.head(torch.stack([x.mean(1) for x in streams]).mean(0))


def _maps(depth: int, method: str) -> Tensor:
    torch.manual_seed(0)
    return (
        fastrel.Explainer(Exchange(depth).double().eval(), method=method)(torch.randn(2, 6, 8).double(), target=0)
        .maps["x"]
        .relevance
    )


@pytest.mark.parametrize("method", ["frozen_attribution", "relevance_rollout"])
def test_a_row_divided_on_its_way_is_the_row_divided_in_the_end(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    divided = []
    original = rollout.Rollout._divided
    monkeypatch.setattr(rollout.Rollout, "_divided", lambda *args: divided.append(1) or original(*args))
    monkeypatch.setattr(rollout, "MOST_PARTS", 4)
    found = _maps(2, method)
    assert divided
    monkeypatch.setattr(rollout, "MOST_PARTS", 10**6)
    torch.testing.assert_close(found, _maps(2, method), rtol=1e-10, atol=0)


def test_graphs_of_deeper_models_do_not_double_at_every_block() -> None:
    shallow, deep = (
        len(fastrel.Explainer(Exchange(depth).eval()).programmed(torch.randn(2, 6, 8))[1].reverse.graph.nodes)
        for depth in (3, 5)
    )
    assert deep < 2 * shallow


def test_rows_that_blocks_normalise_are_refused_where_their_ways_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "MOST_OTHERS", 16)
    with pytest.raises(fastrel.UnsupportedModelError, match="more than 16 ways; choose a larger start_layer"):
        _maps(3, "rollout")
