"""Composition, overrides and the checks of settings: what is accepted, what is refused, and in which words."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from zimage_lit import cli
from zimage_lit import config as module
from zimage_lit.config import callback_list, compose, key_comments, parse_overrides, settings_from, to_yaml
from zimage_lit.errors import UserError
from zimage_lit.run_folder import differences, last_checkpoint, move_aside, plan_start, write_atomically, write_status
from zimage_lit.validate import check_config


@pytest.fixture(autouse=True)
def toys_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ./experiments in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments"
    folder.mkdir()
    return folder


def write(folder: Path, name: str, text: str) -> None:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def refused(call: Any, *arguments: Any) -> str:
    """The one sentence with which a call refuses its arguments."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------- composing


def test_later_defaults_and_the_file_itself_win(experiments: Path) -> None:
    write(experiments, "defaults/a", "trainer: {max_steps: 1, precision: a}\nmodel: {init_args: {x: 1}}")
    write(experiments, "defaults/b", "trainer: {max_steps: 2, devices: 3}")
    write(experiments, "tiny/sft", "defaults: [defaults/a, defaults/b]\ntrainer: {devices: 4}")
    composed = compose("tiny/sft")
    assert composed["trainer"] == {"max_steps": 2, "precision": "a", "devices": 4}
    assert composed["model"] == {"init_args": {"x": 1}}
    assert composed["run"] == {"name": "tiny/sft", "output_dir": "outputs/tiny/sft", "resume": "auto"}


def test_a_value_that_must_be_given_does_not_hide_a_given_one(experiments: Path) -> None:
    write(experiments, "base", "trainer: {max_steps: 1, devices: '???'}")
    write(experiments, "top", "defaults: [base]\nrun: {name: '???'}\ntrainer: {max_steps: '???'}")
    composed = compose("top", ["trainer.devices=2"])
    assert composed["trainer"] == {"max_steps": 1, "devices": 2} and composed["run"]["name"] == "top"


def test_missing_values_are_an_error_unless_something_stands_for_them(experiments: Path) -> None:
    write(experiments, "base", "trainer: {devices: '???', max_steps: '${trainer.devices}'}")
    with pytest.raises(UserError, match=r"trainer\.devices has no value: give it as trainer\.devices="):
        compose("base")
    assert compose("base", gaps="missing")["trainer"] == {"devices": "missing", "max_steps": "missing"}


def test_a_shared_default_is_merged_once_where_it_is_first_named(experiments: Path) -> None:
    write(experiments, "base", "trainer: {max_steps: 1}")
    write(experiments, "left", "defaults: [base]\ntrainer: {max_steps: 2}")
    write(experiments, "right", "defaults: [base]\ntrainer: {devices: 2}")
    write(experiments, "both", "defaults: [left, right]")
    assert compose("both")["trainer"] == {"max_steps": 2, "devices": 2}


def test_interpolation_crosses_files_and_follows_overrides(experiments: Path) -> None:
    write(experiments, "base", "model: {init_args: {folder: '${data.init_args.data_dir}/codec'}}")
    write(experiments, "top", "defaults: [base]\ndata: {init_args: {data_dir: here}}")
    assert compose("top", ["data.init_args.data_dir=there"])["model"]["init_args"]["folder"] == "there/codec"


def test_another_class_drops_the_arguments_of_the_one_it_replaces(experiments: Path) -> None:
    write(experiments, "top", "trainer: {logger: {class_path: a.A, init_args: {uri: x, name: y}}}")
    same = compose("top", ["trainer.logger.init_args.name=z"])
    assert same["trainer"]["logger"] == {"class_path": "a.A", "init_args": {"uri": "x", "name": "z"}}
    other = compose("top", ["trainer.logger.class_path=b.B", "trainer.logger.init_args.folder=f"])
    assert other["trainer"]["logger"] == {"class_path": "b.B", "init_args": {"folder": "f"}}


