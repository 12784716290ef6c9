"""Tokens pooled in ways that have a plain spelling: by segment, by running sums, over windows. Both have one map."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrel
from fastrel.reference.pooling import evidence_of_windows, tokens_read
from fastrel.rules.attention import of_whole_stream, squared_tokens_read
from fastrel.transform.rollout import times_samples
from studies import pooling as study

T, D = 6, 8
SEGMENTS = torch.tensor([2, 0, 1, 0, 2, 1])
PADDED = torch.tensor([0, 0, 1, 2, 2, 3])
Pool = Callable[[Tensor], Tensor]


class Pooled(nn.Module):
    """A block of attention, and a pooling [B, T, 8] -> [B, …, 8] of which the largest is read."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool, self.embed, self.norm = pool, nn.Linear(5, D), nn.LayerNorm(D)
        self.qkv, self.out, self.head = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(self.pool(x).flatten(1, -2).amax(1))


def model_of(pool: Pool) -> nn.Module:
    torch.manual_seed(0)
    return Pooled(pool).double().eval()


def given() -> Tensor:
    return torch.randn(3, T, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def places(x: Tensor, index: Tensor = SEGMENTS) -> Tensor:
    return index[None, :, None].expand_as(x)


def zeros(x: Tensor, count: int = 3) -> Tensor:
    return x.new_zeros(len(x), count, D)


def in_place(x: Tensor) -> Tensor:
    out = zeros(x)
    out.index_add_(1, SEGMENTS, x)
    return out


def accumulated(x: Tensor) -> Tensor:
    out = zeros(x)
    out.index_put_((torch.arange(len(x))[:, None], SEGMENTS[None]), x, accumulate=True)
    return out


def segment_sums(x: Tensor) -> Tensor:
    return x[:, SEGMENTS.argsort(stable=True)].unflatten(1, (3, 2)).sum(2)


#: Spellings of one function; the first is what the others must agree with.
SUMS: dict[str, Pool] = {
    "reshaped": segment_sums,
    "index_add": lambda x: zeros(x).index_add(1, SEGMENTS, x),
    "index_add, scaled": lambda x: zeros(x).index_add(1, SEGMENTS, x / 2, alpha=2),
    "index_add, in place": in_place,
    "index_add over samples and tokens": lambda x: x.new_zeros(3 * len(x), D)
    .index_add(0, (3 * torch.arange(len(x))[:, None] + SEGMENTS).flatten(), x.flatten(0, 1))
    .unflatten(0, (-1, 3)),
    "index_put, accumulated": accumulated,
    "scatter_add": lambda x: zeros(x).scatter_add(1, places(x), x),
    "scatter, added": lambda x: zeros(x).scatter(1, places(x), x, reduce="add"),
    "scatter_reduce": lambda x: zeros(x).scatter_reduce(1, places(x), x, "sum"),
}  # fmt: skip
MEANS: dict[str, Pool] = {
    "reshaped": lambda x: x[:, SEGMENTS.argsort(stable=True)].unflatten(1, (3, 2)).mean(2),
    "scatter_reduce": lambda x: zeros(x).scatter_reduce(1, places(x), x, "mean", include_self=False),
    "scatter_reduce, over others": lambda x: (zeros(x) + 1).scatter_reduce(1, places(x), x, "mean", include_self=False),
    "index_reduce": lambda x: zeros(x).index_reduce(1, SEGMENTS, x, "mean", include_self=False),
    "index_add, divided": lambda x: zeros(x).index_add(1, SEGMENTS, x) / SEGMENTS.bincount()[:, None],
}  # fmt: skip
LARGEST: dict[str, Pool] = {
    "reshaped": lambda x: x[:, SEGMENTS.argsort(stable=True)].unflatten(1, (3, 2)).amax(2),
    "scatter_reduce": lambda x: zeros(x).scatter_reduce(1, places(x), x, "amax", include_self=False),
    "index_reduce": lambda x: zeros(x).index_reduce(1, SEGMENTS, x, "amax", include_self=False),
}  # fmt: skip
ALONE: dict[str, Pool] = {
    "mean": lambda x: x.mean(1, keepdim=True),
    "index_add": lambda x: zeros(x, 1).index_add(1, torch.zeros(T, dtype=torch.long), x) / T,
    "scatter_reduce": lambda x: zeros(x, 1).scatter_reduce(1, torch.zeros_like(places(x)), x, "mean", include_self=False),
}  # fmt: skip
WINDOWS: dict[str, Pool] = {
    "unfolded": lambda x: x.unfold(1, 3, 1).mean(-1),
    "avg_pool1d": lambda x: F.avg_pool1d(x.mT, 3, 1).mT,
    "avg_pool2d": lambda x: F.avg_pool2d(x.mT[:, :, None], (1, 3), 1)[:, :, 0].mT,
}
PAIRS: dict[str, Pool] = {
    "reshaped": lambda x: x.unflatten(1, (3, 2)).mean(2),
    "avg_pool1d": lambda x: F.avg_pool1d(x.mT, 2).mT,
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x.mT, 3).mT,
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x.mT.unflatten(2, (3, 2)), (3, 1)).flatten(2).mT,
}
LOWER = torch.ones(T, T, dtype=torch.float64).tril()
RUNNING: dict[str, Pool] = {
    "masked": lambda x: (LOWER[:, :, None] * x[:, torch.arange(T).repeat(T)].unflatten(1, (T, T))).sum(2),
    "cumsum": lambda x: x.cumsum(1),
    "cumsum, turned": lambda x: x.mT.cumsum(-1).mT,
}
NO_NAN: dict[str, Pool] = {
    "sum": lambda x: x.sum(1, keepdim=True) / T,
    "nansum": lambda x: x.nansum(1, keepdim=True) / T,
    "nanmean": lambda x: x.nanmean(1, keepdim=True),
    "nanmean of the last": lambda x: x.mT.nanmean(-1)[:, None],
}
WITHOUT_LAST: dict[str, Pool] = {
    "sliced": lambda x: x[:, :4].sum(1, keepdim=True) / 4,
    "nanmean": lambda x: x.masked_fill((torch.arange(T) > 3)[:, None], torch.nan).nanmean(1, keepdim=True),
}


