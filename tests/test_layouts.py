"""Where tokens lie: frames, volumes, patches made by convolutions, by unfolding and by rearranging give one and the same map."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrel
from fastrel import InputError

D, PATCH = 16, 4


class Body(nn.Module):
    """Tokens [B, T, D] -> logits [B, 3]: one block without positions, so that the order of tokens does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x)[:, 0])


class Patches(nn.Module):
    """Pictures [B, 3, H, W] -> logits; patches are cut by `cut`, whose last dimension runs over channels, rows, columns."""

    def __init__(self, cut: Callable[[Tensor], Tensor] | None, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.body = nn.Conv2d(3, D, PATCH, PATCH), Body()
        self.norm = nn.LayerNorm(3 * PATCH * PATCH, elementwise_affine=False) if norm else nn.Identity()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        if self.cut is None:
            return self.body(self.convolution(x).flatten(2).mT)
        tokens = F.linear(self.norm(self.cut(x)), self.convolution.weight.flatten(1), self.convolution.bias)
        return self.body(tokens.flatten(1, -2))


def blocks(x: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, gh, gw, 3, P, P]."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)


def slices(x: Tensor) -> list[Tensor]:
    """The patches of [B, 3, H, W], row by row, [B, 3, P, P] each."""
    rows, columns = range(0, x.shape[2], PATCH), range(0, x.shape[3], PATCH)
    return [x[:, :, i : i + PATCH, j : j + PATCH] for i in rows for j in columns]


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a size of the batch in Python": lambda x: blocks(x).reshape(len(x), -1, 3 * PATCH * PATCH),
    "unfold": lambda x: F.unfold(x, PATCH, stride=PATCH).mT,
    "rearranged": lambda x: blocks(x).flatten(3).flatten(1, 2),
    "rearranged, columns first": lambda x: blocks(x).transpose(1, 2).flatten(3).flatten(1, 2),
    "rearranged, a grid": lambda x: blocks(x).flatten(3),
    "Tensor.unfold": lambda x: x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2),
    "slices, stacked": lambda x: torch.stack([p.flatten(1) for p in slices(x)], 1),
    "slices, joined": lambda x: torch.cat([p.reshape(len(p), 1, -1) for p in slices(x)], 1),
    "split twice": lambda x: torch.stack([p.flatten(1) for row in x.split(PATCH, 2) for p in row.split(PATCH, 3)], 1),
    "normalised before": lambda x: blocks((x - 0.0) / 1.0).flatten(3).flatten(1, 2),
}  # fmt: skip


