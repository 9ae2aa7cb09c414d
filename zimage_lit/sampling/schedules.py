"""Noise levels that a solver walks through."""

import math

import torch
from torch import Tensor

from zimage_lit.errors import UserError, at_least_one


def sigmas(num_inference_steps: int, shift: float = 1.0) -> Tensor:
    """Noise levels 1 = sigma_0 > … > sigma_n = 0 of n steps, (n + 1,) float32.

    s_i = 1 − i/n, sigma_i = shift·s_i / (1 + (shift − 1)·s_i). Z-Image-Turbo is published with 8 steps and shift 3,
    Z-Image with 28–50 steps and shift 6. The network is asked at t = 1 − sigma_i for i < n, hence n evaluations.
    Raises UserError where there is no such schedule.
    """
    check_schedule(num_inference_steps, shift)
    even = torch.arange(num_inference_steps, -1, -1, dtype=torch.float64) / num_inference_steps
    return (shift * even / (1 + (shift - 1) * even)).float()


def check_schedule(num_inference_steps: int, shift: float) -> None:
    """Raise UserError for less than one step or a shift that is not positive and finite."""
    at_least_one("num_inference_steps", num_inference_steps)
    if not 0 < shift < math.inf:
        raise UserError(f"shift must be positive and finite, not {shift}.")