def beside(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.mean(1) for part in parts], -1)[:, None].unflatten(2, (3, D))


PARTS: dict[str, Pool] = {
    "sliced": lambda x: beside([x[:, :2], x[:, 2:4], x[:, 4:]]),
    "tensor_split": lambda x: beside(x.tensor_split(3, 1)),
    "tensor_split at": lambda x: beside(x.tensor_split((2, 4), 1)),
    "chunk": lambda x: beside(x.chunk(3, 1)),
}
STEPS: dict[str, Pool] = {"sliced": lambda x: (x[:, 1:] - x[:, :-1]).relu(), "diff": lambda x: x.diff(dim=1).relu()}
ENDS: dict[str, Pool] = {
    "amin, amax": lambda x: torch.stack([x.amin(1), x.amax(1)], 1),
    "aminmax": lambda x: torch.stack(torch.aminmax(x, dim=1), 1),
    "cummin, cummax": lambda x: torch.stack([x.cummin(1).values[:, -1], x.cummax(1).values[:, -1]], 1),
}
QUERIES = torch.linspace(-2, 2, 3 * D, dtype=torch.float64).sin().reshape(3, D)
ASKED: dict[str, Pool] = {
    "product": lambda x: (QUERIES[None] @ x.mT).softmax(-1) @ x,
    "layer, turned": lambda x: F.linear(x, QUERIES).mT.softmax(-1) @ x,
    "einsum": lambda x: torch.einsum("bqt,btd->bqd", torch.einsum("btd,qd->bqt", x, QUERIES).softmax(-1), x),
    "values first": lambda x: (x.mT @ F.linear(x, QUERIES).softmax(1)).mT,
}
ASKED_ALL: dict[str, Pool] = {
    "product": lambda x: ((QUERIES[None] @ x.mT).softmax(-1) @ x).sum(1, keepdim=True),
    "einsum": lambda x: torch.einsum("bqt,btd->bd", torch.einsum("btd,qd->bqt", x, QUERIES).softmax(-1), x)[:, None],
}
ASKED_BY_ONE: dict[str, Pool] = {
    "product": lambda x: (x @ QUERIES[0]).softmax(1)[:, None] @ x,
    "sum": lambda x: ((x @ QUERIES[0]).softmax(1)[..., None] * x).sum(1, keepdim=True),
    "sum, turned": lambda x: ((x @ QUERIES[0]).softmax(1)[:, None] * x.mT).sum(-1)[:, None],
    "layer": lambda x: F.linear(x, QUERIES[:1]).softmax(1).mT @ x,
    "product, turned": lambda x: ((x @ QUERIES[0]).softmax(1)[:, None].mT * x).sum(1, keepdim=True),
    "einsum, values first": lambda x: torch.einsum("btd,bt->bd", x, (x @ QUERIES[0]).softmax(1))[:, None],
}