@pytest.fixture
def pictures() -> Tensor:
    return torch.randn(2, 3, 3 * PATCH, 5 * PATCH, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("cut", CUTS)
def test_patches_have_one_grid_however_they_are_cut(cut: str, pictures: Tensor) -> None:
    model = Patches(CUTS[cut]).double().eval()
    expected = fastrel.Explainer(Patches(None).double().eval())(pictures, target=1)
    found = fastrel.Explainer(model)(pictures, target=1)
    torch.testing.assert_close(found.patches, expected.patches)
    assert found.patches.shape == (2, 3, 5)
    assert found.heatmap().shape == (2, 12, 20)


#: The same tokens [B, T, D] from what the convolution gives [B, D, gh, gw].
TURNS: dict[str, Callable[[Tensor], Tensor]] = {
    "movedim": lambda y: y.movedim(1, 3).flatten(1, 2),
    "movedim of several": lambda y: y.movedim((2, 3), (1, 2)).flatten(1, 2),
    "moveaxis": lambda y: torch.moveaxis(y, 1, -1).flatten(1, 2),
    "swapaxes": lambda y: y.flatten(2).swapaxes(-1, -2),
    "swapdims": lambda y: y.flatten(2).swapdims(2, 1),
    "t": lambda y: y.flatten(2).flatten(1).t().t().view(y.shape[0], D, -1).mT,
    "T": lambda y: y.flatten(2).permute(2, 1, 0).T.mT.contiguous(),
}


@pytest.mark.parametrize("turn", TURNS)
def test_dimensions_are_followed_however_they_are_turned(turn: str, pictures: Tensor) -> None:
    model, plain = Patches(None).double().eval(), Patches(None).double().eval()
    model.forward = lambda x: model.body(TURNS[turn](model.convolution(x)))  # type: ignore[method-assign]
    expected = fastrel.Explainer(plain)(pictures, target=1)
    torch.testing.assert_close(fastrel.Explainer(model)(pictures, target=1).patches, expected.patches)


@pytest.mark.parametrize(("window", "padding"), [(PATCH, "valid"), (3, "same"), (4, "same"), ((4, 3), "same")])
def test_padding_in_words_is_padding_in_numbers(window: Any, padding: str, pictures: Tensor) -> None:
    model = Patches(None).double().eval()
    stride = PATCH if padding == "valid" else 1
    model.convolution = nn.Conv2d(3, D, window, stride, padding).double()
    before = nn.Conv2d(D, D, 3, padding=padding).double()
    model.forward = lambda x: model.body(before(model.convolution(x)).flatten(2).mT)  # type: ignore[method-assign]
    explainer = fastrel.Explainer(model)
    report = explainer.verify(pictures, target=1)
    assert report.ok, str(report)
    assert not report.generic
    found = explainer(pictures, target=1)
    assert found.patches.shape[1:] == before(model.convolution(pictures)).shape[2:]


def test_a_norm_over_patches_hides_no_grid(pictures: Tensor) -> None:
    patches = fastrel.Explainer(Patches(CUTS["rearranged"], norm=True).double().eval())(pictures, target=1)
    columns = fastrel.Explainer(Patches(CUTS["rearranged, columns first"], norm=True).double().eval())(pictures, target=1)
    torch.testing.assert_close(patches.patches, columns.patches)


def test_shuffled_patches_have_no_grid(pictures: Tensor) -> None:
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    shuffled = Patches(lambda x: CUTS["rearranged"](x)[:, order])
    explanation = fastrel.Explainer(shuffled.double().eval())(pictures, target=1)
    assert explanation.relevance.shape == (2, 15)
    with pytest.raises(InputError, match="do not lie on an image"):
        _ = explanation.patches


class Film(nn.Module):
    """Films [B, T, 3, H, W], each frame a sample of an encoder of pictures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.block = nn.Conv2d(3, D, PATCH, PATCH), nn.TransformerEncoderLayer(D, 2, 32, batch_first=True)
        self.head = nn.Linear(D, 3)

    def frame(self, x: Tensor) -> Tensor:
        return self.block(self.convolution(x).flatten(2).mT).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frame(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))


def test_frames_in_the_batch_have_a_map_each() -> None:
    model = Film().double().eval()
    film = torch.randn(2, 4, 3, 8, 12, dtype=torch.double)
    explainer = fastrel.Explainer(model)
    explanation = explainer(film, target=[1, 2])
    assert explanation.patches.shape == (2, 4, 2, 3)
    assert explanation.heatmap().shape == (2, 4, 8, 12)
    assert explanation.relevance.shape == (2, 24)
    torch.testing.assert_close(explanation.patches.flatten(1), explanation.relevance)
    report = explainer.verify(film, target=[1, 2])
    assert report.ok, report

    still = film[:, :1].expand_as(film).contiguous()
    maps = explainer(still, target=[1, 2]).patches
    for frame in range(1, 4):
        torch.testing.assert_close(maps[:, frame], maps[:, 0])  # frames that are alike have maps that are


def test_a_batch_of_films_is_what_each_gives() -> None:
    explainer = fastrel.Explainer(Film().double().eval())
    films = torch.randn(3, 4, 3, 8, 12, dtype=torch.double)
    together = explainer(films, target=1).patches
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], explainer(films[i : i + 1], target=1).patches)


def test_a_volume_has_slices_of_patches() -> None:
    torch.manual_seed(0)

    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.body = nn.Conv3d(1, D, 4, 4), Body()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.convolution(x).flatten(2).mT)

    explainer = fastrel.Explainer(Volume().double().eval())
    volume = torch.randn(2, 1, 8, 12, 16, dtype=torch.double)
    explanation = explainer(volume, target=1)
    assert explanation.patches.shape == (2, 2, 3, 4)
    torch.testing.assert_close(explanation.patches.flatten(1), explanation.relevance)
    assert explanation.heatmap().shape == (2, 2, 12, 16)
    assert explainer.verify(volume).ok


def test_a_film_of_videomae_has_frames_of_patches() -> None:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.VideoMAEConfig(**small, image_size=32, patch_size=8, num_frames=4, tubelet_size=2)
    model = transformers.VideoMAEForVideoClassification(config).eval()
    explanation = fastrel.Explainer(model)(pixel_values=torch.randn(2, 4, 3, 32, 32), target=[[0, 1], [1, 0]])
    assert explanation.patches.shape == (2, 2, 2, 4, 4)
    assert explanation.heatmap().shape == (2, 2, 2, 32, 32)


class Frames(Film):
    """Frames before samples in one dimension."""

    def forward(self, x: Tensor) -> Tensor:
        frames = self.frame(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0]))
        return self.head(frames.mean(0))


def test_frames_before_samples_are_told_from_them() -> None:
    films = torch.randn(2, 3, 3, 8, 12, dtype=torch.double)
    before, after = fastrel.Explainer(Frames().double().eval()), fastrel.Explainer(Film().double().eval())
    explanation = before(films, target=1)
    assert explanation.patches.shape == (2, 3, 2, 3)
    torch.testing.assert_close(explanation.patches, after(films, target=1).patches)
    for i in range(2):
        torch.testing.assert_close(explanation.patches[i : i + 1], before(films[i : i + 1], target=1).patches)


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": lambda x: x.flip(-1),
    "turned": lambda x: x.transpose(2, 3),
    "cropped": lambda x: x[..., PATCH:],
    "rolled": lambda x: x.roll(3, -1),
}


@pytest.mark.parametrize("move", MOVED)
def test_a_picture_that_the_model_moves_first_has_no_grid(move: str, pictures: Tensor) -> None:
    class Moving(Patches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(MOVED[move](x))

    explanation = fastrel.Explainer(Moving(None).double().eval())(pictures, target=1)
    with pytest.raises(InputError, match="do not lie on an image"):
        _ = explanation.patches


SIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "smaller": lambda x: F.interpolate(x, size=(8, 16), mode="bilinear", antialias=True),
    "larger": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "other proportions": lambda x: F.interpolate(x, size=(20, 20), mode="bicubic", align_corners=True),
}


@pytest.mark.parametrize("size", SIZED)
def test_a_picture_of_another_size_keeps_its_grid_unless_a_part_is_cut_out(size: str, pictures: Tensor) -> None:
    class Sized(Patches):
        def __init__(self, begin: int) -> None:
            super().__init__(None)
            self.begin = begin

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(SIZED[size](x[..., self.begin :]))

    expected = tuple(n // PATCH for n in SIZED[size](pictures).shape[2:])
    assert fastrel.Explainer(Sized(0).double().eval())(pictures, target=1).patches.shape[1:] == expected
    with pytest.raises(InputError, match="do not lie on an image"):
        _ = fastrel.Explainer(Sized(6).double().eval())(pictures, target=1).patches


@pytest.mark.parametrize("sides", [(0, 2 * PATCH, 0, 0), (PATCH, PATCH, 2 * PATCH, 0), (3, 2, 0, 0)])
def test_of_a_picture_that_the_model_normalises_and_pads_the_grid_is_what_lies_in_it(
    sides: tuple[int, ...], pictures: Tensor
) -> None:
    class Normalising(Patches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad((x - 0.1) / 2, sides))

    explanation = fastrel.Explainer(Normalising(None).double().eval())(pictures, target=1)
    height, width = (12 + sum(sides[2:])) // PATCH, (20 + sum(sides[:2])) // PATCH
    every = explanation.relevance.unflatten(1, (height, width))
    left, top = sides[0] // PATCH, sides[2] // PATCH
    columns = -(-(sides[0] + 20) // PATCH) - left
    torch.testing.assert_close(explanation.patches, every[:, top : top + 3, left : min(left + columns, width)])


def test_only_a_picture_that_is_whole_has_patches_by_a_layer(pictures: Tensor) -> None:
    def patches(x: Tensor) -> Tensor:
        return x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    assert fastrel.Explainer(Patches(patches).double().eval())(pictures, target=1).patches.shape == (2, 3, 5)
    for cut in (lambda x: x[..., PATCH:], lambda x: x[..., :-PATCH], lambda x: x[..., PATCH:, :]):
        explanation = fastrel.Explainer(Patches(lambda x, cut=cut: patches(cut(x))).double().eval())(pictures, target=1)
        with pytest.raises(InputError, match="do not lie on an image"):
            _ = explanation.patches


def test_patches_that_lie_across_one_another_have_no_grid(pictures: Tensor) -> None:
    dilated = Patches(lambda x: x.reshape(len(x), 3, PATCH, 3, PATCH, 5).permute(0, 3, 5, 1, 2, 4).flatten(3).flatten(1, 2))
    with pytest.raises(InputError, match="do not lie on an image"):
        _ = fastrel.Explainer(dilated.double().eval())(pictures, target=1).patches


def test_pictures_with_channels_last_have_their_own_size(pictures: Tensor) -> None:
    class Both(Patches):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + self.body(self.convolution(y.permute(0, 3, 1, 2)).flatten(2).mT)

    maps = fastrel.Explainer(Both(None).double().eval())(pictures, pictures.permute(0, 2, 3, 1).contiguous(), target=1).maps
    assert [one.image_size for one in maps.values()] == [(12, 20)] * 2
    torch.testing.assert_close(maps["x"].patches, maps["y"].patches)


class MultiQuery(nn.Module):
    """A class token for `len(x)` samples, and keys and values that all heads share, merged with the queries by einsum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.cls, self.head = nn.Embedding(20, 32), nn.Parameter(torch.randn(1, 1, 32)), nn.Linear(32, 2)
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 16)]) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(ids), -1, -1), self.embed(ids)], 1)
        for query, key_value in self.blocks:  # type: ignore[misc]
            q, (k, v) = query(x).unflatten(-1, (4, 8)), key_value(x).split(8, -1)
            attn = (torch.einsum("bthd,bsd->bhts", q, k) / 8**0.5).softmax(-1)
            x = x + torch.einsum("bhts,bsd->bthd", attn, v).flatten(2)
        return self.head(x[:, 0])


