"""The command line: `lightning run NAME [key=value …]`, alias `zimage run …`, `python -m zimage_lit run …`.

torch and Lightning are imported only where something is trained or generated: the list and the help pages answer at
once.
"""

import ast
import copy
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_lit import __version__
from zimage_lit.config import (
    RunSettings,
    as_typed,
    callback_list,
    comment_at,
    compose,
    did_you_mean,
    experiment_files,
    find_experiment,
    flatten,
    is_file_name,
    is_graph,
    key_comments,
    list_experiments,
    load_layers,
    one_line,
    parse_overrides,
    settings_from,
    to_yaml,
)
from zimage_lit.errors import SharedError, UserError, root_of


@dataclass(frozen=True)
class Task:
    """A word of `run` that does not train."""

    description: str
    function: str  # "module:function", called with the settings as a dict
    settings: str  # the dataclass, in the same module, that documents the settings
    of_experiment: bool = False  # takes an experiment's name first, and changes of that experiment among its settings


TASKS = {
    "prepare": Task("raw data to a prepared data set", "data_modules.preparation:prepare_task", "PrepareSettings"),
    "data": Task(
        "an experiment's data, before it is trained", "data_modules.experiment_data:data_task", "DataSettings"
    ),
    "encode": Task("latents and features, worked out once", "data_modules.encoding:encode_task", "EncodeSettings"),
    "verify": Task("a prepared data set against its hashes", "data_modules.verification:verify_task", "VerifySettings"),
    "export": Task("a run's weights as files for other programs", "zimage_lit.export:export_task", "ExportSettings"),
    "merge": Task("variants of a model into one", "zimage_lit.merge:merge_task", "MergeSettings"),
    "pairs": Task("preference pairs from a model and judges", "zimage_lit.pairs.task:pairs_task", "PairsSettings"),
    "generate": Task("pictures from prompts", "zimage_lit.pipeline:generate_task", "GenerateSettings"),
    "evaluate": Task("benchmarks' scores of a model", "evaluation.task:evaluate_task", "EvaluateSettings"),
    "plan": Task("memory, time and cost of an experiment", "zimage_lit.plan:plan_task", "PlanSettings", True),
}
# What libraries say on every run and nobody at the keyboard can act upon.
IDLE_WARNINGS = (
    "LightningCLI's args parameter is intended to run from within Python",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "Checkpoint directory .* exists and is not empty",
    "Total length of `list` across ranks is zero",  # data without a validation split
    "You passed in a `val_dataloader` but have no `validation_step`",  # of a stage without
)
IDLE_LOGGER = "torch.utils._pytree"  # warns twice wherever torchao lies beside peft
IDLE_LINES = ("💡 Tip", "TPU available")  # of Lightning's: a service, and devices that nothing here runs on

EXPERIMENT_SECTIONS = ("run", "seed_everything", "trainer", "model", "data")

USAGE = """\
usage: {program} run NAME [key=value …]    run an experiment or a task
       {program} run NAME --help           what it is, and its settings
       {program} run NAME --print-config   the settings it would run with, composed but not yet checked
       {program} run --list                all experiments and tasks
       {program} run evaluate --self-test  whether this installation evaluates as it should
       {program} run GRAPH --dry-run       the stages of a graph: which are finished, which would be run
       {program} run GRAPH --from STAGE    runs that stage and all that begins from it anew; --only STAGE no other one

NAME is an experiment (./experiments/NAME.yaml, else one shipped with zimage-lit), the path of a .yaml file, or a task.
key=value changes one setting: trainer.max_steps=100, data.init_args.num_workers=2, trainer.callbacks.NAME=null (removes
a callback), trainer.callbacks+=my_module.MyClass (adds one); naming another class_path drops the arguments of the class
it replaces.
run.resume=auto (default) continues an unfinished run, run.resume=never moves the old folder aside and starts over,
run.resume=PATH continues from that checkpoint."""