def gate(x: Tensor) -> Tensor:
    return (x @ QUERIES[0]).sigmoid()


GATED: dict[str, Pool] = {
    "sum": lambda x: (gate(x)[..., None] * x).sum(1, keepdim=True),
    "product": lambda x: gate(x)[:, None] @ x,
    "layer": lambda x: F.linear(x, QUERIES[:1]).sigmoid().mT.bmm(x),
    "values first": lambda x: (x.mT @ gate(x)[..., None]).mT,
    "einsum, values first": lambda x: torch.einsum("btd,bt->bd", x, gate(x))[:, None],
    "a product, turned": lambda x: (gate(x)[:, None].mT * x).sum(1, keepdim=True),
}


GATED_BY_SUM: dict[str, Pool] = {
    "sum": lambda x: ((gate(x) / gate(x).sum(1, keepdim=True))[..., None] * x).sum(1, keepdim=True),
    "product": lambda x: (gate(x) / gate(x).sum(1, keepdim=True))[:, None] @ x,
}
GATES: dict[str, Pool] = {
    "sums": lambda x: torch.stack([(F.linear(x, QUERIES).sigmoid()[..., i, None] * x).sum(1) for i in range(3)], 1),
    "sum": lambda x: (F.linear(x, QUERIES).sigmoid()[..., None] * x[:, :, None]).sum(1),
    "product": lambda x: F.linear(x, QUERIES).sigmoid().mT @ x,
    "values first": lambda x: (x.mT @ F.linear(x, QUERIES).sigmoid()).mT,
}
WEIGHTS = torch.linspace(-0.5, 1, T, dtype=torch.float64)
WEIGHTED: dict[str, Pool] = {
    "product": lambda x: (x * WEIGHTS[:, None]).sum(1, keepdim=True),
    "einsum": lambda x: torch.einsum("btd,t->bd", x, WEIGHTS)[:, None],
    "einsum, weights first": lambda x: torch.einsum("t,btd->bd", WEIGHTS, x)[:, None],
    "einsum of as many tokens": lambda x: torch.einsum("t,btd->bd", WEIGHTS, x[:, torch.arange(T)])[:, None],
    "a column": lambda x: (x.mT @ WEIGHTS[:, None]).mT,
    "a vector": lambda x: (x.mT @ WEIGHTS)[:, None],
    "a row": lambda x: WEIGHTS[None] @ x,
    "a layer": lambda x: F.linear(x.mT, WEIGHTS[None])[..., 0][:, None],
    "tensordot": lambda x: torch.tensordot(x, WEIGHTS, ([1], [0]))[:, None],
    "tensordot, weights first": lambda x: torch.tensordot(WEIGHTS, x, ([0], [1]))[:, None],
}
MEAN: dict[str, Pool] = {
    "mean": lambda x: x.mean(1, keepdim=True),
    "Python's sum": lambda x: (sum(x.unbind(1)) / T)[:, None],
    "one by one": lambda x: functools.reduce(torch.add, [x[:, i] for i in range(T)])[:, None] * (1 / T),
    "one by one, kept": lambda x: functools.reduce(torch.add, [x[:, i : i + 1] for i in range(T)]) / T,
    "one by one, each divided": lambda x: sum(x[:, i] / T for i in range(T))[:, None],
    "halves": lambda x: (sum(part.mean(1) for part in x.split([3, 3], 1)) / 2)[:, None],
    "sums of unequal parts": lambda x: (x[:, :2].sum(1, keepdim=True) + x[:, 2:].sum(1, keepdim=True)) / T,
    "chunks": lambda x: sum(part.sum(1) for part in x.chunk(3, 1))[:, None] / T,
    "the first, and the others": lambda x: (x[:, 0] + x[:, 1:].sum(1))[:, None] / T,
    "a column": lambda x: (x.mT @ x.new_full((T, 1), 1 / T)).mT,
    "tensordot": lambda x: torch.tensordot(x.new_full((T,), 1 / T), x, dims=([0], [1]))[:, None],
    "avg_pool2d": lambda x: F.avg_pool2d(x.mT[:, None], (1, T))[:, 0].mT,
}
FROM_THE_SECOND: dict[str, Pool] = {
    "sliced": lambda x: x[:, 1:].mean(1, keepdim=True),
    "Python's sum": lambda x: (sum(x.unbind(1)[1:]) / (T - 1))[:, None],
}