def test_a_single_sample_is_a_batch() -> None:
    """Whose dimension of size 1 was lost in a reshape, so that heads merged with queries were not found."""
    ids = torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(1))
    explainer = fastrel.Explainer(MultiQuery().double().eval())
    maps = explainer(ids, target=1).relevance
    alone = torch.cat([explainer(one[None], target=1).relevance for one in ids])
    torch.testing.assert_close(alone, maps, rtol=1e-10, atol=1e-12)


class Series(nn.Module):
    """Numbers [B, 24] -> logits by tokens of four numbers each, after a token of the model's own or without."""

    def __init__(self, cut: Callable[[Tensor], Tensor], cls: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.cls = nn.Linear(4, D), Body(), nn.Parameter(torch.randn(1, 1, D)) if cls else None
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(self.cut(x))
        return self.body(tokens if self.cls is None else torch.cat([self.cls.expand(x.shape[0], -1, -1), tokens], 1))


WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "split, stacked": lambda x: torch.stack(x.split(4, 1), 1),
    "chunks, stacked": lambda x: torch.stack(x.chunk(6, 1), 1),
    "slices, stacked": lambda x: torch.stack([x[:, i : i + 4] for i in range(0, 24, 4)], 1),
    "slices, joined": lambda x: torch.cat([x[:, None, i : i + 4] for i in range(0, 24, 4)], 1),
    "chunks, joined": lambda x: torch.cat(x[:, None].chunk(6, 2), 1),
    "halves of halves": lambda x: torch.stack([y for half in x.chunk(2, 1) for y in half.split(4, 1)], 1),
    "layers of their own": lambda x: torch.stack([F.linear(y, torch.eye(4, dtype=x.dtype)) for y in x.split(4, 1)], 1),
}


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("cut", WINDOWS)
def test_tokens_are_made_of_parts_of_the_input(cut: str, cls: bool) -> None:
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(2)).double()
    expected = fastrel.Explainer(Series(lambda x: x.view(x.shape[0], 6, 4), cls).double().eval())(x, target=1).relevance
    found = fastrel.Explainer(Series(WINDOWS[cut], cls).double().eval())(x, target=1).relevance
    assert found.shape == (2, 6 + cls)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_windows_that_overlap_are_tokens_as_unfolded() -> None:
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(2)).double()
    expected = fastrel.Explainer(Series(lambda x: x.unfold(1, 4, 2), True).double().eval())(x, target=1).relevance
    model = Series(lambda x: torch.stack([x[:, i : i + 4] for i in range(0, 21, 2)], 1), True).double().eval()
    torch.testing.assert_close(fastrel.Explainer(model)(x, target=1).relevance, expected, rtol=1e-10, atol=1e-10)


