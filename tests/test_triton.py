"""The Triton half without a GPU: its kernels under the interpreter, and compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import compiled, roofline
from fastrel import Explainer, InputError, graphed, inputs, targets, weights
from fastrel.backends import BACKENDS
from fastrel.graphed import run
from tests import golden_files as golden
from tests import models
from tests.small import ON_SOME_KERNELS, RELEASE
from tests.test_waiting import Looks

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = json.loads(compiled.TABLE.read_text())
ALL_CASES = compiled.cases


@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    """In a process of its own, because Triton decides at import."""
    command = [*ON_SOME_KERNELS, "tests/devices/test_triton_interpreted.py"]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


#: What kernels are compiled anew for here; the rest of the table is as `python -m benchmarks.compiled --write` left it.
COMPILED = ("sm_80", "sm_120")

#: Bytes that may be spilled. AMD's compiler keeps two to four registers elsewhere; nobody has tuned for it.
SPILLED = {"gfx942": 16}


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, compiled.Resources]]:
    with mock.patch.object(compiled, "cases", some_cases):
        return compiled.table(list(COMPILED))


def some_cases(target: str) -> tuple[compiled.Case, ...]:
    """Every sixth one, and others for the other target; all before a release."""
    return ALL_CASES(target) if RELEASE else ALL_CASES(target)[COMPILED.index(target) :: 6]


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_every_launch_fits_its_device(target: str) -> None:
    """Of what is launched: no spills, shared memory that is there, products in tensor cores."""
    for name, kept in EXPECTED[target].items():
        used = compiled.Resources(**kept)
        assert used.spills <= SPILLED.get(target, 0), f"{name} on {target} spills {used.spills} bytes"
        assert used.shared <= compiled.SHARED_LIMIT[target] * 1024, name
        assert used.tensor_cores > 0 or not compiled.multiplies(name), f"{name} on {target} has no tensor-core instruction"


@pytest.mark.slow
@pytest.mark.parametrize("target", compiled.TARGETS if RELEASE else ("sm_90", "sm_120", "gfx942"))
def test_the_table_has_what_is_launched(target: str) -> None:
    """What launchers launch and what models of the zoo do, recorded; no list by hand. Each was compiled of the present text."""
    cases = compiled.cases(target)
    assert {name: kept["source"] for name, kept in EXPECTED[target].items()} == {
        case.name: compiled.source(case) for case in cases
    }
    assert target.startswith("gfx") or any(case.of_model for case in cases)


@pytest.mark.slow
@pytest.mark.parametrize("target", COMPILED)
def test_kernels_compile_to_what_was_written_down(resources: Any, target: str) -> None:
    """No more registers or memory than in the table; `python -m benchmarks.compiled --write` writes down what there is now."""
    for case in some_cases(target):
        used, expected = resources[target][case.name], EXPECTED[target][case.name]
        assert used.spills <= expected["spills"], case.name
        assert used.registers <= 1.1 * expected["registers"], case.name
        assert used.shared <= 1.1 * expected["shared"], case.name


@pytest.mark.slow
def test_the_wheel_holds_the_kernels_and_claims_no_name_of_others(tmp_path: Path) -> None:
    """`triton_kernels` at the top level of site-packages is another project."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, env={**os.environ, "FASTREL_BUILD": "skip"})
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"fastrel"}
    for wanted in (
        "triton_kernels/zplus_linear.py",
        "csrc/cuda/linear.cu",
        "csrc/include/fastrel/device.cuh",
        "csrc/binding.h",
    ):
        assert f"fastrel/{wanted}" in names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("rules", ["positive", "official"])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_on_a_device(name: str, rules: str, backend: str) -> None:
    """Every family in float32 on the GPU against float64 in plain PyTorch, relative to plain PyTorch's own float32 error."""
    if reason := BACKENDS[backend].unavailable():
        pytest.skip(reason)
    model, given = models.build(name), models.inputs(name)
    exact = Explainer(model, rules=rules, backend="torch")(**given, target=1).relevance
    model.float().cuda()
    moved = {key: (x.float() if x.is_floating_point() else x).cuda() for key, x in given.items()}
    plain = Explainer(model, rules=rules, backend="torch")(**moved, target=1).relevance.cpu()
    explainer = Explainer(model, rules=rules, backend=backend)
    ours = explainer(**moved, target=1).relevance
    assert golden.map_error(ours.cpu(), exact) <= max(2 * golden.map_error(plain, exact), 1e-4)
    assert torch.equal(ours, explainer(**moved, target=1).relevance)  # the same bits at every run


