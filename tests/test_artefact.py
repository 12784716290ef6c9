"""`fastrel.export` and `fastrel.load`: the explanation as a file gives what the explainer gives."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrel
from fastrel import methods
from fastrel.artefact import compiled, metadata
from fastrel.artefact.lengths import longest
from fastrel.artefact.metadata import RANK
from fastrel.cli import main
from fastrel.errors import InputError, UnsupportedModelError
from fastrel.models import load as load_model
from fastrel.rules.pointwise import SLOPES
from tests import tiny
from tests.small import ids, made
from tests.tiny import bert_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return tiny.vit()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def path(vit_artefact: Path) -> Path:
    return vit_artefact


@pytest.fixture(scope="module")
def artefact(path: Path) -> fastrel.Artefact:
    return fastrel.load(path)


#: Methods that are no graphs of operators.
NO_GRAPHS = ("attention_flow", "legrad", "attention_guided_cam", "attcat", "alti", "integrated_gradients")


def smallest() -> nn.Module:
    """The smallest model there is, for exporting and compiling take long."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=4).eval()


def same(found: fastrel.Explanation, expected: fastrel.Explanation) -> None:
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.target, expected.target)
    for name, one in expected.maps.items():
        assert torch.equal(found.maps[name].relevance, one.relevance)
        assert (found.maps[name].grid is None) == (one.grid is None)
        assert one.grid is None or torch.equal(found.maps[name].grid, one.grid)


