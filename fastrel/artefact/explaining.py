"""The explanation as one module that decides nothing by its data: what is exported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrel.artefact.lengths import source_of
from fastrel.artefact.metadata import RANK
from fastrel.engine import Call
from fastrel.graphed import reverse
from fastrel.transform.lanes import lane_dtype
from fastrel.transform.program import Program

aten = torch.ops.aten


class Explaining(nn.Module):
    """(classes, *inputs) -> (logits, classes, ok, and for each map relevance, patches where it has any).

    classes [B, K] int64, RANK + r for the class with the r-th highest logit; logits [B, C]; classes [B, K] as they were explained;
    ok [B, K]; relevance [B, K, T]; patches [B, K, gh, gw].

    One sample decides nothing about another: where an input is not finite (−inf may stand in masks), a token or class is out of
    range, or a logit or map is not finite, `ok` is false and the maps are NaN, and nothing is raised.
    """

    def __init__(self, call: Call, program: Program) -> None:
        super().__init__()
        owned = call.values[: len(call.captured.owners)]
        for i, value in enumerate(owned):
            self.register_buffer(f"parameter{i}", value.detach())
        self._owned = len(owned)
        self._counts = counts(call)
        self._program = [program]  # in a list: its graphs hold no parameters and are no submodules

    def forward(self, classes: Tensor, *inputs: Tensor) -> list[Tensor]:
        """Explain."""
        (program,) = self._program
        fine, usable = _checked(inputs, self._counts)
        outputs, saved = program.forward(*(getattr(self, f"parameter{i}") for i in range(self._owned)), *usable)
        logits = outputs[program.leaves[0]]
        chosen, exists = _chosen(logits, classes)
        numbers = torch.arange(logits.shape[1], device=logits.device)
        seed = (chosen.T.unsqueeze(-1) == numbers).to(lane_dtype(logits.dtype))  # [K, B, C]
        relevance, grids = reverse(program, seed, saved)
        explained = logits.gather(1, chosen.clamp(0, logits.shape[1] - 1))
        ok = exists & (fine & _finite(logits)).unsqueeze(1) & explained.isfinite()
        for one in relevance:
            ok = ok & one.isfinite().all(-1)
        results = [logits, chosen, ok]
        for one, grid in zip(relevance, grids, strict=True):
            results.append(torch.where(ok.unsqueeze(-1), one, torch.nan))
            if grid is not None:
                results.append(torch.where(ok[..., None, None], grid, torch.nan))
        return results


def counts(call: Call) -> list[int | None]:
    """For each tensor among the inputs the number of embeddings that its entries choose from, None where it chooses none."""
    found: dict[str, int] = {}
    for node in call.captured.graph.nodes:
        if node.target is aten.embedding.default:
            size, name = int(node.args[0].meta["val"].shape[0]), source_of(node.args[1]).name
            found[name] = min(size, found.get(name, size))
    return [found.get(node.name) for node in call.captured.inputs if isinstance(node.meta.get("val"), Tensor)]


def _checked(inputs: Sequence[Tensor], sizes: Sequence[int | None]) -> tuple[Tensor, list[Tensor]]:
    """Which samples can be read [B], and inputs in which indices that are out of range are 0."""
    fine, usable = None, []
    for x, count in zip(inputs, sizes, strict=True):
        if x.is_floating_point():
            held = _finite(x)
        elif count is not None:
            inside = (x >= 0) & (x < count)
            held, x = inside.flatten(1).all(1), torch.where(inside, x, 0)
        else:
            held = None
        if held is not None:
            fine = held if fine is None else fine & held
        usable.append(x)
    return torch.ones_like(inputs[0].flatten(1)[:, 0], dtype=torch.bool) if fine is None else fine, usable


def _finite(x: Tensor) -> Tensor:
    """Which samples of x [B, …] hold neither NaN nor +inf, [B]."""
    return (x.isfinite() | (x == -torch.inf)).flatten(1).all(1)


def _chosen(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The classes, ranks among them replaced by the class of that rank, and which of them there are."""
    count = logits.shape[1]
    order = logits.argsort(dim=1, descending=True)
    rank = classes - RANK
    ranked = (rank >= 0) & (rank < count)
    chosen = torch.where(ranked, order.gather(1, rank.clamp(0, count - 1)), classes)
    return chosen, (chosen >= 0) & (chosen < count)
