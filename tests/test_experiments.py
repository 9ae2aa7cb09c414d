"""Every shipped experiment explains its keys, composes, and can be built without any data."""

from pathlib import Path

import pytest

from zimage_lit import cli
from zimage_lit.config import PACKAGE_EXPERIMENTS, compose, key_comments, list_experiments
from zimage_lit.validate import check_config

FILES = sorted(PACKAGE_EXPERIMENTS.rglob("*.yaml"))
EXPERIMENTS = [
    path.relative_to(PACKAGE_EXPERIMENTS).with_suffix("").as_posix() for path in FILES if path.parent.name != "defaults"
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE_EXPERIMENTS).as_posix())
def test_every_setting_has_a_comment(path: Path) -> None:
    comments = key_comments(path)
    inner = {key.rpartition(".")[0] for key in comments}
    silent = [key for key, comment in comments.items() if not comment and key not in inner]
    assert set(silent) <= {"description", "defaults"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_describes_itself_in_one_line(name: str) -> None:
    description = list_experiments()[name]
    assert description and "\n" not in description


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_valid_and_can_be_built(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(name, ["trainer.accelerator=cpu", "trainer.devices=1"])
    check_config(config)
    built = cli.build(config)
    assert type(built.model).__name__ == config["model"]["class_path"].rpartition(".")[2]
    assert type(built.datamodule).__name__ == config["data"]["class_path"].rpartition(".")[2]
    named = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"].values()]
    assert set(named) <= {type(callback).__name__ for callback in built.trainer.callbacks}
