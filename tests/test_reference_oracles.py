"""Every formula of the reference a second time: per sample and target, with explicit matrices of contributions, in loops."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrel.reference import convolution, operators, rules
from fastrel.reference.rollout import gradient_relevance, rollout

BOTH = ("positive", "official")
Values = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """`formula(*tensors, rel, rules)` of a whole batch with two targets, `oracle` the same of one sample and target."""

    tensors: Callable[[], Values]  # [B, …] each
    output: Callable[..., Tensor]  # the operator itself, of a batch
    formula: Callable[..., Any]
    oracle: Callable[..., Any]
    rules: tuple[str, ...] = BOTH


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def values(*shapes: tuple[int, ...]) -> Callable[[], Values]:
    return lambda: tuple(normal(*shape) for shape in shapes)


def ratio(a: Tensor, b: Tensor, rule: str) -> Tensor:
    """a / b entry by entry as the rule set wants it."""
    out = torch.zeros_like(a + b)
    a, b = torch.broadcast_tensors(a, b)
    for place in itertools.product(*map(range, out.shape)):
        numerator, denominator = float(a[place]), float(b[place])
        if rule == "positive":
            out[place] = numerator / denominator if denominator > 0 else 0.0
        else:
            out[place] = numerator / (denominator + 1e-9) if denominator != 0 else 0.0
    return out


def share(contributions: Tensor, rel: Tensor, rule: str) -> Tensor:
    """Relevance of each input: each output's relevance in proportion to contributions [out, in]."""
    return (contributions * ratio(rel[:, None], contributions.sum(1, keepdim=True), rule)).sum(0)


# Matrices.


def of_units(f: Callable[[Tensor], Tensor], shape: torch.Size) -> Tensor:
    """The matrix [out, in] of a linear operator on one sample, a column for each entry of the sample."""
    count = shape.numel()
    return torch.stack([f(unit.reshape(1, *shape)).flatten() for unit in torch.eye(count, dtype=torch.float64)], 1)


def of_convolution(shape: torch.Size, weight: Tensor, stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    """The matrix [out, in] of a convolution of one sample [C, *tokens], entry by entry."""
    tokens, window = shape[1:], weight.shape[2:]
    windows = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(tokens, window, strict=True)]
    matrix = torch.zeros(weight.shape[0], *windows, *shape, dtype=torch.float64)
    for d in range(weight.shape[0]):
        first = d // (weight.shape[0] // groups) * weight.shape[1]
        for place in itertools.product(*map(range, windows)):
            for entry in itertools.product(range(weight.shape[1]), *map(range, window)):
                source = [p * stride + e * dilation - padding for p, e in zip(place, entry[1:], strict=True)]
                if all(0 <= s < n for s, n in zip(source, tokens, strict=True)):
                    matrix[(d, *place, first + entry[0], *source)] += weight[(d, *entry)]
    return matrix.reshape(weight.shape[0] * torch.Size(windows).numel(), -1)


def z_plus(x: Tensor, matrix: Tensor, rel: Tensor, rule: str) -> Tensor:
    """Eq. (5): only contributions x·w that are positive."""
    contributions = matrix * x.flatten()
    if rule != "original_lrp":
        return share(contributions.clamp(min=0), rel.flatten(), rule).reshape(x.shape)
    positive = x.flatten() > 0
    halves = [contributions.clamp(min=0) * side for side in (positive, ~positive)]
    return sum(share(half, rel.flatten(), rule) for half in halves).reshape(x.shape)


# Oracles, of one sample and one target.


def sum_shares(u: Tensor, v: Tensor, rel: Tensor, rule: str) -> Values:
    r_u, r_v = torch.zeros_like(u), torch.zeros_like(v)
    for i in itertools.product(*map(range, u.shape)):
        a, b, r = float(u[i]), float(v[i]), float(rel[i])
        if rule == "positive":
            if a * b >= 0:
                r_u[i], r_v[i] = (r * a / (a + b), r * b / (a + b)) if a + b else (0, 0)
            else:
                r_u[i], r_v[i] = (r, 0) if abs(a) > abs(b) else (0, r) if abs(b) > abs(a) else (0, 0)
        else:
            s = r / (a + b + 1e-9) if a + b else 0
            r_u[i], r_v[i] = a * s, b * s
    if rule == "official":
        a, b, total = (float(x.sum()) for x in (r_u, r_v, rel))
        r_u *= (abs(a) / (abs(a) + abs(b) + 1e-9) * total) / (a + 1e-9)
        r_v *= (abs(b) / (abs(a) + abs(b) + 1e-9) * total) / (b + 1e-9)
    return r_u, r_v


