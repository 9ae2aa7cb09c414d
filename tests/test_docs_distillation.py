"""docs/distillation.md as its reader would follow it: the laptop's commands are run, made small, the others checked."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from distillation import SMALL_STUDENT, SMALL_TEACHER
from docs_pages import DOCS, Walk, blocks_of, started_by, tasks_of
from PIL import Image

from evaluation.fidelity.tinyworld_classifier import ClassifierConfig, TinyWorldClassifier
from zimage_lit import cli
from zimage_lit.callbacks import distribution_score
from zimage_lit.config import list_experiments
from zimage_lit.pipeline import ZImagePipeline

PAGE = "distillation.md"
FIDELITY = "trainer.callbacks.fidelity.init_args"
CURVES = "trainer.logger={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: outputs/curves}}"
SMALL = {
    "quickstart": SMALL_TEACHER,
    "tiny/dmdr": [
        *SMALL_STUDENT,
        CURVES,
        "trainer.log_every_n_steps=1",
        "trainer.callbacks.score=null",
        f"{FIDELITY}.num_prompts=4",
        f"{FIDELITY}.pictures_per_prompt=2",
        f"{FIDELITY}.comparison={{kid_subsets: 2, directions: 4, resamples: 2}}",
        f"{FIDELITY}.at_start=false",
    ],
    "generate": ["device=cpu"],
}


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The page followed from its first block to its last, with a classifier that has learnt nothing."""
    walk = Walk(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("docs-distillation"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        classifier = TinyWorldClassifier(ClassifierConfig(width=8)).requires_grad_(False).eval()
        patch.setattr(distribution_score, "obtain", lambda _: classifier)
        for language, content in blocks_of(PAGE):
            walk.follow(language, content)
        yield walk


def test_every_command_is_followed_and_those_of_the_laptop_are_run(walk: Walk) -> None:
    assert walk.count() == started_by(PAGE) and tasks_of(PAGE) <= {*cli.TASKS, *list_experiments()}
    assert [command.split()[2] for command in walk.ran] == ["quickstart", "tiny/dmdr", "generate"]


def test_the_table_names_experiments_that_there_are() -> None:
    named = re.findall(r"`lightning run (\S+)`", (DOCS / PAGE).read_text(encoding="utf-8"))
    assert len(named) >= 4 and set(named) <= set(list_experiments())


def test_the_student_is_drawn_at_each_number_of_steps_and_exported_as_it_was_trained(walk: Walk) -> None:
    width, height = Image.open("outputs/tiny/dmdr/samples/step-00000002.png").size
    assert height > 4 * 64 > width  # one prompt at small size: a column of 1, 2, 4 and 8 steps
    defaults = ZImagePipeline.from_pretrained("outputs/tiny/dmdr/pipeline", device="cpu").defaults
    assert (defaults.num_inference_steps, defaults.shift, defaults.solver, defaults.guidance_scale) == (
        8,
        6,
        "euler",
        1,
    )


def test_the_curves_of_the_page_are_logged(walk: Walk) -> None:
    named = set(re.findall(r"`((?:train|fidelity)/\w+)`", (DOCS / PAGE).read_text(encoding="utf-8")))
    (curves,) = Path("outputs/curves").rglob("metrics.csv")
    assert len(named) >= 5 and named <= set(next(csv.reader(curves.open(encoding="utf-8"))))
