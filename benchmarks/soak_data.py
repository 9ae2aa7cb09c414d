"""A small training run that is killed with SIGKILL again and again: does it see every sample exactly once an epoch?

    python benchmarks/soak_data.py                     # 50 kills over 3 epochs, about a minute on two cores

Prepares noise pictures of many sizes, then trains next to nothing on them by TextToImageDataModule (token budgets,
sizes, shuffled) in Lightning's Trainer with RunCheckpoint, each time in a process forked from this one. It is killed at
random moments, in training and while it starts, and started again with 0 or 2 workers by chance. Every optimiser step
writes down its samples; a step that was done again replaces what it was before. Prints a table and one line of JSON;
the exit code is 1 where a sample was lost or doubled, or a step done again differed from the first time.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import lightning
import numpy as np
import torch
from PIL import Image

from data_modules.buckets import SizeMapping
from data_modules.preparation import PrepareSettings, prepare
from data_modules.samples import Batch
from data_modules.text_to_image import TextToImageDataModule
from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.run_folder import last_checkpoint

SAVE_EVERY = 5  # optimiser steps
IN_START = 0.2  # share of the kills that do not wait for a step
LONGEST_START = 1.0  # seconds until those come
LONGEST_DELAY = 5  # steps behind the awaited one at which a kill comes at the latest

Steps = dict[int, tuple[int, list[str]]]  # optimiser step -> epoch, samples


@dataclass(frozen=True)
class Result:
    """What a soak found. steps: of the whole run; done_again: steps that a kill undid, replayed_alike: with the same
    samples as before; whole_epochs: epochs of which every sample came exactly once; starts: workers -> processes."""

    samples: int
    epochs: int
    steps: int
    kills: int
    done_again: int
    replayed_alike: bool
    whole_epochs: int
    starts: dict[int, int]
    seconds: float

    @property
    def is_exact(self) -> bool:
        return self.whole_epochs == self.epochs and self.replayed_alike


class Recording(lightning.LightningModule):
    """Writes the epoch and the samples of every optimiser step to `log`, one line of JSON each.

    stop_at: optimiser steps after which it stands still, so that a kill which comes late on a busy machine still finds
    it at work; None: it runs to its end.
    """

    def __init__(self, log: Path, stop_at: int | None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.log_path, self.stop_at = log, stop_at

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.stop_at is not None and self.global_step >= self.stop_at:
            os.kill(os.getpid(), signal.SIGSTOP)
        line = json.dumps([self.global_step + 1, self.current_epoch, batch["ids"]]) + "\n"
        descriptor = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())  # in one piece, which no kill can tear, and before the step can be saved
        os.close(descriptor)
        return self.layer(torch.stack([image.float().mean() for image in batch["images"]])[:, None]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Log:
    """The lines of a run's log, read on from where they were read last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: Steps = {}
        self.done_again = 0
        self.replayed_alike = True
        self._read = 0

    def read(self) -> int:
        """Take in what is new; gives the last step of it, 0 where there is none."""
        if not self.path.exists():
            return 0
        with self.path.open() as stream:
            stream.seek(self._read)
            lines = stream.readlines()
            self._read = stream.tell()
        last = 0
        for line in lines:
            last, *seen = json.loads(line)
            if last in self.steps:
                self.done_again += 1
                self.replayed_alike &= self.steps[last] == tuple(seen)
            self.steps[last] = tuple(seen)  # type: ignore[assignment]
        return last


def soak(folder: Path, kills: int, epochs: int, samples: int, chance: random.Random) -> Result:
    """Prepare `samples` pictures below `folder` and train on them for `epochs`, killed `kills` times."""
    started = time.monotonic()
    data = prepared(folder, samples)
    log, starts, killed = Log(folder / "steps.jsonl"), Counter[int](), 0
    steps = epochs * steps_of_an_epoch(data)
    moments = sorted(chance.choices(range(1, steps - 2 * LONGEST_DELAY), k=kills))
    while True:
        num_workers = chance.choice((0, 2))
        starts[num_workers] += 1
        moment = moments[killed] if killed < kills else None
        stop_at = None if moment is None else max(moment, *log.steps, 0) + LONGEST_DELAY
        child = start(partial(train, data, folder, num_workers, epochs, stop_at), folder / "output.txt")
        if moment is not None:
            wait_for_moment(child, log, moment, chance)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log.read()
        if code == -signal.SIGKILL:
            killed += 1
        elif code == 0:
            break
        else:
            raise SystemExit(f"The training failed:\n{(folder / 'output.txt').read_text()[-3000:]}")
    whole = 0
    for epoch in range(epochs):
        seen = Counter(name for of_epoch, names in log.steps.values() if of_epoch == epoch for name in names)
        whole += len(seen) == samples and set(seen.values()) == {1}
    return Result(
        samples, epochs, steps, killed, log.done_again, log.replayed_alike, whole, dict(starts),
        round(time.monotonic() - started, 1),
    )  # fmt: skip


def prepared(folder: Path, samples: int) -> Path:
    """Noise pictures of 40 to 150 pixels a side with captions of unlike lengths, prepared."""
    source = folder / "pictures"
    source.mkdir()
    dice = np.random.default_rng(0)
    for number in range(samples):
        height, width = dice.integers(40, 150, 2)
        pixels = dice.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{number:05d}.png")
        (source / f"{number:05d}.txt").write_text("noise " * int(dice.integers(1, 60)))
    prepare(PrepareSettings(str(source), str(folder / "data"), min_side=16, part_size=50, num_workers=1))
    return folder / "data"


def data_module(data: Path, num_workers: int) -> TextToImageDataModule:
    return TextToImageDataModule(
        str(data), batch_size=None, token_budget=600, sizes=SizeMapping(resolution=128), drop_last=False,
        num_workers=num_workers, seed=1,
    )  # fmt: skip


def steps_of_an_epoch(data: Path) -> int:
    module = data_module(data, 0)
    module.setup("fit")
    return len(module.train_dataloader())


def start(run: Callable[[], None], said: Path) -> int:
    """The process id of a fork of this process that does `run`; what it prints is added to the file `said`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)  # threads do not come along when a process forks
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def train(data: Path, folder: Path, num_workers: int, epochs: int, stop_at: int | None) -> None:
    """Go on from the last checkpoint."""
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[RunCheckpoint(SAVE_EVERY)],
    )  # fmt: skip
    last = last_checkpoint(folder)
    trainer.fit(
        Recording(folder / "steps.jsonl", stop_at),
        datamodule=data_module(data, num_workers),
        ckpt_path=last if last.exists() else None,
        weights_only=False,
    )


def wait_for_moment(child: int, log: Log, moment: int, chance: random.Random) -> None:
    """Until the training has done step `moment` and a little longer; by chance, only for a while."""
    seconds = chance.random() * LONGEST_START if chance.random() < IN_START else float("inf")
    latest = time.monotonic() + seconds
    while log.read() < moment and time.monotonic() < latest:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)
    time.sleep(chance.random() * 0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--seed", type=int, default=None, help="of the moments of the kills; without it by chance")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = soak(Path(folder), options.kills, options.epochs, options.samples, random.Random(seed))
    for name, value in {"seed": seed, **asdict(result)}.items():
        print(f"{name.replace('_', ' '):>16}  {value}")
    print(f"every sample exactly once an epoch: {'yes' if result.is_exact else 'NO'}")
    print(json.dumps({"seed": seed, **asdict(result), "exact": result.is_exact}))
    sys.exit(not result.is_exact)


if __name__ == "__main__":
    main()