def constant_share(x: Tensor, constant: Tensor, rel: Tensor, rule: str) -> Tensor:
    if rule == "positive":
        return rel
    finite = constant.isfinite()
    assert not rel[~finite].any()
    kept = sum_shares(x[finite], constant[finite], rel[finite], rule)[0]
    return torch.zeros_like(x).masked_scatter(finite, kept)


def product_shares(a: Tensor, b: Tensor, rel: Tensor, rule: str, parts: tuple[float, float]) -> Values:
    """a [m, n] @ b [n, d], the contributions a_ik b_kj of each entry of the result; `parts`: of it to each operand."""
    r_a, r_b = torch.zeros_like(a), torch.zeros_like(b)
    for i, j in itertools.product(range(a.shape[0]), range(b.shape[1])):
        contributions = a[i] * b[:, j]
        contributions = contributions.clamp(min=0) if rule == "positive" else contributions
        given = share(contributions[None], rel[i, j][None], rule)
        r_a[i] += parts[0] * given
        r_b[:, j] += parts[1] * given
    return r_a, r_b


def per_head(oracle: Callable[..., Values]) -> Callable[..., Values]:
    def of_heads(a: Tensor, b: Tensor, rel: Tensor, rule: str) -> Values:
        heads = [oracle(a[h], b[h], rel[h], rule) for h in range(len(a))]
        return torch.stack([x for x, _ in heads]), torch.stack([x for _, x in heads])

    return of_heads


@per_head
def attention_value(attn: Tensor, v: Tensor, rel: Tensor, rule: str) -> Values:
    return product_shares(attn, v, rel, rule, (0.5, 1.0 if rule == "positive" else 0.5))


@per_head
def query_key(q: Tensor, k: Tensor, rel: Tensor, rule: str) -> Values:
    r_q, r_k = product_shares(q, k.mT, rel, rule, (0.5, 0.5))
    return r_q, r_k.mT


def same_sign(x: Tensor, matrix: Tensor, rel: Tensor) -> Tensor:
    """A weighted sum of inputs: shares among those with the sign of the result."""
    r = torch.zeros(x.numel(), dtype=torch.float64)
    for weights, given in zip(matrix, rel.flatten(), strict=True):
        sign = torch.sign(weights @ x.flatten())
        r += share((weights * (sign * x.flatten()).clamp(min=0))[None], given[None], "positive")
    return r.reshape(x.shape)


def mean_shares(x: Tensor, rel: Tensor, rule: str, dims: list[int]) -> Tensor:
    matrix = of_units(lambda t: t.mean([d + 1 for d in dims]), x.shape)
    if rule == "positive":
        return same_sign(x, matrix, rel)
    return share(matrix * x.flatten(), rel.flatten(), rule).reshape(x.shape)


