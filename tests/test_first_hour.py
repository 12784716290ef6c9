"""The report of the first hour on a GPU, proven with made-up times where there is none."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compiled, measured, roofline

ROOT = Path(__file__).resolve().parent.parent


def test_every_kernel_is_somebodys_work_and_all_work_is_somebodys() -> None:
    """A kernel that is renamed would be counted as torch's."""
    kept = json.loads(compiled.TABLE.read_text())
    assert {name.split()[0] for names in kept.values() for name in names} == set(measured.OPERATORS)
    device, model = roofline.DEVICES[1], roofline.MODELS[0]
    works = [
        work.operator
        for _, width, precision in roofline.KINDS
        for batch in measured.BATCHES
        for work in roofline.reverse(device, model, batch, width, precision)
    ]
    assert set(works) <= {*measured.OPERATORS.values(), "products"}


def test_made_up_times_come_out_as_they_went_in() -> None:
    report, records = measured.fake()
    assert len(records) == len(report["benchmarks"]) == 2 * len(roofline.KINDS)
    for record in records:
        lines = list(measured.table(record))
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][1:]
        assert rows[0][0] == "all"  # the slowest
        ratios = {row[0]: row[-1] for row in rows}
        assert {ratios.pop("other"), *ratios.values()} <= {"–", "1.50"}
        assert ratios["all"] == "1.50"
        assert all(row[1] == row[2] for row in rows)  # the forward pass is taken off


def test_what_the_profiler_saw_is_of_one_call_and_of_the_device() -> None:
    def event(key: str, count: int, microseconds: float, device: str = "CUDA") -> SimpleNamespace:
        kind = getattr(torch.autograd.DeviceType, device)
        return SimpleNamespace(key=key, count=count, self_device_time_total=microseconds, device_type=kind)

    found = measured.times_of([event("a_kernel", 20, 500.0), event("aten::mm", 20, 0.0, "CPU")], rounds=10)
    assert found == {"a_kernel": (2.0, pytest.approx(5e-5))}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the hour is no dry run")
def test_the_whole_hour_as_a_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.first_hour", "--dry-run", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    report = (tmp_path / "report.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")][1:10]
    outcomes = {row[0]: row[1].split(",")[0] for row in rows}
    assert {name for name, outcome in outcomes.items() if outcome != "exit 0"} <= {"clocks before", "clocks after"}
    assert "a dry run, times made up" in report
    assert "kernels, measured beside predicted" in outcomes
    assert "| zplus_back | 48 | 48 |" in report