def largest_code(x: Tensor) -> Tensor:
    return F.one_hot(x.argmax(1), T).to(x.dtype)


LARGEST_OF_ALL: dict[str, Pool] = {
    "amax": lambda x: x.amax(1, keepdim=True),
    "one by one": lambda x: functools.reduce(torch.maximum, x.unbind(1))[:, None],
    "one by one, kept": lambda x: functools.reduce(torch.max, [x[:, i : i + 1] for i in range(T)]),
    "halves": lambda x: torch.maximum(x[:, :3].amax(1), x[:, 3:].max(1).values)[:, None],
    "gathered": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "gathered by max": lambda x: x.gather(1, x.max(1).indices[:, None]),
    "take_along_dim": lambda x: x.take_along_dim(x.argmax(1, keepdim=True), 1),
    "max_pool1d": lambda x: F.max_pool1d(x.mT, T).mT,
    "max_pool2d": lambda x: F.max_pool2d(x.mT[:, None], (1, T))[:, 0].mT,
    "max_pool2d, tokens first": lambda x: F.max_pool2d(x[:, None], (T, 1))[:, 0],
    "where": lambda x: torch.where(x == x.amax(1, keepdim=True), x, torch.zeros_like(x)).sum(1, keepdim=True),
    "where, 0": lambda x: torch.where(x == x.max(1, keepdim=True).values, x, 0.0).sum(1, keepdim=True),
    "masked": lambda x: (x * (x == x.amax(1, keepdim=True))).sum(1, keepdim=True),
    "one-hot": lambda x: (largest_code(x).mT * x).sum(1, keepdim=True),
    "one-hot, einsum": lambda x: torch.einsum("bdt,btd->bd", largest_code(x), x)[:, None],
}
LARGEST_PAIRS: dict[str, Pool] = {
    "reshaped": lambda x: x.unflatten(1, (3, 2)).amax(2),
    "max_pool1d": lambda x: F.max_pool1d(x.mT, 2).mT,
    "max_pool2d": lambda x: F.max_pool2d(x[:, None], (2, 1))[:, 0],
    "parts": lambda x: torch.maximum(*x.unflatten(1, (3, 2)).unbind(2)),
}
GROUPS = {
    "learned queries": ASKED, "learned queries, summed": ASKED_ALL, "a learned query": ASKED_BY_ONE,
    "a gate": GATED, "a gate of sum 1": GATED_BY_SUM, "gates": GATES, "constant weights": WEIGHTED,
    "mean": MEAN, "mean of the others": FROM_THE_SECOND, "the largest of all": LARGEST_OF_ALL, "the largest of pairs": LARGEST_PAIRS,
    "sums": SUMS, "means": MEANS, "largest": LARGEST, "all in one": ALONE, "windows": WINDOWS, "pairs": PAIRS, "running sums": RUNNING,
    "no NaN": NO_NAN, "NaN at the end": WITHOUT_LAST, "parts": PARTS, "steps": STEPS, "ends": ENDS,
}  # fmt: skip
CASES = [(group, name) for group, spellings in GROUPS.items() for name in list(spellings)[1:]]
METHODS = ("transformer_attribution", "frozen_attribution", "lrp", "attnlrp")


@functools.cache
def plain(group: str, method: str) -> fastrel.Explanation:
    return fastrel.Explainer(model_of(next(iter(GROUPS[group].values()))), method, backend="torch")(given(), target=1)


@pytest.mark.parametrize(("group", "name"), CASES)
def test_poolings_of_one_function_have_one_map(group: str, name: str) -> None:
    explainer = fastrel.Explainer(model_of(GROUPS[group][name]), backend="torch")
    for method in METHODS if group != "running sums" else ("transformer_attribution", "lrp", "attnlrp"):
        found = explainer.using(method)(given(), target=1)
        assert not found.report, found.report
        torch.testing.assert_close(found.relevance, plain(group, method).relevance, rtol=1e-10, atol=1e-13)


#: Whose second path takes no softmax for a map whose keys do not come last; `verify` says so.
NOT_FOLLOWED = {
    ("learned queries", "values first"),
    ("a learned query", "sum"),
    ("a learned query", "sum, turned"),
    ("a learned query", "layer"),
    ("a learned query", "product, turned"),
}