@pytest.mark.parametrize("op", SLOPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_slopes_of_activations_are_those_of_autograd_to_the_bit(op: Any, dtype: torch.dtype) -> None:
    x = torch.cat(
        [torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3, torch.tensor([0.0, -0.0, 3.0, -3.0, 60.0])]
    )
    x = x.to(dtype).requires_grad_()
    (expected,) = torch.autograd.grad(op(x).sum(), x)
    assert torch.equal(SLOPES[op](x.detach()), expected)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("targets", [None, 1, 3])
def test_it_is_the_explainer_to_the_bit_for_any_batch_and_number_of_targets(
    vit: nn.Module, artefact: fastrel.Artefact, batch: int, targets: int | None
) -> None:
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    target = None if targets is None else torch.arange(batch * targets).reshape(batch, targets) % 7
    found = artefact(x, target=target)
    same(found, fastrel.Explainer(vit, backend="torch")(x, target=target))
    assert found.ok is not None
    assert found.ok.all()
    assert found[0].heatmap().shape[-2:] == (32, 32)


def test_ranks_stand_for_the_highest_classes(artefact: fastrel.Artefact, images: Tensor) -> None:
    found = artefact(images, target=[[RANK, RANK + 2]] * 3)
    assert torch.equal(found.target, found.logits.argsort(1, descending=True)[:, [0, 2]])


def test_a_bad_sample_or_class_is_marked_and_changes_no_mate(artefact: fastrel.Artefact, images: Tensor) -> None:
    classes = torch.tensor([[1, 2], [3, 4], [5, 6]])
    clean = artefact(images, target=classes)
    bad, wrong = images.clone(), classes.clone()
    bad[1, 0, 3, 3] = torch.nan
    wrong[2, 1] = 7
    found = artefact(bad, target=wrong)
    assert found.ok.tolist() == [[True, True], [False, False], [True, False]]
    assert torch.equal(found.relevance[0], clean.relevance[0])
    assert torch.equal(found.relevance[2, 0], clean.relevance[2, 0])
    assert found.relevance[1].isnan().all()
    assert found.relevance[2, 1].isnan().all()
    assert found.patches[2, 1].isnan().all()
    assert not found.patches[0].isnan().any()
    assert artefact(images, target=-1).ok.tolist() == [False] * 3


def test_predict_gives_the_logits_without_a_reverse_pass(
    artefact: fastrel.Artefact, images: Tensor, vit: nn.Module
) -> None:
    with torch.no_grad():
        torch.testing.assert_close(artefact.predict(images), vit(images))
    assert torch.equal(artefact.predict(images), artefact(images).logits)


def test_inputs_that_do_not_fit_are_refused_with_what_fits(artefact: fastrel.Artefact, images: Tensor) -> None:
    for wrong, said in (
        (images[..., :24], r"\(3, 3, 32, 24\).*'any', 3, 32, 32"),
        (images.double(), "float64"),
        (images[:0], r"\(0, 3"),
    ):
        with pytest.raises(InputError, match=said):
            artefact(wrong)
    with pytest.raises(InputError, match=r"reads x, all of them as it was exported; .* x missing"):
        artefact(pixels=images)
    for target, said in (([1, 2], r"\(2,\)"), (0.5, "float"), ("cat", "'cat'")):
        with pytest.raises(InputError, match=said):
            artefact(images, target=target)


def test_it_says_what_it_is(path: Path, vit: nn.Module) -> None:
    about = metadata.read(path)
    assert about.inputs == (metadata.Input("x", "float32", (None, 3, 32, 32), names=("n0", "", "", "")),)
    assert about.options == {
        "method": "frozen_attribution",
        "rules": "positive",
        "start_layer": 0,
        "normalize": False,
        "precision": "float32",
    }
    assert (about.classes, about.class_names) == (7, tuple("0123456"))
    assert about.reader["preprocessing"]["resize"] == [32, 32]
    assert about.versions == {"fastrel": fastrel.__version__, "torch": torch.__version__}
    assert len(about.weights) == 64
    changed = metadata.Metadata.from_json(about.to_json())
    assert changed.to_json() == about.to_json()
    with pytest.raises(InputError, match="format 2"):
        metadata.Metadata.from_json(about.to_json().replace('"format": 1', '"format": 2'))


@pytest.mark.slow
def test_a_fresh_process_needs_neither_timm_nor_transformers_nor_the_model(
    path: Path, images: Tensor, vit: nn.Module
) -> None:
    torch.save(images, path.parent / "images.pt")
    code = """
        import sys
        class Refuse:
            def find_spec(self, name, *rest):
                if name.partition(".")[0] in ("timm", "transformers", "torchvision", "tests"):
                    raise ImportError(name)
        sys.meta_path.insert(0, Refuse())
        import torch, fastrel
        found = fastrel.load(sys.argv[1])(torch.load(sys.argv[2]))
        torch.save(found.relevance, sys.argv[3])
    """
    out = path.parent / "relevance.pt"
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(path), str(path.parent / "images.pt"), str(out)]
    subprocess.run(arguments, check=True, cwd=ROOT)
    assert torch.equal(torch.load(out), fastrel.Explainer(vit, backend="torch")(images).relevance)


