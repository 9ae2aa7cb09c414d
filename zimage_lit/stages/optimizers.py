"""The optimiser and learning-rate schedule of a stage, as plain settings."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zimage_lit.errors import UserError, at_least_one


@dataclass
class OptimizerSettings:
    """AdamW, or Muon with AdamW, with linear warm-up and an optional decay to zero at the end of the run."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for all else
    lr: float = 1e-4  # peak learning rate of AdamW
    muon_lr: float = 4e-3  # peak learning rate of Muon, on AdamW's scale
    muon_ns_steps: int = 5  # Newton-Schulz iterations of Muon: fewer are cheaper and orthogonalise less exactly
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only; norms, biases and pad tokens never decay
    warmup_steps: int = 0  # optimiser steps of linear warm-up
    decay: Literal["constant", "linear", "cosine"] = "constant"  # shape after the warm-up, down to 0 at the last step

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "eps", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name} must be 0 or more, not {getattr(self, name)}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas must lie in [0, 1), not {list(self.betas)}.")
        at_least_one("optimizer.muon_ns_steps", self.muon_ns_steps)


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters of `model`."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    orthogonalised = [p for name, p in trainable if settings.name == "muon" and is_block_matrix(name, p)]
    chosen = {id(p) for p in orthogonalised}
    rest = [p for _, p in trainable if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1 and len(p) > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1 or len(p) == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    if settings.name == "adamw":
        return adamw
    muon = StackedMuon(
        orthogonalised,
        lr=settings.muon_lr,
        weight_decay=settings.weight_decay,
        ns_steps=settings.muon_ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    return OptimizerPair(muon, adamw)


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """The projections of attention and feed-forward; embedders, modulation and output layer are left to AdamW."""
    return parameter.ndim == 2 and (".attention." in name or ".feed_forward." in name)


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure of an optimiser step returns, None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class StackedMuon(torch.optim.Muon):
    """torch's Muon with the same results, but matrices of one shape are orthogonalised together, which is faster.

    Of the arguments, `nesterov` is always true and `adjust_lr_fn` always "match_rms_adamw" (an update of AdamW's size).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = loss_of(closure)
        for group in self.param_groups:
            by_shape: dict[torch.Size, dict[Tensor, Tensor]] = defaultdict(dict)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape][parameter] = parameter.grad
            for shape, members in by_shape.items():
                parameters, gradients = list(members), list(members.values())
                averages = [self.momentum_of(parameter) for parameter in parameters]
                torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
                looking_ahead = torch.stack(torch._foreach_lerp(gradients, averages, group["momentum"]))
                updates = orthogonalise(looking_ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                rate = 0.2 * math.sqrt(max(shape)) * group["lr"]
                torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype)), alpha=-rate)
        return loss

    def momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """(n, rows, columns) -> bfloat16 of the same shape: each matrix with its singular values brought near 1.

    Newton-Schulz: X <- a X + (b A + c A A) X with A = X X'. Source: Jordan et al., "Muon", 2024.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalise(matrices.mT, coefficients, steps, eps).mT
    a, b, c = coefficients
    x = matrices.bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class OptimizerPair(torch.optim.Optimizer):
    """Two optimisers over different parameters that step, are scheduled and are saved as one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.pair = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        self.share_groups()

    def share_groups(self) -> None:
        """One list of group dicts for all three, so that a scheduler reaches both optimisers."""
        self.param_groups = [group for optimizer in self.pair for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = loss_of(closure)
        for optimizer in self.pair:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"pair": [optimizer.state_dict() for optimizer in self.pair]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.pair, state_dict["pair"], strict=True):
            optimizer.load_state_dict(state)
        self.share_groups()


def learning_rate_factor(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Share of the peak learning rate at optimiser step `step` of `total_steps`."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    if settings.decay == "constant":
        return 1.0
    progress = min(1.0, (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
    return 1 - progress if settings.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
