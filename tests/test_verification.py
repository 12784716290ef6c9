"""`verify` can fail: every rule made wrong on purpose turns it red, in every lane."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fastrel
from fastrel import engine
from fastrel.rules import RULES
from fastrel.transform.context import Context
from fastrel.transform.lanes import Lane, Lanes
from tests.small import ids, made, remembered, whole
from tests.test_properties import Transformer

aten = torch.ops.aten

_PLAIN = {
    "seed": 1, "ids": False, "blocks": 2, "heads": 2, "head_size": 4, "form": "pre", "norm": "layer", "attention": "fused",
    "mlp": "plain", "readout": "mean", "masked": False,
}  # fmt: skip

#: Which model shows which rules.
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"mlp": "gated", "attention": "matmul", "readout": "first and mean"},
    "conv": {"mlp": "depthwise", "attention": "grouped", "norm": "rms"},
    "addmm": {"mlp": "addmm", "form": "post", "readout": "max"},
}

#: Rules that must be among those tried.
EXPECTED = {
    aten.linear.default, aten.addmm.default, aten.layer_norm.default, aten.gelu.default, aten.silu.default, aten.add.Tensor,
    aten.mul.Tensor, aten.conv1d.default, aten.mean.dim, aten.matmul.default, aten.scaled_dot_product_attention.default,
    aten.transpose.int, aten.cat.default, aten.select.int, aten.amax.default, aten.expand.default,
}  # fmt: skip


def build(name: str) -> tuple[Transformer, Tensor, Tensor]:
    model = Transformer({**_PLAIN, **MODELS[name]})
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return model, x, torch.ones(2, 5, dtype=torch.long)


def rolled(lane: Tensor) -> Tensor:
    return lane.roll(1, -1)  # a flip would undo itself in two products in a row


def halved(lane: Tensor) -> Tensor:
    return lane * 0.5


def doubled(lane: Tensor) -> Tensor:
    return lane * 2


#: Per lane: what is done to it on purpose, and the check that must see it.
MUTATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "rel": (rolled, "relevance"),
    "grad": (halved, "gradient"),
    "row": (doubled, "rows"),
}


def mutated(target: Any, lane: str, touched: list[Any]) -> Callable[[Context, fx.Node, Lanes], None]:
    """The rule of an operator, one of its lanes wrong."""
    rule, wrong = RULES[target], MUTATIONS[lane][0]

    def move(t: Context, given: Lane) -> Lane:
        return Lane(t.emit.call(wrong, given.node), given.rows)

    def rule_gone_wrong(t: Context, node: fx.Node, out: Lanes) -> None:
        given = getattr(out, lane)
        reached = any(t.wants(x) for x in node.all_input_nodes) if lane != "row" else node in t.stretch.above
        if given is not None and reached:
            touched.append(node)
            changed = given.map(lambda one: move(t, one)) if lane == "row" else move(t, given)
            out = out._replace(**{lane: changed})
        rule(t, node, out)

    return rule_gone_wrong


def targets_of(name: str) -> list[Any]:
    model, x, keep = build(name)
    explainer = fastrel.Explainer(model, backend="torch")
    graph = explainer._engine.enter((x, keep), {}).captured
    return [target for target in dict.fromkeys(node.target for node in graph.graph.nodes) if target in RULES]


#: Lanes and operators whose rules were wrong on purpose in a model before.
_tried: set[tuple[str, Any]] = set()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_rule_that_is_wrong_on_purpose_turns_it_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any of its lanes."""
    model, x, keep = build(name)
    monkeypatch.setattr(engine, "capture", remembered())
    assert fastrel.Explainer(model, backend="torch").verify(x, keep, target=1).ok
    survived = []
    for lane, target in itertools.product(MUTATIONS, targets_of(name)):
        if (lane, target) in _tried:
            continue
        touched: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setitem(RULES, target, mutated(target, lane, touched))
            report = fastrel.Explainer(model, backend="torch").verify(x, keep, target=1)
        if not touched:
            continue
        if all(node.meta["val"].shape[-1] == 1 for node in touched) and lane == "rel":
            continue  # nothing to roll
        _tried.add((lane, target))
        if MUTATIONS[lane][1] not in [one.name for one in report.checks if not one.ok]:
            survived.append(f"{lane} of {target} ({len(touched)} nodes)")
    assert not survived


