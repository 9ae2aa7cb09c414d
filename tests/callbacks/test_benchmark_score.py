"""A benchmark's slice in training: what is drawn, judged, logged and kept."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_judges
import numpy as np
import pytest
from benchmark_files import official
from jsonargparse import ArgumentParser
from lightning import Callback
from PIL import Image

from data_modules.tinyworld.combinations import TASKS
from data_modules.tinyworld.world import draw
from evaluation.benchmarks import oneig, tinyworld
from evaluation.benchmarks.protocol import Judged, Question
from evaluation.judges.contract import Asked
from zimage_lit.callbacks import benchmark_score
from zimage_lit.callbacks.benchmark_score import BenchmarkScore
from zimage_lit.callbacks.sampling import SamplingSettings
from zimage_lit.config import compose
from zimage_lit.errors import UserError
from zimage_lit.validate import check_config

JUDGE = "fake_judges.FakeJudge"


class Notebook:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.tables: dict[str, dict[str, Any]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics |= metrics

    def log_table(self, columns: dict[str, Any], path: str) -> None:
        self.tables[path] = columns


def trainer_in(folder: Path, first: bool = True) -> Any:
    return SimpleNamespace(
        global_step=7, default_root_dir=str(folder), loggers=[Notebook()], is_global_zero=first, strategy=None
    )


def true_picture(prompt: str) -> Image.Image:
    samples = (draw(index, split="heldout", task=task) for task in TASKS for index in range(400))
    return Image.fromarray(next(sample.image for sample in samples if sample.metadata["prompt"] == prompt))


def test_true_pictures_of_a_slice_are_right_and_blank_ones_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def pictures(trainer: Any, module: Any, settings: Any, prompts: list[str], seeds: list[int], **more: Any) -> list:
        asked.update(prompts=prompts, seeds=seeds, **more)
        return [true_picture(prompt) if "word" not in prompt else Image.new("RGB", (64, 64)) for prompt in prompts]

    monkeypatch.setattr(benchmark_score, "draw_pictures", pictures)
    trainer, score = trainer_in(tmp_path), BenchmarkScore("tinyworld", prompts=2)
    score.look(trainer, None)  # type: ignore[arg-type]
    score.look(trainer, None)  # type: ignore[arg-type]  # the same step again
    planned = tinyworld.plan([prompt for prompt in tinyworld.prompts() if prompt["index"] % 50 < 2])
    assert asked == {
        "prompts": [image.prompt for image in planned],
        "seeds": [image.seed for image in planned],
        "draws": [0] * 14,
    }
    logged = trainer.loggers[0].metrics
    assert logged["tinyworld-en/overall"] == 1 and logged["tinyworld-en/word"] == 0
    assert logged["tinyworld-en/counting"] == 1
    table = trainer.loggers[0].tables["scores/tinyworld-en-step-00000007.json"]
    assert table["score"] == [1.0] * 12 + [0.0] * 2 and table["group"][-1] == "word"
    written = json.loads((tmp_path / "scores/tinyworld-en-step-00000007.json").read_text())
    assert written["overall"] == 1 and len(written["verdicts"]) == 14
    assert written["judges"]["verifier"]["judge"] == "TinyWorldVerifier"
    assert [told["step"] for told in score.history] == [7]
    again = BenchmarkScore("tinyworld")
    again.load_state_dict(json.loads(json.dumps(score.state_dict())))
    assert again.history == json.loads(json.dumps(score.history))


def test_several_pictures_and_judges_score_as_the_benchmark_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = official("oneig").parent
    drawn: list[Image.Image] = []

    def pictures(trainer: Any, module: Any, settings: Any, prompts: list[str], seeds: list[int], **more: Any) -> list:
        drawn.extend(Image.fromarray(np.full((4, 4, 3), number, np.uint8)) for number in range(len(prompts)))
        return drawn

    monkeypatch.setattr(benchmark_score, "draw_pictures", pictures)
    roles = {role: {"class_path": JUDGE, "init_args": {"role": role}} for role in ("vlm", "distance")}
    trainer = trainer_in(tmp_path)
    score = BenchmarkScore("oneig", str(data), images_per_prompt=3, judges=roles, sampling=SamplingSettings())
    score.look(trainer, None)  # type: ignore[arg-type]
    expected = []
    for place, prompt in enumerate(score.prompts):
        own = drawn[3 * place : 3 * place + 3]
        said = [
            answered(question, own) for question in oneig.questions(prompt, 3) if question.role in ("vlm", "distance")
        ]
        expected += oneig.records(prompt, said, {})
    scores = oneig.score(expected)["scores"]
    assert scores.keys() == {"alignment", "text", "diversity"}
    assert trainer.loggers[0].metrics == {f"oneig-en/{name}": one["score"] for name, one in scores.items()}


def answered(question: Question, pictures: list[Image.Image]) -> Judged:
    asked = Asked(tuple(pictures[place] for place in question.pictures), question.question)
    return Judged(question, fake_judges.FakeJudge(question.role).answer(asked))


def test_other_processes_draw_nothing_and_log_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_score, "draw_pictures", lambda *_, **__: pytest.fail("drawn"))
    trainer = trainer_in(tmp_path, first=False)
    BenchmarkScore("tinyworld").look(trainer, None)  # type: ignore[arg-type]
    assert not trainer.loggers[0].metrics and not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"benchmark": "tinywurld"}, "benchmark=tinywurld: there is none .did you mean 'tinyworld'"),
        ({"benchmark": "all"}, "benchmark names one"),
        ({"benchmark": "tinyworld", "prompts": 0}, "BenchmarkScore: prompts must be at least 1"),
        ({"benchmark": "tinyworld", "judges": {"ocr": {}}}, "judges.ocr has no effect"),
        ({"benchmark": "geneval"}, "GenEval reads its official files from data="),
        ({"benchmark": "tinyworld", "images_per_prompt": 2}, "images_per_prompt=2 has no effect"),
    ],
)
def test_wrong_settings_show_before_training(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BenchmarkScore(**arguments)


def test_an_experiment_names_it_with_its_judges(tmp_path: Path) -> None:
    """As a person writes it: composed, checked and built as the command does, short of training."""
    (tmp_path / "scored.yaml").write_text(
        """
        defaults: [quickstart]
        trainer:
          callbacks:
            benchmark:
              class_path: zimage_lit.callbacks.benchmark_score.BenchmarkScore
              init_args:
                benchmark: tinyworld
                prompts: 2
                judges: {verifier: {class_path: evaluation.judges.tinyworld.TinyWorldVerifier}}
        """
    )
    config = compose(str(tmp_path / "scored.yaml"))
    check_config(config)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    component = config["trainer"]["callbacks"]["benchmark"]
    built = parser.instantiate(parser.parse_object({"callback": component})).callback
    assert isinstance(built, BenchmarkScore) and len(built.prompts) == 14
    assert type(built.judges["verifier"]).__name__ == "TinyWorldVerifier"
