"""Distances between sets of pictures: against closed forms, brute-force twins and the other library's values."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from evaluation.fidelity import comparison
from evaluation.fidelity.comparison import (
    METRICS,
    ComparisonSettings,
    Estimate,
    FidelityMetric,
    PictureSet,
    compare,
    prompt_weights,
    ratio,
    share,
)
from evaluation.fidelity.distances import (
    covered,
    directions,
    diversity,
    frechet_distance,
    kernel_distance,
    polynomial_kernel,
    projected_wasserstein,
    sliced_wasserstein,
    weighted_mmd,
    within_prompt_distance,
)
from zimage_lit.errors import UserError

SETTINGS = ComparisonSettings(kid_subsets=10, kid_subset_size=20, directions=32, resamples=60)


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def standardised(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A sample whose mean is 0 and whose covariance is the identity exactly."""
    sample = rng.standard_normal((rows, columns))
    sample -= sample.mean(axis=0)
    return sample @ np.linalg.inv(np.linalg.cholesky(np.cov(sample, rowvar=False))).T


def kid_by_pairs(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD, pair by pair."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3)

    own = [np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    return float(own[0] + own[1] - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def test_frechet_distance_of_gaussians_is_the_closed_form(rng: np.random.Generator) -> None:
    """For commuting covariances: the squared distance of the means, and of the standard deviations."""
    base, scales, shift = standardised(rng, 500, 4), np.array([0.5, 1, 2, 3]), np.array([1.0, 0, -2, 0.5])
    expected = float((shift**2).sum() + ((scales - 1) ** 2).sum())
    assert frechet_distance(base * scales + shift, base) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(base, base) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_that_of_its_twins(rng: np.random.Generator) -> None:
    x = rng.standard_normal((80, 6)) @ rng.standard_normal((6, 6))
    y = rng.standard_normal((90, 6)) @ rng.standard_normal((6, 6)) + 1
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(first @ second).real
    by_hand = float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(first + second - 2 * root))
    assert frechet_distance(x, y) == pytest.approx(by_hand, rel=1e-6)
    other = FrechetInceptionDistance(feature=Identity(6)).set_dtype(torch.float64)
    other.update(torch.from_numpy(x), real=False)
    other.update(torch.from_numpy(y), real=True)
    assert frechet_distance(x, y) == pytest.approx(float(other.compute()), rel=1e-6)


class Identity(torch.nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def test_kid_of_gaussians_is_the_closed_form() -> None:
    """In one dimension E(xy + 1)³ is a polynomial of the moments, and so is the MMD; KID has no bias."""

    def expected(first: tuple[float, float], second: tuple[float, float]) -> float:
        (m, a), (n, b) = first, second
        cubes = (m**3 + 3 * m * a**2) * (n**3 + 3 * n * b**2)
        return 1 + 3 * m * n + 3 * (m**2 + a**2) * (n**2 + b**2) + cubes

    x, y = (0.3, 0.5), (-0.2, 0.8)
    closed_form = expected(x, x) + expected(y, y) - 2 * expected(x, y)
    rng = np.random.default_rng(1)
    found = [
        kernel_distance(x[0] + x[1] * rng.standard_normal((200, 1)), y[0] + y[1] * rng.standard_normal((200, 1)), 20)
        for _ in range(40)
    ]
    assert abs(np.mean(found) - closed_form) < 3 * np.std(found) / 40**0.5
    assert np.std(found) / 40**0.5 < 0.1 * closed_form


def test_kid_is_that_of_its_twins(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((12, 3)), rng.standard_normal((12, 3)) + 0.4
    kernels = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    whole = weighted_mmd(*kernels, np.ones(12), np.ones(12))
    assert whole == pytest.approx(kid_by_pairs(x, y), rel=1e-9)
    assert whole == pytest.approx(float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y))), rel=1e-9)
    # the mean over subsets goes to the whole: each pair of pictures is as likely as any other
    subsets = kernel_distance(x, y, subsets=4000, subset_size=6)
    assert subsets == pytest.approx(whole, rel=0.05)
    assert kernel_distance(x, y, subsets=3, subset_size=6, seed=1) == kernel_distance(x, y, 3, 1000, seed=1)
    assert kernel_distance(x, y, subsets=3, seed=1) != kernel_distance(x, y, subsets=3, seed=2)


def test_kid_counts_a_picture_as_often_as_its_weight_says(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((5, 2)), rng.standard_normal((4, 2))
    weights, others = np.array([2, 0, 1, 3, 1]), np.array([1, 2, 0, 1])
    kernels = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    rows, other_rows = np.repeat(np.arange(5), weights), np.repeat(np.arange(4), others)
    own = [
        np.mean([kernel[i, j] for i in chosen for j in chosen if i != j])
        for kernel, chosen in zip(kernels, (rows, other_rows), strict=False)
    ]
    expected = own[0] + own[1] - 2 * kernels[2][rows][:, other_rows].mean()
    assert weighted_mmd(*kernels, weights, others) == pytest.approx(expected, rel=1e-9)


def test_the_line_has_its_own_wasserstein_distance() -> None:
    """On a line the distance of two sets of one size is that of the sorted values; of a shift, the shift."""
    x = np.random.default_rng(2).standard_normal((50, 1))
    assert sliced_wasserstein(x + 3, x) == pytest.approx(3, rel=1e-5)
    assert sliced_wasserstein(np.array([[0.0], [1.0]]), np.array([[5.0], [0.0]])) == pytest.approx(8**0.5)
    assert sliced_wasserstein(x, x[::-1]) == pytest.approx(0, abs=1e-6)
    scaled = np.sqrt(np.square(x).mean())  # the best map from x to 2 x moves every value by itself
    assert sliced_wasserstein(2 * x, x) == pytest.approx(float(scaled), rel=1e-5)


def test_sliced_wasserstein_of_gaussians_is_the_closed_form(rng: np.random.Generator) -> None:
    """Along every direction a shift is its projection, and a factor s moves by s − 1 standard deviations."""
    base = standardised(rng, 4000, 8)
    shifted = sliced_wasserstein(base + 2, base, count=2000)
    assert shifted == pytest.approx(2, rel=0.05)  # a change of all values by c is c
    assert sliced_wasserstein(3 * base, base, count=50) == pytest.approx(2 * (3999 / 4000) ** 0.5, rel=1e-5)
    along = directions(8, 5, seed=1)
    assert np.allclose(np.linalg.norm(along, axis=0), 1, atol=1e-6) and not np.allclose(along, directions(8, 5, seed=2))
    with pytest.raises(ValueError, match="sets of one size have a sliced distance"):
        projected_wasserstein(base[:3], base[:4])


def test_precision_and_recall_are_those_of_their_twins(rng: np.random.Generator) -> None:
    real, drawn = rng.standard_normal((60, 3)), 0.8 * rng.standard_normal((50, 3)) + 0.5

    def by_hand(points: np.ndarray, support: np.ndarray) -> list[bool]:
        def distance(a: np.ndarray, b: np.ndarray) -> float:
            return float(np.sqrt(((a - b) ** 2).sum()))

        radii = [
            sorted(distance(row, other) for j, other in enumerate(support) if j != i)[2]
            for i, row in enumerate(support)
        ]
        return [any(distance(p, row) <= r for row, r in zip(support, radii, strict=True)) for p in points]

    assert covered(drawn, real).tolist() == by_hand(drawn, real)
    assert covered(real, drawn).tolist() == by_hand(real, drawn)
    other = prc_features_to_metric(torch.from_numpy(drawn), torch.from_numpy(real), verbose=False)
    assert covered(drawn, real).mean() == pytest.approx(other["precision"])
    assert covered(real, drawn).mean() == pytest.approx(other["recall"])
    assert covered(real, real).all() and not covered(real + 100, real).any()
    with pytest.raises(ValueError, match="more than 3 pictures"):
        covered(real, real[:3])


def test_one_good_picture_has_precision_and_no_recall(rng: np.random.Generator) -> None:
    real = rng.standard_normal((100, 2))
    drawn = real[:1] + 1e-3 * rng.standard_normal((100, 2))
    assert covered(drawn, real).mean() > 0.9 and covered(real, drawn).mean() < 0.05


def test_diversity_is_the_mean_distance_within_a_prompt_by_that_of_real_pictures() -> None:
    features = np.array([[0.0, 0], [3, 4], [0, 8], [1, 1], [1, 2]])
    prompts = np.array([0, 0, 0, 1, 1])
    spread = within_prompt_distance(features, prompts)
    assert spread == pytest.approx([(5 + 8 + 5) / 3, 1])
    assert diversity(features / 2, prompts, features, prompts) == pytest.approx(0.5)
    assert diversity(np.zeros_like(features), prompts, features, prompts) == 0
    order = np.array([3, 0, 4, 2, 1])
    assert within_prompt_distance(features[order], prompts[order]) == pytest.approx(spread)
    assert np.isnan(within_prompt_distance(features[:4], prompts[:4])[1])


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="four pictures"):
        kernel_distance(np.ones((3, 2)), np.ones((9, 2)))
    with pytest.raises(ValueError, match="two pictures"):
        frechet_distance(np.ones((1, 2)), np.ones((9, 2)))


def sets(rng: np.random.Generator, shift: float, prompts: int = 30, each: int = 4) -> PictureSet:
    numbers = np.repeat(np.arange(prompts), each)
    centres = np.random.default_rng(7).standard_normal((prompts, 5))[numbers]
    features = centres + rng.standard_normal((len(numbers), 5)) + shift
    return PictureSet(features, (features @ directions(5, 16)), numbers)


def test_a_comparison_holds_the_distances_and_intervals_around_them(rng: np.random.Generator) -> None:
    real, drawn = sets(rng, 0), sets(rng, 0.5)
    found = compare(drawn, real, SETTINGS)
    assert list(found) == list(METRICS)
    assert found["kid"].value == kernel_distance(drawn.features, real.features, 10, 20, 0)
    assert found["fd"].value == frechet_distance(drawn.features, real.features)
    assert found["sliced_wasserstein"].value == projected_wasserstein(drawn.projections, real.projections)
    assert found["precision"].value == covered(drawn.features, real.features).mean()
    assert found["recall"].value == covered(real.features, drawn.features).mean()
    assert found["diversity"].value == diversity(drawn.features, drawn.prompts, real.features, real.prompts)
    for estimate in found.values():
        assert estimate.low < estimate.value < estimate.high
        assert estimate.replicates.mean() == pytest.approx(estimate.value)
    again = compare(drawn, real, SETTINGS)
    assert all(np.array_equal(again[name].replicates, found[name].replicates) for name in found)


def test_intervals_are_as_wide_as_the_metric_varies() -> None:
    """Over 40 draws of both sets, the true spread of each metric is within half and twice of what intervals say."""
    rng = np.random.default_rng(5)
    comparisons = [compare(sets(rng, 0.3), sets(rng, 0), SETTINGS) for _ in range(40)]
    for name in METRICS:
        spread = np.std([found[name].value for found in comparisons])
        said = np.mean([np.std(found[name].replicates) for found in comparisons])
        assert 0.5 < said / spread < 2.5, (name, said, spread)


def test_prompts_are_resampled_and_not_pictures() -> None:
    weights = prompt_weights(6, 400, seed=3)
    assert weights.shape == (400, 6) and (weights.sum(axis=1) == 6).all()
    assert np.array_equal(weights, prompt_weights(6, 400, seed=3)) and abs(weights.mean(axis=0) - 1).max() < 0.15
    pictures = PictureSet(np.arange(6.0)[:, None], np.zeros((6, 1)), np.array([0, 0, 1, 1, 2, 2]))
    assert comparison._rows(pictures, np.array([2, 0, 1])).tolist() == [0, 0, 1, 1, 4, 5]


def test_a_share_has_the_interval_of_its_prompts() -> None:
    """All pictures of a prompt alike: as wide as for one picture a prompt, by the binomial's closed form."""
    settings = ComparisonSettings(resamples=2000)
    right = np.repeat(np.arange(100) < 30, 4)
    found = share(right, np.repeat(np.arange(100), 4), settings)
    assert found.value == pytest.approx(0.3)
    assert np.std(found.replicates) == pytest.approx((0.3 * 0.7 / 100) ** 0.5, rel=0.1)


def test_sets_of_other_prompts_are_not_compared(rng: np.random.Generator) -> None:
    real = sets(rng, 0)
    with pytest.raises(ValueError, match="as many for each prompt"):
        compare(sets(rng, 0, each=3), real, SETTINGS)


def test_a_ratio_pairs_resample_with_resample() -> None:
    replicates = np.linspace(1, 3, 41)
    base = Estimate.of(2.0, replicates)
    assert ratio(Estimate.of(3.0, 1.5 * replicates), base).low == pytest.approx(1.5)  # whatever the resample
    assert ratio(base, base).value == 1
    with pytest.raises(ValueError, match="interval reaches"):
        ratio(base, Estimate.of(0.1, replicates - 1.9))
    with pytest.raises(ValueError, match="as many resamples"):
        ratio(base, Estimate.of(2.0, replicates[1:]))


def test_an_estimate_survives_json() -> None:
    estimate = Estimate.of(0.25, np.array([0.1, 0.2, 0.6]))
    back = Estimate.from_dict(json.loads(json.dumps(estimate.as_dict())))
    assert (back.value, back.low, back.high) == (estimate.value, estimate.low, estimate.high)
    assert back.replicates == pytest.approx(estimate.replicates, rel=1e-5)


class Means(torch.nn.Module):
    """Stands for the classifier: the mean of each quarter of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def test_neither_batches_nor_shards_nor_their_order_change_the_result() -> None:
    images = torch.rand(2, 24, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prompts = torch.arange(24) // 4
    whole = FidelityMetric(Means(), SETTINGS)
    for kind in (0, 1):
        whole.update(images[kind], prompts, real=bool(kind))
    shards = FidelityMetric(Means(), SETTINGS)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    for start, end in pairwise((0, 5, 6, 24)):
        for kind in (1, 0):
            shards.update(images[kind][order[start:end]], prompts[order[start:end]], real=bool(kind))
    found, other = whole.compute(), shards.compute()
    assert set(found) == {f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")}
    assert all(float(found[name]) == pytest.approx(float(other[name]), rel=1e-6) for name in found)
    drawn = whole.pictures(real=False)
    assert drawn.features.shape == (24, 12) and drawn.projections.shape == (24, 32)
    levels = ((images[0].flatten(1) + 1) * 127.5).numpy()
    assert sliced_wasserstein(levels, ((images[1].flatten(1) + 1) * 127.5).numpy(), 32) == pytest.approx(
        float(found["sliced_wasserstein"]), rel=1e-4
    )
    with pytest.raises(ValueError, match="no generated pictures"):
        FidelityMetric(Means()).pictures(real=False)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="resamples must be at least 1"):
        ComparisonSettings(resamples=0)
