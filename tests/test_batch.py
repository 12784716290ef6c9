"""Whole data sets: nothing lost, nothing done twice, each failure named and the rest explained."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import fastrel
from fastrel import batch, demo
from fastrel.batch import decoding, local, table
from fastrel.batch.explain import Explain
from fastrel.batch.row import Row
from fastrel.batch.settings import Settings
from fastrel.batch.store import Store, parts
from fastrel.cli import main
from fastrel.data import ahead, inputs
from fastrel.errors import InputError, UnsupportedModelError
from tests import hostile, tiny

pa = pytest.importorskip("pyarrow")
VIT = ["--model", "tests.tiny:vit"]


def found(folder: Path) -> list[inputs.Item]:
    return inputs.find([str(folder)], "image").items


def rows(folder: Path) -> Any:
    """Every row with its error, in order."""
    return pa.concat_tables([pa.parquet.read_table(path) for path in parts(folder)])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Forked processes cannot use the threads that their parent had."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_local(
    explain: Explain, items: list[inputs.Item], out: Path, workers: int = 0, part: int = 8, pause: float = 0
) -> None:
    schema = table.schema(explain.shape(), {})
    with Store(str(out), explain.settings.describe(explain.loaded)) as store:
        tasks = store.tasks(items, retry=False, size=part)
        local.run(explain, tasks, store, schema, workers, lambda done, failed: time.sleep(pause))


# Explain: the callable


def test_explain_gives_the_maps_of_the_explainer(tmp_path: Path) -> None:
    folder = tiny.pictures(tmp_path / "p", 3)
    explain = Explain("tests.tiny:vit", target=("top2",), batch_size=2)
    made = explain({"item": [str(p) for p in sorted(folder.iterdir())]})
    model = tiny.vit()
    x = torch.from_numpy(np.stack([explain.loaded.reader(Image.open(p))[0]["x"] for p in sorted(folder.iterdir())]))
    with torch.no_grad():
        top = model(x).topk(2)
    expected = fastrel.Explainer(model)(x, target=top.indices)
    assert made["map"].shape == (6, 4, 4)
    assert np.allclose(made["map"].reshape(3, 2, 4, 4), expected.patches.numpy(), atol=1e-6)
    assert made["target"].tolist() == top.indices.flatten().tolist()
    assert np.allclose(made["logit"], top.values.flatten().numpy(), atol=1e-5)
    assert np.allclose(made["probability"], expected.logits.softmax(1).gather(1, top.indices).flatten(), atol=1e-6)
    assert all(len(digest) == 64 for digest in made["sha256"])


def test_explain_takes_bytes_pictures_arrays_and_names_what_fails() -> None:
    image = hostile.rgb()
    explain = pickle.loads(pickle.dumps(Explain("tests.tiny:vit", target=3)))
    given = [hostile.encoded(image, "PNG"), image, np.asarray(image), b"rubbish", np.zeros(3), hostile.bad()["bomb.png"][0]]
    made = explain({"image": given})
    assert made["item"] == list("012345")
    assert [error is None for error in made["error"]] == [True, True, True, False, False, False]
    assert np.allclose(made["map"][1:3], made["map"][0], atol=1e-6)
    assert np.isnan(made["map"][3:]).all()
    assert "more pixels than the" in made["error"][5]
    assert explain({"image": []})["item"] == []


def test_a_picture_gives_the_map_of_its_bytes_whatever_its_mode() -> None:
    explain = Explain("tests.tiny:vit", target=3)
    grey, alpha = np.asarray(hostile.rgb().convert("L")), np.full((48, 64), 90, np.uint8)
    turned = hostile.rgb()
    turned.getexif()[0x0112] = 6
    given = [
        Image.merge("RGBA", (*hostile.rgb().resize((64, 48)).split(), Image.fromarray(alpha))),
        Image.fromarray(grey.astype(np.uint16) * 200),
        turned,
    ]
    encoded = [hostile.encoded(image, "PNG", exif=image.getexif()) for image in given]
    from_bytes, from_pictures = explain({"image": encoded}), explain({"image": given})
    assert from_pictures["error"] == [None] * 3
    assert from_pictures["notes"] == from_bytes["notes"]
    assert all(from_bytes["notes"])
    assert np.array_equal(from_pictures["map"], from_bytes["map"])


def test_items_of_one_name_keep_their_own_maps() -> None:
    first, second = hostile.rgb(), hostile.rgb().rotate(90)
    explain = Explain("tests.tiny:vit", target=3)
    apart, together = explain({"image": [first, second]}), explain({"item": ["x", "x"], "image": [first, second]})
    assert not np.allclose(apart["map"][0], apart["map"][1])
    assert np.array_equal(together["map"], apart["map"])


def test_an_item_without_a_sample_is_a_failure_of_its_own() -> None:
    explain = Explain("tests.tiny:vit", target=1)
    good = {"x": np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)}
    made = explain.rows([decoding.Decoded("none", samples=[]), decoding.Decoded("good", samples=[good])])
    assert [(row.item, row.error) for row in made] == [("none", "the model's reader makes no sample of it"), ("good", None)]


@pytest.mark.parametrize("target", [[3, 4], (3, "4"), np.array([3, 4])])
def test_targets_may_be_class_numbers(target: Any) -> None:
    made = Explain("tests.tiny:vit", target=target)({"image": [hostile.rgb()]})
    assert (made["error"], made["target"].tolist()) == ([None, None], [3, 4])


@pytest.mark.parametrize("batch", [{"x": ["a.png"]}, {}, ["a.png"], {"item": "a.png"}, {"item": ["a"], "image": []}])
def test_a_batch_without_items_is_refused_not_empty(batch: Any) -> None:
    """A data set whose column has another name would be lost without a word."""
    with pytest.raises(InputError, match="item"):
        Explain("tests.tiny:vit")(batch)


def test_explain_never_raises_not_even_for_a_model_that_is_not_there() -> None:
    made = Explain("no.module:f")({"item": ["a.jpg", "b.jpg"]})
    assert made["item"] == ["a.jpg", "b.jpg"]
    assert all("ModuleNotFoundError" in error for error in made["error"])
    with pytest.raises(InputError, match="unknown options colour"):
        Explain("tests.tiny:vit", colour=3)


def test_one_sample_that_breaks_a_batch_does_not_break_the_others(tmp_path: Path) -> None:
    explain = Explain("tests.tiny:vit", target=1)
    good = {"x": np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)}
    bad = {"x": np.full((3, 32, 32), np.nan, np.float32)}
    items = [decoding.Decoded(str(i), samples=[bad if i == 1 else good]) for i in range(3)]
    first, second, third = explain.rows(items)
    assert "NaN" in str(second.error)
    assert np.allclose(first.map, third.map)  # type: ignore[arg-type]
    assert first.error is None


@pytest.mark.parametrize("target", [("top0",), ("top3", "1"), ("99",), ("unicorn",)])
def test_targets_that_do_not_fit_are_refused(target: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"top|99|unicorn"):
        Explain("tests.tiny:vit", target=target).shape()


def test_a_model_that_cannot_be_explained_ends_the_run_at_once(tmp_path: Path) -> None:
    folder = tiny.pictures(tmp_path / "p", 2)
    command = [
        "batch",
        str(folder),
        "--model",
        "tests.test_batch:convolutions",
        "--out",
        str(tmp_path / "o"),
        "--workers",
        "0",
    ]
    assert main(command) == 2
    assert not parts(tmp_path / "o")
    with pytest.raises(UnsupportedModelError):
        Explain("tests.test_batch:convolutions").shape()


def convolutions() -> Any:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return model, tiny.Deadly()


# The command


def test_sixty_hostile_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is right or a failure of its own with the reason; the same run again changes nothing and says the same."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    good, bad = hostile.make(folder)
    assert len(good) + len(bad) >= 60
    (folder / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    bad.pop("drawing.eps")  # by its name no picture: ignored in folders
    command = ["batch", str(folder), *VIT, "--target", "2", "--out", str(out), "--part", "16", "--workers", "1"]
    assert main(command) == 1
    assert "2 files of other kinds ignored" in capsys.readouterr().err
    results = batch.read(out)
    assert {Path(name).name for name in results.numpy(["item"])["item"]} == {name.encode().decode() for name in good}
    assert {Path(name).name for name in results.failures} == set(bad)
    for name, reason in results.failures.items():
        assert bad[Path(name).name] in reason
    maps = dict(zip([Path(n).name for n in results.numpy()["item"]], results.numpy()["map"], strict=True))
    for name in ("exif6.png", "animated.png", "grey16.png", "int32.tif", "float01.tif", "palette.png", "plain.webp"):
        assert np.allclose(maps[name], maps["plain.png"], atol=1e-3 * maps["plain.png"].max()), name
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(command) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_output_is_parquet_with_tensors_and_says_what_made_it(tmp_path: Path) -> None:
    folder, out = tiny.pictures(tmp_path / "p", 5), tmp_path / "out"
    assert main(["batch", str(folder), *VIT, "--target", "top2", "--out", str(out), "--workers", "0"]) == 0
    (part,) = parts(out)
    schema = pa.parquet.read_schema(part)
    assert schema.field("map").type == pa.fixed_shape_tensor(pa.float32(), (4, 4))
    made_from = json.loads(schema.metadata[b"fastrel"])
    assert made_from["sha256"] == Settings("tests.tiny:vit").load().fingerprint()
    assert {"method", "rules", "target", "reader", "fastrel", "torch"} <= made_from.keys()
    results = batch.read(out)
    assert len(results) == 10
    numbers, tensors, frame = results.numpy(), results.torch(["map", "target"]), results.pandas()
    assert numbers["map"].shape == tuple(tensors["map"].shape) == (10, 4, 4)
    assert numbers["target"].tolist() == tensors["target"].tolist() == frame["target"].tolist()
    assert frame["map"][3].shape == (4, 4)
    with pytest.raises(InputError, match="no folder of results"):
        batch.read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpus", "2"], "--cpus: of a Ray cluster; add --ray"),
        (["--gpus", "1", "--actors", "1"], "--actors --gpus: of a Ray cluster; add --ray"),
        (["--address", "auto"], "--address: of a Ray cluster; add --ray"),
        (["--ray", "--workers", "4"], "--workers 4: on Ray, actors read what they explain"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*given: Any, **options: Any) -> None:
        raise InputError("too late")

    monkeypatch.setattr("fastrel.commands.batch.Explain", loaded)
    assert main(["batch", str(tmp_path), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_other_settings_are_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tiny.pictures(tmp_path / "p", 2), str(tmp_path / "out")
    command = ["batch", str(folder), *VIT, "--out", out, "--workers", "0"]
    assert main(command) == 0
    assert main([*command, "--method", "rollout"]) == 2
    assert "holds results made with {'method': 'frozen_attribution'}, not {'method': 'rollout'}" in capsys.readouterr().err
    assert main([*command, "--batch-size", "1"]) == 0


def test_new_items_are_added_and_errors_tried_again_on_request(tmp_path: Path) -> None:
    folder, out = tiny.pictures(tmp_path / "p", 6), tmp_path / "out"
    command = ["batch", str(folder), *VIT, "--out", str(out), "--workers", "0", "--part", "4"]
    whole = (folder / "00002.png").read_bytes()
    (folder / "00002.png").write_bytes(b"broken")
    assert main(command) == 1
    tiny.pictures(tmp_path / "more", 8)
    for name in ("00006.png", "00007.png"):
        (tmp_path / "more" / name).rename(folder / name)
    (folder / "00002.png").write_bytes(whole)
    assert main(command) == 1
    assert rows(out).num_rows == 8
    assert main([*command, "--retry-errors"]) == 0
    names = [Path(name).name for name in rows(out).column("item").to_pylist()]
    assert names == [f"{i:05d}.png" for i in range(8)]
    assert rows(out).column("error").null_count == 8
    fresh = tmp_path / "fresh"
    assert main(["batch", str(folder), *VIT, "--out", str(fresh), "--workers", "0"]) == 0
    assert np.allclose(batch.read(fresh).numpy()["map"], batch.read(out).numpy()["map"], atol=1e-6)


def test_shards_share_the_items_and_a_folder(tmp_path: Path) -> None:
    folder, out = tiny.pictures(tmp_path / "p", 7), tmp_path / "out"
    for i in range(3):
        assert main(["batch", str(folder), *VIT, "--out", str(out), "--workers", "0", "--shard", f"{i}/3"]) == 0
    assert sorted(rows(out).column("item").to_pylist()) == sorted(str(p) for p in folder.iterdir())
    assert len(parts(out)) == 3
    for wrong in ("3/3", "x"):
        with pytest.raises(SystemExit):
            main(["batch", str(folder), *VIT, "--out", str(out), "--shard", wrong])


def test_texts_from_a_table_with_tokens_and_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "bert"
    model.mkdir()
    tiny.bert_folder(model)
    long = "a clever film " * 15
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("a film", "", long, "clever")))
    command = ["batch", str(tmp_path / "t.jsonl"), "--column", "text", "--model", str(model), "--workers", "0"]
    assert main([*command, "--out", str(tmp_path / "refused")]) == 1
    assert "the text has 47 tokens, the model reads 32" in capsys.readouterr().err
    assert main([*command, "--long", "window", "--out", str(tmp_path / "windows")]) == 1
    made = batch.read(tmp_path / "windows").numpy()
    assert made["window"].tolist() == [0, 0, 1, 0]
    assert made["tokens"][0] == ["[CLS]", "a", "film", "[SEP]"]
    assert [len(r) for r in made["relevance"]] == [len(t) for t in made["tokens"]]
    assert list(batch.read(tmp_path / "windows").failures) == [f"{tmp_path}/t.jsonl:1"]
    assert main(["show", str(tmp_path / "windows"), "--out", str(tmp_path / "pages")]) == 0
    assert sorted(p.name for p in (tmp_path / "pages").glob("*.html")) == [
        "t-2-part1.html",
        "t-2-part2.html",
        "t-3.html",
        "t.html",
    ]
    assert ">clever</span>" in (tmp_path / "pages" / "t-3.html").read_text()


def test_show_lists_and_renders_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.pictures(Path("p"), 4)
    Path("p/bad.png").write_bytes(b"no")
    assert main(["batch", "p", *VIT, "--target", "top2", "--out", "out", "--workers", "0"]) == 1
    capsys.readouterr()
    assert main(["show", "out", "--limit", "2"]) == 0
    assert capsys.readouterr().out.count("logit") == 4
    assert main(["show", "out", "--failures"]) == 0
    assert capsys.readouterr().out == f"p/bad.png: {batch.read('out').failures['p/bad.png']}\n"
    assert main(["show", "out", "p/00003.png", "p/bad.png", "p/none.png", "--out", "shown"]) == 1
    printed = capsys.readouterr()
    assert "p/none.png: there is no such item" in printed.err
    assert "p/bad.png: not a picture" in printed.err
    assert len(list(Path("shown").glob("00003-*.png"))) == 2
    Path("p/00003.png").unlink()
    assert main(["show", "out", "p/00003.png", "--out", "shown"]) == 1
    assert "is not there any more" in capsys.readouterr().err


# Kills


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_killed_at_ten_random_moments_the_rows_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    items = found(tiny.pictures(tmp_path / "p", 60))
    items.insert(17, inputs.Item("broken", inputs.Broken("it is broken")))
    explain = Explain("tests.tiny:vit", target=("top2",), batch_size=3)
    run_local(explain, items, tmp_path / "whole")
    context = multiprocessing.get_context("fork")
    random = np.random.default_rng(0)
    killed = 0
    for _ in range(10):
        child = context.Process(target=run_local, args=(explain, items, tmp_path / "killed", 1, 8, 0.1))
        child.start()
        child.join(random.uniform(0.05, 0.5))
        killed += child.is_alive()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert killed >= 3
    run_local(explain, items, tmp_path / "killed")
    assert rows(tmp_path / "killed").equals(rows(tmp_path / "whole"))
    assert len(parts(tmp_path / "killed")) == len(parts(tmp_path / "whole")) == 8


def test_parts_that_are_missing_in_the_middle_keep_their_company(tmp_path: Path) -> None:
    """A cluster finishes parts in any order; what is left must not be divided in another way."""
    items = [inputs.Item(f"{i}", inputs.Value("")) for i in range(18)]
    schema = table.schema(None, {})
    with Store(str(tmp_path), {}) as store:
        planned = store.tasks(items, retry=False, size=4)
        for task in (planned[3], planned[0]):
            store.put(task, table.table([Row(item.name) for item in task.items], schema))
        assert store.tasks(items, retry=False, size=4) == [planned[1], planned[2], planned[4]]
        more = [inputs.Item("new", inputs.Value("")), *items]  # all boundaries move: the rest, in new files
        rest = store.tasks(more, retry=False, size=4)
        assert [item.name for task in rest for item in task.items].count("new") == 1
        assert len({item.name for task in rest for item in task.items}) == 11
        assert not {task.name for task in rest} & {planned[0].name, planned[3].name}


def test_two_processes_do_not_write_the_same_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.pictures(tmp_path / "p", 2)
    command = ["batch", str(folder), *VIT, "--out", str(tmp_path / "out"), "--workers", "0"]
    assert main(command) == 0
    code = (
        "import sys, time; from fastrel.data import files\n"
        "with files.locked(sys.argv[1]) as got: print(got, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out" / ".shard-0-of-1.lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert main(command) == 2
        assert "another process is writing shard-0-of-1" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()
    assert main(command) == 0


@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_a_picture_that_kills_its_decoder_is_reported_and_the_rest_explained(tmp_path: Path, workers: str) -> None:
    """By a segmentation fault, which nothing in the process can catch."""
    folder, out = tiny.pictures(tmp_path / "p", 20, red=7), tmp_path / "out"
    command = ["batch", str(folder), "--model", "tests.tiny:crashing", "--workers", workers, "--batch-size", "2"]
    assert main([*command, "--out", str(out)]) == 1
    assert batch.read(out).failures == {str(folder / "00007.png"): ahead.KILLS}
    assert len(batch.read(out)) == 19
    one = ["explain", str(folder / "00007.png"), str(folder / "00008.png"), "--model", "tests.tiny:crashing"]
    assert main([*one, "--workers", workers, "--out", str(tmp_path / "drawn")]) == 1
    assert len(list((tmp_path / "drawn").glob("00008-*.png"))) == 1


def test_a_decoder_that_dies_by_chance_costs_no_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREL_TEST_ONCE", str(tmp_path / "died"))
    folder, out = tiny.pictures(tmp_path / "p", 9, red=4), tmp_path / "out"
    command = [
        "batch",
        str(folder),
        "--model",
        "tests.tiny:deadly",
        "--out",
        str(out),
        "--workers",
        "2",
        "--batch-size",
        "2",
    ]
    assert main(command) == 0
    assert (tmp_path / "died").exists()
    assert len(batch.read(out)) == 9


def test_decoders_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    items = found(tiny.pictures(tmp_path / "p", 40))
    pids = multiprocessing.get_context("fork").SimpleQueue()

    def work() -> None:
        stream = decoding.decoded([[item] for item in items], Pids(), "image", 2)
        for _, (one,) in zip(range(8), stream, strict=False):
            pids.put(int(one.samples[0]["pid"]))
        time.sleep(60)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    workers = {pids.get() for _ in range(8)}
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text() for pid in workers):
        assert time.monotonic() < deadline, f"decoders {workers} outlived their run"
        time.sleep(0.1)


class Pids:
    def __call__(self, image: Image.Image) -> list[dict[str, np.ndarray]]:
        return [{"pid": np.array(os.getpid())}]


# Size


@pytest.mark.slow
def test_ten_thousand_items_in_flat_memory_and_few_files(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # what other tests leave is theirs
        resident = fresh.submit(_resident_while_explaining, 10_000, tmp_path).result()
    assert rows(tmp_path).num_rows == 10_000
    assert len(parts(tmp_path)) == 20
    _, second, _, last = np.array_split(resident, 4)
    assert np.mean(last) - np.mean(second) < 5 << 20, resident  # the rows of the 5,000 items between them would be 10 MB


def _resident_while_explaining(count: int, out: Path) -> list[int]:
    """Bytes of this process's memory whenever a part of the items is done."""
    content = hostile.encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)), "PNG")
    items = [inputs.Item(f"{i}", inputs.Value(content)) for i in range(count)]
    explain = Explain("tests.test_batch:one_block", batch_size=256)
    process, resident = psutil.Process(), []
    with Store(str(out), explain.settings.describe(explain.loaded)) as store:
        tasks = store.tasks(items, retry=False, size=512)

        def watch(done: int, failed: int) -> None:
            resident.append(process.memory_info().rss)

        local.run(explain, tasks, store, table.schema(explain.shape(), {}), 0, watch)
    return resident


