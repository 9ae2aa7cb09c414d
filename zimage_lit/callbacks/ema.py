"""An exponential moving average of the backbone's weights, which samples and exports use."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from zimage_lit.backbone.parallelize import local, own_part
from zimage_lit.callbacks.guards import step_was_skipped
from zimage_lit.errors import UserError
from zimage_lit.lora import kept_weights


class EMA(Callback):
    """average <- average + (1 - d) * (weights - average) after every step of the backbone; kept in the checkpoint.

    `pl_module` is any LightningModule with a `backbone`; where it has other networks as well, and changes the backbone
    at some of its steps alone, it counts those as `student_step`. Of a sharded one each rank averages its own part;
    of a LoRA the adapters alone are averaged. The average is float32 at least: a thousandth of a step is less than the
    last digit of a bfloat16.

    decay: d in the long run.   warmup: d follows min(decay, (1 + n) / (10 + n)), so early averages forget the start.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay must lie in [0, 1), not {decay}.")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not self.average:
            self.average = {
                name: weight.detach().to(average_type(weight), copy=True)
                for name, weight in kept_weights(pl_module.backbone).items()
            }

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for name, weight in kept_weights(pl_module.backbone).items():
            average = self.average[name]  # may come from a checkpoint of a single process
            if average.device != weight.device or type(average) is not type(weight):
                self.average[name] = own_part(weight, average, average_type(weight))
        self._last_step = backbone_step(trainer, pl_module)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        step = backbone_step(trainer, pl_module)
        if step == self._last_step:  # gradients are still being accumulated, or another network was trained
            return
        self._last_step = step
        if not hasattr(pl_module, "student_step") and step_was_skipped(trainer):
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        weights = kept_weights(pl_module.backbone)
        averages = [local(self.average[name]) for name in weights]
        trained = [local(weight) for weight in weights.values()]
        if all(weight.dtype == average_type(weight) for weight in trained):
            torch._foreach_lerp_(averages, trained, 1 - decay)
            return
        for average, weight in zip(averages, trained, strict=True):  # one at a time: all of them widened take memory
            average.lerp_(weight.to(average.dtype), 1 - decay)

    @contextmanager
    def applied(self, pl_module: Any) -> Iterator[None]:
        """Inside, the backbone holds the averaged weights; the trained ones come back afterwards."""
        weights = {name: local(weight) for name, weight in kept_weights(pl_module.backbone).items()}
        trained = {name: weight.clone() for name, weight in weights.items()}
        copy_all(weights, {name: local(average) for name, average in self.average.items()})
        try:
            yield
        finally:
            copy_all(weights, trained)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]
        self.average = dict(state_dict["average"])


def backbone_step(trainer: Trainer, pl_module: Any) -> int:
    """How many optimiser steps have changed the backbone; those that were skipped count where the trainer counts."""
    return int(getattr(pl_module, "student_step", trainer.global_step))


def average_type(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def copy_all(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])


@contextmanager
def averaged_weights(trainer: Trainer, pl_module: Any) -> Iterator[None]:
    """The weights that people should see: those of the trainer's EMA callback, or the trained ones without it."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it without declaring it
    ema = next((callback for callback in callbacks if isinstance(callback, EMA)), None)
    if ema is None or not ema.average:
        yield
        return
    with ema.applied(pl_module):
        yield