def test_reading_metadata_and_pictures_needs_no_torch(path: Path) -> None:
    code = """
        import sys
        from fastrel.artefact import metadata, reading
        from PIL import Image
        (x,) = reading.reader(sys.argv[1], metadata.read(sys.argv[1]))(Image.new("RGB", (40, 50)))
        assert x.shape == (3, 32, 32)
        assert "torch" not in sys.modules, [name for name in sys.modules if name.startswith("fastrel")]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=True, cwd=ROOT)


def test_what_is_no_artefact_or_damaged_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no artefact"):
        fastrel.load(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(InputError, match="no artefact of fastrel, or damaged"):
        fastrel.load(tmp_path / "text.pt2")
    (tmp_path / "cut.pt2").write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="no artefact of fastrel"):
        fastrel.load(tmp_path / "cut.pt2")
    with pytest.raises(InputError, match=r"no compiled form.*there is no"):
        fastrel.load(path, compiled=True)


def test_the_self_test_refuses_a_program_that_computes_something_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.export.load

    def other(given: Any) -> Any:
        exported = real(given)
        exported.state_dict["parameter5"].add_(0.01)
        return exported

    monkeypatch.setattr(torch.export, "load", other)
    with pytest.raises(InputError, match="the self-test"):
        fastrel.load(path)


def test_code_compiled_for_another_machine_is_told() -> None:
    here = compiled.machine()
    assert compiled.unfit(here) is None
    assert "compiled for torch 1.0" in (compiled.unfit({**here, "torch": "1.0"}) or "")
    assert "avx9000" in (compiled.unfit({**here, "extensions": [*here["extensions"], "avx9000"]}) or "")


@pytest.mark.parametrize("method", NO_GRAPHS)
def test_methods_that_are_no_graphs_are_refused_by_name(
    vit: nn.Module, images: Tensor, tmp_path: Path, method: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=method):
        fastrel.export(fastrel.Explainer(vit, method), images, path=tmp_path / "a.pt2")
    with pytest.raises(InputError, match=r"must end in .pt2"):
        fastrel.export(fastrel.Explainer(vit), images, path=tmp_path / "a.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in methods.METHODS if name not in NO_GRAPHS])
def test_all_other_methods(tmp_path: Path, method: str) -> None:
    options = {"lrp_pixels": {"rules": "official"}, "rollout": {"precision": "mixed"}}.get(method, {})
    explainer = fastrel.Explainer(smallest(), method, backend="torch", **options)
    images = torch.randn(3, 3, 16, 16)
    artefact = fastrel.load(fastrel.export(explainer, images, path=tmp_path / "a.pt2"))
    same(artefact(images, target=3), explainer(images, target=3))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32, num_labels=4, pad_token_id=0)
    return GPT2ForSequenceClassification(config)


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=4, **options)


#: Architectures, as small as their code allows; at their real sizes and compiled: python -m benchmarks.artefacts.
KINDS = {
    "DeiT": lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1),
    "Swin": lambda: timm_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,)),
    "DINOv2": lambda: timm_model("vit_small_patch14_reg4_dinov2", img_size=28, depth=1, embed_dim=32, num_heads=2),
    "CLIP": lambda: timm_model("vit_base_patch16_clip_quickgelu_224", img_size=32, depth=1, embed_dim=32, num_heads=2),
    "GPT-2": gpt2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_other_architectures(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = KINDS[name]().eval()
    torch.nn.init.normal_([x for x in model.parameters() if x.dim() == 2][-1])  # some heads begin as zeros

    def given(batch: int) -> Tensor:
        size = 28 if name == "DINOv2" else 32
        return ids(batch, 5 + batch) if name == "GPT-2" else torch.randn(batch, 3, size, size)

    explainer = fastrel.Explainer(model, backend="torch")
    artefact = fastrel.load(fastrel.export(explainer, given(3), path=tmp_path / "a.pt2", targets=2))
    x, target = given(2), torch.tensor([[3, 0], [1, 1]])
    found = artefact(x, target=target)
    same(found, explainer(x, target=target))
    assert found.ok.all()
    assert found.relevance.abs().amax(-1).min() > 0
    if name == "GPT-2":
        x[0, 1] = 50  # a token that the vocabulary does not have, seen through a view
        assert artefact(x, target=target).ok.tolist() == [[False] * 2, [True] * 2]
        with pytest.raises(InputError, match=r"\(2, 33\).*up to 32"):  # compiled code would read past the end of the table
            artefact(ids(2, 33))
        assert artefact(ids(2, 32)).ok.all()


#: Models of 24 positions, and how long their texts may be.
LENGTHS = {"Bert": 24, "Roberta": 22, "DistilBert": 24, "GPT2": 24, "Llama": None, "T5": None}


@pytest.mark.slow
@pytest.mark.parametrize("name", LENGTHS)
def test_how_long_texts_may_be(name: str) -> None:
    """BERT's kinds of tokens, which are not given, have a table of two rows; RoBERTa's positions begin at two; T5's are distances."""
    import transformers

    sizes = {
        **dict.fromkeys(("hidden_size", "intermediate_size", "n_embd", "dim", "d_model", "d_ff", "vocab_size"), 64),
        **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), 2),
        **dict.fromkeys(("max_position_embeddings", "n_positions"), 24),
        "d_kv": 32,
    }
    kind = getattr(transformers, f"{name}Config")
    config = kind(**{key: value for key, value in sizes.items() if key in kind().to_dict()})
    config.pad_token_id = 1
    suffix = "EncoderModel" if name == "T5" else "ForSequenceClassification"
    model = getattr(transformers, name + suffix)(config).eval()
    call = fastrel.Explainer(model)._engine.enter((), {"input_ids": ids(2, 6) + 1})
    assert longest(call) == LENGTHS[name]


