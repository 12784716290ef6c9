"""Residual add u + v: how its relevance is split between the operands."""

from torch import Tensor

from fastrel.ops.library import define
from fastrel.reference import rules as R


def _reference(u: Tensor, v: Tensor, rel: Tensor, batch_dim: int, rules: R.Rules) -> tuple[Tensor, Tensor]:
    """u, v [*], rel [K, *] -> the relevance of u and v [K, *]; `official` sums over all but `batch_dim` of u."""
    if rules == "positive":
        return R.add(u, v, rel)
    moved = (u.movedim(batch_dim, 0), v.movedim(batch_dim, 0), rel.movedim(batch_dim + 1, 1))
    rel_u, rel_v = R.add(*moved, rules=rules)
    return rel_u.movedim(1, batch_dim + 1).contiguous(), rel_v.movedim(1, batch_dim + 1).contiguous()


def _fake(u: Tensor, v: Tensor, rel: Tensor, batch_dim: int, rules: R.Rules) -> tuple[Tensor, Tensor]:
    return rel.new_empty(rel.shape), rel.new_empty(rel.shape)


residual_add = define(
    "residual_add(Tensor u, Tensor v, Tensor rel, int batch_dim, str rules) -> (Tensor, Tensor)",
    _reference,
    _fake,
)