def test_callbacks_are_changed_and_removed_by_name_and_handed_on_as_a_list(experiments: Path) -> None:
    callbacks = "{one: {class_path: a.One}, two: {class_path: a.Two, init_args: {n: 1}}, three: {class_path: a.Three}}"
    write(experiments, "base", f"trainer: {{callbacks: {callbacks}}}")
    write(experiments, "top", "defaults: [base]\ntrainer: {callbacks: {one: null}}")
    composed = compose("top", ["trainer.callbacks.two.init_args.n=2", "trainer.callbacks.four.class_path=a.Four"])
    assert callback_list(composed)["trainer"]["callbacks"] == [
        {"class_path": "a.Two", "init_args": {"n": 2}},
        {"class_path": "a.Three"},
        {"class_path": "a.Four"},
    ]
    assert "trainer.callbacks.wto cannot be removed" in refused(compose, "top", ["trainer.callbacks.wto=null"])
    assert "(did you mean 'two'?)" in refused(compose, "top", ["trainer.callbacks.wto=null"])


def test_what_others_take_from_a_removed_callback_stays(experiments: Path) -> None:
    one = "{class_path: a.One, init_args: {steps: 20, file: '???'}}"
    two = "{class_path: a.Two, init_args: {steps: '${trainer.callbacks.one.init_args.steps}'}}"
    write(experiments, "base", f"trainer: {{callbacks: {{one: {one}, two: {two}}}}}")
    composed = compose("base", ["trainer.callbacks.one=null"])
    assert composed["trainer"]["callbacks"] == {"two": {"class_path": "a.Two", "init_args": {"steps": 20}}}
    assert "trainer.callbacks.one.init_args.file has no value" in refused(compose, "base")
    write(experiments, "without", "defaults: [base]\ntrainer: {callbacks: {one: null}}")
    assert "cannot be removed" in refused(compose, "without", ["trainer.callbacks.one=null"])
    again = compose("without", ["trainer.callbacks.one.class_path=a.One", "trainer.callbacks.one.init_args.steps=3"])
    assert again["trainer"]["callbacks"]["one"] == {"class_path": "a.One", "init_args": {"steps": 3}}
    assert again["trainer"]["callbacks"]["two"]["init_args"] == {"steps": 3}


def test_a_callback_is_added_without_a_name_and_has_that_of_its_class(experiments: Path) -> None:
    write(experiments, "top", "trainer: {callbacks: {one: {class_path: a.One}}}")
    added = "trainer.callbacks+={class_path: b.JPEGSize, init_args: {quality: 90}}"
    words = ["trainer.callbacks+=b.JPEGSize", added, "trainer.callbacks.jpeg_size.init_args.quality=80"]
    assert compose("top", words)["trainer"]["callbacks"] == {
        "one": {"class_path": "a.One"},
        "jpeg_size": {"class_path": "b.JPEGSize", "init_args": {"quality": 80}},
        "jpeg_size_2": {"class_path": "b.JPEGSize", "init_args": {"quality": 90}},
    }
    for wrong in ("trainer.callbacks+=3", "trainer.callbacks+={init_args: {}}"):
        assert "adds a class: give package.module.Class" in refused(compose, "top", [wrong])
    assert "trainer.max_steps+ " in refused(check_config, compose("top", ["trainer.max_steps+=3"]))


def test_a_plain_list_of_callbacks_is_handed_on_unchanged(experiments: Path) -> None:
    write(experiments, "top", "trainer: {callbacks: [{class_path: a.One}]}")
    assert callback_list(compose("top"))["trainer"]["callbacks"] == [{"class_path": "a.One"}]
    assert "trainer.callbacks is a list" in refused(compose, "top", ["trainer.callbacks.one.init_args.n=1"])


