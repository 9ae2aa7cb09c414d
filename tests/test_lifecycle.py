"""`lightning run lifecycle` at a size that takes a minute: every stage really runs, for two steps on few pictures."""

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from docs_pages import DOCS, blocks_of, run_words
from mlflow import MlflowClient

from evaluation.fidelity.tinyworld_classifier import ClassifierConfig
from zimage_lit import cli, graph_run
from zimage_lit.errors import UserError
from zimage_lit.files import read_json
from zimage_lit.graph import read_graph
from zimage_lit.rewards import tinyworld_likelihood

SMALL = """
description: {name} with few pictures
defaults: [tiny/{name}]
data: {{init_args: {{num_samples: 200, num_val_samples: 16}}}}
"""
# Steps and pictures as few as can be; the rest is the experiment's. A model that has not learnt draws nothing that
# passes, so pairs are chosen by brightness.
QUICK = {
    "score.prompts": 1,
    "stages.prepare.set.experiments": "[small/low-res, small/omni, small/sft]",
    "stages.merge.set.sweep": 1,
    "stages.merge.set.score_arguments.prompts_per_task": 1,
    "stages.merge-in-8-steps.set.prompts": 1,
    "stages.pairs.set.samples_per_prompt": 8,
    "stages.pairs.set.num_prompts": 4,
    "stages.pairs.set.pass_rate": "[0.0, 1.0]",
    "stages.pairs.set.winner_at_least": 0.0,
    "stages.pairs.set.margin": "[0.00001, 1.0]",
    "stages.pairs.set.objective": "brightness",
    "stages.pairs.set.rewards.bright.class_path": "zimage_lit.rewards.controls.Brightness",
    "stages.evaluate.set.prompts": 1,
    **{f"stages.{name}.run": f"small/{name}" for name in ("low-res", "omni", "sft-words", "sft-counting")},
    **{
        f"stages.{name}.set.trainer.max_steps": 2
        for name in ("low-res", "omni", "sft-words", "sft-counting", "decoupled-dmd", "dmdr", "dpo", "grpo")
    },
    **{f"stages.{name}.set.data.init_args.batch_size": 4 for name in ("decoupled-dmd", "dmdr", "dpo", "grpo")},
}
STAGES = [
    "prepare", "low-res", "omni", "sft-words", "sft-counting", "merge", "merge-in-8-steps", "decoupled-dmd", "dmdr",
    "pairs", "dpo", "grpo", "evaluate",
]  # fmt: skip


def in_this_process(words: Sequence[str], environment: Mapping[str, str], beat: object) -> int:
    """A stage's command without the seconds that a new process takes to import everything."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        return cli.main(["run", *words], program="lightning")
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the lifecycle was run."""
    folder = tmp_path_factory.mktemp("lifecycle")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        (folder / "experiments/small").mkdir(parents=True)
        for name in ("low-res", "omni", "sft", "sft-words", "sft-counting"):
            (folder / f"experiments/small/{name}.yaml").write_text(SMALL.format(name=name))
        patch.setattr(graph_run, "run_command", in_this_process)
        quick = partial(ClassifierConfig, steps=2, num_pictures=64)  # of the reward; it need not be right
        patch.setattr(tinyworld_likelihood, "ClassifierConfig", quick)
        assert cli.main(["run", "lifecycle", *(f"{key}={value}" for key, value in QUICK.items())]) == 0
    return folder


def test_every_stage_is_finished_and_hands_something_on(finished: Path) -> None:
    folder = finished / "outputs/lifecycle"
    state = read_json(folder / "graph.json")["stages"]
    assert list(state) == STAGES and {one["status"] for one in state.values()} == {"finished"}
    for name in ("low-res", "omni", "sft-words", "sft-counting", "merge", "decoupled-dmd", "dmdr", "dpo", "grpo"):
        assert (folder / name / "pipeline/model_index.json").is_file()
        assert read_json(folder / name / "evaluation/tinyworld-en/result.json")["model"] == name
    assert (folder / "evaluate/tinyworld-zh/result.json").is_file()


def test_a_picture_costs_fewer_evaluations_once_it_is_distilled(finished: Path) -> None:
    told = (finished / "outputs/lifecycle/report.html").read_text()
    _, _, table = told.partition("<table class='pictures'>")
    rows = re.findall(r"<tr><td>([\w-]+)<br>.*?<br>([\d.]+) evaluations", table.partition("</table>")[0])
    costs = {name: float(evaluations) for name, evaluations in rows}
    assert list(costs) == [name for name in STAGES if name not in ("prepare", "pairs")]
    assert costs["merge-in-8-steps"] == costs["decoupled-dmd"] == costs["grpo"] == 8
    assert costs["omni"] > 30


def test_the_low_resolution_is_its_own(finished: Path) -> None:
    sizes = {
        name: read_json(finished / f"outputs/lifecycle/{name}/evaluation/tinyworld-en/result.json")["pictures"]["width"]
        for name in ("low-res", "omni", "grpo")
    }
    assert sizes == {"low-res": 32, "omni": 64, "grpo": 64}


