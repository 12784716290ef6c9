"""Home-made transformers: one function has one map however it is spelled, and the map finds the evidence that was planted."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrel

D, HEADS, LENGTH = 16, 2, 6
SIZE = D // HEADS

#: The token that speaks for class 1, and where it stands in each sample.
EVIDENCE, PLACES = 7, [4, 1, 3]


class Block(nn.Module):
    """Weights of a block that hand on, besides noise, what the evidence adds: the direction `u`."""

    def __init__(self, u: Tensor) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down, self.gate = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.Linear(D, 2 * D)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for layer in (self.v, self.o):
                layer.weight.add_(2 * torch.outer(u, u))


class Planted(nn.Module):
    """Token ids [B, T] -> logits [B, 3]; `spelled` replaces parts of the plain spelling below."""

    def __init__(self, **spelled: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        u = torch.tensor([1.0, -1.0]).repeat(D // 2) / math.sqrt(D)
        table = 0.3 * torch.randn(20, D)
        table[EVIDENCE] += 6 * u
        self.table, self.head, self.pool = nn.Parameter(table), nn.Linear(D, 3), nn.Linear(D, 1)
        with torch.no_grad():
            self.head.weight[1] += 4 * u
        self.blocks = nn.ModuleList(Block(u) for _ in range(2))
        self.spelled = {**PLAIN, **spelled}

    def forward(self, ids: Tensor) -> Tensor:
        say = self.spelled
        x = say["embedding"](self, ids)
        for block in self.blocks:
            x = say["residual"](x, say["attention"](block, say["norm"](block.norm1, x)))
            x = say["residual"](x, say["MLP"](block, say["norm"](block.norm2, x)))
        return say["head"](self, say["readout"](self, x))


def heads(x: Tensor) -> Tensor:
    """[B, T, D] -> [B, h, T, d]."""
    return x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)


def tokens(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def of_heads(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Block, Tensor], Tensor]:
    """Attention by a function of queries, keys and values [B, h, T, d]."""
    return lambda w, x: w.o(tokens(attend(heads(w.q(x)), heads(w.k(x)), heads(w.v(x)))))


def merged(w: Block) -> tuple[Tensor, Tensor]:
    layers = (w.q, w.k, w.v)
    return torch.cat([x.weight for x in layers]), torch.cat([x.bias for x in layers])


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / SIZE**0.5


def written_softmax(s: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def shifted_by_einsum(s: Tensor) -> Tensor:
    e = s.exp()
    return e / torch.einsum("bhqk->bhq", e)[..., None]


def by_its_sum(a: Tensor) -> Tensor:
    return a / a.sum(-1, keepdim=True)


def one_by_one(w: Block, x: Tensor) -> Tensor:
    q, k, v, found = w.q(x), w.k(x), w.v(x), []
    for at in range(0, D, SIZE):
        one = slice(at, at + SIZE)
        found.append(scores(q[..., one], k[..., one]).softmax(-1) @ v[..., one])
    return w.o(torch.cat(found, -1))


def in_columns(w: Block, x: Tensor) -> Tensor:
    """Each head projected by its columns of the output weight."""
    q, k, v, found = w.q(x), w.k(x), w.v(x), w.o.bias
    for at in range(0, D, SIZE):
        one = slice(at, at + SIZE)
        found = found + scores(q[..., one], k[..., one]).softmax(-1) @ v[..., one] @ w.o.weight[:, one].T
    return found


def own_weights(w: Block, x: Tensor) -> Tensor:
    """Each head with its rows and columns of all weights."""
    total: Any = 0
    for one in (slice(at, at + SIZE) for at in range(0, D, SIZE)):
        q, k, v = (F.linear(x, y.weight[one], y.bias[one]) for y in (w.q, w.k, w.v))
        total = total + F.linear(F.scaled_dot_product_attention(q, k, v), w.o.weight[:, one])
    return total + w.o.bias


def written(w: Block, x: Tensor) -> Tensor:
    """Heads written into their places one after the other."""
    q, k, v = w.q(x), w.k(x), w.v(x)
    found = torch.zeros_like(q)
    for at in range(0, D, SIZE):
        one = slice(at, at + SIZE)
        found[..., one] = scores(q[..., one], k[..., one]).softmax(-1) @ v[..., one]
    return w.o(found)


def own_layers(w: Block, x: Tensor) -> Tensor:
    """Heads with output layers of their own, whose weights are no columns of one."""
    total: Any = 0
    for i, one in enumerate(slice(at, at + SIZE) for at in range(0, D, SIZE)):
        q, k, v = (F.linear(x, y.weight[one], y.bias[one]) for y in (w.q, w.k, w.v))
        weight = w.o.weight[:, one] * 1.0
        total = total + F.linear(scores(q, k).softmax(-1) @ v, weight, w.o.bias if i == 0 else None)
    return total


def in_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sums of products, no matrix product."""
    s = (q[:, :, :, None] * k[:, :, None]).sum(-1) / SIZE**0.5
    return (s.softmax(-1)[..., None] * v[:, :, None]).sum(3)


