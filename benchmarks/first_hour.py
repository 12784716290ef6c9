"""The first hour on a GPU: `python -m benchmarks.first_hour`. Everything that could only be predicted, run, and one report to send in.

Each step has its time limit; what fails is written down and the next step goes on. The report is complete after every step.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_TRIAL = """
import torch
from fastrel.backends import BACKENDS
for i in range(torch.cuda.device_count()):
    print(f"cuda:{i}", torch.cuda.get_device_name(i), "%d.%d" % torch.cuda.get_device_capability(i))
    for name in ("triton", "cuda"):
        backend = BACKENDS[name]
        print("  ", name, backend.unavailable() or backend.runs_on(torch.device("cuda", i)) or "runs")
"""

#: Name, command and minutes.
STEPS: tuple[tuple[str, list[str], float], ...] = (
    ("what is here", [sys.executable, "-m", "fastrel", "doctor"], 10),
    ("which backend runs on which device", [sys.executable, "-c", _TRIAL], 10),
    (
        "every family against float64, the same bits twice",
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "gpu", "tests"],
        15,
    ),
    (
        "ViT-B, timed, each map checked first",
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "benchmarks/test_gpu.py",
            "-k",
            "base_patch16",
            "--benchmark-json={out}/gpu.json",
        ],
        20,
    ),
    ("the table of it", [sys.executable, "-m", "benchmarks.table", "{out}/gpu.json"], 1),
    ("what was predicted", [sys.executable, "-m", "benchmarks.roofline"], 2),
)


def run_step(name: str, command: list[str], minutes: float, folder: Path) -> str:
    """A section of the report."""
    began = time.perf_counter()
    command = [part.format(out=folder) if "{out}" in part else part for part in command]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes)
        outcome, output = f"exit {result.returncode}", result.stdout + result.stderr
    except subprocess.TimeoutExpired as error:
        parts = (error.stdout or b"", error.stderr or b"")
        outcome = f"stopped after {minutes:g} minutes"
        output = "".join(part.decode(errors="replace") if isinstance(part, bytes) else part for part in parts)
    return f"## {name}\n\n{outcome}, {time.perf_counter() - began:.0f} s\n\n```\n{output[-20_000:].strip()}\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("first_hour"), help="folder of the report (default: first_hour)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folder, report = options.out.resolve(), options.out / "report.md"
    sections = [f"# fastrel's first hour on this machine\n\n{platform.platform()}, Python {platform.python_version()}\n"]
    for name, command, minutes in STEPS:
        print(f"{name} …", flush=True)
        sections.append(run_step(name, command, minutes, folder))
        report.write_text("\n".join(sections))
    print(f"{report}: please attach it to an issue, and {options.out / 'gpu.json'} with it")


if __name__ == "__main__":
    main()
