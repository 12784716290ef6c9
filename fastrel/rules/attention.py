"""Attention: fused, and spelled out as matrix products around a softmax."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastrel import ops
from fastrel.errors import InputError, UnsupportedModelError
from fastrel.graph import axes as axes_
from fastrel.graph.nodes import arguments, describe
from fastrel.graph.patterns import IDENTITIES, SOFTMAXES, is_attention_value
from fastrel.ops.attention import attention_probabilities, attention_scores, carries_scores
from fastrel.ops.library import REFERENCES
from fastrel.reference import rules as reference
from fastrel.reference.pooling import tokens_read
from fastrel.reference.rollout import attention_received
from fastrel.rules.contributions import contributions
from fastrel.rules.linear import sum_lead, times_parameter, times_parameters
from fastrel.rules.pointwise import sum_to
from fastrel.rules.registry import rule
from fastrel.transform.context import Context
from fastrel.transform.lanes import Lane, Lanes, Part, Path, Row, Rows
from fastrel.transform.method import NEEDS_SAME_TOKENS, Kind
from fastrel.transform.rollout import settled_share, times_samples

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(t: Context, node: fx.Node, out: Lanes) -> None:
    """A = softmax(scale QKᵀ + mask), A V, all lanes at once."""
    q, k, v, mask, _, is_causal = arguments(node, None, 0.0, False, count=6)
    mask, is_causal = node.kwargs.get("attn_mask", mask), node.kwargs.get("is_causal", is_causal)
    learned = isinstance(mask, fx.Node) and t.is_active(mask)
    if learned and carries_scores(t.rules) and out.rel:
        raise UnsupportedModelError(
            f"{describe(node)} with a bias that depends on the input's values needs rules='positive'"
        )
    scale: Any = node.kwargs.get("scale")
    scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    query_dim = node.meta["val"].dim() - 2
    rows = _common_rows(out, query_dim)
    grad, rel = (_restrict(t, lane, rows, node) for lane in (out.grad, out.rel))
    block = t.enter_block(node)
    row_node = None
    if block is not None and out.row:
        whole_row = t.whole_row(out.row, node).node
        row_node = _queries(t, whole_row, rows, query_dim)
        t.read_row = t.read_row or _queries(t, whole_row, None, query_dim)
    mask_value: Any = None
    if isinstance(mask, fx.Node):
        mask_value = t.value(mask, rows, node.meta["val"].dim())
    inputs = any(t.wants(x) for x in (q, k, v, mask))
    groups = _sharing(q, k)
    keys, values = t.value(k), t.value(v)
    if groups > 1:
        keys, values = (t.emit.call(torch.repeat_interleave, x, groups, -3) for x in (keys, values))
    attention = (t.value(q, rows), keys, values, mask_value)
    start = rows.start if rows else 0
    fused = q.meta["val"].dim() == 4 and q.meta["val"].shape[-1] == v.meta["val"].shape[-1]
    call = t.emit.call(
        ops.attention_relevance if fused else REFERENCES[ops.attention_relevance],
        *attention,
        *(lane.node if lane else None for lane in (rel, grad)),
        row_node,
        float(scale),
        bool(is_causal),
        start,
        t.rules,
        t.method.update,
        t.method.normalize,
        inputs,
        t.method.attnlrp,
    )
    call.meta["head_size"] = q.meta["val"].shape[-1]
    *lanes, kept, through = t.emit.parts(call, 8)
    if groups > 1:
        lanes = [lane if i % 3 == 0 else t.emit.call(sum_groups, lane, groups) for i, lane in enumerate(lanes)]
    if block is not None and t.trace:
        args = (*attention, rel.node if rel else None, grad.node if grad else None)
        maps = t.emit.call(attention_maps, *args, float(scale), bool(is_causal), start, t.rules)
        for name, part in zip(("attention", "gradient", "relevance"), t.emit.parts(maps, 3), strict=True):
            t.record(block, name, part)
        t.record(block, "value_relevance", lanes[2])
    for i, x in enumerate((q, k, v)):
        own_rows = rows if i == 0 else None
        has_rel = rel and inputs and (i == 2 or carries_scores(t.rules))
        t.give(
            x,
            grad=Lane(lanes[3 + i], own_rows) if grad and inputs else None,
            rel=Lane(lanes[i], own_rows) if has_rel else None,
        )
    if learned and grad and inputs:
        lane = Lane(
            t.emit.call(bias_gradient, *attention, grad.node, float(scale), bool(is_causal), start),
            rows and Rows(mask.meta["val"].dim() - 2, rows.start, rows.length),
        )
        t.give(mask, grad=Lane(t.emit.call(sum_to, t.dense(lane, mask).node, *t.shape(mask))))
    if row_node and out.row:
        queries = {path: _queries(t, part.lane.node, rows, query_dim) for path, part in out.row.parts.items() if part.lane}
        _give_row(t, node, q, v, rows, out.row, queries, row_node, kept, through)
    if block is None and out.row:
        # Below the first block that takes part, tokens stay where they are.
        if t.row_shape(v) == t.row_shape(node):
            t.give(v, row=out.row)
        else:
            t.rollout.end(out.row)
    if block is not None and t.method.kinds:
        dense = (lane and t.dense(lane, node).node for lane in (out.rel, out.grad))
        every = (t.value(q), keys, values, t.value(mask) if isinstance(mask, fx.Node) else None)
        maps = t.emit.call(attention_maps, *every, *dense, float(scale), bool(is_causal), 0, t.rules)
        kept_maps = t.emit.parts(maps, 3)
        _keep(t, block, kept_maps)
        if t.asks("contributions"):
            t.maps["contributions"][block] = contributions(t, node, v, kept_maps[0], values, t.value(node))
        if t.asks("scores"):
            t.maps["scores"][block] = t.emit.call(
                attention_scores, every[0], every[1], every[3], float(scale), bool(is_causal), 0
            )


def _keep(t: Context, block: int, maps: Sequence[fx.Node | None]) -> None:
    """What the method's reading asks for of a block, from its A, ∇A and R_A, all queries."""
    kinds: tuple[Kind, ...] = ("attention", "gradient", "relevance")
    for kind, part in zip(kinds, maps, strict=True):
        if part is not None and t.asks(kind):
            t.maps[kind][block] = part
    if t.asks("received"):
        t.maps["received"][block] = t.emit.call(received, maps[0])


