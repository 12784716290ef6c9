"""What passed through the attention blocks of a model, for study and tests."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BlockTrace:
    """What passed through one attention block, for study and tests. Lanes carry a leading K, the number of targets.

    attention [B, h, Tq, Tk]; gradient and relevance of it [K, B, h, Tq, Tk]; value_relevance [K, B, h, Tk, d];
    input_relevance: relevance of what the block reads [K, B, T, D]. Where the head reads one token, the last block has
    Tq = 1: the other rows are exactly zero and are never computed.
    """

    attention: Tensor
    gradient: Tensor | None
    relevance: Tensor | None
    value_relevance: Tensor | None
    input_relevance: Tensor | None
