"""What a GPU would be asked to do, recorded without one: Triton's own host path on a fake driver, tensors on a fake cuda:1."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not launched", allow_module_level=True)

import triton.language as tl
from fastrel.triton_kernels import activation, configs, layer_norm_backward, zplus_sums

from benchmarks import roofline
from fastrel import backends, ops
from fastrel.backends import triton
from fastrel.backends.common import Call
from fastrel.ops import steps
from tests.devices import recorder
from tests.devices.programs import Launches, lowered
from tests.devices.recorder import GRID_LIMITS, Recorded, recorded

DEVICE = torch.device("cuda:1")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def seen() -> Iterator[Recorded]:
    with recorded(capability=90) as launches, FakeTensorMode():
        yield launches


@pytest.fixture
def cuda_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA passes seem to be compiled."""
    monkeypatch.setattr(backends.cuda, "unavailable", lambda: None)
    monkeypatch.setitem(backends.BACKENDS, "cuda", dataclasses.replace(backends.BACKENDS["cuda"], unavailable=lambda: None))


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def linear(n: int, dtype: torch.dtype = torch.float32, features: int = 64, targets: int = 1) -> None:
    x, weight = on_gpu(n, features, dtype=dtype), on_gpu(features, features, dtype=dtype)
    lane = on_gpu(targets, n, features)
    y = on_gpu(n, features, dtype=dtype)
    triton.kernels()[ops.zplus_linear](x, weight, y, None, lane, lane, "positive")


def reduced(n: int, purpose: Any, x: torch.dtype = torch.float32, features: int = 64) -> None:
    kernels = triton.kernels()
    weight = on_gpu(features, features, dtype=x)
    w, w_abs, scales = kernels[ops.reduced_weight](weight, purpose)
    w_grad = w if purpose == "bfloat16" else kernels[ops.reduced_weight](weight, "gradient")[0]
    lane, y = on_gpu(1, n, features), on_gpu(n, features, dtype=x)
    kernels[ops.zplus_linear_reduced](on_gpu(n, features, dtype=x), w, w_abs, scales, w_grad, y, None, lane, lane)


def attention(
    batch: int, heads: int, tokens: int, d: int = 64, dtype: torch.dtype = torch.float32, targets: int = 1
) -> None:
    q = on_gpu(batch, heads, tokens, d, dtype=dtype)
    lane, row = on_gpu(targets, batch, heads, tokens, d), on_gpu(targets, batch, tokens)
    options = (0.125, False, 0, "positive", "gradient_relevance", True, True)
    triton.kernels()[ops.attention_relevance](q, q, q, None, lane, lane, row, *options)


def every_operator(n: int) -> None:
    """Every launcher for n rows, of one sample each where there are samples."""
    kernels = triton.kernels()
    linear(n)
    linear(n, torch.bfloat16)
    linear(n, torch.bfloat16, features=768)
    kernels[torch.matmul](on_gpu(1, n, 64), on_gpu(64, 32, dtype=torch.bfloat16))
    reduced(n, "bfloat16")
    reduced(n, "float8", features=384)
    attention(n, 2, 5)
    attention(n, 2, 5, dtype=torch.bfloat16)
    x, lane, maps = on_gpu(n, 3, 64), on_gpu(1, n, 3, 64), on_gpu(1, n, 2, 5, 5)
    for rules in ("positive", "official"):
        kernels[ops.residual_add](x, x, lane, 0, rules)
    kernels[ops.layer_norm_backward](lane, x, on_gpu(64), 1, 1e-5)
    kernels[ops.attention_update](None, maps, maps, "gradient_relevance")
    kernels[ops.rollout_row](on_gpu(1, n, 5), on_gpu(1, n, 5, 5), True)
    for dtype in (torch.float32, torch.bfloat16):
        fused(n, dtype)


