"""Markdown tables from the JSON of pytest-benchmark: `python -m benchmarks.table out.json …`."""

import json
import sys
from typing import Any


def explanations(groups: dict[str, list[dict[str, Any]]]) -> None:
    """Milliseconds, and multiples of the model's own forward pass."""
    providers = list(dict.fromkeys(run["params"]["provider"] for runs in groups.values() for run in runs))
    print("| case | forward, ms | " + " | ".join(providers[1:]) + " |")
    print("|---" * (len(providers) + 1) + "|")
    for name, runs in groups.items():
        median = {run["params"]["provider"]: run["stats"]["median"] for run in runs}
        cells = [f"{median[p] / median['forward']:.2f}" if p in median else "–" for p in providers[1:]]
        print(f"| {name} | {median['forward'] * 1e3:.1f} | " + " | ".join(cells) + " |")


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


def main(paths: list[str]) -> None:
    for path in paths:
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


if __name__ == "__main__":
    main(sys.argv[1:])
