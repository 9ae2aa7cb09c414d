"""Ctrl-C and SIGTERM end a run between two steps, with a checkpoint from which it continues."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.run_folder import last_checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunStopped(SystemExit):
    """The run was asked to stop and has saved itself; `signal_number` says by what."""

    def __init__(self, signal_number: int, checkpoint: Path, step: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number, self.checkpoint, self.step = signal_number, checkpoint, step


class CleanStop(Callback):
    """Turns the first signal into a request that is honoured after an optimiser step; a second one ends at once.

    Lightning's own handling saves nothing, and an exception in mid-step would leave half-updated weights. It has to be
    the last callback before the checkpoint callbacks, so that all others have seen the step. Whoever calls
    `trainer.fit` calls `restore` afterwards.

    Args:
        output_dir: folder of the run; the checkpoint is `<output_dir>/checkpoints/last.ckpt`.
    """

    def __init__(self, output_dir: str) -> None:
        self.checkpoint = last_checkpoint(Path(output_dir))
        self.requested: int | None = None
        self._process = os.getpid()
        self._step_before = -1
        self._stopped: RunStopped | None = None
        self._original: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # not earlier: while data are prepared there is nothing to save, and a signal may end the process as usual
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self._original = {number: signal.getsignal(number) for number in SIGNALS}
            self._install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._original:
            self._install()  # Lightning has put its own SIGTERM handler over ours meanwhile

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._stopped is not None:
            raise self._stopped
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step_before:
            return  # gradients are being accumulated: a checkpoint would lose them
        requested = self.requested is not None
        if trainer.world_size > 1:
            # the signal reaches the processes at different steps, or only one of them: all stop at the same step
            requested = trainer.strategy.reduce_boolean_decision(requested, all=False)
        if requested and trainer.global_step != trainer.max_steps:  # a finished run ends by itself
            self._save(trainer)
            # raised when the next step begins: only then have the loggers received the metrics of this one
            self._stopped = RunStopped(self.requested or signal.SIGTERM, self.checkpoint, trainer.global_step)

    def _save(self, trainer: Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):  # writes whole files only, and says so when the disk is full
                return callback.save(trainer)
        trainer.save_checkpoint(self.checkpoint, weights_only=False)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._original.items():
            signal.signal(number, handler)
        self._original = {}

    def _install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked data worker: the main process will end it
        self.requested = number
        os.write(2, b"\nstopping after this step; the same signal again stops at once, without a checkpoint\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
