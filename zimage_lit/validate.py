"""Check composed settings against the signatures of the classes they name, before anything is built.

LightningCLI checks the same settings when it builds the objects, but answers with every type it tried. Here each value
is checked alone, so that the first wrong one is named in one sentence with its dotted key.
"""

import collections.abc
import copy
import dataclasses
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from zimage_lit.config import RunSettings, as_typed, did_you_mean, settings_from
from zimage_lit.errors import UserError

SECTIONS = ("description", "run", "seed_everything", "trainer", "model", "data")
COMPONENT_KEYS = ("class_path", "init_args")
UNTYPED = Any


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One argument of a constructor."""

    name: str
    hint: Any  # its type hint; Any where it has none
    required: bool
    accepts_none: bool


def check_config(config: dict[str, Any]) -> None:
    """Raise UserError for the first unknown key, wrong type or missing value of a composed experiment."""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

    check_names("", config, SECTIONS)
    check_value("description", config.get("description", ""), str)
    settings_from(RunSettings, as_mapping("run", config["run"]), section="run")
    check_value("seed_everything", config["seed_everything"], int | bool)
    trainer = dict(as_mapping("trainer", config.get("trainer", {})))
    callbacks = trainer.pop("callbacks", None)
    if "default_root_dir" in trainer:
        raise UserError("trainer.default_root_dir is not a setting here: the run's folder is run.output_dir")
    check_arguments("trainer", Trainer, trainer)
    check_callbacks(callbacks, Callback)
    for section, base in (("model", LightningModule), ("data", LightningDataModule)):
        if section not in config:
            raise UserError(f"{section} has no value: name its class as {section}.class_path=…")
        check_value(section, config[section], base)


def check_callbacks(callbacks: Any, base: type) -> None:
    if callbacks is None or isinstance(callbacks, list):
        check_value("trainer.callbacks", callbacks, list[base] | None)  # type: ignore[valid-type]
        return
    for name, callback in as_mapping("trainer.callbacks", callbacks).items():
        if isinstance(callback, dict) and "class_path" not in callback:
            known = [other for other, value in callbacks.items() if isinstance(value, dict) and "class_path" in value]
            hint = did_you_mean(name, known, listing="there are")
            raise UserError(f"trainer.callbacks.{name} names no class: give its class_path, or mend the name{hint}")
        check_value(f"trainer.callbacks.{name}", callback, base)


# ---------------------------------------------------------------------------------------------------- the walk


def check_value(key: str, value: Any, hint: Any) -> None:
    """Check one value, inner components and dataclasses first, so that the innermost wrong key is the one named."""
    if isinstance(value, dict) and "class_path" in value:
        check_component(key, value, partial=is_callable_hint(hint))
    elif isinstance(value, dict) and (dataclass_type := dataclass_of(hint)):
        check_arguments(key, dataclass_type, value)
    elif isinstance(value, dict) and "init_args" in value and dict not in members(hint):  # whose owner knows a class
        raise UserError(f"{key} names no class: give {key}.class_path")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, dict):
                check_value(f"{key}[{index}]", item, item_hint(hint))
    elif isinstance(value, dict):
        for name, item in value.items():
            if isinstance(item, dict):
                check_value(f"{key}.{name}", item, value_hint(hint))
    check_type(key, value, hint)


def check_component(key: str, value: dict[str, Any], partial: bool) -> None:
    """A `{class_path, init_args}` mapping; `partial` components get their other arguments later, from the code."""
    check_names(key, value, COMPONENT_KEYS, inside="init_args")
    component = import_class(f"{key}.class_path", value["class_path"])
    arguments = value.get("init_args")
    check_arguments(f"{key}.init_args", component, {} if arguments is None else arguments, partial)


def check_arguments(key: str, component: Any, arguments: Any, partial: bool = False) -> None:
    """Every argument is known and of its type, and none without a default is missing."""
    arguments = as_mapping(key, arguments)
    parameters = parameters_of(component)
    check_names(key, arguments, parameters, owner=component.__name__)
    for name, parameter in parameters.items():
        full_key = f"{key}.{name}" if key else name
        if name in arguments:
            if not (arguments[name] is None and parameter.accepts_none):
                check_value(full_key, arguments[name], parameter.hint)
        elif parameter.required and not partial:
            raise UserError(f"{full_key} has no value: {component.__name__} needs it, give it as {full_key}=…")


def check_names(key: str, values: dict[str, Any], known: Iterable[str], owner: str = "", inside: str = "") -> None:
    for name in values:
        if name in known:
            continue
        full_key = f"{key}.{name}" if key else name
        if inside:
            raise UserError(f"{full_key} is not a setting: next to class_path there is only {inside}")
        where = f" of {owner}" if owner else ""
        raise UserError(f"{full_key} is not a setting{where}{did_you_mean(str(name), known, listing='there are')}")


def check_type(key: str, value: Any, hint: Any) -> None:
    """One value against one type hint, by jsonargparse's rules, except that null is not a value of every type."""
    if hint is Any or type(value) in members(hint):  # a plain value needs no parser
        return
    matches = value is not None or is_none_allowed(hint)
    if matches and value is not None:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_function_arguments(taking(hint), fail_untyped=False)  # as LightningCLI adds them
        try:
            parser.parse_object({"value": copy.deepcopy(value)})  # it rewrites components in a mapping where they are
        except ArgumentError:
            matches = False
    if not matches:
        raise UserError(f"{key} must be {describe(hint)}, not {shown(value)}")


def taking(hint: Any) -> Callable[[Any], None]:
    """A function of one argument of this type."""

    def function(value: Any) -> None: ...

    function.__annotations__["value"] = hint
    return function


def as_mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{key} must be a mapping of settings, not {shown(value)}")
    return value


