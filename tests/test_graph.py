"""Graphs of stages: what is run, what is not run again, what is refused, and how it all appears in MLflow."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from lock_holder import held_by_another

from zimage_lit import cli, graph_run
from zimage_lit.config import flatten
from zimage_lit.graph import fingerprints, read_graph

REPOSITORY = Path(__file__).parents[1]
TOY = """
description: a toy
trainer:
  max_steps: 12
  accelerator: cpu
  devices: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    checkpoint:
      class_path: zimage_lit.callbacks.checkpoint.RunCheckpoint
      init_args: {every_n_steps: 5}
model:
  class_path: toys.ToyModule
  init_args:
    encoder: {class_path: toys.ToyEncoder, init_args: {folder: here}}
    trace: ${run.output_dir}.txt
data: {class_path: toys.ToyDataModule}
"""
GRAPH = """
description: three stages, two of which begin from the first
run: {output_dir: outputs/life}
stages:
  base:
    run: toy
    set: {trainer.max_steps: 3}
  left:
    run: toy
    set: {model.init_args.encoder.init_args.folder: "${stage:base}", model.init_args.dropout: 0.2}
    note: the first of two variants
  right:
    run: toy
    set: {model: {init_args: {encoder: {init_args: {folder: "${stage:base}"}}}}}
  both:
    run: merge
    set: {variants: ["${stage:left}", "${stage:right}"], weights: [0.5, 0.5], experiment_name: null}
"""


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the experiment toy and the graph life."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/toy.yaml").write_text(TOY)
    (tmp_path / "experiments/life.yaml").write_text(GRAPH)
    return tmp_path


@pytest.fixture
def ends() -> list[str]:
    """How the graph's own run in MLflow ended, each time."""
    return []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, ends: list[str]) -> list[list[str]]:
    """What stages were asked to run, without running it and without MLflow."""
    commands: list[list[str]] = []

    def run(words: list[str], environment: object, beat: object) -> int:
        commands.append(words)
        folder = next(word.partition("=")[2] for word in words if word.startswith(("run.output_dir=", "output=")))
        Path(folder).mkdir(parents=True, exist_ok=True)
        return 0

    monkeypatch.setattr(graph_run, "run_command", run)
    logger = SimpleNamespace(run_id="1", tracking_uri="sqlite:///no.db", finalize=ends.append, log_text=lambda *_: None)
    monkeypatch.setattr(graph_run, "parent_run", lambda graph: logger)
    return commands


def run(*words: str) -> int:
    return cli.main(["run", *words], program="lightning")


def names(commands: list[list[str]]) -> list[str]:
    """The stages behind commands, in order."""
    folders = [word for words in commands for word in words if word.startswith(("run.output_dir=", "output="))]
    return [folder.rpartition("/")[2] for folder in folders]


def test_stages_run_in_order_each_with_what_the_ones_before_hand_on(life, asked):
    assert run("life") == 0
    assert names(asked) == ["base", "left", "right", "both"]
    assert asked[0] == [
        "toy", "seed_everything=0", "trainer.max_steps=3", "run.output_dir=outputs/life/base", "run.name=life/base",
    ]  # fmt: skip
    for words in asked[1:3]:
        assert "model.init_args.encoder.init_args.folder=outputs/life/base/pipeline" in words
    assert "variants=['outputs/life/left/pipeline', 'outputs/life/right/pipeline']" in asked[3]
    graph = read_graph("life")
    assert [stage.begins_from for stage in graph.stages] == [(), ("base",), ("base",), ("left", "right")]


def test_what_is_finished_is_not_run_again(life, asked, capsys):
    run("life")
    asked.clear()
    assert run("life") == 0
    assert not asked
    assert "stage 2 of 4, left (toy): finished already, in outputs/life/left" in capsys.readouterr().out


def test_a_changed_stage_is_run_anew_and_all_that_begins_from_it(life, asked):
    run("life")
    (life / "outputs/life/left/mine").write_text("kept")
    asked.clear()
    assert run("life", "stages.left.set.model.init_args.dropout=0.3") == 0
    assert names(asked) == ["left", "both"]
    assert (life / "outputs/life/left.1/mine").read_text() == "kept"
    asked.clear()
    (life / "experiments/toy.yaml").write_text(TOY.replace("max_steps: 12", "max_steps: 13"))  # base says its own
    assert run("life", "stages.left.set.model.init_args.dropout=0.3") == 0
    assert names(asked) == ["left", "right", "both"]


def test_how_a_run_is_watched_changes_nothing(life, asked):
    run("life")
    asked.clear()
    assert run("life", "stages.left.set.trainer.enable_progress_bar=true") == 0
    assert not asked


