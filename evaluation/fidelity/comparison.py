"""Drawn pictures against real ones of the same prompts: every distance, with an interval.

Intervals come from resampling prompts, because the pictures of one prompt succeed and fail together. The resamples are
the same for every comparison with as many prompts, so the values of two arms can be paired, resample by resample: see
`ratio`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from evaluation.fidelity.distances import (
    Array,
    covered,
    directions,
    frechet_distance,
    kernel_distance,
    polynomial_kernel,
    projected_wasserstein,
    weighted_mmd,
    within_prompt_distance,
)
from zimage_lit.errors import at_least_one
from zimage_lit.rng import generator

Prompts = NDArray[np.integer]


@dataclass(frozen=True)
class ComparisonSettings:
    """How two sets of pictures are compared. Raises UserError for numbers below 1."""

    kid_subsets: int = 100  # random subsets of pictures over which KID is a mean
    kid_subset_size: int = 1000  # pictures in one; half of all where that is less
    directions: int = 256  # along which pixels are compared
    resamples: int = 200  # of the prompts, for the intervals
    seed: int = 0  # of subsets, directions and resamples

    def __post_init__(self) -> None:
        for name in ("kid_subsets", "kid_subset_size", "directions", "resamples"):
            at_least_one(name, getattr(self, name))


@dataclass(frozen=True)
class PictureSet:
    """N pictures as they are compared: features (N, F), pixels along some directions (N, L), and for each the number
    of its prompt (N,), prompts being counted from 0."""

    features: Array
    projections: Array
    prompts: Prompts


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval, and the values (R,) of the resamples that the interval is made from."""

    value: float
    low: float
    high: float
    replicates: Array

    @classmethod
    def of(cls, value: float, replicates: Array) -> "Estimate":
        """The interval holds the middle 95 % of the replicates after a shift that puts their mean on the value.

        Unshifted, the resamples of a Fréchet or Wasserstein distance lie above it: with pictures counted twice they are
        further from being the distribution than the set itself.
        """
        centred = replicates - replicates.mean() + value
        low, high = np.quantile(centred, (0.025, 0.975))
        return cls(float(value), float(low), float(high), centred)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        replicates = [float(f"{replicate:.6g}") for replicate in self.replicates]
        return {"value": self.value, "low": self.low, "high": self.high, "replicates": replicates}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Estimate":
        return cls(values["value"], values["low"], values["high"], np.array(values["replicates"]))


def ratio(first: Estimate, second: Estimate) -> Estimate:
    """One arm's value as a multiple of the other's, resample paired with resample.

    Raises ValueError where the two were not made from as many resamples, or the divisor may be 0: a KID as small as
    that of two sets of real pictures has no ratio.
    """
    if len(first.replicates) != len(second.replicates):
        raise ValueError("a ratio is of two estimates with as many resamples of the same prompts.")
    if second.low <= 0:
        raise ValueError(f"nothing can be divided by {second.value:.3g}: its interval reaches {second.low:.3g}.")
    replicates = first.replicates / second.replicates
    low, high = np.quantile(replicates, (0.025, 0.975))
    return Estimate(first.value / second.value, float(low), float(high), replicates)


def compare(generated: PictureSet, real: PictureSet, settings: ComparisonSettings) -> dict[str, Estimate]:
    """Each of METRICS, with intervals; raises ValueError unless both sets have as many pictures of each prompt.

    kid, fd (Fréchet distance): of the features, 0 for equal distributions; kid, which has no bias, may fall below it.
    sliced_wasserstein: of the pixels, in grey levels of 0 to 255. precision: share of the drawn pictures that are among
    real ones. recall: share of the real pictures that are among drawn ones. diversity: of the pictures of one prompt,
    where real ones have 1.
    """
    pictures = np.bincount(generated.prompts)
    if not np.array_equal(pictures, np.bincount(real.prompts)):
        raise ValueError("drawn and real pictures must be as many for each prompt.")
    weights = prompt_weights(len(pictures), settings.resamples, settings.seed)
    found = {}
    for name, metric in METRICS.items():
        value, resampled = metric(generated, real, settings)
        found[name] = Estimate.of(value, np.array([resampled(each) for each in weights]))
    return found


def share(right: NDArray[np.bool_], prompts: Prompts, settings: ComparisonSettings) -> Estimate:
    """The share of pictures (N,) that are right, with its interval by prompt."""
    weights = prompt_weights(int(prompts.max()) + 1, settings.resamples, settings.seed)
    return Estimate.of(right.mean(), np.array([np.average(right, weights=each[prompts]) for each in weights]))


def prompt_weights(prompts: int, resamples: int, seed: int) -> Prompts:
    """How often each prompt is drawn when as many are drawn with replacement: (resamples, prompts)."""
    drawn = torch.randint(prompts, (resamples, prompts), generator=generator(seed, "fidelity/resamples"))
    return np.stack([np.bincount(each, minlength=prompts) for each in drawn.numpy()])


# Each gives a metric's value, and a function from the prompts' weights (P,) to its value with them.
Resampled = Callable[[Prompts], float]


