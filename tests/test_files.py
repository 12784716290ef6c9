"""Files are there whole or not at all, whoever else writes beside them."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
from PIL import UnidentifiedImageError

from fastrel.data import files


def elsewhere() -> ModuleType:
    """The module as another machine has it: its own state, and perhaps the same process number."""
    assert files.__spec__ is not None
    assert files.__spec__.loader is not None
    module = importlib.util.module_from_spec(files.__spec__)
    files.__spec__.loader.exec_module(module)
    return module


def test_two_machines_that_share_a_folder_do_not_write_to_one_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "_settings.json"
    with elsewhere().replaced(target) as first, elsewhere().replaced(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_wrong_is_said_in_the_file_s_own_name_or_as_it_was_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/gone/x\.png'"):
        files.write(tmp_path / "gone" / "x.png", b"")
    with pytest.raises(UnidentifiedImageError, match=r"^no picture$"), files.replaced(tmp_path / "x.png"):
        raise UnidentifiedImageError("no picture")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_of_several_who_create_a_file_the_first_one_s_stays(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "_settings.json"

    def another_one_first(source: str, name: Path) -> None:
        monkeypatch.undo()
        files.create(target, "first")
        if not links:
            raise PermissionError(1, "Operation not permitted")
        os.link(source, name)

    monkeypatch.setattr(os, "link", another_one_first)
    files.create(target, "second")
    assert target.read_text() == "first"
    files.create(target, "third")
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_created_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(source: str, name: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    files.create(tmp_path / "x", "only")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "only")]
