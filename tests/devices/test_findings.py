"""What was once wrong on GPUs, found without one, and which test holds it now; the smaller ones are tested here.

| what was wrong | test |
|---|---|
| a batch of one did not compile | `test_launches` … compiles_for_any_number_of_rows, `test_specialisations` |
| every size of a batch compiled again | `test_launches` … another_number_of_rows_compiles_nothing |
| a CUDA graph took keywords as they came, other dtypes, NaN | `test_triton` … a_graph_takes_keywords_…, a_graph_refuses_… |
| another thread's allocation broke a capture; a grid made on the CPU | here; `test_export` |
| the gate of benchmarks passed trivial maps | `test_gate` |
| what is multiplied in was guessed from dtypes; casts of weights | `test_launches` … is_what_its_operator_says, 16_bit_values_… |
| launches on the current device | `test_launches` … go_to_the_device_of_the_tensors |
| torch's new name of the setting for TF32 raised | `test_launches` … read_by_either_of_its_names |
| NaN vanished in maxima | `test_triton_interpreted`, `test_ptx` … is_not_hidden |
| TF32 cut off, float8 summed in 14 bits | `test_arithmetic`, `test_launches` … are_promoted_to_float32 |
| device 0 asked for all, no launch tried; nvcc run for nothing | `test_trial`, `test_launches` … nothing_is_compiled_… |
| a CPU explanation imported Triton | `test_launches` … without_triton_a_cpu_explanation |
| AMD's float8 and old GPUs' bfloat16 taken for fast | here |
| a library for today's GPUs alone | here |
| grids of more than 65535, products of indices beyond 2³¹, norms of wide rows | `test_launches`, `test_specialisations` |
| float32 heads of 65 to 128 features in tiles of 16 by 16 | `test_launches` … wide_heads_… |
| sums in an order that a GPU is free to choose: other bits at every run | here |
| spills in kernels that no table of calls had | `test_triton` … fits_its_device, of what models launch (`benchmarks.zoo`) |
| a failure of the device blamed on the model | here |
| hundreds of launches, weights prepared at every call, a wait at every check | `test_launches` BUDGET, here, `test_waiting` |
| a roofline without L2, issue slots, waves and launches | `test_triton` … static_bounds, products_are_bound |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastrel
from fastrel import build, graphed, precision, weights
from fastrel.backends import triton
from fastrel.precision import Products
from tests import models


def test_a_capture_lets_other_threads_allocate() -> None:
    """A DataLoader's thread that pins memory would end both in torch's own mode."""
    asked: dict[str, Any] = {}

    @contextlib.contextmanager
    def graph(_: Any, **options: Any) -> Iterator[None]:
        asked.update(options)
        yield

    names = ("Stream", "current_stream", "CUDAGraph", "device", "stream")
    with contextlib.ExitStack() as patched:
        for name in names:
            patched.enter_context(mock.patch.object(torch.cuda, name, mock.MagicMock()))
        patched.enter_context(mock.patch.object(torch.cuda, "graph", graph))
        graphed.record(mock.MagicMock(), torch.device("cuda:0"))
    assert asked["capture_error_mode"] == "thread_local"


@pytest.mark.parametrize(("name", "fast"), [("gfx90a", False), ("gfx942", False), ("gfx950", True), ("gfx1201", True)])
def test_amds_float8_is_taken_where_there_is_one(name: str, fast: bool) -> None:
    """CDNA2 has none and CDNA3's is another one; their capabilities read 9.0 and 9.4."""
    with (
        mock.patch.object(torch.version, "hip", "6.4"),
        mock.patch.object(triton, "runs_on", lambda device: None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 4)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=mock.Mock(gcnArchName=f"{name}:sramecc+")),
    ):
        found = precision.products("low", "positive", device=torch.device("cuda:0"))
    assert found == Products("float8" if fast else "bfloat16", True)


