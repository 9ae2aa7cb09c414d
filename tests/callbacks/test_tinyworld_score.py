"""Scores and grids at several sizes: what is drawn where, and that the parts add up to the whole."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_modules.tinyworld.combinations import TASKS
from data_modules.tinyworld.world import draw
from zimage_lit.callbacks import sample_grid, tinyworld_score
from zimage_lit.callbacks.sample_grid import SampleGrid
from zimage_lit.callbacks.sampling import SamplingSettings, draw_pictures
from zimage_lit.callbacks.tinyworld_score import TinyWorldScore
from zimage_lit.errors import UserError

CANVASES = [(48, 48), (96, 64)]


class Notebook:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.images: dict[str, Image.Image] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics |= metrics

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        self.images[name] = image


def trainer_in(folder: Path, first: bool = True) -> Any:
    return SimpleNamespace(
        global_step=7, default_root_dir=str(folder), loggers=[Notebook()], is_global_zero=first, strategy=None
    )


def true_pictures(wrong_size: tuple[int, int] | None = None) -> Any:
    """Stands for the network: draws what is asked, except at one size, where it draws nothing."""

    def pictures(trainer: Any, module: Any, settings: Any, prompts: list[str], seeds: list[int], sizes: Any) -> list:
        assert len(prompts) == len(seeds) == len(set(seeds)) == len(sizes)
        found = []
        for prompt, size in zip(prompts, sizes, strict=True):
            sample = next(
                sample
                for task in TASKS
                for index in range(400)
                if (sample := draw(index, split="heldout", task=task, size=size)).metadata["prompt"] == prompt
            )
            blank = np.full_like(sample.image, 24)
            found.append(Image.fromarray(blank if size == wrong_size else sample.image))
        return found

    return pictures


def test_each_canvas_has_its_own_score_and_all_together_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyworld_score, "draw_pictures", true_pictures(wrong_size=(96, 64)))
    trainer = trainer_in(tmp_path)
    score = TinyWorldScore(prompts_per_task=2, canvases=CANVASES)
    score.look(trainer, None)  # type: ignore[arg-type]
    written = json.loads((tmp_path / "scores/step-00000007.json").read_text())
    assert {name: part["overall"]["accuracy"] for name, part in written["canvases"].items()} == {"48x48": 1, "96x64": 0}
    assert written["overall"]["accuracy"] == 0.5 and written["tasks"]["counting"]["n"] == 4
    assert [record["canvas"] for record in written["records"]] == ["48x48"] * 14 + ["96x64"] * 14
    logged = trainer.loggers[0].metrics
    assert logged["tinyworld/overall_48x48"] == 1 and logged["tinyworld/overall_96x64"] == 0
    assert logged["tinyworld/overall"] == logged["tinyworld/word"] == 0.5


def test_one_canvas_is_scored_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyworld_score, "draw_pictures", true_pictures())
    trainer = trainer_in(tmp_path)
    TinyWorldScore(prompts_per_task=1).look(trainer, None)  # type: ignore[arg-type]
    written = json.loads((tmp_path / "scores/step-00000007.json").read_text())
    assert "canvases" not in written and written["overall"]["accuracy"] == 1
    assert not [name for name in trainer.loggers[0].metrics if "x" in name.rpartition("_")[2]]


def test_the_first_score_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyworld_score, "draw_pictures", true_pictures())
    trainer = trainer_in(tmp_path)
    trainer.global_step = 0
    for at_start in (False, True):
        score = TinyWorldScore(prompts_per_task=1, at_start=at_start, every_n_steps=5)
        score.on_train_start(trainer, None)  # type: ignore[arg-type]
        score.on_train_batch_end(trainer, None)  # type: ignore[arg-type]  # gradients are still being accumulated
        assert len(score.history) == at_start


def test_the_grid_takes_its_canvases_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def pictures(*arguments: Any) -> list[Image.Image]:
        asked.append(arguments)
        return [Image.new("RGB", size) for size in arguments[-1]]

    monkeypatch.setattr(sample_grid, "draw_pictures", pictures)
    trainer = trainer_in(tmp_path)
    SampleGrid(["a", "b", "c"], canvases=CANVASES).look(trainer, None)  # type: ignore[arg-type]
    assert [image.size for image in trainer.loggers[0].images.values()] == [(48, 48), (96, 64), (48, 48)]
    assert (tmp_path / "samples/step-00000007.png").is_file()
    SampleGrid(["a"], sampling=SamplingSettings(height=32, width=80)).look(trainer, None)  # type: ignore[arg-type]
    assert asked[-1][-1] == [(80, 32)]


def test_the_grid_has_a_row_for_each_number_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pictures(_: Any, __: Any, sampling: SamplingSettings, prompts: list[str], *rest: Any) -> list[Image.Image]:
        return [Image.new("RGB", (sampling.num_inference_steps, 8)) for _ in prompts]

    monkeypatch.setattr(sample_grid, "draw_pictures", pictures)
    trainer = trainer_in(tmp_path)
    grid = SampleGrid(["a", "b"], step_counts=[1, 4], sampling=SamplingSettings(num_inference_steps=8))
    grid.look(trainer, None)  # type: ignore[arg-type]
    assert {name: image.width for name, image in trainer.loggers[0].images.items()} == {
        "samples/prompt_00/1_steps": 1,
        "samples/prompt_01/1_steps": 1,
        "samples/prompt_00/4_steps": 4,
        "samples/prompt_01/4_steps": 4,
    }
    for wrong in ([], [0]):
        with pytest.raises(UserError, match="SampleGrid: step_counts"):
            SampleGrid(["a"], step_counts=wrong)


def test_pictures_of_several_sizes_come_back_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipeline:
        def __call__(
            self, prompts: list[str], height: int, width: int, seed: list[int], draw: list[int], **_: Any
        ) -> Any:
            return [(prompt, width, height, *own) for prompt, *own in zip(prompts, seed, draw, strict=True)]

    monkeypatch.setattr("zimage_lit.callbacks.sampling.stage_pipeline", lambda *_: Pipeline())
    module: Any = SimpleNamespace(training=False, eval=lambda: None, train=lambda mode: None)
    trainer: Any = SimpleNamespace(callbacks=[], precision_plugin=SimpleNamespace(forward_context=nullcontext))
    sizes = [(48, 48), (96, 64), (48, 48)]
    found = draw_pictures(trainer, module, SamplingSettings(), ["a", "b", "c"], [1, 2, 3], sizes, draws=[0, 1, 2])
    assert found == [("a", 48, 48, 1, 0), ("b", 96, 64, 2, 1), ("c", 48, 48, 3, 2)]
    assert draw_pictures(trainer, module, SamplingSettings(), ["a"], [5]) == [("a", 64, 64, 5, 0)]


@pytest.mark.parametrize("canvases", [[], [(64,)], [(64, 0)]])
def test_canvases_that_are_no_sizes_are_refused(canvases: Any) -> None:
    with pytest.raises(UserError, match=r"SampleGrid: canvases is .*give a list of"):
        SampleGrid(["a"], canvases=canvases)
    with pytest.raises(UserError, match="TinyWorldScore: canvases"):
        TinyWorldScore(canvases=canvases)
