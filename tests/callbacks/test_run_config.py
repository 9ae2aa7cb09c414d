"""What a run keeps of its own making: settings, environment and commit."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zimage_lit.callbacks.run_config import RunConfig, git_state
from zimage_lit.config import to_yaml


class Logger:
    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.tags: dict[str, str] = {}

    def log_text(self, text: str, artifact_path: str) -> None:
        self.texts[artifact_path] = text

    def log_tags(self, tags: dict[str, str]) -> None:
        self.tags.update(tags)


def test_settings_and_environment_reach_the_folder_and_the_loggers_that_take_them(tmp_path: Path) -> None:
    part = {"class_path": "x.Part", "init_args": {"folder": "y"}}
    logger, config = (
        Logger(),
        {
            "run": {"name": "x"},
            "seed_everything": 3,
            "trainer": {"max_steps": 1, "precision": "32-true"},
            "model": {"class_path": "x.Stage", "init_args": {"codec": part, "optimizer": {"lr": 0.1}, "seed": 3}},
            "data": {"class_path": "x.Data", "init_args": {"batch_size": 8, "data_dir": "z"}},
        },
    )
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    plain = SimpleNamespace()  # a logger that keeps neither texts nor tags
    trainer: Any = SimpleNamespace(loggers=[plain, logger], strategy=strategy, global_step=0)
    callback = RunConfig(str(tmp_path / "run"), config)
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    callback.on_fit_start(trainer, None)  # type: ignore[arg-type]
    assert (tmp_path / "run" / "config.yaml").read_text() == to_yaml(config) == logger.texts["config/config.yaml"]
    assert logger.tags["torch"] == torch.__version__
    settings = {name: value for name, value in logger.tags.items() if name.startswith("setting/")}
    assert settings == {
        "setting/optimizer/lr": "0.1", "setting/seed": "3", "setting/batch_size": "8", "setting/max_steps": "1"
    }  # fmt: skip
    assert {"python", "lightning", "platform", "device", "zimage_lit"} <= set(logger.tags)


def test_the_commit_and_whether_the_code_differs_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == {}

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    git("init", "-q")
    assert git_state(tmp_path) == {}
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    (tmp_path / "untracked").write_text("")
    assert git_state(tmp_path) == {"git.commit": commit, "git.dirty": "false"}
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path) == {"git.commit": commit, "git.dirty": "true"}
