"""Which architectures fastrel explains: verifies one of each, and writes docs/coverage.md.

    python scripts/coverage.py [--only SUBSTRING …] [--anew]

Interrupted, it goes on where it was; `--only` examines some again.

`scripts/zoo.py` has the models: every transformer module of timm (the smallest model of each, random weights) and Hugging Face's, which
are small but have the options of their default configurations (caches among the outputs, say). Each runs `Explainer.verify` in a
process of its own with a time limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from planted import OTHERS, planted
from zoo import PLAIN, Case, cases

#: The verdict on models that were not examined.
MISSING = "not examined"

#: What was found so far; `--only` brings a part of it up to date.
STORE = Path(__file__).resolve().parent.parent / "results" / "coverage.json"


def examine(build: Callable[[], Case], send: Any) -> None:
    """Verify one model and send [verdict, remark]."""
    import fastrel

    case = _built(build, send)
    if case is None:
        return
    try:
        report = fastrel.Explainer(case.model).verify(**case.inputs, target=case.target)
        failed = ", ".join(f"{c.name} {c.value:.1e}" for c in report.checks if not c.ok)
        unchecked = ", ".join(c.name for c in report.checks if "not checked" in c.meaning or "not to be had" in c.meaning)
        maps = "; ".join(shape if len(report.maps) == 1 else f"{name}: {shape}" for name, shape in report.maps.items())
        remark = f"{report.blocks} blocks; {maps}"
        remark += f"; generic: {', '.join(report.generic[:2])}" if report.generic else ""
        verdict = f"failed: {failed}" if failed else f"ok but {unchecked}" if unchecked else "ok"
        send.send([verdict, remark])
    except fastrel.FastrelError as error:
        send.send(["refused", str(error).splitlines()[0][:200]])
    except Exception as error:
        send.send(["CRASHED", f"{type(error).__name__}: {error}".splitlines()[0][:200]])


def seek(build: Callable[[], Case], send: Any) -> None:
    """Plant evidence in one model and send [what became of it]."""
    case = _built(build, send)
    if case is None:
        return
    try:
        found = list(planted(case))
        send.send(["; ".join(verdict if len(found) == 1 else f"{name}: {verdict}" for name, verdict in found)])
    except Exception as error:
        send.send([f"{type(error).__name__}: {error}".splitlines()[0][:100]])


def _built(build: Callable[[], Case], send: Any) -> Case | None:
    import warnings

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        return build()
    except Exception as error:
        send.send(["not built", f"{type(error).__name__}: {error}".splitlines()[0][:160]])
        return None


def run(what: Callable[..., None], limit: float, build: Callable[[], Case]) -> list[str]:
    """`examine` or `seek` in a process of its own, at most `limit` seconds."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=what, args=(build, send))
    process.start()
    found = receive.recv() if receive.poll(limit) else ["timed out", f"after {limit:.0f} s"]
    process.kill()
    process.join()
    return found


def stored(page: Path) -> dict[str, list[str]]:
    """What was found so far, [verdict, remark] or [verdict, remark, evidence]: in the store, or in the page that was written last."""
    if STORE.exists():
        return json.loads(STORE.read_text())
    found: dict[str, list[str]] = {}
    group = ""
    for line in page.read_text().splitlines() if page.exists() else ():
        if line.startswith("## "):
            group = line[3:]
        elif line.startswith("| ") and not line.startswith("| model |"):
            name, verdict, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            if verdict != MISSING:
                found[f"{group}/{name}"] = [verdict, *rest[::-1]]
    return found