def in_pairs_expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    pairs = q.unsqueeze(3).expand(-1, -1, -1, length, -1) * k.unsqueeze(2).expand(-1, -1, length, -1, -1)
    return torch.sum(torch.sum(pairs * SIZE**-0.5, -1).softmax(-1).unsqueeze(-1) * v.unsqueeze(2), dim=-2)


def pairs_one_by_one(w: Block, x: Tensor) -> Tensor:
    q, k, v, found = w.q(x), w.k(x), w.v(x), []
    for at in range(0, D, SIZE):
        one = slice(at, at + SIZE)
        attn = ((q[..., one][:, :, None] * k[..., one][:, None]).sum(-1) / SIZE**0.5).softmax(-1)
        found.append((attn[..., None] * v[..., one][:, None]).sum(2))
    return w.o(torch.cat(found, -1))


def pairs_heads_last(w: Block, x: Tensor) -> Tensor:
    q, k, v = (y(x).unflatten(-1, (HEADS, SIZE)) for y in (w.q, w.k, w.v))
    attn = ((q[:, :, None] * k[:, None]).sum(-1) / SIZE**0.5).softmax(2)
    return w.o((attn[..., None] * v[:, None]).sum(2).flatten(2))


def einsum_of_weights(w: Block, x: Tensor) -> Tensor:
    q, k, v = (
        torch.einsum("btd,hed->bhte", x, y.weight.view(HEADS, SIZE, D)) + y.bias.view(HEADS, 1, SIZE)
        for y in (w.q, w.k, w.v)
    )
    attn = (torch.einsum("bhqd,bhkd->bhqk", q, k) / SIZE**0.5).softmax(-1)
    out = torch.einsum("bhqk,bhkd->bqhd", attn, v)
    return torch.einsum("bqhd,ehd->bqe", out, w.o.weight.view(D, HEADS, SIZE)) + w.o.bias