def fused(n: int, dtype: torch.dtype) -> None:
    """What fusion makes of a block's operators, for n samples of 5 tokens."""
    kernels = triton.kernels()
    linear_, value = kernels[ops.zplus_linear], on_gpu(n, 5, 64, dtype=dtype)
    lane, wide = on_gpu(1, n, 5, 64), on_gpu(192, 64, dtype=dtype)
    part = wide.narrow(0, 128, 64)
    for z in zplus_sums.zplus_sums(*(value, part, value, None) * 4, reduced=False):
        linear_(value, part, value, None, lane, lane, "positive", sums=z, formed=True, slope=value, divisor=z)
        linear_(value, part, value, None, lane, on_gpu(1, n, 5, 192), "positive", sums=z, w_grad=wide)
    activation.through_gelu(lane, value)
    activation.activation_ratio(lane, value, value)
    q, row, options = on_gpu(n, 2, 5, 32, dtype=dtype), on_gpu(1, n, 5), (0.125, False, 0, "positive", "gradient_relevance")
    of_heads = on_gpu(1, n, 2, 5, 32)
    through = kernels[ops.attention_relevance](
        q, q, q, None, of_heads, of_heads, row, *options, False, True, True, parts=True
    )[7]
    half_block = layer_norm_backward.half_block
    half_block(lane, value, None, 1, 1e-5, lane, value, value, lane, lane, through, row, on_gpu(5 * n, 64))


@pytest.mark.parametrize("n", [1, 2, 16, 4096])
def test_every_kernel_compiles_for_any_number_of_rows(seen: Recorded, n: int) -> None:
    """One among them: Triton makes a constant of an argument that is 1."""
    every_operator(n)
    assert {launch.name for launch in seen.launches} >= {
        "zplus_shares_kernel",
        "zplus_back_kernel",
        "attention_keys_kernel",
        "half_block_kernel",
    }
    if n * 5 < configs.MANY_ROWS:
        assert {launch.name for launch in seen.launches} >= {"zplus_sums_kernel", "attention_lanes_kernel"}


def test_launches_go_to_the_device_of_the_tensors_whatever_the_current_one(seen: Recorded) -> None:
    every_operator(3)
    assert seen.device == 0
    assert seen.launches
    assert all(launch.on_its_tensors_device() for launch in seen.launches)


def test_another_number_of_rows_compiles_nothing(seen: Recorded) -> None:
    for n in (16, 17, 2, 48):
        every_operator(n)
        if n == 16:
            seen.kernels.clear()
    assert [kernel.kernel.fn.__name__ for kernel in seen.kernels] == []
    # From so many rows on torch multiplies, with its passes; float32 has larger tiles; and sweeps are launched one by one.
    every_operator(4096)
    others = {
        "scaled_rows_kernel",
        "sides_kernel",
        "shares_kernel",
        "combine_kernel",
        "attention_queries_kernel",
        "attention_keys_kernel",
    }
    assert {kernel.kernel.fn.__name__ for kernel in seen.kernels} == others | {"zplus_shares_kernel", "zplus_back_kernel"}
    seen.kernels.clear()
    every_operator(5001)
    assert seen.kernels == []


