"""A graph: stages that begin from one another, each an experiment or a task, in order.

    run: {name: lifecycle, output_dir: outputs/lifecycle}
    stages:
      omni: {run: tiny/omni, set: {trainer.max_steps: 2000}}
      merge: {run: merge, set: {variants: ["${stage:sft-words}", "${stage:sft-counting}"], sweep: 4}}

`${stage:NAME}` is what an earlier stage hands on: the pipeline of a training and of a merge, the folder of any other
task. Each stage has the folder <output_dir>/NAME. This module reads a graph; graph_run.py runs it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from zimage_lit.cli import TASKS
from zimage_lit.config import (
    RunSettings,
    as_typed,
    compose,
    did_you_mean,
    experiment_files,
    flatten,
    parse_value,
    settings_from,
)
from zimage_lit.errors import UserError
from zimage_lit.validate import as_mapping

KEYS = ("description", "run", "seed_everything", "stages", "score", "experiment_name", "tracking_uri")
STAGE_KEYS = ("run", "set", "lifts", "against", "note")
OVERALL = "overall"  # of what a stage lifts: the benchmark's score as a whole
SCORES = "evaluation"  # in a stage's folder: what `score` says of it
MAKES_A_PIPELINE = ("merge",)  # of the tasks; every experiment does
# Settings of an experiment that say how a run is watched, not what it makes.
WATCHING = ("description", "run.*", "trainer.logger*", "trainer.enable_progress_bar", "trainer.log_every_n_steps")


@dataclass(frozen=True)
class Stage:
    """One stage: the experiment or task that it runs, and where."""

    name: str
    runs: str
    settings: Mapping[str, Any]  # by dotted key
    folder: Path
    note: str = ""  # for people: why it stands where it stands
    begins_from: tuple[str, ...] = ()  # the stages whose folders its settings name
    lifts: tuple[str, ...] = ()  # what it is for: `overall`, or groups of the benchmark that judges it; their mean
    against: tuple[str, ...] = ()  # the stages whose scores these are compared with

    @property
    def makes_a_pipeline(self) -> bool:
        return self.runs not in TASKS or self.runs in MAKES_A_PIPELINE

    @property
    def product(self) -> Path:
        """What it hands on."""
        return self.folder / "pipeline" if self.makes_a_pipeline else self.folder

    @property
    def words(self) -> list[str]:
        """The stage as `lightning run` takes it."""
        if self.runs in TASKS:
            own = {"output": str(self.folder)}
        else:
            own = {"run.output_dir": str(self.folder), "run.name": f"{self.folder.parent.name}/{self.name}"}
        return [self.runs, *(f"{key}={typed(value)}" for key, value in {**self.settings, **own}.items())]


@dataclass(frozen=True)
class Graph:
    """All stages in order. score: settings of `evaluate` for every pipeline that a stage hands on; None: no scores."""

    name: str
    folder: Path
    stages: tuple[Stage, ...]
    score: Mapping[str, Any] | None = None
    experiment_name: str = "zimage-lit"
    tracking_uri: str | None = None

    def judged_by(self, stage: Stage) -> str:
        """The fingerprint of the settings of `score`; empty for a stage that they do not judge."""
        return digest(self.score) if self.score is not None and stage.makes_a_pipeline else ""

    def stage(self, name: str) -> Stage:
        """The stage of that name; UserError where there is none."""
        named = {stage.name: stage for stage in self.stages}
        if name not in named:
            raise UserError(f"{self.name} has no stage '{name}'{did_you_mean(name, named, listing='it has')}")
        return named[name]

    def dependents(self, name: str) -> list[Stage]:
        """The stage, and all that begin from it directly or through others, in order."""
        found = [self.stage(name)]
        for stage in self.stages:
            if {other.name for other in found} & set(stage.begins_from):
                found.append(stage)
        return found


def read_graph(name: str, overrides: Sequence[str] = ()) -> Graph:
    """The graph behind an experiment's name.

    Raises UserError for unknown keys, experiments and tasks, and for a stage that begins from one which does not come
    before it.
    """
    config = compose(name, overrides)
    check_graph(name, config)
    folder = Path(config["run"]["output_dir"])
    stages: list[Stage] = []
    for stage_name, values in as_mapping(f"{name}: stages", config["stages"]).items():
        stages.append(read_stage(stage_name, as_mapping(f"stages.{stage_name}", values), folder, config, stages))
    if not stages:
        raise UserError(f"{name} has no stages: name at least one.")
    given = {key: config[key] for key in ("score", "experiment_name", "tracking_uri") if key in config}
    return Graph(config["run"]["name"], folder, tuple(stages), **given)


def check_graph(name: str, config: Mapping[str, Any]) -> None:
    """UserError for what a graph has no use for, and for values of other types."""
    for key in config:
        if key in ("trainer", "model", "data"):
            raise UserError(f"{name} is a graph and has no {key} of its own: put it under stages.NAME.set.")
    check_keys(name, config, KEYS)
    run = settings_from(RunSettings, config["run"], section="run")
    if run.resume != "auto":
        raise UserError(
            f"run.resume={run.resume} is for single trainings: a graph goes on by itself, and --from STAGE runs that "
            "stage and all that begins from it anew."
        )
    for key in ("experiment_name", "tracking_uri"):
        if config.get(key) is not None and not isinstance(config[key], str):
            raise UserError(f"{key} must be text, not {config[key]!r}.")
    if config.get("score") is not None:
        own = [key for key in as_mapping("score", config["score"]) if key in ("model", "name", "output")]
        if own:
            raise UserError(f"score.{own[0]} is set by the graph, for each stage: leave it out.")


def read_stage(
    name: str, values: Mapping[str, Any], folder: Path, config: Mapping[str, Any], before: Sequence[Stage]
) -> Stage:
    """One entry of `stages:`; the graph's seed is that of an experiment, where the stage does not say another."""
    check_keys(f"stages.{name}", values, STAGE_KEYS)
    if not name or name != Path(name).name or name in (".", ".."):
        raise UserError(f"stages.{name}: a stage's name is that of its folder: leave / and .. out.")
    if values.get("run") is None:
        meant = did_you_mean(name, [other for other in config["stages"] if other != name], listing="there are")
        raise UserError(
            f"stages.{name} has no run: correct its name{meant}, or give a new stage an experiment or a task, "
            f"stages.{name}.run=…"
        )
    runs, known = values.get("run"), [*experiment_files(), *TASKS]
    if runs not in known:
        raise UserError(f"stages.{name}.run is {runs!r}, no experiment or task{did_you_mean(str(runs), known)}")
    given = as_mapping(f"stages.{name}.set", values.get("set") or {})
    settings = flatten(given) if given else {}
    if runs not in TASKS:
        settings = {"seed_everything": config["seed_everything"], **settings}
    if named_in(settings, folder / name):
        raise UserError(f"stages.{name} begins from itself: name a stage before it.")
    inputs = [other for other in config["stages"] if named_in(settings, folder / other)]
    late = [other for other in inputs if other not in [stage.name for stage in before]]
    if late:
        raise UserError(f"stages.{name} begins from {late[0]}, which comes after it: change their order.")
    lifts, against = (names_in(f"stages.{name}.{key}", values.get(key)) for key in ("lifts", "against"))
    judged = [stage.name for stage in before if stage.makes_a_pipeline or stage.runs == "evaluate"]
    for other in against:
        if other not in judged:
            raise UserError(f"stages.{name}.against names {other!r}, which is no stage before it that is judged.")
    if against and not lifts:
        raise UserError(f"stages.{name}.against compares what `lifts` names: give that too.")
    makes_one = [stage.name for stage in before if stage.name in inputs and stage.makes_a_pipeline]
    compared = against or tuple(makes_one if lifts else ())
    return Stage(name, runs, settings, folder / name, values.get("note") or "", tuple(inputs), lifts, compared)


