"""Pairs on the command line, in batches and for the service: two texts, or pictures with texts."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastrel.batch
from fastrel.cli import main
from fastrel.data import inputs
from fastrel.serving.asking import Refusal, asked
from fastrel.serving.service import Service
from tests import tiny


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.bert_folder(tmp_path_factory.mktemp("bert") / "model"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.clip_folder(tmp_path_factory.mktemp("clip") / "model"))


def table(folder: Path, first: str, second: str, rows: list[tuple[str, str]]) -> str:
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([(first, second), *rows])
    return str(folder / "pairs.csv")


def test_two_texts_are_read_as_one_sequence(tmp_path: Path, bert: str) -> None:
    call = ["explain", "--text", "a clever film", "--text-pair", "a film", "--model", bert, "--npz", "--out"]
    assert main([*call, str(tmp_path / "map.html")]) == 0
    page = (tmp_path / "map.html").read_text()
    assert page.count("film") == 2
    tokens = fastrel.batch.Explain(bert)({"text": ["a clever film"], "pair": ["a film"]})["tokens"][0]
    assert np.load(tmp_path / "map.npz")["relevance"].shape == (1, len(tokens))
    assert [token.lower() for token in tokens].count("[sep]") == 2


def test_columns_of_a_table_are_pairs(tmp_path: Path, bert: str) -> None:
    path = table(tmp_path, "premise", "hypothesis", [("a clever film", "a film"), ("a film", "")])
    columns = ["--column", "premise", "--pair-column", "hypothesis"]
    assert main(["batch", path, *columns, "--model", bert, "--out", str(tmp_path / "maps")]) == 1
    results = fastrel.batch.read(tmp_path / "maps")
    assert len(results) == 1
    assert "a text of the pair is empty" in results.failures[f"{path}:1"]
    alone = fastrel.batch.Explain(bert)({"text": ["a clever film"], "pair": ["a film"]})
    np.testing.assert_allclose(results.numpy()["relevance"][0], alone["relevance"][0], rtol=1e-5)
    assert main(["show", str(tmp_path / "maps"), "--out", str(tmp_path / "pages")]) == 0


def test_pictures_with_texts_have_both_maps(tmp_path: Path, clip: str) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    path = table(tmp_path, "photo", "caption", [("red.png", "a clever film")])
    columns = ["--column", "photo", "--pair-column", "caption", "--model", clip]
    assert main(["batch", path, *columns, "--out", str(tmp_path / "maps")]) == 0
    found = fastrel.batch.read(tmp_path / "maps").numpy()
    assert found["target_name"] == ["similarity"]
    assert found["map"].ndim == 3
    assert len(found["relevance"][0]) == len(found["tokens"][0])
    assert main(["explain", path, *columns, "--npz", "--out", str(tmp_path / "pages")]) == 0
    (page,) = (tmp_path / "pages").glob("*.html")
    assert "clever" in page.read_text()
    assert "data:image/png" in page.read_text()
    call = ["explain", str(tmp_path / "red.png"), "--text", "a clever film", "--model", clip, "--npz", "--out"]
    assert main([*call, str(tmp_path / "one.html")]) == 0
    one = np.load(tmp_path / "one.npz")
    np.testing.assert_allclose(one["pixel_values.patches"], found["map"][0], rtol=1e-5)


@pytest.mark.slow
def test_pairs_are_verified(bert: str, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", bert, "--text", "a clever film", "--text-pair", "a film"]) == 0
    assert main(["verify", "--model", clip, "--text", "a clever film"]) == 0
    said = capsys.readouterr().out
    assert "pixel_values" in said
    assert "input_ids" in said


def test_pairs_where_there_are_none_are_refused(
    tmp_path: Path, bert: str, clip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path, "premise", "hypothesis", [("a", "b")])
    (tmp_path / "a.txt").write_text("a film")
    out = ["--out", str(tmp_path / "x.html")]
    gpt = str(tiny.gpt_folder(tmp_path / "gpt"))
    for call, message in (
        (["explain", path, "--column", "premise", "--pair-column", "claim", "--model", bert], "no column 'claim'"),
        (["explain", str(tmp_path / "a.txt"), "--pair-column", "claim", "--model", bert], "is no table"),
        (["explain", "--text-pair", "b", "--model", bert], "--text-pair goes with --text"),
        (["explain", "--text", "a", "--text-pair", " ", "--model", bert], "--text-pair is empty"),
        (["explain", "--text", "a", "--text-pair", "b", "--model", gpt], "no classifier of texts"),
        (["explain", path, "--column", "premise", "--pair-column", "hypothesis", "--model", gpt], "no pairs"),
    ):
        assert main([*call, *out]) == 2
        assert message in capsys.readouterr().err


def test_tables_are_found_as_pairs(tmp_path: Path) -> None:
    path = table(tmp_path, "premise", "hypothesis", [("a", "b")])
    (item,) = inputs.find([path], "text", "premise", "hypothesis").items
    assert item.where.load() == ("a", "b")
    assert inputs.locate(item.name, "text", "premise", "hypothesis") == item


def test_the_service_takes_a_second_text() -> None:
    about: Any = SimpleNamespace(kind="text", classes=2, class_names=("no", "yes"))
    service = Service("none.pt2")

    def ask(body: bytes) -> Any:
        return asked([], "application/json", body, about, service, explains=True)

    assert ask(b'{"text": "a", "text_pair": "b"}').pair == b"b"
    assert ask(b'{"text": "a"}').pair == b""
    with pytest.raises(Refusal, match="is no text"):
        ask(b'{"text": "a", "text_pair": ""}')
    about.kind = "image"
    with pytest.raises(Refusal, match="reads pictures"):
        ask(b'{"image": "YQ==", "text_pair": "b"}')