def bias_gradient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, grad: Tensor, scale: float, is_causal: bool, query_start: int
) -> Tensor:
    """∂y/∂mask [K, *B, h, Tq, Tk] of a bias added to the scores."""
    attn = attention_probabilities(q, k, mask, scale, is_causal, query_start)
    weighted = attn * (grad @ v.mT)
    return weighted - attn * weighted.sum(-1, keepdim=True)


def _sharing(q: fx.Node, k: fx.Node) -> int:
    """How many heads of queries share one of keys and values: several as with `enable_gqa`, or one of all (multi-query)."""
    heads, others = (x.meta["val"].shape[-3] if x.meta["val"].dim() > 3 else 1 for x in (q, k))
    return heads // others if isinstance(heads, int) and isinstance(others, int) else 1


def sum_groups(lane: Tensor, groups: int) -> Tensor:
    """Lanes [K, *B, h, T, d] of keys or values that `groups` query heads share, [K, *B, h / groups, T, d]."""
    return lane.unflatten(-3, (-1, groups)).sum(-3) if lane.numel() else lane


def _common_rows(out: Lanes, dim: int) -> Rows | None:
    """The query rows that the lanes cover, if they agree on them."""
    rows = {lane.rows for lane in (out.grad, out.rel) if lane}
    only = rows.pop() if len(rows) == 1 else None
    return only if only and only.dim == dim else None


def _restrict(t: Context, lane: Lane | None, rows: Rows | None, node: fx.Node) -> Lane | None:
    return lane if lane is None or lane.rows == rows else t.dense(lane, node)


def _queries(t: Context, row: fx.Node, rows: Rows | None, query_dim: int) -> fx.Node:
    """A row lane [K, *B, 1, Tq, 1] of the attention's output as [K, *B, Tq], only the given query rows."""
    squeezed = t.emit.call(aten.squeeze.dims, row, [query_dim, query_dim + 2])
    if rows is None:
        return squeezed
    return t.emit.call(aten.narrow.default, squeezed, query_dim, rows.start, rows.length)