@pytest.mark.slow
def test_a_text_model_with_its_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from fastrel.artefact import reading

    loaded = load_model(str(bert_folder(tmp_path)))
    explainer = fastrel.Explainer(loaded.model, start_layer=-1, normalize_rollout=True, backend="torch")
    example = loaded.inputs(loaded.reader("a gripping , clever film"))
    path = fastrel.export(explainer, **example, path=tmp_path / "bert.pt2", loaded=loaded)
    artefact = fastrel.load(path)
    read = reading.reader(path, artefact.metadata)
    texts = ["a clever film", "gripping"]
    samples = [read(text) for text in texts]
    expected = AutoTokenizer.from_pretrained(tmp_path)(texts, padding=True, return_tensors="pt")
    batch = {x.name: torch.from_numpy(a) for x, a in zip(artefact.metadata.inputs, reading.collate(samples, artefact.metadata), strict=True)}  # fmt: skip # noqa: E501
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    same(artefact(**batch), explainer(**batch))
    assert read.tokens(samples[1][0]) == ["[CLS]", "grip", "##ping", "[SEP]"]
    with pytest.raises(InputError, match="34 tokens, the model reads 32"):
        read("a " * 32)
    wrong = {**batch, "input_ids": batch["input_ids"].clone()}
    wrong["input_ids"][0, 1] = 11  # a token that the vocabulary does not have
    assert artefact(**wrong).ok.tolist() == [False, True]
    with pytest.raises(InputError, match=r"has 4 where input_ids has \d: they go together"):
        artefact(**{**batch, "attention_mask": batch["attention_mask"][:, :4]})
    with pytest.raises(InputError, match="up to 32"):
        artefact(**{name: x.repeat(1, 10) for name, x in batch.items()})


@pytest.mark.slow
def test_two_inputs_and_float64(tmp_path: Path) -> None:
    model = made(lambda m, a, b: m.head(m.encoder.blocks[0](m.encoder.embed(a))[:, 0] + m.numbers(b)))
    explainer = fastrel.Explainer(model, backend="torch")
    numbers = torch.randn(3, 4, dtype=torch.float64)
    artefact = fastrel.load(fastrel.export(explainer, ids(3, 7), numbers, path=tmp_path / "two.pt2"))
    same(artefact(ids(2, 4), numbers[:2]), explainer(ids(2, 4), numbers[:2]))
    assert list(artefact(ids(3, 7), numbers).maps) == ["first", "second"]


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo.pt2"
    assert main(["export", "--out", str(out), "--no-compile", "--targets", "2"]) == 0
    said = capsys.readouterr().out
    assert str(out) in said
    artefact = fastrel.load(out)
    assert artefact.metadata.class_names == load_model().class_names
    for arguments in (["--out", str(tmp_path / "demo.txt")], ["--out", str(out), "--format", "onnx"]):
        assert main(["export", *arguments]) == 2
        assert "must end in" in capsys.readouterr().err
    assert fastrel.load(out).metadata == artefact.metadata


@pytest.fixture(scope="module")
def compiled_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "tiny.pt2"
    return fastrel.export(fastrel.Explainer(smallest()), torch.randn(3, 3, 16, 16), path=path, targets=2, compile=True)


