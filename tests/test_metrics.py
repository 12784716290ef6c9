"""Scores against small cases worked out by hand, and scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from fastrel import metrics
from fastrel.errors import InputError


def by_left_half(images: torch.Tensor) -> torch.Tensor:
    """Class 1 while the left half of a 4 x 4 picture is on average above 0.3."""
    left = images[:, 0, :, :2].mean((1, 2))
    return torch.stack((torch.full_like(left, 0.3), left), 1)


def test_perturbation_removes_the_most_or_the_least_relevant_first() -> None:
    image = torch.ones(1, 1, 4, 4)
    heat = torch.zeros(1, 4, 4)
    heat[:, :, :2] = 1 + torch.arange(8.0).reshape(4, 2)
    fractions = (0.0, 0.25, 0.375, 0.5, 0.75)
    positive = metrics.perturb(by_left_half, image, heat, torch.tensor([1]), fractions=fractions)
    # 16 pixels: 0, 4, 6, 8, 12 removed, all from the left half's 8 at first: means 1, 0.5, 0.25, 0, 0
    assert positive.accuracy.tolist() == [1, 1, 0, 0, 0]
    negative = metrics.perturb(by_left_half, image, heat, torch.tensor([1]), order="negative", fractions=fractions)
    assert negative.accuracy.tolist() == [1, 1, 1, 1, 1]
    assert positive.auc == pytest.approx(100 * (0.25 + 0.0625))
    assert negative.auc == pytest.approx(75)


def test_perturbation_is_reproducible_and_fills_with_the_baseline() -> None:
    seen = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.flatten(1)[:, :3]

    torch.manual_seed(0)
    image, heat = torch.randn(2, 3, 8, 8), torch.rand(2, 2, 2)
    first, second = (metrics.perturb(model, image, heat, torch.tensor([0, 1]), baseline=-7.0) for _ in range(2))
    assert np.array_equal(first.correct, second.correct)
    assert torch.equal(seen[0], image)
    for step, x in enumerate(seen[:10]):
        assert ((x == -7).all(1).sum((1, 2)) == round(6.4 * step)).all()


def by_sum(images: torch.Tensor) -> torch.Tensor:
    """Two classes whose log-odds are the sum of the pixels."""
    total = images.flatten(1).sum(1)
    return torch.stack((torch.zeros_like(total), total), 1)


def test_deletion_and_insertion_are_areas_under_the_probability() -> None:
    image, target = torch.tensor([[[[3.0, 1.0], [0.0, -2.0]]]]), torch.tensor([1])
    heat = image[:, 0]
    # sums on the way: 2, -1, -2, -2, 0 as pixels go, 0, 3, 4, 4, 2 as they come into an empty picture
    sigmoid = lambda sums: 1 / (1 + np.exp(-np.array(sums, float)))  # noqa: E731
    gone = metrics.deletion(by_sum, image, heat, target, steps=4)
    assert gone == pytest.approx([np.trapezoid(sigmoid([2, -1, -2, -2, 0]), dx=0.25)])
    come = metrics.insertion(by_sum, image, heat, target, steps=4, start=torch.zeros_like(image))
    assert come == pytest.approx([np.trapezoid(sigmoid([0, 3, 4, 4, 2]), dx=0.25)])
    wide = F.interpolate(image, size=(16, 16))
    both = metrics.insertion(by_sum, wide.repeat(2, 1, 1, 1) / 64, torch.cat((heat, -heat)), target.repeat(2))
    assert both[0] > both[1]


def test_road_fills_from_the_neighbours_as_quantus_does() -> None:
    noisy_linear_imputation = pytest.importorskip("quantus.functions.perturb_func").noisy_linear_imputation
    torch.manual_seed(0)
    image = torch.rand(3, 9, 7, dtype=torch.float64)
    gone = torch.rand(9, 7) < 0.6
    gone[0, 0] = gone[8, 3] = True
    filled = metrics.imputed(image, gone, noise=0)
    expected = noisy_linear_imputation(image.numpy().copy(), np.nonzero(gone.flatten().numpy())[0], noise=0)
    assert np.allclose(filled.flatten(), np.asarray(expected).flatten(), atol=1e-10)
    assert torch.equal(filled[:, ~gone], image[:, ~gone])
    assert torch.equal(metrics.imputed(image, torch.zeros_like(gone)), image)
    ramp = torch.arange(81.0, dtype=torch.float64).reshape(1, 9, 9)
    inner = torch.zeros(9, 9, dtype=torch.bool)
    inner[2:7, 2:7] = True
    assert torch.allclose(metrics.imputed(ramp, inner, noise=0), ramp)
    noisy = metrics.imputed(ramp, inner, noise=0.5, seed=3)
    assert torch.equal(noisy, metrics.imputed(ramp, inner, noise=0.5, seed=3))
    assert 0.2 < float((noisy - ramp)[:, inner].std()) < 0.8
    with pytest.raises(InputError, match="an image"):
        metrics.imputed(image, gone[:4])


def test_road_follows_the_probability() -> None:
    image, target = torch.zeros(1, 1, 8, 8, dtype=torch.float64), torch.tensor([1])
    image[..., 2:4, 2:4] = 3.0
    heat = image[:, 0]
    most, least = (
        metrics.road(by_sum, image, heat, target, order=order, fractions=(0.0, 4 / 64), noise=0)[:, 0]
        for order in ("positive", "negative")
    )
    assert most == pytest.approx([1 / (1 + np.exp(-12.0)), 0.5])
    assert least[1] == pytest.approx(most[0], abs=1e-3)
    torch.manual_seed(0)
    images, heats = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.rand(3, 8, 8)
    together = metrics.road(by_sum, images, heats, target.repeat(3))
    assert np.array_equal(together[:, 2:], metrics.road(by_sum, images[2:], heats[2:], target))


def test_sensitivity_n_is_one_where_relevance_adds_up_to_the_logit() -> None:
    torch.manual_seed(0)
    images, target = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 1])
    own = images.sum(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((3, 4))
    found = metrics.sensitivity_n(by_sum, images, own, target, sizes=(1, 5, 15), sets=20)
    assert found == pytest.approx(np.ones((2, 3)))
    assert metrics.sensitivity_n(by_sum, images, -own, target, sizes=(5,), sets=20) == pytest.approx(-np.ones((2, 1)))
    assert not metrics.sensitivity_n(by_sum, images, torch.ones(2, 4, 4), target, sizes=(5,), sets=20).any()
    noise = metrics.sensitivity_n(by_sum, images, torch.randn(2, 4, 4), target, sizes=(5,), sets=50)
    assert (np.abs(noise) < 0.9).all()
    filled = metrics.sensitivity_n(by_sum, images, own, target, sizes=(5,), sets=20, baseline=images.flip(3))
    assert (filled < 1 - 1e-6).all()
    for sizes, sets in (((0,), 20), ((16,), 20), ((3,), 1)):
        with pytest.raises(InputError, match="sizes"):
            metrics.sensitivity_n(by_sum, images, own, target, sizes=sizes, sets=sets)
    with pytest.raises(InputError, match="multiples"):
        metrics.sensitivity_n(by_sum, images, torch.rand(2, 3, 3), target, sizes=(2,), sets=20)


def test_blurring_keeps_a_flat_picture_and_the_mean_of_a_point() -> None:
    flat = torch.full((1, 3, 16, 16), 0.7, dtype=torch.float64)
    assert torch.allclose(metrics.blurred(flat), flat)
    point = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    point[..., 15, 15] = 1
    spread = metrics.blurred(point)
    assert float(spread.sum()) == pytest.approx(1)
    assert float(spread[0, 0, 15, 15] / spread[0, 0, 15, 20]) == pytest.approx(np.exp(0.5))
    assert torch.equal(spread, spread.mT)
    assert not spread[..., :10].any()


def test_the_pointing_game_asks_for_more_than_half_a_patch() -> None:
    heat, mask = torch.zeros(3, 2, 2), torch.zeros(3, 8, 8)
    heat[:, 0, 1] = 1
    mask[0, :4, 4:] = 1
    mask[1, :4, 4:6] = 1  # exactly half of the patch
    mask[2, 4:] = 1
    assert metrics.pointing_game(heat, mask).tolist() == [True, False, False]
    assert metrics.energy_inside(heat, mask).tolist() == [1, 0.5, 0]
    assert metrics.energy_inside(-heat, mask).tolist() == [0, 0, 0]


def test_segmentation_cuts_at_the_mean() -> None:
    heat = torch.tensor([[[0.0, 1.0], [0.0, 0.2]]])
    mask = torch.tensor([[[0, 1], [1, 1]]])
    scores = metrics.segmentation(heat, mask)
    # mean 0.3: one pixel found; object 1 of 3, background 1 of 3
    assert scores.pixel_accuracy[0] == 0.5
    assert scores.mean_iou[0] == pytest.approx((1 / 3 + 1 / 3) / 2)
    truth, values = mask.flatten().numpy(), heat.flatten().numpy()
    expected = (average_precision_score(truth, values) + average_precision_score(1 - truth, -values)) / 2
    assert scores.mean_ap[0] == pytest.approx(expected)


def test_segmentation_of_a_mask_without_object_or_background() -> None:
    for fill in (0, 1):
        scores = metrics.segmentation(torch.rand(1, 2, 2), torch.full((1, 4, 4), fill))
        assert np.isfinite([scores.pixel_accuracy, scores.mean_iou, scores.mean_ap]).all()


def test_rationale_scores() -> None:
    scores, rationale = np.array([0.1, 0.9, 0.8, 0.2, 0.7]), np.array([False, True, False, False, True])
    assert metrics.token_f1(scores, rationale, 2) == 0.5
    assert metrics.token_f1(scores, rationale, 3) == pytest.approx(0.8)
    assert metrics.token_f1(scores, np.zeros(5, bool), 2) == 0
    assert metrics.average_precision(scores, rationale) == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(metrics.average_precision(scores, np.zeros(5, bool)))
    assert metrics.spans(np.array([True, True, False, True])) == [(0, 2), (3, 4)]
    assert metrics.iou_f1([(0, 2), (5, 6)], [(0, 3)]) == pytest.approx(2 * 0.5 / 1.5)
    assert metrics.iou_f1([], [(0, 3)]) == 0


def test_faithfulness_of_a_model_that_reads_one_token() -> None:
    scores = np.array([0.1, 0.9, 0.2])

    def probability(kept: np.ndarray) -> float:
        return 0.9 if kept[1] else 0.2

    assert metrics.comprehensiveness(probability, scores, [1, 2]) == pytest.approx(0.7)
    assert metrics.sufficiency(probability, scores, [1, 2]) == pytest.approx(0)
    assert metrics.comprehensiveness(probability, -scores, [1, 2]) == pytest.approx(0)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"maps \(2, 2, 2\) and target \(1,\) for images \(1, 3, 4, 4\)"):
        metrics.perturb(by_left_half, torch.ones(1, 3, 4, 4), torch.ones(2, 2, 2), torch.tensor([0]))
    with pytest.raises(InputError, match=r"fractions \(2,\)"):
        metrics.perturb(by_left_half, torch.ones(1, 3, 4, 4), torch.ones(1, 2, 2), torch.tensor([0]), fractions=(2,))
    with pytest.raises(InputError, match=r"got \(2, 2\) and \(1, 2, 2\)"):
        metrics.pointing_game(torch.ones(2, 2), torch.ones(1, 2, 2))
    with pytest.raises(InputError, match=r"scores of shape \(3,\) for a rationale of shape \(2,\)"):
        metrics.token_f1(np.ones(3), np.ones(2, bool), 1)


def test_metrics_agree_with_quantus() -> None:
    """Pointing game, relevance mass, and pixel flipping, on maps at the pixels' resolution."""
    quantus = pytest.importorskip("quantus", reason="quantus is not installed")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    heat, masks = rng.random((6, 16, 16)), rng.random((6, 16, 16)) < 0.3
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * 16, 2)).eval()
    images, labels = rng.random((6, 1, 16, 16), np.float32), np.zeros(6, int)
    given = {"model": model, "x_batch": images, "y_batch": labels, "a_batch": heat[:, None], "s_batch": masks[:, None]}
    options = {"normalise": False, "disable_warnings": True}
    ours = metrics.pointing_game(torch.from_numpy(heat), torch.from_numpy(masks))
    assert quantus.PointingGame(**options)(**given) == ours.tolist()
    ours = metrics.energy_inside(torch.from_numpy(heat), torch.from_numpy(masks))
    assert quantus.RelevanceMassAccuracy(**options)(**given) == pytest.approx(ours.tolist(), abs=1e-12)
    flipping = quantus.PixelFlipping(features_in_step=32, perturb_baseline=0.0, **options)
    theirs = np.array(flipping(**given))  # probability after 32, 64, ... of 256 pixels
    curve = metrics.perturb(
        model,
        torch.from_numpy(images),
        torch.from_numpy(heat),
        torch.from_numpy(labels),
        fractions=[step / 8 for step in range(1, 9)],
    )
    assert np.array_equal(curve.correct.T, theirs > 0.5)
    assert 0 < curve.correct.mean() < 1
