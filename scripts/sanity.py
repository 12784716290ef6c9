"""Do maps change when weights do? A table for every method: python scripts/sanity.py [results/sanity.md].

Cascading randomisation (Adebayo et al., NeurIPS 2018) of the shipped model: the parameters of the head, then also of the last
block, and so on down to the patch embedding are replaced by normal numbers of the same mean and deviation. A number is Spearman's rank
correlation of the map with that of the trained model over the patches, mean over mosaics and draws. About five minutes on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import fastrel
from fastrel import data, demo, methods
from fastrel.evaluation.summary import interval

MOSAICS, DRAWS = 32, 3
#: Fewer mosaics for a method that is slow.
SLOW = {"attention_flow": 2, "integrated_gradients": 4}


def stages(model: nn.Module) -> dict[str, list[nn.Module]]:
    """What is replaced, from the head down, by its name in the table."""
    blocks: Sequence[nn.Module] = list(model.blocks)  # type: ignore[arg-type]
    found: dict[str, list[nn.Module]] = {"head": [model.norm, model.head]}  # type: ignore[list-item]
    found |= {f"block {i}": [blocks[i]] for i in reversed(range(len(blocks)))}
    return found | {"patches": [model.patch_embed]}  # type: ignore[list-item]


def randomise(modules: Sequence[nn.Module]) -> None:
    """Replace parameters by normal numbers of the same mean and deviation."""
    with torch.no_grad():
        for parameter in (p for module in modules for p in module.parameters()):
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.normal_(float(parameter.mean()), spread)


def maps(explainer: fastrel.Explainer, x: Tensor, targets: list[int]) -> np.ndarray:
    """[B, gh * gw]."""
    explanation = explainer(x, target=targets)
    assert explanation.patches is not None
    return explanation.patches.flatten(1).double().numpy()


def cascade(seed: int, x: Tensor, targets: list[int]) -> Iterator[tuple[str, str, list[float]]]:
    """(method, stage, rank correlations with the trained model's maps); NaN for a constant map."""
    torch.manual_seed(seed)
    model = demo.load_model()
    shared = fastrel.Explainer(model)
    explainers = {name: shared.using(name) for name in methods.METHODS}
    trained = {name: maps(own, *_first(name, x, targets)) for name, own in explainers.items()}
    for stage, modules in stages(model).items():
        randomise(modules)
        for name, own in explainers.items():
            now = maps(own, *_first(name, x, targets))
            pairs = zip(trained[name], now, strict=True)
            yield name, stage, [_rank_correlation(a, b) for a, b in pairs]


def _first(name: str, x: Tensor, targets: list[int]) -> tuple[Tensor, list[int]]:
    count = SLOW.get(name, len(x))
    return x[:count], targets[:count]


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else float("nan")


def main(path: Path) -> None:
    """Write the table."""
    items = data.read("mosaics")
    items = [items[i] for i in sorted(np.random.default_rng(0).permutation(len(items))[:MOSAICS])]
    x = demo.to_input(np.stack([np.asarray(item.picture()) for item in items]))
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(DRAWS):
        for name, stage, values in cascade(seed, x, [item.classes[0] for item in items]):
            found.setdefault((name, stage), []).extend(values)
    columns = list(dict.fromkeys(stage for _, stage in found))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in methods.METHODS:
        lines.append(
            f"| {name} | {' | '.join(_cell(np.array(found[name, stage]).reshape(DRAWS, -1)) for stage in columns)} |"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def _cell(values: np.ndarray) -> str:
    """Mean and interval over mosaics of rank correlations [draws, mosaics], constant maps left out."""
    counted = ~np.isnan(values)
    if not counted.any():
        return "–"
    values = np.nansum(values, 0)[counted.any(0)] / counted.sum(0)[counted.any(0)]
    low, high = interval(values)
    return f"{values.mean():.2f}" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/sanity.md"))
