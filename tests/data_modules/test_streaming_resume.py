"""Inside Lightning's Trainer: a run that stops anywhere and resumes sees what the uninterrupted run would have seen."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data_modules.buckets import SizeMapping
from data_modules.samples import Batch, CaptionChooser, SampleReader
from data_modules.streaming import MixtureLoader, ResumableLoader
from data_modules.text_to_image import TextToImageDataModule
from zimage_lit.errors import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Checkpoint directory", "ignore:You defined a `validation_step`"
)

BATCH_SIZE = 8  # 44 samples: 5 batches an epoch
BATCHES = 5
MAX_STEPS = 18  # ends in the middle of the fourth epoch

Seen = list[Any]  # [epoch, caption and id of every sample] of a step


class Recorder(LightningModule):
    """Learns next to nothing and writes down every batch, one line of JSON a step; may kill its process."""

    def __init__(self, log: Path, die_in_step: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.log_path, self.die_in_step = log, die_in_step

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert batch["images"][0].dtype == torch.uint8
        with self.log_path.open("a") as stream:
            stream.write(json.dumps([self.current_epoch, batch["captions"], batch["ids"]]) + "\n")
        if self.global_step == self.die_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(torch.stack([image.float().mean() for image in batch["images"]])[:, None]).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch["ids"] == [f"id-{index}" for index in range(len(batch["ids"]))]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def train(
    data: Path,
    output: Path,
    num_workers: int,
    ckpt_path: Path | None = None,
    die_in_step: int | None = None,
    batch_size: int = BATCH_SIZE,
    make_loader: Callable[[Path, int], Any] | None = None,
    **options: Any,
) -> list[Seen]:
    """What a run saw, step by step; its checkpoints, one a step, are output/<step>.ckpt.

    make_loader: from `data` and num_workers; None: the one of a TextToImageDataModule.
    """
    if die_in_step is not None:
        torch.set_num_threads(1)  # a forked process has none of its parent's threads, and OpenMP would wait for them
    output.mkdir(parents=True, exist_ok=True)
    module = Recorder(output / "seen.jsonl", die_in_step)
    module.log_path.write_text("")
    keep_all = ModelCheckpoint(output, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    trainer = Trainer(
        accelerator="cpu", callbacks=[keep_all], logger=False, enable_progress_bar=False, enable_model_summary=False,
        **{"max_epochs": -1, "max_steps": MAX_STEPS, "limit_val_batches": 0, **options},
    )  # fmt: skip
    source: dict[str, Any] = {}
    if make_loader is None:
        source["datamodule"] = TextToImageDataModule(str(data), batch_size, num_workers, seed=5)
    else:
        source["train_dataloaders"] = make_loader(data, num_workers)
    trainer.fit(module, **source, ckpt_path=ckpt_path, weights_only=False)
    return seen(output)


def seen(output: Path) -> list[Seen]:
    return [json.loads(line) for line in (output / "seen.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(noise_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """num_workers -> (checkpoints, what was seen), run once for each."""

    @cache
    def run(num_workers: int) -> tuple[Path, list[Seen]]:
        output = tmp_path_factory.mktemp(f"uninterrupted-{num_workers}")
        return output, train(noise_folder, output, num_workers)

    return run


def test_the_uninterrupted_run_is_epochs_of_all_samples_with_any_number_of_workers(uninterrupted: Any) -> None:
    _, found = uninterrupted(0)
    assert [epoch for epoch, _, _ in found] == [step // BATCHES for step in range(MAX_STEPS)]
    for start in range(0, 3 * BATCHES, BATCHES):
        names = [name for _, _, ids in found[start : start + BATCHES] for name in ids]
        assert len(set(names)) == len(names) == BATCHES * BATCH_SIZE
    assert found[:BATCHES] != found[BATCHES : 2 * BATCHES]
    assert uninterrupted(2)[1] == found


@pytest.mark.parametrize(("workers_before", "workers_after"), [(0, 0), (2, 2), (0, 2)])
@pytest.mark.parametrize("step", [1, 4, 5, 6, 10, 13, 15, 17])  # 5, 10 and 15 are ends of epochs
def test_a_resumed_run_sees_the_rest_and_later_epochs(
    uninterrupted: Any, noise_folder: Path, tmp_path: Path, step: int, workers_before: int, workers_after: int
) -> None:
    checkpoints, expected = uninterrupted(workers_before)
    found = train(noise_folder, tmp_path, workers_after, checkpoints / f"{step}.ckpt")
    assert found == expected[step:]


def test_a_run_resumed_three_times_sees_the_same(uninterrupted: Any, noise_folder: Path, tmp_path: Path) -> None:
    _, expected = uninterrupted(0)
    found, checkpoint = [], None
    for stop in (3, 5, 12, MAX_STEPS):
        output = tmp_path / str(stop)
        found += train(noise_folder, output, 0, checkpoint, max_steps=stop)
        checkpoint = output / f"{stop}.ckpt"
    assert found == expected


def test_a_run_limited_by_epochs_resumes(uninterrupted: Any, noise_folder: Path, tmp_path: Path) -> None:
    checkpoints, expected = uninterrupted(0)
    for step in (7, 10):
        found = train(noise_folder, tmp_path, 0, checkpoints / f"{step}.ckpt", max_steps=-1, max_epochs=3)
        assert found == expected[step : 3 * BATCHES]


@pytest.mark.parametrize("step", [4, 5, 10, 12])
def test_a_run_with_validation_resumes(uninterrupted: Any, noise_folder: Path, tmp_path: Path, step: int) -> None:
    """Validation at the end of every epoch, and in the middle of it where asked for."""
    _, expected = uninterrupted(0)
    intervals: dict[str, Any] = {"end": {}, "middle": {"val_check_interval": 2}}
    for name, options in intervals.items():
        stopped = tmp_path / name / "stopped"
        assert train(noise_folder, stopped, 0, limit_val_batches=1.0, **options) == expected
        resumed = tmp_path / name / "resumed"
        found = train(noise_folder, resumed, 0, stopped / f"{step}.ckpt", limit_val_batches=1.0, **options)
        assert found == expected[step:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_resumes_from_its_last_checkpoint(
    uninterrupted: Any, noise_folder: Path, tmp_path: Path, num_workers: int
) -> None:
    _, expected = uninterrupted(0)
    killed_in = 8 + num_workers
    killed = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(noise_folder, killed, num_workers), kwargs={"die_in_step": killed_in}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert seen(killed) == expected[: killed_in + 1]  # the step it died in had begun

    found = train(noise_folder, tmp_path / "resumed", num_workers, killed / f"{killed_in}.ckpt")
    assert found == expected[killed_in:]


def test_a_checkpoint_of_other_data_settings_is_refused(uninterrupted: Any, noise_folder: Path, tmp_path: Path) -> None:
    checkpoints, _ = uninterrupted(0)
    with pytest.raises(UserError, match="batch_size=8 and this run has batch_size=4"):
        train(noise_folder, tmp_path, 0, checkpoints / "3.ckpt", batch_size=4)


def planned_loader(data: Path, num_workers: int) -> ResumableLoader:
    """Batches of unlike sizes in epochs of unlike lengths: by token budget, in windows of two chunks."""
    reader = SampleReader(data / "train", CaptionChooser(None, 0), SizeMapping(resolution=96))
    return ResumableLoader(
        reader, "", None, seed=4, drop_last=False, num_workers=num_workers, token_budget=700, window=2,
        table=reader.table(),
    )  # fmt: skip


def mixture_loader(data: Path, num_workers: int) -> MixtureLoader:
    """Three steps by token budget to one of the same data by count."""
    plain = ResumableLoader(SampleReader(data / "train", CaptionChooser(None, 1)), "", 4, seed=1)
    loaders = {"planned": planned_loader(data, 0), "plain": plain}
    return MixtureLoader(loaders, {"planned": 3.0, "plain": 1.0}, num_workers, steps_per_epoch=9)


@pytest.mark.parametrize("make_loader", [planned_loader, mixture_loader])
def test_planned_and_mixed_runs_resume_after_a_kill_with_other_workers(
    sized_folder: Path, tmp_path: Path, make_loader: Callable[[Path, int], Any]
) -> None:
    steps: dict[str, Any] = {"max_steps": 36, "make_loader": make_loader}
    expected = train(sized_folder, tmp_path / "uninterrupted", 0, **steps)
    assert len({len(ids) for _, _, ids in expected}) > 2
    killed_in, killed = 14, tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(sized_folder, killed, 2), kwargs={"die_in_step": killed_in, **steps}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert seen(killed) == expected[: killed_in + 1]
    for step in (9, killed_in):
        assert train(sized_folder, tmp_path / f"resumed-{step}", 0, killed / f"{step}.ckpt", **steps) == expected[step:]
