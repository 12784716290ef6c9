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
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from zoo import PLAIN, Case, cases

#: The verdict on models that were not examined.
MISSING = "not examined"

#: What was found so far; `--only` brings a part of it up to date.
STORE = Path(__file__).resolve().parent.parent / "results" / "coverage.json"


def examine(build: Callable[[], Case], send: Any) -> None:
    """Verify one model and send (verdict, remark, seconds)."""
    import warnings

    import fastrel

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        case = build()
    except Exception as error:
        send.send(("not built", f"{type(error).__name__}: {error}".splitlines()[0][:160], 0.0))
        return
    start = time.perf_counter()
    try:
        report = fastrel.Explainer(case.model).verify(**case.inputs, target=case.target)
        failed = ", ".join(f"{c.name} {c.value:.1e}" for c in report.checks if not c.ok)
        unchecked = ", ".join(c.name for c in report.checks if "not checked" in c.meaning or "not to be had" in c.meaning)
        maps = "; ".join(shape if len(report.maps) == 1 else f"{name}: {shape}" for name, shape in report.maps.items())
        remark = f"{report.blocks} blocks; {maps}"
        remark += f"; generic: {', '.join(report.generic[:2])}" if report.generic else ""
        verdict = f"failed: {failed}" if failed else f"ok but {unchecked}" if unchecked else "ok"
        send.send((verdict, remark, time.perf_counter() - start))
    except fastrel.FastrelError as error:
        send.send(("refused", str(error).splitlines()[0][:200], time.perf_counter() - start))
    except Exception as error:
        send.send(("CRASHED", f"{type(error).__name__}: {error}".splitlines()[0][:200], time.perf_counter() - start))


def run(build: Callable[[], Case], limit: float) -> tuple[str, str, float]:
    """`examine` in a process of its own, at most `limit` seconds."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=examine, args=(build, send))
    process.start()
    found = receive.recv() if receive.poll(limit) else ("timed out", f"after {limit:.0f} s", limit)
    process.kill()
    process.join()
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
    results: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() and not options.anew else {}
    if options.only:
        chosen = [c for c in known if any(part in f"{c[0]} {c[1]}" for part in options.only)]
    else:
        chosen = [c for c in known if f"{c[0]}/{c[1]}" not in results]

    def one(case: tuple[str, str, Any]) -> None:
        group, name, build = case
        verdict, remark, seconds = run(build, options.limit)
        print(f"{group:24} {name:36} {verdict:20} {remark} ({seconds:.0f} s)", flush=True)
        results[f"{group}/{name}"] = [verdict, remark]
        STORE.parent.mkdir(exist_ok=True)
        STORE.write_text(json.dumps(results))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, chosen))
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for group, name, _ in known:
        rows.setdefault(group, []).append((name, *results.get(f"{group}/{name}", (MISSING, ""))))
    Path(options.out).write_text(page(rows))


def page(rows: dict[str, list[tuple[str, str, str]]]) -> str:
    """The Markdown of docs/coverage.md."""
    built = {group: [row for row in found if row[1] != "not built"] for group, found in rows.items()}
    missing = sum(row[1] == MISSING for found in built.values() for row in found)

    def count(groups: list[str]) -> str:
        found = [row for group in groups for row in built.get(group, []) if row[1] != MISSING]
        ok = sum(row[1] == "ok" for row in found)
        part = sum(row[1].startswith("ok but") for row in found)
        return f"{ok + part} of {len(found)}" + (f" ({part} with a check that could not be made)" if part else "")

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
        "The method chains attention maps over tokens. Models that have none are refused: factorised, additive or channel attention",
        "(CoaT, EdgeNeXt, EfficientViT-B, MobileViTv2, SwiftFormer), pooling or Fourier mixing (PoolFormer, FNet), lambda layers.",
        "Where a model has both kinds (XCiT, DaViT), maps over tokens are chained, relevance passes others by the rule of products.",
        "ViLT, Longformer, LED and JetMoE take sizes from numbers of their inputs, which no graph holds (ViLT also draws its patches",
        "in random order).\n",
        f"- timm, plain ViT-like families: {count(plain)} pass",
        f"- timm, all: {count(timm_groups)} pass",
        *(
            f"- {group}: {count([group])} pass"
            for group, found in built.items()
            if not group.startswith("timm") and any(row[1] != MISSING for row in found)
        ),
        "",
    ]
    lines += [f"{missing} models below are not examined yet by today's code and are not counted.\n"] if missing else []
    for group, found in built.items():
        lines += [f"## {group}\n", "| model | verdict | |", "|---|---|---|"]
        lines += [f"| {name} | {verdict} | {remark.replace('|', '/')} |" for name, verdict, remark in found]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