#: What has no plain spelling, or is to be checked by itself.
CHECKED: dict[str, Pool] = {
    **{f"{group}, {name}": GROUPS[group][name] for group, name in CASES if (group, name) not in NOT_FOLLOWED},
    "a place that nothing comes to": lambda x: zeros(x, 5).index_add(1, PADDED, x),
    "onto tokens": lambda x: x.index_add(1, SEGMENTS, x.sin()),
    "onto constants": lambda x: (zeros(x) - 0.1).scatter_add(1, places(x), x),
    "mean and variance": lambda x: torch.stack(torch.var_mean(x, 1), 1),
    "the norm": lambda x: x.norm(dim=1, keepdim=True),
    "by sign": lambda x: F.lp_pool1d(x.mT, 2, T).mT,
    "deviations": lambda x: (x - x.mean(1, keepdim=True)).pow(2).mean(1, keepdim=True),
    "a softmax over features": lambda x: (x.mean(1).softmax(-1)[:, None] * x).sum(-1, keepdim=True) + x,
    "largest, and what was there": lambda x: zeros(x).scatter_reduce(1, places(x), x, "amax"),
}  # fmt: skip


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def by_heads(x: Tensor) -> Tensor:
    """Attention of the first token without a softmax, its heads beside the batch."""
    q, k, v = (heads(part).flatten(0, 1) for part in (x[:, :1], x, x))
    return (q.bmm(k.mT).relu() / T).bmm(v).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: ((heads(x[:, :1]) @ heads(x).mT).relu() / T @ heads(x)).transpose(1, 2).flatten(2),
        by_heads,
        lambda x: (x[:, :1] @ x.mT).relu() @ x,
    ],
)
def test_weights_that_are_made_of_another_token_are_no_gates(pool: Pool) -> None:
    """What they are, attention of one token without a softmax, is not known: refused, not given the map of a gate."""
    with pytest.raises(fastrel.errors.UnsupportedModelError, match="cannot follow tokens"):
        fastrel.Explainer(model_of(pool), backend="torch")(given(), target=1)


def check(model: nn.Module, *inputs: Tensor, lost: float = 0.0) -> None:
    """All of `verify` in float64, the second path included; the gradient to 1e-10."""
    report = fastrel.Explainer(model, backend="torch").verify(*inputs, target=1)
    checks: dict[str, Any] = {one.name: one for one in report.checks}
    assert report.ok, report
    assert not report.generic, report
    assert not any("not checked" in one.meaning for one in report.checks), report
    assert checks["gradient"].value < 1e-10
    assert checks["relevance"].value < 1e-8
    assert checks["relevance that arrives"].value <= 1 + 1e-12


@pytest.mark.parametrize("name", CHECKED)
def test_poolings_are_verified(name: str) -> None:
    check(model_of(CHECKED[name]), given())


def test_relevance_of_sums_at_places_is_conserved() -> None:
    """Where something comes to every place, all of its relevance goes on."""
    from fastrel.rules.places import shares_at_places

    x, rel = torch.randn(2, T, D, dtype=torch.float64), torch.rand(4, 2, 3, D, dtype=torch.float64)
    found = shares_at_places(torch.ops.aten.scatter_add.default, rel, 3, zeros(x), 1, places(x), x)
    own = torch.zeros_like(rel).scatter_add(2, places(x).expand(4, -1, -1, -1), found)
    torch.testing.assert_close(own, rel, rtol=1e-12, atol=1e-14)
    assert (found >= 0).all()


def test_a_window_is_read_as_an_attention_map_by_definition() -> None:
    """Running sums: x₁ + … + x_t has of token i the part (x_i ∇_t · x_i⁺ R_t / Σ x⁺)⁺ of eq. (13), equal parts where none is > 0."""
    x, grad, rel, row = (
        torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)
    )
    grad[0, 1] = 0
    rel, row = rel.abs(), row.abs().sum(2, keepdim=True)
    found = evidence_of_windows(lambda part: part.cumsum(1), x, grad[None], rel[None], row[None], [1], [2])
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for b in range(2):
        for t in range(4):
            parts = (x[b].cumsum(0)[t].sign() * x[b, : t + 1]).clamp(min=0)
            own = (x[b, : t + 1] * grad[b, t]).sum(1) * (parts / parts.sum(0) * rel[b, t]).sum(1)
            own = own.clamp(min=0)
            own = own / own.sum() if own.sum() > 0 else torch.full_like(own, 1 / (t + 1))
            expected[b, : t + 1] += row[b, t] * own
    torch.testing.assert_close(found[0, ..., 0], expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.sum(), row.sum())