def _give_row(
    t: Context,
    block: fx.Node,
    q: fx.Node,
    v: fx.Node,
    rows: Rows | None,
    entering: Row,
    queries: dict[Path, fx.Node],
    whole: fx.Node,
    kept: fx.Node,
    through: fx.Node,
    heads: int | None = None,
) -> None:
    """r M goes on to the tokens whose values are mixed; where rows are normalised, what is left of r takes the place of I.

    queries, whole: the parts of the entering row and all of it, [K, *B, Tq]; kept, through: of the operator `rollout_row`.
    """

    def lane(x: fx.Node, node: fx.Node, own_rows: Rows | None = None) -> Lane:
        at = x.meta["val"].dim() - 2 if heads is None else 2
        spread = t.emit.call(aten.unsqueeze.default, t.emit.call(aten.unsqueeze.default, node, at), at + 2)
        if heads is not None:
            spread = t.emit.call(merge_heads, spread, heads)
        return t.dense(Lane(spread, own_rows), x, is_row=True)

    stream = t.rollout.stream(entering)
    if t.method.evidence and not t.method.normalize:
        through = _times_read(t, block, q, v, stream, rows, whole, through)
    mixed: dict[Path, Part] = {stream: Part(lane(v, through))}
    inner = [path for path in entering.parts if path != stream]
    if not (t.method.residual and t.method.normalize):
        t.rollout.end(entering, replaced=not t.method.residual)
        return t.give(v, row=Row(mixed))
    left: dict[Path, Part] = {}
    # Where keys are other tokens than queries (cross-attention, reduced keys), what is left goes back through the queries.
    across = t.is_active(q) and not t.facts.are_same_tokens(q, v)
    for path in inner:
        own = queries.get(path)
        if own is None:
            left[path] = Part(None, settled=len(path))
        else:
            share = kept if len(entering.parts) == 1 else t.emit.call(settled_share, own, whole, kept)
            left[path] = Part(lane(q if across else v, share, rows), settled=len(path))
    if across and left:
        t.give(q, row=Row(left))
        left = {}
    t.give(v, row=Row({**mixed, **left}))


def _times_read(
    t: Context, block: fx.Node, q: fx.Node, v: fx.Node, stream: Path, rows: Rows | None, row: fx.Node, through: fx.Node
) -> fx.Node:
    """r M times N², N the number of tokens that the head reads of the stream.

    Each of the T queries of a pooled model has 1/T of the gradient and 1/T of the relevance that one query would have, so that M is
    of the order of 1/T² beside the identity; that of a stream which takes a share of the row, such as a member of an ensemble, has
    that share of the relevance besides. `row`: that which enters, [K, *B, Tq]; the first block that has several queries says N. An
    encoder is pooled by the decoder that attends to it: its own first block says how many of its tokens are read.
    """
    add = t.sum_of_rows(block)
    own, attended = (t.facts.sequences(x) if t.is_active(x) else set() for x in (q, v))  # learned queries read nothing
    encoder = next((found for found in t.encoders if own and own <= found), frozenset())
    if attended < own:
        t.encoders.append(frozenset(attended))
    reads = t.read[encoder]
    known = [path for path in reads if path == stream[: len(path)]]
    if known:
        read = reads[max(known, key=len)]
    elif block.meta["val"].shape[-2] == 1:
        return through  # a pooling by attention
    elif rows is not None and rows.length == 1:
        read = reads[stream] = None
    else:
        windows = math.prod(size for size, role in t.axes(block)[add.batch] if role == "token")
        how = (add.batch, None if axes_.varies(windows) else windows, add.inner)
        read = reads[stream] = t.emit.call(squared_tokens_read, row, t.seed, *how)
    if read is None:
        return through
    shares = t.rollout.shares(stream)
    read = t.emit.call(of_whole_stream, read, *shares) if shares else read
    return t.emit.call(times_samples, through, read, add.batch, add.inner)


def of_whole_stream(read: Tensor, *shares: Tensor) -> Tensor:
    """N² [K, B] over what a stream is charged of the row, [K, B] at each sum on its way: as if all of the relevance went there."""
    share = math.prod(shares, start=torch.ones_like(read))
    return torch.where(share > 0, read / torch.where(share > 0, share, 1.0), read)