def sequence_first(w: Block, x: Tensor) -> Tensor:
    """[T, B, D] inside, as nn.MultiheadAttention and fairseq have it."""
    x = x.transpose(0, 1)
    length, batch, _ = x.shape
    q, k, v = (y(x).view(length, batch * HEADS, SIZE).transpose(0, 1) for y in (w.q, w.k, w.v))
    out = torch.bmm(torch.bmm(q * SIZE**-0.5, k.transpose(1, 2)).softmax(-1), v)
    return w.o(out.transpose(0, 1).reshape(length, batch, D)).transpose(0, 1)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in groups, [B, groups, heads of one, T, d], as grouped queries have them."""
    q, k, v = (y.unflatten(1, (-1, 2)) for y in (q, k, v))
    return (scores(q, k).softmax(-1) @ v).flatten(1, 2)


def grouped_keys(w: Block, x: Tensor) -> Tensor:
    """Groups whose keys and values are one for all their heads, and here one group."""
    q = heads(w.q(x))[:, None]
    k, v = (heads(y(x))[:, :, None].transpose(1, 2) for y in (w.k, w.v))
    return w.o(tokens((scores(q, k).softmax(-1) @ v).squeeze(1)))


def multihead(w: Block, x: Tensor) -> Tensor:
    weight, bias = merged(w)
    x = x.transpose(0, 1)
    found, _ = F.multi_head_attention_forward(
        x, x, x, D, HEADS, weight, bias, None, None, False, 0.0, w.o.weight, w.o.bias, training=False, need_weights=False
    )
    return found.transpose(0, 1)


def merged_qkv(w: Block, x: Tensor) -> Tensor:
    q, k, v = F.linear(x, *merged(w)).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
    return w.o(tokens(F.scaled_dot_product_attention(q, k, v)))


def merged_chunk(w: Block, x: Tensor) -> Tensor:
    q, k, v = (heads(y) for y in F.linear(x, *merged(w)).chunk(3, dim=-1))
    return w.o(tokens(scores(q, k).softmax(-1) @ v))


def merged_split_by_addmm(w: Block, x: Tensor) -> Tensor:
    weight, bias = merged(w)
    qkv = torch.addmm(bias, x.flatten(0, 1), weight.T).view(*x.shape[:2], 3 * D)
    q, k, v = (y.view(*x.shape[:2], HEADS, SIZE).permute(0, 2, 1, 3) for y in qkv.split(D, 2))
    return w.o((torch.matmul(scores(q, k).softmax(-1), v)).permute(0, 2, 1, 3).contiguous().view(*x.shape))


def keys_and_values(w: Block, x: Tensor) -> Tensor:
    k, v = F.linear(x, torch.cat((w.k.weight, w.v.weight)), torch.cat((w.k.bias, w.v.bias))).tensor_split(2, -1)
    return w.o(tokens(scores(heads(w.q(x)), heads(k)).softmax(-1) @ heads(v)))


def convolved(w: Block, x: Tensor) -> Tensor:
    """Projections as 1 × 1 convolutions, values [B, D, T]."""
    q, k, v = (F.conv1d(x.mT, y.weight[..., None], y.bias).unflatten(1, (HEADS, SIZE)) for y in (w.q, w.k, w.v))
    attn = (torch.einsum("bhdq,bhdk->bhqk", q, k) * SIZE**-0.5).softmax(-1)
    out = torch.einsum("bhqk,bhdk->bhdq", attn, v).flatten(1, 2)
    return F.conv1d(out, w.o.weight[..., None], w.o.bias).mT


def repeated_keys(w: Block, x: Tensor) -> Tensor:
    q, k, v = heads(w.q(x)), heads(w.k(x)), heads(w.v(x))
    k, v = (torch.cat([y[:, i : i + 1] for i in range(HEADS)], 1) for y in (k, v))
    return w.o(tokens(F.scaled_dot_product_attention(q, k, v, torch.zeros(1, 1, 1, 1, dtype=x.dtype))))


def masked(w: Block, x: Tensor) -> Tensor:
    """A mask that hides nothing."""
    keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    s = scores(heads(w.q(x)), heads(w.k(x))).masked_fill(~keep, -math.inf)
    return w.o(tokens(s.softmax(-1) @ heads(w.v(x))))


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (y.flatten(0, 1) for y in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) / SIZE**0.5).softmax(-1), v).unflatten(0, (-1, HEADS))


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (y.flatten(0, 1) for y in (q, k, v))
    s = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, alpha=SIZE**-0.5)
    return torch.bmm(s.softmax(-1), v).unflatten(0, (-1, HEADS))


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhqd,bhkd->bhqk", q, k) / SIZE**0.5
    return torch.einsum("bhqk,bhkd->bhqd", s.softmax(-1), v)


def by_dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("...qd,...kd->...qk", q, k) / SIZE**0.5
    return torch.einsum("...qk,...kd->...qd", s.softmax(-1), v)


ATTENTION: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "products": of_heads(lambda q, k, v: scores(q, k).softmax(-1) @ v),
    "matmul": of_heads(lambda q, k, v: torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)).div(SIZE**0.5), -1), v)),
    "queries scaled first": of_heads(lambda q, k, v: (q * SIZE**-0.5 @ k.mT).softmax(-1) @ v),
    "both scaled": of_heads(lambda q, k, v: ((q * SIZE**-0.25) @ (k * SIZE**-0.25).mT).softmax(-1) @ v),
    "map on the right": of_heads(lambda q, k, v: (v.mT @ scores(k, q).softmax(-2)).mT),
    "exp and sum": of_heads(lambda q, k, v: written_softmax(scores(q, k)) @ v),
    "exp and einsum": of_heads(lambda q, k, v: shifted_by_einsum(scores(q, k)) @ v),
    "divided after the product": of_heads(lambda q, k, v: scores(q, k).exp() @ v / scores(q, k).exp().sum(-1, keepdim=True)),
    "log-softmax": of_heads(lambda q, k, v: scores(q, k).log_softmax(-1).exp() @ v),
    "logsumexp": of_heads(lambda q, k, v: (scores(q, k) - scores(q, k).logsumexp(-1, keepdim=True)).exp() @ v),
    "einsum": of_heads(by_einsum),
    "einsum with dots": of_heads(by_dots),
    "softmax of columns": of_heads(lambda q, k, v: torch.einsum("bhkq,bhkd->bhqd", scores(k, q).softmax(2), v)),
    "heads with the batch": of_heads(by_bmm),
    "baddbmm": of_heads(by_baddbmm),
    "heads in groups": of_heads(grouped),
    "one group of heads": grouped_keys,
    "heads one by one": one_by_one,
    "heads stacked": of_heads(lambda q, k, v: torch.stack([scores(q[:, i], k[:, i]).softmax(-1) @ v[:, i] for i in range(HEADS)], 1)),
    "heads added up by columns": in_columns,
    "heads with weights of their own": own_weights,
    "heads written in place": written,
    "heads with output layers of their own": own_layers,
    "pairs": of_heads(in_pairs),
    "pairs, expanded": of_heads(in_pairs_expanded),
    "pairs, heads one by one": pairs_one_by_one,
    "pairs, heads last": pairs_heads_last,
    "einsum of weights": einsum_of_weights,
    "sequence first": sequence_first,
    "multi_head_attention_forward": multihead,
    "merged qkv": merged_qkv,
    "merged qkv, chunks": merged_chunk,
    "merged qkv, addmm": merged_split_by_addmm,
    "merged keys and values": keys_and_values,
    "convolutions": convolved,
    "keys taken apart": repeated_keys,
    "a mask of nothing": masked,
    "masked afterwards": of_heads(
        lambda q, k, v: scores(q, k).softmax(-1).masked_fill(torch.zeros(k.shape[2], dtype=torch.bool), 0.0) @ v
    ),
    "where": of_heads(lambda q, k, v: torch.where(torch.ones(k.shape[2], dtype=torch.bool), scores(q, k).softmax(-1), 0.0) @ v),
    "times a mask, by its sum": of_heads(
        lambda q, k, v: by_its_sum(scores(q, k).softmax(-1) * torch.ones(k.shape[2], dtype=torch.bool).to(q.dtype)) @ v
    ),
    "without NaN": of_heads(lambda q, k, v: scores(q, k).softmax(-1).nan_to_num() @ v),
}  # fmt: skip


SINK = 0.7


def sink_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A constant key of that score, whose value is 0."""
    k, v = (F.pad(y, (0, 0, 0, 1)) for y in (k, v))
    bias = F.pad(q.new_zeros(1, 1, q.shape[2], q.shape[2]), (0, 1), value=SINK)
    return F.scaled_dot_product_attention(q, k, v, bias)