def main(arguments: Sequence[str] | None = None, program: str = "zimage") -> int:
    """The `zimage` command. Returns the exit code: 0, 1 (failed while running), 2 (wrong settings), 128 + signal."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger(IDLE_LOGGER).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(says_something)
    if words == ["--version"]:
        print(f"zimage-lit {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(USAGE.format(program=program))
        return 0 if words else 2
    try:
        if words[0] != "run":
            raise UserError(f"unknown command '{words[0]}': {program} knows only 'run', see {program} --help")
        return run(words[1:], program)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def lightning_main() -> int:
    """The `lightning` command: `run` is ours, every other word belongs to the Lightning SDK where that is installed."""
    if sys.argv[1:2] == ["run"]:
        return main(program="lightning")
    try:
        from lightning_sdk.cli.entrypoint import main_cli
    except ImportError:
        print(
            "usage: lightning run NAME [key=value …]   (see lightning run --help)\n"
            "every other word belongs to the Lightning SDK, which is not installed",
            file=sys.stderr,
        )
        return 2
    return main_cli() or 0


def run(words: list[str], program: str) -> int:
    """`run …`: the list, a help page, the composed settings, a task, a training or a graph of them."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the user's own code; a console script does not look there by itself
    options = [word for word in words if word in ("-h", "--help", "--list", "--print-config", "--self-test")]
    words, of_graph = graph_options(words)
    names = [word for word in words if word not in options]
    if "--list" in options:
        if names:
            raise UserError(f"--list shows everything, it takes no '{names[0]}'; see {program} run --help")
        print(listing())
        return 0
    if not names:
        print(USAGE.format(program=program))
        return 0 if options else 2
    name, changes = names[0], names[1:]
    if "=" in name:
        raise UserError(f"the name of an experiment comes before '{name}'; {program} run --list shows them all")
    graph = name not in TASKS and is_graph(experiment(name))
    if of_graph and not graph:
        raise UserError(f"{name} is no graph of several stages: --from, --only and --dry-run belong to those.")
    if "--self-test" in options and name != "evaluate":
        raise UserError(f"--self-test belongs to evaluate, not to {name}: {program} run evaluate --self-test")
    if name in TASKS:
        return run_task(name, changes, options, program)
    if graph:
        from zimage_lit import graph_run  # from here on `${stage:…}` is known

        if not options:
            return graph_run.run_graph(name, changes, graph_run.GraphOptions(**of_graph))
    if "--print-config" in options:
        print(to_yaml(compose(name, changes)), end="")
    elif options:
        print(experiment_help(name, program))
    else:
        return train(name, changes)
    return 0