@pytest.mark.parametrize("name", ["timm_vit", "hf_bert", "timm_deit_distilled"])
def test_nothing_between_inputs_and_map_looks_at_values(name: str) -> None:
    """What a CUDA graph holds runs on fake tensors, which have none; and gives what the explainer gives."""
    model, given = models.build(name), models.inputs(name)
    explainer = Explainer(model, backend="torch")
    expected = explainer(**given)
    values = explainer._engine.enter((), given).values
    (program,) = models.programs(explainer)
    _, classes, relevance, _ = run(program, values, None)
    assert torch.equal(relevance[0][:, 0], expected.relevance)
    assert torch.equal(classes[:, 0], expected.target)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in values]
        shapes = run(program, fake, mode.from_tensor(classes))
    assert [x.shape for x in shapes[2]] == [x.shape for x in relevance]
    with pytest.raises(InputError, match="a CUDA graph needs a model on a CUDA device, and this one is on cpu"):
        explainer.graphed(**given)


@pytest.fixture
def no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Explainer.graphed` with a graph that is replayed by computing again into the same places: no device is needed."""
    refreshed: list[weights.Recording] = []

    def record(compute: Any, device: torch.device, pool: Any) -> Any:
        with torch.no_grad(), weights.recording() as read:
            results = compute()

        def replay() -> None:
            assert refreshed.pop() is read, "weights are prepared anew before a replay"
            with torch.no_grad():
                again = compute()
            for place, new in zip(pytree.tree_leaves(results), pytree.tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor):
                    place.copy_(new)

        return graphed.Recorded(results, replay, read, None)

    monkeypatch.setattr(graphed, "record", record)
    monkeypatch.setattr(weights.Recording, "refresh", lambda self: refreshed.append(self))


def test_a_graph_takes_keywords_in_any_order(no_graph: None) -> None:
    """A BERT tokenizer returns token_type_ids before attention_mask; the model's signature has them the other way round."""
    model, given = models.build("hf_bert"), models.inputs("hf_bert")
    given["token_type_ids"] = (torch.arange(given["input_ids"].shape[1]) % 2).expand_as(given["input_ids"]).contiguous()
    swapped = {name: given[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    explainer = Explainer(model, backend="torch")
    expected = explainer(**given)
    ours = explainer.graphed(**given)(**swapped)
    assert torch.equal(ours.logits, expected.logits)
    assert torch.equal(ours.relevance, expected.relevance)


@pytest.mark.parametrize(("batch", "target"), [(1, [[2]]), (2, [1, 4]), (3, [[0], [5], [0]]), (4, 3)])
def test_a_batch_between_two_graphs_is_filled_up_to_the_larger_one(no_graph: None, batch: int, target: Any) -> None:
    model, given = models.build("timm_vit"), models.inputs("timm_vit", batch=4)["x"]
    explainer = Explainer(model, backend="torch")
    replayed = explainer.graphed(given[:2], targets=1, batch_sizes=(1, 4))
    ours, expected = replayed(given[:batch], target=target), explainer(given[:batch], target=target)
    for found, wanted in ((ours.logits, expected.logits), (ours.relevance, expected.relevance.reshape(batch, -1))):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert ours.target.tolist() == expected.target.reshape(-1).tolist()


def test_a_graph_refuses_larger_batches_and_odd_sizes(no_graph: None) -> None:
    model, given = models.build("timm_vit"), models.inputs("timm_vit", batch=4)["x"]
    explainer = Explainer(model, backend="torch")
    replayed = explainer.graphed(given[:2], batch_sizes=(2, 1))
    with pytest.raises(
        InputError, match=r"\(3, 3, 32, 32\).* do not fit the captured graph, which takes .*\(2, 3, 32, 32\)"
    ):
        replayed(given[:3])
    with pytest.raises(InputError, match=r"from 1 on, not \(0, 2\)"):
        explainer.graphed(given, batch_sizes=(0, 2))
    two = explainer.graphed(given, targets=2)
    with pytest.raises(InputError, match=r"\(4, 1\) does not fit the captured \(4, 2\)"):
        two(given, target=1)


def test_a_graph_waits_once_and_without_checks_never(no_graph: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (inputs, targets, graphed):
        monkeypatch.setattr(module, "waits", lambda x: True)  # as on a GPU
    model, given = models.build("timm_vit"), models.inputs("timm_vit", batch=2)
    for wanted in (True, False):
        replayed = Explainer(model, backend="torch").graphed(**given, targets=1, checks=wanted)
        with Looks() as looks:
            replayed(**given, target=torch.tensor([1, 4]))
        assert looks.count == wanted
        if wanted:
            with pytest.raises(InputError, match="target 99 is out of range"):
                replayed(**given, target=torch.tensor([1, 99]))
        else:
            relevance = replayed(**given, target=torch.tensor([1, 99])).relevance
            assert relevance[0].isfinite().all()
            assert relevance[1].isnan().all()


def test_a_graph_without_checks_gives_nan_for_nan(no_graph: None) -> None:
    model, given = models.build("timm_vit"), models.inputs("timm_vit")
    replayed = Explainer(model, backend="torch").graphed(**given, checks=False)
    given["x"][1, 0, 0, 0] = torch.nan
    explanation = replayed(given["x"])
    assert explanation.relevance[1].isnan().all()
    assert explanation.relevance[[0, 2]].isfinite().all()


def test_a_graph_refuses_other_dtypes_and_what_is_not_finite(no_graph: None) -> None:
    model, given = models.build("timm_vit"), models.inputs("timm_vit")
    replayed = Explainer(model, backend="torch").graphed(**given)
    with pytest.raises(InputError, match=r"'float32'\)\] do not fit the captured graph, which takes .*'float64'\)\]"):
        replayed(given["x"].float())
    given["x"][0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="the model's output"):
        replayed(given["x"])


def test_a_graph_refuses_other_modes_and_constants(no_graph: None) -> None:
    model, given = models.build("hf_bert"), models.inputs("hf_bert")
    replayed = Explainer(model, backend="torch").graphed(**given, output_hidden_states=False)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="ambient modes than captured"):
        replayed(**given, output_hidden_states=False)
    with pytest.raises(InputError, match="other constants, keywords"):
        replayed(**given, output_hidden_states=True)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an option": lambda model: setattr(model.attn_pool if model.attn_pool else model.blocks[0].attn, "scale", 0.1),
    "a hook": lambda model: model.norm.register_forward_hook(lambda module, given, out: 2 * out),
    "a weight replaced": lambda model: setattr(model.head, "weight", torch.nn.Parameter(2 * model.head.weight.data)),
    "the memory of a weight replaced": lambda model: setattr(model.head.weight, "data", 2 * model.head.weight.data),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_of_a_model_that_changed_is_refused(change: str, no_graph: None) -> None:
    model, given = models.build("timm_vit"), models.inputs("timm_vit")
    replayed = Explainer(model, backend="torch").graphed(**given)
    with torch.no_grad():
        model.head.weight += 1
    assert torch.equal(replayed(**given).relevance, Explainer(model, backend="torch")(**given).relevance)
    CHANGES[change](model)
    with pytest.raises(
        InputError, match=r"changed since its explanation was captured as a CUDA graph; call graphed\(...\) again"
    ):
        replayed(**given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_replays_the_same_explanation() -> None:
    model, given = models.build("timm_vit").float().cuda(), models.inputs("timm_vit")["x"].float().cuda()
    explainer = Explainer(model)
    replayed = explainer.graphed(given, targets=2)
    for images in (given, given.flip(0)):
        expected = explainer(images, target=[[1, 2]] * len(images))
        assert torch.equal(replayed(images, target=[[1, 2]] * len(images)).relevance, expected.relevance)


def test_the_roofline_predicts_and_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.roofline", "--batch", "64"]
    page = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert page.startswith("# Predicted, never measured")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith(("| A100 | ViT-B", "| H100 | ViT-B"))]
    assert len(rows) == 7
    assert all(
        1 < float(row[5]) / float(row[4]) < 12 for row in rows
    )  # the reverse pass takes longer than the forward pass


#: The reverse pass of ViT-B at batch 64 on an H100, ms at most, by the corrected model.
STATIC = {"float32": 110, "bfloat16 model": 45, "mixed": 30}


@pytest.mark.parametrize("name", STATIC)
def test_static_bounds_of_the_reverse_pass(name: str) -> None:
    width, precision = next((width, precision) for kind, width, precision in roofline.KINDS if kind == name)
    device, model = roofline.DEVICES[1], roofline.MODELS[0]
    works = list(roofline.reverse(device, model, 64, width, precision))
    assert 1e3 * roofline.total(device, model, works)[0] <= STATIC[name]


def test_products_are_bound_by_what_bounds_them() -> None:
    """64 × 64 tiles of 16-bit operands read from L2 more than they multiply; the vendor's products do not."""
    device, tile = roofline.DEVICES[1], roofline.configs.Tile(64, 64, 64, 8, 3)
    fused = roofline.tiled("", tile, 12608, 3072, 768, 1, (2, 2), "bfloat16", 0.0, 333).bounds(device)
    assert fused["L2"] > 2 * fused["arithmetic"]
    assert fused["issue"] > fused["arithmetic"]
    few = roofline.tiled("", tile, 197, 768, 3072, 1, (2, 2), "bfloat16", 0.0, 0).bounds(device)
    assert few["arithmetic"] > 2 * roofline.product(197, 768, 3072) / 989e12  # 48 programs leave most processors idle
