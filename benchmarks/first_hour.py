"""The first hour on a GPU: `python -m benchmarks.first_hour`. Everything that could only be predicted, run, and one report to send in.

Each step has its time limit; what fails is written down and the next step goes on. The report is complete after every step.
`--dry-run` runs the same steps where there is no GPU, with made-up times: it proves that there will be a report.
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

_SMI = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_throttle_reasons.active"
_CLOCKS = ["nvidia-smi", f"--query-gpu=name,driver_version,{_SMI}", "--format=csv"]
_PYTEST = [sys.executable, "-m", "pytest"]
_MEASURED = [sys.executable, "-m", "benchmarks.measured", "{out}"]

#: Name, command and minutes.
STEPS: tuple[tuple[str, list[str], float], ...] = (
    ("what is here", [sys.executable, "-m", "fastrel", "doctor"], 10),
    ("clocks before", _CLOCKS, 1),
    ("which backend runs on which device", [sys.executable, "-c", _TRIAL], 10),
    (
        "every family against float64, the same bits twice",
        [*_PYTEST, "-n", "0", "-m", "gpu", "-rs", "tests/test_triton.py"],
        15,
    ),
    (
        "ViT-B, timed, each map checked first",
        [*_PYTEST, "benchmarks/test_gpu.py", "-k", "base_patch16", "--benchmark-json={out}/gpu.json"],
        20,
    ),
    ("kernels, measured beside predicted", _MEASURED, 10),
    ("in forward passes of the model", [sys.executable, "-m", "benchmarks.table", "{out}/gpu.json"], 1),
    ("what was predicted", [sys.executable, "-m", "benchmarks.roofline"], 2),
    ("clocks after", _CLOCKS, 1),
)

#: What a dry run makes up.
FAKE = {"kernels, measured beside predicted": [*_MEASURED, "--fake"]}


#: Characters of a step's output that the report has.
KEPT = 60_000


def run_step(name: str, command: list[str], minutes: float, folder: Path) -> tuple[str, str]:
    """A row of the report's table, and a section of the report."""
    began = time.perf_counter()
    command = [part.format(out=folder) if "{out}" in part else part for part in command]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes)
        outcome, output = f"exit {result.returncode}", result.stdout + result.stderr
    except OSError as error:
        outcome, output = "not run", str(error)
    except subprocess.TimeoutExpired as error:
        parts = (error.stdout or b"", error.stderr or b"")
        outcome = f"stopped after {minutes:g} minutes"
        output = "".join(part.decode(errors="replace") if isinstance(part, bytes) else part for part in parts)
    output, outcome = output.strip(), f"{outcome}, {time.perf_counter() - began:.0f} s"
    last = output.splitlines()[-1][:120].replace("|", "/") if output else ""
    cut = "" if len(output) <= KEPT else f"({len(output) - KEPT} characters left out)\n"
    return f"| {name} | {outcome} | {last} |", f"## {name}\n\n{outcome}\n\n```\n{cut}{output[-KEPT:]}\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("first_hour"), help="folder of the report (default: first_hour)")
    parser.add_argument("--dry-run", action="store_true", help="on any machine: the same steps, times made up")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folder, report = options.out.resolve(), options.out / "report.md"
    title = f"# fastrel's first hour on this machine{': a dry run, times made up' if options.dry_run else ''}\n"
    rows, sections = ["| step | outcome | last line |\n|---|---|---|"], []
    for name, command, minutes in STEPS:
        print(f"{name} …", flush=True)
        row, section = run_step(name, FAKE.get(name, command) if options.dry_run else command, minutes, folder)
        rows.append(row)
        sections.append(section)
        about = f"{platform.platform()}, Python {platform.python_version()}\n"
        report.write_text("\n".join([title, about, *rows, "", *sections]))
    print(f"{report}: please attach it to an issue")


if __name__ == "__main__":
    main()
