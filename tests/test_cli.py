"""The commands: what they answer at once, how they refuse, and how a run ends, stops and continues."""

import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from zimage_lit import cli
from zimage_lit.config import as_typed
from zimage_lit.run_folder import read_status

REPOSITORY = Path(__file__).parents[1]
TOY = """
description: a toy
trainer:
  max_steps: 12  # optimiser steps
  accelerator: cpu
  devices: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    decay: {class_path: toys.Decay, init_args: {decay: 0.9}}
    # where to continue from
    checkpoint:
      class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: "${run.output_dir}/checkpoints", save_last: true, every_n_train_steps: 5}
model:
  class_path: toys.ToyModule
  init_args:
    encoder: {class_path: toys.ToyEncoder, init_args: {folder: "${data.init_args.folder}/encoder"}}
    trace: ${run.name}.txt
data:
  class_path: toys.ToyDataModule
  init_args: {folder: here}
"""
SIGTERM_AT_7 = ["trainer.callbacks.signal.class_path=toys.SignalAt", "trainer.callbacks.signal.init_args.step=7"]


@pytest.fixture(autouse=True)
def toys_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one experiment, `toy`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "toy.yaml").write_text(TOY)
    return tmp_path


def command(*words: str, **keywords: object) -> subprocess.Popen:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    return subprocess.Popen(
        [sys.executable, "-m", "zimage_lit", *words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **keywords,  # type: ignore[call-overload]
    )


def weights(folder: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


# ---------------------------------------------------------------------------------------------------- pages


def test_help_and_list_import_neither_torch_nor_lightning(toy: Path) -> None:
    code = (
        "import sys; from zimage_lit.cli import TASKS, main\n"
        "for words in (['--help'], ['run', '--help'], ['run', '--list'], ['run', 'toy', '--help'],\n"
        "              ['run', 'toy', '--print-config'], *(['run', task, '--help'] for task in TASKS)):\n"
        "    assert main(words) == 0, words\n"
        "heavy = {'torch', 'lightning', 'numpy', 'transformers', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    path = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    answer = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "a toy" in answer.stdout


def test_the_list_names_experiments_and_tasks(toy: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "--list"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert {"toy", "generate"} <= listed
    assert not any(name.startswith("defaults/") for name in listed)


def test_the_help_of_an_experiment_shows_keys_values_and_comments(toy: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "toy", "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("a toy\n")
    line = next(line for line in page.splitlines() if "trainer.max_steps=12" in line)
    assert line.endswith("optimiser steps")


def test_print_config_shows_what_would_run_and_runs_again_as_a_file(toy: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "toy", "trainer.max_steps=3", "data.init_args.folder=there", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "max_steps: 3" in printed and "folder: there/encoder" in printed
    Path("again.yaml").write_text(printed)
    assert cli.main(["run", "again.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "toyy"], "there is no experiment or task 'toyy' (did you mean 'toy'?)"),
        (["run", "qqq"], "experiments nor zimage-lit has one; --list shows them all"),
        (["run", "generte", "checkpoint=x"], "(did you mean 'generate'?)"),
        (
            ["run", "toy", "trainer.max_step=3"],
            "trainer.max_step is not a setting of Trainer (did you mean 'max_steps'?)",
        ),
        (["run", "toy", "model.init_args.dropot=0.1"], "(did you mean 'dropout'?)"),
        (["run", "toy", "new.section=1"], "new is not a setting"),
        (["run", "toy", "trainer.callbacks.dcay.init_args.decay=1"], "(did you mean 'decay'?)"),
        (["run", "toy", "--max_steps", "3"], "unknown option '--max_steps': settings are written key=value"),
        (["run", "trainer.max_steps=3"], "the name of an experiment comes before"),
        (["train", "toy"], "unknown command 'train'"),
        (["run", "toy", "model.init_args.encoder.init_args.width=2000"], "width must not exceed 1000"),
        (["run", "toy", "trainer.max_steps=-5"], "the settings cannot be used: "),
    ],
)
def test_wrong_words_are_one_sentence_and_code_2(
    toy: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (toy / "outputs").exists()


def test_the_sentence_of_a_part_is_not_buried_in_the_parsers(toy: Path, capsys: pytest.CaptureFixture) -> None:
    (toy / "no.db").write_text("this is not a database, whatever its name says")
    logger = "trainer.logger.init_args"
    words = [
        "trainer.logger.class_path=zimage_lit.tracking.ResilientMLFlowLogger",
        f"{logger}.experiment_name=x",
        f"{logger}.output_dir=out",
        f"{logger}.tracking_uri=sqlite:///{toy}/no.db",
    ]
    assert cli.main(["run", "toy", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: The MLflow store sqlite:///") and error.endswith("file is not a database")


# ---------------------------------------------------------------------------------------------------- `lightning`


def test_lightning_run_is_ours(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning", "run", "--help"])
    assert cli.lightning_main() == 0
    assert capsys.readouterr().out.startswith("usage: lightning run NAME")


def test_other_words_reach_the_lightning_sdk_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    sdk = types.ModuleType("lightning_sdk.cli.entrypoint")
    sdk.main_cli = lambda: called.append(sys.argv)  # type: ignore[attr-defined]
    for name in ("lightning_sdk", "lightning_sdk.cli"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lightning_sdk.cli.entrypoint", sdk)
    monkeypatch.setattr(sys, "argv", ["lightning", "login"])
    assert cli.lightning_main() == 0
    assert called == [["lightning", "login"]]


def test_without_the_sdk_other_words_print_the_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "lightning_sdk", None)
    monkeypatch.setattr(sys, "argv", ["lightning", "login"])
    assert cli.lightning_main() == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


# ---------------------------------------------------------------------------------------------------- runs


def test_a_run_leaves_its_settings_and_status_and_is_not_repeated(toy: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "toy"]) == 0
    assert read_status(Path("outputs/toy")) == {"status": "finished", "step": 12}
    capsys.readouterr()
    assert cli.main(["run", "outputs/toy/config.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == Path("outputs/toy/config.yaml").read_text()
    assert cli.main(["run", "toy"]) == 0
    assert "toy is finished (step 12" in capsys.readouterr().out
    assert cli.main(["run", "toy", "trainer.max_steps=15"]) == 0
    assert "continuing toy from" in capsys.readouterr().out
    assert cli.main(["run", "toy", "model.init_args.dropout=0.3"]) == 2
    assert "model.init_args.dropout: absent there, 0.3 now" in capsys.readouterr().err
    assert cli.main(["run", "toy", "run.resume=never", "model.init_args.dropout=0.3"]) == 0
    assert read_status(Path("outputs/toy.1")) == {"status": "finished", "step": 15}
    assert read_status(Path("outputs/toy")) == {"status": "finished", "step": 12}


def test_the_bar_is_that_of_the_run_and_no_line_advertises(toy: Path) -> None:
    out, err = command("run", "toy", "trainer.enable_progress_bar=true").communicate()
    assert re.search(r"Training .* 12/12 ", out)
    assert "GPU available" in err and "Tip" not in err and "TPU" not in err


@pytest.mark.parametrize("name", cli.TASKS)
def test_the_help_of_a_task_shows_what_its_settings_are_without_being_given(
    name: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["run", name, "--help"]) == 0
    page = capsys.readouterr().out
    module, settings = cli.TASKS[name].function.partition(":")[0], cli.TASKS[name].settings
    for field in dataclasses.fields(getattr(importlib.import_module(module), settings)):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if default is dataclasses.MISSING:
            assert re.search(rf"^  {field.name} \(must be given\) ", page, re.MULTILINE)
        else:
            default = list(default) if isinstance(default, tuple) else default
            assert re.search(rf"^  {field.name}={re.escape(as_typed(default))}( |$)", page, re.MULTILINE)


def test_the_help_of_a_task_names_the_values_that_can_be_chosen(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "export", "--help"]) == 0
    page = capsys.readouterr().out
    assert "pipeline, transformer, comfyui, lora-diffusers or lora-comfyui" in page
    assert "bfloat16 or float32; of the written weights" in page


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_signal_in_mid_step_stops_cleanly_and_the_run_continues_exactly(
    toy: Path, capsys: pytest.CaptureFixture, number: int, accumulate: int
) -> None:
    words = [*SIGTERM_AT_7, f"trainer.callbacks.signal.init_args.number={int(number)}"]
    words += [f"trainer.accumulate_grad_batches={accumulate}"]
    before = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    assert cli.main(["run", "toy", *words]) == 128 + number
    assert "stopped at step 8: the same command continues from" in capsys.readouterr().err
    assert read_status(Path("outputs/toy")) == {"status": "stopped", "step": 8}
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == before
    assert cli.main(["run", "toy", *words]) == 0
    whole = ["run.name=whole", f"trainer.accumulate_grad_batches={accumulate}"]
    assert cli.main(["run", "toy", *whole]) == 0
    assert Path("toy.txt").read_text() == Path("whole.txt").read_text()
    for name, tensor in weights("outputs/whole").items():
        assert torch.equal(tensor, weights("outputs/toy")[name])


def test_sigterm_from_outside_ends_the_command_with_its_code(toy: Path) -> None:
    process = command("run", "toy", "trainer.max_steps=100000", "data.init_args.size=1000000")
    try:
        deadline = time.monotonic() + 120
        while not Path("toy.txt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped at step" in errors and "Traceback" not in errors
    assert Path("outputs/toy/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_all_processes_meet_is_said_by_the_first_alone(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, rank: int
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    fail = "trainer.callbacks.fail={class_path: toys.FailAt, init_args: {step: 3, shared: true}}"
    assert cli.main(["run", "toy", fail]) == 1
    assert capsys.readouterr().err.count("all toys are broken: mend them") == 1 - rank


def test_a_user_error_while_running_is_a_sentence_and_a_bug_keeps_its_traceback(
    toy: Path, capsys: pytest.CaptureFixture
) -> None:
    fail = ["trainer.callbacks.fail.class_path=toys.FailAt", "trainer.callbacks.fail.init_args.step=3"]
    assert cli.main(["run", "toy", *fail, "trainer.callbacks.fail.init_args.friendly=true"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: the toy is broken: mend it"
    assert read_status(Path("outputs/toy"))["status"] == "failed"
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["run", "toy", *fail])
