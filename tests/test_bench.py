"""`fastrel bench` and what `fastrel doctor` recommends."""

import csv
import time
from pathlib import Path

import pytest
from PIL import Image

from fastrel.cli import main
from fastrel.commands import doctor
from fastrel.timing import measure


def test_calls_take_turns_and_are_counted() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    found = measure({"a": (4, lambda: call("a", 0.002)), "b": (1, lambda: call("b", 0.004))}, seconds=0.05)
    assert order[:4] == ["a", "a", "b", "b"]  # before
    assert order[4:8] == ["a", "b", "a", "b"]
    assert len(found["a"].seconds) == len(found["b"].seconds) >= 5
    assert 2 <= found["a"].percentile(0.5) < found["b"].percentile(0.5) + 2
    assert found["a"].throughput == pytest.approx(4 * len(found["a"].seconds) / sum(found["a"].seconds))


def test_the_table_has_every_setting_and_the_plot_is_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--batch-sizes", "1", "2", "--threads", "1", "--backends", "torch", "--seconds", "0.05"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "bench.csv").open()))
    assert [(row["call"], row["batch"]) for row in rows] == [
        (call, batch) for batch in ("1", "2") for call in ("forward", "predict", "explain")
    ]
    assert all(float(row["p50 ms"]) <= float(row["p90 ms"]) <= float(row["p99 ms"]) for row in rows)
    assert all(float(row["ratio"]) == 1 for row in rows if row["call"] == "forward")
    with Image.open(tmp_path / "bench.png") as plot:
        assert plot.width > 500
    assert "explain | 2 | 1 | float32 | torch" in capsys.readouterr().out


def test_doctor_recommends_threads_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_cores", lambda: 1)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(doctor.platform, "libc_ver", lambda: ("glibc", "2"))
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    found = doctor.recommendations()
    assert "more than there are cores" in found["threads"]
    assert "MALLOC_MMAP_THRESHOLD_=268435456" in found["allocator"]
    for name in doctor.ALLOCATOR:
        monkeypatch.setenv(name, "1")
    assert doctor.recommendations()["allocator"] == "as recommended"
