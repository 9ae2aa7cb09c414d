"""Compose an experiment: YAML files with a `defaults:` list, merged in order, then `key=value` overrides.

    layers of experiments/NAME.yaml  ->  merge  ->  overrides  ->  ${…} resolved  ->  plain dict

Three rules beyond "a later mapping is merged into an earlier one, anything else replaces it":
- a layer that names another `class_path` replaces the whole component: the old class's arguments mean nothing to it;
- `trainer.callbacks` is a mapping from a name to a component, so that one callback can be changed or (`null`) removed;
- a file that several `defaults:` lists name is merged once, where it is first named.

Nothing here imports torch or Lightning, so that `--list` and `--help` answer at once.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zimage_lit.errors import UserError

Settings = TypeVar("Settings")
PACKAGE_EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


@dataclass
class RunSettings:
    """The `run:` section: where a run lives and how it starts."""

    name: str  # the run's name, in the folder and in the tracker
    output_dir: str  # folder of checkpoints, config.yaml, run.json and reports
    resume: str = "auto"  # auto: continue an unfinished run; never: move the old folder aside; or a checkpoint's path

    def __post_init__(self) -> None:
        if not self.name or not self.output_dir:
            raise UserError("run.name and run.output_dir must not be empty: a run has a folder of its own.")


@dataclass(frozen=True)
class Layer:
    """One YAML file of an experiment: where it lies and what it says, without its `defaults:` list."""

    path: Path
    values: dict[str, Any]


def compose(name: str, overrides: Iterable[str] = (), gaps: str | None = None) -> dict[str, Any]:
    """The resolved settings of an experiment as plain dicts, lists and scalars.

    `name` is an experiment (`quickstart`, `tiny/sft`), looked up in ./experiments and then among the shipped ones, or
    the path of a .yaml file. `overrides` are `dotted.key=value` strings, applied last. `trainer.callbacks` stays a
    mapping here (see `callback_list`), so the result can be written to a file and composed again. `gaps` stands for the
    values that nobody has given; None: each is an error.

    Raises UserError for a missing file, a cycle, unreadable YAML, a malformed override or an unresolvable `${…}`.
    """
    config, removed = base_settings(name), set[str]()
    layers = [(layer.values, str(layer.path)) for layer in load_layers(name)]
    for values, source in [*layers, (parse_overrides(overrides), "the command line")]:
        config, removed = add_layer(config, removed, values, source)
    for name in removed:  # nobody needs to give the values that only a removed callback asks for
        callbacks_of(config)[name] = without_gaps(callbacks_of(config)[name])
    if gaps is not None:
        config = without_gaps(config, gaps)
    return without_callbacks(resolve(config), removed)


def base_settings(name: str) -> dict[str, Any]:
    """What every experiment has before its first file: a run named like the experiment, a fixed seed."""
    run_name = Path(name).stem if is_file_name(name) else name
    return {
        "run": {"name": run_name, "output_dir": "outputs/${run.name}", "resume": "auto"},
        "seed_everything": 0,
    }


# ---------------------------------------------------------------------------------------------------- finding files


def is_file_name(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def experiment_folders() -> list[Path]:
    """Where names are looked up: the working directory's own experiments shadow the shipped ones."""
    folders = [Path.cwd() / "experiments", PACKAGE_EXPERIMENTS]
    return [folder for folder in dict.fromkeys(folder.resolve() for folder in folders) if folder.is_dir()]


def experiment_files() -> dict[str, Path]:
    """Name -> file of every experiment that can be run; fragments under defaults/ are left out."""
    found: dict[str, Path] = {}
    for folder in experiment_folders():
        for path in folder.rglob("*.yaml"):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if not name.startswith("defaults/"):
                found.setdefault(name, path)
    return dict(sorted(found.items()))


def list_experiments() -> dict[str, str]:
    """Name -> one-line description of every experiment that can be run."""
    return {name: str(read_yaml(path).get("description") or "") for name, path in experiment_files().items()}


def find_experiment(name: str, beside: Path | None = None) -> Path:
    """The file of an experiment name or file name; `beside` is a folder to look in first."""
    if is_file_name(name):
        path = Path(name) if beside is None or Path(name).is_absolute() else beside / name
        if not path.is_file():
            raise UserError(f"there is no experiment file {path}")
        return path
    for folder in ([beside] if beside else []) + experiment_folders():
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    raise UserError(f"there is no experiment '{name}'{did_you_mean(name, experiment_files())}; --list shows them all")


def load_layers(name: str) -> list[Layer]:
    """The files of an experiment from the most general to itself."""
    layers: dict[Path, Layer] = {}
    collect_layers(find_experiment(name), (), layers)
    return list(layers.values())


def is_graph(name: str) -> bool:
    """Whether an experiment is a graph of several: one of its files has `stages:` (see zimage_lit/graph.py)."""
    return any("stages" in layer.values for layer in load_layers(name))