def test_a_stage_that_fails_ends_the_graph_with_its_code_and_is_gone_on_with(life, monkeypatch, asked, ends, capsys):
    works = graph_run.run_command

    def fail(words: list[str], environment: object, beat: object) -> int:
        works(words, environment, beat)
        return 3 if "run.name=life/right" in words else 0

    monkeypatch.setattr(graph_run, "run_command", fail)
    assert run("life") == 3
    assert names(asked) == ["base", "left", "right"]
    assert "right ended with code 3" in capsys.readouterr().err
    asked.clear()
    monkeypatch.setattr(graph_run, "run_command", works)
    assert run("life") == 0
    assert names(asked) == ["right", "both"] and ends == ["failed", "success"]
    assert not (life / "outputs/life/right.1").exists()  # it goes on in its folder


def test_from_runs_a_stage_and_what_begins_from_it_anew(life, asked):
    run("life")
    asked.clear()
    assert run("life", "--from", "right") == 0
    assert names(asked) == ["right", "both"]
    assert {path.name for path in (life / "outputs/life").glob("*.1")} == {"right.1", "both.1"}


def test_only_runs_one_stage_and_needs_what_it_begins_from(life, asked, capsys):
    assert run("life", "--only", "both") == 2
    assert "both begins from left, which is not finished: run --only left before it" in capsys.readouterr().err
    assert run("life", "--only", "base") == 0
    assert run("life", "--only", "left") == 0
    assert names(asked) == ["base", "left"]