@pytest.mark.parametrize("pooling", ["class token", "mean", "sum, softmax weights", "max"])
def test_blocks_of_pooled_models_count_by_the_tokens_that_are_read(pooling: str) -> None:
    """The default is r ← r (I + N² M); where a class token is read, N is 1 and nothing is multiplied."""
    torch.manual_seed(0)
    model = study.Classifier(pooling).double().eval()
    ids, _, _ = study.texts(3, torch.Generator().manual_seed(2))
    explainer = fastrel.Explainer(model)
    ours = explainer(ids, target=1).relevance
    own = study.lanes(explainer, (ids,), {}, 1)
    expected = study.times(own, [read**2 for read in study.tokens_read(own)])
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)
    alike = explainer.using(replace(fastrel.methods.METHODS["frozen_attribution"], evidence=False))(ids, target=1).relevance
    assert torch.equal(ours, alike) == (pooling == "class token")


def test_normalised_rows_of_pooled_models_add_up_to_one() -> None:
    """Where rows of I + M have sum 1, M counts once."""
    torch.manual_seed(0)
    model = study.Classifier("mean").double().eval()
    ids, _, _ = study.texts(3, torch.Generator().manual_seed(2))
    found = fastrel.Explainer(model, normalize_rollout=True)(ids, target=1).relevance
    torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))


def test_a_pooled_model_that_learnt_is_explained_by_what_it_learnt() -> None:
    """The key is the highest word; with what a block adds counted once it stays with tokens that have read the key."""
    model, (ids, classes, places_) = study.trained("mean")
    found = fastrel.Explainer(model)(ids, target=functools.partial(study.of_class, classes))
    assert (found.relevance.argmax(1) == places_).double().mean() > 0.95


class Ensemble(nn.Module):
    """The mean over three times the same model."""

    def __init__(self, member: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(copy.deepcopy(member) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([member(ids) for member in self.members]).mean(0)


@pytest.mark.slow
def test_an_ensemble_of_pooled_models_is_explained_as_its_members_are() -> None:
    """Each has a third of the relevance, and a third of the gradient: what blocks add was a ninth of what it is in one of them."""
    member, (ids, classes, places_) = study.trained("mean")
    found = fastrel.Explainer(Ensemble(member).eval())(ids, target=functools.partial(study.of_class, classes))
    assert (found.relevance.argmax(1) == places_).double().mean() > 0.95


def test_a_stream_counts_as_if_all_relevance_went_there() -> None:
    read, half, none = torch.tensor([[16.0, 16.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.0]])
    assert of_whole_stream(read, half, none).tolist() == [[64.0, 16.0]]


@pytest.mark.parametrize("inner", [False, True])
def test_tokens_in_windows_are_counted_by_sample(inner: bool) -> None:
    row = torch.rand(2, 3, 4, 5, dtype=torch.float64)  # targets, samples, windows, tokens
    expected = row.flatten(2).sum(2) ** 4 / row.flatten(2).square().sum(2) ** 2
    folded = (row.transpose(1, 2) if inner else row).reshape(2, 12, 5)
    found = squared_tokens_read(folded, row, 0, 4, inner)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(squared_tokens_read(folded, row, 0, None, inner), expected)
    times = (row * expected[:, :, None, None]).transpose(1, 2) if inner else row * expected[:, :, None, None]
    torch.testing.assert_close(times_samples(folded, found, 0, inner), times.reshape(2, 12, 5))
    assert tokens_read(torch.tensor([[[0.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])).tolist() == [[1, 1, 2]]


@pytest.mark.slow
def test_windows_that_share_their_queries_are_counted_by_sample() -> None:
    """GCViT repeats its queries for every window, so that nothing says what its windows are but their number."""
    torch.manual_seed(0)
    explainer, images = (
        fastrel.Explainer(timm.create_model("gcvit_xxtiny", num_classes=5).eval()),
        torch.randn(2, 3, 224, 224),
    )
    both, alone = explainer(images, target=1).relevance, explainer(images[1:], target=1).relevance
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4 * float(alone.max()))