def main() -> None:
    """Examine everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="only architectures whose name holds one of these")
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent.parent / "docs" / "coverage.md"))
    parser.add_argument("--limit", type=float, default=300, help="seconds per model (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default: %(default)s)")
    parser.add_argument("--anew", action="store_true", help="forget what was found before")
    options = parser.parse_args()
    import timm  # noqa: F401  (imported once, before the processes fork)
    import transformers  # noqa: F401

    import fastrel  # noqa: F401

    known = list(cases())
    results = {} if options.anew else stored(Path(options.out))
    if options.only:
        chosen = [c for c in known if any(part in f"{c[0]} {c[1]}" for part in options.only)]
        for group, name, _ in chosen:
            results.pop(f"{group}/{name}", None)
    else:
        chosen = [c for c in known if not _complete(results.get(f"{c[0]}/{c[1]}", []))]

    def one(case: tuple[str, str, Any]) -> None:
        group, name, build = case
        start = time.perf_counter()
        key = f"{group}/{name}"
        if key not in results:
            results[key] = run(examine, options.limit, build)
        if not _complete(results[key]):
            results[key] = [*results[key][:2], "; ".join(run(seek, options.limit, build))]
        print(f"{group:24} {name:36} {' | '.join(results[key])} ({time.perf_counter() - start:.0f} s)", flush=True)
        STORE.parent.mkdir(exist_ok=True)
        STORE.write_text(json.dumps(results))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, chosen))
    rows: dict[str, list[tuple[str, ...]]] = {}
    for group, name, _ in known:
        found = (*results.get(f"{group}/{name}", (MISSING,)), "", "")
        rows.setdefault(group, []).append((name, *found[:3]))
    Path(options.out).write_text(page(rows))


def _complete(found: list[str]) -> bool:
    """Whether a model was examined and, if it can be explained, evidence sought in it."""
    return bool(found) and (not found[0].startswith(("ok", "failed")) or any(found[2:]))


def page(rows: dict[str, list[tuple[str, ...]]]) -> str:
    """The Markdown of docs/coverage.md."""
    built = {group: [row for row in found if row[1] != "not built"] for group, found in rows.items()}
    missing = sum(row[1] == MISSING for found in built.values() for row in found)

    def count(groups: list[str]) -> str:
        found = [row for group in groups for row in built.get(group, []) if row[1] != MISSING]
        ok = sum(row[1] == "ok" for row in found)
        part = sum(row[1].startswith("ok but") for row in found)
        whole = f"{ok + part} of {len(found)} pass" + (f" ({part} with a check that could not be made)" if part else "")
        sought = [hits for row in found for hits in _hits(row[3])]
        if not sought:
            return whole
        mine, other, of = (sum(numbers) for numbers in zip(*sought, strict=True))
        every = sum(own == samples for own, _, samples in sought)
        return f"{whole}; evidence found in {mine} of {of} samples ({OTHERS[0]} {other}), in all of {every} of {len(sought)} inputs"

    timm_groups = [group for group in built if group.startswith("timm")]
    plain = [f"timm, {family}" for family in PLAIN]
    lines = [
        "# Coverage\n",
        "One of each architecture as its library delivers it, random weights, through `Explainer.verify`. *ok*: the outputs are the",
        "live model's, the relevance of every attention map is that of the second path in float64, rows add up, the gradient is",
        "autograd's, maps in float32 are those in float64, a batch gives what its samples give one by one, and rounding moves nothing.",
        "*ok but …*: a check that could not be made on this model. *generic*: an operator without a rule of its own, which the",
        "explanation's `report` names. *refused*: an error that names the operator, never a wrong map. Of timm's base and large models",
        "and DINOv2, two blocks were built. Made by `python scripts/coverage.py`.\n",
        "*evidence found*: `scripts/planted.py` puts one of two things (words, patterns of a cell of 4 × 4, tones) somewhere into",
        "noise. Small models learn to tell which, and one answer against the other is explained; large ones (timm's) stay *untrained*,",
        "and what the thing does to the answer is explained. *7 of 8*: in seven of eight samples the default's map is highest at the",
        "thing's place; in brackets how many other methods find, first of them the paper's, `transformer_attribution`",
        "([why it misses more](numerics.md#the-default)). *not learnt*: nothing to be found. Where it is less than all, the",
        "default does not always find evidence in models of that kind: check it on yours (`fastrel.metrics`).\n",
        "The method chains attention maps over tokens, a softmax or any other (relu, sigmoid, decay, differences); linear attention,",
        "q (kᵀ v), by the map q kᵀ that it implies (CoaT, EfficientViT-B, the content of LambdaNets). Models that have none are",
        "refused: additive or channel attention (EdgeNeXt, MobileViTv2, SwiftFormer), pooling or Fourier mixing (PoolFormer, FNet);",
        "and so is what brings sums over tokens back to them in a form whose map is not found. Where a model has channel attention",
        "as well (XCiT, DaViT), maps over tokens are chained, relevance passes others by the rule of products. CoaT was built for",
        "112 × 112 or 128 × 128 pixels: an implied map takes memory that the model does not need.",
        "Longformer, LED and JetMoE take sizes from numbers of their inputs, which no graph holds; so does ViLT, whose patches fastrel",
        "takes in their order (the model draws one at random). LongT5 attends in blocks of tokens whose number varies with the length,",
        "beside its heads; experts of Switch Transformers take as many tokens as choose them.\n",
        f"- timm, plain ViT-like families: {count(plain)}",
        f"- timm, all: {count(timm_groups)}",
        *(
            f"- {group}: {count([group])}"
            for group, found in built.items()
            if not group.startswith("timm") and any(row[1] != MISSING for row in found)
        ),
        f"- home-made spellings of one transformer (`tests/test_spellings.py`): {_spellings()}, evidence found in every sample",
        "",
    ]
    lines += [f"{missing} models below are not examined yet by today's code and are not counted.\n"] if missing else []
    unsought = sum(row[1].startswith("ok") and not row[3] for found in built.values() for row in found)
    lines += (
        [f"In {unsought} models below evidence was not sought yet; the script goes on with them.\n"] if unsought else []
    )
    for group, found in built.items():
        lines += [f"## {group}\n", "| model | verdict | evidence found | |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {verdict} | {evidence.replace('|', '/')} | {remark.replace('|', '/')} |"
            for name, verdict, remark, evidence in found
        ]
        lines.append("")
    return "\n".join(lines)


def _hits(evidence: str) -> list[tuple[int, int, int]]:
    """(found by the default, found by the first other method, samples) of every input in which evidence decided."""
    found = re.findall(rf"(?:^|[ ;])(\d+) of (\d+) \({OTHERS[0]} (\w+)", evidence)
    return [(int(mine), int(other) if other.isdigit() else 0, int(of)) for mine, of, other in found]


def _spellings() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.test_spellings import CASES

    return len(CASES)


if __name__ == "__main__":
    main()