def sinks(q: Tensor) -> Tensor:
    return q.new_full((HEADS, 1, 1), SINK).expand(len(q), -1, q.shape[2], -1)


def sink_in_gpt_oss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat([scores(q, k), sinks(q)], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return torch.matmul(F.softmax(s, dim=-1, dtype=s.dtype)[..., :-1], v)


def sink_below(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    top = s.amax(-1, keepdim=True)
    e = (s - top).exp()
    return e / (e.sum(-1, keepdim=True) + (SINK - top).exp()) @ v


#: Attention of which a part goes to a sink, and so nowhere.
SINKS: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "a sink among the keys": of_heads(sink_key),
    "a sink, dropped": of_heads(sink_in_gpt_oss),
    "a sink in front": of_heads(lambda q, k, v: torch.cat([sinks(q), scores(q, k)], -1).softmax(-1)[:, :, :, 1:] @ v),
    "a sink, narrow": of_heads(
        lambda q, k, v: torch.cat([scores(q, k), sinks(q)], -1).softmax(-1).narrow(-1, 0, k.shape[2]).clone() @ v
    ),
    "a sink, split": of_heads(
        lambda q, k, v: torch.cat([sinks(q), scores(q, k)], -1).softmax(-1).split([1, LENGTH], -1)[1] @ v
    ),
    "a sink in the divisor": of_heads(sink_below),
    "a number in the divisor": of_heads(
        lambda q, k, v: scores(q, k).exp() @ v / (math.exp(SINK) + scores(q, k).exp().sum(-1, keepdim=True))
    ),
}


def gelu_by_erf(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def by_addmm(w: Block, x: Tensor) -> Tensor:
    h = F.gelu(torch.addmm(w.up.bias, x.view(-1, D), w.up.weight.t()))
    return torch.addmm(w.down.bias, h, w.down.weight.t()).view(x.shape)


def einsum_of_layers(w: Block, x: Tensor) -> Tensor:
    h = F.gelu(torch.einsum("btd,fd->btf", x, w.up.weight) + w.up.bias)
    return torch.einsum("btf,df->btd", h, w.down.weight) + w.down.bias


def by_conv1d(w: Block, x: Tensor) -> Tensor:
    h = F.gelu(F.conv1d(x.mT, w.up.weight[..., None], w.up.bias))
    return F.conv1d(h, w.down.weight[..., None], w.down.bias).mT


def by_conv2d(w: Block, x: Tensor) -> Tensor:
    h = F.gelu(F.conv2d(x.mT[..., None], w.up.weight[..., None, None], w.up.bias))
    return F.conv2d(h, w.down.weight[..., None, None], w.down.bias)[..., 0].mT


def in_slices(w: Block, x: Tensor) -> Tensor:
    h, n = F.gelu(w.up(x)), D // 2
    return h[..., :n] @ w.down.weight[:, :n].T + h[..., n:] @ w.down.weight[:, n:].T + w.down.bias


def in_chunks(w: Block, x: Tensor) -> Tensor:
    parts = zip(w.up.weight.chunk(4), w.up.bias.chunk(4), w.down.weight.chunk(4, 1), strict=True)
    return torch.stack([F.linear(F.gelu(F.linear(x, up, bias)), down) for up, bias, down in parts]).sum(0) + w.down.bias


def merged_gate(w: Block, x: Tensor) -> Tensor:
    both = F.linear(x, torch.cat((w.up.weight, w.gate.weight)), torch.cat((w.up.bias, w.gate.bias)))
    up, gate = both.chunk(2, -1)
    return w.down(F.silu(gate) * up)


MLP: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "linear": lambda w, x: w.down(F.gelu(w.up(x))),
    "gelu written out": lambda w, x: w.down(gelu_by_erf(w.up(x))),
    "matmul": lambda w, x: F.gelu(x @ w.up.weight.T + w.up.bias) @ w.down.weight.T + w.down.bias,
    "einsum": einsum_of_layers,
    "addmm": by_addmm,
    "convolutions": by_conv1d,
    "convolutions of pictures": by_conv2d,
    "slices of one weight": in_slices,
    "chunks of one weight": in_chunks,
    "weights on the left": lambda w, x: (w.down.weight @ F.gelu(w.up.weight @ x.mT + w.up.bias[:, None]) + w.down.bias[:, None]).mT,
    "token by token": lambda w, x: torch.stack([w.down(F.gelu(w.up(one))) for one in x.unbind(1)], 1),
}  # fmt: skip
GATED: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "gated": lambda w, x: w.down(F.silu(w.gate(x)) * w.up(x)),
    "gated, written out": lambda w, x: w.down(w.up(x) * (w.gate(x) * w.gate(x).sigmoid())),
    "gated, merged": merged_gate,
}  # fmt: skip


