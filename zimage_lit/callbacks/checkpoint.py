"""Checkpoints that survive a kill and a full disk: written beside the old one, then swapped in one move."""

import math
import os
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from zimage_lit.errors import UserError, at_least_one
from zimage_lit.run_folder import last_checkpoint


class RunCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt` of the run's folder current; it is whole at every moment.

    every_n_steps: optimiser steps between saves; an interruption saves as well, and the end of the run when all other
        callbacks are done. What they do there (scores, an export) may fail, and Lightning does it again only after a
        step, so the last step but one is saved too.
    keep_every_n_steps: additionally keep `step-….ckpt` at these steps for good (a multiple of every_n_steps).

    Raises UserError where a save fails (a full disk, say); the checkpoint before it stays as it was.
    """

    def __init__(self, every_n_steps: int = 500, keep_every_n_steps: int | None = None) -> None:
        at_least_one("RunCheckpoint: every_n_steps", every_n_steps)
        if keep_every_n_steps is not None and (keep_every_n_steps < 1 or keep_every_n_steps % every_n_steps):
            raise UserError(
                f"RunCheckpoint: keep_every_n_steps ({keep_every_n_steps}) must be a multiple of every_n_steps "
                f"({every_n_steps})."
            )
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self._saved_step = 0
        self._end: float = math.inf  # the run's last step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._end = trainer.estimated_stepping_batches

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        is_due = step == self._end - 1 or (step != self._end and step % self.every_n_steps == 0)
        if is_due and step != self._saved_step:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the whole training state; on every rank, because gathering it is collective."""
        last = last_checkpoint(Path(trainer.default_root_dir))
        partial = last.with_name("last.ckpt.partial")
        try:
            last.parent.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(partial, weights_only=False)  # the optimiser and the rest too
            if trainer.is_global_zero:
                self._swap_in(partial, last, trainer.global_step)
        except OSError as error:
            partial.unlink(missing_ok=True)
            good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been written before"
            raise UserError(
                f"cannot write a checkpoint in {last.parent} ({error}); {good}: make room, then start the same command "
                "again to resume."
            ) from error
        self._saved_step = trainer.global_step

    def _swap_in(self, partial: Path, last: Path, step: int) -> None:
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        if self.keep_every_n_steps and step % self.keep_every_n_steps == 0:
            kept = last.with_name(f"step-{step:08d}.ckpt")
            kept.unlink(missing_ok=True)
            os.link(partial, kept)
        os.replace(partial, last)
