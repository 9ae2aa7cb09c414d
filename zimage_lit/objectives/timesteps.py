"""Laws from which training draws t, in the house clock (0 = noise, 1 = clean).

Papers that count the other way (SD3, Flux: 1 = noise) state their constants for the noise level sigma = 1 − t. The
constants here keep those papers' meaning; only what comes out is t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def uniform(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n times uniform on [0, 1), (n,) float32 on the generator's device."""
    return torch.rand(n, generator=generator, device=_device(generator), dtype=torch.float32)


def logit_normal(n: int, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """n times with logit(sigma) ~ N(mean, std²), (n,) float32: most training effort goes to the middle of the path.

    A positive ``mean`` means more noise. Source: SD3, "rf/lognorm(mean, std)" (Esser et al., arXiv 2403.03206, §3.1).
    """
    logits = mean + std * torch.randn(n, generator=generator, device=_device(generator), dtype=torch.float32)
    return torch.sigmoid(-logits)  # t = 1 − sigmoid(logit sigma), without the cancellation


def shift(t: Tensor, shift: float | Tensor) -> Tensor:
    """Moves times towards noise: sigma' = s·sigma / (1 + (s − 1)·sigma), written for t = 1 − sigma.

    ``shift`` s > 0 is a number or one a sample, shaped like ``t``; 1 changes nothing. Source: SD3, Eq. 23.
    """
    return t / (t + shift * (1 - t))


def resolution_shift(
    num_tokens: Sequence[int] | Tensor,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> Tensor:
    """Shift by the number of image tokens, (n,) float32: a large picture needs more noise to be hidden as well.

    s = exp(mu), mu on the line through (base_tokens, base_shift) and (max_tokens, max_shift), continued beyond both
    ends. Source: Flux' dynamic shift; the defaults are its constants.
    """
    tokens = torch.as_tensor(num_tokens, dtype=torch.float64)
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return torch.exp(base_shift + slope * (tokens - base_tokens)).float()


@dataclass(frozen=True)
class TimestepLaw:
    """How a stage draws its training times; the fields are the keys of a config."""

    name: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0  # of logit(sigma), logit_normal only; positive = more noise
    std: float = 1.0  # of logit(sigma), logit_normal only
    shift: float | Literal["resolution"] = 1.0  # 1 = none, > 1 = more noise, "resolution" = by image tokens
    base_tokens: int = 256  # shift=resolution: image tokens of a small picture
    base_shift: float = 0.5  # shift=resolution: natural logarithm of the shift there
    max_tokens: int = 4096  # shift=resolution: image tokens of a large picture
    max_shift: float = 1.15  # shift=resolution: natural logarithm of the shift there

    def __post_init__(self) -> None:
        if self.name not in ("logit_normal", "uniform"):
            raise ValueError(f"Unknown timestep law name={self.name!r}: use 'logit_normal' or 'uniform'.")
        if not self.std > 0:
            raise ValueError(f"The timestep law's std must be positive, not {self.std}.")
        if isinstance(self.shift, str):
            if self.shift != "resolution":
                raise ValueError(
                    f"The timestep law's shift must be a positive number or 'resolution', not {self.shift!r}."
                )
        elif not (self.shift > 0 and math.isfinite(self.shift)):
            raise ValueError(f"The timestep law's shift must be a positive number or 'resolution', not {self.shift}.")
        if not 0 < self.base_tokens < self.max_tokens:
            raise ValueError(
                f"The timestep law's base_tokens must be positive and below max_tokens, not {self.base_tokens} and "
                f"{self.max_tokens}."
            )
        if not (math.isfinite(self.base_shift) and math.isfinite(self.max_shift)):
            raise ValueError(
                "The timestep law's base_shift and max_shift must be finite, not "
                f"{self.base_shift} and {self.max_shift}."
            )

    def sample(self, num_tokens: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """One t for each sample, (B,) float32 on the generator's device; ``num_tokens``: each sample's image tokens."""
        n = len(num_tokens)
        t = uniform(n, generator) if self.name == "uniform" else logit_normal(n, self.mean, self.std, generator)
        if self.shift == "resolution":
            line = self.base_tokens, self.max_tokens, self.base_shift, self.max_shift
            return shift(t, resolution_shift(num_tokens, *line).to(t.device))
        return shift(t, float(self.shift))


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")
