"""Readings: from what the blocks of a model leave, to a map over its tokens.

The head reads token 0 in all of them. Notation: M the map of a block, [T, T]; a the attention that a token receives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Blocks(NamedTuple):
    """Per block of the model, from the input, with zeros for queries that lead nowhere.

    relevance, attention, frozen [L, T, T]: E_h[(∇A ⊙ R)⁺], E_h[(∇A ⊙ A)⁺], and the first with ∇A by AttnLRP's rules.
    gradient, received [L, T]: ∇A⁺ and A, mean over heads and queries; read: A over the queries that lead to the output.
    shares, came [L, T]: by AttnLRP's rules, the share of each query in the block's relevance times that in its |∇A|; and the share
    of a token's relevance, behind the residual add, that came by attention.
    """

    relevance: Array
    attention: Array
    frozen: Array
    gradient: Array
    received: Array
    read: Array
    shares: Array
    came: Array


Reading = Callable[[Blocks], Array]


def chain(maps: Array, normalize: bool = False) -> Array:
    """Row 0 of eq. (14)."""
    row = np.zeros(maps.shape[-1])
    row[0] = 1
    for m in maps[::-1]:
        kept = row / (1 + m.sum(-1)) if normalize else row
        row = kept + kept @ m
    return row


def of_sum_1(maps: Array) -> Array:
    """Rows scaled to sum 1; rows of 0 stay."""
    return ratio(maps, maps.sum(-1, keepdims=True))


def ratio(a: Array, b: Array) -> Array:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def conserving(b: Blocks) -> Array:
    """r ← r (1 − s) + (r s) M̂: M̂ with rows of sum 1, s the share of attention."""
    row = np.zeros(b.frozen.shape[-1])
    row[0] = 1
    for m, s in zip(of_sum_1(b.frozen)[::-1], b.came[::-1], strict=True):
        row = row * (1 - s * (m.sum(-1) > 0)) + (row * s) @ m
    return row


def scaled(maps: Array) -> Array:
    """Each block's map scaled to sum 1."""
    return maps / np.maximum(maps.sum((1, 2), keepdims=True), 1e-300)


def columns(maps: Array) -> Array:
    """What each token gives in all blocks alike, each block scaled to sum 1."""
    return scaled(maps).sum((0, 1))


def late(values: Array) -> Array:
    """The second half of the blocks."""
    return values[len(values) // 2 :]


def last(values: Array) -> Array:
    """The last quarter of the blocks."""
    return values[-max(1, len(values) // 4) :]


def per(row: Array, received: Array, power: float = 1.0) -> Array:
    """Divided by the attention that each token receives."""
    return row / received**power


READINGS: dict[str, Reading] = {
    "default": lambda b: chain(b.relevance),
    "rows scaled to sum 1": lambda b: chain(b.relevance, normalize=True),
    "from the middle": lambda b: chain(late(b.relevance)),
    "last quarter": lambda b: chain(last(b.relevance)),
    "last quarter, per attention received": lambda b: per(chain(last(b.relevance)), b.received.mean(0)),
    "last quarter, per root of attention received": lambda b: per(chain(last(b.relevance)), b.received.mean(0), 0.5),
    "last block": lambda b: chain(b.relevance[-1:]),
    "per attention received": lambda b: per(chain(b.relevance), b.received.mean(0)),
    "per root of attention received": lambda b: per(chain(b.relevance), b.received.mean(0), 0.5),
    "per attention received, by queries read": lambda b: per(chain(b.relevance), b.read.mean(0)),
    "per attention received, from the middle": lambda b: per(chain(late(b.relevance)), late(b.received).mean(0)),
    "per attention received in the second half": lambda b: per(chain(b.relevance), late(b.received).mean(0)),
    "per attention received, rows scaled": lambda b: per(chain(b.relevance, normalize=True), b.received.mean(0)),
    "last block, per attention received": lambda b: per(chain(b.relevance[-1:]), b.received.mean(0)),
    "each block per attention received": lambda b: chain(b.relevance / (b.received[:, None] * b.received.shape[1])),
    "each block per mean attention received": lambda b: chain(b.relevance / (b.received.mean(0) * b.received.shape[1])),
    "blocks scaled to sum 1": lambda b: chain(scaled(b.relevance)),
    "blocks scaled, per attention received": lambda b: per(chain(scaled(b.relevance)), b.received.mean(0)),
    "columns": lambda b: columns(b.relevance),
    "columns from the middle": lambda b: columns(late(b.relevance)),
    "columns, per attention received": lambda b: per(columns(b.relevance), b.received.mean(0)),
    "columns from the middle, per attention received": lambda b: per(columns(late(b.relevance)), b.received.mean(0)),
    "gradient attention": lambda b: chain(b.attention),
    "gradient attention, per attention received": lambda b: per(chain(b.attention), b.received.mean(0)),
    "gradient (LeGrad)": lambda b: b.gradient.sum(0),
    "gradient, blocks scaled": lambda b: (b.gradient / b.gradient.sum(1, keepdims=True)).sum(0),
    "gradient from the middle, blocks scaled": lambda b: (late(b.gradient) / late(b.gradient).sum(1, keepdims=True)).sum(0),
    "frozen gradient": lambda b: chain(b.frozen),
    "frozen gradient, per attention received": lambda b: per(chain(b.frozen), b.received.mean(0)),
    "frozen gradient, per root of attention received": lambda b: per(chain(b.frozen), b.received.mean(0), 0.5),
    "frozen gradient, rows of M of sum 1": lambda b: chain(of_sum_1(b.frozen)),
    "frozen gradient, rows of one query": lambda b: chain(ratio(b.frozen, b.shares[..., None])),
    "frozen gradient, conserving": conserving,
    "default times gradient": lambda b: (chain(b.relevance) * b.gradient.sum(0)) ** 0.5,
}
