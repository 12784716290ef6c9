"""What was made of a weight in reduced precision is used only while every bit of the weight is what it was."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrel
from fastrel import ops, weights
from fastrel.backends import native
from fastrel.ops.library import CPU_KERNELS, REFERENCES

needs_kernels = pytest.mark.skipif(native.load() is not None, reason=f"no compiled kernels: {native.load()}")
DIGESTS = [REFERENCES[ops.row_digest]] + ([] if native.load() else [CPU_KERNELS[ops.row_digest]])


def swap(w: Tensor, a: Any, b: Any) -> None:
    w[a], w[b] = w[b].clone(), w[a].clone()


def bits(w: Tensor, a: Any, change: int) -> None:
    """One entry's bits changed."""
    w.view(torch.int32)[a] ^= change


#: Changes in place of a weight [256, 320], and nothing that autograd would see.
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "one entry by one ulp": lambda w: bits(w, (131, 77), 1),
    "the sign of one entry": lambda w: bits(w, (255, 319), -(2**31)),
    "all bits of one entry": lambda w: bits(w, (131, 77), -1),
    "two entries swapped in a row": lambda w: swap(w, (7, 3), (7, 200)),
    "two entries swapped in a column": lambda w: swap(w, (7, 3), (90, 3)),
    "two entries swapped": lambda w: swap(w, (7, 3), (90, 200)),
    "two rows swapped": lambda w: swap(w, 17, 18),
    "rows permuted": lambda w: w.copy_(w[torch.randperm(len(w))]),
    "columns permuted": lambda w: w.copy_(w[:, torch.randperm(w.shape[1])]),
    "a row of 50 times the size": lambda w: w[200].mul_(50),
    "every sixteenth row": lambda w: w[1::16].mul_(-3),
    "every other column zeroed": lambda w: w[:, 1::2].zero_(),
    "all signs": lambda w: w.neg_(),
    "two signs in a row": lambda w: (bits(w, (4, 5), -(2**31)), bits(w, (4, 9), -(2**31))),
    "reversed rows": lambda w: w.copy_(w.flip(1)),
    "through numpy": lambda w: np.negative(w.numpy()[100:101, 5:6], out=w.numpy()[100:101, 5:6]),
}


@pytest.fixture
def weight() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(256, 320)


@pytest.mark.parametrize("digest", DIGESTS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_change_is_seen(change: str, transposed: bool, digest: Any, weight: Tensor) -> None:
    """As `linear` has its weight, and as `addmm` has, turned."""
    calls = []

    def prepare(w: Tensor, purpose: str) -> tuple[Tensor, ...]:
        calls.append(purpose)
        return (w.clone(),)

    parameter = nn.Parameter(weight)
    seen = parameter.T if transposed else parameter
    digested, kept = weights.digested(digest), weights.kept(prepare)

    def ask() -> Tensor:
        with torch.no_grad():
            return kept(seen, "int8", digested(seen))[0]

    assert ask() is ask()
    assert len(calls) == 1
    CHANGES[change](parameter.data)
    assert torch.equal(ask(), seen)
    assert len(calls) == 2


@pytest.mark.parametrize("digest", DIGESTS)
def test_no_change_of_one_entry_gives_the_same_digest(digest: Any) -> None:
    """Every pair of bits flipped, from several numbers, under several keys."""
    flips = [
        0,
        *(1 << i for i in range(32)),
        *(1 << i | 1 << j for i in range(32) for j in range(i)),
        0xFFFFFFFF,
        0xFFFF0000,
    ]
    changes = torch.tensor([x - 2**32 if x >= 2**31 else x for x in flips], dtype=torch.int32)
    for start, key in torch.randint(-(2**31), 2**31, (50, 2), dtype=torch.int32):
        numbers = (start ^ changes).view(torch.float32)[:, None]
        assert len(digest(numbers, key[None]).unique()) == len(flips)


def test_entries_of_few_values_do_not_fool_it() -> None:
    """Ternary weights and repeated patterns, whose sums and index-weighted sums agree: [a, b, …, b, a] for [b, a, …, a, b]."""
    w = torch.tensor([0.0, 1.0, -1.0])[torch.randint(3, (64, 256))]
    w[3, [10, 11, 20, 21]] = torch.tensor([1.0, -1.0, -1.0, 1.0])
    keys = torch.randint(-(2**31), 2**31, (256,), dtype=torch.int32)
    for digest in DIGESTS:
        before = digest(w, keys)
        other = w.clone()
        other[3, [10, 11, 20, 21]] *= -1
        assert ((digest(other, keys) != before).nonzero().flatten() == 3).all()
        rolled = w.roll(1, 1)
        assert (digest(rolled, keys) != before).all()


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 1), (130, 1025)])
def test_the_kernel_computes_the_reference(shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    w.view(-1)[:1] = torch.nan
    keys = torch.randint(-(2**31), 2**31, (shape[1],), dtype=torch.int32)
    for given in (w, torch.randn(shape[1], shape[0]).T, torch.randn(2 * shape[0], shape[1])[::2]):
        assert torch.equal(CPU_KERNELS[ops.row_digest](given, keys), REFERENCES[ops.row_digest](given, keys))


@pytest.fixture
def wide_vit(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.nn.Module, torch.Tensor]:
    """Layers wide enough for products in reduced precision, on any processor."""
    from timm.models.vision_transformer import VisionTransformer

    monkeypatch.setenv("FASTREL_BF16", "1")
    monkeypatch.setenv("FASTREL_INT8", "1")
    gc.collect()  # models of earlier tests, and what was kept for them
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=256, depth=2, num_heads=4, num_classes=6).eval()
    return model, torch.randn(2, 3, 32, 32)


