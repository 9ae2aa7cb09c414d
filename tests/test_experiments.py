"""Every shipped experiment explains its keys, composes, and can be built without any data."""

from pathlib import Path

import pytest

from zimage_lit import cli
from zimage_lit.config import PACKAGE_EXPERIMENTS, compose, is_graph, key_comments, list_experiments, read_yaml
from zimage_lit.validate import check_config

FILES = sorted(PACKAGE_EXPERIMENTS.rglob("*.yaml"))
EXPERIMENTS = [
    path.relative_to(PACKAGE_EXPERIMENTS).with_suffix("").as_posix() for path in FILES if path.parent.name != "defaults"
]
DESCRIPTIONS = list_experiments()
GRAPHS = [name for name in EXPERIMENTS if is_graph(name)]
TRAININGS = [name for name in EXPERIMENTS if name not in GRAPHS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE_EXPERIMENTS).as_posix())
def test_every_setting_has_a_comment(path: Path) -> None:
    comments = key_comments(path)
    if "stages" in read_yaml(path):  # a stage says what it is for; most of its settings only name other stages
        comments = {key: comment for key, comment in comments.items() if key.endswith(".run")}
    inner = {key.rpartition(".")[0] for key in comments}
    silent = [key for key, comment in comments.items() if not comment and key not in inner]
    assert set(silent) <= {"description", "defaults"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_describes_itself_in_one_line(name: str) -> None:
    description = DESCRIPTIONS[name]
    assert description and "\n" not in description


# What an experiment leaves to the person who runs it.
OWN = [
    "model.init_args.init_from=model",
    "data.init_args.data_dir=data",
    "trainer.callbacks.samples.init_args.prompts=[a boat]",
]
GIVEN = {
    "finetune": OWN,
    "lora": OWN,
    **{name: ["data.init_args.data_dir=data"] for name in TRAININGS if name.startswith("z-image-6b/")},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all, for MLflow takes seconds to set one up."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.mark.parametrize("name", TRAININGS)
def test_every_experiment_is_valid_and_can_be_built(
    name: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("transformer", "vae"):  # of a pipeline, as much as is read before training
        (tmp_path / "model" / part).mkdir(parents=True)
    (tmp_path / "model/transformer/config.json").write_text("{}")
    (tmp_path / "model/vae/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    here = ["trainer.accelerator=cpu", "trainer.devices=1", f"trainer.logger.init_args.tracking_uri={store}"]
    config = compose(name, [*here, *GIVEN.get(name, [])])
    check_config(config)
    built = cli.build(config)
    assert type(built.model).__name__ == config["model"]["class_path"].rpartition(".")[2]
    assert type(built.datamodule).__name__ == config["data"]["class_path"].rpartition(".")[2]
    named = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"].values()]
    assert set(named) <= {type(callback).__name__ for callback in built.trainer.callbacks}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_is_valid_and_has_a_table(name: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", name, "--dry-run"]) == 0
    assert name.rpartition("/")[2] in capsys.readouterr().out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_help_page(name: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", name, "--help"]) == 0
    page = capsys.readouterr().out
    assert "=???" not in page
    for setting in GIVEN.get(name, []):
        assert f"{setting.partition('=')[0]}=(must be given)" in page