def test_a_dry_run_tells_and_runs_nothing(life, asked, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run("life", "--only", "base")
    asked.clear()
    capsys.readouterr()
    assert run("life", "--dry-run", "--from", "right") == 0
    assert not asked and not (life / "outputs/life/right").exists()
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert "finished" in rows["base"] and "to run" in rows["left"] and "the first of two variants" in rows["left"]
    assert "left, right" in rows["both"] and "merge" in rows["both"]
    run("life", "--dry-run", "stages.base.set.trainer.max_steps=4")
    assert "changed: to run anew" in capsys.readouterr().out
    run("life", "--dry-run", "--only", "left")
    out = capsys.readouterr().out
    assert "left" in out and "right" not in out


def test_what_a_stage_lifts_is_compared_with_what_it_begins_from(life):
    given = ["stages.left.lifts=word", "stages.both.lifts=[overall, word]"]
    stages = {stage.name: stage for stage in read_graph("life", given).stages}
    assert stages["left"].lifts == ("word",) and stages["left"].against == ("base",)
    assert stages["both"].against == ("left", "right") and stages["right"].against == ()
    asked = read_graph("life", [*given, "stages.both.against=base"]).stage("both")
    assert asked.lifts == ("overall", "word") and asked.against == ("base",)
    assert fingerprints(read_graph("life", given)) == fingerprints(read_graph("life"))


def test_the_report_is_written_after_every_stage(life, asked, monkeypatch):
    pages = []
    monkeypatch.setattr(
        graph_run, "report", lambda graph, prints, state, logger, place: pages.append(dict(state.stages))
    )
    run("life")
    assert [len(page) for page in pages] == [1, 2, 3, 4]
    run("life", "--from", "both")
    assert len(pages) == 5


def test_a_kill_before_the_report_does_not_lose_it(life, asked, monkeypatch):
    told = []

    def killed(graph: object, prints: object, state: object, logger: object, place: int) -> None:
        if place == 1 and 1 not in told:
            told.append(place)
            raise RuntimeError("killed")
        told.append(place)

    monkeypatch.setattr(graph_run, "report", killed)
    with pytest.raises(RuntimeError):
        run("life")
    assert told == [0, 1] and names(asked) == ["base", "left"]
    assert run("life") == 0
    assert told == [0, 1, 1, 2, 3] and names(asked) == ["base", "left", "right", "both"]


def test_the_time_of_a_stage_is_noted_while_it_runs(life, asked, monkeypatch):
    noted = []

    def run_for_a_while(words: list[str], environment: object, beat: Callable[[], None]) -> int:
        for _ in range(2):
            time.sleep(0.05)
            beat()
            noted.append(json.loads((life / "outputs/life/graph.json").read_text())["stages"]["base"])
        return 1

    monkeypatch.setattr(graph_run, "run_command", run_for_a_while)
    assert run("life") == 1
    assert [one["status"] for one in noted] == ["running", "running"]
    assert 0.05 <= noted[0]["seconds"] < noted[1]["seconds"] < 5 and noted[1]["seconds"] >= 0.1
    assert run("life") == 1  # another session: what was before is kept
    assert noted[2]["seconds"] > noted[1]["seconds"]


def test_a_note_that_cannot_be_written_does_not_end_the_stage(life, asked, monkeypatch):
    works = graph_run.write_atomically

    def full(path: Path, content: object) -> None:
        raise OSError("no space left")

    def run_on_a_full_disk(words: list[str], environment: object, beat: Callable[[], None]) -> int:
        monkeypatch.setattr(graph_run, "write_atomically", full)
        beat()
        monkeypatch.setattr(graph_run, "write_atomically", works)
        return 0

    monkeypatch.setattr(graph_run, "run_command", run_on_a_full_disk)
    assert run("life") == 0


def test_a_graph_of_an_earlier_version_goes_on(life, asked):
    run("life")
    path = life / "outputs/life/graph.json"
    state = json.loads(path.read_text())
    for stage in state["stages"].values():
        del stage["reported"], stage["judged_by"]
    path.write_text(json.dumps(state))
    asked.clear()
    assert run("life") == 0 and not asked


def test_the_page_is_there_while_later_stages_run(life, asked, monkeypatch):
    works, seen = graph_run.run_command, []

    def look(words: list[str], environment: object, beat: object) -> int:
        page = life / "outputs/life/report.html"
        seen.append(page.read_text() if page.is_file() else "")
        return works(words, environment, beat)

    monkeypatch.setattr(graph_run, "run_command", look)
    run("life")
    assert seen[0] == "" and [f"{number} of 4 stages" in seen[number] for number in (1, 2, 3)] == [True] * 3


def test_a_report_that_cannot_be_made_is_said_and_ends_nothing(life, asked, monkeypatch, capsys):
    from zimage_lit import graph_report

    def broken(*_: object) -> None:
        raise ValueError("a torn file")

    monkeypatch.setattr(graph_report, "rows_of", broken)
    assert run("life") == 0
    assert "report.html could not be written: a torn file" in capsys.readouterr().err


def test_the_page_is_made_again_each_time(life, asked, capsys):
    run("life")
    assert "4 of 4 stages" in (life / "outputs/life/report.html").read_text()
    (life / "outputs/life/report.html").unlink()
    assert run("life") == 0 and (life / "outputs/life/report.html").is_file()
    assert "report: outputs/life/report.html" in capsys.readouterr().out


def test_pipelines_are_scored_alike(life):
    graph = read_graph("life", ["score={benchmark: tinyworld, prompts: 4}"])
    assert graph_run.score_words(graph.stage("both"), graph) == [
        "evaluate", "benchmark=tinyworld", "prompts=4", "model=outputs/life/both/pipeline", "name=both",
        "output=outputs/life/both/evaluation",
    ]  # fmt: skip


def test_a_changed_score_judges_anew_what_was_made_before(life, asked):
    score = "score={benchmark: tinyworld, language: en}"
    other = "score={benchmark: tinyworld, language: zh}"
    run("life", score)
    assert names(asked) == ["base", "evaluation", "left", "evaluation", "right", "evaluation", "both", "evaluation"]
    (life / "outputs/life/left/evaluation/mine").write_text("kept")
    asked.clear()
    assert run("life", score) == 0 and not asked
    assert run("life", other) == 0
    assert names(asked) == ["evaluation"] * 4 and all("language=zh" in words for words in asked)
    assert (life / "outputs/life/left/evaluation.1/mine").read_text() == "kept"
    asked.clear()
    assert run("life") == 0 and not asked  # nothing is to judge
    assert run("life", other) == 0 and not asked


def test_scores_that_were_not_reached_are_all_that_is_missing(life, asked, monkeypatch, capsys):
    works = graph_run.run_command

    def fail(words: list[str], environment: object, beat: object) -> int:
        works(words, environment, beat)
        return 1 if words[0] == "evaluate" else 0

    monkeypatch.setattr(graph_run, "run_command", fail)
    score = "score={benchmark: tinyworld, language: en}"
    assert run("life", score) == 1
    assert names(asked) == ["base", "evaluation"]
    monkeypatch.setattr(graph_run, "run_command", works)
    asked.clear()
    run("life", "--dry-run", score)
    assert "to judge" in capsys.readouterr().out
    assert run("life", "--only", "left", score) == 0  # what it begins from is there
    assert run("life", score) == 0
    assert names(asked)[:5] == ["left", "evaluation", "evaluation", "right", "evaluation"]
    assert not (life / "outputs/life/base/evaluation.1").exists()  # it was of the same settings


def test_two_commands_do_not_work_on_one_graph_at_once(life, asked, capsys):
    with held_by_another(life / "outputs/life" / graph_run.LOCK):
        assert run("life") == 2 and not asked
        assert "another command is at work in outputs/life: wait for its end" in capsys.readouterr().err
        assert run("life", "--dry-run") == 0
    assert run("life") == 0


def test_a_folder_that_cannot_be_is_named(life, asked, capsys):
    (life / "file").write_text("")
    assert run("life", "run.output_dir=file/life") == 2 and not asked
    assert (
        "file/life cannot be written to (Not a directory): set run.output_dir to another folder."
        in capsys.readouterr().err
    )


def test_the_stages_of_a_graph_are_runs_below_its_own(life):
    """Two real trainings, in MLflow, of which the second begins from the first."""
    toy = TOY.replace("logger: false", """logger:
    class_path: zimage_lit.tracking.ResilientMLFlowLogger
    init_args: {experiment_name: zimage-lit, run_name: "${run.name}", output_dir: "${run.output_dir}"}""")  # fmt: skip
    (life / "experiments/toy.yaml").write_text(toy)
    two = GRAPH.partition("  right:")[0]
    (life / "experiments/life.yaml").write_text(two)
    process = subprocess.run(
        [sys.executable, "-m", "zimage_lit", "run", "life"], cwd=life, env=environment(), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Compare runs by") == 1
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{life}/outputs/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "zimage-lit"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"life", "life/base", "life/left"}
    parent = runs["life"].info.run_id
    for name in ("base", "left"):
        assert runs[f"life/{name}"].data.tags["mlflow.parentRunId"] == parent
        assert runs[f"life/{name}"].data.tags["stage"] == name
    assert runs["life/left"].data.tags["begins_from/base"] == runs["life/base"].info.run_id
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_a_command_beats_until_it_ends(life, monkeypatch):
    monkeypatch.setattr(graph_run, "HEARTBEAT", 0.05)
    beats = []
    assert graph_run.run_command(["--list"], environment(), lambda: beats.append(1)) == 0
    assert len(beats) > 3
    assert graph_run.run_command(["nothing"], environment(), lambda: None) == 2


def test_a_killed_graph_takes_its_stage_with_it_and_goes_on(life):
    slow = TOY.replace("max_steps: 12", "max_steps: 500").replace("every_n_steps: 5", "every_n_steps: 20")
    (life / "experiments/toy.yaml").write_text(slow)
    one = GRAPH.partition("  left:")[0].replace("trainer.max_steps: 3", "trainer.max_steps: 400")
    (life / "experiments/life.yaml").write_text(one)
    command = [sys.executable, "-m", "zimage_lit", "run", "life"]
    trace = life / "outputs/life/base.txt"

    def steps() -> list[int]:
        return [int(line.split()[0]) for line in trace.read_text().splitlines()] if trace.is_file() else []

    begun = 0
    for killed, code in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command, cwd=life, env=environment(), stderr=subprocess.DEVNULL)
        until(lambda begun=begun: len(steps()) > begun + 25)
        process.send_signal(killed)
        assert process.wait(60) == code
        until(lambda: not running_in(life))
        begun = len(steps())
        assert steps()[-1] < 400
        state = json.loads((life / "outputs/life/graph.json").read_text())["stages"]["base"]
        assert state["status"] == "running"
    assert subprocess.run(command, cwd=life, env=environment(), stderr=subprocess.DEVNULL).returncode == 0
    assert not (life / "outputs/life/base.1").exists()
    assert steps()[-1] == 400 and steps()[begun] >= steps()[begun - 1] - 20  # from its last checkpoint


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"}


