"""The bar of a run: all of its steps, at any number of batches an epoch, and where a run goes on."""

from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from zimage_lit.callbacks.progress_bar import RunProgressBar


class Stage(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("throughput/images_per_second", 10.0 * self.trainer.global_step, prog_bar=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.layer(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Watcher(Callback):
    """What the bar shows after each batch."""

    def __init__(self, bar: RunProgressBar) -> None:
        self.bar = bar
        self.seen: list[tuple[float, float | None, str]] = []
        self.shown: list[dict] = []

    def on_train_batch_end(self, *_: object) -> None:
        task = self.bar.train_progress_bar
        self.seen.append((task.completed, task.total, task.description))
        self.shown.append(dict(self.bar._metric_component._metrics))


def fit(folder: Path, ckpt_path: Path | None = None, **settings: object) -> tuple[Watcher, lightning.Trainer]:
    bar = RunProgressBar()
    watcher = Watcher(bar)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, callbacks=[bar, watcher],
        enable_model_summary=False, log_every_n_steps=2, **settings,
    )  # fmt: skip
    data = DataLoader(torch.ones(3, 1))
    trainer.fit(Stage(), data, data, ckpt_path=ckpt_path, weights_only=True)
    return watcher, trainer


@pytest.mark.parametrize("length", [{"max_steps": 8, "max_epochs": -1}, {"max_steps": 8, "max_epochs": 5}])
def test_it_counts_the_steps_of_the_run(tmp_path: Path, length: dict[str, int]) -> None:
    watcher, _ = fit(tmp_path, **length)
    assert watcher.seen == [(step, 8, "Training") for step in range(1, 9)]


def test_epochs_and_accumulated_batches_are_turned_into_steps(tmp_path: Path) -> None:
    watcher, _ = fit(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    assert [(completed, total) for completed, total, _ in watcher.seen] == [(n, 4) for n in (0, 1, 2, 2, 3, 4)]


def test_a_run_that_goes_on_is_where_it_was(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path, max_steps=4, max_epochs=-1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    watcher, _ = fit(tmp_path, tmp_path / "last.ckpt", max_steps=9, max_epochs=-1)
    assert [(completed, total) for completed, total, _ in watcher.seen] == [(step, 9) for step in range(5, 10)]
    assert watcher.bar.train_progress_bar.speed < 1e5  # of its own steps: those of before took no time here


def test_values_are_renewed_where_they_are_logged_and_have_short_names(tmp_path: Path) -> None:
    watcher, _ = fit(tmp_path, max_steps=4, max_epochs=-1, num_sanity_val_steps=0, limit_val_batches=0)
    assert watcher.shown == [{}, {"images/s": 10.0}, {"images/s": 10.0}, {"images/s": 30.0}]


def test_without_an_end_there_is_no_time_left(tmp_path: Path) -> None:
    watcher, _ = fit(tmp_path, max_epochs=-1, max_time={"seconds": 1}, limit_val_batches=0)
    assert {total for _, total, _ in watcher.seen} == {float("inf")}
    assert watcher.bar.train_progress_bar.time_remaining is None