def written_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def norm_by_var(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(var + norm.eps) * norm.weight + norm.bias


def norm_by_std(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    std = (x.var(-1, keepdim=True, correction=0) + norm.eps) ** 0.5
    return norm.weight * ((x - x.sum(-1, keepdim=True) / D) / std) + norm.bias


NORM: dict[str, Callable[[nn.LayerNorm, Tensor], Tensor]] = {
    "layer": lambda norm, x: norm(x),
    "function": lambda norm, x: F.layer_norm(x, (D,), norm.weight, norm.bias, norm.eps),
    "groups": lambda norm, x: F.group_norm(x.flatten(0, 1), 1, norm.weight, norm.bias, norm.eps).view(x.shape),
}
#: Relevance meets the mean that is taken away, which is no operator in a layer norm.
WRITTEN: dict[str, Callable[[nn.LayerNorm, Tensor], Tensor]] = {
    "written out": written_norm,
    "variance": norm_by_var,
    "deviation": norm_by_std,
}
RMS: dict[str, Callable[[nn.LayerNorm, Tensor], Tensor]] = {
    "RMS": lambda norm, x: F.rms_norm(x, (D,), norm.weight, norm.eps),
    "RMS, written out": lambda norm, x: norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps),
    "RMS, square root": lambda norm, x: x / torch.sqrt((x * x).sum(-1, keepdim=True) / D + norm.eps) * norm.weight,
}

RESIDUAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, y: x + y,
    "the other way": lambda x, y: y + x,
    "torch.add": lambda x, y: torch.add(x, y, alpha=1),
    "in place": lambda x, y: y.add_(x),
    "stacked": lambda x, y: torch.stack((x, y)).sum(0),
}