def graph_options(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """(the other words, arguments of GraphOptions) of a command line."""
    others, found, left = [], dict[str, Any](), iter(words)
    for word in left:
        if word == "--dry-run":
            found["dry_run"] = True
        elif word in ("--from", "--only"):
            found["begin" if word == "--from" else "only"] = stage = next(left, "")
            if not stage or "=" in stage:
                raise UserError(f"{word} takes the name of a stage, such as {word} sft")
        else:
            others.append(word)
    return others, found


def experiment(name: str) -> str:
    """The name itself, if there is such an experiment."""
    known = [*experiment_files(), *TASKS]
    if not is_file_name(name) and name not in known:
        raise UserError(
            f"there is no experiment or task '{name}'{did_you_mean(name, known)}: neither {Path.cwd() / 'experiments'} "
            "nor zimage-lit has one; --list shows them all"
        )
    find_experiment(name)
    return name


# ---------------------------------------------------------------------------------------------------- training


def says_something(line: logging.LogRecord) -> bool:
    return not line.getMessage().startswith(IDLE_LINES)


def train(name: str, overrides: list[str]) -> int:
    """Compose, check, build and fit one experiment; returns the exit code."""
    config = compose(name, overrides)
    from zimage_lit.validate import check_config

    check_config(config)

    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from zimage_lit.run_folder import alone_in, plan_start

    settings = settings_from(RunSettings, config["run"], section="run")
    first_process = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    # Lightning starts the other processes with this very command line
    with alone_in(Path(settings.output_dir)) if first_process else nullcontext():
        start = plan_start(settings, config, first_process)
        if start.note and first_process:
            print(start.note)
        return 0 if start.finished else fit(settings, config, start.checkpoint, first_process)


def fit(settings: RunSettings, config: dict[str, Any], checkpoint: Path | None, first_process: bool) -> int:
    """Build trainer, model and data from checked settings and train; returns the exit code."""
    from lightning.pytorch.callbacks import RichProgressBar

    from zimage_lit.callbacks.clean_stop import CleanStop, RunStopped
    from zimage_lit.callbacks.progress_bar import RunProgressBar
    from zimage_lit.callbacks.run_config import RunConfig
    from zimage_lit.run_folder import write_status
    from zimage_lit.stages.initial_weights import check_beginning, read_checkpoint
    from zimage_lit.strategies import FSDP2Strategy

    for message in IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if checkpoint:
        read_checkpoint(checkpoint)  # a damaged one is named before anything is built
    else:
        check_beginning(config)
    built = build(config)
    if checkpoint and checkpoint.is_dir() and not isinstance(built.trainer.strategy, FSDP2Strategy):
        raise UserError(f"{checkpoint} is a sharded checkpoint: give trainer.strategy=fsdp2 (on one device, too).")
    trainer, clean_stop = built.trainer, CleanStop(settings.output_dir)
    checkpoints = [callback for callback in trainer.callbacks if callback in trainer.checkpoint_callbacks]
    others = [callback for callback in trainer.callbacks if callback not in checkpoints]
    others = [RunProgressBar() if type(callback) is RichProgressBar else callback for callback in others]
    trainer.callbacks = [RunConfig(settings.output_dir, config), *others, clean_stop, *checkpoints]
    try:
        trainer.fit(built.model, datamodule=built.datamodule, ckpt_path=checkpoint, weights_only=True)
    except RunStopped as stop:
        if not first_process:
            return 0  # a failing child would make the launcher kill the others before they have said anything
        print(f"stopped at step {stop.step}: the same command continues from {stop.checkpoint}", file=sys.stderr)
        return int(stop.code or 0)
    except UserError as error:
        if first_process or not isinstance(error, SharedError):
            print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        clean_stop.restore()
    if first_process:
        write_status(Path(settings.output_dir), "finished", trainer.global_step)
        print(f"finished at step {trainer.global_step}: {settings.output_dir}")
    return 0


def build(config: dict[str, Any]) -> Any:
    """The LightningCLI that holds `.trainer`, `.model` and `.datamodule`, built but not run.

    Constructors refuse bad values with ValueError and the like: those are settings too, and become a UserError.
    """
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.cli import LightningCLI

    import zimage_lit.strategies  # noqa: F401 (trainer.strategy=fsdp2 is known from here on)

    sections = ("seed_everything", "trainer", "model", "data")
    given = copy.deepcopy(callback_list(config))  # the parser rewrites what it is given
    arguments = {section: given[section] for section in sections if section in given}
    arguments["trainer"] = {**arguments.get("trainer", {}), "default_root_dir": config["run"]["output_dir"]}
    try:
        return LightningCLI(
            args=arguments,
            run=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # Lightning's needs a logger with a folder; RunConfig writes the settings
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False},
        )
    except (ArgumentError, ValueError, FileNotFoundError, MisconfigurationException) as error:
        root = root_of(error)
        if isinstance(root, UserError):
            raise root from error
        raise UserError(f"the settings cannot be used: {one_line(root)}") from error


# ---------------------------------------------------------------------------------------------------- tasks


def run_task(name: str, overrides: list[str], options: list[str], program: str) -> int:
    task = TASKS[name]
    module_name, _, function_name = task.function.partition(":")
    if options == ["--self-test"]:
        return self_test(overrides)
    if set(options) - {"--print-config"}:
        usage = f"{name} EXPERIMENT" if task.of_experiment else name
        print(f"{name}: {task.description}\n\nusage: {program} run {usage} [key=value …]\n")
        print(setting_lines(module_name, task.settings))
        return 0
    settings = experiment_settings(overrides) if task.of_experiment else parse_overrides(overrides)
    module = importlib.import_module(module_name)
    if options:
        print(to_yaml(vars(settings_from(getattr(module, task.settings), settings))), end="")
        return 0
    function: Callable[[dict[str, Any]], int | None] = getattr(module, function_name)
    return function(settings) or 0


