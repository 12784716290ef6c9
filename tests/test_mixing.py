"""Attention without a softmax: maps of any kind, linear attention, layers over tokens; and what is refused instead of passed over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrel
from fastrel.reference import models as reference
from fastrel.reference import rollout
from fastrel.reference.rollout import gradient_relevance
from fastrel.reference.tape import Tape
from tests.test_spellings import LENGTH, SIZE, Block, Planted, heads, ids, of_heads, scores, tokens

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def decay(s: Tensor) -> Tensor:
    """γ^(i−j) for j ≤ i, as in RetNet."""
    apart = torch.arange(s.shape[-2])[:, None] - torch.arange(s.shape[-1])
    return torch.where(apart >= 0, 0.8 ** apart.clamp(min=0).to(s.dtype), 0.0)


def by_sum(a: Tensor) -> Tensor:
    return a / (a.sum(-1, keepdim=True) + 1e-6)


#: A = f(q kᵀ / √d).
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda s: s.relu() / LENGTH,
    "relu, normalised": lambda s: by_sum(s.relu()),
    "squared relu": lambda s: s.relu() ** 2 / s.shape[-1],
    "sigmoid": lambda s: torch.sigmoid(s - 1.5),
    "tanh": torch.tanh,
    "decay": lambda s: s * decay(s),
    "causal": lambda s: s.tril() / LENGTH,
    "exp": lambda s: s.exp() / LENGTH,
    "difference of softmaxes": lambda s: s.softmax(-1) - 0.3 * (-s).softmax(-1),
    "gated softmax": lambda s: torch.sigmoid(2 * s) * s.softmax(-1),
    "L1": lambda s: F.normalize(s, p=1, dim=-1),
}


def model(attend: Attend) -> nn.Module:
    return Planted(attention=of_heads(attend)).double().eval()


def expected(planted: Any, f: Callable[[Tensor], Tensor], rules: Any) -> Tensor:
    """The map of class 1 by the reference, block by block: E_h[(∇A ⊙ R_A)⁺] with A = f(q kᵀ / √d)."""

    def forward(tape: Tape) -> reference.Forward:
        x = F.embedding(ids(), planted.table)
        run = reference.Forward(logits=x, embedding=x, inputs=x)
        for w in planted.blocks:
            entry = x
            x, branch = tape.clone(x, 2)
            copies = tape.clone(tape.norm(branch, w.norm1.weight, w.norm1.bias, w.norm1.eps), 3)
            layers = zip(copies, (w.q, w.k, w.v), strict=True)
            q, k, v = (tape.rearrange(heads, tape.linear(y, layer.weight, layer.bias)) for y, layer in layers)
            attn = tape.map(f, tape.identity(lambda s: s / SIZE**0.5, tape.query_key(q, k)))
            mixed = tape.rearrange(tokens, tape.attention_value(attn, v, signed=True))
            x = tape.add(x, tape.linear(mixed, w.o.weight, w.o.bias))
            run.blocks.append((entry, attn, v))
            x, branch = tape.clone(x, 2)
            hidden = tape.linear(tape.norm(branch, w.norm2.weight, w.norm2.bias, w.norm2.eps), w.up.weight, w.up.bias)
            x = tape.add(x, tape.linear(tape.activation(F.gelu, hidden), w.down.weight, w.down.bias))
        run.logits = tape.linear(tape.select_token(x, 0), planted.head.weight, planted.head.bias)
        return run

    found = reference.trace(forward, torch.ones(3, dtype=torch.long), rules)
    return rollout([gradient_relevance(b.gradient, b.relevance) for b in found.blocks])[:, 0]


@pytest.mark.parametrize("name", MAPS)
def test_a_map_of_any_kind_is_explained_as_the_reference_does(name: str) -> None:
    given = model(lambda q, k, v: MAPS[name](scores(q, k)) @ v)
    explainer = fastrel.Explainer(given, "transformer_attribution", normalize_rollout=False, backend="torch")
    found = explainer(ids(), target=1).relevance
    torch.testing.assert_close(found, expected(given, MAPS[name], "positive"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "decay", "squared relu"])
def test_by_the_official_rules_relevance_goes_on_through_the_map(name: str) -> None:
    given = model(lambda q, k, v: MAPS[name](scores(q, k)) @ v)
    explainer = fastrel.Explainer(
        given, "transformer_attribution", rules="official", normalize_rollout=False, backend="torch"
    )
    found = explainer(ids(), target=1).relevance
    torch.testing.assert_close(found, expected(given, MAPS[name], "official"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["relu, normalised", "decay", "difference of softmaxes"])
def test_a_map_of_any_kind_is_verified_by_the_second_path(name: str) -> None:
    report = fastrel.Explainer(model(lambda q, k, v: MAPS[name](scores(q, k)) @ v), backend="torch").verify(ids(), target=1)
    assert report.ok, report
    assert report.blocks == 2
    assert not any("not checked" in check.meaning for check in report.checks), report


def elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def features(x: Tensor) -> Tensor:
    """Performer's, of fixed directions."""
    directions = torch.linspace(-1, 1, SIZE * 12, dtype=x.dtype).sin().reshape(SIZE, 12)
    return torch.exp(x @ directions - x.pow(2).sum(-1, keepdim=True) / 2)