def test_the_rules_that_matter_were_among_them() -> None:
    if not _tried:
        pytest.skip("needs the mutations above")
    tried = {target for _, target in _tried}
    assert tried >= EXPECTED, EXPECTED - tried


def test_it_takes_any_target_and_says_what_it_holds() -> None:
    model, x, keep = build("plain")
    explainer = fastrel.Explainer(model)
    for target in (None, 2, [0, 3], [[0, 1], [2, 3]], lambda out: out[:, 0] - out[:, 1]):
        report = explainer.verify(x, keep, target=target)
        assert report.ok, f"{target}\n{report}"
    assert "x: (5,) tokens" in str(report)
    assert str(report).endswith("verified")


def test_it_sees_a_graph_that_is_not_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, keep = build("plain")
    explainer = fastrel.Explainer(model, live=False)
    explainer(x, keep)
    model.blocks[0].mlp.spelling = "gated"
    report = explainer.verify(x, keep)
    assert next(check.name for check in report.checks if not check.ok) == "prediction"


def joined(m: Any, first: Tensor, second: Tensor, token: bool = True) -> dict[str, Tensor]:
    """Two encoders, each projected, behind a class token if there is one, through blocks that look at both."""
    one, other = m.encoder(first), m.second(second)
    parts = [m.encoder.position[:1].expand(len(first), 1, -1)] if token else []
    x = torch.cat([*parts, torch.cat([m.layer(one), m.layer(other)], 1)], 1)
    return {"first": one, "second": other, "both": m.block(m.block(x))}


@pytest.mark.slow
def test_a_target_may_read_another_output_than_the_one_that_a_class_is_picked_from() -> None:
    report = fastrel.Explainer(made(joined)).verify(ids(), ids(3, 4), target=lambda out: out["both"][:, 0, 3])
    assert report.ok, report
    assert report.blocks == 6
    assert set(report.maps) == {"first", "second"}
    alone = fastrel.Explainer(made(joined)).verify(ids(), ids(3, 4), target=lambda out: out["second"][:, 0, 3])
    assert alone.ok, alone
    assert alone.blocks == 2


def test_encoders_that_are_joined_share_the_row() -> None:
    model = made(lambda m, first, second: joined(m, first, second, token=False))
    total = whole(model, ids(), ids(3, 4), target=lambda out: out["both"][:, 0, 3])
    torch.testing.assert_close(total, torch.full_like(total, 2.0**4))  # each token came by one encoder


def spelled(attention: Any, x: Tensor, other: Tensor) -> Tensor:
    """Attention over another sequence as matrix products."""
    q, k, v = (attention.heads(layer(y)) for layer, y in ((attention.q, x), (attention.k, other), (attention.v, other)))
    return attention.o(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


def merged(attention: Any, x: Tensor, other: Tensor) -> Tensor:
    """The same with heads beside the samples."""
    layers = ((attention.q, x), (attention.k, other), (attention.v, other))
    q, k, v = (attention.heads(layer(y)).flatten(0, 1) for layer, y in layers)
    mixed = torch.bmm(torch.bmm(q, k.mT).div(8**0.5).softmax(-1), v)
    return attention.o(mixed.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2))


def decoded(m: Any, x: Tensor, y: Tensor, cross: Callable[..., Tensor]) -> Tensor:
    """An encoder, and a decoder that looks at what it gives twice."""
    x, y = m.encoder(x), m.second(y)
    for _ in range(2):
        y = m.block(y + cross(m.cross, y, x))
    return m.head(y[:, -1])


CROSSING: dict[str, Callable[..., Tensor]] = {
    "fused": lambda attention, x, other: attention(x, other), "spelled out": spelled, "heads beside samples": merged,
}  # fmt: skip