EMBEDDING: dict[str, Callable[[Planted, Tensor], Tensor]] = {
    "embedding": lambda m, ids: F.embedding(ids, m.table),
    "index": lambda m, ids: m.table[ids],
    "index_select": lambda m, ids: m.table.index_select(0, ids.flatten()).view(*ids.shape, D),
    "one-hot": lambda m, ids: F.one_hot(ids, 20).to(m.table.dtype) @ m.table,
}

FIRST: dict[str, Callable[[Planted, Tensor], Tensor]] = {
    "first": lambda m, x: x[:, 0],
    "first, select": lambda m, x: x.select(1, 0),
    "first, narrow": lambda m, x: x.narrow(1, 0, 1).squeeze(1),
    "first, unbind": lambda m, x: x.unbind(1)[0],
    "first, split": lambda m, x: x.split([1, LENGTH - 1], 1)[0].flatten(1),
    "first, index_select": lambda m, x: x.index_select(1, torch.tensor([0])).squeeze(1),
    "first, gather": lambda m, x: x.gather(1, torch.zeros(len(x), 1, D, dtype=torch.long))[:, 0],
    "first, take_along_dim": lambda m, x: torch.take_along_dim(x, torch.zeros(1, 1, 1, dtype=torch.long), 1)[:, 0],
    "first, sequence first": lambda m, x: x.transpose(0, 1)[0],
}


def masked_mean(_: Planted, x: Tensor) -> Tensor:
    keep = torch.ones(x.shape[:2], dtype=x.dtype)
    return (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)