def linear(phi: Callable[[Tensor], Tensor]) -> Attend:
    """q (kᵀ v) / q Σk."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = phi(q), phi(k)
        return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1))

    return attend


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As fast-transformers has it: heads after tokens, the normaliser among three operands."""
    q, k, v = (x.transpose(1, 2) for x in (elu(q), elu(k), v))
    of_keys = torch.einsum("nshd,nshm->nhmd", k, v)
    z = 1 / torch.einsum("nlhd,nhd->nlh", q, k.sum(1))
    return torch.einsum("nlhd,nhmd,nlh->nlhm", q, of_keys, z).transpose(1, 2)


def beside_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As EfficientViT has it: values with a 1, whose sum normalises."""
    out = elu(q) @ (elu(k).mT @ F.pad(v, (0, 1), value=1.0))
    return out[..., :-1] / out[..., -1:]


def tokens_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = elu(q).mT, elu(k).mT, torch.cat((v, torch.ones_like(v[..., :1])), -1).mT
    out = (v @ k.mT) @ q
    return (out[:, :, :-1] / out[:, :, -1:]).mT


def map_of(phi: Callable[[Tensor], Tensor]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = phi(q) @ phi(k).mT
        return a / a.sum(-1, keepdim=True) @ v

    return attend


#: Linear attention, and the same with its map written out.
LINEAR: dict[str, tuple[Attend, Attend]] = {
    "elu + 1": (linear(elu), map_of(elu)),
    "einsums": (by_einsum, map_of(elu)),
    "ones beside values": (beside_ones, map_of(elu)),
    "tokens last": (tokens_last, map_of(elu)),
    "random features": (linear(features), map_of(features)),
    "keys by softmax": (lambda q, k, v: q @ (k.softmax(2).mT @ v) * 0.5, lambda q, k, v: (q @ k.mT.softmax(-1)) @ v * 0.5),
    "both by softmax": (
        lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
        lambda q, k, v: (q.softmax(-1) @ k.mT.softmax(-1)) @ v,
    ),
    "a scale within": (lambda q, k, v: q @ ((k.mT @ v) / k.shape[2]), lambda q, k, v: (q @ k.mT) / k.shape[2] @ v),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_attention_is_explained_by_the_map_that_it_implies(name: str) -> None:
    found, plain = (fastrel.Explainer(model(f), backend="torch")(ids(), target=1) for f in LINEAR[name])
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.relevance, plain.relevance, rtol=1e-8, atol=1e-10)
    assert not found.report, found.report


def test_linear_attention_is_verified() -> None:
    report = fastrel.Explainer(model(beside_ones), backend="torch").verify(ids(), target=1)
    assert report.ok, report
    assert report.blocks == 2


class Two(Planted):
    """One block mixes by softmax attention, so that the model has a map in any case, and the next as it is told; `below`: before it."""

    def __init__(self, mix: Callable[[Block, Tensor], Tensor], below: bool = False) -> None:
        super().__init__()
        self.mixes = [of_heads(F.scaled_dot_product_attention), mix][:: -1 if below else 1]

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> logits [B, 3]."""
        x = F.embedding(ids, self.table)
        for w, mix in zip(self.blocks, self.mixes, strict=True):
            x = x + mix(w, w.norm1(x))  # type: ignore[arg-type, operator]
        return self.head(x[:, 0])


def explainer(mix: Callable[[Block, Tensor], Tensor], below: bool = False) -> fastrel.Explainer:
    return fastrel.Explainer(Two(mix, below).double().eval(), "rollout", normalize_rollout=False, backend="torch")


def explained(mix: Callable[[Block, Tensor], Tensor]) -> fastrel.Explanation:
    return explainer(mix)(ids(), target=1)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("attend", [lambda q, k, v: scores(q, k).relu() @ v, linear(elu)], ids=["map", "linear"])
def test_no_block_is_passed_over_beside_others(attend: Attend, below: bool) -> None:
    assert len(explainer(of_heads(attend), below).using("transformer_attribution").trace(ids(), target=1)) == 2


def in_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sums over tokens that were taken apart and joined: no form that is known."""
    sums = k.mT @ v
    return q @ torch.cat((sums[..., :2], 2 * sums[..., 2:]), -1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal linear attention by running sums."""
    sums = (elu(k)[..., :, None] * v[..., None, :]).cumsum(2)
    return (elu(q)[..., None, :] @ sums).squeeze(-2)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("attend", [in_columns, causal])
def test_sums_over_tokens_that_come_back_in_an_unknown_form_are_refused(attend: Attend, below: bool) -> None:
    with pytest.raises(fastrel.UnsupportedModelError, match=r"summed over.*write it as|it moves or mixes tokens"):
        explainer(of_heads(attend), below)(ids(), target=1)


