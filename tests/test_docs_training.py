"""docs/training.md as its reader would follow it: every command is run, in order, most of them made small.

- Commands of SMALL are run with its settings added, after `prepare` has made a data set of a few photographs and with a
  tiny model where the page has a real one.
- `plan` is run as it is written: it needs nothing.
- Every other `lightning run EXPERIMENT`, and every `torchrun … -m zimage_lit run …` or `srun …`, needs more GPUs than
  there are: its settings are composed and checked against the classes that they name.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from docs_pages import DOCS, blocks_of, commands, lightning_run, photograph, write_pipeline

from zimage_lit import cli
from zimage_lit.config import compose, list_experiments
from zimage_lit.validate import check_config

PAGE = "training.md"
# First word after `run`, and the second where that is a path of an experiment -> settings that make it small.
TRAIN = [
    "trainer.max_steps=2",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "data.init_args.num_workers=0",
    "data.init_args.sizes.resolution=64",
    "data.init_args.token_budget=512",
    "trainer.callbacks.samples.init_args.sampling.num_inference_steps=2",
    "trainer.callbacks.samples.init_args.sampling.height=64",
    "trainer.callbacks.samples.init_args.sampling.width=64",
]
SMALL: dict[str, list[str]] = {"plan": [], "lora": TRAIN, "finetune": TRAIN, "export": [], "merge": []}
PLACEHOLDER = "EXPERIMENT"  # where the page leaves the choice to the reader
GIVEN = {  # what the shipped experiments leave to the person who runs them
    "model.init_args.init_from": "models/z-image",
    "data.init_args.data_dir": "data/photos",
    "trainer.callbacks.samples.init_args.prompts": "[a boat]",
}


@dataclass
class Walk:
    """What was run, and what the page shows of it."""

    shown: list[tuple[str, str]] = field(default_factory=list)  # (what the page shows, what the command before printed)
    ran: dict[str, str] = field(default_factory=dict)  # command -> what it printed
    checked: list[str] = field(default_factory=list)  # commands whose settings alone were checked

    def follow(self, language: str, content: str) -> None:
        if language == "text" and self.ran:
            self.shown.append((content, list(self.ran.values())[-1]))
        elif language == "yaml" and content.startswith("# experiments/"):
            place = Path(content.splitlines()[0].removeprefix("# "))
            place.parent.mkdir(exist_ok=True)
            place.write_text(content, encoding="utf-8")
        elif language == "bash":
            for command in commands(content):
                self.run(command)

    def run(self, command: str) -> None:
        words = run_words(command)
        if not words or words[0] == PLACEHOLDER:
            return
        if words[0] in SMALL:
            if words[0] != "plan" and not Path("models").exists():  # what `plan` shows are the published parts' sizes
                write_pipeline(Path.cwd() / "models/z-image")
            code, printed = lightning_run([*words, *SMALL[words[0]]])
            assert code == 0 or (code == 1 and "|| true" in command), f"{command}\n{printed}"
            self.ran[command] = printed
        else:
            assert words[0] in list_experiments(), f"add {words[0]} to SMALL, or mend the page: {command}"
            check_settings(words)
            self.checked.append(command)


def run_words(command: str) -> list[str]:
    """What comes after `run` in a command that starts a run, by whichever launcher; nothing for any other command."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    words = words[: words.index("||")] if "||" in words else words
    for before in (["lightning"], ["zimage"], ["-m", "zimage_lit"]):
        for place in range(len(words)):
            if words[place : place + len(before) + 1] == [*before, "run"]:
                return words[place + len(before) + 1 :]
    return []


def check_settings(words: list[str]) -> None:
    """UserError for a setting that does not exist; what the experiment leaves open is given."""
    code, printed = lightning_run([*words, "--print-config"])
    given = [f"{key}={value}" for key, value in GIVEN.items() if f"{key} has no value" in printed]
    while code and given and (key := given[-1]) not in words:
        words = [*words, key]
        code, printed = lightning_run([*words, "--print-config"])
        given = [f"{key}={value}" for key, value in GIVEN.items() if f"{key} has no value" in printed]
    assert code == 0, f"{shlex.join(words)}\n{printed}"
    check_config(compose(words[0], words[1:]))


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The page followed from its first block to its last, in a folder with photographs and a model."""
    folder = tmp_path_factory.mktemp("docs-training")
    (folder / "photos").mkdir()
    for index in range(12):
        photograph(index).save(folder / f"photos/harbour-{index:02d}.png")
        (folder / f"photos/harbour-{index:02d}.txt").write_text(f"a harbour at dusk, {index} boats")
    walk = Walk()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("COLUMNS", "120")
        code, printed = lightning_run(["prepare", "source=photos", "output=data/photos", "num_workers=1"])
        assert code == 0, printed
        for language, content in blocks_of(PAGE):
            walk.follow(language, content)
        yield walk


def test_every_command_that_starts_a_run_is_followed(walk: Walk) -> None:
    text = (DOCS / PAGE).read_text(encoding="utf-8")
    started = re.findall(r"(?m)^(?:lightning|zimage) run (?!EXPERIMENT)", text)
    assert len([*walk.ran, *walk.checked]) >= len(started) >= 1


def test_what_the_page_shows_is_what_was_printed(walk: Walk) -> None:
    assert walk.shown
    for page, printed in walk.shown:
        for line in page.splitlines():
            assert line in printed, f"{line}\nis not in\n{printed}"


def test_every_task_of_the_page_is_one() -> None:
    blocks = [content for language, content in blocks_of(PAGE) if language == "bash"]
    found = {word for block in blocks for command in commands(block) for word in run_words(command)[:1]}
    assert found <= {*cli.TASKS, *list_experiments(), PLACEHOLDER}
