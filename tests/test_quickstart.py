"""The quickstart itself, made small: everything that the README promises is really there afterwards."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_modules.tinyworld.verifier import judge
from data_modules.tinyworld.world import draw, heldout_prompts
from zimage_lit import cli
from zimage_lit.callbacks.tinyworld_score import summarise
from zimage_lit.config import compose, settings_from
from zimage_lit.grids import labelled_grid
from zimage_lit.pipeline import GenerateSettings
from zimage_lit.validate import check_config

README = Path(__file__).parents[1] / "README.md"

SMALL = [
    "trainer.max_steps=6",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=2",
    "trainer.enable_progress_bar=false",
    "trainer.callbacks.samples.init_args.every_n_steps=3",
    "trainer.callbacks.samples.init_args.sampling.num_inference_steps=2",
    "trainer.callbacks.score.init_args.prompts_per_task=2",
    "trainer.callbacks.report.init_args.every_n_steps=2",
    "data.init_args.num_samples=64",
    "data.init_args.num_val_samples=8",
    "data.init_args.batch_size=8",
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert cli.main(["run", "quickstart", *SMALL]) == 0
    return folder


def test_report_is_one_file_with_grids_scores_curve_and_settings(run_folder):
    page = (run_folder / "outputs/quickstart/report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4  # three grids and the curve
    assert not re.search(r"(src|href)='(?!data:)", page)  # nothing to fetch
    for words in ("step 0", "step 6", "overall", "counting", "position", "[0.", "max_steps: 6"):
        assert words in page


def test_samples_start_at_step_zero_with_one_picture_a_prompt(run_folder):
    grids = sorted((run_folder / "outputs/quickstart/samples").glob("*.png"))
    assert [path.stem for path in grids] == ["step-00000000", "step-00000003", "step-00000006"]
    assert Image.open(grids[0]).size == Image.open(grids[2]).size


def test_scores_count_what_the_records_say(run_folder):
    files = sorted((run_folder / "outputs/quickstart/scores").glob("*.json"))
    assert [path.stem for path in files] == ["step-00000000", "step-00000006"]
    scored = json.loads(files[-1].read_text())
    assert len(scored["records"]) == 14
    for task, score in scored["tasks"].items():
        verdicts = [record["correct"] for record in scored["records"] if record["metadata"]["tag"] == task]
        assert score["n"] == len(verdicts) == 2 and score["accuracy"] == sum(verdicts) / 2
    six = [score["accuracy"] for task, score in scored["tasks"].items() if task != "word"]
    assert len(six) == 6 and scored["overall"]["accuracy"] == pytest.approx(sum(six) / 6)


def test_generate_draws_from_the_exported_pipeline(run_folder, monkeypatch):
    monkeypatch.chdir(run_folder)
    words = ["checkpoint=outputs/quickstart/pipeline", "prompts=a photo of a red circle", "output=pictures"]
    assert cli.main(["run", "generate", *words]) == 0
    pictures = [path for path in Path("pictures").rglob("*.png") if "grid" not in path.name]
    assert len(pictures) == 1 and Image.open(pictures[0]).size == (64, 64)


def test_everything_is_in_the_mlflow_store(run_folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run_folder}/outputs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "zimage-lit"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "quickstart"
    assert {"train/loss", "train/gradient_norm", "tinyworld/overall", "tinyworld/counting"} <= run.data.metrics.keys()
    assert {"output_dir", "torch", "device"} <= run.data.tags.keys()
    assert run.inputs.dataset_inputs[0].dataset.name
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "tinyworld/overall")]
    assert steps == [0, 6]
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert len([path for path in images if "prompt_00" in path and path.endswith(".png")]) == 3
    assert {"config", "scores", "report.html"} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def test_a_run_begins_from_another_one_that_mlflow_knows(run_folder, tmp_path, monkeypatch):
    """From another folder: the store is the one that the logger's key names."""
    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{run_folder}/outputs/mlflow.db"
    (run,) = MlflowClient(store).search_runs(["1"])
    monkeypatch.chdir(tmp_path)
    words = [
        *SMALL,
        f"trainer.logger.init_args.tracking_uri={store}",
        f"model.init_args.init_from=run:{run.info.run_id}",
        f"data.init_args.data_dir={run_folder}/data/tinyworld",
        "run.name=second",
        "model.init_args.optimizer.lr=0",
        "model.init_args.optimizer.muon_lr=0",
        "trainer.callbacks.score=null",
    ]
    assert cli.main(["run", "quickstart", *words]) == 0
    first, second = (
        load_file(folder / "pipeline/transformer/s3dit_model.safetensors")
        for folder in (run_folder / "outputs/quickstart", Path("outputs/second"))
    )
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight)


def test_a_finished_run_is_not_run_again(run_folder, monkeypatch, capsys):
    monkeypatch.chdir(run_folder)
    assert cli.main(["run", "quickstart", *SMALL]) == 0
    assert "is finished" in capsys.readouterr().out


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_readme_python_example_runs(run_folder, monkeypatch):
    monkeypatch.chdir(run_folder)
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert Image.open("picture.png").size == (64, 64)


def test_readme_experiment_example_is_valid(tmp_path, monkeypatch):
    (example,) = blocks("yaml")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/wider.yaml").write_text(example, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = compose("wider", ["trainer.accelerator=cpu"])
    check_config(config)
    assert cli.build(config).model.config.dim == 256


def test_readme_commands_are_understood(monkeypatch, tmp_path, capsys):
    """Every `lightning run` line of the README, so that nothing is trained or drawn."""
    monkeypatch.chdir(tmp_path)
    lines = [line.split("#")[0].strip() for line in README.read_text(encoding="utf-8").splitlines()]
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("lightning run ")]
    assert len(commands) >= 4
    for words in commands:
        if words[0] == "generate":
            settings_from(GenerateSettings, words[1:])
            continue
        if words[0] != "--list" and "--help" not in words:
            words = [*words, "--print-config"]
        assert cli.main(["run", *words]) == 0, words
    assert "quickstart" in capsys.readouterr().out


def test_summary_of_real_renders_is_right_and_of_contradicting_ones_wrong():
    """Ground truth through the whole scoring path: true pictures score 1, pictures of another prompt do not."""
    samples = [draw(i, split="heldout", task=m["tag"]) for i, m in enumerate(heldout_prompts(3))]
    summary, verdicts = summarise([judge(sample.image, sample.metadata) for sample in samples], step=0)
    assert summary["overall"]["accuracy"] == 1 and summary["tasks"]["word"]["accuracy"] == 1
    assert all(verdict["correct"] for verdict in verdicts)
    blank = np.full((64, 64, 3), 128, dtype=np.uint8)
    summary, verdicts = summarise([judge(blank, sample.metadata) for sample in samples], step=0)
    assert summary["overall"]["accuracy"] == 0 and summary["tasks"]["word"]["accuracy"] == 0
    assert all(verdict["reason"] for verdict in verdicts)


def test_grid_shows_every_picture_in_order():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    grid = labelled_grid(
        [Image.new("RGB", (8, 8), color) for color in colors], ["a", "b", "c", "d"], columns=3, cell=40
    )
    assert [grid.getpixel((8 + 48 * (i % 3) + 20, 8 + (40 + 14 + 8) * (i // 3) + 20)) for i in range(4)] == colors
