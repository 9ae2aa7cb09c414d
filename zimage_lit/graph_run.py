"""`lightning run GRAPH`: its stages one after the other, each a `lightning run` of its own, in one MLflow run.

A stage is a process of its own: it has all the memory, starts its own other processes, and goes on by itself where it
was killed. What it is made of is its fingerprint (see graph.py), and `graph.json` in the graph's folder keeps that of
every stage which was begun: a finished stage with the same fingerprint is not run again; one with another is set aside,
nothing is deleted, and run anew, as is all that begins from it. Where only the settings of `score` have changed, the
stages are judged anew and not run again.
"""

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from rich.console import Console
from rich.table import Table

from evaluation.benchmarks import geneval
from zimage_lit.cli import TASKS
from zimage_lit.config import compose, did_you_mean, one_line, settings_from
from zimage_lit.errors import UserError
from zimage_lit.files import locked, read_json, write_atomically
from zimage_lit.graph import OVERALL, SCORES, Graph, Stage, fingerprints, read_graph, typed
from zimage_lit.run_folder import set_aside
from zimage_lit.tracking import PARENT, RUN_FILE, TAGS_VARIABLE, ResilientMLFlowLogger

if TYPE_CHECKING:
    from zimage_lit.graph_report import Row

STATE, LOCK, REPORT = "graph.json", "graph.lock", "report.html"
RUNNING, MADE, FINISHED = "running", "made", "finished"  # of a stage; made: done with its work, not yet judged
HEARTBEAT = 10.0  # seconds between two notes of how long a stage has been at work: what a kill can lose of that
PARENT_DEATH = 1  # Linux's PR_SET_PDEATHSIG
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: little may be done between fork and exec


@dataclass(frozen=True)
class GraphOptions:
    """What the command line says beside the settings."""

    begin: str | None = None  # --from: this stage and all that begins from it are run anew
    only: str | None = None  # --only: no other stage is run
    dry_run: bool = False  # --dry-run: show what would be run