@pytest.fixture(scope="module")
def seeds() -> ModuleType:
    return importlib.import_module("benchmarks.lifecycle")


def test_runs_of_several_seeds_make_one_table(finished: Path, seeds: ModuleType, capsys: pytest.CaptureFixture) -> None:
    folder = finished / "outputs/lifecycle"
    seeds.main([str(folder), str(folder)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    told = [(line[0], line[3]) for line in lines]
    assert [name for name, _ in told] == [
        name for name in STAGES if name not in ("prepare", "pairs") for _ in range(2 if name == "merge" else 1)
    ]
    assert told[4:6] == [("merge", "sft-words"), ("merge", "sft-counting")]
    for line in lines:
        first, second = line[2].split("<br>")[0].split("; ")
        assert first == second
        if line[3]:
            one, other = line[6].split("; ")
            assert one == other == line[4].split(" ")[0]  # both seeds together change as each of them has
            assert line[5] == one  # equal changes tell nothing of how much runs vary


def test_a_run_that_is_not_finished_is_no_line_of_a_table(tmp_path: Path, seeds: ModuleType) -> None:
    with pytest.raises(UserError, match="has no graph"):
        seeds.rows_in(tmp_path)
    (tmp_path / "graph.json").write_text('{"stages": {"prepare": {"fingerprint": "", "status": "finished"}}}')
    with pytest.raises(UserError, match="not finished are low-res, omni"):
        seeds.rows_in(tmp_path)


def test_one_run_with_a_child_for_each_stage(finished: Path) -> None:
    client = MlflowClient(f"sqlite:///{finished}/outputs/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "zimage-lit"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "lifecycle"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.data.tags["stage"] for run in children} >= set(STAGES) - {"prepare", "pairs"}
    assert parent.data.metrics["stages/evaluations"] == 8
    points = client.get_metric_history(parent.info.run_id, "stages/overall")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]  # all but prepare and pairs
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert "report.html" in artifacts


def test_what_is_finished_stays(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(graph_run, "run_command", lambda words, *_: pytest.fail(f"{words} was run"))
    assert cli.main(["run", "lifecycle", *(f"{key}={value}" for key, value in QUICK.items())]) == 0
    assert capsys.readouterr().out.count("finished already") == len(STAGES)


def test_data_of_another_experiment_change_the_stage_that_makes_them(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zimage_lit.graph import fingerprints

    monkeypatch.chdir(finished)
    words = [f"{key}={value}" for key, value in QUICK.items()]
    before = fingerprints(read_graph("lifecycle", words))["prepare"]
    path = finished / "experiments/small/sft.yaml"
    kept = path.read_text()
    path.write_text(kept.replace("200", "300"))
    try:
        assert fingerprints(read_graph("lifecycle", words))["prepare"] != before
    finally:
        path.write_text(kept)


def test_the_guides_table_is_that_of_the_graph() -> None:
    text = (DOCS / "lifecycle.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| ([\w/-]+) \| (.*?) \| ?(.*?) ?\|$", text, flags=re.MULTILINE)[2:]
    graph = read_graph("lifecycle")
    assert [(name, runs) for name, runs, *_ in rows] == [(stage.name, stage.runs) for stage in graph.stages]
    for stage, (_, _, purpose, compared) in zip(graph.stages, rows, strict=True):
        assert all(lifted in purpose for lifted in stage.lifts)
        assert compared == ", ".join(stage.against)


def test_the_guides_commands_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lifecycle itself is run above; its other commands are planned, and data are refused or checked."""
    monkeypatch.chdir(tmp_path)
    found = [words for language, block in blocks_of("lifecycle.md") if language == "bash" for words in
             (run_words(command) for command in block.splitlines()) if words]  # fmt: skip
    assert [words[0] for words in found] == ["lifecycle", "z-image-6b/lifecycle", "lifecycle", "data"]
    for words in found[:-1]:
        assert cli.main(["run", *words, *(["--dry-run"] if "--dry-run" not in words else [])]) == 0
    monkeypatch.setattr(
        "data_modules.tinyworld.prepare.prepare", lambda folder, *_, **__: Path(folder).mkdir(parents=True)
    )
    assert cli.main(["run", *found[-1]]) == 0
    assert {path.name for path in (tmp_path / "data/tiny").iterdir()} == {"low-res", "omni"}


# ------------------------------------------------------------------------------------------------- lightning run data


def test_data_are_made_once(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(finished)
    made = finished / "outputs/lifecycle/prepare/small/omni/manifest.json"
    before = made.stat().st_mtime_ns
    assert cli.main(["run", "data", "experiments=[small/omni]", "output=outputs/lifecycle/prepare"]) == 0
    assert made.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("experiments", "message"),
    [
        ("[]", "experiments is empty"),
        ("[tiny/omnni]", "tiny/omnni"),
        ("[z-image-6b/finetune]", "z-image-6b/finetune reads data that are there"),
    ],
)
def test_data_that_nobody_makes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, experiments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "data", f"experiments={experiments}"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "data").exists()
