"""Properties that hold for every small transformer, drawn at random: structure, shapes, masks, readouts, methods."""

from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx, nn

import fastrel
from fastrel import engine
from fastrel.graph import axes as axes_
from fastrel.ops.steps import add_rows
from fastrel.transform.lanes import Branch, Lane, Part, Row
from fastrel.transform.rollout import Rollout, Sum
from tests.small import EXAMPLES, remembered

slow = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


class WrittenOutNorm(nn.Module):
    """Layer normalisation in single operators."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight + self.bias


class WrittenOutRMS(nn.Module):
    """Root mean square normalisation in single operators."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


NORMS = {"layer": nn.LayerNorm, "written out": WrittenOutNorm, "rms": WrittenOutRMS, "none": lambda width: nn.Identity()}


class Attention(nn.Module):
    """Self-attention, spelled in one of several ways."""

    def __init__(self, width: int, heads: int, spelling: str) -> None:
        super().__init__()
        self.heads, self.spelling, self.size = heads, spelling, width // heads
        self.keys = heads // 2 if spelling == "grouped" and heads % 2 == 0 else heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, self.keys * self.size)
        self.v, self.out = nn.Linear(width, self.keys * self.size), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (self.keys, -1)).transpose(1, 2) for layer in (self.k, self.v))
        if self.keys != self.heads:
            k, v = (y[:, :, None].expand(-1, -1, self.heads // self.keys, -1, -1).flatten(1, 2) for y in (k, v))
        if self.spelling == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v, mask)
        else:
            scores = q @ k.mT / self.size**0.5
            scores = scores if mask is None else scores.masked_fill(~mask, -1e9)
            attn = scores.softmax(-1)
            mixed = torch.einsum("bhqk,bhkd->bhqd", attn, v) if self.spelling == "einsum" else attn @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers, spelled in one of several ways."""

    def __init__(self, width: int, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.up, self.gate, self.down = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.depthwise = nn.Conv1d(2 * width, 2 * width, 3, padding=1, groups=2 * width)

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "gated":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.spelling == "addmm":
            flat = torch.addmm(self.up.bias, x.reshape(-1, x.shape[-1]), self.up.weight.T)
            return self.down(F.gelu(flat).view(*x.shape[:-1], -1))
        if self.spelling == "conv":
            h = F.conv1d(x.transpose(1, 2), self.up.weight[:, :, None], self.up.bias)
            return self.down(F.gelu(h).transpose(1, 2))
        if self.spelling == "depthwise":
            return self.down(F.gelu(self.depthwise(self.up(x).transpose(1, 2)).transpose(1, 2)))
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One block: where the norms are, and whether attention and MLP stand side by side."""

    def __init__(self, width: int, form: str, norm: str, attention: str, mlp: str, heads: int) -> None:
        super().__init__()
        self.form, self.attention, self.mlp = form, Attention(width, heads, attention), MLP(width, mlp)
        self.one, self.two = NORMS[norm](width), NORMS[norm](width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.form == "parallel":
            h = self.one(x)
            return x + self.attention(h, mask) + self.mlp(h)
        if self.form == "post":
            x = self.one(x + self.attention(x, mask))
            return self.two(x + self.mlp(x))
        x = x + self.attention(self.one(x), mask)
        return x + self.mlp(self.two(x))


class Transformer(nn.Module):
    """Embedding, blocks, readout, head."""

    def __init__(self, choice: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(choice["seed"])
        width = choice["heads"] * choice["head_size"]
        self.ids, self.readout, self.masked = choice["ids"], choice["readout"], choice["masked"]
        self.embed = nn.Embedding(20, width) if self.ids else nn.Linear(6, width)
        self.blocks = nn.ModuleList(
            Block(width, *(choice[key] for key in ("form", "norm", "attention", "mlp", "heads")))
            for _ in range(choice["blocks"])
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(2 * width if self.readout == "first and mean" else width, 4)
        self.double().eval()

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = keep[:, None, None, :].bool() if self.masked else None
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, mask)
        h = self.norm(h)
        if self.readout == "first":
            return self.head(h[:, 0])
        if self.readout == "mean":
            return self.head(h.mean(1))
        if self.readout == "max":
            return self.head(h.amax(1))
        return self.head(torch.cat((h[:, 0], h.mean(1)), -1))


def well_conditioned(choice: dict[str, Any]) -> bool:
    """A norm over two features makes ±1 of both, whose sums cancel: inputs that differ by 1e-15 differ by 5e-6 in their relevance."""
    return choice["heads"] * choice["head_size"] > 2


CHOICES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "ids": st.booleans(),
        "blocks": st.integers(1, 2),
        "heads": st.sampled_from([1, 2, 3, 4]),
        "head_size": st.sampled_from([2, 3, 4]),
        "form": st.sampled_from(["pre", "post", "parallel"]),
        "norm": st.sampled_from(list(NORMS)),
        "attention": st.sampled_from(["fused", "matmul", "einsum", "grouped"]),
        "mlp": st.sampled_from(["plain", "gated", "addmm", "conv", "depthwise"]),
        "readout": st.sampled_from(["first", "mean", "max", "first and mean"]),
        "masked": st.booleans(),
        "batch": st.integers(1, 3),
        "length": st.integers(2, 6),
    }
).filter(well_conditioned)


def inputs(choice: dict[str, Any], batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(choice["seed"] + 7 * batch + length)
    if choice["ids"] and choice["readout"] == "max":
        # No id twice: without positions equal tokens stay equal up to rounding, which would decide whose the largest is.
        x: Tensor = torch.stack([torch.randperm(20, generator=generator)[:length] for _ in range(batch)])
    elif choice["ids"]:
        x = torch.randint(0, 20, (batch, length), generator=generator)
    else:
        x = torch.randn(batch, length, 6, generator=generator, dtype=torch.float64)
    keep = torch.ones(batch, length, dtype=torch.long)
    if choice["masked"] and batch > 1:
        keep[1, length - length // 2 :] = 0
    return x, keep


def close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-8, atol=1e-12))


@pytest.mark.slow
@settings(slow, max_examples=EXAMPLES)
@given(CHOICES)
def test_every_small_transformer(choice: dict[str, Any]) -> None:
    """Batch = singles, guards hold at other sizes, backends agree, rows add up, the second path agrees with the first."""
    with mock.patch.object(engine, "capture", remembered()):  # capturing takes most of the time; `verify` does it again
        hold(choice)


def hold(choice: dict[str, Any]) -> None:
    model = Transformer(choice)
    explainer = fastrel.Explainer(model, backend="torch")
    x, keep = inputs(choice, choice["batch"], choice["length"])
    both = explainer(x, keep, target=1)
    (relevance,) = [one.relevance for one in both.maps.values()]
    assert relevance.isfinite().all()
    assert (relevance >= 0).all()

    # The live model, here and at sizes that the graph was not captured with.
    for batch, length in (
        (choice["batch"], choice["length"]),
        (1, choice["length"]),
        (choice["batch"] + 1, choice["length"] + 1),
    ):
        other = inputs(choice, batch, length)
        with torch.no_grad():
            assert close(explainer(*other, target=1).logits, model(*other)), (batch, length)

    # A batch is its samples.
    alone = explainer(x[:1], keep[:1], target=1)
    assert close(alone.only.relevance[0], relevance[0])

    # The compiled backend.
    assert close(explainer.using(backend="auto")(x, keep, target=1).only.relevance, relevance)

    # Rows: each block doubles the rollout of plain attention, and the last block alone holds 1.
    unnormalised = explainer.using("rollout", normalize_rollout=False)(x, keep).only.relevance
    assert close(unnormalised.sum(1), torch.full((len(x),), 2.0 ** choice["blocks"], dtype=torch.float64))
    assert close(explainer.using("rollout")(x, keep).only.relevance.sum(1), torch.ones(len(x), dtype=torch.float64))
    assert close(explainer.using("raw_attention")(x, keep).only.relevance.sum(1), torch.ones(len(x), dtype=torch.float64))

    # The second path.
    report = explainer.verify(x, keep, target=1)
    checks = {check.name: check for check in report.checks}
    assert checks["relevance"].ok, str(report)
    assert checks["relevance"].limit is not None, str(report)
    assert checks["gradient"].ok, str(report)


SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@settings(max_examples=500, derandomize=True, deadline=None)
@given(SIZES, st.randoms())
def test_axes_survive_reshapes_there_and_back(sizes: list[int], random: Any) -> None:
    """Merging dimensions and splitting them again gives the same factors; sizes always multiply up."""
    axes = tuple(((size, random.choice(["batch", "token", "feature"])),) if size != 1 else () for size in sizes)
    cut = random.randint(0, len(sizes))
    merged_shape = [*sizes[:cut], int(torch.tensor([1, *sizes[cut:]]).prod())]
    merged = axes_.regroup(axes, merged_shape)
    assert merged is not None
    assert [axes_.size_of(axis) for axis in merged] == merged_shape
    back = axes_.regroup(merged, sizes)
    assert back is not None
    assert back == axes
    for left, right in axes_.groups(sizes, merged_shape):
        assert (
            torch.tensor([1, *(sizes[i] for i in left)]).prod()
            == torch.tensor([1, *(merged_shape[j] for j in right)]).prod()
        )


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 2))
def test_sums_of_sparse_lanes_are_sums_of_dense_ones(runs: list[tuple[int, int]], dim: int) -> None:
    total, shape = torch.zeros(2, 9, 9, 9), [2, 9, 9, 9]
    expected = total.clone()
    for start, length in runs:
        part_shape = list(shape)
        part_shape[dim + 1] = length
        part = torch.randn(part_shape)
        before = total.clone()
        added = add_rows(total, part, dim + 1, start)
        assert torch.equal(total, before)
        expected.narrow(dim + 1, start, length).add_(part)
        total = added
    assert torch.equal(total, expected)


