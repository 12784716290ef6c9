"""Data readers, and `fastrel evaluate`: nothing lost, nothing done twice, failures named."""

import csv
import gzip
import json
import multiprocessing
import os
import pickle
import resource
import signal
import time
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ttest_1samp

from fastrel import data
from fastrel.cli import main
from fastrel.data import ahead, pictures
from fastrel.errors import InputError
from fastrel.evaluation import ImageSubject, Store, TextSubject, configurations, evaluate, scorers, summarise, summary
from fastrel.evaluation.store import Score
from fastrel.evaluation.summary import holm, interval, markdown, paired
from fastrel.explainer import Explainer
from fastrel.models import load
from tests import models, tiny

EVALUATE = ["evaluate", "--data", "mosaics", "--metric", "pointing", "--seed", "3"]


def scene(path: Path, size: tuple[int, int] = (64, 64)) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)


def coco_folder(folder: Path) -> Path:
    folder.mkdir()
    entry = {"classes": {"thing": {"mask_value": 7, "imagenet": [3, 5]}}}
    (folder / "manifest.json").write_text(json.dumps({"a.png": entry, "b.png": entry}))
    for name in "ab":
        scene(folder / f"{name}.png", (80, 64))
        mask = np.zeros((64, 80), np.uint8)
        mask[10:40, 20:50] = 7
        Image.fromarray(mask).save(folder / f"{name}_mask.png")
    return folder


