"""Distributions for which flow matching is known in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Mixture:
    """A Gaussian mixture, for which the marginal velocity of flow matching is known in closed form.

    x1 ~ Σ_k weights_k · N(means_k, stds_k² I); weights and stds (K,), means (K, D).
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """E[x1 − x0 | x_t = x] for x (N, D): each component's linear field, weighed by its posterior at x."""
        variance = t**2 * self.stds**2 + (1 - t) ** 2  # of x_t given the component
        offset = x[:, None] - t * self.means  # (N, K, D)
        log_density = -offset.square().sum(-1) / (2 * variance) - x.shape[1] / 2 * variance.log()
        posterior = torch.softmax(self.weights.log() + log_density, dim=1)
        slope = (t * self.stds**2 - (1 - t)) / variance
        return (posterior[..., None] * (self.means + slope[:, None] * offset)).sum(1)

    def mean(self) -> Tensor:
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        centred = self.means - self.mean()
        within = (self.weights * self.stds**2).sum() * torch.eye(self.means.shape[1], dtype=self.means.dtype)
        return within + torch.einsum("k,ki,kj->ij", self.weights, centred, centred)

    def cumulative(self, x: Tensor) -> Tensor:
        """Distribution function in one dimension, x (N,)."""
        return (self.weights * torch.special.ndtr((x[:, None] - self.means[:, 0]) / self.stds)).sum(1)


def two_dimensional() -> Mixture:
    return Mixture(
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        means=torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]], dtype=torch.float64),
        stds=torch.tensor([0.4, 0.7, 0.3], dtype=torch.float64),
    )


def one_dimensional() -> Mixture:
    return Mixture(
        weights=torch.tensor([0.6, 0.4], dtype=torch.float64),
        means=torch.tensor([[1.0], [-1.2]], dtype=torch.float64),
        stds=torch.tensor([0.8, 0.6], dtype=torch.float64),
    )