class Numbers:
    """Lanes that are numbers: what `Rollout` emits is computed at once."""

    def __init__(self) -> None:
        self.graph, self.values = fx.Graph(), {}
        self.add = Sum(self._added)

    def lane(self, value: Tensor) -> Lane:
        node = self.graph.placeholder(f"x{len(self.values)}")
        self.values[node] = value
        return Lane(node)

    def emit(self, fn: Any, *args: Any) -> fx.Node:
        return self.lane(fn(*(self.values[a] if isinstance(a, fx.Node) else a for a in args))).node

    def _added(self, lanes: Any) -> Lane:
        return self.lane(sum(self.values[lane.node] for lane in lanes)) if len(lanes) > 1 else lanes[0]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.integers(1, 4), st.integers(2, 4), st.booleans(), st.randoms())
def test_a_row_that_was_forked_and_meets_again_counts_once(depth: int, operands: int, shared: bool, random: Any) -> None:
    """However sums are nested, and in whatever order their operands come back; some of them through an attention block."""
    numbers = Numbers()
    rollout = Rollout(numbers.emit, linear=True)
    row = rollout.seed(numbers.lane(torch.rand(1, 2, 5)).node)
    r = numbers.values[row.parts[()].lane.node]
    leaves, extra = [row], torch.zeros_like(r)
    for _ in range(depth):
        chosen = leaves.pop(random.randrange(len(leaves)))
        shares = None
        if shared:
            weights = torch.rand(operands, 1, 2).softmax(0)
            shares = tuple(numbers.lane(w).node for w in weights)
        leaves += rollout.fork(chosen, operands, shares)
    ended = random.randrange(len(leaves)) if random.random() < 0.7 else None
    returned = []
    for i, leaf in enumerate(leaves):
        if i != ended:
            returned.append(leaf)
            continue
        whole = rollout.whole(leaf, numbers.add)
        assert torch.allclose(numbers.values[whole.node], r)
        mixed = numbers.values[whole.node] @ torch.rand(5, 5)
        extra = extra + mixed
        rollout.end(leaf)
        returned.append(Row({(): Part(numbers.lane(mixed))}))
    random.shuffle(returned)
    merged, met = rollout.merge(returned, numbers.add)
    assert list(merged.parts) == [()]
    assert torch.allclose(numbers.values[merged.parts[()].lane.node], r + extra)
    assert met == (ended is not None)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(2, 4), st.integers(0, 3), st.booleans())
