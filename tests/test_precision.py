"""No precision is slower than float32: what products are in is decided by a measurement, or by the environment."""

import time
from collections.abc import Iterator

import pytest
import torch

import fastrel
from fastrel import precision
from fastrel.backends import native
from fastrel.precision import Products, products


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are there, nothing is set, and nothing was measured yet."""
    for variable in precision.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(native, "load", lambda: None)
    precision.speeds.cache_clear()
    yield
    precision.speeds.cache_clear()


def measure(monkeypatch: pytest.MonkeyPatch, int8: float, bfloat16: float) -> list[tuple[str, int, int]]:
    """A processor that multiplies so many times as fast as in float32; returns what it was asked."""
    asked = []

    def seconds(dtype: str, rows: int, width: int) -> float:
        asked.append((dtype, rows, width))
        return 1e-3 / {"float32": 1.0, "int8": int8, "bfloat16": bfloat16}[dtype]

    monkeypatch.setattr(precision, "_seconds", seconds)
    return asked


@pytest.mark.parametrize(
    ("int8", "bfloat16", "mixed", "low"),
    [
        (4.0, 2.0, Products("bfloat16", True), Products("int8", True)),
        (3.0, 0.6, Products(), Products("int8", False)),  # VNNI, and bfloat16 that is no faster
        (0.01, 0.005, Products(), Products()),  # AVX2 only
        (0.01, 2.0, Products("bfloat16", True), Products("bfloat16", True)),
        (1.1, 1.1, Products(), Products()),  # a tie
    ],
)
def test_the_fastest_products_are_taken(
    int8: float, bfloat16: float, mixed: Products, low: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, int8, bfloat16)
    assert products("mixed", "positive") == mixed
    assert products("low", "positive") == low
    assert products("float32", "positive") == Products()


def test_the_environment_decides_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a measurement, and on plain PyTorch too."""
    asked = measure(monkeypatch, 0.01, 4.0)
    monkeypatch.setenv("FASTREL_INT8", "1")
    monkeypatch.setenv("FASTREL_BF16", "0")
    for backend in ("auto", "cpp", "torch"):
        assert products("low", "positive", backend=backend) == Products("int8", False)
        assert products("mixed", "positive", backend=backend) == Products()
    assert not asked
    monkeypatch.setenv("FASTREL_INT8", "yes")
    with pytest.raises(fastrel.InputError, match="FASTREL_INT8='yes': set 1 to multiply in int8, 0 not to, or unset it"):
        fastrel.Explainer(torch.nn.Linear(1, 1), precision="low")


def test_plain_pytorch_only_imitates_reduced_products(monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, 4.0, 4.0)
    assert products("low", "positive", backend="torch") == Products()
    monkeypatch.setattr(native, "load", lambda: "there is no compiler")
    assert products("low", "positive") == Products()


def test_a_slow_processor_is_asked_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once; and no large product of a kind that is a hundred times slower."""
    asked = measure(monkeypatch, 0.01, 2.0)
    for _ in range(3):
        products("low", "positive")
    assert len(asked) == 6
    assert max(rows * width for dtype, rows, width in asked if dtype == "int8") < 5000
    assert max(rows * width for dtype, rows, width in asked if dtype == "bfloat16") > 100_000


def test_the_measurement_takes_milliseconds_in_any_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with the kernels themselves
    native.load()
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        found = precision.speeds()
    assert time.perf_counter() - start < 2  # 0.05 on a quiet machine
    assert set(found) == {"int8", "bfloat16"}
    assert all(speed > 0 for speed in found.values())
