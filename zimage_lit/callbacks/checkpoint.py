"""Checkpoints that survive a kill and a full disk: written beside the old one, then swapped in one move."""

import math
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from zimage_lit.errors import SharedError, UserError, at_least_one
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.stages.initial_weights import allow_low_bit_states
from zimage_lit.strategies import FSDP2Strategy


class RunCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt` of the run's folder current; it is whole at every moment. Under `fsdp2` it is a
    folder.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # nobody has put in one of their own
            trainer.strategy.checkpoint_io = CheckpointFiles()

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
        sharded = isinstance(trainer.strategy, FSDP2Strategy)
        fresh = spare_folder(last) if sharded else last.with_name("last.ckpt.partial")
        try:
            last.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(trainer.strategy, FSDP2Strategy):
                trainer.strategy.on_first_rank(lambda: remove(fresh))
                trainer.save_checkpoint(fresh, weights_only=False)  # the optimiser and the rest too
                trainer.strategy.on_first_rank(lambda: self._swap_in(fresh, last, trainer.global_step))
            else:
                trainer.save_checkpoint(fresh, weights_only=False)
                if trainer.is_global_zero:
                    self._swap_in(fresh, last, trainer.global_step)
        except OSError as error:
            if trainer.is_global_zero:
                remove(fresh)
            good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been written before"
            kind = SharedError if sharded else UserError
            raise kind(
                f"cannot write a checkpoint in {last.parent} ({error}); {good}: make room, then start the same command "
                "again to resume."
            ) from error
        self._saved_step = trainer.global_step

    def _swap_in(self, fresh: Path, last: Path, step: int) -> None:
        """Give a whole checkpoint the name `last`, in one move."""
        sync(fresh)
        if self.keep_every_n_steps and step % self.keep_every_n_steps == 0:
            keep(fresh, last.with_name(f"step-{step:08d}.ckpt"))
        if fresh.is_file():
            os.replace(fresh, last)
            for name in SPARE_FOLDERS:  # of the same run when it was sharded
                remove(last.with_name(name))
            return
        if last.is_dir() and not last.is_symlink():  # a copy that someone made of a link; folders cannot be replaced
            remove(set_aside := last.with_name("last.ckpt.copy"))
            last.rename(set_aside)
        link = last.with_name("last.ckpt.link")
        link.unlink(missing_ok=True)
        link.symlink_to(fresh.name)
        os.replace(link, last)
        sync(last.parent)
        remove(spare_folder(last))


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, 8-bit optimiser states included, which torch cannot read on Lightning's terms."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        allow_low_bit_states(Path(path))
        return cast(dict[str, Any], torch.load(path, map_location="cpu", weights_only=weights_only is not False))


# A folder cannot take the place of another in one move, a link can: sharded checkpoints are written to these in turn,
# and `last.ckpt` links to the one that is whole.
SPARE_FOLDERS = ("last.ckpt.0", "last.ckpt.1")


def spare_folder(last: Path) -> Path:
    """The one of the two to which `last` does not link."""
    current = os.readlink(last) if last.is_symlink() else None
    return last.with_name(next(name for name in SPARE_FOLDERS if name != current))


def keep(checkpoint: Path, kept: Path) -> None:
    """A second name for a file or for all files of a folder; takes no room."""
    remove(kept)
    if checkpoint.is_file():
        os.link(checkpoint, kept)
        return
    remove(partial := kept.with_name(f"{kept.name}.partial"))
    shutil.copytree(checkpoint, partial, copy_function=os.link)
    partial.rename(kept)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
