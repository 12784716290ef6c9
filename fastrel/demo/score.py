"""How well maps find the object of their class, on the held-out scenes."""

from typing import Any, NamedTuple

import torch
from torch import nn

from fastrel.demo import held_out, to_input
from fastrel.explainer import Explainer

METHODS = ("frozen_attribution", "transformer_attribution", "rollout", "raw_attention")


class Score(NamedTuple):
    """How one method does over every object of every held-out scene."""

    energy: float  # mean share of the map that lies in the object's cell
    error: float  # its standard error over scenes
    pointing: float  # share of maps whose highest patch lies in that cell
    objects: int  # number of maps


def score(model: nn.Module, method: str, **options: Any) -> Score:
    """Score one method; `options` go to the Explainer."""
    scenes, cells = held_out()
    explainer = Explainer(model, method, **options)
    device = next(model.parameters()).device
    prediction = explainer.predict(to_input(scenes).to(device))
    shares, hits = [], []
    for position in range(4):
        classes = torch.from_numpy(cells[:, position])
        maps = prediction.explain(classes.clamp(min=0).to(device)).patches.cpu()
        half = maps.shape[1] // 2
        row, column = divmod(position, 2)
        inside = maps[:, row * half : (row + 1) * half, column * half : (column + 1) * half].flatten(1)
        present = torch.where(classes >= 0, 1.0, torch.nan)
        shares.append(inside.sum(1) / maps.flatten(1).sum(1) * present)
        hits.append((inside.amax(1) == maps.flatten(1).amax(1)) * present)
    share, hit = torch.stack(shares, 1), torch.stack(hits, 1)
    per_scene = share.nanmean(1)
    error = float(per_scene.std() / len(per_scene) ** 0.5)
    return Score(float(share.nanmean()), error, float(hit.nanmean()), int((~share.isnan()).sum()))


def score_table(model: nn.Module, **options: Any) -> str:
    """The table of docs/gallery.md, as Markdown; `options` go to the Explainer."""
    lines = ["| method | energy in the object's cell | pointing game |", "|---|---|---|"]
    objects = 0
    for method in METHODS:
        energy, error, pointing, objects = score(model, method, **options)
        lines.append(f"| {method} | {energy:.3f} ± {error:.3f} | {pointing:.3f} |")
    scenes = len(held_out()[0])
    return "\n".join([*lines, "", f"{objects} objects in {scenes} held-out scenes of four cells; chance is 0.25."])