MEAN: dict[str, Callable[[Planted, Tensor], Tensor]] = {
    "mean": lambda m, x: x.mean(1),
    "mean, sum": lambda m, x: x.sum(1) / x.shape[1],
    "mean, einsum": lambda m, x: torch.einsum("btd->bd", x) / x.size(1),
    "mean, pooling": lambda m, x: F.adaptive_avg_pool1d(x.mT, 1).squeeze(-1),
    "mean, masked": masked_mean,
    "mean, masked, einsum": lambda m, x: torch.einsum("btd,bt->bd", x, torch.ones(x.shape[:2], dtype=x.dtype)) / x.shape[1],
    "mean, masked, bmm": lambda m, x: torch.bmm(torch.ones(len(x), 1, x.shape[1], dtype=x.dtype), x).squeeze(1) / x.shape[1],
    "mean, product": lambda m, x: (torch.full((1, x.shape[1]), 1 / x.shape[1], dtype=x.dtype) @ x)[:, 0],
    "mean, sequence first": lambda m, x: x.permute(1, 0, 2).mean(dim=0),
}  # fmt: skip
MAX: dict[str, Callable[[Planted, Tensor], Tensor]] = {
    "max": lambda m, x: x.amax(1),
    "max, with indices": lambda m, x: x.max(1).values,
    "max, pooling": lambda m, x: F.adaptive_max_pool1d(x.mT, 1).squeeze(-1),
    "max, a window of all": lambda m, x: F.max_pool1d(x.mT, LENGTH).squeeze(-1),
    "max, kth value": lambda m, x: x.kthvalue(LENGTH, dim=1).values,
    "max, kth value of the last": lambda m, x: x.mT.kthvalue(LENGTH)[0],
    "max, top of one": lambda m, x: x.topk(1, dim=1).values[:, 0],
    "max, sorted": lambda m, x: x.sort(1, descending=True).values[:, 0],
}
POOLED: dict[str, Callable[[Planted, Tensor], Tensor]] = {
    "pooled by attention": lambda m, x: (m.pool(x).softmax(1) * x).sum(1),
    "pooled by attention, product": lambda m, x: (m.pool(x).softmax(1).mT @ x)[:, 0],
    "pooled by attention, einsum": lambda m, x: torch.einsum("bt,btd->bd", m.pool(x)[..., 0].softmax(-1), x),
    "pooled by attention, bmm": lambda m, x: torch.bmm(m.pool(x).squeeze(-1).softmax(-1).unsqueeze(1), x).squeeze(1),
}

HEAD: dict[str, Callable[[Planted, Tensor], Tensor]] = {
    "linear": lambda m, x: m.head(x),
    "product": lambda m, x: x @ m.head.weight.T + m.head.bias,
    "einsum": lambda m, x: torch.einsum("bd,cd->bc", x, m.head.weight) + m.head.bias,
    "one class at a time": lambda m, x: torch.stack([x @ w + b for w, b in zip(m.head.weight, m.head.bias, strict=True)], 1),
    "columns": lambda m, x: torch.column_stack([x @ w + b for w, b in zip(m.head.weight, m.head.bias, strict=True)]),
    "in depth": lambda m, x: torch.dstack([(x @ w + b)[:, None] for w, b in zip(m.head.weight, m.head.bias, strict=True)])[:, 0],
    "addmm": lambda m, x: torch.addmm(m.head.bias, x, m.head.weight.t()),
}  # fmt: skip

PLAIN: dict[str, Any] = {
    "attention": of_heads(F.scaled_dot_product_attention), "MLP": MLP["linear"], "norm": NORM["layer"], "residual": RESIDUAL["sum"],
    "embedding": EMBEDDING["embedding"], "readout": FIRST["first"], "head": HEAD["linear"],
}  # fmt: skip

#: The part of the model, and spellings of one function; the first is what the others must agree with.
TABLE: list[tuple[str, dict[str, Any]]] = [
    ("attention", {"fused": PLAIN["attention"], **ATTENTION}), ("attention", SINKS),
    ("MLP", MLP), ("MLP", GATED), ("norm", NORM), ("norm", WRITTEN), ("norm", RMS), ("residual", RESIDUAL), ("embedding", EMBEDDING),
    ("readout", FIRST), ("readout", MEAN), ("readout", MAX), ("readout", POOLED), ("head", HEAD),
]  # fmt: skip
CASES = [(part, name, group) for part, group in TABLE for name in group]


def ids() -> Tensor:
    """Other tokens occur once in a sample, so that a maximum over tokens has one place."""
    generator = torch.Generator().manual_seed(1)
    found = torch.stack([8 + torch.randperm(12, generator=generator)[:LENGTH] for _ in PLACES])
    return found.index_put((torch.arange(len(PLACES)), torch.tensor(PLACES)), torch.tensor(EVIDENCE))


def explained(part: str, spelling: Any) -> fastrel.Explanation:
    return fastrel.Explainer(Planted(**{part: spelling}).double().eval(), backend="torch")(ids(), target=1)


@functools.cache
def expected(part: str, name: str) -> fastrel.Explanation:
    """The explanation of the first spelling of a group."""
    (spelling,) = [group[name] for found, group in TABLE if found == part and name in group]
    return explained(part, spelling)