# ---------------------------------------------------------------------------------------------------- classes


def import_class(key: str, path: Any) -> Any:
    """The class at an import path such as `zimage_lit.stages.FlowMatchingModule`."""
    if not isinstance(path, str) or "." not in path:
        raise UserError(f"{key} must be a full import path such as package.module.Class, not {shown(path)}")
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{key}: cannot import {module_name} ({error})") from error
    component = getattr(module, class_name, None)
    if not callable(component):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value) and not name.startswith("_")]
        raise UserError(f"{key}: {module_name} has no class {class_name}{did_you_mean(class_name, classes, 'it has')}")
    return component


@functools.cache
def parameters_of(component: Any) -> dict[str, Parameter]:
    """The arguments that a config may give: those of the constructor and, through **kwargs, of the ones above it."""
    signatures = constructors(component)
    hints = [resolved_hints(function) for function in signatures]
    if inspect.isclass(component):
        names = ArgumentParser(exit_on_error=False).add_class_arguments(component, fail_untyped=False)
    else:
        names = ArgumentParser(exit_on_error=False).add_function_arguments(component, fail_untyped=False)
    parameters: dict[str, Parameter] = {}
    for name in names:
        if "." in name:  # jsonargparse lists the fields of a dataclass argument too
            continue
        parameters[name] = Parameter(name, UNTYPED, required=False, accepts_none=True)
        for function, function_hints in zip(signatures, hints, strict=True):
            found = inspect.signature(function).parameters.get(name)
            if found is not None:
                hint = function_hints.get(name, UNTYPED)
                required = found.default is inspect.Parameter.empty
                none = found.default is None or hint is UNTYPED or is_none_allowed(hint)
                parameters[name] = Parameter(name, hint, required, none)
                break
    return parameters


def constructors(component: Any) -> list[Any]:
    if not inspect.isclass(component):
        return [component]
    return [vars(base)["__init__"] for base in component.__mro__ if "__init__" in vars(base) and base is not object]


def resolved_hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # a hint that only a type checker can see: its values go unchecked here
        return {}


# ---------------------------------------------------------------------------------------------------- type hints


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, else the hint itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def is_none_allowed(hint: Any) -> bool:
    return any(member in (None, types.NoneType, Any, object) for member in members(hint))


def is_callable_hint(hint: Any) -> bool:
    return any(typing.get_origin(member) is collections.abc.Callable for member in members(hint))


def item_hint(hint: Any) -> Any:
    """What the items of a list are; Any where the hint does not say."""
    found = [typing.get_args(member) for member in members(hint) if typing.get_origin(member) in COLLECTIONS]
    return found[0][0] if len(found) == 1 and len(found[0]) == 1 else Any


def value_hint(hint: Any) -> Any:
    """Of the values of a mapping; Any where the hint does not say."""
    return next((typing.get_args(one)[1] for one in members(hint) if typing.get_origin(one) is dict), Any)


def dataclass_of(hint: Any) -> type | None:
    found = [member for member in members(hint) if inspect.isclass(member) and dataclasses.is_dataclass(member)]
    return found[0] if found else None


NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
NAMES |= {dict: "a mapping", list: "a list", Path: "a path"}
COLLECTIONS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)


def describe(hint: Any) -> str:
    """A type hint in words: `a whole number or null`, `one of 'a', 'b'`, `a Callback (class_path and init_args)`."""
    choices = [choice for member in members(hint) for choice in typing.get_args(member) if is_literal(member)]
    words = [f"one of {', '.join(repr(choice) for choice in dict.fromkeys(choices))}"] if choices else []
    words += [describe_one(member) for member in members(hint) if not is_literal(member)]
    return " or ".join(dict.fromkeys(words))


def is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def describe_one(hint: Any) -> str:
    origin = typing.get_origin(hint) or hint
    if origin in NAMES:
        inner = typing.get_args(hint)
        return f"a list of {describe(inner[0])} each" if origin is list and inner else NAMES[origin]
    if origin in COLLECTIONS:
        parts = [describe(argument) for argument in typing.get_args(hint) if argument is not Ellipsis]
        return f"a list of {', '.join(parts)}" if parts else "a list"
    if origin is collections.abc.Callable:
        return "a class to be called (class_path and init_args)"
    if inspect.isclass(origin) and issubclass(origin, dict | collections.abc.Mapping):
        return "a mapping"
    if inspect.isclass(origin):
        return (
            f"a mapping of {origin.__name__}"
            if dataclasses.is_dataclass(origin)
            else f"a {origin.__name__} (class_path and init_args)"
        )
    return str(hint)


def shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return as_typed(value)
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"])
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


# ---------------------------------------------------------------------------------------------------- dataclasses


def build_dataclass(dataclass_type: Any, given: dict[str, Any], section: str) -> Any:
    """See `zimage_lit.config.settings_from`."""
    hints = typing.get_type_hints(dataclass_type)
    values = {name: as_text(value, hints[name]) if name in hints else value for name, value in given.items()}
    check_arguments(section, dataclass_type, values)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--settings", type=dataclass_type)
    return parser.instantiate(parser.parse_object({"settings": values})).settings


def instantiate(key: str, base: type, component: dict[str, Any]) -> Any:
    """What a `{class_path, init_args}` mapping names, a `base`. key: what the parser's errors call it; they, and the
    constructor's, are the caller's to put into words."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, key)
    return parser.instantiate(parser.parse_object({key: component}))[key]


def as_text(value: Any, hint: Any) -> Any:
    """A number where text is wanted, as text; one text where a list of texts is wanted, as a list."""
    wanted = members(hint)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and str in wanted and int not in wanted and float not in wanted:
        return str(value)
    if isinstance(value, str) and list[str] in wanted and str not in wanted:
        return [value]
    return value
