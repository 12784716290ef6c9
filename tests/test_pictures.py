"""Pictures are read as a person sees them, or refused with the reason; what is to be explained is found by name."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrel import data
from fastrel.data import inputs, pictures
from fastrel.data.preprocessing import Preprocessing, Wrapped, shown
from fastrel.errors import InputError
from tests import hostile

GOOD, BAD = hostile.good(), hostile.bad()


@pytest.mark.parametrize("name", GOOD)
def test_a_picture_shows_what_it_shows_to_a_person(name: str) -> None:
    found = pictures.read(GOOD[name])
    values = np.asarray(found.image, int)
    assert (found.image.mode, found.image.size) == ("RGB", (hostile.WIDTH, hostile.HEIGHT))
    expected = np.repeat(hostile.grey()[..., None], 3, 2).astype(int)
    difference = np.abs(values - expected)
    difference[-1, -1] = 0  # transparent in some
    near = difference.copy()
    near[2:16, 2:22] = 0  # the square's border rings in JPEG
    assert near.max() <= 12
    assert np.abs(values[6:12, 6:18] - 220).max() <= 12
    if "rgba" in name:
        assert values[-1, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_with_the_reason(name: str) -> None:
    content, word = BAD[name]
    with pytest.raises(InputError) as refused:
        pictures.read(content)
    assert word in str(refused.value)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("animated.gif", "the first of several frames"),
        ("pages.tif", "the first of several frames"),
        ("exif6.jpg", "turned as its EXIF data says"),
        ("rgba.png", "transparency shown on white"),
        ("grey16.png", "uint16 values from 0 to 65535"),
        ("grey12in16.tif", "uint16 values from 0 to 4095"),
        ("float01.tif", "float32 values from 0 to 1 "),
    ],
)
def test_what_was_done_to_a_picture_is_said(name: str, note: str) -> None:
    assert any(note in said for said in pictures.read(GOOD[name]).notes)
    assert pictures.read(GOOD["plain.png"]).notes == ()


def test_values_outside_the_usual_ranges_are_stretched_not_clipped() -> None:
    values = np.linspace(-1000, 3000, 48, dtype=np.float32).reshape(6, 8)
    found = np.asarray(pictures.read(hostile.array(values)).image)[..., 0]
    assert (found.min(), found.max()) == (0, 255)
    assert len(np.unique(found)) == 48


def test_a_bomb_costs_no_memory() -> None:
    code = (
        "import resource, sys; from tests import hostile; from fastrel.data import pictures\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in ('bomb.png', 'bomb-small.png'):\n"
        "    try: pictures.read(hostile.bad()[name][0])\n"
        "    except ValueError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 60_000  # kB; the smaller one decoded would take 121,000


def test_the_limit_of_pixels_can_be_lower() -> None:
    assert pictures.read(GOOD["plain.jpg"], max_pixels=hostile.WIDTH * hostile.HEIGHT).image.width == hostile.WIDTH
    with pytest.raises(InputError, match="48 x 32 pixels; at most 1535 are read"):
        pictures.read(GOOD["plain.jpg"], max_pixels=hostile.WIDTH * hostile.HEIGHT - 1)


def test_pipes_folders_and_what_is_not_there_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, word in (("pipe", "not a regular file"), (".", "a folder"), ("none", "No such file"), ("\0", "null")):
        with pytest.raises(InputError, match=word):
            pictures.read(tmp_path / path)


# Preprocessing


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (224, 224), (1000, 300)])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_preprocessing_is_timm_s_own(size: tuple[int, int], mode: str) -> None:
    from timm.data import create_transform

    noise = np.random.default_rng(0).integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
    image = Image.fromarray(noise).resize(size)
    theirs = create_transform((3, 96, 96), interpolation="bicubic", crop_pct=0.9, crop_mode=mode, is_training=False)
    ours = Preprocessing(106 if mode == "center" else (106, 106), (96, 96))
    assert np.allclose(ours(image), np.asarray(theirs(image)), atol=1e-6)
    assert Preprocessing.from_dict(json.loads(json.dumps(ours.describe()))) == ours


def test_a_strip_is_cropped_before_it_is_resized() -> None:
    """Resized as a whole, 1 x 60000 pixels would become 248 x 14,880,000."""
    values = np.zeros((60000, 1, 3), np.uint8)
    values[30000:] = 255
    seen = np.asarray(Preprocessing(248, (224, 224)).seen(Image.fromarray(values)))
    assert seen.shape == (224, 224, 3)
    assert seen[0].max() < 127 < seen[-1].min()  # what is kept is less than a pixel high, across the step in the middle
    moderate = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1310, 97, 3), np.uint8))
    whole = moderate.resize((64, int(64 * 1310 / 97)), Image.Resampling.BICUBIC)
    middle = round((whole.height - 64) / 2)
    expected = np.asarray(whole.crop((0, middle, 64, middle + 64)), int)
    assert np.abs(np.asarray(Preprocessing(64, (64, 64)).seen(moderate), int) - expected).max() <= 3


def test_a_picture_is_shown_as_the_model_sees_it() -> None:
    image = hostile.rgb()
    prepare = Preprocessing((32, 48))
    assert np.array_equal(np.asarray(shown(prepare(image), prepare.mean, prepare.std)), np.asarray(image))
    grey = Preprocessing((32, 48), mean=(0.5,), std=(0.5,))
    assert grey(image).shape == (1, 32, 48)


def test_preprocessing_that_makes_no_sense_is_refused() -> None:
    for options, word in (
        ({"resize": 8}, "several sizes"),
        ({"resize": 8, "crop": (9, 9)}, "larger"),
        ({"resize": (8, 8), "resample": "MAGIC"}, "MAGIC"),
        ({"resize": (8, 8), "std": (0.0, 1.0, 1.0)}, "above 0"),
    ):
        with pytest.raises(InputError, match=word):
            Preprocessing(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not \\[C, H, W\\]"):
        Wrapped(np.asarray)(Image.new("L", (3, 3)))


# What is to be explained


def names(given: list[str], content: inputs.Content = "image", column: str | None = None) -> list[str]:
    return [item.name for item in inputs.find(given, content, column).items]


def test_folders_patterns_and_lists_give_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.jpg", "a/sub/y.PNG", "a/notes.txt", "b.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"?")
    Path("list.txt").write_text("b.png\na/sub/y.PNG\n\n")
    assert names(["a"]) == ["a/x.jpg", "a/sub/y.PNG"]
    assert inputs.find(["a"], "image").ignored == 1
    assert names(["a/", "./a/x.jpg", "*.png", "@list.txt"]) == ["a/x.jpg", "a/sub/y.PNG", "b.png"]
    assert names(["a"], "text") == ["a/notes.txt"]
    (missing,) = inputs.find(["none*.png"], "image").items
    with pytest.raises(InputError, match="no file fits"):
        missing.where.load()
    with pytest.raises(InputError, match="list 'no' cannot be read"):
        names(["@no"])


def test_names_that_are_not_utf8_stay_apart(tmp_path: Path) -> None:
    for raw in (b"\xff.png", b"\xfe.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + raw)).write_bytes(b"?")
    found = inputs.find([str(tmp_path)], "image").items
    assert sorted(item.name.rsplit("/")[-1] for item in found) == ["\\xfe.png", "\\xff.png"]
    assert [item.where.load() for item in found] == [b"?", b"?"]


def test_tables_of_paths_and_of_texts(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"picture")
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "text"], ["x.png", "a, film"], ["", ""]])
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n{"other": 1}\n')
    first, second = inputs.find([str(tmp_path / "t.csv")], "image", "path").items
    assert (first.name, first.where.load()) == (f"{tmp_path}/t.csv:0", b"picture")
    with pytest.raises(InputError, match="neither a path nor a picture"):
        second.where.load()
    assert inputs.find([str(tmp_path / "t.csv")], "text", "text").items[0].where.load() == "a, film"
    one, none = inputs.find([str(tmp_path / "t.jsonl")], "text", "text").items
    assert one.where.load() == "one"
    with pytest.raises(InputError, match="there is no 'text', but other"):
        none.where.load()
    with pytest.raises(InputError, match=r"say which column holds .* path, text"):
        names([str(tmp_path / "t.csv")])
    with pytest.raises(InputError, match="there is no column 'picture'; its columns are path, text"):
        names([str(tmp_path / "t.csv")], "image", "picture")


def test_tables_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match=r"t.parquet' is no Parquet file that can be read"):
        names([str(tmp_path / "t.parquet")], "text", "text")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state.json' cannot be read"):
        names([str(tmp_path)], "text", "text")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (tmp_path / "data.arrow").write_bytes(b"no stream")
    with pytest.raises(InputError, match=r"data.arrow' is no Arrow stream that can be read"):
        names([str(tmp_path)], "text", "text")


def test_an_archive_that_ends_too_early_and_cells_that_hold_no_picture_are_named(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.tar").write_bytes(b"12345")
    with pytest.raises(InputError, match="the archive ends 2 bytes too early"):
        inputs.Slice(str(tmp_path / "a.tar"), 3, 4).load()
    pq.write_table(pa.table({"image": [{"bytes": None, "path": None}]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="column 'image' holds NoneType, not a picture's bytes or path"):
        inputs.Cell(str(tmp_path / "t.parquet"), "image", 0).load()
    with pytest.raises(InputError, match=r"t.parquet' has no row 1"):
        inputs.Cell(str(tmp_path / "t.parquet"), "image", 1).load()


def test_pictures_inside_parquet_files_and_data_sets_on_disk(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "x.png").write_bytes(b"outside")
    rows = [{"bytes": b"inside", "path": None}, {"bytes": None, "path": "x.png"}, {"bytes": b"third", "path": ""}]
    table = pa.table({"image": rows, "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (folder / "dataset_info.json").write_text("{}")
    (folder / "x.png").write_bytes(b"outside")
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for given in (tmp_path / "t.parquet", tmp_path / "set"):
        found = inputs.find([str(given)], "image", "image").items
        assert [item.where.load() for item in found] == [b"inside", b"outside", b"third"]
        assert [i.where.load() for i in inputs.find([str(given)], "text", "text").items] == ["a", "b", "c"]
    assert found[0].name == f"{folder}:0"
    (folder / "state.json").write_text('{"_data_files": [], "_indices_files": [{"filename": "i.arrow"}]}')
    with pytest.raises(InputError, match="flatten_indices"):
        names([str(tmp_path / "set")], "image", "image")


def test_tar_shards_are_read_in_place_and_a_torn_one_says_so(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as archive:
        for name, content in (("0.jpg", b"first" * 200), ("0.json", b"{}"), ("deep/1.jpg", b"second" * 200)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = inputs.find([str(shard)], "image")
    assert [(i.name, i.where.load()) for i in found.items] == [
        (f"{shard}/0.jpg", b"first" * 200),
        (f"{shard}/deep/1.jpg", b"second" * 200),
    ]
    assert found.ignored == 1
    shard.write_bytes(shard.read_bytes()[:3100])
    *whole, torn = inputs.find([str(shard)], "image").items
    assert whole[0].where.load() == b"first" * 200
    with pytest.raises(InputError, match=r"too early|not a whole tar"):
        torn.where.load()
    (tmp_path / "s.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match="unpack it"):
        inputs.find([str(tmp_path / "s.tar.gz")], "image").items[0].where.load()


def test_hard_links_in_archives_are_items_and_of_two_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as archive:
        for name, content in (("0.jpg", b"first"), ("1.bin", b"second"), ("0.jpg", b"third")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind, target in (
            ("a.jpg", tarfile.LNKTYPE, "0.jpg"),
            ("b.jpg", tarfile.LNKTYPE, "1.bin"),
            ("c.jpg", tarfile.LNKTYPE, "gone"),
            ("d.jpg", tarfile.SYMTYPE, "0.jpg"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    found = inputs.find([str(shard)], "image")
    *whole, broken = found.items
    assert [(item.name.rsplit("/")[-1], item.where.load()) for item in whole] == [
        ("0.jpg", b"third"),
        ("a.jpg", b"third"),
        ("b.jpg", b"second"),
    ]
    with pytest.raises(InputError, match="a link to 'gone', which is not before it"):
        broken.where.load()
    assert found.ignored == 2  # 1.bin and the symbolic link


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1_open", "2_closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"?")
    scandir = os.scandir

    def denied(path: str) -> Any:  # as root, file modes deny nothing
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    found, closed = inputs.find([str(tmp_path)], "image").items
    assert (found.where.load(), closed.name) == (b"?", str(tmp_path / "2_closed"))
    with pytest.raises(InputError, match="this folder cannot be read: Permission denied"):
        closed.where.load()
    with pytest.raises(InputError, match=r"the folder '.*2_closed' cannot be read: Permission denied"):
        data.read(f"images:{tmp_path}")


def test_a_long_text_in_a_table_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "t.csv").write_text("text\n" + "word " * 40_000 + "\nshort\n")
    long, short = inputs.find([str(tmp_path / "t.csv")], "text", "text").items
    assert (len(long.where.load()), short.where.load()) == (200_000, "short")
    assert csv.field_size_limit() == limit


def test_reading_pictures_and_finding_them_needs_no_torch() -> None:
    """The stages that decode run in processes of their own; what they import is what they cost."""
    source = "\n".join(
        (Path(pictures.__file__).parent / f"{name}.py").read_text() for name in ("pictures", "preprocessing", "inputs")
    )
    assert "import torch" not in source