def collect_layers(path: Path, parents: tuple[Path, ...], layers: dict[Path, Layer]) -> None:
    path = path.resolve()
    if path in parents:
        circle = " -> ".join(parent.name for parent in (*parents[parents.index(path) :], path))
        raise UserError(f"the defaults of {path} run in a circle: {circle}")
    if path in layers:
        return
    values = read_yaml(path)
    defaults = values.pop("defaults", None) or []
    if not isinstance(defaults, list) or not all(isinstance(item, str) for item in defaults):
        raise UserError(f"{path}: `defaults` must be a list of experiment names, such as [defaults/run, tiny/sft]")
    for default in defaults:
        try:
            default_path = find_experiment(default, beside=path.parent)
        except UserError as error:
            raise UserError(f"{path}: in `defaults`, {error}") from None
        collect_layers(default_path, (*parents, path), layers)
    layers[path] = Layer(path, values)


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML file as plain containers, `${…}` untouched; 1e-4 is a number and a repeated key an error."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    except (OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of sections (run, trainer, model, data)")
    if not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: section names must be text")
    return {str(key): value for key, value in values.items()}


# ---------------------------------------------------------------------------------------------------- merging


def merge(base: Any, update: Any) -> Any:
    """`update` on top of `base`: mappings merge key by key, anything else (and another class) replaces.

    `???` ("must be given") takes nothing away from what is given already.
    """
    if update == "???":
        return base
    if not isinstance(base, dict) or not isinstance(update, dict):
        return update
    if "class_path" in update and "class_path" in base and update["class_path"] != base["class_path"]:
        return update
    merged = dict(base)
    for key, value in update.items():
        merged[key] = merge(base[key], value) if key in base else value
    return merged


def add_layer(
    config: dict[str, Any], removed: set[str], values: dict[str, Any], source: str
) -> tuple[dict[str, Any], set[str]]:
    """Merge one layer: (config, names of the callbacks that `null` removes).

    A removed callback stays in the config until the end, for other settings may refer to its own by `${…}`. Removing
    one that is not there is taken for the typing error that it is.
    """
    present, update = callbacks_of(config), callbacks_of(values)
    if not isinstance(update, dict):
        return merge(config, values), removed if update is None else set()
    if isinstance(present, list):
        raise UserError(
            f"trainer.callbacks is a list in the defaults of {source}: single callbacks cannot be changed by name"
        )
    there = [name for name in present or {} if name not in removed]
    removed_here = {name for name, callback in update.items() if callback is None}
    for name in sorted(removed_here - set(there)):
        hint = did_you_mean(name, there, listing="there are")
        raise UserError(f"trainer.callbacks.{name} cannot be removed by {source}: it is not there{hint}")
    kept = {name: callback for name, callback in update.items() if callback is not None}
    anew = without_callbacks(config, removed & kept.keys())  # given again after its removal: begins from nothing
    values = {**values, "trainer": {**values["trainer"], "callbacks": kept}}
    return merge(anew, values), (removed | removed_here) - kept.keys()


def callbacks_of(config: dict[str, Any]) -> Any:
    trainer = config.get("trainer")
    return trainer.get("callbacks") if isinstance(trainer, dict) else None


def without_gaps(value: Any, filler: str | None = None) -> Any:
    if isinstance(value, dict):
        return {key: without_gaps(inner, filler) for key, inner in value.items()}
    return filler if value == "???" else value


def without_callbacks(config: dict[str, Any], names: set[str]) -> dict[str, Any]:
    if not names:
        return config
    kept = {name: callback for name, callback in callbacks_of(config).items() if name not in names}
    return {**config, "trainer": {**config["trainer"], "callbacks": kept}}


def callback_list(config: dict[str, Any]) -> dict[str, Any]:
    """The same settings with `trainer.callbacks` as the list that Lightning wants, in the order of the mapping."""
    callbacks = callbacks_of(config)
    if not isinstance(callbacks, dict):
        return config
    return {**config, "trainer": {**config["trainer"], "callbacks": list(callbacks.values())}}


def resolve(config: dict[str, Any]) -> dict[str, Any]:
    """Replace every `${…}`; `???` (a value that the user must give) is an error that names the key."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key, reason = error.full_key or "the experiment", one_line(error.msg or error)
        if "mandatory value" in reason.lower():
            raise UserError(f"{key} has no value: give it as {key}=…") from None
        reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", reason)  # Python's, and nobody's help
        raise UserError(f"{key} cannot be resolved: {reason}") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def to_yaml(config: dict[str, Any]) -> str:
    """Settings as YAML text in their own order; `compose` of that text gives the same settings."""
    return OmegaConf.to_yaml(OmegaConf.create(config))


# ---------------------------------------------------------------------------------------------------- overrides

INTEGER = re.compile(r"[+-]?[0-9]+")
FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?\.?inf|\.?nan", re.IGNORECASE)
WORDS = {"null": None, "true": True, "false": False}


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1", "a.c=[x, y]"]` -> `{"a": {"b": 1, "c": ["x", "y"]}}`.

    `trainer.callbacks+=package.module.TheClass`, or `+={class_path: …, init_args: …}`, adds a callback as `the_class`,
    or changes the one that the experiment has under that name.
    """
    settings: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if override.startswith("-"):
            raise UserError(f"unknown option '{override}': settings are written key=value, without dashes")
        if not equals or not all(key.split(".")):
            raise UserError(f"'{override}' is not of the form key=value, such as trainer.max_steps=100")
        value = parse_value(text, key)
        if key == "trainer.callbacks+":
            key, value = added_callback(value, callbacks_of(settings) or {})
        for part in reversed(key.split(".")):
            value = {part: value}
        settings = merge(settings, value)
    return settings


