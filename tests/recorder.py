"""A callback that tells a test, at once and exactly, what every training step did."""

import os
from typing import Any

from lightning import Callback, LightningModule, Trainer


class LossRecorder(Callback):
    """Appends `step loss` lines to `path`, the loss with all its bits, handed to the operating system at every step."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        with open(self.path, "a") as stream:
            stream.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\n")
            stream.flush()
            os.fsync(stream.fileno())
