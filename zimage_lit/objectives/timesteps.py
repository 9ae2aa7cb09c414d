"""Laws from which training draws t, in the house clock (0 = noise, 1 = clean).

Papers that count the other way (SD3, Flux: 1 = noise) state their constants for the noise level sigma = 1 − t. The
constants here keep those papers' meaning; only what comes out is t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.special
import torch
from torch import Tensor

from zimage_lit.errors import UserError


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

    # grid = the times at which a distilled student is asked, for tuning it without losing its few steps
    name: Literal["logit_normal", "uniform", "grid"] = "logit_normal"
    mean: float = 0.0  # of logit(sigma), logit_normal only; positive = more noise
    std: float = 1.0  # of logit(sigma), logit_normal only
    shift: float | Literal["resolution"] = 1.0  # 1 = none, > 1 = more noise, "resolution" = by image tokens
    base_tokens: int = 256  # shift=resolution: image tokens of a small picture
    base_shift: float = 0.5  # shift=resolution: natural logarithm of the shift there
    max_tokens: int = 4096  # shift=resolution: image tokens of a large picture
    max_shift: float = 1.15  # shift=resolution: natural logarithm of the shift there
    num_inference_steps: int = 8  # grid only: steps that the student is served with; shift must be its, too

    def __post_init__(self) -> None:
        if self.name not in ("logit_normal", "uniform", "grid"):
            raise ValueError(f"Unknown timestep law name={self.name!r}: use 'logit_normal', 'uniform' or 'grid'.")
        if self.num_inference_steps < 1:
            raise ValueError(
                f"The timestep law's num_inference_steps must be at least 1, not {self.num_inference_steps}."
            )
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
        t = self._unshifted(len(num_tokens), generator)
        if self.shift == "resolution":
            line = self.base_tokens, self.max_tokens, self.base_shift, self.max_shift
            return shift(t, resolution_shift(num_tokens, *line).to(t.device))
        return shift(t, float(self.shift))

    def _unshifted(self, n: int, generator: torch.Generator | None) -> Tensor:
        if self.name == "uniform":
            return uniform(n, generator)
        if self.name == "grid":
            steps = torch.randint(self.num_inference_steps, (n,), generator=generator, device=_device(generator))
            return steps / self.num_inference_steps
        return logit_normal(n, self.mean, self.std, generator)


@dataclass(frozen=True)
class RenoiseLaw:
    """How noisy a student's clean sample is made again, for teacher and fake score to judge; fields are config keys.

    Constants are stated for sigma. Sources: DMD2 (uniform), Decoupled DMD (cleaner), DMDR (beta, "DynaRS").
    Raises UserError for settings that make no sense.
    """

    # uniform = all levels; cleaner = only below the student's present one; beta = anneals from beta_start to beta_end
    name: Literal["uniform", "cleaner", "beta"] = "uniform"
    low: float = 0.02  # cleanest level that is kept; what falls below is moved here
    high: float = 0.98  # noisiest level that is kept
    shift: float = 1.0  # 1 = none, > 1 = more noise; for cleaner that of the student's own steps
    # cleaner only. True: drawn evenly before the shift, as Z-Image was distilled. False: drawn evenly after it
    shifted: bool = True
    beta_start: tuple[float, float] = (4.0, 1.5)  # beta only: its two exponents at first, mean sigma 0.73
    beta_end: tuple[float, float] = (1.0, 1.0)  # beta only: the same in the end; (1, 1) is uniform
    anneal_steps: int = 10_000  # beta only: steps of the student until the end

    def __post_init__(self) -> None:
        if self.name not in ("uniform", "cleaner", "beta"):
            raise UserError(f"The re-noise law's name must be uniform, cleaner or beta, not {self.name}.")
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"The re-noise law needs 0 <= low < high <= 1, not low={self.low} and high={self.high}.")
        if not 0 < self.shift < math.inf:
            raise UserError(f"The re-noise law's shift must be positive and finite, not {self.shift}.")
        if not self.shifted and self.name != "cleaner":
            raise UserError(f"shifted=false means nothing to the re-noise law {self.name}: set its shift to 1.")
        if len(self.beta_start) != 2 or len(self.beta_end) != 2 or not min(*self.beta_start, *self.beta_end) > 0:
            raise UserError(
                "The re-noise law's beta_start and beta_end must be two positive numbers each, not "
                f"{self.beta_start} and {self.beta_end}."
            )
        if self.anneal_steps < 0:
            raise UserError(f"The re-noise law's anneal_steps must not be negative, but is {self.anneal_steps}.")

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        student_sigma: Tensor | None = None,
        step: int = 0,
    ) -> Tensor:
        """n times t = 1 − sigma, (n,) float32 on the generator's device.

        ``student_sigma``: (n,) before the shift (1 − i/steps at the student's step i), which cleaner needs; ``step``:
        of the student, for beta. Raises ValueError where cleaner does not get it.
        """
        sigma = uniform(n, generator)
        if self.name == "cleaner":
            sigma = self._cleaner(sigma, student_sigma)
        else:
            if self.name == "beta":
                sigma = self._beta(sigma, step)
            sigma = _shifted_sigma(sigma, self.shift)
        return 1 - sigma.clamp(self.low, self.high)

    def _cleaner(self, share: Tensor, student_sigma: Tensor | None) -> Tensor:
        if student_sigma is None or student_sigma.shape != share.shape:
            given = None if student_sigma is None else tuple(student_sigma.shape)
            raise ValueError(f"The law cleaner needs a student_sigma of shape {tuple(share.shape)}, got {given}.")
        bound = student_sigma.to(share)
        if self.shifted:
            return _shifted_sigma(share * bound, self.shift)
        return share * _shifted_sigma(bound, self.shift)

    def _beta(self, share: Tensor, step: int) -> Tensor:
        """Shares in [0, 1) as quantiles of the Beta law that holds at this step."""
        weight = cosine_to_zero(step, self.anneal_steps)
        a, b = (weight * start + (1 - weight) * end for start, end in zip(self.beta_start, self.beta_end, strict=True))
        quantiles = scipy.special.betaincinv(a, b, share.cpu().numpy().astype(np.float64))
        return torch.from_numpy(quantiles).to(share)


def dynamic_teacher_scale(step: int, start: float = 0.75, steps: int = 10_000) -> float:
    """How much of the fake score's adapter the teacher wears: ``start`` at first, none after ``steps`` of the student.

    Early on it moves the teacher towards the student, so that their distributions overlap. Source: DMDR, "DynaDG".
    """
    return start * cosine_to_zero(step, steps)


def cosine_to_zero(step: int, steps: int) -> float:
    """½·(1 + cos(π·step/steps)): 1 at step 0, 0 from ``steps`` on."""
    return 0.5 * (1 + math.cos(math.pi * step / steps)) if step < steps else 0.0


def _shifted_sigma(sigma: Tensor, amount: float) -> Tensor:
    return 1 - shift(1 - sigma, amount)


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")
