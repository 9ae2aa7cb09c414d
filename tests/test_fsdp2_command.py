"""`lightning run … trainer.strategy=fsdp2` as it is typed: pictures, a stop, going on, what is left."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from zimage_lit import cli
from zimage_lit.pipeline import ZImagePipeline, load_pipeline
from zimage_lit.run_folder import last_checkpoint, read_status
from zimage_lit.stages.initial_weights import open_weights

REPOSITORY = Path(__file__).parents[1]
WORDS = [
    "run",
    "quickstart",
    "run.name=sharded",
    "trainer.max_steps=5",
    "trainer.accelerator=cpu",
    "trainer.strategy=fsdp2",
    "trainer.precision=32-true",
    "trainer.logger=false",
    "trainer.enable_progress_bar=false",
    "trainer.callbacks.samples.init_args.sampling.num_inference_steps=1",
    "trainer.callbacks.score.init_args.prompts_per_task=1",
    "trainer.callbacks.checkpoint.init_args.every_n_steps=2",
    "trainer.callbacks.checkpoint.init_args.keep_every_n_steps=2",
    "model.init_args.optimizer.name=adamw",
    "model.init_args.backbone={preset: tiny, n_layers: 1}",
    "data.init_args.num_samples=64",
    "data.init_args.num_val_samples=8",
]
STOP = ["trainer.callbacks.stop.class_path=toys.SignalAt", "trainer.callbacks.stop.init_args={step: 2, rank: 1}"]


def command(folder: Path, *words: str) -> tuple[int, str]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "zimage_lit", *WORDS, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.returncode, answer.stdout + answer.stderr


def in_process(folder: Path, words: list[str]) -> tuple[int, str]:
    """The same command in a process that is there already, and that must not stay: it may begin a process group."""
    os.chdir(folder)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main([*WORDS, *words])
    return code, said.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("command")


def test_two_processes_are_stopped_by_a_signal_and_one_goes_on(folder: Path, monkeypatch) -> None:
    """The signal reaches the second process alone; then one process takes over with batches twice as large."""
    code, said = command(folder, "trainer.devices=2", "data.init_args.batch_size=4", *STOP)
    assert code == 128 + 15, said
    assert said.count("stopped at step 3") == 1
    run = folder / "outputs" / "sharded"
    last = last_checkpoint(run)
    assert last.is_dir() and read_status(run) == {"status": "stopped", "step": 3}
    assert (run / "samples/step-00000000.png").is_file()

    words = [f"run.resume={last}", "trainer.devices=1", "data.init_args.batch_size=8"]
    with Ranks(1) as one:
        ((code, said),) = one(in_process, folder, words)
    assert code == 0, said
    assert read_status(run) == {"status": "finished", "step": 5}
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-00000000.png", "step-00000005.png"]
    assert (run / "scores/step-00000005.json").is_file() and (run / "report.html").is_file()
    assert (last.parent / "step-00000002.ckpt").is_dir()

    monkeypatch.chdir(folder)  # what it leaves can be used by a single process that knows nothing of shards
    weights = open_weights(last)
    exported = ZImagePipeline.from_pretrained(run / "pipeline", "cpu").backbone.state_dict()
    assert exported.keys() == set(weights) and all(torch.equal(exported[name], weights[name]) for name in weights)
    for place in (last, last.parent / "step-00000002.ckpt"):
        (picture,) = load_pipeline(place, "cpu")("a circle", num_inference_steps=1)
        assert picture.size == (64, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.strategy=auto", "run.resume=outputs/sharded/checkpoints/last.ckpt"], "give trainer.strategy=fsdp2"),
        (["model.init_args.optimizer.name=muon"], "optimizer.name=muon orthogonalises whole matrices"),
        (["trainer.precision=64-true"], "trainer.strategy=fsdp2 knows trainer.precision=32-true, bf16-mixed"),
        (["trainer.strategy={class_path: zimage_lit.strategies.FSDP2Strategy, init_args: {replicate: 2}}"],
         "replicate=2 does not divide the 1 devices of the run"),
        (["model.init_args.parallelize.compile_backend=fast"], "parallelize.compile_backend must be one of"),
        (["model.init_args.parallelize.activation_checkpointing=some"], "must be one of 'none', 'selective', 'full'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_one_sentence(folder: Path, words: list[str], message: str) -> None:
    with Ranks(1) as one:
        ((code, said),) = one(in_process, folder, ["run.name=wrong", *words])
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code in (1, 2) and message in line
