"""Checkpoints are whole at every moment, and a disk that fills up costs none of them."""

import resource
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch

from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.errors import UserError


class Wide(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(100, 1000)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, callback, steps, extra=(), ckpt_path=None):
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[callback, *extra],
    )  # fmt: skip
    trainer.fit(Wide(), torch.utils.data.DataLoader(torch.randn(400, 100), batch_size=4), ckpt_path=ckpt_path)
    return trainer


def step_in(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def test_saves_on_schedule_keeps_what_is_asked_and_ends_with_the_last_step(tmp_path):
    fit(tmp_path, RunCheckpoint(every_n_steps=2, keep_every_n_steps=4), steps=9)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step-00000004.ckpt", "step-00000008.ckpt"]
    assert [step_in(path) for path in sorted(folder.iterdir())] == [9, 4, 8]


def test_resumes_where_it_stopped(tmp_path):
    fit(tmp_path, RunCheckpoint(every_n_steps=3), steps=3)
    trainer = fit(tmp_path, RunCheckpoint(every_n_steps=3), steps=5, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert trainer.global_step == 5 and step_in(tmp_path / "checkpoints/last.ckpt") == 5


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """The limit on file sizes makes the very write fail half-way, as a full disk does."""

    class Fill(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            UserError, match=r"cannot write a checkpoint .*last good checkpoint is .*last\.ckpt"
        ) as error:
            fit(tmp_path, RunCheckpoint(every_n_steps=2), steps=6, extra=[Fill()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"] and step_in(folder / "last.ckpt") == 2


def test_a_really_full_disk(tmp_path):
    """The same on a file system of 1 MiB, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        filler = "import pathlib, sys; pathlib.Path(sys.argv[1], 'filler').write_bytes(bytes(400_000))"

        class Fill(lightning.Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == 3:
                    subprocess.run([sys.executable, "-c", filler, disk], check=True)

        with pytest.raises(UserError, match="No space left on device"):
            fit(disk, RunCheckpoint(every_n_steps=2), steps=6, extra=[Fill()])
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["last.ckpt"]
        assert step_in(disk / "checkpoints/last.ckpt") == 2
    finally:
        subprocess.run(["umount", disk], check=True)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="every_n_steps must be at least 1"):
        RunCheckpoint(every_n_steps=0)
    with pytest.raises(UserError, match="multiple"):
        RunCheckpoint(every_n_steps=10, keep_every_n_steps=15)
