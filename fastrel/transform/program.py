"""What the transform makes of a captured graph."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True)
class Map:
    """One map of an explanation: where it is read, and of which input of the model it is.

    Attributes:
        input: position among the graph's inputs.
        nodes: names of the captured values whose tokens the map is over: one, or look-ups of the same tokens.
        features: its other dimensions.
        picture: the dimensions of height and width in an input of pictures, films or volumes; None for others.
        branch: what tells it from other maps of the same input, as " in decoder.embed"; empty for the only one.
        beside: positions of other inputs that its tokens are made of, too.
    """

    input: int
    nodes: tuple[str, ...]
    features: tuple[int, ...]
    picture: tuple[int, int] | None = None
    branch: str = ""
    beside: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """A model's prediction and its explanation as two plain fx modules.

    `forward(*parameters_and_inputs)` returns (outputs, saved). `reverse([*seeds, *saved])`, which empties that list, with
    three seeds per explained output (gradient, relevance, row), returns (rows, grids, records): for each of `maps`, the map over
    all tokens [K, B, T…] and the part of it on the patch grid [K, B, gh, gw], None where there is none; and, when traced, the
    tensors that `record_names` names.

    Attributes:
        dtype: of all lanes.
        leaves: which outputs are explained; `leaf_features`: their feature dimensions.
        blocks: the number of attention blocks that take part.
        generic: operators that had no rule of their own.
    """

    forward: fx.GraphModule
    reverse: fx.GraphModule
    dtype: torch.dtype
    leaves: tuple[int, ...]
    leaf_features: tuple[tuple[int, ...], ...]
    record_names: tuple[tuple[int, str], ...]
    maps: tuple[Map, ...]
    blocks: int
    generic: tuple[str, ...]

    def rule_of(self, error: BaseException) -> str | None:
        """The captured operator whose rule an error of `reverse` was raised by; None where that is not known."""
        written = {node.name: node.meta.get("rule of") for node in self.reverse.graph.nodes}
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            name = (frame.line or "").partition(" = ")[0]
            if frame.filename.startswith("<eval_with_key>") and name in written:
                return written[name]
        return None