def test_the_working_directory_shadows_the_shipped_experiments(experiments: Path, monkeypatch, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    write(shipped, "same", "description: shipped\n")
    write(shipped, "other", "description: only shipped\n")
    write(experiments, "same", "description: mine\n")
    monkeypatch.setattr(module, "PACKAGE_EXPERIMENTS", shipped)
    assert module.list_experiments() == {"other": "only shipped", "same": "mine"}
    assert compose("same")["description"] == "mine"


def test_a_file_name_is_composed_with_defaults_from_beside_it(experiments: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, "base", "trainer: {devices: 7}")
    write(elsewhere, "mine", "defaults: [base]")
    composed = compose(str(elsewhere / "mine.yaml"))
    assert composed["trainer"]["devices"] == 7 and composed["run"]["name"] == "mine"


def test_composed_settings_written_out_compose_to_themselves(experiments: Path) -> None:
    write(experiments, "top", "trainer: {callbacks: {a: {class_path: a.A, init_args: {x: 1e-4, s: '1e-4', t: no}}}}")
    composed = compose("top")
    Path("again.yaml").write_text(to_yaml(composed))
    assert compose("again.yaml") == composed


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({"a": "defaults: [b]", "b": "defaults: [a]"}, "a", "run in a circle: a.yaml -> b.yaml -> a.yaml"),
        ({"a": "defaults: [defaults/rnu]"}, "a", "in `defaults`, there is no experiment 'defaults/rnu'"),
        ({"a": "defaults: run"}, "a", "`defaults` must be a list"),
        ({"a": "trainer: {max_steps: 1"}, "a", "is not valid YAML"),
        ({"a": "x: 1\nx: 2"}, "a", "is not valid YAML"),
        ({"a": "- x"}, "a", "must hold a mapping"),
        ({"a": "trainer: {x: '${data.nope}'}"}, "a", "trainer.x cannot be resolved"),
        ({"a": "trainer: {x: '???'}"}, "a", "trainer.x has no value: give it as trainer.x=…"),
        ({"kickstart": ""}, "kickstrat", "there is no experiment 'kickstrat' (did you mean 'kickstart'?)"),
        ({"tiny/sft": ""}, "sft", "(did you mean 'tiny/sft'?)"),
        ({}, "gone.yaml", "there is no experiment file gone.yaml"),
    ],
)
def test_a_broken_file_is_one_sentence(experiments: Path, files: dict[str, str], name: str, message: str) -> None:
    for file, text in files.items():
        write(experiments, file, text)
    assert message in refused(compose, name)


# ---------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        (".5", 0.5),
        ("inf", float("inf")),
        ("null", None),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("1:30", "1:30"),
        ("bf16-mixed", "bf16-mixed"),
        ("a sign that says: hello, # world", "a sign that says: hello, # world"),
        ("[1e-3, x, [2]]", [1e-3, "x", [2]]),
        ("{a: 1}", {"a": 1}),
        ("'1'", "1"),
        ("", ""),
        ("a=b", "a=b"),
    ],
)
def test_the_text_of_an_override_means_what_a_person_means(text: str, value: Any) -> None:
    parsed = parse_overrides([f"some.key={text}"])["some"]["key"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "override", ["trainer.max_steps", "--trainer.max_steps=1", ".a=1", "a..b=1", "=1", "a=[1, 2", "a='x"]
)
def test_a_malformed_override_is_refused(override: str) -> None:
    assert override.partition("=")[0] in refused(parse_overrides, [override])


# ---------------------------------------------------------------------------------------------------- comments