def test_rows_that_do_not_meet_share_the_whole(operands: int, gone: int, weighted: bool) -> None:
    numbers = Numbers()
    rollout = Rollout(numbers.emit, linear=True)
    row = rollout.seed(numbers.lane(torch.rand(1, 2, 5)).node)
    r = numbers.values[row.parts[()].lane.node]
    weights = torch.rand(operands, 1, 2).softmax(0)
    branches = rollout.fork(row, operands, tuple(numbers.lane(w).node for w in weights) if weighted else None)
    total = sum(numbers.values[rollout.share(rollout.merge([b], numbers.add)[0], numbers.add).node] for b in branches)
    assert torch.allclose(total, r)
    if gone < operands:  # an operand that ended in attention: the others hold all
        rollout.end(branches[gone])
        rest = [b for i, b in enumerate(branches) if i != gone]
        total = sum(numbers.values[rollout.share(b, numbers.add).node] for b in rest)
        assert torch.allclose(total, r)


def test_a_class_token_that_goes_through_attention_alone_keeps_its_identity() -> None:
    """Class attention: one token of the branch is mixed, the others pass by; the residual operand holds I for all."""
    numbers = Numbers()
    rollout = Rollout(numbers.emit, linear=True)
    row = rollout.seed(numbers.lane(torch.rand(1, 2, 5)).node)
    r = numbers.values[row.parts[()].lane.node]
    residual, branch = rollout.fork(row, 2)
    first, others = torch.tensor([1.0, 0, 0, 0, 0]), torch.tensor([0.0, 1, 1, 1, 1])
    cls, rest = (
        branch.map(lambda lane, keep=keep: numbers.lane(numbers.values[lane.node] * keep)) for keep in (first, others)
    )
    rollout.end(cls)
    mixed = (r * first) @ torch.rand(5, 5)
    merged, met = rollout.merge([residual, rest, Row({(): Part(numbers.lane(mixed))})], numbers.add)
    assert torch.allclose(numbers.values[merged.parts[()].lane.node], r + mixed)
    assert met


def test_a_fork_counted_twice_would_be_found() -> None:
    """A check that cannot fail would prove nothing."""
    numbers = Numbers()
    rollout = Rollout(numbers.emit, linear=True)
    row = rollout.seed(numbers.lane(torch.rand(1, 2, 5)).node)
    one, two = rollout.fork(row, 2)
    assert rollout.merge([one, two], numbers.add)[0].parts[()].lane == row.parts[()].lane
    unmarked = Row({(): one.parts[(Branch(0, 0),)]})
    doubled = rollout.merge([unmarked, unmarked], numbers.add)[0].parts[()].lane
    assert torch.allclose(numbers.values[doubled.node], 2 * numbers.values[row.parts[()].lane.node])