@pytest.mark.parametrize("samples", [65536, 200_000])
def test_grids_hold_for_batches_of_windows(seen: Recorded, samples: int) -> None:
    """Swin-B at batch 256 has 65536 windows times heads; y and z of a grid end at 65535."""
    kernels = triton.kernels()
    attention(samples // 4, 4, 49, 32)
    x, lane, maps = on_gpu(samples, 2, 8), on_gpu(1, samples, 2, 8), on_gpu(1, samples, 2, 5, 5)
    kernels[ops.residual_add](x, x, lane, 0, "official")
    kernels[ops.attention_update](None, maps, maps, "gradient_relevance")
    kernels[ops.rollout_row](on_gpu(1, samples, 5), on_gpu(1, samples, 5, 5), True)
    linear(samples * 16, torch.bfloat16, features=512)
    for launch in seen.launches:
        assert all(size <= limit for size, limit in zip(launch.grid, GRID_LIMITS, strict=True)), launch.name


DOTS = {
    # what is asked: weight's and values' dtype, what the operator multiplies in
    "float32": (torch.float32, None, {("fp32", "tf32x3", False)}),
    "float32 in bfloat16 models": (torch.bfloat16, None, {("bf16", "ieee", True)}),
    "float32 in float16 models": (torch.float16, None, {("fp32", "tf32", True)}),
    "mixed": (torch.float32, "bfloat16", {("bf16", "ieee", False)}),
    "mixed in bfloat16 models": (torch.bfloat16, "bfloat16", {("bf16", "ieee", False)}),
    "low": (torch.float32, "float8", {("fp8e4nv", "ieee", False)}),
    "low in bfloat16 models": (torch.bfloat16, "float8", {("fp8e4nv", "ieee", False)}),
}


@pytest.mark.parametrize("name", DOTS)
def test_what_a_layer_multiplies_in_is_what_its_operator_says(seen: Recorded, name: str) -> None:
    """Not what dtypes suggest: values computed again are float32 beside a 16-bit weight, or both are 16-bit."""
    dtype, purpose, expected = DOTS[name]
    for x_dtype in {dtype, torch.float32}:
        rows, features = (configs.FLOAT8_ROWS, 384) if purpose == "float8" else (5, 64)
        x, w = on_gpu(rows, features, dtype=x_dtype), on_gpu(features, features, dtype=dtype)
        lane, y = on_gpu(1, rows, features), on_gpu(rows, features, dtype=dtype)
        kernels = triton.kernels()
        if purpose:
            parts = kernels[ops.reduced_weight](w, purpose)
            kernels[ops.zplus_linear_reduced](x, *parts, kernels[ops.reduced_weight](w, "gradient")[0], y, None, lane, lane)
        else:
            kernels[ops.zplus_linear](x, w, y, None, lane, lane, "positive")
    products = [launch for launch in seen.launches if launch.name.startswith("zplus")]
    assert {(x.arguments["DOT"].name, x.arguments["PRECISION"], bool(x.arguments.get("SPLIT"))) for x in products} == (
        expected | {(dot, precision, False) for dot, precision, _ in expected}
    )


def test_few_rows_are_multiplied_in_bfloat16_not_in_float8(seen: Recorded) -> None:
    """Rounding rows to float8 is a launch of its own, which a batch of one has not the time for; so is every Z."""
    for n, dot in ((configs.FLOAT8_ROWS - 1, "bf16"), (configs.FLOAT8_ROWS, "fp8e4nv")):
        seen.launches.clear()
        reduced(n, "float8", features=384)
        assert {x.arguments["DOT"].name for x in seen.launches if x.name.startswith("zplus")} == {dot}
        assert ("scaled_rows_kernel" in {x.name for x in seen.launches}) == (dot != "bf16")


@pytest.mark.parametrize(("capability", "features", "wanted"), [(90, 384, True), (90, 768, False), (120, 768, True)])
def test_no_weight_is_kept_in_float8_that_is_never_multiplied_in_it(capability: int, features: int, wanted: bool) -> None:
    """Of ViT-B on an H100 none is."""
    with recorded(capability), FakeTensorMode():
        parts = triton.kernels()[ops.reduced_weight](on_gpu(features, features), "float8")
    assert [x.dtype for x in parts[:2]] == [torch.float8_e4m3fn if wanted else torch.bfloat16, torch.bfloat16]


def test_float8_sums_are_promoted_to_float32(seen: Recorded) -> None:
    """Hopper adds float8 products in 14 bits until told otherwise."""
    reduced(configs.FLOAT8_ROWS, "float8", features=384)
    variants = [k for k in seen.kernels if k.kernel.fn.__name__.startswith("zplus")]
    assert len(variants) == 2
    for variant in variants:
        module = recorder.to_ttir(variant.source(), seen.get_current_target(), dict(variant.options))
        dots = [line for line in str(module).splitlines() if "tt.dot" in line and "f8E4M3" in line]
        assert dots
        # Triton's default is 2³⁰: never. What is asked for is the depth of a tile.
        assert all(1 <= int(re.findall(r"maxNumImpreciseAcc = (\d+)", line)[0]) <= 128 for line in dots)


@pytest.mark.parametrize("set_tf32", ["old", "new"])
def test_torchs_setting_for_tf32_is_read_by_either_of_its_names(seen: Recorded, set_tf32: str) -> None:
    """`torch.get_float32_matmul_precision` raises where the new name was used."""
    before = torch.backends.cuda.matmul.fp32_precision
    linear(5)
    try:
        if set_tf32 == "old":
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        linear(5)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
        torch.set_float32_matmul_precision("highest")
    assert [launch.arguments["PRECISION"] for launch in seen.launches] == ["tf32x3", "tf32x3", "tf32", "tf32"]


def test_wide_layer_norms_are_left_to_torch(seen: Recorded) -> None:
    """Registers hold a row of 8192 numbers; LayerNorm over [C, H, W] has more."""
    norm = triton.kernels()[ops.layer_norm_backward]
    for width in (layer_norm_backward.WIDEST + 1, 100_000):
        norm(on_gpu(1, 2, width), on_gpu(2, width), None, 1, 1e-5)
    assert seen.launches == []
    norm(on_gpu(1, 2, layer_norm_backward.WIDEST), on_gpu(2, layer_norm_backward.WIDEST), None, 1, 1e-5)
    assert len(seen.launches) == 1


#: GPUs that the roofline predicts for, and two for graphics, by their data sheets.
GPUS = (
    *roofline.DEVICES,
    roofline.Device("RTX 4090", "sm_89", {"float32": 82.6, "bfloat16": 165}, 1008, 5000, 128, 2.52),
    roofline.Device("RTX 5090", "sm_120", {"float32": 104.8, "bfloat16": 209, "float8": 419}, 1792, 7000, 170, 2.41),
)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
@pytest.mark.parametrize(("width", "precision"), [(2, "float32"), (4, "mixed"), (2, "mixed"), (2, "low")])
def test_layers_are_multiplied_by_what_the_bound_favours(device: roofline.Device, width: int, precision: str) -> None:
    """Torch's own products, tiles of bfloat16 or of float8: the layers of a block take at most a fifth more than the best of them."""
    if precision == "low" and "float8" not in device.tflops:
        pytest.skip(f"{device.name} does not multiply in float8 as `low` needs it")

    def seconds(layer: roofline.Layer, n: int) -> float:
        return sum(work.seconds(device) + roofline.GAP for work in roofline.linear(device, layer, n, width, precision))

    def best(layer: roofline.Layer, n: int) -> float:
        found = []
        for by_library, in_float8 in itertools.product((False, True), repeat=2):
            with (
                mock.patch.object(configs, "products_first", lambda *_, chosen=by_library: chosen),
                mock.patch.object(configs, "in_float8", lambda *_, chosen=in_float8: chosen),
            ):
                found.append(seconds(layer, n))
        return min(found)

    for features, n in itertools.product((192, 256, 384, 512, 768, 1024, 1280), (1024, 2048, 4096, 12608, 65536)):
        layers = roofline.layers(roofline.Model("", 1, features, 4 * features, features // 64, 197))
        taken, possible = (sum(f(layer, n) for layer in layers) for f in (seconds, best))
        assert taken <= 1.2 * possible, (features, n)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
@pytest.mark.parametrize("head", [72, 80, 88, 96, 104, 112, 128])
def test_wide_heads_of_float32_are_multiplied_by_what_the_bound_favours(device: roofline.Device, head: int) -> None:
    """SigLIP's 72, ViT-H's 80, ViT-g's 88, ViT-bigG's 104: where torch's own products take a tenth less than tiles of 128."""
    capability, rows = device.capability, 64 * 257
    model = roofline.Model("", 1, 16 * head, 64 * head, 16, 257)
    tiled, products = (
        sum(work.seconds(device) + roofline.GAP for work in works)
        for works in (roofline.attention_by_sweeps(device, model, 64, 4), roofline.attention_by_library(model, 64))
    )
    assert configs.heads_by_library(head, rows, capability) == (1.1 * products < tiled)


@pytest.mark.parametrize(
    ("capability", "head", "dtype", "batch", "by_library"),
    [
        (90, 72, torch.float32, 64, True),
        (80, 88, torch.float32, 64, True),
        (80, 128, torch.float32, 64, False),
        (89, 72, torch.float32, 64, False),
        (90, 64, torch.float32, 64, False),
        (90, 72, torch.bfloat16, 64, False),
        (90, 72, torch.float32, 2, False),
    ],
)
def test_wide_heads_of_float32_go_to_torchs_products(
    capability: int, head: int, dtype: torch.dtype, batch: int, by_library: bool
) -> None:
    """Of few rows, of 16 bits and where memory is slow they stay in tiles."""
    with recorded(capability=capability) as seen, FakeTensorMode():
        attention(batch, 2, 50, head, dtype, targets=2)
    assert ("attention_rows_kernel" not in {launch.name for launch in seen.launches}) == by_library
    assert seen.operators.count("aten.bmm.default") == (roofline.MAP_PRODUCTS if by_library else 0)


def test_maps_in_memory_are_read_and_written_as_the_roofline_counts(seen: Recorded) -> None:
    maps = 64 * 2 * 50 * 50
    touched = []

    class Maps(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            moves = func.namespace == "aten" and func not in recorder.NOTHING
            if moves and not any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns):
                touched.extend(x for x in (*args, result) if isinstance(x, Tensor) and x.numel() == maps)
            return result

    with Maps():
        attention(64, 2, 50, 72)
    for launch in seen.launches:
        touched += [x for x in launch.arguments.values() if isinstance(x, Tensor) and x.numel() == maps]
    assert len(touched) == roofline.MAP_PRODUCTS + roofline.MAP_PASSES


def _vit(dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """ViT-B's twelve blocks and size of heads, as wide as products in reduced precision ask for."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=256, depth=12, num_heads=4, num_classes=10).eval()
    return model.to(dtype), {"x": torch.randn(2, 3, 32, 32).to(dtype)}


#: Launches of one explanation at batch 1 when everything is compiled and kept, at most: forward pass (125) and reverse pass.
BUDGET = 250


@pytest.mark.parametrize("precision", ["float32", "mixed", "low"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_explanation_keeps_to_its_launches(precision: str, dtype: torch.dtype) -> None:
    model, given = _vit(dtype)
    with recorded(90) as seen:
        launches = Launches(seen, *lowered(model, given, DEVICE, precision=precision), DEVICE)
        launches.explain(1)
        launches.explain(1)
        assert launches.count <= BUDGET
        assert seen.kernels == []
        assert [name for name in seen.operators if "to_copy" in name] == []


def test_the_roofline_counts_what_is_launched() -> None:
    """A block of the reverse pass: its launches at batch 1, and what its passes without products move."""
    device = roofline.DEVICES[1]
    model, given = _vit(torch.float32)
    small = roofline.Model("", 12, 256, 1024, 4, 17)
    with recorded(90) as seen:
        launches = Launches(seen, *lowered(model, given, DEVICE), DEVICE)
        launches.explain(1)
        names = [launch.name for launch in seen.launches]
        first, second = [i for i, name in enumerate(names) if name == "attention_rows_kernel"][4:6]
        assert len(list(roofline.reverse(device, small, 1, 4, "float32"))) == second - first
        launches.explain(64)
        recorded_ = [launch for launch in seen.launches if launch.name == "half_block_kernel"][-1]
    moved = {id(x): x.numel() * x.element_size() for x in recorded_.arguments.values() if isinstance(x, Tensor)}
    counted = [work.bytes for work in roofline.reverse(device, small, 64, 4, "float32") if work.operator == "half block"]
    assert min(counted) == pytest.approx(sum(moved.values()), rel=0.01)


def test_the_last_blocks_lanes_lie_on_the_row_that_is_read() -> None:
    model, given = _vit(torch.float32)
    with recorded(90) as seen:
        launches = Launches(seen, *lowered(model, given, DEVICE), DEVICE)
        launches.explain(4)
        rows = [x.arguments["lanes"] for x in seen.launches if x.name == "zplus_back_kernel"]
        assert rows[:4] == [4, 4, 4, 4]  # head, second and first layer of the MLP, output projection
        assert set(rows[5:]) == {4 * 17}


def test_dots_are_named_as_triton_names_them() -> None:
    """A guard for the table above."""
    assert (tl.bfloat16.name, tl.float32.name, tl.float8e4nv.name) == ("bf16", "fp32", "fp8e4nv")


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("mixed", torch.bfloat16)])
def test_lanes_are_neither_joined_nor_added_by_launches_of_their_own(precision: str, dtype: torch.dtype) -> None:
    """q, k and v of one layer get their gradients side by side; sums of lanes are taken where a kernel reads them anyway."""
    model, given = _vit(dtype)
    with recorded(90) as seen:
        launches = Launches(seen, *lowered(model, given, DEVICE, precision=precision), DEVICE)
        launches.explain(1)
        launches.explain(1)
        names = [name.removeprefix("aten.") for name in seen.operators]
        assert names.count("cat.default") <= 2  # of the class token; and of the last block, where q is one row
        # The forward pass has 25; the row of the rollout is added up apart where it begins and where it ends.
        assert names.count("add.Tensor") <= 25 + 2


def test_without_triton_a_cpu_explanation_is_none_the_worse() -> None:
    """Whether kernels are interpreted is read from the environment: nothing of Triton's is imported for it (torch imports it where it
    is to be had)."""
    program = """
import sys
sys.modules["triton"] = None
import fastrel
from tests import models
sys.modules["fastrel.triton_kernels"] = None
explanation = fastrel.Explainer(models.build("timm_vit"))(**models.inputs("timm_vit"))
assert explanation.relevance.isfinite().all()
assert not [name for name, module in sys.modules.items() if "triton_kernels" in name and module]
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.usefixtures("cuda_passes")
def test_targets_of_a_sample_share_the_launches_of_the_cuda_passes() -> None:
    model, given = _vit(torch.float32)
    passes = []
    with recorded(90) as seen:
        launches = Launches(seen, *lowered(model, given, DEVICE, backend="cuda"), DEVICE)
        for targets in (1, 3):
            launches.explain(2, targets)
            launches.explain(2, targets)
            passes.append(Counter(name for name in seen.operators if not name.startswith("aten.")))
    assert passes[0] == passes[1]
    assert sum(passes[0].values()) > 50


def test_nothing_is_compiled_for_an_operator_that_the_backend_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking whether the CUDA passes are there runs nvcc for minutes; for `row_digest` they have no use."""
    asked = []
    passes = dataclasses.replace(backends.BACKENDS["cuda"], unavailable=lambda: asked.append(1) or "not here")
    call = Call(ops.row_digest, (), torch.float32)
    chosen, _ = backends.choose(call, [passes, backends.BACKENDS["torch"]])
    assert (chosen.name, asked) == ("torch", [])
    backends.choose(Call(ops.residual_add, ("positive",), torch.float32), [passes, backends.BACKENDS["torch"]])
    assert asked == [1]


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("cuda_passes")
def test_16_bit_values_reach_the_cuda_passes_without_casts(dtype: torch.dtype, precision: str) -> None:
    """And torch's products their operands, apart from attention's; what is made of a weight is made once."""
    model, given = _vit(dtype)
    with recorded(90) as seen:
        program, values = lowered(model, given, DEVICE, precision=precision, backend="cuda")
        launches = Launches(seen, program, values, DEVICE)
        launches.explain(2)
        launches.explain(2)
        # q, k and v are laid out head by head for torch's batched products, and widened on the way.
        assert seen.operators.count("aten._to_copy.default") == 3 * 12
    assert not [node for node in program.reverse.graph.nodes if node.target is torch.ops.aten.to.dtype]
    assert not [node for node in program.reverse.graph.nodes if node.target in (steps.gelu, torch.nn.functional.gelu)]


def _gpt2() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Its weights are [in, out], and v's a part of one."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = GPT2ForSequenceClassification(config).eval().bfloat16()
    return model, {"input_ids": torch.randint(1, 60, (2, 7))}


@pytest.mark.parametrize("build", [lambda: _vit(torch.bfloat16), _gpt2], ids=["ViT", "GPT-2"])
def test_16_bit_values_reach_the_kernels_without_casts(build: Any) -> None:
    """Computed again, cut out of a larger layer, turned round, or both: x and weight are what the model has."""
    model, given = build()
    with recorded(90) as seen:
        launches = Launches(seen, *lowered(model, given, DEVICE, moved=True), DEVICE)
        launches.explain(2)
        of_layers = [launch for launch in seen.launches if launch.name == "zplus_back_kernel"]
        assert len(of_layers) >= 8
        for launch in of_layers:
            assert {launch.arguments[name].dtype for name in ("x_ptr", "w_ptr", "w_grad_ptr")} == {torch.bfloat16}