@dataclass
class State:
    """graph.json: of every stage that was begun its fingerprint, how far it is, the digest of the settings that judge
    it, the seconds it took, and whether the report and the graph's run in MLflow know of it."""

    path: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "State":
        path = folder / STATE
        way_out = "delete it, and the stages are run anew, their folders set aside"
        return cls(path, read_json(path, way_out)["stages"] if path.is_file() else {})

    def is_begun(self, stage: Stage, fingerprint: str) -> bool:
        return self.stages.get(stage.name, {}).get("fingerprint") == fingerprint

    def is_made(self, stage: Stage, fingerprint: str) -> bool:
        return self.is_begun(stage, fingerprint) and self.stages[stage.name]["status"] != RUNNING

    def is_finished(self, stage: Stage, fingerprint: str, judged_by: str) -> bool:
        """Made, and judged where that is wanted."""
        if not judged_by or not self.is_made(stage, fingerprint):
            return self.is_made(stage, fingerprint)
        known = self.stages[stage.name]
        return bool(known["status"] == FINISHED and known.get("judged_by", judged_by) == judged_by)

    def begin(self, stage: Stage, fingerprint: str) -> None:
        self.stages[stage.name] = {"fingerprint": fingerprint, "status": RUNNING, "judged_by": "", "seconds": 0.0}
        self.note(stage, 0.0)

    def note(self, stage: Stage, seconds: float, **changed: str) -> None:
        """Seconds are added to those before; changed: of what is kept of the stage."""
        known = self.stages[stage.name]
        known |= {"seconds": known["seconds"] + seconds, "reported": False, **changed}
        self.write()

    def forget(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            self.stages.pop(stage.name, None)
        self.write()

    def write(self) -> None:
        write_atomically(self.path, json.dumps({"stages": self.stages}, indent=1) + "\n")


def run_graph(name: str, overrides: Sequence[str], options: GraphOptions) -> int:
    """Run what is missing of a graph; returns the exit code: 0, that of the stage that failed, or 128 + signal.

    Raises UserError for wrong settings, of any stage, before anything is run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"start {name} once, without torchrun: each of its stages starts its own processes.")
    graph = read_graph(name, overrides)
    check_stages(graph)
    prints = fingerprints(graph)
    asked = [graph.stage(options.only)] if options.only else graph.stages
    anew = graph.dependents(options.begin) if options.begin else []
    if options.dry_run:
        state = State.of(graph.folder)
        check_inputs(asked, graph, prints, state)
        show(graph, asked, prints, state, anew)
        return 0
    # one command at a time: two would each forget what the other has done
    busy = f"another command is at work in {graph.folder}: wait for its end, or stop it."
    with locked(graph.folder / LOCK, "set run.output_dir to another folder", busy):
        state = State.of(graph.folder)
        check_inputs(asked, graph, prints, state)
        state.forget(anew)
        logger = parent_run(graph)
        code = 1
        try:
            code = run_missing(graph, asked, prints, state, logger)
        finally:
            if write_report(graph, prints, state, logger):
                print(f"report: {graph.folder / REPORT}")
            logger.finalize("failed" if code else "success")
    return code


def run_missing(
    graph: Graph, asked: Sequence[Stage], prints: Mapping[str, str], state: State, logger: ResilientMLFlowLogger
) -> int:
    """Those of the stages asked for that are not finished, in order; ends with the first that fails, and its code."""
    for number, stage in enumerate(graph.stages, start=1):
        if stage not in asked:
            continue
        heading = f"stage {number} of {len(graph.stages)}, {stage.name} ({stage.runs})"
        if state.is_finished(stage, prints[stage.name], graph.judged_by(stage)):
            print(f"{heading}: finished already, in {stage.folder}", flush=True)
        else:
            print(f"{heading}: {stage.folder}", flush=True)
            if code := run_stage(stage, graph, prints[stage.name], state, logger):
                why = "was stopped" if code > 128 else f"ended with code {code}, for the reason above"
                print(
                    f"{stage.name} {why}; the stages before it are kept, and the same command goes on with it.",
                    file=sys.stderr,
                )
                return code
        if not state.stages[stage.name].get("reported"):
            report(graph, prints, state, logger, number - 1)
            state.stages[stage.name]["reported"] = True
            state.write()
    return 0


def write_report(graph: Graph, prints: Mapping[str, str], state: State, logger: ResilientMLFlowLogger) -> "list[Row]":
    """report.html as it is now; its rows. The stages' work is done whether it can be told or not: what is wrong is
    said, and there are no rows."""
    from zimage_lit.graph_report import page, rows_of

    try:
        rows = rows_of(graph, state.stages, prints)
        told = page(graph, rows)
        write_atomically(graph.folder / REPORT, told)
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        print(f"{graph.folder / REPORT} could not be written: {one_line(error)}", file=sys.stderr)
        return []
    logger.log_text(told, REPORT)
    return rows


def report(graph: Graph, prints: Mapping[str, str], state: State, logger: ResilientMLFlowLogger, place: int) -> None:
    """The page, and the scores and pictures of the stage at `place`, just finished, for the graph's run."""
    from zimage_lit.graph_report import stage_grid

    rows = write_report(graph, prints, state, logger)
    if not rows:
        return
    row = rows[place]
    figures = {f"stages/{name}": score for name, (score, _, _) in row.scores().items()}
    if row.cost:
        figures |= {"stages/evaluations": row.cost.evaluations, "stages/seconds_a_picture": row.cost.seconds}
    if figures:
        logger.log_metrics(figures, place)
    first = next((other for other in rows if other.result), None)
    if first and (grid := stage_grid(row, first)):
        logger.log_image("stages/samples", grid, place)


def run_stage(stage: Stage, graph: Graph, fingerprint: str, state: State, logger: ResilientMLFlowLogger) -> int:
    """What is missing of the stage: its work, and its scores where it hands on a pipeline."""
    if not state.is_begun(stage, fingerprint):
        move_aside(stage.folder)
        state.begin(stage, fingerprint)
    environment = {**os.environ, **run_environment(stage, graph, logger)}
    clock = time.monotonic()

    def note(**changed: str) -> None:
        nonlocal clock
        now = time.monotonic()
        state.note(stage, now - clock, **changed)
        clock = now

    def beat() -> None:
        with suppress(UserError, OSError):  # a full disk for a moment is no reason to end a training
            note()

    judged_by = graph.judged_by(stage)
    if not state.is_made(stage, fingerprint):
        code = run_command(stage.words, environment, beat)
        note(status=RUNNING if code else MADE if judged_by else FINISHED)
        if code:
            return code
    if judged_by:
        if state.stages[stage.name].get("judged_by", "") not in ("", judged_by):
            move_aside(stage.folder / SCORES)
        note(status=MADE, judged_by=judged_by)
        code = run_command(score_words(stage, graph), environment, beat)
        note(status=MADE if code else FINISHED)
        return code
    return 0


def move_aside(folder: Path) -> None:
    if folder.exists():
        print(f"what {folder} held is now in {set_aside(folder)}")


def score_words(stage: Stage, graph: Graph) -> list[str]:
    own = {"model": str(stage.product), "name": stage.name, "output": str(stage.folder / SCORES)}
    settings = {**(graph.score or {}), **own}
    return ["evaluate", *(f"{key}={typed(value)}" for key, value in settings.items())]


def run_command(words: Sequence[str], environment: Mapping[str, str], beat: Callable[[], None]) -> int:
    """`lightning run …` in a process of its own, which hears of an interruption and does not outlive this one.

    beat: called every few seconds while it runs.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "zimage_lit", "run", *words], env=environment, preexec_fn=die_with_parent
    )
    with passing_on_signals(process):
        while (code := ended(process)) is None:
            beat()
    return code if code >= 0 else 128 - code


def ended(process: "subprocess.Popen[bytes]") -> int | None:
    """The code of a process that ends before the next beat; None of one that does not."""
    try:
        return process.wait(HEARTBEAT)
    except subprocess.TimeoutExpired:
        return None


def die_with_parent() -> None:
    """Linux alone can promise it; elsewhere a stage whose graph is killed runs to its end by itself."""
    if LIBC is not None:
        LIBC.prctl(PARENT_DEATH, signal.SIGKILL)


@contextmanager
def passing_on_signals(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """A request to stop is the stage's: it saves, and ends with the code that says so.

    An interruption from the keyboard reaches the stage by itself.
    """

    def pass_on(number: int, _: Any) -> None:
        if number != signal.SIGINT:
            process.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------ checks


def check_stages(graph: Graph) -> None:
    """Every stage's settings, as far as they can be checked before what they begin from is there."""
    from zimage_lit.validate import check_config, check_value

    commands = [(f"stages.{stage.name}", stage.words) for stage in graph.stages]
    if graph.score is not None:
        commands.append(("score", score_words(graph.stages[0], graph)))
    for place, (runs, *words) in commands:
        try:
            if runs in TASKS:
                module = importlib.import_module(TASKS[runs].function.partition(":")[0])
                settings = settings_from(getattr(module, TASKS[runs].settings), words)
                for key, hint in get_type_hints(type(settings)).items():  # the components among them
                    check_value(key, getattr(settings, key), hint)
            else:
                check_config(compose(runs, words))
        except UserError as error:
            raise UserError(f"{place} ({runs}): {error}") from None
    check_purposes(graph)


def check_purposes(graph: Graph) -> None:
    """UserError for what stages are said to lift, where nothing judges it."""
    from evaluation.report.difference import NOT_THE_HEADLINE
    from evaluation.suite import parts_of

    lifting = [stage for stage in graph.stages if stage.lifts]
    if lifting and graph.score is None:
        raise UserError(f"stages.{lifting[0].name}.lifts is told by what judges the stages: give `score`, too.")
    if graph.score is None:
        return
    benchmarks = graph.score.get("benchmark", "")
    names = benchmarks if isinstance(benchmarks, list) else [str(benchmarks)]
    try:
        first, *others = parts_of(names, graph.score.get("language"))
    except UserError as error:
        raise UserError(f"score: {error}") from None
    if others:
        raise UserError("score is of one benchmark in one language: give score.benchmark one name, and score.language.")
    if lifting and first.benchmark in NOT_THE_HEADLINE:
        raise UserError(f"stages.{lifting[0].name}.lifts: {first.title} has no score whose changes can be told.")
    groups = getattr(first.module, "TASKS", ())  # of benchmarks whose score is of tasks
    for stage in lifting:
        if len(set(stage.lifts)) < len(stage.lifts) or (OVERALL in stage.lifts and set(stage.lifts) & part_of(first)):
            raise UserError(f"stages.{stage.name}.lifts names something twice: name each group once.")
        for name in stage.lifts:
            if name not in (OVERALL, *groups):
                meant = did_you_mean(name, [OVERALL, *groups], listing="it has")
                raise UserError(f"stages.{stage.name}.lifts names {name!r}, no score of {first.title}{meant}")


def part_of(benchmark: Any) -> set[str]:
    """The groups whose mean is the benchmark's overall score."""
    return set(geneval.TASKS) if hasattr(benchmark.module, "TASKS") else set()


def check_inputs(asked: Sequence[Stage], graph: Graph, prints: Mapping[str, str], state: State) -> None:
    """UserError for a stage that begins from one which is neither there nor asked for."""
    for stage in asked:
        for name in stage.begins_from:
            if graph.stage(name) not in asked and not state.is_made(graph.stage(name), prints[name]):
                raise UserError(f"{stage.name} begins from {name}, which is not finished: run --only {name} before it.")


# ---------------------------------------------------------------------------------------------------------- tracking


def parent_run(graph: Graph) -> ResilientMLFlowLogger:
    """The graph's own run, which the runs of the stages name as theirs."""
    logger = ResilientMLFlowLogger(graph.experiment_name, str(graph.folder), graph.name, graph.tracking_uri)
    logger.log_tags({f"stage/{stage.name}": stage.runs for stage in graph.stages})
    return logger


def run_environment(stage: Stage, graph: Graph, logger: ResilientMLFlowLogger) -> dict[str, str]:
    """What makes the stage's MLflow run a child of the graph's, in the same store, and shows what it begins from."""
    parents = {name: graph.stage(name).folder / RUN_FILE for name in stage.begins_from}
    lineage = {
        f"begins_from/{name}": read_json(path)["run_id"] if path.is_file() else str(path.parent)
        for name, path in parents.items()
    }
    tags = {PARENT: str(logger.run_id), "stage": stage.name, **lineage}
    return {TAGS_VARIABLE: json.dumps(tags), "MLFLOW_TRACKING_URI": logger.tracking_uri}


# ----------------------------------------------------------------------------------------------------------- showing


def show(graph: Graph, asked: Sequence[Stage], prints: Mapping[str, str], state: State, anew: Sequence[Stage]) -> None:
    """The table of --dry-run."""
    table = Table(title=f"{graph.name}: {graph.folder}")
    for column in ("stage", "runs", "begins from", "state", "minutes", "GPU-hours planned", "note"):
        table.add_column(column)
    for stage in asked:
        known = state.stages.get(stage.name)
        if stage in anew or known is None:
            told = "to run" if known is None else "to run anew"
        elif not state.is_begun(stage, prints[stage.name]):
            told = "changed: to run anew"
        elif state.is_finished(stage, prints[stage.name], graph.judged_by(stage)):
            told = "finished"
        else:
            told = "to judge" if state.is_made(stage, prints[stage.name]) else "to go on"
        minutes = f"{known['seconds'] / 60:.1f}" if known else ""
        table.add_row(
            stage.name, stage.runs, ", ".join(stage.begins_from), told, minutes, planned_hours(stage), stage.note
        )
    Console().print(table)


def planned_hours(stage: Stage) -> str:
    """Of a training on GPUs, as `plan` reckons with its own defaults; empty where it cannot say."""
    from zimage_lit.plan import PlanSettings, make_plan
    from zimage_lit.plan_inputs import compose_leniently, read_training

    if stage.runs in TASKS:
        return ""
    asked = PlanSettings(stage.runs, overrides=stage.words[1:])
    try:
        found = make_plan(read_training(compose_leniently(asked.experiment, asked.overrides)), asked)
    except UserError:  # a stage that plan does not know
        return ""
    return "" if found.gpu_hours is None else f"{found.gpu_hours:.3g}"