def test_comments_are_found_behind_a_key_and_above_it(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 1  # behind\n# above,\n# in two lines\nb:\n  c: '#no'\n  d: [1]  # list\ne: {f: 1}  # inline\n")
    assert key_comments(path) == {"a": "behind", "b": "above, in two lines", "b.c": "", "b.d": "list", "e": "inline"}


# ---------------------------------------------------------------------------------------------------- settings of tasks


@dataclass
class Inner:
    scale: float = 1.0


@dataclass
class TaskSettings:
    checkpoint: str
    prompts: list[str] = field(default_factory=list)
    steps: int = 28
    seed: int | None = None
    folder: Path = Path("outputs")
    inner: Inner = field(default_factory=Inner)


def test_settings_are_converted_to_the_fields_types() -> None:
    settings = settings_from(
        TaskSettings, ["checkpoint=12", "prompts=a cat, a dog", "seed=3", "folder=here", "inner.scale=2"]
    )
    assert settings == TaskSettings("12", ["a cat, a dog"], 28, 3, Path("here"), Inner(2.0))
    assert settings_from(TaskSettings, {"checkpoint": "x", "prompts": ["a", "b"], "seed": None}).prompts == ["a", "b"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=a", "promts=b"], "promts is not a setting of TaskSettings (did you mean 'prompts'?)"),
        (["checkpoint=a", "steps=many"], "steps must be a whole number, not 'many'"),
        (["checkpoint=a", "steps=null"], "steps must be a whole number, not null"),
        (["checkpoint=a", "inner.sclae=2"], "inner.sclae is not a setting of Inner (did you mean 'scale'?)"),
        (["checkpoint=a", "inner.scale=x"], "inner.scale must be a number, not 'x'"),
        (["steps=3"], "checkpoint has no value"),
    ],
)
def test_wrong_task_settings_are_one_sentence(overrides: list[str], message: str) -> None:
    assert message in refused(settings_from, TaskSettings, overrides)


# ---------------------------------------------------------------------------------------------------- checking


def toy(**model_arguments: Any) -> dict[str, Any]:
    encoder = {"class_path": "toys.ToyEncoder", "init_args": {"folder": "f"}}
    return {
        "run": {"name": "toy", "output_dir": "outputs/toy", "resume": "auto"},
        "seed_everything": 0,
        "trainer": {"max_steps": 3, "callbacks": {"decay": {"class_path": "toys.Decay", "init_args": {"decay": 0.9}}}},
        "model": {"class_path": "toys.ToyModule", "init_args": {"encoder": encoder, **model_arguments}},
        "data": {"class_path": "toys.ToyDataModule", "init_args": {"num_workers": 0}},
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    return module.merge(toy(), parse_overrides([f"{path}=null"]) if value is None else nested(path, value))


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    "good",
    [
        toy(),
        toy(optimiser={"lr": 1e-4}, kind="noise", names=["a"], dropout=1, compile_model=True),
        toy(backbone={"lr": 1}, optimiser=None, anything={"free": {"form": 1}}),
        changed("model.class_path", "toys.ToyModule"),
        {
            **toy(),
            "model": {"class_path": "toys.ToyModuleAbove", "init_args": {**toy()["model"]["init_args"], "extra": 2}},
        },
        changed("trainer.precision", "bf16-mixed"),
        changed("trainer.logger", False),
        changed("trainer.max_time", "00:01:00:00"),
    ],
)
def test_right_settings_pass(good: dict[str, Any]) -> None:
    check_config(good)


