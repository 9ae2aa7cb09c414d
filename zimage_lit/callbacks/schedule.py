"""When callbacks that draw pictures do so."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from zimage_lit.errors import at_least_one


class Scheduled(Callback):
    """Calls `look` before the first step, every so many steps, and after the last one; a step may be asked for twice.

    every_n_steps: None for start and end alone.   at_start: whether it looks before the first step.
    Raises UserError for a number of steps below 1.
    """

    def __init__(self, every_n_steps: int | None, at_start: bool = True) -> None:
        if every_n_steps is not None:
            at_least_one(f"{type(self).__name__}: every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self.at_start = at_start

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, at `trainer.global_step`; to be implemented."""
        raise NotImplementedError(f"{type(self).__name__} must implement look(trainer, pl_module).")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0 and self.at_start:
            self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step  # 0 while the first step still accumulates batches
        if step and self.every_n_steps and step % self.every_n_steps == 0:
            self.look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(trainer, pl_module)