class Words(nn.Module):
    """One table of words -> logits, of [B, 3] or of three inputs [B]."""

    def __init__(self, joined: Callable[[list[Tensor]], Tensor] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.joined = nn.Embedding(9, D), Body(), joined

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        if self.joined is None:
            return self.body(self.embed(a))
        assert b is not None
        assert c is not None
        return self.body(self.joined([self.embed(x) for x in (a, b, c)]))


@pytest.mark.parametrize(
    "joined", [lambda xs: torch.stack(xs, 1), lambda xs: torch.cat([x[:, None] for x in xs], 1)], ids=["stack", "cat"]
)
def test_inputs_of_one_word_each_are_tokens(joined: Callable[[list[Tensor]], Tensor]) -> None:
    words = torch.tensor([[1, 2, 3], [4, 0, 8]])
    expected = fastrel.Explainer(Words(None).double().eval())(words, target=1).relevance
    maps = fastrel.Explainer(Words(joined).double().eval())(*words.unbind(1), target=1).maps
    found = torch.cat([maps[name].relevance for name in "abc"], 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_copies_are_features_and_no_tokens() -> None:
    """Members over the same tokens, stacked, are no sequence."""

    class Members(nn.Module):
        def __init__(self, stacked: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.body, self.stacked = nn.Embedding(9, D), Body(), stacked

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            x = x + self.body.block(x)
            parts = [x[:, 1:] * 2, x[:, 1:]]
            y = torch.stack(parts, 1).mean(1) if self.stacked else (parts[0] + parts[1]) / 2
            return self.body.head(y[:, 0])

    ids = torch.tensor([[1, 2, 3, 4], [4, 0, 8, 5]])
    expected, found = (fastrel.Explainer(Members(s).double().eval())(ids, target=1).relevance for s in (False, True))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [lambda x: x.shape[0], len], ids=["shape[0]", "len"])
def test_texts_folded_into_the_batch_are_refused_in_words(size: Callable[[Tensor], int]) -> None:
    class Choices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cls, self.score = nn.Embedding(9, D), nn.Parameter(torch.zeros(1, 1, D)), nn.Linear(D, 1)
            self.block = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids.view(-1, ids.shape[2]))
            x = self.block(torch.cat([self.cls.expand(size(x), -1, -1), x], 1))[:, 0]
            return self.score(x).view(ids.shape[0], ids.shape[1])

    with pytest.raises(fastrel.UnsupportedModelError, match="12 samples and the prediction 3"):
        fastrel.Explainer(Choices().eval())(torch.randint(0, 9, (3, 4, 5)))


class Grey(nn.Module):
    """A grey picture [B, 1, 12, 12], its quarters as channels of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Conv2d(4, D, 2, 2), Body()

    def forward(self, x: Tensor) -> Tensor:
        quarters = torch.cat([x[:, :, i::2, j::2] for i in range(2) for j in range(2)], 1)
        return self.body(self.stem(quarters).flatten(2).mT)


def test_channels_of_a_grey_picture_are_no_tokens() -> None:
    x = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(3)).double()
    report = fastrel.Explainer(Grey().double().eval(), backend="torch").verify(x, target=1)
    assert report.ok, report
    assert report.maps == {"x": "(9,) tokens, on a grid of 3 × 3 patches"}


class Shots(nn.Module):
    """Several pictures of a sample by one encoder, folded into the batch, of which the first is read."""

    def __init__(self, channels: int, fold: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.body, self.fold = nn.Conv2d(channels, D, PATCH, PATCH), Body(), fold

    def forward(self, *x: Tensor) -> Tensor:
        pictures = self.fold(*x)
        return self.body(self.convolution(pictures).flatten(2).mT).unflatten(0, (len(x[0]), -1))[:, 0]


GREY: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "frames": (1, lambda x: x.unsqueeze(2).flatten(0, 1)),
    "slices": (1, lambda x: x.reshape(-1, 1, *x.shape[2:])),
    "slices, three times": (3, lambda x: x.flatten(0, 1).unsqueeze(1).expand(-1, 3, -1, -1)),
}


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("kind", GREY)
def test_pictures_without_channels_keep_their_maps_apart(kind: str, count: int) -> None:
    channels, fold = GREY[kind]
    x = torch.randn(2, count, 12, 20, dtype=torch.double)
    explainer = fastrel.Explainer(Shots(channels, fold).double().eval())
    explanation = explainer(x, target=1)
    assert explanation.patches.shape == (2, count, 3, 5)
    assert not explanation.patches[:, 1:].any()
    picture = Shots(channels, fold).double().eval()
    torch.testing.assert_close(explanation.patches[:, 0], fastrel.Explainer(picture)(x[:, :1], target=1).patches)
    assert explainer.verify(x, target=1).ok


def test_views_that_are_stacked_and_folded_keep_their_maps_apart(pictures: Tensor) -> None:
    other = torch.randn_like(pictures)
    explainer = fastrel.Explainer(Shots(3, lambda *x: torch.stack(x, 1).flatten(0, 1)).double().eval())
    maps = explainer(pictures, other, target=1).maps
    assert [float(one.relevance.sum()) > 0 for one in maps.values()] == [True, False]
    assert explainer.verify(pictures, other, target=1).ok


PARTED: dict[str, Callable[[Tensor, int], Any]] = {
    "chunks": lambda z, _: z.chunk(2),
    "slices": lambda z, count: (z[:count], z[count:]),
    "a dimension": lambda z, count: z.view(2, count, -1),
}


@pytest.mark.parametrize("parts", PARTED)
def test_inputs_that_are_joined_along_the_batch_are_refused(parts: str, pictures: Tensor) -> None:
    """Which of its samples are one the graph does not say."""

    class Joined(Patches):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            u, w = PARTED[parts](super().forward(torch.cat([x, y])), len(x))
            return (u - w).square()

    said = "joined along the batch; call its encoder for each input by itself|cannot follow tokens through .*; where no"
    with pytest.raises(fastrel.UnsupportedModelError, match=said):
        fastrel.Explainer(Joined(None).double().eval())(pictures, pictures.flip(0), target=1)


class Sequences(nn.Module):
    """Ids -> logits by blocks that take sequences first; `turned` makes [T, B, D] of an embedding and ids [B, T], or of several."""

    def __init__(self, turned: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.turned = nn.Embedding(9, D), nn.Linear(D, 3), turned
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 32), 2, enable_nested_tensor=False)

    def forward(self, *ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.turned(self.embed, *ids))[0])


TEXTS = torch.randint(0, 9, (3, 7), generator=torch.Generator().manual_seed(4))

#: The same sequences [T, B, D].
TURNED_TEXTS: dict[str, Callable[..., Tensor]] = {
    "T": lambda embed, ids: embed(ids.T),
    "transpose, contiguous": lambda embed, ids: embed(ids.transpose(0, 1).contiguous()),
    "movedim": lambda embed, ids: embed(ids.movedim(1, 0)),
    "a size of the batch in Python": lambda embed, ids: embed(ids.T.clamp(0, 8)).view(-1, int(ids.shape[0]), D),
}


@pytest.mark.parametrize("turn", TURNED_TEXTS)
def test_ids_may_be_turned_before_they_are_looked_up(turn: str) -> None:
    explainer = fastrel.Explainer(Sequences(TURNED_TEXTS[turn]).double().eval())
    after = fastrel.Explainer(Sequences(lambda embed, ids: embed(ids).transpose(0, 1)).double().eval())
    found = explainer(TEXTS, target=1).relevance
    torch.testing.assert_close(found, after(TEXTS, target=1).relevance)
    alone = torch.cat([explainer(one[None], target=1).relevance for one in TEXTS])
    torch.testing.assert_close(alone, found, rtol=1e-10, atol=1e-12)


def test_turned_ids_are_verified() -> None:
    report = fastrel.Explainer(Sequences(TURNED_TEXTS["T"]).double().eval()).verify(TEXTS, target=1)
    assert report.ok, report


@pytest.mark.parametrize(
    "joined",
    [
        lambda embed, a, b: embed(torch.cat([a, b], 1).T),
        lambda embed, a, b: embed(torch.cat([a.T, b.T])),
        lambda embed, a, b: embed(torch.cat([a.new_ones(1, a.shape[0]), a.T, b.T])),
    ],
    ids=["joined, turned", "turned, joined", "after a token of the model's own"],
)
def test_joined_ids_that_are_turned_have_a_map_each(joined: Callable[..., Tensor]) -> None:
    maps = fastrel.Explainer(Sequences(joined).double().eval())(TEXTS[:, :3], TEXTS[:, 3:], target=1).maps
    found = torch.cat([one.relevance for one in maps.values()], 1)
    more = found.shape[1] - TEXTS.shape[1]
    expected = fastrel.Explainer(Sequences(lambda embed, ids: embed(ids).transpose(0, 1)).double().eval())
    whole = torch.cat([torch.ones(3, more, dtype=torch.long), TEXTS], 1)
    torch.testing.assert_close(found, expected(whole, target=1).relevance)
    assert [one.relevance.shape[1] for one in maps.values()] == [3 + more, 4]


class Variates(nn.Module):
    """Series [B, 12, V] whose variates are the tokens -> a number per variate [B, V], or a horizon [B, 5, V], or logits [B, 5]."""

    def __init__(self, form: str, embed: str = "a layer") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.series, self.head = nn.Linear(12, D), nn.Linear(D, 1 if form in ("one", "residual") else 5)
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, 2, 32, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
        )
        self.form, self.embed = form, embed

    def tokens(self, x: Tensor) -> Tensor:
        if self.embed == "a convolution":
            return F.conv1d(x, self.series.weight[..., None], self.series.bias).mT
        if self.embed == "a product":
            return x.mT @ self.series.weight.T + self.series.bias
        return self.series(x if self.embed == "as they come" else x.transpose(1, 2))

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        tokens = self.tokens(x) if more is None else torch.cat([self.tokens(x), self.tokens(more)], 1)
        z = self.head(self.blocks(tokens))
        if self.form == "residual":
            return z.squeeze(-1) + x[:, -1]
        return {"one": lambda: z.squeeze(-1), "horizon": lambda: z.mT, "logits": lambda: z.mean(1)}[self.form]()


SERIES = torch.randn(3, 12, 6, generator=torch.Generator().manual_seed(5)).double()


@pytest.mark.parametrize("embed", ["a layer", "a convolution", "a product"])
def test_variates_that_are_tokens_have_the_map_of_tokens(embed: str) -> None:
    expected = fastrel.Explainer(Variates("logits", "as they come").double().eval())(SERIES.mT.contiguous(), target=1)
    found = fastrel.Explainer(Variates("logits", embed).double().eval())(SERIES, target=1)
    torch.testing.assert_close(found.relevance, expected.relevance)


@pytest.mark.parametrize(("form", "embed"), [("one", "a convolution"), ("residual", "a layer"), ("horizon", "a layer")])
def test_an_output_of_a_variate_is_explained_from_there(form: str, embed: str) -> None:
    target: Any = (lambda out: out[:, 1, 2]) if form == "horizon" else 2
    explainer = fastrel.Explainer(Variates(form, embed).double().eval())
    report = explainer.verify(SERIES, target=target)
    assert report.ok, report
    found = explainer(SERIES, target=target).relevance
    assert found.shape == (3, 6)
    assert (found.argmax(1) == 2).all()
    alone = torch.cat([explainer(one[None], target=target).relevance for one in SERIES])
    torch.testing.assert_close(alone, found, rtol=1e-10, atol=1e-12)


def test_variates_of_two_inputs_have_a_map_each() -> None:
    maps = fastrel.Explainer(Variates("one").double().eval())(SERIES[..., :4], SERIES[..., 4:], target=2).maps
    whole = fastrel.Explainer(Variates("one").double().eval())(SERIES, target=2).relevance
    torch.testing.assert_close(torch.cat([one.relevance for one in maps.values()], 1), whole)


class TokensMixedFirst(nn.Module):
    """More layers over tokens than over features, before attention over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixing, self.body = nn.ModuleList(nn.Linear(6, 6) for _ in range(9)), Body()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.mixing:
            x = x + layer(x.mT).mT
        return self.body(x)


def test_layers_over_tokens_do_not_make_features_of_them() -> None:
    x = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(6)).double()
    report = fastrel.Explainer(TokensMixedFirst().double().eval()).verify(x, target=1)
    assert report.ok, report
    assert report.maps == {"x": "(6,) tokens"}
