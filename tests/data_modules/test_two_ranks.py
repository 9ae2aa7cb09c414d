"""Two processes train side by side, are killed and go on: together they see every sample once, in the same steps."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data_modules.text_to_image import TextToImageDataModule

NUM_SAMPLES = 44  # of the noise data set in conftest.py
BATCH_SIZE = 4  # on each of two ranks: 5 steps an epoch, four samples left out
MAX_STEPS = 13
RANKS = 2


class Recorder(LightningModule):
    """Writes down what its rank sees, one line of JSON a step; may kill its process."""

    def __init__(self, folder: Path, die_in_step: int | None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.folder, self.die_in_step = folder, die_in_step

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        with (self.folder / f"rank-{self.global_rank}.jsonl").open("a") as stream:
            stream.write(json.dumps(batch["ids"]) + "\n")
        if self.global_step == self.die_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(torch.ones(len(batch["ids"]), 1)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def train_rank(
    data: Path, folder: Path, rank: int, port: int, num_workers: int, checkpoint: Path | None, die_in_step: int | None
) -> None:
    """What a launcher would start on each rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ["OMP_NUM_THREADS"] = "1"  # else Lightning sets more where there are more cores, which hangs after a fork
    torch.set_num_threads(1)
    keep_all = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    trainer = Trainer(
        accelerator="cpu", strategy="ddp", devices=RANKS, max_epochs=-1, max_steps=MAX_STEPS, callbacks=[keep_all],
        logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        limit_val_batches=0,
    )  # fmt: skip
    datamodule = TextToImageDataModule(str(data), BATCH_SIZE, num_workers, seed=5)
    trainer.fit(Recorder(folder, die_in_step), datamodule=datamodule, ckpt_path=checkpoint, weights_only=False)


def train(data: Path, folder: Path, num_workers: int, checkpoint: Path | None = None, die_in_step: int | None = None):
    """What both ranks saw, step by step. With `die_in_step` rank 1 dies in it, and rank 0 with it."""
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    dies = {0: None, 1: die_in_step}
    processes = [
        context.Process(target=train_rank, args=(data, folder, rank, port, num_workers, checkpoint, dies[rank]))
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    if die_in_step is None:
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
    else:
        processes[1].join()
        time.sleep(0.2)
        processes[0].kill()
        processes[0].join()
        assert processes[1].exitcode == -signal.SIGKILL
    ranks = [(folder / f"rank-{rank}.jsonl").read_text().splitlines() for rank in range(RANKS)]
    return [[json.loads(line) for line in lines] for lines in zip(*ranks, strict=False)]


def test_two_ranks_share_an_epoch_and_resume_after_a_kill(noise_folder: Path, tmp_path: Path) -> None:
    expected = train(noise_folder, tmp_path / "uninterrupted", 0)
    assert len(expected) == MAX_STEPS
    for epoch in (expected[:5], expected[5:10]):
        names = [name for step in epoch for rank in step for name in rank]
        assert len(names) == len(set(names)) == NUM_SAMPLES - NUM_SAMPLES % (BATCH_SIZE * RANKS)
    assert expected[:5] != expected[5:10]

    killed_in = 7
    assert train(noise_folder, tmp_path / "killed", 2, die_in_step=killed_in)[:killed_in] == expected[:killed_in]
    checkpoint = tmp_path / "killed" / f"{killed_in}.ckpt"
    assert train(noise_folder, tmp_path / "resumed", 0, checkpoint) == expected[killed_in:]