def self_test(overrides: list[str]) -> int:
    """Checks of this installation, with golden=FOLDER of vectors that the benchmarks' own code has made."""
    from evaluation.self_test import self_test as run_checks

    settings = parse_overrides(overrides)
    if unknown := sorted(settings.keys() - {"golden"}):
        raise UserError(f"{unknown[0]} is not a setting of --self-test, which takes golden=FOLDER alone.")
    return run_checks(Path(settings["golden"]) if "golden" in settings else None)


def experiment_settings(words: list[str]) -> dict[str, Any]:
    """Settings of a task about an experiment: its name, given first or as experiment=, and what changes it apart."""
    if words and "=" not in words[0]:
        words = [f"experiment={words[0]}", *words[1:]]
    of_experiment = [word for word in words if word.partition("=")[0].split(".")[0] in EXPERIMENT_SECTIONS]
    settings = parse_overrides(word for word in words if word not in of_experiment)
    return {**settings, "overrides": of_experiment} if of_experiment else settings


def setting_lines(module_name: str, dataclass_name: str) -> str:
    """Name, default and comment of every field, read from the source: importing it would import torch."""
    source = source_of(module_name)
    lines, tree = source.splitlines(), ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == dataclass_name]
    fields = [field for node in classes for field in node.body if isinstance(field, ast.AnnAssign)]
    rows = []
    for field in fields:
        default = f"={as_typed(constant(field.value, tree))}" if field.value else " (must be given)"
        meaning = "; ".join(filter(None, (choices(field.annotation), comment_at(lines, field.lineno - 1))))
        rows.append((f"{ast.unparse(field.target)}{default}", meaning))
    return table(rows)


def source_of(module_name: str) -> str:
    spec = importlib.util.find_spec(module_name)
    if spec is None or spec.origin is None:
        raise UserError(f"{module_name} is not installed")
    return Path(spec.origin).read_text(encoding="utf-8")


def constant(value: ast.expr, module: ast.Module) -> Any:
    """What an expression of a module is: a literal, `field(default_factory=dict)`, or the name of such a one, which may
    be imported from another module."""
    if isinstance(value, ast.Call):
        factories = {ast.unparse(keyword.value) for keyword in value.keywords if keyword.arg == "default_factory"}
        return {"dict": {}, "list": []}[factories.pop()]
    if not isinstance(value, ast.Name):
        literal = ast.literal_eval(value)
        return list(literal) if isinstance(literal, tuple) else literal
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == value.id:
            return constant(node.value, module)
        if isinstance(node, ast.ImportFrom) and value.id in [alias.name for alias in node.names]:
            return constant(value, ast.parse(source_of(str(node.module))))
    raise KeyError(value.id)


def choices(annotation: ast.expr) -> str:
    """The values of a `Literal[…]`, alone or in a union with None."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            *others, last = map(str, ast.literal_eval(node.slice))
            return f"{', '.join(others)} or {last}"
    return ""


# ---------------------------------------------------------------------------------------------------- help pages


def listing() -> str:
    tasks = [(name, task.description) for name, task in TASKS.items()]
    return f"experiments\n{table(list_experiments().items())}\n\ntasks\n{table(tasks)}"


def experiment_help(name: str, program: str) -> str:
    """The description of an experiment, its files, and every key with its value and comment."""
    layers = load_layers(name)
    comments: dict[str, str] = {}
    for layer in layers:
        comments.update({key: comment for key, comment in key_comments(layer.path).items() if comment})
    config = compose(name, gaps="(must be given)")
    rows = [(f"{key}={as_typed(value)}", comments.get(key, "")) for key, value in flatten(config).items()]
    rows = [row for row in rows if not row[0].startswith("description=")]
    files = " <- ".join(str(layer.path) for layer in reversed(layers))
    title = config.get("description", name)
    return f"{title}\n\nusage: {program} run {name} [key=value …]\nfiles: {files}\n\n{table(rows)}"


def table(rows: Any) -> str:
    rows = list(rows)
    width = min(60, max((len(name) for name, _ in rows), default=0))
    return "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in rows)
