"""Files are there whole or not at all, whoever else writes beside them."""

import importlib.util
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