def test_checking_and_building_leave_a_mixture_of_data_sets_as_it_was() -> None:
    """The parser rewrites components inside a mapping in place."""
    part = {"class_path": "data_modules.TextToImageDataModule", "init_args": {"data_dir": "here"}}
    mixture = {"data": {"photos": part}, "weights": {"photos": 1.0}}
    config = toy()
    config["trainer"] = {**config["trainer"], "logger": False}
    config["data"] = {"class_path": "data_modules.MixtureDataModule", "init_args": mixture}
    before = to_yaml(config)
    check_config(config)
    assert to_yaml(config) == before
    cli.build(config)
    assert to_yaml(config) == before


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("trianer", {}, "trianer is not a setting (did you mean 'trainer'?)"),
        ("run.nmae", "x", "run.nmae is not a setting of RunSettings (did you mean 'name'?)"),
        ("run.output_dir", None, "run.output_dir must be text, not null"),
        ("seed_everything", "x", "seed_everything must be a whole number or true or false, not 'x'"),
        ("trainer.max_step", 3, "trainer.max_step is not a setting of Trainer (did you mean 'max_steps'?)"),
        ("trainer.max_steps", "many", "trainer.max_steps must be a whole number, not 'many'"),
        ("trainer.max_steps", 1.5, "trainer.max_steps must be a whole number, not 1.5"),
        ("trainer.default_root_dir", "x", "the run's folder is run.output_dir"),
        ("trainer.precision", "bf61-mixed", "trainer.precision must be one of "),
        (
            "trainer.callbacks.decay.init_args.dcay",
            1,
            "init_args.dcay is not a setting of Decay (did you mean 'decay'?)",
        ),
        (
            "trainer.callbacks.decay.init_args.decay",
            "x",
            "trainer.callbacks.decay.init_args.decay must be a number, not 'x'",
        ),
        ("trainer.callbacks.dceay.init_args.decay", 1, "trainer.callbacks.dceay names no class"),
        ("trainer.callbacks.decay.class_path", "toys.ToyModule", "encoder has no value"),
        (
            "trainer.callbacks.new",
            {"class_path": "toys.ToyEncoder", "init_args": {"folder": "f"}},
            "must be a Callback",
        ),
        ("model.lr", 1, "model.lr is not a setting: next to class_path there is only init_args"),
        ("model.init_args.dropot", 1, "model.init_args.dropot is not a setting of ToyModule (did you mean 'dropout'?)"),
        ("model.init_args.dropout", "much", "model.init_args.dropout must be a number, not 'much'"),
        ("model.init_args.dropout", None, "model.init_args.dropout must be a number, not null"),
        ("model.init_args.compile_model", 1, "model.init_args.compile_model must be true or false, not 1"),
        ("model.init_args.kind", "x", "model.init_args.kind must be one of 'velocity', 'noise', not 'x'"),
        ("model.init_args.names", "abc", "model.init_args.names must be a list of text each or null, not 'abc'"),
        ("model.init_args.optimiser.lrr", 1, "model.init_args.optimiser.lrr is not a setting of OptimiserSettings"),
        ("model.init_args.optimiser.lr", "x", "model.init_args.optimiser.lr must be a number, not 'x'"),
        ("model.init_args.encoder.init_args.foldr", "x", "encoder.init_args.foldr is not a setting of ToyEncoder"),
        ("model.init_args.encoder.init_args.width", "x", "encoder.init_args.width must be a whole number, not 'x'"),
        ("model.init_args.encoder.class_path", "toys.ToyEncodr", "no class ToyEncodr (did you mean 'ToyEncoder'?)"),
        ("model.init_args.encoder.class_path", "toyz.ToyEncoder", "cannot import toyz"),
        ("model.init_args.encoder.class_path", "ToyEncoder", "must be a full import path"),
        (
            "model.init_args.encoder",
            {"class_path": "toys.ToyEncoder", "init_args": {}},
            "encoder.init_args.folder has no value",
        ),
        (
            "model.init_args.encoder",
            {"class_path": "toys.Decay"},
            "encoder must be a ToyEncoder (class_path and init_args)",
        ),
        ("model.class_path", "toys.ToyDataModule", "must be a LightningModule"),
        ("data.init_args.num_worker", 2, "data.init_args.num_worker is not a setting of ToyDataModule"),
    ],
)
def test_a_wrong_setting_is_named_in_one_sentence(path: str, value: Any, message: str) -> None:
    config = changed(path, value)
    if path.endswith("encoder"):  # replace it, init_args included
        config["model"]["init_args"]["encoder"] = value
    if path == "model.class_path":
        config["model"] = {"class_path": value}
    assert message in refused(check_config, config)


