"""A run killed with SIGKILL at random moments and started again equals the uninterrupted run, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

STEPS = 20
SETTINGS = [
    f"trainer.max_steps={STEPS}",
    "trainer.accelerator=cpu",
    "trainer.logger=false",
    "trainer.enable_progress_bar=false",
    "trainer.callbacks.samples=null",
    "trainer.callbacks.score=null",
    "trainer.callbacks.export=null",
    "trainer.callbacks.report=null",
    "trainer.callbacks.checkpoint.init_args.every_n_steps=3",
    "trainer.callbacks.recorder.class_path=recorder.LossRecorder",
    "model.init_args.backbone={preset: tiny, dim: 64, n_layers: 1, n_heads: 2, n_kv_heads: 2, pad_multiple: 8}",
    "data.init_args.num_samples=60",
    "data.init_args.num_val_samples=8",
    "data.init_args.batch_size=8",  # 7 steps an epoch: the run crosses two epochs
]
KINDS = {
    "full": [],
    "lora": ["model.init_args.lora={rank: 4, dropout: 0.1, dora: true}", "model.init_args.optimizer.name=adamw"],
}


class ForkServer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first_run = [*words("first", folder / "first.txt", 0, "lora"), "trainer.max_steps=1"]
        tests = Path(__file__).parent
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(tests / "fork_server.py"), json.dumps(first_run)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr.txt").open("ab"),
            text=True,
        )

    def start(self, words: list[str]) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        """The next line that is a number: a run's own messages share the stream."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip().lstrip("-").isdigit():
                return int(line)
        raise AssertionError(f"the server died: {(self.folder / 'stderr.txt').read_text()[-2000:]}")

    def run(self, words: list[str]) -> int:
        self.start(words)
        return self.answer()

    def run_and_kill(self, words: list[str], losses: Path, after_lines: int, delay: float) -> int:
        """SIGKILL once `losses` has so many lines, and a moment later."""
        child = self.start(words)
        while len(lines(losses)) < after_lines:
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        return self.answer()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("killed"))
    yield server
    server.process.kill()
    server.process.wait()


def words(name: str, losses: Path, num_workers: int, kind: str) -> list[str]:
    return [
        "quickstart",
        f"run.name={name}",
        f"trainer.callbacks.recorder.init_args.path={losses}",
        f"data.init_args.num_workers={num_workers}",
        *SETTINGS,
        *KINDS[kind],
    ]


@pytest.mark.parametrize(("num_workers", "kind"), [(0, "full"), (2, "full"), (0, "lora")])
def test_five_kills_change_no_loss_and_no_weight(server: ForkServer, num_workers: int, kind: str) -> None:
    run = f"{num_workers}-{kind}"
    whole, torn = (server.folder / f"{name}-{run}.txt" for name in ("whole", "torn"))
    assert server.run(words(f"whole-{run}", whole, num_workers, kind)) == 0
    chance = random.Random()
    moments = sorted(chance.sample(range(1, STEPS), 5))
    print("killed after steps", moments)  # shown when the test fails
    for moment in moments:
        # steps that were done again lengthen the file: wait for the step itself
        done = [int(line.split()[0]) for line in lines(torn)]
        again = len(done) + max(1, moment - saved_step(server.folder / f"outputs/torn-{run}"))
        command = words(f"torn-{run}", torn, num_workers, kind)
        assert server.run_and_kill(command, torn, again, chance.random() * 0.05) == -signal.SIGKILL
    assert server.run(words(f"torn-{run}", torn, num_workers, kind)) == 0

    expected = dict(line.split() for line in lines(whole))
    assert [int(step) for step in expected] == list(range(1, STEPS + 1))
    seen = [line.split() for line in lines(torn) if len(line.split()) == 2]
    assert {step for step, _ in seen} == set(expected)
    assert all(loss == expected[step] for step, loss in seen)
    assert len(seen) > STEPS  # some steps were really done twice
    first, second = (
        torch.load(server.folder / f"outputs/{name}-{run}/checkpoints/last.ckpt", weights_only=True)
        for name in ("whole", "torn")
    )
    assert first["global_step"] == second["global_step"] == STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(first[part], second[part])
    assert_equal(first["callbacks"]["EMA"], second["callbacks"]["EMA"])


def saved_step(folder: Path) -> int:
    path = folder / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["global_step"] if path.exists() else 0


def assert_equal(first: object, second: object) -> None:
    """The same structure with the same bits."""
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor) and torch.equal(first, second)
    elif isinstance(first, dict):
        assert isinstance(second, dict) and first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert isinstance(second, list | tuple) and len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second
