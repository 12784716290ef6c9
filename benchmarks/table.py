"""Markdown tables from the JSON of pytest-benchmark: `python -m benchmarks.table out.json … [--plot FILE.png]`.

The plot shows time per explanation, in forward passes, against tokens; `python -m benchmarks.memory --plot FILE.png` the memory.
"""

import argparse
import json
import statistics
from typing import Any

from benchmarks.test_explanations import CASES


def explanations(groups: dict[str, list[dict[str, Any]]]) -> None:
    """Milliseconds, and multiples of the model's own forward pass as it ran in turn with what is timed."""
    providers = list(dict.fromkeys(run["params"]["provider"] for runs in groups.values() for run in runs))
    others = [p for p in providers if p != "forward"]
    print("| case | forward, ms | " + " | ".join(others) + " |")
    print("|---" * (len(others) + 2) + "|")
    for name, runs in groups.items():
        ratio = {run["params"]["provider"]: run["stats"]["median"] / run["extra_info"]["forward"] for run in runs}
        cells = [f"{ratio[p]:.2f}" if p in ratio else "–" for p in others]
        forward = statistics.median(run["extra_info"]["forward"] for run in runs)
        print(f"| {name} | {forward * 1e3:.1f} | " + " | ".join(cells) + " |")


def operators(groups: dict[str, list[dict[str, Any]]]) -> None:
    """Milliseconds of both, the speed-up, and the rate of the kernel."""
    print("| operator | plain PyTorch, ms | C++, ms | times faster | rate of C++ | of the measured peak |")
    print("|---" * 6 + "|")
    for name, runs in groups.items():
        median = {run["params"]["provider"]: run["stats"]["median"] for run in runs}
        info, plain, ours = runs[0]["extra_info"], median["plain PyTorch"], median.get("C++", float("nan"))
        amount, unit = (info["gflop"], "GFLOP/s") if info["gflop"] else (info["gigabytes"], "GB/s")
        rate = amount / ours
        peak = f"{rate / info['peak']:.0%} of {info['peak']:.0f}"
        print(f"| {name} | {plain * 1e3:.2f} | {ours * 1e3:.2f} | {plain / ours:.2f} | {rate:.0f} {unit} | {peak} |")


def plot(groups: dict[str, list[dict[str, Any]]], path: str) -> None:
    """Forward passes that an explanation takes, against tokens, at batch 1."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for provider in ("fastrel", "fastrel, mixed", "fastrel, low", "fastrel, last block"):
        for family, marker in (("vit_base", "o"), ("bert", "s")):
            points = []
            for name, runs in groups.items():
                kind, size, batch = CASES[name]
                mine = [run for run in runs if run["params"]["provider"] == provider]
                found = [run["stats"]["median"] / run["extra_info"]["forward"] for run in mine]
                if batch == 1 and kind.startswith(family) and found:
                    patch = 14 if "patch14" in kind else 16
                    points.append((size if kind == "bert" else (size // patch) ** 2 + 1, found[0]))
            if points:
                label = f"{provider}, {'BERT-base' if family == 'bert' else 'ViT-B'}"
                axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=label)
    axes.set_xlabel("tokens")
    axes.set_ylabel("time, in forward passes of the model")
    axes.set_xlim(0)

    axes.set_ylim(0, 1.5 * axes.get_ylim()[1])
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", metavar="FILE", help="JSON of pytest-benchmark")
    parser.add_argument("--plot", metavar="FILE", help="time against tokens as a picture")
    options = parser.parse_args()
    for path in options.reports:
        with open(path) as file:
            report = json.load(file)
        groups: dict[str, list[dict[str, Any]]] = {}
        for run in report["benchmarks"]:
            groups.setdefault(run["group"], []).append(run)
        info = report["benchmarks"][0]["extra_info"]
        processor = report["machine_info"]["cpu"].get("brand_raw", "unknown processor")
        print(f"{processor}, {info['threads']} threads, torch {info['torch']}\n")
        (operators if "gflop" in info else explanations)(groups)
        print()
        if options.plot and "gflop" not in info:
            plot(groups, options.plot)


if __name__ == "__main__":
    main()