def scores(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open() as file:
        return list(csv.DictReader(file))


# Readers


def test_mosaics_have_a_mask_per_object() -> None:
    items = data.read("mosaics")
    assert len(items) == 746
    assert len({item.group for item in items}) == 200
    mask = items[0].mask()
    assert mask.mean() == 0.25
    assert mask.shape == (64, 64)


def test_images_take_their_class_from_the_name_or_the_folder(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    scene(tmp_path / "flat" / "012_n01_tench.png")
    items = data.read(f"images:{tmp_path / 'flat'}")
    assert [(item.name, item.classes) for item in items] == [("012_n01_tench.png", (12,))]
    assert items[0].picture().size == (64, 64)
    for name in ("dog", "cat"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        scene(tmp_path / "tree" / name / "x.png")
    assert [(i.name, i.classes) for i in data.read(f"images:{tmp_path / 'tree'}")] == [
        ("cat/x.png", (0,)),
        ("dog/x.png", (1,)),
    ]
    scene(tmp_path / "flat" / "tench.png")
    with pytest.raises(InputError, match=r"tench.png: pictures must be named <class number>_"):
        data.read(f"images:{tmp_path / 'flat'}")


@pytest.mark.parametrize(
    ("folders", "names", "numbers"),
    [
        (("cat", "dog", "zebra"), (), (0, 1, 2)),  # positions, the folder without a picture included
        (("281_tabby", "7", "30-frog"), (), (281, 7, 30)),
        (("zebra", "cat"), ("Zebra", "dog", "tabby, cat"), (0, 2)),
        (("n02123045", "n01440764"), (), (281, 0)),
        (("tiger_cat", "tench"), ("tench, Tinca tinca", "tiger cat"), (1, 0)),
    ],
)
def test_class_folders_keep_their_numbers(folders: Any, names: Any, numbers: Any, tmp_path: Path) -> None:
    for name in folders:
        (tmp_path / name / "deep").mkdir(parents=True)
        if name != "dog":
            scene(tmp_path / name / "deep" / "x.png")
    items = data.read(f"images:{tmp_path}", names)
    found = {Path(item.name).parts[0]: item.classes for item in items if isinstance(item, data.ImageItem)}
    assert found == {name: (n,) for name, n in zip(folders, numbers, strict=True) if name != "dog"}


def test_coco_masks(tmp_path: Path) -> None:
    first, _ = data.read(f"coco:{coco_folder(tmp_path / 'coco')}")
    assert (first.name, first.group, first.classes) == ("a.png/thing", "a.png", (3, 5))
    assert first.mask().sum() == 900
    (tmp_path / "coco" / "manifest.json").write_text('{"a.png": {}}')
    with pytest.raises(InputError, match="is not a manifest of masks: KeyError"):
        data.read(f"coco:{tmp_path / 'coco'}")


def matlab_file(path: Path, picture: np.ndarray, mask: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:  # MATLAB writes arrays in column-major order, cells as references
        image, gt = file.create_dataset("#refs#/i", data=picture.T), file.create_dataset("#refs#/g", data=mask.T)
        cell = file.create_dataset("#refs#/c", (1, 1), h5py.ref_dtype)
        cell[0, 0] = gt.ref
        for name, target in (("img", image), ("gt", cell)):
            file.create_dataset(f"value/{name}", (1, 1), h5py.ref_dtype)[0, 0] = target.ref
    return path


def test_imagenet_segmentation_is_read_as_matlab_wrote_it(tmp_path: Path) -> None:
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    mask = np.zeros((5, 7), np.uint8)
    mask[1:3, 2:6] = 1
    path = matlab_file(tmp_path / "gtsegs_ijcv.mat", picture, mask)
    (item,) = data.read(f"imagenet-seg:{path}")
    assert np.array_equal(np.asarray(item.picture()), picture)
    assert np.array_equal(item.mask(), mask == 1)
    path.write_bytes(b"no")
    with pytest.raises(InputError, match=r"is not gtsegs_ijcv\.mat"):
        data.read(f"imagenet-seg:{path}")


def test_eraser_in_its_own_format_and_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "neg_1.txt").write_text("a dull\nfilm about nothing")
    evidence = [[{"docid": "neg_1.txt", "start_token": 1, "end_token": 3, "text": "dull film"}]]
    lines = [
        {"annotation_id": "neg_1.txt", "classification": "NEG", "evidences": evidence},
        {"annotation_id": "neg_1.txt", "classification": "POS", "evidences": []},  # no rationale: left out
    ]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (item,) = data.read(f"eraser:{tmp_path / 'val.jsonl'}")
    assert (item.words, item.label) == (("a", "dull", "film", "about", "nothing"), 0)
    assert item.rationale.tolist() == [False, True, True, False, False]
    with gzip.open(tmp_path / "one.jsonl.gz", "wt") as file:
        file.write(json.dumps({"id": "x", "label": 1, "text": "so good", "spans": [[1, 2]]}))
    (item,) = data.read(f"eraser:{tmp_path / 'one.jsonl.gz'}")
    assert (item.words, item.label, item.rationale.tolist()) == (("so", "good"), 1, [False, True])
    (tmp_path / "val.jsonl").write_text('{"id": 3')
    with pytest.raises(InputError, match=r"val\.jsonl, line 1: not an ERASER item"):
        data.read(f"eraser:{tmp_path / 'val.jsonl'}")
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "one.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz cannot be read"):
        data.read(f"eraser:{tmp_path / 'cut.jsonl.gz'}")


def test_items_numbered_by_integers_are_known_again(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": 7, "label": 1, "text": "so good", "spans": [[1, 2]]}')
    (item,) = data.read(f"eraser:{tmp_path / 't.jsonl'}")
    Store(tmp_path, {}).add(group(item.name))
    assert Store(tmp_path, {}).done(item.name, "rollout", "pointing")


def test_sst_keeps_the_words_of_the_sentence_s_polarity(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("(3 (2 a) (4 (1 (1 not) (1 dull)) (4 gem)))\n(2 (2 so) (2 so))\n(1 (2 a) (2 film))\n")
    (item,) = data.read(f"sst:{tmp_path / 't.txt'}")
    assert (item.words, item.label, item.rationale.tolist()) == (
        ("a", "not", "dull", "gem"),
        1,
        [False, False, False, True],
    )


def test_items_of_every_kind_of_data_can_be_sent_to_the_processes_that_read(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    scene(tmp_path / "images" / "1_x.png")
    matlab = matlab_file(tmp_path / "m.mat", np.zeros((5, 7, 3), np.uint8), np.eye(5, 7, dtype=np.uint8))
    (tmp_path / "e.jsonl").write_text('{"id": "x", "label": 1, "text": "so good", "spans": [[1, 2]]}')
    (tmp_path / "t.txt").write_text("(3 (2 a) (4 gem))")
    paths = {
        "mosaics": "",
        "images": tmp_path / "images",
        "coco": coco_folder(tmp_path / "coco"),
        "imagenet-seg": matlab,
        "eraser": tmp_path / "e.jsonl",
        "sst": tmp_path / "t.txt",
    }
    assert paths.keys() == data.READERS.keys()
    for kind, path in paths.items():
        item = data.read(f"{kind}:{path}")[0]
        sent = pickle.loads(pickle.dumps(item))
        assert sent.name == item.name
        if isinstance(item, data.ImageItem):
            assert sent.picture() == item.picture(), kind
            assert (sent.mask is None) == (item.mask is None)
            assert item.mask is None or np.array_equal(sent.mask(), item.mask())
        else:
            assert sent.words == item.words


def test_what_cannot_be_sent_to_other_processes_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = next(ahead.ahead([[2]], lambda x: 3 * x, 0))
    assert found == 6  # forked processes have the function
    with pytest.raises(InputError, match=r"<function .*lambda.* cannot be sent .*functools\.partial"):
        next(ahead.ahead([[lambda: 2]], abs, 0))
    monkeypatch.setattr(ahead.sys, "platform", "darwin")
    with pytest.raises(InputError, match=r"<function .*lambda.* cannot be sent .*functools\.partial"):
        next(ahead.ahead([[2]], lambda x: x, 0))


def test_data_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown data 'voc:x'"):
        data.read("voc:x")
    with pytest.raises(InputError, match="there is no file or folder 'nowhere'"):
        data.read("coco:nowhere")
    with pytest.raises(InputError, match="holds no items"):
        data.read(f"images:{tmp_path}")


# The store and the statistics


def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path, {"model": "m"})
    first = [Score("a", "a", "rollout", "pointing", name, 1.0) for name in ("pointing", "energy")]
    second = [Score("b", "b", "rollout", "pointing", name, 0.5) for name in ("pointing", "energy")]
    store.add(first)
    store.add(second)
    text = store.path.read_text().splitlines(keepends=True)
    store.path.write_text("".join(text[:-2]) + text[-2][:-3])  # the last score is torn and its end missing
    again = Store(tmp_path, {"model": "m"})
    assert again.scores == first
    assert again.done("a", "rollout", "pointing")
    assert not again.done("b", "rollout", "pointing")
    again.add(second)
    assert Store(tmp_path, {"model": "m"}).scores == first + second
    with pytest.raises(InputError, match=r"holds scores made with \{'model': 'm'\}, not \{'model': 'n'\}"):
        Store(tmp_path, {"model": "n"})


def group(item: str, value: float = 0.1) -> list[Score]:
    return [Score(item, item, "rollout", "pointing", name, value) for name in ("pointing", 'energy, "inside"')]


def test_wherever_the_file_was_cut_whole_groups_stay_and_nothing_is_glued_to_them(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    items = ("a", "b\nb", "c,c")
    for item in items:
        store.add(group(item))
    content = store.path.read_bytes()
    ends = [content.index(b"end,2", at) + 5 for at in [content.index(name) for name in (b"\na,", b"b\nb", b"c,c")]]
    for cut in range(len(content)):
        store.path.write_bytes(content[:cut])
        again = Store(tmp_path, {})
        kept = [score for item, end in zip(items, ends, strict=True) if cut >= end for score in group(item)]
        assert again.scores == kept, cut
        again.add(group("d", 1 / 3))
        assert Store(tmp_path, {}).scores == kept + group("d", 1 / 3), cut


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.replace(b"energy", b"ener\xffgy", 1),
        lambda content: content.replace(b"energy", b"ener\0gy", 1),
        lambda content: content.replace(b"0.1", b"x", 1),
        lambda content: content.replace(b"end,2", b"end,3", 1),
        lambda content: content.replace(b"pointing,0.1\r\n", b"", 1),
        lambda content: b"rubbish\n" + content[3:],
        lambda content: content.partition(b"\r\n")[2],
        lambda content: content + content,
        lambda content: content.replace(b"\r\n", b"\r\n\r\n"),
    ],
)
def test_damage_costs_at_most_the_group_that_has_it(damage: Any, tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    for item in "abc":
        store.add(group(item))
    whole = store.path.read_bytes()
    store.path.write_bytes(damage(whole))
    again = Store(tmp_path, {})
    items = {score.item for score in again.scores}
    assert {"b", "c"} <= items
    assert again.scores == [score for item in sorted(items) for score in group(item)]
    if "a" not in items:
        again.add(group("a"))
    assert sorted(Store(tmp_path, {}).scores) == sorted(group("a") + group("b") + group("c"))


def test_a_stray_quote_in_a_long_file_costs_what_follows_and_is_no_traceback(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    for i in range(3_000):
        store.add([Score(f"item{i}", "group", "rollout", "pointing", "pointing", 0.5)])
    content = store.path.read_bytes()
    assert len(content) > csv.field_size_limit()
    store.path.write_bytes(content.replace(b"item2,", b'"item2,', 1))
    again = Store(tmp_path, {})
    assert {"item0", "item1"} <= {score.item for score in again.scores}
    assert not again.done("item2", "rollout", "pointing")


def test_an_interrupted_repair_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, {})
    for item in "abc":
        store.add(group(item))
    torn = store.path.read_bytes()[:-3]
    store.path.write_bytes(torn)

    def interrupted(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path, {})
    monkeypatch.undo()
    assert store.path.read_bytes() == torn
    assert Store(tmp_path, {}).scores == group("a") + group("b")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "scores.csv", "settings.json"]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    store.add(group("a"))
    before = store.path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.add(group("b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert store.path.read_bytes() == before
    store.add(group("b"))
    assert Store(tmp_path, {}).scores == group("a") + group("b")


def test_settings_that_cannot_be_read_are_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("")
    store = Store(tmp_path, {"model": "m"})  # nothing was scored yet
    store.add(group("a"))
    (tmp_path / "settings.json").write_text('{"mod')
    with pytest.raises(InputError, match=r"settings\.json is damaged .* choose another --out"):
        Store(tmp_path, {"model": "m"})


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    Store(tmp_path, {}).add(group("a"))
    context = multiprocessing.get_context("fork")
    refused = context.Value("b", 0)

    def other() -> None:
        try:
            Store(tmp_path, {})
        except InputError as error:
            refused.value = "another evaluation is writing" in str(error)

    with Store(tmp_path, {}):
        process = context.Process(target=other)
        process.start()
        process.join()
    assert refused.value


@pytest.mark.slow
def test_killed_at_random_moments_the_scores_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    subject = ImageSubject(load())
    items = [item for item in data.read("mosaics") if isinstance(item, data.ImageItem)][:40]
    explainer = Explainer(subject.loaded.model)
    chosen = configurations(["transformer_attribution", "rollout"], ["positive"])

    def run(out: Path, pause: float) -> None:
        with Store(out, {}) as store:
            wait = lambda name: time.sleep(pause)  # noqa: E731
            evaluate(subject, items, chosen, ["pointing"], store, wait, explainer=explainer, batch_size=4, workers=1)

    run(tmp_path / "whole", 0)
    random = np.random.default_rng(0)
    for _ in range(8):
        child = multiprocessing.get_context("fork").Process(target=run, args=(tmp_path / "killed", 0.01))
        child.start()
        child.join(random.uniform(0.02, 0.3))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    run(tmp_path / "killed", 0)
    torch.set_num_threads(before)
    # A kill between the items of a batch makes other batches of what is left, so the lines may come in another order.
    whole, killed = (sorted(scores(tmp_path / name), key=_which) for name in ("whole", "killed"))
    assert len(whole) == len(killed) == 40 * 2 * 3
    for expected, found in zip(whole, killed, strict=True):
        assert _which(expected) == _which(found)
        assert float(found["value"]) == pytest.approx(float(expected["value"]), abs=1e-6)


def _which(score: dict[str, str]) -> list[str]:
    """All of a line but its value."""
    return [value for name, value in score.items() if name != "value"]


@pytest.mark.slow
def test_a_batch_scores_what_its_items_score_one_by_one(tmp_path: Path) -> None:
    command = [*EVALUATE, "--limit", "9", "--metric", "pointing", "perturbation"]
    assert main([*command, "--batch-size", "1", "--workers", "0", "--out", str(tmp_path / "single")]) == 0
    assert main([*command, "--batch-size", "4", "--workers", "2", "--out", str(tmp_path / "batch")]) == 0
    single, together = (
        {(s["item"], s["metric"]): float(s["value"]) for s in scores(tmp_path / n)} for n in ("single", "batch")
    )
    assert single.keys() == together.keys()
    assert max(abs(value - together[key]) for key, value in single.items()) < 1e-5


def test_items_of_one_picture_are_one_observation() -> None:
    values = {("x", "p"): 1.0, ("y", "p"): 0.0, ("z", "q"): 1.0}
    made = [Score(item, group, "ours", "pointing", "pointing", v) for (item, group), v in values.items()]
    (row,) = summarise(made, ["ours"])
    assert (row.mean, row.groups, row.error) == (0.75, 2, pytest.approx(0.25))


def test_a_single_item_has_no_error_and_no_test() -> None:
    made = [Score("x", "x", name, "pointing", "pointing", v) for name, v in (("ours", 1.0), ("theirs", 0.0))]
    first, second = summarise(made, ["ours", "theirs"])
    assert np.isnan([first.error, first.low, first.p, second.error, second.high, second.p, second.corrected]).all()


def test_the_permutation_test_agrees_with_the_t_test_on_normal_differences() -> None:
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.15, 0.3):
        differences = rng.normal(shift, 1, 200)
        mean, p = paired(differences)
        assert mean == differences.mean()
        assert abs(p - ttest_1samp(differences, 0).pvalue) < 0.02
    assert paired(np.ones(10))[1] == pytest.approx(2 / 2**10)


def test_tables_say_over_how_many() -> None:
    made = [Score(str(i), str(i), "ours", "rationale", "average precision", 0.5) for i in range(4)]
    assert "| average precision ↑ |" in markdown(summarise(made, ["ours"]))
    assert "over 4 pictures or texts" in markdown(summarise(made, ["ours"]))
    made.append(Score("0", "0", "ours", "rationale", "token F1 at 10", 0.5))
    assert "| average precision ↑, n = 4 | token F1 at 10 ↑, n = 1 |" in markdown(summarise(made, ["ours"]))


def test_holm_multiplies_by_the_tests_that_are_left() -> None:
    assert holm([0.01, float("nan"), 0.04, 0.03, 0.5]) == pytest.approx([0.04, float("nan"), 0.09, 0.09, 0.5], nan_ok=True)
    made = [
        Score(str(i), str(i), name, "pointing", metric, float(i < hits))
        for name, hits in (("ours", 9), ("theirs", 2), ("chance", 5))
        for metric in ("pointing", "energy inside")
        for i in range(10)
    ]
    rows = summarise(made, ["ours", "theirs", "chance"])
    tested = [row for row in rows if row.configuration != "ours"]
    assert [row.corrected for row in tested] == pytest.approx(holm([row.p for row in tested]))
    assert tested[0].corrected == pytest.approx(4 * tested[0].p) == pytest.approx(4 * 2 / 2**7)


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation_for_many_values() -> None:
    values = np.random.default_rng(2).normal(1, 2, 400)
    low, high = interval(values)
    assert [low, high] == pytest.approx([values.mean() - 0.196, values.mean() + 0.196], abs=0.03)


def test_many_pictures_are_resampled_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=5_000)
    tracemalloc.start()
    try:
        interval(values)
        monkeypatch.setattr(summary, "_RESAMPLES", 5_000)
        paired(values)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [33, 101])
def test_resamples_do_not_depend_on_how_many_are_drawn_at_a_time(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(0.2, 1, count)
    drawn = np.random.default_rng(0).integers(0, count, (summary._RESAMPLES // 10, count))
    signs = 1 - 2.0 * np.random.default_rng(0).integers(0, 2, (summary._RESAMPLES, count), np.int8)
    extreme = 1 + int((abs(signs @ values) >= abs(values.sum()) * (1 - 1e-12)).sum())
    for size in (1 << 22, 6_000):
        monkeypatch.setattr(summary, "_DRAWN", size)
        assert interval(values) == tuple(np.percentile(values[drawn].mean(1), (2.5, 97.5)))
        assert paired(values)[1] == extreme / (summary._RESAMPLES + 1)


# The command


def test_evaluate_writes_tables_and_plots_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [*EVALUATE, "--limit", "3", "--out", str(out), "--methods", "transformer_attribution", "rollout"]
    assert main(command) == 0
    assert "| rollout |" in capsys.readouterr().out
    before = scores(out)
    assert len([s for s in before if s["metric"] == "pointing"]) == 6
    for name in ("results.md", "results.csv", "scores.png"):
        assert (out / name).stat().st_size > 100
    assert not (out / "curves.png").exists()
    assert main([*command, "partial_lrp", "--rules", "positive", "official"]) == 0
    after = scores(out)
    assert [s for s in after if s["configuration"] == "rollout"] == [s for s in before if s["configuration"] == "rollout"]
    names = {s["configuration"] for s in after}
    assert {"partial_lrp, positive", "partial_lrp, official", "transformer_attribution, official"} <= names


def test_scores_of_one_set_of_rules_are_not_those_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*EVALUATE, "--limit", "2", "--out", str(tmp_path)]
    assert main([*command, "--rules", "positive"]) == 0
    assert main([*command, "--rules", "official"]) == 0
    found = {s["configuration"] for s in scores(tmp_path)}
    assert found == {"frozen_attribution, positive", "transformer_attribution, official"}
    out = capsys.readouterr().out  # alone in its table, each needs no more of a name
    assert (out.count("| frozen_attribution |"), out.count("| transformer_attribution |")) == (1, 1)


def test_scores_of_other_weights_are_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, weights = tiny.pictures(tmp_path / "p", 2), tmp_path / "w.pth"
    for path in folder.iterdir():
        path.rename(folder / f"1_{path.name}")
    command = ["evaluate", "--data", f"images:{folder}", "--model", "tests.tiny:vit", "--weights", str(weights)]
    command += ["--metric", "insertion", "--out", str(tmp_path / "out")]
    model = tiny.vit()
    torch.save(model.state_dict(), weights)
    assert main(command) == 0
    with torch.no_grad():
        model.head.bias += 1  # type: ignore[union-attr,operator]
    torch.save(model.state_dict(), weights)
    assert main(command) == 2
    assert "holds scores made with {'sha256': " in capsys.readouterr().err


@pytest.mark.slow
def test_the_perturbation_curve_is_that_of_the_metric(tmp_path: Path) -> None:
    import fastrel
    from fastrel import demo, metrics

    out = tmp_path / "out"
    assert main(["evaluate", "--data", "mosaics", "--metric", "perturbation", "--limit", "1", "--out", str(out)]) == 0
    found = {s["metric"]: float(s["value"]) for s in scores(out)}
    item = next(i for i in data.read("mosaics") if i.name == scores(out)[0]["item"])
    model, x = demo.load_model(), demo.to_input(np.asarray(item.picture())[None])
    explanation = fastrel.Explainer(model)(x)
    black = torch.full((3, 1, 1), -demo.MEAN / demo.STD)
    for order in ("positive", "negative"):
        curve = metrics.perturb(model, x, explanation.patches, explanation.target, order=order, baseline=black)  # type: ignore
        assert found[f"{order} predicted (black)"] == pytest.approx(curve.auc)
        assert found[f"{order} predicted (black) at 0.3"] == curve.accuracy[3]
    assert (out / "curves.png").exists()


@pytest.mark.slow
def test_scores_of_pixels_that_go_are_those_of_the_metrics(tmp_path: Path) -> None:
    import fastrel
    from fastrel import demo, metrics

    out, names = tmp_path / "out", ["perturbation-blur", "insertion", "road", "sensitivity"]
    assert main(["evaluate", "--data", "mosaics", "--metric", *names, "--limit", "1", "--out", str(out)]) == 0
    found = {s["metric"]: float(s["value"]) for s in scores(out)}
    item = next(i for i in data.read("mosaics") if i.name == scores(out)[0]["item"])
    model, x = demo.load_model(), demo.to_input(np.asarray(item.picture())[None])
    explanation = fastrel.Explainer(model)(x)
    heat, target = explanation.patches, explanation.target
    assert isinstance(target, torch.Tensor)
    with torch.no_grad():
        blur = metrics.perturb(model, x, heat, target, baseline=metrics.blurred(x))
    assert found["positive predicted (blur)"] == pytest.approx(blur.auc)
    assert found["positive ROAD"] == pytest.approx(metrics.road(model, x, heat, target).mean(), abs=1e-5)
    # The least relevant pixels are apart by less than rounding, which differs between a batch and a sample: another order.
    assert found["insertion"] == pytest.approx(metrics.insertion(model, x, heat, target)[0], abs=1e-3)
    least = metrics.road(model, x, heat, target, order="negative").mean()
    assert found["negative ROAD"] == pytest.approx(least, abs=1e-3)
    patches = heat[0].numel()
    sizes = [round(patches * share) for share in (0.02, 0.1, 0.3, 0.5, 0.7)]
    expected = metrics.sensitivity_n(model, x, heat, target, sizes=sizes).mean()
    assert found["sensitivity-n"] == pytest.approx(expected, abs=1e-4)


def test_a_picture_is_decoded_once_and_not_in_the_main_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, here = multiprocessing.get_context("fork").Value("i", 0), []
    read = pictures.read

    def counted(*given: Any) -> Any:
        with opened.get_lock():
            opened.value += 1
        here.append(os.getpid())
        return read(*given)

    monkeypatch.setattr(pictures, "read", counted)
    command = ["evaluate", "--data", f"coco:{coco_folder(tmp_path / 'coco')}", "--model", "tests.tiny:vit", "--methods"]
    command += ["rollout", "raw_attention", "--metric", "pointing", "segmentation", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert len({(s["item"], s["configuration"], s["scorer"]) for s in scores(tmp_path / "out")}) == 2 * 2 * 2
    assert (opened.value, here) == (2, [])


def test_bad_items_are_named_and_the_others_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = coco_folder(tmp_path / "coco")
    Image.fromarray(np.full((10, 10), 7, np.uint8)).save(folder / "b_mask.png")
    command = ["evaluate", "--data", f"coco:{folder}", "--metric", "segmentation", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "b.png/thing" in captured.err
    assert "a mask of (10, 10) for a picture of (64, 80)" in captured.err
    assert {s["item"] for s in scores(tmp_path / "out")} == {"a.png/thing"}
    (folder / "b.png").write_bytes(b"not a picture")
    (folder / "a.png").unlink()
    assert main([*command[:-1], str(tmp_path / "none")]) == 2
    assert "none of 2 items could be scored" in capsys.readouterr().err


def test_the_help_says_which_metrics_are_whose(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"pictures: {', '.join(scorers.IMAGE_SCORERS)}; texts: {', '.join(scorers.TEXT_SCORERS)}" in said


def test_a_metric_that_fails_for_all_items_is_an_error_also_beside_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = coco_folder(tmp_path / "coco")
    command = ["evaluate", "--data", f"coco:{folder}", "--out", str(tmp_path / "out"), "--model", "tests.tiny:vit"]
    assert main([*command, "--metric", "pointing"]) == 0
    for name in "ab":
        Image.fromarray(np.full((10, 10), 7, np.uint8)).save(folder / f"{name}_mask.png")
    assert main([*command, "--metric", "segmentation"]) == 2
    assert "none of 2 items could be scored; a.png/thing: frozen_attribution" in capsys.readouterr().err


def test_evaluate_says_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["evaluate", "--data", "mosaics", "--metric", "rationale", *out]) == 2
    assert "no metric 'rationale' for this data; choose from pointing" in capsys.readouterr().err
    assert main(["evaluate", "--data", "mosaics", "--metric", "pointing", "--limit", "0", *out]) == 2
    assert main(["evaluate", "--data", "mosaics", "--metric", "pointing", "--model", "no.module:f", *out]) == 2
    assert "cannot load 'no.module:f': ModuleNotFoundError" in capsys.readouterr().err
    (tmp_path / "t.txt").write_text("(3 (2 a) (4 gem))")
    assert main(["evaluate", "--data", f"sst:{tmp_path / 't.txt'}", "--metric", "rationale", *out]) == 2
    assert "evaluating on texts needs --model" in capsys.readouterr().err


def text_model() -> tuple[torch.nn.Module, object]:
    """What --model tests.test_evaluation:text_model gives: a tiny random BERT and a word-piece tokenizer."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as pieces
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "film", "du", "##ll", "gem"]
    core = Tokenizer(pieces.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", model_max_length=16)
    return models.build("hf_bert").float(), tokenizer


def test_texts_are_scored_by_word(tmp_path: Path) -> None:
    words = ["a", "dull", "film", *["a"] * 30]  # longer than the model reads
    lines = [{"id": str(i), "label": i, "text": " ".join(words), "spans": [[1, 2]]} for i in range(2)]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    command = ["evaluate", "--data", f"eraser:{tmp_path / 'v.jsonl'}", "--model", "tests.test_evaluation:text_model"]
    assert main([*command, "--metric", "rationale", "faithfulness", "--out", str(out)]) == 0
    found = {s["metric"] for s in scores(out)}
    assert {"average precision", "IoU F1", "token F1 at 30", "comprehensiveness", "sufficiency"} <= found


def test_perturbed_inputs_go_through_the_model_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    logits = ImageSubject.logits

    def counted(subject: ImageSubject, x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return logits(subject, x)

    monkeypatch.setattr(ImageSubject, "logits", counted)
    command = ["evaluate", "--data", "mosaics", "--metric", "perturbation", "--limit", "8", "--batch-size", "8"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert sizes[:20] == [8] * 20  # two orders of ten fractions
    assert len(sizes) <= 40  # and once more for the items whose label is not predicted


def test_faithfulness_in_one_batch_is_that_of_one_text_at_a_time(tmp_path: Path) -> None:
    model = load(str(tiny.bert_folder(tmp_path)))
    subject = TextSubject(model)
    words = ("a", "grip", "clever", "film", ",", "a", "film")
    item = data.TextItem("x", "x", words, 1, np.array([False, True, True, False, False, False, False]))
    kept = [np.random.default_rng(i).random(len(words)) < 0.6 for i in range(5)]
    together = subject.probabilities(item, kept)
    assert together == pytest.approx([subject.probabilities(item, [own])[0] for own in kept], abs=1e-6)
    for own, found in zip(kept, together, strict=True):
        text = [word for word, keep in zip(words, own, strict=True) if keep]
        encoded = model.reader.tokenizer(text, is_split_into_words=True, return_tensors="pt")
        assert model.model(**encoded).logits.softmax(1)[0, 1].item() == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_picture_that_kills_its_reader_is_named_and_the_others_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    folder = tiny.pictures(tmp_path / "p", 5, red=2)
    for path in folder.iterdir():
        path.rename(folder / f"1_{path.name}")
    command = ["evaluate", "--data", f"images:{folder}", "--model", "tests.tiny:crashing", "--metric", "perturbation"]
    assert main([*command, "--workers", workers, "--out", str(tmp_path / "out")]) == 1
    assert f"1_00002.png: {ahead.KILLS}" in capsys.readouterr().err
    assert {s["item"] for s in scores(tmp_path / "out")} == {f"1_0000{i}.png" for i in (0, 1, 3, 4)}