def picked(f: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Where entries go: found on their numbers, 0 for what is none of them."""

    def oracle(x: Tensor, rel: Tensor, rule: str) -> Tensor:
        places = f(torch.arange(1, x.numel() + 1, dtype=torch.float64).reshape(1, *x.shape)).flatten()
        r = torch.zeros(x.numel() + 1, dtype=torch.float64)
        for place, given in zip(places.long(), rel.flatten(), strict=True):
            if place:
                r[place] += (
                    given if rule == "positive" else share(x.flatten()[place - 1].reshape(1, 1), given[None], rule)[0]
                )
        return r[1:].reshape(x.shape)

    return oracle


def largest(windows: Callable[[torch.Size], Iterator[list[int]]], ties: str) -> Callable[..., Tensor]:
    """The largest entry of each window (numbers of entries of x): the first of them, or all in equal parts."""

    def oracle(x: Tensor, rel: Tensor, rule: str) -> Tensor:
        flat, r = x.flatten(), torch.zeros(x.numel(), dtype=torch.float64)
        for window, given in zip(windows(x.shape), rel.flatten(), strict=True):
            highest = max(float(flat[i]) for i in window)
            winners = [i for i in window if float(flat[i]) == highest]
            for i in winners[:1] if ties == "first" else winners:
                r[i] += given / (1 if ties == "first" else len(winners))
        return r.reshape(x.shape)

    return oracle


def columns(shape: torch.Size) -> Iterator[list[int]]:
    """All tokens of a feature, x [T, D]."""
    return ([t * shape[1] + d for t in range(shape[0])] for d in range(shape[1]))


def squares(size: int, stride: int, padding: int) -> Callable[[torch.Size], Iterator[list[int]]]:
    def windows(shape: torch.Size) -> Iterator[list[int]]:
        channels, height, width = shape
        starts = [range(-padding, n + padding - size + 1, stride) for n in (height, width)]
        for c, top, left in itertools.product(range(channels), *starts):
            inside = itertools.product(range(top, top + size), range(left, left + size))
            yield [(c * height + i) * width + j for i, j in inside if 0 <= i < height and 0 <= j < width]

    return windows


def gradient_shares(f: Callable[..., Tensor]) -> Callable[..., Values]:
    """x_i ∂f_j/∂x_i of every output, by forward differentiation, divided among its operands."""

    def oracle(*args: Any) -> Values:
        *xs, rel, _ = args
        y = f(*(x[None] for x in xs))[0]
        found = []
        for i, x in enumerate(xs):
            alone = lambda t, i=i: f(*(o[None] for o in xs[:i]), t[None], *(o[None] for o in xs[i + 1 :]))[0]  # noqa: E731
            jacobian = torch.func.jacfwd(alone)(x).reshape(y.numel(), -1)
            s = ratio(rel.flatten(), y.flatten(), "official")
            found.append(((jacobian * x.flatten()) * s[:, None]).sum(0).reshape(x.shape) / len(xs))
        return tuple(found)

    return oracle


def pixels(weight: Tensor, stride: int) -> Callable[..., Tensor]:
    def oracle(x: Tensor, rel: Tensor, rule: str) -> Tensor:
        seen = x[:, : (rel.shape[1] - 1) * stride + weight.shape[2], : (rel.shape[2] - 1) * stride + weight.shape[3]]
        low, high = float(seen.min()), float(seen.max())
        matrix = of_convolution(seen.shape, weight, stride, 0, 1, 1)
        contributions = matrix * seen.flatten() - low * matrix.clamp(min=0) - high * matrix.clamp(max=0)
        r = torch.zeros_like(x)
        found = contributions * (rel.flatten() / (contributions.sum(1) + 1e-9))[:, None]
        r[:, : seen.shape[1], : seen.shape[2]] = found.sum(0).reshape(seen.shape)
        return r

    return oracle


# The table.


def linear_case() -> Case:
    weight = normal(5, 6)
    return Case(
        values((2, 3, 6)),
        lambda x: F.linear(x, weight),
        lambda x, rel, rule: rules.linear(x, weight, rel, rule),
        lambda x, rel, rule: torch.stack([z_plus(token, weight, r, rule) for token, r in zip(x, rel, strict=True)]),
        (*BOTH, "original_lrp"),
    )


def convolution_case(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Case:
    weight, options = normal(*weight_shape), (stride, padding, dilation, groups)

    def oracle(x: Tensor, rel: Tensor, rule: str) -> Tensor:
        return z_plus(x, of_convolution(x.shape, weight, *options), rel, rule)

    return Case(
        values(shape),
        lambda x: convolution.CONVOLUTIONS[weight.dim()](x, weight, None, *options),
        lambda x, rel, rule: convolution.convolution(x, weight, rel, rule, *options),
        oracle,
    )


def pixel_case(shape: tuple[int, ...], window: int, stride: int) -> Case:
    weight = normal(4, shape[1], window, window)
    return Case(
        values(shape),
        lambda x: F.conv2d(x, weight, stride=stride),
        lambda x, rel, rule: convolution.pixel_convolution(x, weight, rel, (stride, stride)),
        pixels(weight, stride),
        ("positive",),
    )


def pooling_case(shape: tuple[int, ...], f: Callable[[Tensor], Tensor]) -> Case:
    def oracle(x: Tensor, rel: Tensor, rule: str) -> Tensor:
        return same_sign(x, of_units(f, x.shape), rel)

    return Case(values(shape), f, lambda x, rel, rule: operators.pooling(f, x, rel), oracle, ("positive",))


def index_case(shape: tuple[int, ...], f: Callable[[Tensor], Tensor]) -> Case:
    return Case(values(shape), f, lambda x, rel, rule: operators.index_map(f, x, rel, rule), picked(f))


def maximum_case(shape: tuple[int, ...], f: Callable[[Tensor], Tensor], oracle: Callable[..., Tensor]) -> Case:
    """Values of few kinds, so that there are ties."""
    few = lambda: (torch.randint(-2, 2, shape).double(),)  # noqa: E731
    return Case(few, f, lambda x, rel, rule: operators.index_map(f, x, rel, rule), oracle, ("positive",))


def generic_case(f: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Case:
    def formula(*args: Any) -> Values:
        *xs, rel, _ = args
        of_one = [lambda t, i=i: f(*xs[:i], t, *xs[i + 1 :]) for i in range(len(xs))]
        return tuple(operators.generic(g, x, rel, len(xs)) for g, x in zip(of_one, xs, strict=True))

    return Case(values(*shapes), f, formula, gradient_shares(f), ("positive",))


def mask_case() -> Case:
    mask = normal(3, 4).masked_fill(torch.rand(3, 4) < 0.4, -torch.inf)
    mask[:, 0] = 0.0

    def reaches(rel: Tensor) -> Tensor:
        return rel.masked_fill(mask.isinf(), 0.0)  # no relevance reaches what a softmax makes 0

    return Case(
        values((2, 3, 4)),
        lambda x: x + mask,
        lambda x, rel, rule: rules.add_constant(x, mask.expand_as(x), reaches(rel), rule),
        lambda x, rel, rule: constant_share(x, mask, reaches(rel), rule),
    )


def norm_case() -> Case:
    """A norm over features is a diagonal matrix, if what it divides by is taken as it is: each entry has all of its own."""

    def oracle(x: Tensor, rel: Tensor, rule: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        tokens = zip(x * scale, rel, strict=True)
        return torch.stack([share(torch.diag(y.abs()), r, "positive") for y, r in tokens])

    return Case(values((2, 3, 4)), lambda x: x, lambda x, rel, rule: rules.identity(rel), oracle, ("positive",))


def attention_maps() -> Values:
    return normal(2, 2, 3, 4).softmax(-1), normal(2, 2, 4, 5)


CASES: dict[str, Callable[[], Case]] = {
    "linear": linear_case,
    "residual add": lambda: Case(
        values((2, 3, 4), (2, 3, 4)), torch.add, rules.add, sum_shares, (*BOTH, "original_lrp"),
    ),
    "mask": mask_case,
    "gate": lambda: Case(
        values((2, 3, 4), (2, 3, 4)), torch.mul, lambda u, v, rel, rule: (rules.gate(rel), rules.gate(rel)),
        lambda u, v, rel, rule: product_gate(u, v, rel), ("positive",),
    ),
    "norm": norm_case,
    "attention times value": lambda: Case(attention_maps, torch.matmul, rules.attention_value, attention_value),
    "mixed maps times value": lambda: Case(
        values((2, 2, 3, 4), (2, 2, 4, 5)), torch.matmul, rules.mixed_attention_value, attention_value
    ),
    "query times key": lambda: Case(values((2, 2, 3, 5), (2, 2, 4, 5)), lambda q, k: q @ k.mT, rules.query_key, query_key),
    "softmax": lambda: Case(
        values((2, 3, 4)), lambda x: x, lambda x, rel, rule: rules.softmax(rel, rule),
        lambda x, rel, rule: rel if rule == "official" else 0 * rel,
    ),
    "fan-out": lambda: Case(
        values((2, 3)), lambda x: torch.stack([x, x, x], 1),
        lambda x, rel, rule: rules.clone(x, list(rel.unbind(-2)), rule),
        lambda x, rel, rule: picked(lambda t: torch.stack([t, t, t], 1))(x, rel, rule),
    ),
    "mean over tokens": lambda: Case(
        values((2, 5, 3)), lambda x: x.mean(1, keepdim=True), lambda x, rel, rule: rules.mean(x, rel, [1], rule),
        lambda x, rel, rule: mean_shares(x, rel, rule, [0]),
    ),
    "mean over a grid": lambda: Case(
        values((2, 2, 3, 4)), lambda x: x.mean((2, 3), keepdim=True), lambda x, rel, rule: rules.mean(x, rel, [2, 3], rule),
        lambda x, rel, rule: mean_shares(x, rel, rule, [1, 2]),
    ),
    "conv1d": lambda: convolution_case((2, 3, 7), (4, 3, 3)),
    "conv1d, strided, padded": lambda: convolution_case((2, 3, 7), (4, 3, 3), stride=2, padding=1),
    "conv1d, depthwise, dilated": lambda: convolution_case((2, 4, 9), (4, 1, 3), padding=2, dilation=2, groups=4),
    "conv1d, 1 × 1": lambda: convolution_case((2, 3, 5), (4, 3, 1)),
    "conv2d, patches": lambda: convolution_case((2, 3, 4, 6), (5, 3, 2, 2), stride=2),
    "conv2d, overlapping, padded": lambda: convolution_case((2, 2, 5, 6), (3, 2, 3, 3), stride=2, padding=1),
    "conv2d, windows that leave some out": lambda: convolution_case((2, 2, 6, 6), (3, 2, 2, 2), stride=3),
    "conv2d, dilated": lambda: convolution_case((2, 2, 6, 6), (3, 2, 2, 2), dilation=2),
    "conv2d, grouped": lambda: convolution_case((2, 4, 4, 4), (6, 2, 3, 3), padding=1, groups=2),
    "conv2d, depthwise": lambda: convolution_case((2, 3, 4, 4), (3, 1, 3, 3), padding=1, groups=3),
    "conv3d": lambda: convolution_case((2, 2, 3, 3, 3), (3, 2, 2, 2, 2)),
    "pixels, patches": lambda: pixel_case((2, 3, 4, 4), 2, 2),
    "pixels, overlapping": lambda: pixel_case((2, 2, 5, 5), 3, 1),
    "pixels, some not read": lambda: pixel_case((2, 3, 7, 6), 2, 2),
    "avg_pool1d": lambda: pooling_case((2, 3, 6), lambda x: F.avg_pool1d(x, 2)),
    "avg_pool2d, overlapping, padded": lambda: pooling_case((2, 2, 5, 5), lambda x: F.avg_pool2d(x, 3, 2, 1)),
    "avg_pool2d, padding not counted": lambda: pooling_case(
        (2, 2, 4, 4), lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    ),
    "adaptive_avg_pool1d": lambda: pooling_case((2, 3, 7), lambda x: F.adaptive_avg_pool1d(x, 3)),
    "adaptive_avg_pool2d": lambda: pooling_case((2, 2, 5, 4), lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
    "upsample, nearest": lambda: pooling_case((2, 2, 3, 3), lambda x: F.interpolate(x, scale_factor=2)),
    "upsample, bilinear": lambda: pooling_case(
        (2, 2, 3, 3), lambda x: F.interpolate(x, (5, 4), mode="bilinear", align_corners=False)
    ),
    "upsample, bicubic": lambda: pooling_case((2, 1, 4, 4), lambda x: F.interpolate(x, (6, 6), mode="bicubic")),
    "fold, overlapping": lambda: pooling_case((2, 8, 9), lambda x: F.fold(x, (4, 4), 2)),
    "select a token": lambda: index_case((2, 4, 3), lambda x: x[:, 0]),
    "roll": lambda: index_case((2, 4, 3), lambda x: x.roll(1, 1)),
    "pad": lambda: index_case((2, 4, 3), lambda x: F.pad(x, (1, 0, 2, 1))),
    "repeat": lambda: index_case((2, 4, 3), lambda x: x.repeat_interleave(2, 1)),
    "unfold, overlapping": lambda: index_case((2, 2, 4, 4), lambda x: F.unfold(x, 3, padding=1)),
    "amax over tokens": lambda: maximum_case((2, 5, 3), lambda x: x.amax(1), largest(columns, "all")),
    "max over tokens": lambda: maximum_case((2, 5, 3), lambda x: x.max(1).values, largest(columns, "first")),
    "max_pool2d": lambda: maximum_case((2, 2, 4, 4), lambda x: F.max_pool2d(x, 2), largest(squares(2, 2, 0), "first")),
    "max_pool2d, overlapping, padded": lambda: maximum_case(
        (2, 2, 5, 5), lambda x: F.max_pool2d(x, 3, 2, 1), largest(squares(3, 2, 1), "first")
    ),
    "generic: tanh gate": lambda: generic_case(lambda u, v: u * v.tanh(), (2, 3, 4), (2, 3, 4)),
    "generic: glu": lambda: generic_case(lambda x: x[..., :4] * x[..., 4:].sigmoid(), (2, 3, 8)),
    "generic: softsign": lambda: generic_case(F.softsign, (2, 3, 4)),
    "generic: cumsum": lambda: generic_case(lambda x: x.cumsum(1), (2, 4, 3)),
    "generic: three operands": lambda: generic_case(torch.addcmul, (2, 3), (2, 3), (2, 3)),
}  # fmt: skip


def product_gate(u: Tensor, v: Tensor, rel: Tensor) -> Values:
    """u_i ∂(u_i v_i)/∂u_i R_i / (u_i v_i), half of it, and the same for v."""
    y = u * v
    return 0.5 * u * v * rel / y, 0.5 * v * u * rel / y


@pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name, case in CASES.items() for rule in (torch.manual_seed(0), case().rules)[1]]
)
def test_the_formula_is_the_rule_written_out(name: str, rule: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    tensors = case.tensors()
    rel = torch.rand(2, *case.output(*tensors).shape, dtype=torch.float64)
    given = case.formula(*tensors, rel, rule)
    given = (given,) if isinstance(given, Tensor) else given
    assert all(r.shape == (2, *x.shape) for r, x in zip(given, tensors, strict=True))
    for target, sample in itertools.product(range(2), range(2)):
        expected = case.oracle(*(x[sample] for x in tensors), rel[target, sample], rule)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        for ours, theirs in zip(given, expected, strict=True):
            distance = (ours[target, sample] - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)
            assert distance < 1e-11, (target, sample, float(distance))


ADD_UP = [
    name
    for name in CASES
    if name.startswith(("residual", "attention", "fan", "mean", "avg", "ada", "fold", "sel", "ro", "max"))
]


@pytest.mark.parametrize("name", ADD_UP)
def test_positive_relevance_is_not_negative_and_adds_up(name: str) -> None:
    """Where something of the result's sign goes in, to what arrives; an attention map holds half as much again, for reading."""
    torch.manual_seed(0)
    case = CASES[name]()
    tensors = tuple(x.abs() + 0.1 for x in case.tensors())
    rel = torch.rand(1, *case.output(*tensors).shape, dtype=torch.float64)
    given = case.formula(*tensors, rel, "positive")
    parts = (given,) if isinstance(given, Tensor) else given
    expected = float(rel.sum()) * (1.5 if name == "attention times value" else 1)
    assert all(bool((part >= 0).all()) for part in parts)
    assert abs(float(sum(part.sum() for part in parts)) - expected) < 1e-10 * expected


def test_the_rollout_multiplies_blocks_from_the_output_down() -> None:
    torch.manual_seed(0)
    gradient, relevance = normal(3, 2, 2, 4, 4), normal(3, 2, 2, 4, 4)
    maps = [gradient_relevance(g, r) for g, r in zip(gradient, relevance, strict=True)]
    for normalize, start in itertools.product((False, True), range(3)):
        joint = rollout(maps, start_layer=start, normalize=normalize)
        for sample in range(2):
            row = torch.eye(4, dtype=torch.float64)[0]
            for block in range(2, start - 1, -1):
                new = torch.zeros(4, dtype=torch.float64)
                for i in range(4):
                    step = torch.tensor(
                        [
                            sum(max(0.0, float((gradient * relevance)[block, sample, h, i, j])) for h in range(2)) / 2
                            + (i == j)
                            for j in range(4)
                        ],
                        dtype=torch.float64,
                    )
                    new += row[i] * (step / step.sum() if normalize else step)
                row = new
            assert (joint[sample, 0] - row).abs().max() < 1e-12 * row.abs().max()
