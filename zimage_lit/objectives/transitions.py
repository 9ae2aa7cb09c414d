"""One step of a stochastic sampler as a Gaussian, whose density policy gradients need.

Each kernel says where the next latents lie, N(mean, std²), given the present ones x at noise level sigma, the velocity
v there, and the next level sigma_next < sigma. In the house clock, with x̂1 = x + sigma·v the clean sample and
x̂0 = x − (1 − sigma)·v the noise that v points to, h = sigma − sigma_next > 0, and −x̂0/sigma the score:

    kernel      mean                                              std
    flow_sde    x + h·(v − g²/(2·sigma)·x̂0)                       g·√h,  g = level·√(sigma/(1 − sigma))
    dance_sde   x + h·(v − g²/(2·sigma)·x̂0)                       g·√h,  g = level
    cps         (1 − sigma_next)·x̂1 + √(sigma_next² − std²)·x̂0    sigma_next·sin(level·π/2)
    ode         x + h·v                                           0
    renoise     (1 − sigma_next)·x̂1                               sigma_next

The two stochastic differential equations keep the distributions of the path as steps get smaller; cps does not, it
contracts. Sources write dt = −h and a velocity of the opposite sign. They are: Flow-GRPO (arXiv 2505.05470),
DanceGRPO (arXiv 2505.07818), Coefficients-Preserving Sampling (arXiv 2509.05952), DMD2 (arXiv 2405.14867).

x and v: one tensor (B, …) or a list of B tensors of any sizes. sigma and sigma_next: one number for all, or (B,).
What comes out is float32 (float64 if x came so), with the gradient of v.
"""

import math
from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple

import torch
from torch import Tensor

from zimage_lit.errors import UserError
from zimage_lit.objectives.latents import Latents, check_pairs, combine, means
from zimage_lit.sampling.solvers import full_precision

Reduction = Literal["mean", "sum"]


class Transition(NamedTuple, Generic[Latents]):
    """The Gaussian of the next latents."""

    mean: Latents
    std: Tensor  # (B,), one for all elements of a sample


def flow_sde(
    x: Latents,
    v: Latents,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    level: float,
    sigma_max: float | None = None,
) -> Transition[Latents]:
    """Much noise early, little late: g = level·√(sigma/(1 − sigma)); Flow-GRPO's level is 0.7.

    At sigma = 1, where that is infinite, 1 − sigma is taken at ``sigma_max``; None: at sigma_next, as the source does.
    """
    now, after = _of_each(x, sigma), _of_each(x, sigma_next)
    finite = torch.where(now < 1, now, after if sigma_max is None else _of_each(x, sigma_max))
    return _sde(x, v, now, after, level * torch.sqrt(now / (1 - finite)))


def dance_sde(
    x: Latents, v: Latents, sigma: float | Tensor, sigma_next: float | Tensor, level: float
) -> Transition[Latents]:
    """The same noise at all levels: g = level; DanceGRPO's is 0.3."""
    now = _of_each(x, sigma)
    return _sde(x, v, now, _of_each(x, sigma_next), torch.full_like(now, level))


def _sde(x: Latents, v: Latents, sigma: Tensor, sigma_next: Tensor, diffusion: Tensor) -> Transition[Latents]:
    check_pairs(x, v)
    step, pull = sigma - sigma_next, diffusion**2 / (2 * sigma)

    def mean(x: Tensor, v: Tensor, sigma: Tensor, step: Tensor, pull: Tensor) -> Tensor:
        v = v.to(x.dtype)
        return x + step * (v - pull * (x - (1 - sigma) * v))

    return Transition(combine(mean, full_precision(x), v, numbers=[sigma, step, pull]), diffusion * step.sqrt())


