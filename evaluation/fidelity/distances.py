"""How far a set of drawn pictures is from a set of real ones, as pure functions of their features or pixels.

Sets are arrays (N, D), one row a picture; nothing here knows the network that made the features. KID and the Fréchet
distance are torch-fidelity's, computed in float64.

Sources: KID: Bińkowski et al. 2018, section 4. Fréchet distance: Heusel et al. 2017, section 3. Improved precision and
recall: Kynkäänniemi et al. 2019, section 3. Sliced Wasserstein distance: Bonneel et al. 2015, section 2.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from zimage_lit.rng import generator

Array = NDArray[np.floating]
NEIGHBOURS = 3  # k of precision and recall


def kernel_distance(generated: Array, real: Array, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """KID: the unbiased squared MMD of the features under the cubic kernel, a mean over random subsets.

    A subset has `subset_size` pictures of each set, or half of the smaller set where that is less. 0 for equal
    distributions, and below 0 by chance. Raises ValueError for fewer than four pictures.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric  # takes seconds

    smaller = min(len(generated), len(real))
    if smaller < 4:
        raise ValueError(f"KID needs four pictures of each set at least, not {smaller}.")
    settings = {"kid_subsets": subsets, "kid_subset_size": min(subset_size, smaller // 2)}
    found = kid_features_to_metric(_tensor(generated), _tensor(real), **settings, rng_seed=seed, verbose=False)
    return float(found[KEY_METRIC_KID_MEAN])


def polynomial_kernel(first: Array, second: Array) -> Array:
    """KID's kernel (x·y / D + 1)³ of every pair of rows, (N, M)."""
    return (np.asarray(first, dtype=np.float64) @ np.asarray(second, dtype=np.float64).T / first.shape[1] + 1) ** 3


def weighted_mmd(
    within_generated: Array, within_real: Array, across: Array, generated_weights: Array, real_weights: Array
) -> float:
    """The unbiased squared MMD from kernels (N, N), (M, M), (N, M); each picture counts as often as its weight says.

    A picture that is counted twice is never paired with itself, which would be no pair of independent pictures: that
    keeps the value without bias when pictures are resampled.
    """
    means = []
    for kernel, weights in ((within_generated, generated_weights), (within_real, real_weights)):
        pairs = weights.sum() ** 2 - np.square(weights).sum()
        means.append((weights @ kernel @ weights - np.square(weights) @ np.diagonal(kernel)) / pairs)
    crossed = generated_weights @ across @ real_weights / (generated_weights.sum() * real_weights.sum())
    return float(sum(means) - 2 * crossed)


def frechet_distance(generated: Array, real: Array) -> float:
    """The squared Fréchet distance of the two Gaussians that have the sets' means and covariances.

    Finite sets give more than their distributions would: compare only values of sets of the same size. Raises
    ValueError for fewer than two pictures.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    if min(len(generated), len(real)) < 2:
        raise ValueError("the Fréchet distance needs two pictures of each set at least.")
    statistics = [fid_features_to_statistics(_tensor(features)) for features in (generated, real)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def _tensor(features: Array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(features, dtype=np.float64))


def covered(points: Array, support: Array, neighbours: int = NEIGHBOURS) -> NDArray[np.bool_]:
    """Which points lie in the support's manifold: no further from some row of it than that row's k-th neighbour, (N,).

    Precision is the mean of `covered(generated, real)`, recall that of `covered(real, generated)`. Raises ValueError
    where the support has no k neighbours.
    """
    if len(support) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} pictures of each set, not {len(support)}.")
    radii = np.sort(_distances(support, support), axis=1)[:, neighbours]  # the nearest is the row itself
    return np.any(_distances(points, support) <= radii, axis=1)


def _distances(first: Array, second: Array) -> Array:
    exact = "donot_use_mm_for_euclid_dist"  # the faster way loses what makes equal rows equal
    return torch.cdist(_tensor(first), _tensor(second), compute_mode=exact).numpy()


def directions(dimensions: int, count: int, seed: int = 0) -> Array:
    """`count` random directions of unit length as columns, (dimensions, count) float32: a pure function."""
    drawn = torch.randn(dimensions, count, generator=generator(seed, "fidelity/directions"))
    return (drawn / drawn.norm(dim=0)).numpy()


def projected_wasserstein(generated: Array, real: Array) -> float:
    """The sliced Wasserstein-2 distance of two sets of as many rows from their projections (N, L) on L directions.

    The root of the mean over the directions of the squared distance on the line, which sorting gives. Raises ValueError
    for sets of different sizes.
    """
    if generated.shape != real.shape:
        raise ValueError(f"sets of one size have a sliced distance, not {generated.shape} and {real.shape}.")
    return float(np.sqrt(np.square(np.sort(generated, axis=0) - np.sort(real, axis=0)).mean()))


def sliced_wasserstein(generated: Array, real: Array, count: int = 256, seed: int = 0) -> float:
    """Of two sets (N, D) as they are, on `count` random directions.

    In the units of the values: of pixels in 0 to 255, a change of all by c is a distance of about c.
    """
    along = directions(generated.shape[1], count, seed)
    return projected_wasserstein(generated @ along, real @ along)


def within_prompt_distance(features: Array, prompts: NDArray[np.integer]) -> Array:
    """Mean distance between two pictures of the same prompt, for the prompts 0, 1, 2 and so on: (P,).

    prompts: (N,), the prompt of each row. nan where a prompt has one picture or none.
    """
    found = np.full(int(prompts.max()) + 1, np.nan)
    for prompt in range(len(found)):
        own = features[prompts == prompt]
        if len(own) > 1:
            found[prompt] = _distances(own, own).sum() / (len(own) * (len(own) - 1))
    return found


def diversity(
    generated: Array, generated_prompts: NDArray[np.integer], real: Array, real_prompts: NDArray[np.integer]
) -> float:
    """Mean distance between pictures of the same prompt, divided by that of real pictures of the same prompts.

    1 for pictures as different as real ones, 0 for the same picture again and again. More than 1 is no virtue: noise
    is different every time.
    """
    ours = within_prompt_distance(generated, generated_prompts)
    return float(ours.mean() / within_prompt_distance(real, real_prompts).mean())
