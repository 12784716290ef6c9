"""The gate in front of every timed explanation: no trivial map passes it."""

import pytest
import torch

import fastrel
from benchmarks import gate
from tests import models


@pytest.fixture(scope="module", params=["timm_vit", "hf_bert", "timm_vit_mean_pooled"])
def expected(request: pytest.FixtureRequest) -> torch.Tensor:
    model, given = models.build(request.param), models.inputs(request.param)
    given = {name: x[:2] for name, x in given.items()}
    return fastrel.Explainer(model, backend="torch")(**given, target=1).relevance


@pytest.mark.parametrize("precision", gate.BOUNDS)
def test_no_trivial_map_passes(expected: torch.Tensor, precision: str) -> None:
    """A map that is 1 at the token that is read and 0 elsewhere used to pass: everything else is small beside it."""
    read = torch.zeros_like(expected)
    read[:, 0] = expected[:, 0]
    other = expected.clone()
    other[1] = expected[0]
    trivial = {
        "zeros": torch.zeros_like(expected),
        "the token that is read": read,
        "uniform": expected.mean(-1, keepdim=True).expand_as(expected),
        "another sample's": other,
        "not finite": torch.full_like(expected, torch.nan),
        "mirrored": torch.cat([expected[:, :1], expected[:, 1:].flip(1)], 1),
    }
    for name, given in trivial.items():
        with pytest.raises(AssertionError, match="not the map expected"):
            gate.check(given, expected, precision)
        assert name


def test_the_map_itself_passes_and_so_does_its_rounding(expected: torch.Tensor) -> None:
    assert gate.check(expected, expected) == 0
    assert gate.check(expected.float(), expected) > 0