def test_a_component_without_a_class_is_named() -> None:
    config = toy()
    del config["model"]["class_path"]
    assert "model names no class: give model.class_path" in refused(check_config, config)
    del config["model"]
    assert "model has no value" in refused(check_config, config)


# ---------------------------------------------------------------------------------------------------- the run's folder


def settings(tmp_path: Path, resume: str = "auto") -> module.RunSettings:
    return module.RunSettings("toy", str(tmp_path / "toy"), resume)


def a_run(tmp_path: Path, status: str, config: dict[str, Any]) -> Path:
    folder = tmp_path / "toy"
    write_atomically(folder / "config.yaml", to_yaml(config))
    write_status(folder, status, 7)
    write_atomically(last_checkpoint(folder), "weights")
    return folder


def test_an_empty_folder_begins_and_an_unfinished_run_continues(tmp_path: Path) -> None:
    start = plan_start(settings(tmp_path), toy(), first_process=True)
    assert start.checkpoint is None and not start.finished and not start.note
    folder = a_run(tmp_path, "running", toy())
    assert plan_start(settings(tmp_path), toy(), first_process=True).checkpoint == last_checkpoint(folder)


def test_a_finished_run_is_done_until_it_may_run_longer(tmp_path: Path) -> None:
    a_run(tmp_path, "finished", toy())
    start = plan_start(settings(tmp_path), toy(), first_process=True)
    assert start.finished and "run.resume=never" in start.note
    assert not plan_start(settings(tmp_path), changed("trainer.max_steps", 9), first_process=True).finished


def test_other_settings_are_not_continued_and_are_named(tmp_path: Path) -> None:
    a_run(tmp_path, "running", toy())
    other = changed("model.init_args.dropout", 0.5)
    message = refused(plan_start, settings(tmp_path), other, True)
    assert "(model.init_args.dropout: absent there, 0.5 now)" in message and "run.resume=never" in message
    for harmless in (
        "trainer.max_steps",
        "trainer.enable_progress_bar",
        "run.name",
        "data.init_args.num_workers",
        "data.init_args.cache.patience",
        "data.init_args.data.photos.init_args.cache.max_bytes",
    ):
        assert differences(toy(), changed(harmless, 5)) == {}


def test_starting_over_moves_the_old_run_aside_and_deletes_nothing(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = a_run(tmp_path, "finished", toy())
        start = plan_start(settings(tmp_path, "never"), toy(), first_process=True)
        assert start.checkpoint is None and not folder.exists()
        assert last_checkpoint(tmp_path / f"toy.{number}").read_text() == "weights"


def test_only_the_first_process_moves_a_folder(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "finished", toy())
    assert plan_start(settings(tmp_path, "never"), toy(), first_process=False).checkpoint is None
    assert folder.exists()


def test_a_folder_that_is_no_run_is_never_moved(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    assert move_aside(folder) == "" and folder.exists()


def test_an_attempt_without_a_checkpoint_does_not_block_other_settings(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "failed", toy())
    last_checkpoint(folder).unlink()
    start = plan_start(settings(tmp_path), changed("model.init_args.dropout", 0.5), first_process=True)
    assert start.checkpoint is None and "is now in" in start.note


def test_a_named_checkpoint_must_exist_and_another_run_makes_room(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "finished", toy())
    assert "run.resume must be auto, never or a checkpoint" in refused(
        plan_start, settings(tmp_path, "nevr"), toy(), True
    )
    own = plan_start(settings(tmp_path, str(last_checkpoint(folder))), toy(), first_process=True)
    assert own.checkpoint == last_checkpoint(folder) and folder.exists()
    foreign = tmp_path / "foreign.ckpt"
    foreign.write_text("weights")
    assert plan_start(settings(tmp_path, str(foreign)), toy(), first_process=True).checkpoint == foreign
    assert not folder.exists() and (tmp_path / "toy.1").exists()
