"""docs/training.md as its reader would follow it: every command is run, in order, most of them made small.

- Commands of SMALL are run with its settings added, after `prepare` has made a data set of a few photographs and with a
  tiny model where the page has a real one.
- `plan` is run as it is written: it needs nothing.
- Every other `lightning run EXPERIMENT`, and every `torchrun … -m zimage_lit run …` or `srun …`, needs more GPUs than
  there are: its settings are composed and checked against the classes that they name.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_pages import (
    PLACEHOLDER,
    Walk,
    blocks_of,
    lightning_run,
    photograph,
    run_words,
    started_by,
    tasks_of,
    write_pipeline,
)

from zimage_lit import cli
from zimage_lit.config import list_experiments

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


class TrainingWalk(Walk):
    """With a tiny model where the page has a real one, and one prompt of each task where mixes are scored."""

    def run(self, command: str) -> None:
        words = run_words(command)
        sized = words[:1] == ["plan"]  # what `plan` shows are the published parts' sizes
        if words and words[0] in SMALL and not sized and not Path("models").exists():
            write_pipeline(Path.cwd() / "models/z-image")
        scored = " score_arguments.prompts_per_task=1" if "score=tinyworld" in words else ""
        super().run(command.rstrip("\n") + scored)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The page followed from its first block to its last, in a folder with photographs and a model."""
    folder = tmp_path_factory.mktemp("docs-training")
    (folder / "photos").mkdir()
    for index in range(12):
        photograph(index).save(folder / f"photos/harbour-{index:02d}.png")
        (folder / f"photos/harbour-{index:02d}.txt").write_text(f"a harbour at dusk, {index} boats")
    walk = TrainingWalk(SMALL)
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
    assert walk.count() >= started_by(PAGE) >= 1


def test_what_the_page_shows_is_what_was_printed(walk: Walk) -> None:
    assert walk.shown
    for page, printed in walk.shown:
        for line in page.splitlines():
            assert line in printed, f"{line}\nis not in\n{printed}"


def test_every_task_of_the_page_is_one() -> None:
    assert tasks_of(PAGE) <= {*cli.TASKS, *list_experiments(), PLACEHOLDER}