@pytest.mark.parametrize(
    ("capability", "reason", "expected"),
    [
        ((8, 9), None, "bfloat16"),
        ((9, 0), None, "float8"),
        ((12, 0), None, "float8"),
        ((9, 0), "a trial kernel failed", "bfloat16"),
    ],
)
def test_float8_is_taken_where_its_sums_are_whole_and_kernels_run(
    capability: tuple[int, int], reason: str | None, expected: str
) -> None:
    """Ada's sums of 14 bits cannot be promoted; where no kernel runs, plain torch would imitate float8."""
    with (
        mock.patch.object(triton, "runs_on", lambda device: reason),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
    ):
        assert precision.products("low", "positive", device=torch.device("cuda:0")) == Products(expected, True)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), Products()), ((8, 0), Products("bfloat16", True))])
def test_bfloat16_is_left_to_gpus_that_have_it(capability: tuple[int, int], expected: Products) -> None:
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
        assert precision.products("mixed", "positive", device=torch.device("cuda:0")) == expected


def test_the_cuda_library_runs_on_gpus_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code alone has no image for the next generation; PTX is compiled by its driver."""
    monkeypatch.setattr(build.shutil, "which", lambda name: name)
    monkeypatch.setenv(build.ARCHS_VARIABLE, "80;90a;120")
    codes = [flag.rpartition("code=")[2] for flag in build.compiler(build.CUDA)[1:]]
    assert codes == ["sm_80", "sm_90a", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    "failure",
    [
        torch.AcceleratorError("an illegal memory access"),
        torch.OutOfMemoryError("an illegal memory access"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=["torch", "memory", "Triton", "cuBLAS"],
)
@pytest.mark.parametrize("at", ["forward", "reverse"])
def test_a_device_that_fails_is_no_fault_of_the_model(failure: RuntimeError, at: str) -> None:
    model, given = models.build("timm_vit"), models.inputs("timm_vit")["x"]
    explainer = fastrel.Explainer(model, backend="torch")
    explainer(given)
    (program,) = models.programs(explainer)
    failed = mock.patch.object(getattr(program, at), "forward", side_effect=failure)
    with failed, pytest.raises(type(failure), match="an illegal memory access") as found:
        explainer(given)
    assert not isinstance(found.value, fastrel.FastrelError)


#: Operators whose sums on a GPU are by atomics, in any order (torch.use_deterministic_algorithms names them).
UNORDERED = (
    "index_add", "scatter_add", "scatter_reduce", "bincount", "histc", "cumsum", "grid_sampler", "adaptive_avg_pool",
    "adaptive_max_pool", "fractional_max_pool", "avg_pool3d_backward", "upsample", "reflection_pad", "replication_pad", "embedding_bag",
)  # fmt: skip


@pytest.mark.parametrize("name", models.FAMILIES)
def test_no_explanation_adds_up_in_an_order_of_the_gpus(name: str) -> None:
    """The gradient of a gather would be one; the same bits at every run are asked of every family on a device."""
    seen: set[str] = set()

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(x.is_floating_point() for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)):
                seen.add(func.name().removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    explainer = models.explainer(name).using(backend="torch")
    explainer(**models.inputs(name))
    with Operators():
        explainer(**models.inputs(name))
    assert seen >= {"mm"} or "bmm" in seen
    assert [operator for operator in seen if operator.lstrip("_").startswith(UNORDERED)] == []


def test_what_is_made_of_a_weight_is_kept_until_it_is_written_to_or_moved() -> None:
    calls = []
    kept = weights.kept_by_version(lambda weight, purpose: calls.append(purpose) or (weight.bfloat16(),))
    weight = torch.nn.Parameter(torch.randn(3, 4))
    first = kept(weight, "gradient")
    assert kept(weight, "gradient")[0] is first[0]
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(kept(weight, "gradient")[0], weight.bfloat16())
    weight.data = torch.randn(3, 4)
    assert torch.equal(kept(weight, "gradient")[0], weight.bfloat16())
    assert calls == ["gradient"] * 3
    weight.data.mul_(2)  # which nothing shows
    weights.forget()
    assert torch.equal(kept(weight, "gradient")[0], weight.bfloat16())
