"""What stages do with the gradient of a step before the optimiser takes it."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def clip_gradients(
    stage: Any, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], limit: float | None
) -> Tensor:
    """Scale gradients down to a norm of at most `limit` (None or 0: any), and let callbacks that have
    `on_gradient_norm` judge what it was; returns that norm, of all shards together.

    Lightning's own clipping refuses the fused AdamW under mixed precision.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    if isinstance(norm, DTensor):  # still in parts
        norm = norm.full_tensor()
    for callback in stage.trainer.callbacks:
        if hasattr(callback, "on_gradient_norm"):
            callback.on_gradient_norm(stage.trainer, stage, optimizer, norm)
    return norm


def back_propagate(stage: Any, loss: Tensor) -> None:
    """The backward of a stage that takes its steps by itself."""
    with torch.autocast(stage.device.type, enabled=False):  # it is for forwards
        stage.manual_backward(loss)