@pytest.mark.slow
def test_the_compiled_form_gives_the_same(compiled_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = fastrel.load(compiled_path, compiled=True), fastrel.load(compiled_path, compiled=False)
    assert (fast.compiled, plain.compiled) == (True, False)
    assert fastrel.load(compiled_path).compiled
    for batch in (1, 4):
        x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        classes = torch.arange(batch * 3).reshape(batch, 3) % 4
        torch.testing.assert_close(
            fast(x, target=classes).relevance, plain(x, target=classes).relevance, rtol=1e-5, atol=1e-7
        )
    x[1], classes[2, 0], classes[3, 1] = torch.nan, 4, -1
    ok = [[True] * 3, [False] * 3, [False, True, True], [True, False, True]]
    assert fast(x, target=classes).ok.tolist() == plain(x, target=classes).ok.tolist() == ok
    with pytest.raises(InputError, match="does not fit"):  # compiled code itself would read past the end
        fast(torch.randn(1, 3, 8, 16))
    with monkeypatch.context() as patch:
        patch.setattr(torch._inductor, "aoti_load_package", lambda path: 1 / 0)
        assert "division" in fastrel.load(compiled_path).reason
    monkeypatch.setattr(compiled, "unfit", lambda needs: "it was compiled for something else")
    fallen = fastrel.load(compiled_path)
    assert (fallen.compiled, fallen.reason) == (False, "it was compiled for something else")
    with pytest.raises(InputError, match="something else"):
        fastrel.load(compiled_path, compiled=True)


@pytest.mark.slow
def test_libtorch_alone_runs_the_compiled_form(compiled_path: Path, tmp_path: Path) -> None:
    folder = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    standard = re.search(r"CXX_STANDARD (\d+)", (ROOT / "examples" / "cpp" / "CMakeLists.txt").read_text())
    assert standard
    flags = [
        f"-std=c++{standard[1]}",
        "-O0",
        abi,
        *(f"-I{folder / 'include' / part}" for part in ("", "torch/csrc/api/include")),
    ]
    libraries = [
        f"-L{folder / 'lib'}",
        f"-Wl,-rpath,{folder / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    source, program = ROOT / "examples" / "cpp" / "explain.cpp", tmp_path / "explain"
    subprocess.run(["g++", *flags, str(source), "-o", str(program), *libraries], check=True)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    words = [str(program), str(compiled.beside(compiled_path)), "2", "3", "16", "16", "--", "3", "4"]
    said = subprocess.run(words, input=x.numpy().tobytes(), capture_output=True, check=True).stdout.decode()
    rows = [line.split() for line in said.splitlines()]
    assert [(row[0], row[1]) for row in rows] == [("3", "1"), ("4", "0")] * 2
    found = np.array([row[3:] for row in rows[::2]], np.float32)
    expected = fastrel.load(compiled_path, compiled=False)(x, target=3)
    np.testing.assert_allclose(found, expected.relevance.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([float(row[2]) for row in rows[::2]], expected.logits[:, 3].numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_onnx_gives_the_same_and_checks_the_same(path: Path, artefact: fastrel.Artefact, tmp_path: Path) -> None:
    import onnxruntime

    from fastrel.artefact import onnx

    session = onnxruntime.InferenceSession(str(onnx.write(path, tmp_path / "vit.onnx")))
    assert [x.name for x in session.get_inputs()] == ["classes", "x"]
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x[1] = torch.nan
    classes = torch.tensor([[0, RANK, 2], [1, 2, 3], [7, 6, 5], [RANK + 1, -1, 3]])
    expected = artefact(x, target=classes)
    _, explained, ok, relevance, patches = session.run(None, {"classes": classes.numpy(), "x": x.numpy()})
    np.testing.assert_array_equal(ok, expected.ok.numpy())
    np.testing.assert_array_equal(explained[0], expected.target[0].numpy())
    np.testing.assert_allclose(relevance, expected.relevance.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(patches, expected.patches.numpy(), rtol=1e-4, atol=1e-6)
    assert metadata.Metadata.from_json(session.get_modelmeta().custom_metadata_map["fastrel"]) == artefact.metadata
