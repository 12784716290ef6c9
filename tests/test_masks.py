"""Keys that a mask excludes by minus infinity take no part, whatever the rules and the backend."""

import pytest
import torch
from torch import Tensor, nn

import fastrel
from tests import golden_files as golden

IDS = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 0], [1, 2, 3, 4, 5]])


class Spelled(nn.Module):
    """Two blocks of attention as matrix products, padding masked by adding `value` to the scores."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.embed, self.head, self.value = nn.Embedding(20, 16), nn.Linear(16, 3), value
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(16, 16) for _ in range(4)) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x, mask = self.embed(ids), torch.where(ids == 0, self.value, 0.0)[:, None, None].to(self.head.weight.dtype)
        for query, key, value, out in self.blocks:
            q, k, v = (f(x).unflatten(2, (2, 8)).transpose(1, 2) for f in (query, key, value))
            attn = (q @ k.mT / 8**0.5 + mask).softmax(-1)
            x = x + out((attn @ v).transpose(1, 2).flatten(2))
        return self.head(x[:, 0])


class Fused(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embed, self.head, self.value = nn.Embedding(20, 16), nn.Linear(16, 3), value
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.where(ids == 0, self.value, 0.0).to(self.head.weight.dtype)
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=mask)[:, 0])


@pytest.mark.parametrize("kind", [Spelled, Fused])
@pytest.mark.parametrize("rules", ["positive", "official"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_minus_infinity_explains_like_the_published_codes_large_number(kind: type, rules: str, backend: str) -> None:
    maps = []
    for value in (-torch.inf, -10000.0):
        torch.manual_seed(0)
        maps.append(fastrel.Explainer(kind(value).double().eval(), rules=rules, backend=backend)(IDS, target=1).relevance)
    assert golden.relative_error(*maps) < 1e-9
    assert not maps[0][IDS == 0].any()
