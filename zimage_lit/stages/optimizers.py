"""The optimiser and learning-rate schedule of a stage, as plain settings."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass
class OptimizerSettings:
    """AdamW with linear warm-up and an optional decay to zero at the end of the run."""

    lr: float = 1e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only; norms, biases and pad tokens never decay
    warmup_steps: int = 0  # optimiser steps of linear warm-up
    decay: Literal["constant", "linear", "cosine"] = "constant"  # shape after the warm-up, down to 0 at the last step


def build_optimizer(model: nn.Module, settings: OptimizerSettings, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1 and len(p) > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1 or len(p) == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)


def learning_rate_factor(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Share of the peak learning rate at optimiser step `step` of `total_steps`."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    if settings.decay == "constant":
        return 1.0
    progress = min(1.0, (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
    return 1 - progress if settings.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
