"""Ratings from wins: the model of Bradley & Terry (1952), fitted to all votes at once.

Model i is preferred to model j with probability 1 / (1 + 10^((r_j − r_i)/400)). The ratings r maximise the likelihood
of the wins, a tie being half a win for each; their mean is 1000. Unlike Elo's, they do not depend on the votes' order.

Such ratings exist if and only if the models cannot be split into two groups of which one never lost to the other (Ford
1957). Where they can, `PRIOR_TIES` drawn votes are added to every pair that was compared, which draws the ratings
together just enough to be finite.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

SCALE = 400.0  # of a difference at which the better one wins
BASE = 10.0  # times as often as the other
CENTRE = 1000.0  # mean of the ratings
PRIOR_TIES = 1.0
ITERATIONS = 200  # of Newton's method, which takes some ten
CONVERGED = 1e-10  # change of a natural strength
Array = NDArray[np.floating]


def ratings(wins: Array, compared: NDArray[np.bool_]) -> Array:
    """(…, M) ratings of (…, M, M) wins, each of the row's model over the column's; ties are half in both places.

    compared: (M, M), symmetric: which pairs the prior is for, where it is needed. All models must hang together by it.
    """
    without_prior = strongly_connected(wins)[..., None, None]
    wins = wins + np.where(without_prior, 0.0, PRIOR_TIES / 2 * compared)
    return CENTRE + SCALE / np.log(BASE) * strengths(wins)


def strengths(wins: Array) -> Array:
    """(…, M) natural logarithms of the models' odds, with mean 0: Newton's method, all matrices at once.

    A step is at most 1 long in any strength: beyond, the curvature at its start says little.
    """
    votes = wins + wins.swapaxes(-1, -2)
    models = wins.shape[-1]
    found = np.zeros(wins.shape[:-1])
    for _ in range(ITERATIONS):
        expected = expit(found[..., :, None] - found[..., None, :])
        gradient = (wins - votes * expected).sum(-1)
        curvature = votes * expected * (1 - expected)
        # all ratings may move together: 1/M in every place keeps their mean at 0 and the matrix regular
        hessian = curvature.sum(-1)[..., None] * np.eye(models) - curvature + 1 / models
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        longest = np.abs(step).max(-1, keepdims=True)
        found = found + step / np.maximum(1.0, longest)
        if longest.max() < CONVERGED:
            return found
    raise ArithmeticError("The ratings did not converge: are the models compared with each other?")


def strongly_connected(wins: Array) -> NDArray[np.bool_]:
    """(…): whether from every model a chain of wins leads to every other, so that ratings without a prior exist."""
    reached = (wins > 0) | np.eye(wins.shape[-1], dtype=bool)
    for _ in range(wins.shape[-1].bit_length()):  # each round doubles the chains' length
        reached = reached.astype(np.float32) @ reached.astype(np.float32) > 0
    return np.asarray(reached.all((-1, -2)))


def connected(compared: NDArray[np.bool_]) -> list[list[int]]:
    """The models in groups that hang together by comparisons, each in order."""
    groups: list[list[int]] = []
    left = set(range(len(compared)))
    while left:
        group = {min(left)}
        while grown := {other for model in group for other in left - group if compared[model, other]}:
            group |= grown
        groups.append(sorted(group))
        left -= group
    return groups


def resampled_ratings(wins_by_prompt: Array, compared: NDArray[np.bool_], resamples: int, seed: int) -> Array:
    """(R, M) ratings of `resamples` draws of P prompts with replacement from (P, M, M) wins: the bootstrap, by prompt.

    Votes on one prompt agree more than votes at large, so prompts are what is drawn.
    """
    prompts, models, _ = wins_by_prompt.shape
    times = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    drawn = (times @ wins_by_prompt.reshape(prompts, -1)).reshape(resamples, models, models)
    return ratings(drawn, compared)


def interval(replicates: Array) -> Sequence[tuple[float, float]]:
    """The middle 95 % of (R, M) replicates, for each of the M."""
    low, high = np.quantile(replicates, (0.025, 0.975), axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))
