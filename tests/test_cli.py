"""The command line as a user runs it."""

import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from fastrel import batch, build, demo, methods
from fastrel.backends import native
from fastrel.cli import main
from fastrel.commands.outputs import Outputs
from fastrel.data import files, inputs
from fastrel.demo.score import METHODS, score
from fastrel.errors import InputError
from tests import hostile, tiny


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small timm model with seven classes."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=7).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that nobody knows are not asked for on the network, which may take long to say no."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_demo_writes_an_overlay_per_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    samples = demo.sample_paths()
    assert len(samples) >= 3
    for sample in samples:
        assert f"{tmp_path / sample.name}: " in printed
        with Image.open(tmp_path / sample.name) as picture:
            assert picture.width > 2 * picture.height


def test_one_overlay_per_image_and_target_and_raw_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in demo.sample_paths()[:3]]
    out = tmp_path / "maps"
    assert main(["explain", *files, "--target", "bag", "0", "--out", str(out), "--npz", "--batch-size", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("top classes") + printed.err.count("top classes") == 3
    for file in files:
        stem = Path(file).stem
        with np.load(out / f"{stem}.npz") as raw:
            assert raw["target"].tolist() == [8, 0]
            assert raw["relevance"].shape == (2, 65)
            assert raw["patches"].shape == (2, 8, 8)
        for target in (8, 0):
            with Image.open(out / f"{stem}-{target}.png") as picture:
                assert picture.size == (64, 64)


def test_unreadable_files_are_listed_and_the_others_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(demo.sample_paths()[0])
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(Path(good).read_bytes()[:200])
    files = [str(tmp_path / "broken.png"), good, str(tmp_path / "missing.png"), str(truncated)]
    assert main(["explain", *files, "--out", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    for name in ("broken.png", "missing.png", "truncated.png"):
        assert f"not explained: {tmp_path / name}: " in errors
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_pictures_of_the_same_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    files = []
    for folder, sample in zip(("a", "b"), demo.sample_paths(), strict=False):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "scene.png")
        files[-1].write_bytes(sample.read_bytes())
    assert main(["explain", *map(str, files), "--target", "1", "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["scene-1.png", "scene-2-1.png"]
    # Other classes of other pictures: the names would be free, and yet say that both are of one picture.
    assert main(["explain", *map(str, files), "--out", str(tmp_path / "predicted")]) == 0
    assert sorted(p.name for p in (tmp_path / "predicted").glob("*.png")) == ["scene-2-1.png", "scene-5.png"]


def test_a_timm_model_with_own_weights(weights: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 200, 3), np.uint8)).save(tmp_path / "x.jpg")
    command = ["explain", str(tmp_path / "x.jpg"), "--model", "vit_tiny_patch16_224", "--weights", str(weights)]
    assert main([*command, "--target", "6", "--start-layer", "-1", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "x-6.png") as picture:
        assert picture.size == (224, 224)


def test_text_becomes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.bert_folder(tmp_path)
    text = "a gripping, clever film"
    out = tmp_path / "map.html"
    assert main(["explain", "--text", text, "--model", str(folder), "--target", "0", "positive", "--out", str(out)]) == 0
    page = out.read_text()
    assert ">gripping</span>" in page
    assert page.index("negative") < page.index("positive")
    assert "gripping" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--out", "o"], "nothing to explain: give picture files, or --text"),
        (["explain", "x.png", "--model", "vit_nonsense", "--out", "o"], "timm knows no model 'vit_nonsense'"),
        (
            ["explain", "x.png", "--model", "vit_tiny_patch16_224", "--weights", "w.pth", "--out", "o"],
            "no weights file 'w.pth'",
        ),
        (["explain", "x.png", "--target", "unicorn", "--out", "o"], "target 'unicorn' fits 0 classes"),
        (["explain", "x.png", "--target", "s", "--out", "o"], "fits 6 classes"),
        (["explain", "x.png", "--target", "10", "--out", "o"], "target 10 is out of range: the model has 10 classes"),
        (["explain", "--text", "a", "--out", "o.html"], "--text needs --model"),
        (["explain", "--text", "a", "--model", "/nowhere", "--out", "o.png"], "must name an .html file, not 'o.png'"),
        (["explain", "--text", "a", "--model", "/nowhere", "--out", "o.html"], "cannot load '/nowhere'"),
        (["explain", "--text", " ", "--model", "/nowhere", "--out", "o.html"], "--text is empty"),
        (["explain", "x.png", "--text", "a", "--out", "o"], "give images or --text, not both"),
        (["verify", "--text", "a"], "the embedded model is a model of pictures; give --image or nothing, not --text"),
        (
            ["export", "--text", "a", "--out", "o.pt2"],
            "the embedded model is a model of pictures: --text is none of its inputs",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastrel: ")
    assert message in error
    assert error.count("\n") == 1


TEXT_FUNCTIONS = """
from torch import nn
class Tokenizer:
    def convert_ids_to_tokens(self, ids): return [str(i) for i in ids]
def alone(): return nn.Linear(2, 2)
def with_a_callable(): return nn.Linear(2, 2), lambda text: [1, 2]
def without_a_config(): return nn.Linear(2, 2), Tokenizer()
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("alone", "returned no tokenizer, so its model is taken for one of pictures"),
        ("with_a_callable", "what else it returned for their preprocessing; for texts return (model, tokenizer)"),
        ("without_a_config", "a model without a config, which would name its classes; for texts return (model, tokenizer)"),
    ],
)
def test_a_function_that_cannot_read_texts_is_told_what_to_return(
    function: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_texts.py").write_text(TEXT_FUNCTIONS)
    for more in ([], ["--text-pair", "b"], ["--generate", "2"]):
        assert main(["explain", "--text", "a", "--model", f"own_texts:{function}", *more, "--out", "o.html"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "convert_ids_to_tokens" in error
        assert error.count("\n") == 1


def test_a_text_for_a_model_of_pictures_is_a_row_with_the_reason() -> None:
    row = batch.Explain()({"item": ["x"], "text": ["a clever film"]})
    assert row["error"] == ["this is a text, and the model reads pictures"]


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="nothing to explain"):
        main(["explain", "--out", "o", "--debug"])


def test_doctor_reports_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in printed
    assert "torch         available" in printed
    for backend in ("cpp", "triton", "cuda"):
        assert f"{backend:<14}" in printed


def test_build_says_where_the_kernels_lie_or_why_there_are_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(part: object) -> Path:
        raise build.BuildError("no C++ compiler found")

    monkeypatch.setattr(build, "cache", lambda part: Path("/somewhere/_C.so"))
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "instruction_set", lambda: "avx2")
    assert main(["build"]) == 0
    assert capsys.readouterr().out == "/somewhere/_C.so (avx2)\n"
    monkeypatch.setattr(native, "load", lambda: "another torch")
    assert main(["build"]) == 2
    assert "were built but cannot be loaded: another torch" in capsys.readouterr().err
    monkeypatch.setattr(build, "cache", no_compiler)
    assert main(["build"]) == 2
    assert "could not be built: no C++ compiler found" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_scores_the_maps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scenes, cells = demo.held_out()
    monkeypatch.setattr("fastrel.demo.score.held_out", lambda: (scenes[:3], cells[:3]))
    assert main(["demo", "--score"]) == 0
    head, _, *rows, _, last = capsys.readouterr().out.splitlines()
    assert head.startswith("| method | energy in the object's cell |")
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in METHODS]
    assert last.startswith(f"{(cells[:3] >= 0).sum()} objects in 3 held-out scenes")


def test_compare_has_a_row_per_class_and_a_column_per_method(tmp_path: Path) -> None:
    sample, out = str(demo.sample_paths()[0]), tmp_path / "compare.png"
    names = ["transformer_attribution", "rollout", "attention_gradcam"]
    assert main(["compare", sample, "--methods", *names, "--target", "bag", "1", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert 1.7 < picture.width / picture.height < 2.1
    assert main(["compare", sample, "--methods", "saliency", "--out", str(out)]) == 2


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    for method in methods.METHODS.values():
        assert f"{method.name}\n" in printed
        assert method.source in printed


@pytest.mark.parametrize("command", [[], ["explain"], ["batch"], ["show"], ["demo"], ["doctor"], ["compare"], ["methods"]])
def test_help_is_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: fastrel" in capsys.readouterr().out


@pytest.mark.slow
def test_maps_of_the_shipped_model_find_their_object() -> None:
    """Class-specific maps light up the object of their class; what is blind to the class cannot."""
    model = demo.load_model()
    blind = [score(model, method) for method in ("rollout", "raw_attention")]
    for method in ("transformer_attribution", "frozen_attribution"):
        found = score(model, method)
        assert found.energy > max(0.8, 3 * max(other.energy for other in blind))
        assert found.pointing > max(0.9, 3 * max(other.pointing for other in blind))


def test_the_shipped_model_knows_what_held_out_scenes_show() -> None:
    scenes, cells = demo.held_out()
    present = torch.stack([torch.from_numpy((cells == c).any(1)) for c in range(len(demo.CLASSES))], 1)
    with torch.no_grad():
        assert ((demo.load_model()(demo.to_input(scenes)) > 0) == present).float().mean() > 0.9


# Files: never lost, never over others


def test_an_output_never_replaces_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cat.png for class 3 would be cat-3.png, which is another input."""
    monkeypatch.chdir(tmp_path)
    first, second = (path.read_bytes() for path in demo.sample_paths()[:2])
    Path("cat.png").write_bytes(first)
    Path("cat-3.png").write_bytes(second)
    assert main(["explain", "cat.png", "cat-3.png", "--target", "3", "--out", "."]) == 0
    assert Path("cat.png").read_bytes() == first
    assert Path("cat-3.png").read_bytes() == second
    assert sorted(p.name for p in Path().glob("*.png")) == ["cat-2-3.png", "cat-3-3.png", "cat-3.png", "cat.png"]


def test_runs_over_several_folders_share_an_output_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, sample in zip("ab", demo.sample_paths(), strict=False):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(sample.read_bytes())
    command = ["--target", "1", "--npz", "--out", str(tmp_path / "out")]
    assert main(["explain", str(tmp_path / "a"), *command]) == 0
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("x*")}
    assert main(["explain", str(tmp_path / "b"), *command]) == 0
    second = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("x*")}
    assert second.keys() == {"x-1.png", "x.npz", "x-2-1.png", "x-2.npz"}
    assert {name: second[name] for name in first} == first
    capsys.readouterr()
    assert main(["explain", str(tmp_path / "a"), str(tmp_path / "b"), *command]) == 0
    assert "2 of 2 were explained before" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for i, sample in enumerate(demo.sample_paths()[:3]):
        (tmp_path / "in" / f"{i}.png").write_bytes(sample.read_bytes())
    out = tmp_path / "out"
    command = ["explain", str(tmp_path / "in"), "--target", "1", "--out", str(out)]
    assert main(command) == 0
    (out / "1-1.png").unlink()  # as if it had been killed before it was written
    changed = demo.sample_paths()[0].read_bytes()
    (tmp_path / "in" / "2.png").write_bytes(changed)
    ledger = out / ".fastrel.jsonl"
    ledger.write_bytes(ledger.read_bytes() + b'{"item": "torn')
    capsys.readouterr()
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "1 of 3 were explained before" in captured.out
    assert {p.name for p in out.glob("*.png")} == {"0-1.png", "1-1.png", "2-1.png"}
    assert (out / "2-1.png").read_bytes() == (out / "0-1.png").read_bytes()
    assert main([*command, "--style", "contours"]) == 0
    assert {p.name for p in out.glob("*.png")} == {"0-1.png", "1-1.png", "2-1.png"}
    assert main(command) == 0


def test_files_that_cannot_be_written_are_failures_of_their_own_and_long_names_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    samples = dict(zip(("a", "é" * 124 + ".png", "z.png"), demo.sample_paths()[:3], strict=True))
    samples["a.png"] = samples.pop("a")
    for name, sample in samples.items():
        (tmp_path / "in" / name).write_bytes(sample.read_bytes())
    write = files.write

    def full(path: Path, content: bytes) -> None:
        if path.name == "a-1.png":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(files, "write", full)
    command = [
        "explain",
        str(tmp_path / "in"),
        "--model",
        "tests.tiny:vit",
        "--target",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 1
    assert "in/a.png: OSError: [Errno 28] No space left on device" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"z-1.png", "é" * 100 + "-1.png"}
    monkeypatch.undo()
    assert main(command) == 0
    assert "2 of 3 were explained before" in capsys.readouterr().out


def test_two_runs_do_not_write_files_to_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    refused = context.Value("b", 0)

    def other() -> None:
        try:
            Outputs(str(tmp_path), {})
        except InputError as error:
            refused.value = "another process is writing" in str(error)

    with Outputs(str(tmp_path), {}):
        process = context.Process(target=other)
        process.start()
        process.join()
    assert refused.value
    Outputs(str(tmp_path), {})


def test_texts_are_known_again_without_being_kept(tmp_path: Path) -> None:
    text, other = ("word " * 10_000 + end for end in "ab")
    with Outputs(str(tmp_path), {}) as outputs:
        item = inputs.Item("t.csv:0", inputs.Value(text))
        (path,) = outputs.claim(item, [".html"])
        path.touch()
        outputs.finish(item)
    with Outputs(str(tmp_path), {}) as outputs:
        assert outputs.done(item)
        assert not outputs.done(inputs.Item("t.csv:0", inputs.Value(other)))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2_000


def test_hostile_files_are_named_and_the_others_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good, bad = hostile.make(folder)
    files = [str(folder / name) for name in (*bad, *good[:8])]
    assert main(["explain", *files, "--target", "1", "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    errors = capsys.readouterr().err
    for name, word in bad.items():
        assert re.search(f"not explained: {re.escape(str(folder / name))}: .*{re.escape(word)}", errors), name
    assert len(list((tmp_path / "out").glob("*.png"))) == 8
    assert main(["explain", *files[: len(bad)], "--out", str(tmp_path / "none")]) == 2


def test_what_cannot_be_written_is_an_error_that_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = str(demo.sample_paths()[0])
    (tmp_path / "file").write_text("here")
    for command in (["explain", sample], ["batch", sample], ["demo"]):
        assert main([*command, "--out", str(tmp_path / "file")]) == 2
        assert f"{tmp_path / 'file'}" in capsys.readouterr().err
    assert main(["compare", sample, "--out", sample]) == 2
    assert "is the picture itself" in capsys.readouterr().err
    assert main(["compare", sample, "--out", str(tmp_path / "x.unknown")]) == 2


# Devices, names, words


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--out", "o"],
        ["explain", "x.png", "--out", "o"],
        ["batch", "x.png", "--out", "o"],
        ["compare", "x.png", "--out", "o.png"],
        ["evaluate", "--data", "mosaics", "--metric", "pointing", "--out", "o"],
        ["verify"],
    ],
)
def test_every_command_that_computes_takes_a_device(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--precision", "mixed", "--backend", "torch", "--memory", "low"]
    assert main([*command, *options, "--device", "abacus"]) == 2
    assert "device 'abacus' cannot be used here" in capsys.readouterr().err


def test_precision_backend_and_memory_reach_the_explainer(tmp_path: Path) -> None:
    sample = str(demo.sample_paths()[0])
    options = ["--precision", "mixed", "--backend", "torch", "--memory", "low", "--device", "cpu", "--dtype", "bfloat16"]
    assert main(["explain", sample, *options, "--target", "1", "--npz", "--out", str(tmp_path / "a")]) == 0
    assert main(["explain", sample, "--target", "1", "--npz", "--out", str(tmp_path / "b")]) == 0
    low, exact = (np.load(next((tmp_path / name).glob("*.npz")))["patches"] for name in "ab")
    assert 1e-4 < np.abs(low - exact).max() / exact.max() < 0.2


def test_class_names_with_dollars_are_drawn(tmp_path: Path) -> None:
    from fastrel.render import side_by_side

    picture = Image.new("RGB", (32, 32))
    assert side_by_side(picture, [np.zeros((32, 32))], ["$x_{ $ costs $5"]).width > 64


def test_words_of_byte_level_tokens_are_shown_as_they_were_written() -> None:
    from fastrel.render import words

    tokens = ["so", "Ġbad", "Ã©", "Ġfilm", "Ċ", "âĤ¬"]
    found = words(tokens, np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert found == [("so", 1.0), ("badé", 3.0), ("film", 4.0), ("€", 6.0)]
    assert words(["caf", "##Ã©"], np.array([1.0, 2.0])) == [("cafÃ©", 2.0)]  # WordPiece means what it says


def test_a_language_model_says_which_words_made_the_next_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "gpt"
    model.mkdir()
    tiny.gpt_folder(model)
    out = tmp_path / "map.html"
    assert main(["explain", "--text", "bad café", "--model", str(model), "--target", "bad", "--out", str(out)]) == 0
    assert ">café</span>" in out.read_text()
    assert "bad (" in out.read_text()


def test_an_encoder_decoder_answers_and_says_which_words_made_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t5").mkdir()
    model, out = str(tiny.t5_folder(tmp_path / "t5")), tmp_path / "map.html"
    command = ["explain", "--text", "a clever film", "--model", model, "--out", str(out)]
    assert main([*command, "--target", "bad"]) == 0  # the first token
    assert ">clever</span>" in out.read_text()
    assert main([*command, "--continuation", " bad film", "--npz"]) == 0
    assert "'a clever film' is answered with ' bad film'" in capsys.readouterr().out
    page = out.read_text()
    assert page.count("<h2>→ ") == page.count("<h3>decoder_input_ids: ") > 1
    held = np.load(out.with_suffix(".npz"))
    count = len(held["target"])
    assert held["relevance"].shape[0] == count
    assert held["decoder_input_ids"].shape == (count, count)
    assert main([*command, "--generate", "2"]) == 0
    assert out.read_text().count("<h2>→ ") == 2


def test_every_token_that_a_language_model_goes_on_with_has_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    model = str(tiny.gpt_folder(folder("gpt")))
    out = tmp_path / "out.html"
    command = ["explain", "--text", "a clever film", "--model", model, "--out", str(out)]
    assert main([*command, "--generate", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("'a clever film' goes on with ")
    assert out.read_text().count("<h2>→ ") == 2
    assert main([*command, "--continuation", " bad"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    after = tokenizer(" bad")["input_ids"]
    assert out.read_text().count("<h2>→ ") == len(after)
    for wrong, message in (
        (["--generate", "2", "--continuation", " bad"], "not both"),
        (["--generate", "2", "--target", "bad"], "--target names the next token"),
        (["--generate", "200"], "and the model reads 24"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
    bert = str(tiny.bert_folder(folder("bert")))
    assert main(["explain", "--text", "a film", "--model", bert, "--out", str(out), "--generate", "1"]) == 2
    assert "are for language models" in capsys.readouterr().err
    assert main(["explain", str(tmp_path), "--model", bert, "--out", str(out), "--generate", "1"]) == 2
    assert "--generate and --continuation go with --text" in capsys.readouterr().err


def test_pages_for_the_texts_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    model = tiny.bert_folder(tmp_path / "bert")
    (tmp_path / "t.csv").write_text('text\na clever film\n""\n' + '"a gripping, clever film"\n')
    command = ["explain", str(tmp_path / "t.csv"), "--column", "text", "--model", str(model), "--npz"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert sorted(p.name for p in (tmp_path / "out").glob("*.*") if not p.name.startswith(".")) == [
        "t-2.html",
        "t-2.npz",
        "t.html",
        "t.npz",
    ]
    assert ">gripping</span>" in (tmp_path / "out" / "t-2.html").read_text()
