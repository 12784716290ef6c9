"""`fastrel explain PICTURE --text TEXT`: both maps of a model that reads them together."""

from pathlib import Path

import pytest
from PIL import Image

from fastrel.cli import main
from tests import tiny


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 40), "red").save(path)
    return str(path)


def test_a_picture_and_a_text_are_explained_together(
    tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny.clip_folder(tmp_path / "clip"))
    call = ["explain", picture, "--text", "a clever film", "--model", folder, "--out"]
    assert main([*call, str(tmp_path / "map.html")]) == 0
    said = capsys.readouterr().out
    assert "similarity of" in said
    assert "pixel_values" in said
    assert "input_ids" in said
    page = (tmp_path / "map.html").read_text()
    assert "clever" in page
    assert "data:image/png" in page
    assert main([*call, str(tmp_path / "map.png")]) == 0
    assert Image.open(tmp_path / "map.png").width > 40


def test_what_does_not_go_together_is_said(tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny.clip_folder(tmp_path / "clip"))
    for more, message in (
        (["--out", "maps"], "must name an .html or .png file, not 'maps'"),
        (["--out", "m.html", "--target", "3"], "--target 3: of a picture and a text"),
        (["--out", "m.html", "--classes", "a film"], "give it without --text"),
    ):
        assert main(["explain", picture, "--text", "a film", "--model", folder, *more]) == 2
        assert message in capsys.readouterr().err