def test_what_lies_below_the_first_block_that_is_asked_for_is_not_refused() -> None:
    one = Two(of_heads(F.scaled_dot_product_attention)).double().eval()
    one.mixes = [of_heads(F.scaled_dot_product_attention)] * 2
    one.mixes[0] = lambda w, x: of_heads(in_columns)(w, x) + of_heads(F.scaled_dot_product_attention)(w, x)
    assert fastrel.Explainer(one, start_layer=-1, backend="torch")(ids(), target=1).relevance.isfinite().all()


def test_attention_over_channels_stays_where_its_tokens_are() -> None:
    def channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)).softmax(-1) @ v.mT).mT

    assert len(explainer(of_heads(channels)).using("transformer_attribution").trace(ids(), target=1)) == 1


def test_a_layer_over_tokens_takes_the_row_to_those_that_it_is_made_of() -> None:
    turned = torch.eye(LENGTH, dtype=torch.float64).flip(0)
    found = explained(lambda w, x: w.o(turned @ w.v(x)))
    plain = explained(lambda w, x: w.o(w.v(x).flip(1)))
    same = explained(lambda w, x: w.o(w.v(x)))
    torch.testing.assert_close(found.relevance, plain.relevance, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found.relevance, same.relevance)


def test_keys_and_values_projected_to_fewer_tokens_are_mixed_by_the_map() -> None:
    weight = torch.linspace(-1, 1, 3 * LENGTH, dtype=torch.float64).reshape(3, LENGTH)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, weight @ k, weight @ v)

    report = fastrel.Explainer(model(attend), backend="torch").verify(ids(), target=1)
    assert report.ok, report
    assert report.blocks == 2


def test_a_convolution_whose_channels_are_tokens_is_refused() -> None:
    weight = torch.randn(LENGTH, LENGTH, 1, dtype=torch.float64)
    with pytest.raises(fastrel.UnsupportedModelError, match="mixes tokens, which lie along its channels"):
        explained(lambda w, x: w.o(F.conv1d(w.v(x), weight)))


class Mixer(nn.Module):
    """Two blocks over 6 tokens, in each attention, its queries turned or of a running mean, and a layer over tokens."""

    def __init__(self, over: Callable[[Tensor], Tensor], queries: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.over, self.queries, self.embed, self.head = over, queries, nn.Embedding(20, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(6, 12), nn.Linear(12, 6)]) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for qkv, out, first, last in self.blocks:  # type: ignore[misc]
            q, k, v = qkv(x + x.cumsum(1) / 10 if self.queries == "running" else x).chunk(3, -1)
            if self.queries == "turned":  # as rotary positions turn pairs of features
                q = q + torch.stack([-q[..., 1::2], q[..., ::2]], -1).flatten(-2) / 10
            x = x + out((q @ k.mT / 4).softmax(-1) @ v)
            x = x + last(self.over(first(x.mT))).mT
        return self.head(x.mean(1))


IDS = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("queries", ["turned", "running"])
def test_what_is_no_linear_attention_is_explained(queries: str) -> None:
    report = fastrel.Explainer(Mixer(F.gelu, queries).double().eval(), backend="torch").verify(IDS, target=1)
    assert report.ok, report
    assert report.blocks == 2


@pytest.mark.parametrize("over", [torch.tanh, F.leaky_relu, lambda x: x * x.sigmoid()])
def test_a_layer_over_tokens_hands_the_row_on_whatever_follows_it(over: Callable[[Tensor], Tensor]) -> None:
    """By its weights: in the last block, whose attention comes before, another layer is another map, not the identity."""
    model = Mixer(over).double().eval()
    explainer = fastrel.Explainer(model, "rollout", start_layer=-1, backend="torch")
    found = explainer(IDS, target=1).relevance
    first, last = model.blocks[-1][2:]  # type: ignore[index]
    nn.init.eye_(first.weight), nn.init.eye_(last.weight)
    assert (found - explainer(IDS, target=1).relevance).abs().max() > 1e-3


def test_a_layer_over_tokens_that_is_not_seen_to_turn_back_is_refused() -> None:
    with pytest.raises(
        fastrel.UnsupportedModelError, match=r"blocks.1.2 mixes tokens, and what it makes is not turned back"
    ):
        fastrel.Explainer(Mixer(lambda x: x.softmax(-1)).eval())(IDS, target=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_head_of_keys_and_values_is_shared_by_all_queries_as_if_it_were_repeated(dtype: torch.dtype) -> None:
    """Falcon's multi-query attention, which torch broadcasts."""
    shared = model(lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1])).to(dtype)
    repeated = model(lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v))).to(
        dtype
    )
    ours, expected = (fastrel.Explainer(one)(ids(), target=1) for one in (shared, repeated))
    assert not ours.report
    torch.testing.assert_close(ours.relevance, expected.relevance)
    verified = fastrel.Explainer(shared).verify(ids(), target=1)
    assert verified.ok, str(verified)