def added_callback(value: Any, there: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(key, component) of a callback that is added without a name: it has that of its class, `…_2` where that is taken.

    there: callbacks that earlier overrides name.
    """
    component = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(component, dict) or not isinstance(component.get("class_path"), str):
        raise UserError("trainer.callbacks+= adds a class: give package.module.Class, or {class_path: …, init_args: …}")
    name = snake_case(component["class_path"].rpartition(".")[2])
    names = [name, *(f"{name}_{number}" for number in range(2, len(there) + 2))]
    return f"trainer.callbacks.{next(free for free in names if free not in there)}", component


def parse_value(text: str, key: str) -> Any:
    """What a person means by the text after `=`: null, true/false, a number, a [list], a {mapping}, else text.

    Narrower than YAML on purpose: `a sign: hello`, `no` and `1:30` stay text.
    """
    stripped = text.strip()
    if stripped.lower() in WORDS:
        return WORDS[stripped.lower()]
    if INTEGER.fullmatch(stripped):
        return int(stripped)
    if FLOAT.fullmatch(stripped):
        return float(stripped.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if stripped[:1] in ("[", "{", "'", '"'):
        try:
            return OmegaConf.to_container(OmegaConf.create(f"value: {stripped}"), resolve=False)["value"]  # type: ignore[index, call-overload]
        except (yaml.YAMLError, OmegaConfBaseException):
            raise UserError(f"{key}: {text} is not a complete list, mapping or quoted text") from None
    return text


# ---------------------------------------------------------------------------------------------------- comments


def key_comments(path: Path) -> dict[str, str]:
    """Dotted key -> its comment (behind it or on the lines above), for every key of a YAML file; `""` where none is."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    return {key: comment_at(lines, line) for key, line in key_lines(yaml.compose(text))}


def key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        yield key, key_node.start_mark.line
        if not (isinstance(value_node, yaml.MappingNode) and value_node.flow_style):
            yield from key_lines(value_node, f"{key}.")


def comment_at(lines: list[str], line: int) -> str:
    behind = re.search(r"\s#\s?(.*)$", lines[line])
    if behind:
        return behind.group(1).strip()
    above: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        above.insert(0, lines[line].lstrip().lstrip("#").strip())
    return " ".join(above)


# ---------------------------------------------------------------------------------------------------- wording


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every setting, nested mappings opened."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in flatten(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def setting_tags(settings: dict[str, Any]) -> dict[str, str]:
    """Settings as MLflow's tags `setting/…`, nested names joined by `/`; parameters would be written over every
    picture."""
    return {f"setting/{name.replace('.', '/')}": str(value) for name, value in flatten(settings).items()}


def did_you_mean(word: str, known: Iterable[str], listing: str = "") -> str:
    """` (did you mean 'x'?)`, else the known words after `listing` (nothing where no listing is wanted)."""
    known = list(known)
    last_parts = {name.rsplit("/", 1)[-1]: name for name in reversed(known)}  # of two alike the first
    nearest = difflib.get_close_matches(word, known, n=1) or difflib.get_close_matches(word, last_parts, n=1)
    if nearest:
        return f" (did you mean '{last_parts.get(nearest[0], nearest[0])}'?)"
    if listing and known:
        return f" ({listing} {', '.join(known[:20])}{', …' if len(known) > 20 else ''})"
    return ""


def as_typed(value: Any) -> str:
    """A value as it is written in YAML and on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def snake_case(name: str) -> str:
    """JPEGSize -> jpeg_size."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def one_line(error: object) -> str:
    """The substance of a library's many-line message."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("full_key:", "object_type=")))


# ---------------------------------------------------------------------------------------------------- settings of tasks


def settings_from(
    dataclass_type: type[Settings], overrides: Mapping[str, Any] | Iterable[str], section: str = ""
) -> Settings:
    """An instance of a settings dataclass from `key=value` strings or a mapping of parsed values.

    A number given for a field of text becomes text, and one text given for a list of texts a list of one. Raises
    UserError that names the key (after `section`, where one is given) for an unknown key, a wrong type or a missing
    value.
    """
    from zimage_lit.validate import build_dataclass  # jsonargparse is imported only where settings are checked

    given = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    return build_dataclass(dataclass_type, given, section)