def cps(x: Latents, v: Latents, sigma: float | Tensor, sigma_next: float | Tensor, eta: float) -> Transition[Latents]:
    """The mixture of clean sample and noise that the path has at sigma_next, a share of the noise drawn anew.

    ``eta`` in [0, 1]: 0 is the ordinary differential equation, 1 draws all noise anew. The source's log-probability
    leaves out 1/(2·std²): give ``log_prob`` a std of √½ for that, up to a constant.
    """
    check_pairs(x, v)
    now, after = _of_each(x, sigma), _of_each(x, sigma_next)

    def mean(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        v = v.to(x.dtype)
        kept = math.cos(eta * math.pi / 2) * (x - (1 - sigma) * v)
        return (1 - sigma_next) * (x + sigma * v) + sigma_next * kept

    std = math.sin(eta * math.pi / 2) * after
    return Transition(combine(mean, full_precision(x), v, numbers=[now, after]), std)


def ode(
    x: Latents, v: Latents, sigma: float | Tensor, sigma_next: float | Tensor, level: float = 0.0
) -> Transition[Latents]:
    """Euler's step, certain: it has no density. ``level`` is not used; with it all in the table are called alike."""
    return dance_sde(x, v, sigma, sigma_next, 0.0)


def renoise(
    x: Latents, v: Latents, sigma: float | Tensor, sigma_next: float | Tensor, level: float = 1.0
) -> Transition[Latents]:
    """The clean sample, noised again with nothing but fresh noise. ``level`` is not used, as in ``ode``."""
    return cps(x, v, sigma, sigma_next, 1.0)


TRANSITIONS: dict[str, Callable[..., Transition[Any]]] = {
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "cps": cps,
    "ode": ode,
    "renoise": renoise,
}


def velocity_weight(kernel: str, sigma: float, sigma_next: float, level: float) -> float:
    """How much of the velocity is in a kernel's mean: the derivative d mean / d v, one number for a step.

    It is h·(1 + level²/2) for flow_sde (at sigma < 1) and h for ode. A mean is linear in x and v, so its value at x = 0
    and v = 1 tells.
    """
    x = torch.zeros(1, 1, dtype=torch.float64)
    return float(TRANSITIONS[kernel](x, torch.ones_like(x), sigma, sigma_next, level).mean)


def draw(transition: Transition[Latents], noise: Latents) -> Latents:
    """The next latents, mean + std·noise; ``noise``: standard normal, shaped like the mean."""
    check_pairs(transition.mean, noise)
    return combine(lambda mean, z, std: mean + std * z, transition.mean, noise, numbers=[transition.std])


def log_prob(x_next: Latents, mean: Latents, std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Logarithm of the density of x_next under N(mean, std²), (B,) float32.

    ``reduction``: over a sample's elements. "sum" is the density of the whole latent. "mean" divides it by the number D
    of elements, so that it does not depend on the size of the picture; ratios of such densities are the D-th roots of
    the true ones and lie within some 1e-4 of 1, so clip ranges must be as small (published: 1e-5 to 1e-3).
    Raises ValueError for an unknown reduction, and where a std is 0: a certain step has no density.
    """
    check_pairs(x_next, mean)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}.")
    if not bool((std > 0).all()):
        raise ValueError("A transition without noise (std = 0) has no density; leave its step out of the policy loss.")
    squared = means(combine(lambda a, b: (a - b).square(), full_precision(x_next), mean))
    average = -squared / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    if reduction == "mean":
        return average
    return average * torch.tensor([x.numel() for x in mean], device=std.device)


def check_transition(name: str, level: float) -> None:
    """Raise UserError for an unknown kernel, and for a noise level that it cannot have."""
    if name not in TRANSITIONS:
        raise UserError(f"transition must be one of {', '.join(TRANSITIONS)}, not {name}.")
    if name in ("flow_sde", "dance_sde") and not 0 < level < math.inf:
        raise UserError(f"level must be positive and finite for the transition {name}, not {level}.")
    if name == "cps" and not 0 < level <= 1:
        raise UserError(f"level must lie in (0, 1] for the transition cps (1 = all noise drawn anew), not {level}.")


def _of_each(latents: Tensor | list[Tensor], number: float | Tensor) -> Tensor:
    """One number a sample, (B,), in the precision that the latents are computed in."""
    first = latents[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    return torch.as_tensor(number, dtype=dtype, device=first.device).expand(len(latents))