@pytest.mark.parametrize(("part", "name", "group"), CASES, ids=[f"{part}-{name}" for part, name, _ in CASES])
def test_one_function_has_one_map_that_finds_the_evidence(part: str, name: str, group: dict[str, Any]) -> None:
    plain = expected(part, next(iter(group)))
    found = explained(part, group[name]) if name != next(iter(group)) else plain
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-10, atol=1e-12)
    highest = found.relevance[:, 1:].argmax(1) + 1  # the first token, where it is read, keeps most for itself
    assert highest.tolist() == PLACES
    assert not found.report, found.report
    torch.testing.assert_close(found.relevance, plain.relevance, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "name", [name for name in ATTENTION if any(word in name for word in ("head", "pairs", "mask", "where", "NaN"))]
)
def test_heads_of_one_attention_are_one_block(name: str) -> None:
    model = Planted(attention=ATTENTION[name]).double().eval()
    report = fastrel.Explainer(model, backend="torch").verify(ids(), target=1)
    assert report.ok, report
    assert report.blocks == 2
    last = [
        fastrel.Explainer(m, start_layer=-1, backend="torch")(ids(), target=1).relevance
        for m in (model, Planted().double().eval())
    ]
    torch.testing.assert_close(*last, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in SINKS if "divisor" not in name])
def test_attention_with_sinks_is_verified(name: str) -> None:
    report = fastrel.Explainer(Planted(attention=SINKS[name]).double().eval(), backend="torch").verify(ids(), target=1)
    assert report.ok, report
    assert report.blocks == 2
    assert not any("not checked" in check.meaning for check in report.checks), report


@pytest.mark.parametrize("name", ["slices of one weight", "chunks of one weight"])
def test_layers_in_parts_are_verified(name: str) -> None:
    report = fastrel.Explainer(Planted(MLP=MLP[name]).double().eval(), backend="torch").verify(ids(), target=1)
    assert report.ok, report
    assert not any("not checked" in check.meaning for check in report.checks)


@pytest.mark.parametrize(("name", "group"), [(name, group) for group in (WRITTEN, RMS) for name in group])
def test_attnlrp_freezes_norms_however_they_are_spelled(name: str, group: dict[str, Any]) -> None:
    plain = NORM["layer"] if group is WRITTEN else RMS["RMS"]
    maps = [
        fastrel.Explainer(Planted(norm=norm).double().eval(), "attnlrp", backend="torch")(ids(), target=1).relevance
        for norm in (plain, group[name])
    ]
    torch.testing.assert_close(*maps, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in MEAN if "masked" in name])
def test_sums_by_constant_weights_are_verified(name: str) -> None:
    report = fastrel.Explainer(Planted(readout=MEAN[name]).double().eval(), backend="torch").verify(ids(), target=1)
    assert report.ok, report
    assert not any("not checked" in check.meaning for check in report.checks), report


def test_layers_that_share_a_whole_weight_stay_two() -> None:
    """A siamese sum is a sum of two streams, not a layer of both; nor are rows of one weight columns of it."""
    from fastrel.graph.parts import is_columns

    whole = nn.Parameter(torch.zeros(4, 6))
    assert is_columns(whole[:, :3], whole)
    assert is_columns(whole[:2].T, whole)  # [in, out] as x @ W takes it
    assert not is_columns(whole, whole)
    assert not is_columns(whole[:2], whole)


def test_places_counted_from_the_end_are_looked_up_there() -> None:
    """A table of relative positions −T + 1 … T − 1: an embedding takes no negative index."""

    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
            self.bias = nn.Parameter(torch.randn(31, 2))
            self.double().eval()

        def forward(self, ids: Tensor) -> Tensor:
            h = self.embed(ids)
            i = torch.arange(ids.shape[1])
            bias = self.bias[i[:, None] - i[None, :]].permute(2, 0, 1)
            q = h.unflatten(-1, (2, 4)).transpose(1, 2)
            h = h + ((q @ q.transpose(-1, -2) + bias).softmax(-1) @ q).transpose(1, 2).flatten(2)
            return self.head(h.mean(1))

    model, ids = Relative(), torch.randint(0, 9, (2, 6))
    explanation = fastrel.Explainer(model)(ids)
    torch.testing.assert_close(explanation.logits, model(ids))
    assert explanation.relevance.shape == (2, 6)