def until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def running_in(folder: Path) -> list[str]:
    """Processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                int(process.name) != os.getpid()
                and (process / "cwd").resolve() == folder.resolve()
                and (process / "cmdline").read_bytes()
            ):
                found.append(process.name)
        except OSError:  # it has just ended
            continue
    return found


def test_fingerprints_tell_settings_and_origins_apart(life):
    first = fingerprints(read_graph("life"))
    assert first == fingerprints(read_graph("life")) and len(set(first.values())) == 4
    other = fingerprints(read_graph("life", ["seed_everything=1"]))
    assert not set(first.values()) & set(other.values())
    moved = fingerprints(read_graph("life", ["stages.base.set.trainer.max_steps=4"]))
    assert moved["left"] != first["left"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["stages.left.run=toi"], r"stages.left.run is 'toi', no experiment or task \(did you mean 'toy'\?\)"),
        (["stages.left.sett=1"], r"stages.left has no key 'sett' \(did you mean 'set'\?\)"),
        (["trainer.max_steps=1"], r"life is a graph and has no trainer of its own: put it under stages.NAME.set"),
        (["run.nam=x"], r"run.nam"),
        (["run.resume=never"], r"run.resume=never is for single trainings: .* --from STAGE"),
        (["tracking_uri=7"], r"tracking_uri must be text, not 7"),
        (["score=tinyworld"], r"score must be a mapping"),
        (["score.model=here"], r"score.model is set by the graph"),
        (["stages.leff.set.trainer.max_steps=1"], r"stages.leff has no run: .*\(did you mean 'left'\?\)"),
        (["stages.omni.set.trainer.max_steps=1"], r"stages.omni has no run: correct its name \(there are base, left"),
        (["stages={../x: {run: toy}}"], r"a stage's name is that of its folder: leave / and .. out"),
        (["stages.left.set.model.init_args.encoder.init_args.folder=${stage:left}"], "stages.left begins from itself"),
        (["stages.base.set.data.init_args.folder=outputs/life/left/pipeline"], "stages.base begins from left, which"),
        (
            ["stages.base.set.data.init_args.folder=${stage:lef}"],
            r"init_args.folder cannot be resolved: there is no stage lef \(did you mean 'left'\?\)",
        ),
        (["stages.left.set.trainer.max_step=1"], r"stages.left \(toy\): .*max_step"),
        (["stages.both.set.weight=[1]"], r"stages.both \(merge\): .*weight"),
        (
            [
                "stages.more={run: pairs, set: {model: '${stage:left}', prompts: tinyworld, objective: brightness, "
                "rewards: {a: {class_path: zimage_lit.rewards.controls.Brightness, init_args: {weigth: 2}}}}}"
            ],
            r"stages.more \(pairs\): rewards.a.init_args.weigth is not a setting of Brightness",
        ),
        (
            ["score={benchmark: tinyworld, language: en, judges: {reader: {class_path: evaluation.nothing.Reader}}}"],
            r"score \(evaluate\): judges.reader.class_path",
        ),
        (["stages.left.against=right"], r"stages.left.against names 'right', which is no stage before it"),
        (["stages.left.against=base"], r"stages.left.against compares what `lifts` names"),
        (["stages.left.lifts=word"], r"stages.left.lifts is told by what judges the stages: give `score`, too"),
        (
            ["stages.left.lifts=wrd", "score={benchmark: tinyworld, language: en}"],
            r"stages.left.lifts names 'wrd', no score of TinyWorld.* \(did you mean 'word'\?\)",
        ),
        (["score={benchmark: tinywrld}"], r"score: benchmark=tinywrld: there is none"),
        (["score={benchmark: tinyworld}"], r"score is of one benchmark in one language"),
        (
            ["score={benchmark: tinyworld, language: en}", "stages.left.lifts=[overall, word, counting]"],
            r"stages.left.lifts names something twice",
        ),
        (["score={benchmark: oneig, language: en}", "stages.left.lifts=overall"], r"OneIG-Bench EN has no score whose"),
        (["stages.left.lifts=3"], r"stages.left.lifts must be a name or a list of names, not 3"),
        (["--only", "lft"], r"life has no stage 'lft' \(did you mean 'left'\?\)"),
        (["--from"], "--from takes the name of a stage"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_run(life, asked, capsys, change, message):
    assert run("life", *change) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not asked


def test_the_graph_of_the_guide_is_one(life, asked):
    page = (REPOSITORY / "docs/lifecycle.md").read_text(encoding="utf-8")
    (graph,) = re.findall(r"```yaml\n# experiments/life.yaml\n(.*?)```", page, flags=re.DOTALL)
    (life / "experiments/life.yaml").write_text(graph)
    assert run("life") == 0
    assert names(asked) == ["low-res", "evaluation", "omni", "evaluation", "sft", "evaluation"]
    sft = read_graph("life").stage("sft")
    assert (sft.begins_from, sft.lifts, sft.against) == (("omni",), ("counting", "position"), ("omni",))


def test_a_graph_is_started_once(life, asked, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("life") == 2 and not asked
    assert "start life once, without torchrun" in capsys.readouterr().err


def test_options_of_graphs_belong_to_graphs(life, capsys):
    assert run("toy", "--dry-run") == 2
    assert "toy is no graph of several stages" in capsys.readouterr().err


def test_a_graph_has_its_page_and_its_settings_like_any_experiment(life, capsys):
    assert run("life", "--print-config") == 0
    assert "outputs/life/base/pipeline" in capsys.readouterr().out
    assert run("life", "--help") == 0
    assert "stages.left.run=toy" in capsys.readouterr().out
    assert flatten({"a": {"b": 1}}) == {"a.b": 1}