def _kid(generated: PictureSet, real: PictureSet, settings: ComparisonSettings) -> tuple[float, Resampled]:
    ours, theirs = generated.features, real.features
    value = kernel_distance(ours, theirs, settings.kid_subsets, settings.kid_subset_size, settings.seed)
    kernels = polynomial_kernel(ours, ours), polynomial_kernel(theirs, theirs), polynomial_kernel(ours, theirs)
    return value, lambda weights: weighted_mmd(*kernels, weights[generated.prompts], weights[real.prompts])


def _fd(generated: PictureSet, real: PictureSet, settings: ComparisonSettings) -> tuple[float, Resampled]:
    ours, theirs = generated.features, real.features
    return frechet_distance(ours, theirs), lambda weights: frechet_distance(
        ours[_rows(generated, weights)], theirs[_rows(real, weights)]
    )


def _sliced_wasserstein(
    generated: PictureSet, real: PictureSet, settings: ComparisonSettings
) -> tuple[float, Resampled]:
    ours, theirs = generated.projections, real.projections
    return projected_wasserstein(ours, theirs), lambda weights: projected_wasserstein(
        ours[_rows(generated, weights)], theirs[_rows(real, weights)]
    )


def _rows(pictures: PictureSet, weights: Prompts) -> Prompts:
    """The rows of a set, each as often as its prompt was drawn."""
    return np.repeat(np.arange(len(pictures.prompts)), weights[pictures.prompts])


def _precision(generated: PictureSet, real: PictureSet, settings: ComparisonSettings) -> tuple[float, Resampled]:
    return _share_covered(generated, real)


def _recall(generated: PictureSet, real: PictureSet, settings: ComparisonSettings) -> tuple[float, Resampled]:
    return _share_covered(real, generated)


def _share_covered(points: PictureSet, support: PictureSet) -> tuple[float, Resampled]:
    """The support is not resampled: a picture counted twice would be its own neighbour."""
    inside = covered(points.features, support.features)
    return float(inside.mean()), lambda weights: float(np.average(inside, weights=weights[points.prompts]))


def _diversity(generated: PictureSet, real: PictureSet, settings: ComparisonSettings) -> tuple[float, Resampled]:
    ours, theirs = (within_prompt_distance(pictures.features, pictures.prompts) for pictures in (generated, real))
    return float(ours.mean() / theirs.mean()), lambda weights: float((weights @ ours) / (weights @ theirs))


METRICS: dict[str, Callable[[PictureSet, PictureSet, ComparisonSettings], tuple[float, Resampled]]] = {
    "kid": _kid,
    "fd": _fd,
    "sliced_wasserstein": _sliced_wasserstein,
    "precision": _precision,
    "recall": _recall,
    "diversity": _diversity,
}


class FidelityMetric(Metric):
    """Collects drawn and real pictures, over batches and processes, and compares them.

    extractor: pictures (B, 3, H, W), float in [-1, 1] -> features (B, F); run without gradients. All pictures have one
    size. What is kept is raw, a row for each picture, so neither shards nor their order change the result.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(
        self, extractor: Callable[[Tensor], Tensor], settings: ComparisonSettings | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.extractor = extractor
        self.settings = settings or ComparisonSettings()
        for kind in ("generated", "real"):
            for part in ("features", "projections", "prompts"):
                self.add_state(f"{kind}_{part}", default=[], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, images: Tensor, prompts: Tensor, real: bool) -> None:
        """images: (B, 3, H, W) float in [-1, 1]. prompts: (B,) int64, numbers from 0, the same for drawn and real."""
        kind = "real" if real else "generated"
        pixels = (images.flatten(1).float().cpu().numpy() + 1) * 127.5
        along = directions(pixels.shape[1], self.settings.directions, self.settings.seed)
        getattr(self, f"{kind}_features").append(self.extractor(images).double())
        getattr(self, f"{kind}_projections").append(torch.from_numpy(pixels @ along).to(images.device))
        getattr(self, f"{kind}_prompts").append(prompts.to(images.device))

    def pictures(self, real: bool) -> PictureSet:
        """What was collected, in an order of its own. Raises ValueError where nothing was."""
        kind = "real" if real else "generated"
        states = [getattr(self, f"{kind}_{part}") for part in ("features", "projections", "prompts")]
        if isinstance(states[0], list) and not states[0]:
            raise ValueError(f"no {kind} pictures were given to compare.")
        features, projections, prompts = (dim_zero_cat(state).cpu().numpy() for state in states)
        order = np.lexsort((features[:, 0], prompts))
        return PictureSet(features[order], projections[order], prompts[order])

    def estimates(self) -> dict[str, Estimate]:
        """See `compare`; of what was collected here, and by `compute` on all processes."""
        return compare(self.pictures(real=False), self.pictures(real=True), self.settings)

    def compute(self) -> dict[str, Tensor]:
        """Each metric's value, and the ends of its interval as `<metric>_low` and `<metric>_high`."""
        found: dict[str, float] = {}
        for name, estimate in self.estimates().items():
            found |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