def one_block() -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=1, num_classes=3).eval()
    model.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    return model


def test_the_embedded_model_explains_its_samples(tmp_path: Path) -> None:
    samples = [str(path) for path in demo.sample_paths()]
    assert main(["batch", *samples, "--target", "bag", "1", "--out", str(tmp_path), "--workers", "0"]) == 0
    assert batch.read(tmp_path).numpy()["target"].tolist() == [8, 1] * len(samples)
    assert set(batch.read(tmp_path).numpy()["target_name"]) == {"bag", "trousers"}


def test_options_that_belong_to_ray_need_it() -> None:
    assert main(["batch", "x", "--actors", "3", "--out", "o"]) == 2


def test_explain_says_how_far_official_maps_depend_on_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.pictures(tmp_path / "p", 3)
    command = ["explain", str(folder), *VIT, "--target", "top2"]
    assert main([*command, "--rules", "official", "--out", str(tmp_path / "official")]) == 0
    printed = re.findall(r"noise floor: ([\d.e-]+) %, ([\d.e-]+) %", capsys.readouterr().out)
    explain = Explain("tests.tiny:vit", rules="official")
    args, kwargs = explain.loaded.arguments(
        explain.loaded.inputs([explain.loaded.reader(Image.open(path))[0] for path in sorted(folder.iterdir())])
    )
    prediction = explain.settings.explainer(explain.loaded).predict(*args, **kwargs)
    floors = prediction.noise_floor(prediction.logits.topk(2).indices)
    assert [[float(x) for x in own] for own in printed] == [pytest.approx((100 * own).tolist(), rel=0.06) for own in floors]
    assert main([*command, "--out", str(tmp_path / "positive")]) == 0
    assert "noise floor" not in capsys.readouterr().out


def test_a_bad_line_of_a_table_is_a_failure_of_its_own(tmp_path: Path) -> None:
    lines = ['{"text": "a film"}', '{"text": null}', '{"nope": 1}', "{bad json", "", "[1]", '{"text": "b"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    items = inputs.find([str(tmp_path / "t.jsonl")], "text", "text").items
    assert [item.name.rpartition(":")[2] for item in items] == list("012345")
    assert [items[i].where.load() for i in (0, 5)] == ["a film", "b"]
    for i, said in (
        (1, "holds None"),
        (2, "no 'text', but nope"),
        (3, "line 4 is not JSON"),
        (4, r"line 6 is no JSON object, but \[1\]"),
    ):
        with pytest.raises(InputError, match=said):
            items[i].where.load()