def squared_tokens_read(row: Tensor, seed: Tensor, batch: int, windows: int | None, inner: bool) -> Tensor:
    """N² [K, B] of a row [K, *B, Tq], a sample's `windows` lying along dimension `batch` beside it; None: as many as the rows of an
    output's `seed` [K, B, *] say."""
    row = row.movedim(batch + 1, 1)
    windows = row.shape[1] // seed.shape[1] if windows is None else windows
    row = row.unflatten(1, (windows, -1)).transpose(1, 2) if inner else row.unflatten(1, (-1, windows))
    return tokens_read(row).square()


def received(attention: Tensor) -> Tensor:
    """`attention_received` of a map [B, h, T, T].

    Raises:
        InputError: queries and keys are different tokens.
    """
    queries, keys = attention.shape[-2:]
    if queries != keys:
        raise InputError(f"a map of {queries} queries over {keys} keys: this method {NEEDS_SAME_TOKENS}")
    return attention_received(attention)


def attention_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rel: Tensor | None,
    grad: Tensor | None,
    scale: float,
    is_causal: bool,
    query_start: int,
    rules: reference.Rules,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A, ∂y/∂A and the relevance of A, for traces: what the fused operator does not keep."""
    attn = attention_probabilities(q, k, mask, scale, is_causal, query_start)
    relevance = None
    if rel is not None:
        relevance = reference.attention_value(attn, v, rel, rules)[0]
    return attn, None if grad is None else grad @ v.mT, relevance


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(t: Context, node: fx.Node, out: Lanes) -> None:
    """A·V, or Q·Kᵀ, of which each operand takes half of the relevance, also one that does not depend on the input."""
    left, right = arguments(node, count=2)
    ndim = node.meta["val"].dim()
    if not t.is_active(right) and right.meta["val"].dim() == 2:
        return times_parameter(t, node, left, right, None, out)
    if not t.is_active(right) and right.meta["val"].dim() == 1:
        return _times_vector(t, node, left, right, out)
    mixed = t.facts.is_mixed_value(node)
    is_attention = is_attention_value(node) or mixed
    if not t.is_active(right) and not is_attention and left.meta["val"].dim() == ndim:
        return times_parameters(t, node, left, right, out)
    if not left.meta["val"].dim() == right.meta["val"].dim() == ndim:
        raise UnsupportedModelError(f"{describe(node)} is not a product of two values of the same rank")
    rows = _common_rows(out, ndim - 2)
    grad, rel = (_restrict(t, lane, rows, node) for lane in (out.grad, out.rel))
    a, b = t.value(left, rows), t.value(right)
    rel_a = rel_b = grad_a = grad_b = None
    if rel:
        share = _left_right if not is_attention else reference.mixed_attention_value if mixed else reference.attention_value
        call = t.emit.call(share, a, b, rel.node, t.rules)
        rel_a, rel_b = t.emit.parts(call, 2)
    if grad:
        grad_a = t.emit.call(torch.matmul, grad.node, t.emit.call(getattr, b, "mT"))
        grad_b = t.emit.call(torch.matmul, t.emit.call(getattr, a, "mT"), grad.node)
    block = t.enter_block(node) if is_attention else None
    if block is not None:
        heads = _merged_heads(t, node)
        maps = [
            part if part is None or heads is None else t.emit.call(split_heads, part, heads) for part in (a, grad_a, rel_a)
        ]
        for name, part in zip(("attention", "gradient", "relevance"), maps, strict=True):
            if part is not None:
                t.record(block, name, part)
        if rel_b:
            t.record(block, "value_relevance", rel_b if heads is None else t.emit.call(split_heads, rel_b, heads))
        if t.method.kinds:
            every = (t.value(left), *(part and t.dense(Lane(part, rows), left).node for part in (grad_a, rel_a)))
            _keep(t, block, [part and (part if heads is None else t.emit.call(split_heads, part, heads)) for part in every])
            if t.asks("contributions"):
                whole = [t.value(x) for x in (left, right, node)]
                whole = whole if heads is None else [t.emit.call(split_heads, x, heads) for x in whole]
                t.maps["contributions"][block] = contributions(t, node, right, *whole)
        if t.asks("scores"):
            scores = _scores(t, left)
            t.maps["scores"][block] = scores if heads is None else t.emit.call(split_heads, scores, heads)
        if out.row:
            queries = t.facts.queries(left) or left
            update = t.emit.call(ops.attention_update, *maps, t.method.update)
            _roll(t, node, queries, right, rows, out.row, update, heads)
    if grad and t.method.attnlrp and t.is_active(left) and t.is_active(right):
        # Half to each operand; what the map adds to the rollout is of the whole.
        grad_a, grad_b = (t.emit.call(torch.mul, lane, 0.5) for lane in (grad_a, grad_b))
    ends = is_attention and not carries_scores(t.rules)
    if out.row and block is None:
        if not is_attention or any(t.is_active(x) and t.row_shape(x) == t.row_shape(node) for x in (right, left)):
            _pass_row(t, node, (right, left), out.row)
        else:
            t.rollout.end(out.row)  # as fused attention does below the first block that takes part
    t.give(left, _narrowed(t, left, node, grad_a, rows), None if ends else _narrowed(t, left, node, rel_a, rows))
    t.give(right, _narrowed(t, right, node, grad_b), _narrowed(t, right, node, rel_b))


def _narrowed(t: Context, x: fx.Node, node: fx.Node, lane: fx.Node | None, rows: Rows | None = None) -> Lane | None:
    """A lane of an operand, summed where that was broadcast (keys and values that all heads share)."""
    if lane is None:
        return None
    if x.meta["val"].shape[:-2] == node.meta["val"].shape[:-2]:
        return Lane(lane, rows)
    lead = [t.emit.size(x, dim) for dim in range(x.meta["val"].dim() - 2)]
    return Lane(t.emit.call(sum_lead, lane, *lead), rows)


def _times_vector(t: Context, node: fx.Node, x: fx.Node, vector: fx.Node, out: Lanes) -> None:
    """x w with w [in]: a linear layer of one output."""
    grad = rel = None
    if t.wants(x):
        weight = t.emit.call(aten.unsqueeze.default, t.value(vector), 0)
        if out.grad:
            lane = t.emit.call(aten.unsqueeze.default, t.dense(out.grad, node).node, -1)
            grad = Lane(t.emit.call(torch.matmul, lane, weight))
        if out.rel:
            lane = t.emit.call(aten.unsqueeze.default, t.dense(out.rel, node).node, -1)
            rel = Lane(t.emit.call(reference.linear, t.value(x), weight, lane, t.rules))
    row = out.row and out.row.map(
        lambda lane: Lane(t.emit.call(aten.unsqueeze.default, t.dense(lane, node, is_row=True).node, -1))
    )
    t.give(x, grad, rel, row)


def _pass_row(t: Context, node: fx.Node, operands: tuple[fx.Node, ...], row: Row) -> None:
    """A product that mixes features (attention over channels): the row stays with the operand that holds the tokens."""
    right, left = operands
    if t.is_active(left) and t.is_active(right) and node.meta["val"].dim() == 2:
        return _pairs_row(t, node, left, right, row)
    if (why := t.facts.unknown_mixing(node)) is not None:
        raise UnsupportedModelError(why)
    for x in operands:
        if t.is_active(x) and t.row_shape(x) == t.row_shape(node):
            return t.give(x, row=row)
    raise t.facts.not_followed(node)


def _pairs_row(t: Context, node: fx.Node, left: fx.Node, right: fx.Node, row: Row) -> None:
    """u vᵀ of two sets of samples [A, D] and [B, D], as similarities are: each pair's row in equal parts to both."""
    streams = t.facts.are_streams((left, right), t.stretch.every)
    for x, dim, own in zip((left, right), (2, 1), t.rollout.fork(row, 2, None, streams), strict=True):

        def back(lane: Lane, x: fx.Node = x, dim: int = dim) -> Lane:
            total = t.emit.call(aten.sum.dim_IntList, t.dense(lane, node, is_row=True).node, [dim], True)
            return Lane(t.emit.call(aten.expand.default, total, [-1, *t.row_shape(x)]))

        t.give(x, row=own.map(back))


