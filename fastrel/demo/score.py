"""How well maps find the object of their class, on the held-out scenes."""

import numpy as np
import torch
from torch import nn

from fastrel.demo import SIZE, held_out, to_input
from fastrel.explainer import Explainer

METHODS = ("transformer_attribution", "rollout", "raw_attention")


def score(model: nn.Module, method: str, **options: object) -> tuple[float, float, float, int]:
    """Score one method over every object of every held-out scene.

    Returns the mean share of the positive map inside the object's cell, its standard error over scenes, the share of
    maps whose highest patch lies in that cell (the pointing game), and the number of maps.
    """
    scenes, cells = held_out()
    explainer = Explainer(model, method, **options)  # type: ignore[arg-type]
    half = SIZE // 8 // 2
    energies: list[float] = []
    hits = 0
    per_scene: list[float] = []
    for start in range(0, len(scenes), 50):
        prediction = explainer.predict(to_input(scenes[start : start + 50]))
        for position in range(4):
            held = torch.from_numpy(cells[start : start + 50, position])
            maps = prediction.explain(held.clamp(min=0)).patches.clamp(min=0)
            row, column = divmod(position, 2)
            inside = maps[:, row * half : (row + 1) * half, column * half : (column + 1) * half]
            share = inside.flatten(1).sum(1) / maps.flatten(1).sum(1).clamp_min(1e-30)
            hit = inside.flatten(1).amax(1) == maps.flatten(1).amax(1)
            present = held >= 0
            energies += share[present].tolist()
            hits += int(hit[present].sum())
            per_scene += share[present].tolist()
    return float(np.mean(energies)), float(np.std(per_scene) / np.sqrt(len(scenes))), hits / len(energies), len(energies)


def score_table(model: nn.Module) -> str:
    """The table of README.md, as Markdown."""
    lines = [
        "| method | energy in the object's cell | pointing game |",
        "|---|---|---|",
    ]
    count = 0
    for method in METHODS:
        energy, error, pointing, count = score(model, method)
        lines.append(f"| {method} | {energy:.3f} ± {error:.3f} | {pointing:.3f} |")
    return "\n".join(
        [*lines, "", f"{count} objects in {len(held_out()[0])} held-out scenes of four cells; chance is 0.25."]
    )
