"""Pictures and pages say what the numbers say."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastrel
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
    rounded = torch.ones(8, 8) + 1e-7 * torch.rand(8, 8)
    for heat in (torch.ones(8, 8), rounded):
        assert np.array_equal(np.asarray(overlay(picture, heat)), np.asarray(picture))


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


class Both(nn.Module):
    """Token ids [B, T], a picture [B, 3, 8, 8] and numbers [B, 2] -> logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.cut = nn.Embedding(9, 8), nn.Conv2d(3, 8, 4, 4)
        self.words, self.patches = (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        self.head = nn.Linear(18, 2)

    def forward(self, ids: torch.Tensor, picture: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        words, patches = self.words(self.embed(ids)).mean(1), self.patches(self.cut(picture).flatten(2).mT).mean(1)
        return self.head(torch.cat([words, patches, numbers], 1))


WORDS = ["[CLS]", "a", "clever", "film"]


@pytest.fixture(scope="module")
def both() -> fastrel.Explanation:
    given = (torch.tensor([[0, 1, 2, 3]]), torch.rand(1, 3, 8, 8), torch.rand(1, 2))
    return fastrel.Explainer(Both().eval())(*given, target=[[0, 1]])


def test_a_page_shows_every_input_and_by_how_much_it_counts(both: fastrel.Explanation, tmp_path: Path) -> None:
    photo = Image.new("RGB", (40, 40), "grey")
    both.save(tmp_path / "page.html", image=photo, tokens=WORDS, names=["no", "yes"])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h2>") == 2
    for name, one in both.maps.items():
        whole = sum(x.relevance[0, 0].sum() for x in both.maps.values())
        assert f"<h3>{name}: {float(one.relevance[0, 0].sum() / whole):.1%} of the whole</h3>" in page
    assert page.count("<img ") == 2
    assert ">clever</span>" in page
    shares = [float(x) for x in re.findall(r"<h3>\w+: ([\d.]+)% of", page)]
    assert sum(shares[:3]) == pytest.approx(100, abs=0.2)


def test_a_picture_shows_every_input(both: fastrel.Explanation, tmp_path: Path) -> None:
    photo = Image.new("RGB", (40, 40), "grey")
    picture = both.picture({"picture": photo}, tokens={"ids": WORDS}, names=["no", "yes"])
    assert picture.width > 500
    assert len(picture.getcolors(1 << 20)) > 50
    both.save(tmp_path / "both.png", image=photo, tokens=WORDS)
    assert Image.open(tmp_path / "both.png").size == picture.size


def test_what_is_missing_to_show_an_input_is_named(both: fastrel.Explanation) -> None:
    photo = Image.new("RGB", (40, 40))
    with pytest.raises(InputError, match="the map of picture lies on a picture; pass it: image="):
        both.picture(tokens=WORDS)
    twice = dataclasses.replace(both, maps={**both.maps, "more": both.maps["ids"]})
    with pytest.raises(
        InputError, match=r"which input is tokens= for.*ids: tokens; picture: a grid; numbers: tokens; more"
    ):
        twice.picture(photo, tokens=WORDS)
    with pytest.raises(InputError, match="image for 'pixels', but the maps are of ids, picture, numbers"):
        both.picture({"pixels": photo})
    with pytest.raises(InputError, match="2 tokens for ids, whose map has 4"):
        both.picture(photo, tokens={"ids": WORDS[:2]})
    with pytest.raises(InputError, match="style 'lines'; choose blend or contours"):
        both.picture(photo, style="lines")


def test_frames_of_a_film_are_drawn_one_by_one() -> None:
    grid = torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4)
    film = fastrel.Explanation(
        torch.zeros(1, 2), torch.tensor([0]), {"x": fastrel.maps.TokenMap(grid.flatten(1), grid, (24, 32))}, None
    )
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("grey", "grey", "black", "black")]
    picture = film.picture(frames)
    assert picture.width > 1.5 * picture.height
    with pytest.raises(InputError, match="3 pictures for the 2 frames of x"):
        film.picture(frames[:3])
    assert np.array_equal(np.asarray(film.picture(frames[0])), np.asarray(film.picture([frames[0]] * 2)))
