"""Pictures and pages say what the numbers say."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastrel.errors import InputError
from fastrel.render import as_picture, contours, overlay, page, side_by_side, words


def test_the_overlay_tints_where_the_map_is_high_and_nowhere_else() -> None:
    picture = Image.fromarray(np.full((8, 8, 3), 100, np.uint8))
    heat = torch.zeros(8, 8)
    heat[2, 3] = 1
    result = np.asarray(overlay(picture, heat)).astype(int)
    changed = (result != 100).any(2)
    assert changed[2, 3]
    assert changed.sum() == 1


def test_contours_surround_the_peak() -> None:
    picture = Image.fromarray(np.full((60, 80, 3), 100, np.uint8))
    y, x = np.mgrid[:60, :80]
    heat = np.exp(-((y - 20) ** 2 + (x - 50) ** 2) / 100)
    result = np.asarray(contours(picture, heat)).astype(int)
    assert result.shape == (60, 80, 3)
    changed = (result != 100).any(2)
    assert not changed[20, 50]
    assert changed[20, 50:].any()
    assert changed[:20, 50].any()
    assert not changed[40:].any()
    assert np.array_equal(np.asarray(contours(picture, np.ones((60, 80)))), np.asarray(picture))


def test_a_constant_map_leaves_the_picture_alone() -> None:
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("RGB")
    assert np.array_equal(np.asarray(overlay(picture, torch.ones(8, 8))), np.asarray(picture))


def test_a_map_of_another_size_is_an_error() -> None:
    with pytest.raises(InputError, match=r"a map of shape \(4, 4\) does not fit a picture of 8 x 8"):
        overlay(Image.new("RGB", (8, 8)), torch.ones(4, 4))


def test_pictures_of_every_kind() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    expected = np.asarray(Image.fromarray(grey).convert("RGB"))
    kinds = (
        Image.fromarray(grey),
        grey,
        grey / 255,
        torch.from_numpy(grey)[None] / 255,
        np.stack([grey] * 3, 2),
        torch.from_numpy(grey)[None].expand(3, 8, 8) / 255,
    )
    for image in kinds:
        assert np.array_equal(np.asarray(as_picture(image)), expected)
    with pytest.raises(InputError, match=r"shape \(2, 8, 8, 3\)"):
        as_picture(np.zeros((2, 8, 8, 3)))


def test_side_by_side_has_a_panel_per_map() -> None:
    picture = Image.new("RGB", (32, 32))
    one, three = (side_by_side(picture, [torch.rand(32, 32)] * n, ["a"] * n) for n in (1, 3))
    assert three.width == 2 * one.width
    assert three.height == one.height


def test_sub_words_are_joined_and_count_as_the_highest() -> None:
    found = words(["[CLS]", "grip", "##ping", "film", "[SEP]"], torch.tensor([9.0, 1.0, 3.0, 2.0, 9.0]))
    assert found == [("gripping", 3.0), ("film", 2.0)]
    found = words(["<s>", "a", "Ġgrip", "ping", "Ġfilm", "</s>"], torch.tensor([9.0, 1.0, 1.0, 3.0, 2.0, 9.0]))
    assert found == [("a", 1.0), ("gripping", 3.0), ("film", 2.0)]
    found = words(["▁a", "▁grip", "ping"], torch.tensor([1.0, 4.0, 3.0]))
    assert found == [("a", 1.0), ("gripping", 4.0)]


def test_the_page_escapes_its_text_and_needs_nothing_else() -> None:
    text = page(["<b>", "&"], torch.tensor([[1.0, 0.0]]), ["<i>"])
    assert "&lt;b&gt;" in text
    assert "&lt;i&gt;" in text
    assert "http" not in text
    assert "<b>" not in text


def test_a_page_without_words_or_relevance() -> None:
    assert "<p></p>" in page(["[CLS]"], torch.tensor([[1.0]]), ["x"])
    assert "0 %" in page(["word"], torch.tensor([[0.0]]), ["x"])