def _left_right(a: Tensor, b: Tensor, rel: Tensor, rules: reference.Rules) -> tuple[Tensor, Tensor]:
    """Q·Kᵀ with its right operand as the product has it, [..., d, Tk]."""
    rel_a, rel_b = reference.query_key(a, b.mT, rel, rules)
    return rel_a, rel_b.mT


def _merged_heads(t: Context, node: fx.Node) -> int | None:
    """The number of heads where they share a dimension with the batch, [B·h, T, d]; None where they have their own."""
    if node.meta["val"].dim() == 4:
        return None
    factors = t.axes(node)[0] if node.meta["val"].dim() == 3 else ()
    if not factors or factors[0][1] != "batch" or any(role == "batch" for _, role in factors[1:]):
        raise UnsupportedModelError(f"{describe(node)}: an attention map without a dimension of heads")
    roles = [role for _, role in factors[1:]]
    if roles != sorted(roles, reverse=True):  # windows of tokens, then heads
        raise UnsupportedModelError(f"{describe(node)}: heads outside of windows, both merged with the batch")
    return math.prod(size for size, role in factors[1:] if role == "feature")


def _scores(t: Context, attn: fx.Node) -> fx.Node:
    """S of a map A = softmax(S), as the model gave it to the softmax."""
    node: Any = attn
    while node.target in IDENTITIES:
        node = node.args[0]
    if node.target not in SOFTMAXES or node.args[0].meta["val"].shape != attn.meta["val"].shape:
        raise UnsupportedModelError(
            f"{t.method.name} reads the scores of attention maps; {describe(attn)} is not a softmax of them"
        )
    return t.value(node.args[0])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[…, B·h, Tq, Tk] -> […, B, h, Tq, Tk]."""
    return x.unflatten(-3, (-1, heads))


def merge_heads(row: Tensor, heads: int) -> Tensor:
    """A row of tokens [K, B, 1, T, 1] for every head, [K, B·h, T, 1]."""
    return row.expand(-1, -1, heads, -1, -1).flatten(1, 2)


def mean_heads(row: Tensor, heads: int) -> Tensor:
    """A row [K, B·h, T, 1] -> [K, B, T]."""
    return row.unflatten(1, (-1, heads)).mean(2).squeeze(-1)


def _roll(
    t: Context,
    node: fx.Node,
    q: fx.Node,
    v: fx.Node,
    rows: Rows | None,
    row: Row,
    update: fx.Node,
    heads: int | None,
) -> None:
    dim = node.meta["val"].dim() - 2

    def queries(lane: fx.Node, rows: Rows | None = rows) -> fx.Node:
        if heads is None:
            return _queries(t, lane, rows, dim)
        mean = t.emit.call(mean_heads, lane, heads)
        return t.emit.call(aten.narrow.default, mean, 2, rows.start, rows.length) if rows else mean

    entering = t.whole_row(row, node).node
    whole = queries(entering)
    t.read_row = t.read_row or queries(entering, None)
    kept, through = t.emit.parts(t.emit.call(ops.rollout_row, whole, update, t.method.normalize), 2)
    parts = {path: queries(part.lane.node) for path, part in row.parts.items() if part.lane}
    _give_row(t, node, q, v, rows, row, parts, whole, kept, through, heads)


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
def softmax(t: Context, node: fx.Node, out: Lanes) -> None:
    """Relevance passes unchanged."""
    backward = log_softmax_backward if node.target is aten.log_softmax.int else softmax_backward
    x, dim = arguments(node, count=2)
    dim %= node.meta["val"].dim()

    def back(lane: Lane) -> Lane:
        full = t.dense(lane, node) if lane.rows and lane.rows.dim == dim else lane
        return Lane(t.emit.call(backward, full.node, t.value(node, full.rows), dim + 1), full.rows)

    t.pass_through(x, out, back)


def log_softmax_backward(grad: Tensor, y: Tensor, dim: int) -> Tensor:
    """grad [K, *] through y = log softmax(x) [*]; `dim` counts the leading K."""
    return grad - y.exp() * grad.sum(dim, keepdim=True)


def softmax_backward(grad: Tensor, y: Tensor, dim: int) -> Tensor:
    """grad [K, *] through y = softmax(x) [*]; `dim` counts the leading K."""
    weighted = grad * y
    return weighted - y * weighted.sum(dim, keepdim=True)
