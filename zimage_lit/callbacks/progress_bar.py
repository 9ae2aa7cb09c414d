"""Lightning's rich bar over a whole run: how far it is, how fast it goes, and when it will be done."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

NAMES = {"throughput/images_per_second": "images/s", "throughput/mfu": "MFU"}  # as the bar shows them
PACE = 600.0  # seconds from which the speed is estimated: slow steps are to be among them, pauses for pictures as well


class RunProgressBar(RichProgressBar):
    """Counts a run's optimiser steps, those of a run that goes on included; Lightning's own begins anew each epoch.

    Values behind the bar are renewed every `log_every_n_steps` steps: each time the device is waited for.
    """

    @property
    def total_train_batches(self) -> int | float:
        """Optimiser steps of the run, infinite where nothing but time ends it."""
        return self.trainer.estimated_stepping_batches

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_enabled and self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        values = super().get_metrics(trainer, pl_module)
        return {NAMES.get(name, name): value for name, value in values.items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def _initialize_train_progress_bar_id(self) -> None:
        super()._initialize_train_progress_bar_id()
        assert self.progress is not None and self.train_progress_bar_id is not None
        self.progress.speed_estimate_period = PACE
        self.progress.update(self.train_progress_bar_id, completed=self.trainer.global_step)

    def _update_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            super()._update_metrics(trainer, pl_module)