@needs_kernels
@pytest.mark.parametrize("precision", ["mixed", "low"])
def test_weights_in_reduced_precision_are_kept_until_they_change(wide_vit: Any, precision: str) -> None:
    """Also when they are changed behind autograd's back; and gone with the model."""
    model, images = wide_vit
    before = weights.kept_bytes()
    explainer = fastrel.Explainer(model, precision=precision)
    first = explainer(images, target=1).relevance
    kept = weights.kept_bytes()
    assert kept > before
    assert torch.equal(explainer(images, target=1).relevance, first)
    assert weights.kept_bytes() == kept
    for change in (lambda w: w.mul_(-1), lambda w: w.data[3, 5].add_(1), lambda w: setattr(w, "data", torch.randn_like(w))):
        with torch.no_grad():
            change(model.blocks[1].mlp.fc1.weight)
        fresh = fastrel.Explainer(model, precision=precision, memory="low")(images, target=1).relevance
        assert torch.equal(explainer(images, target=1).relevance, fresh)
        assert weights.kept_bytes() == kept


@pytest.mark.slow
@needs_kernels
def test_kept_weights_have_a_limit_and_a_way_to_do_without(wide_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = wide_vit
    before = weights.kept_bytes()
    expected = fastrel.Explainer(model, precision="mixed", memory="low")(images, target=1).relevance
    assert weights.kept_bytes() == before
    for limit, allowed in (("0", before), (str((before + 1e6) / 1e6), before + 1_000_000)):
        monkeypatch.setenv(weights.LIMIT_VARIABLE, limit)
        explainer = fastrel.Explainer(model, precision="mixed")
        assert torch.equal(explainer(images, target=1).relevance, expected)
        assert torch.equal(explainer(images, target=1).relevance, expected)
        assert weights.kept_bytes() <= allowed


@needs_kernels
def test_kept_weights_go_with_their_model(wide_vit: Any) -> None:
    model, images = wide_vit
    before = weights.kept_bytes()
    other = copy.deepcopy(model)
    fastrel.Explainer(other, precision="mixed")(images, target=1)
    assert weights.kept_bytes() > before
    del other
    gc.collect()
    assert weights.kept_bytes() == before


def test_plain_pytorch_keeps_nothing(wide_vit: Any) -> None:
    """It takes longer to tell whether a weight has changed than to prepare it again."""
    model, images = wide_vit
    before = weights.kept_bytes()
    fastrel.Explainer(model, precision="mixed", backend="torch")(images)
    assert weights.kept_bytes() == before


@pytest.fixture
def counted() -> Callable[..., Any]:
    """Keeps a megabyte of every weight it is asked for."""
    gc.collect()
    digested = weights.digested(DIGESTS[-1])
    kept = weights.kept(lambda w, purpose: (torch.zeros(250_000),))
    return lambda w, purpose="int8": kept(w, purpose, digested(w))[0]


def test_what_is_kept_is_counted_and_goes_with_its_weight_and_its_change(counted: Any) -> None:
    before = weights.kept_bytes()
    first, second = torch.randn(4, 4), torch.randn(4, 4)
    for w in (first, second):
        for purpose in ("int8", "gradient"):
            counted(w, purpose)
    assert weights.kept_bytes() == before + 4_000_000
    first[0, 0] += 1
    first.data = first.clone()
    assert counted(first) is counted(first)
    assert weights.kept_bytes() == before + 4_000_000
    del first
    gc.collect()
    assert weights.kept_bytes() == before + 2_000_000
    del w, second
    gc.collect()
    assert weights.kept_bytes() == before


def test_weights_of_inference_mode_are_kept_and_checked(counted: Any) -> None:
    with torch.inference_mode():
        w = torch.randn(4, 4)
        first = counted(w)
        assert counted(w) is first
        w[0, 0] += 1
        assert counted(w) is not first


def test_a_limit_that_is_no_number_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    for value in ("abc", "", "-1", "inf", "nan"):
        monkeypatch.setenv(weights.LIMIT_VARIABLE, value)
        with pytest.raises(fastrel.InputError, match=f"FASTREL_WEIGHTS_MB='{value}' is no number of megabytes; set 0"):
            fastrel.Explainer(model, precision="mixed")
    fastrel.Explainer(copy.deepcopy(model))  # which keeps nothing


def test_what_holds_the_weight_itself_is_kept_without_it() -> None:
    """Of a 16-bit weight in float8 the part for gradients is that weight; what was made was made anew at every call."""
    calls = []

    def prepare(weight: Tensor, purpose: str) -> tuple[Tensor, ...]:
        calls.append(purpose)
        return weight * 2, weight

    kept, w = weights.kept_by_version(prepare), torch.randn(4, 4)
    before = weights.kept_bytes()
    first, second = kept(w, "float8"), kept(w, "float8")
    assert first[0] is second[0]
    assert first[1] is second[1] is w
    assert (len(calls), weights.kept_bytes()) == (1, before + 64)
    del w, first, second
    gc.collect()
    assert weights.kept_bytes() == before


def test_what_a_cuda_graph_reads_follows_its_weights() -> None:
    """A graph reads what was prepared when it was captured, in one place for ever: a write to the weight left it as it was, and
    `forget` freed it."""
    kept, w = weights.kept_by_version(lambda weight, purpose: (weight * 2, weight)), nn.Parameter(torch.randn(4, 4))
    with torch.no_grad():
        kept(w, "doubled")  # the warm-up
        with weights.recording() as graph:
            place, _ = kept(w, "doubled")
        w += 1
        assert not torch.equal(place, 2 * w)
        graph.refresh()
        assert torch.equal(place, 2 * w)
        assert torch.equal(kept(w, "doubled")[0], 2 * w)
        w.data += 1
        weights.forget()
        graph.refresh()
        assert torch.equal(place, 2 * w)
        assert torch.equal(graph.read[0].made[0], place)


def test_nothing_is_kept_that_a_cuda_graph_makes() -> None:
    """Its memory is filled by replays alone."""
    kept, w, before = (
        weights.kept_by_version(lambda weight, purpose: (weight * 2,)),
        torch.randn(4, 4),
        weights.kept_bytes(),
    )
    with weights.recording() as graph:
        kept(w, "doubled")
    assert graph.read == []
    assert weights.kept_bytes() == before
    kept(w, "doubled")
    assert weights.kept_bytes() == before + 64