@pytest.mark.parametrize("start", [0, -2])
@pytest.mark.parametrize("same", [False, True], ids=["two texts", "the same text"])
@pytest.mark.parametrize("cross", CROSSING)
def test_normalised_rows_add_up_to_one_across_sequences(cross: str, same: bool, start: int) -> None:
    if same:
        model, given = made(lambda m, x: decoded(m, x, x, CROSSING[cross])), [ids()]
    else:
        model, given = made(lambda m, x, y: decoded(m, x, y, CROSSING[cross])), [ids(), ids(3, 4)]
    total = whole(model, *given, normalize=True, start=start)
    torch.testing.assert_close(total, torch.ones_like(total))


def attended(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = attention(x).chunk(3, -1)
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


class Around(nn.Module):
    """Attention blocks within a residual connection that meets them by concatenation, as in MobileViT."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 24) for _ in range(blocks))
        self.both, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = y + attended(block, y)[0]
        return self.head(self.both(torch.cat([x, y], -1)).mean(1))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_what_blocks_leave_of_a_row_takes_the_place_of_a_connection_around_them_once(blocks: int) -> None:
    model, x = Around(blocks).double().eval(), torch.randn(2, 6, 8, dtype=torch.float64)
    maps, y = [], x
    for block in model.blocks:
        mixed, weights = attended(block, y)
        maps, y = [*maps, weights], y + mixed
    row = torch.full((2, 1, 6), 1 / 6, dtype=torch.float64)
    for weights in reversed(maps):
        row = (row + row @ weights) / 2
    torch.testing.assert_close(fastrel.Explainer(model, "rollout")(x, target=0).relevance, row[:, 0])


@pytest.mark.parametrize("features", ["masked", "scattered", "padded", "written"])
def test_constants_in_the_place_of_features_take_no_part_of_a_row(features: str) -> None:
    class Replacing(Around):
        def forward(self, x: Tensor) -> Tensor:
            y = {
                "masked": lambda: x.masked_fill(torch.arange(8) % 3 == 0, 1.0),
                "scattered": lambda: x.scatter(-1, x.argmax(-1, keepdim=True), 2.0),
                "padded": lambda: F.pad(x[..., 2:], (1, 1)),
                "written": lambda: torch.where(torch.arange(8) > 2, x, 0.5),
            }[features]()
            return super().forward(y)

    model, x = Replacing(1).double().eval(), torch.randn(2, 6, 8, dtype=torch.float64)
    total = fastrel.Explainer(model, "rollout")(x, target=0).relevance.sum(1)
    torch.testing.assert_close(total, torch.ones_like(total))


class Grouped(nn.Module):
    """Two keys and values for four heads, the heads beside their group or repeated."""

    def __init__(self, repeated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.kv, self.head, self.repeated = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 3), repeated

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 2, 4)).permute(0, 2, 3, 1, 4)  # [B, groups, heads of one, T, d]
        k, v = (y.unflatten(-1, (2, 1, 4)).permute(0, 2, 3, 1, 4) for y in self.kv(x).chunk(2, -1))
        if self.repeated:
            q, k, v = (y.flatten(1, 2) for y in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
        y = (q @ k.mT).softmax(-1) @ v
        y = y if self.repeated else y.flatten(1, 2)
        return self.head(y.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("method", ["transformer_attribution", "rollout", "attnlrp", "lrp"])
def test_heads_beside_their_group_are_heads(method: str) -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    own, other = (fastrel.Explainer(Grouped(r).double().eval(), method)(x, target=1) for r in (False, True))
    torch.testing.assert_close(own.relevance, other.relevance)


def test_outputs_that_are_no_tensors_have_their_places() -> None:
    explainer = fastrel.Explainer(made(lambda m, x: (None, 3, m.head(m.encoder(x)[:, 0]))), backend="torch")
    for target in (1, lambda out: out[2][:, 1]):
        report = explainer.verify(ids(), target=target)
        assert report.ok, report
        assert {check.name: check for check in report.checks}["relevance"].limit is not None