def names_in(key: str, value: Any) -> tuple[str, ...]:
    """A name or a list of names."""
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{key} must be a name or a list of names, not {value!r}.")
    return tuple(names)


def handed_on(name: str, *, _root_: Any) -> str:
    """The resolver behind `${stage:NAME}`."""
    stages = _root_.get("stages") or {}
    if name not in stages:
        raise ValueError(f"there is no stage {name}{did_you_mean(name, list(stages), listing='there are')}")
    return str(Stage(name, stages[name].get("run"), {}, Path(_root_.run.output_dir) / name).product)


OmegaConf.register_resolver("stage", handed_on, replace=True)


def fingerprints(graph: Graph) -> dict[str, str]:
    """Of each stage the digest of what it is made of: its settings, and all that it begins from."""
    found: dict[str, str] = {}
    for stage in graph.stages:
        settings: Mapping[str, Any] = stage.settings
        if stage.runs not in TASKS:
            composed = flatten(compose(stage.runs, stage.words[1:]))
            settings = {k: v for k, v in composed.items() if not any(fnmatch(k, pattern) for pattern in WATCHING)}
        if stage.runs == "data":
            settings = {name: compose(name)["data"] for name in stage.settings["experiments"]}
        found[stage.name] = digest([stage.runs, settings, [found[name] for name in stage.begins_from]])
    return found


def digest(settings: Any) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def named_in(value: Any, folder: Path) -> bool:
    """Whether a setting, or a part of it, is a path at or below a folder."""
    if isinstance(value, Mapping):
        return any(named_in(part, folder) for part in value.values())
    if isinstance(value, list):
        return any(named_in(part, folder) for part in value)
    return isinstance(value, str) and (Path(value) == folder or folder in Path(value).parents)


def check_keys(place: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{place} has no key '{key}'{did_you_mean(key, known, listing='there are')}")


def typed(value: Any) -> str:
    """A value as it is written behind `key=`; text that would be read as something else is quoted."""
    text = as_typed(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and parse_value(text, "") != value else text
