"""The distribution score: what is drawn and compared, that good and bad networks are told apart, what is written."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_modules.tinyworld import verifier
from data_modules.tinyworld.combinations import is_heldout
from data_modules.tinyworld.world import draw, draw_statement
from evaluation.fidelity.comparison import METRICS, ComparisonSettings, Estimate
from evaluation.fidelity.tinyworld_classifier import ClassifierConfig, TinyWorldClassifier, as_input
from zimage_lit.callbacks import distribution_score
from zimage_lit.callbacks.distribution_score import DistributionScore
from zimage_lit.callbacks.sampling import SamplingSettings
from zimage_lit.errors import UserError

COMPARISON = ComparisonSettings(kid_subsets=5, directions=16, resamples=20)


class Notebook:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics |= metrics


class HalvingCodec:
    """Stands for a codec: pictures come back with half of their contrast."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / 2


class SameCodec(HalvingCodec):
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def trainer_in(folder: Path, step: int = 7, first: bool = True) -> Any:
    return SimpleNamespace(
        global_step=step,
        default_root_dir=str(folder),
        loggers=[Notebook()],
        is_global_zero=first,
        strategy=None,
        datamodule=SimpleNamespace(data_dir=str(folder / "data")),
    )


def stage(codec: HalvingCodec | None = None) -> Any:
    return SimpleNamespace(codec=codec or SameCodec())


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A classifier that has learnt nothing, whose features still tell pictures apart; and where it was asked for."""
    asked: list[Path] = []

    def obtain(folder: Path) -> TinyWorldClassifier:
        asked.append(folder)
        torch.manual_seed(0)
        classifier = TinyWorldClassifier(ClassifierConfig(width=8)).requires_grad_(False).eval()
        features = classifier.scores(as_input([draw(i).image for i in range(64)]))[3]
        classifier.feature_mean.copy_(features.mean(0))
        classifier.feature_scale.copy_(features.std(0))
        return classifier

    monkeypatch.setattr(distribution_score, "obtain", obtain)
    return asked


def score_with(**changes: Any) -> DistributionScore:
    settings: dict[str, Any] = {"num_prompts": 12, "pictures_per_prompt": 3, "comparison": COMPARISON}
    return DistributionScore(**{**settings, **changes})


def network(
    score: DistributionScore, monkeypatch: pytest.MonkeyPatch, repeats: bool = False, blind: bool = False
) -> list[Any]:
    """Stands for the network: draws new true pictures, or the same one for a prompt, or one colour. Returns calls."""
    calls: list[Any] = []

    def pictures(trainer: Any, module: Any, settings: SamplingSettings, prompts: list[str], seeds: list[int]) -> list:
        calls.append((settings, prompts, seeds))
        shown = [score.statements[number] for number in score.numbers()]
        assert [statement["prompt"] for statement in shown] == prompts
        drawn = [
            draw_statement(statement, 0 if repeats else 100 + place, size=score.size).image
            for place, statement in enumerate(shown)
        ]
        return [Image.fromarray(np.full_like(image, 128) if blind else image) for image in drawn]

    monkeypatch.setattr(distribution_score, "draw_pictures", pictures)
    return calls


def scored(score: DistributionScore, folder: Path, codec: HalvingCodec | None = None) -> dict[str, float]:
    trainer = trainer_in(folder)
    score.setup(trainer, stage(codec), "fit")
    score.look(trainer, stage(codec))
    return trainer.loggers[0].metrics


def test_a_perfect_network_scores_as_real_pictures_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = score_with(num_prompts=40)
    network(score, monkeypatch)
    logged = scored(score, tmp_path)
    assert set(logged) == {f"fidelity/{name}{end}" for name in METRICS for end in ("", "_floor")} | {
        "fidelity/accuracy"
    }
    for name, floor in score.floor.items():
        half = max(floor.high - floor.low, 0.05)
        assert abs(logged[f"fidelity/{name}"] - logged[f"fidelity/{name}_floor"]) < half, name


def test_bad_networks_score_worse_each_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = score_with()
    network(score, monkeypatch, repeats=True)
    same = scored(score, tmp_path / "same")
    assert same["fidelity/diversity"] == 0 and 0.8 < same["fidelity/diversity_floor"] < 1.25
    score = score_with()
    network(score, monkeypatch, blind=True)
    grey = scored(score, tmp_path / "grey")
    assert grey["fidelity/precision"] == 0
    for name in ("kid", "fd", "sliced_wasserstein"):
        assert grey[f"fidelity/{name}"] > 3 * abs(grey[f"fidelity/{name}_floor"]), name


def test_each_step_count_is_drawn_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingSettings(num_inference_steps=8, guidance_scale=1.0)
    score = score_with(sampling=sampling, step_counts=[4, 1])
    calls = network(score, monkeypatch)
    logged = scored(score, tmp_path)
    assert [(settings.num_inference_steps, settings.guidance_scale) for settings, _, _ in calls] == [
        (1, 1.0),
        (4, 1.0),
        (8, 1.0),
    ]
    assert all(prompts == calls[0][1] and seeds == calls[0][2] for _, prompts, seeds in calls)
    assert len(set(calls[0][2])) == len(calls[0][1]) == 36
    assert {"fidelity/kid", "fidelity/kid_1_steps", "fidelity/kid_4_steps"} <= set(logged)
    written = json.loads((tmp_path / "fidelity/step-00000007.json").read_text())
    assert list(written["scores"]) == ["1", "4", "8"] and set(written["scores"]["8"]) == {*METRICS, "accuracy"}
    kid = Estimate.from_dict(written["scores"]["8"]["kid"])
    assert kid.value == logged["fidelity/kid"] and kid.low < kid.value < kid.high and len(kid.replicates) == 20
    assert written["num_prompts"] == 12 and written["pictures_per_prompt"] == 3 and written["step"] == 7
    assert len(written["classifier"]["fingerprint"]) == 64 and set(written["floor"]) == set(METRICS)


def test_real_pictures_go_through_the_codec_unless_as_rendered(tmp_path: Path) -> None:
    score = score_with()
    samples = [draw_statement(statement, i, 2000).image for statement in score.statements for i in range(3)]
    rendered = as_input(samples)
    found = score.real_images(0, stage(HalvingCodec()))
    assert torch.allclose(found, rendered / 2, atol=1 / 127.5)
    levels = (found + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-3)  # as pictures of whole levels are
    assert torch.equal(score_with(real="rendered").real_images(0, stage(HalvingCodec())), rendered)
    assert not torch.equal(score.real_images(3, stage()), score.real_images(0, stage()))


def test_accuracy_is_the_share_of_pictures_that_show_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by the verifier in the classifier's place, a few pictures at a time."""

    def verified(images: torch.Tensor, asked: list[Any]) -> list[Any]:
        arrays = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        return [verifier.judge(array, metadata) for array, metadata in zip(arrays, asked, strict=True)]

    monkeypatch.setattr(distribution_score, "judge", verified)
    monkeypatch.setattr(distribution_score, "BATCH", 5)
    score = score_with(num_prompts=40)
    score.classifier = lambda images: images  # type: ignore[assignment]
    images = score.real_images(0, stage())
    assert score.right(images).shape == (120,) and score.right(images).mean() > 0.98
    images[:30] = -1
    assert not score.right(images)[:30].any() and score.right(images)[30:].mean() > 0.98
    assert {"word"} < {statement["tag"] for statement in score.statements}


def test_prompts_are_of_the_split_and_the_same_every_time() -> None:
    first, again = score_with(), score_with()
    assert first.statements == again.statements != score_with(seed=1).statements
    assert not any(is_heldout(statement) for statement in first.statements)
    heldout = score_with(split="heldout", sampling=SamplingSettings(width=96, height=48))
    assert any(is_heldout(statement) for statement in heldout.statements) and heldout.size == (96, 48)


def test_it_scores_when_it_should_and_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = score_with(every_n_steps=5)
    network(score, monkeypatch)
    trainer = trainer_in(tmp_path, step=0)
    score.setup(trainer, stage(), "fit")
    score.on_train_start(trainer, stage())
    for step in (0, 4, 5, 9, 10):
        trainer.global_step = step
        score.on_train_batch_end(trainer, stage())
    score.on_train_end(trainer, stage())
    assert [entry["step"] for entry in score.history] == [0, 5, 10]
    resumed = score_with(at_start=False)
    resumed.load_state_dict(score.state_dict())
    calls = network(resumed, monkeypatch)
    resumed.on_train_end(trainer, stage())  # scored before the run was interrupted
    trainer.global_step = 0
    score_with(at_start=False).on_train_start(trainer, stage())
    assert not calls


def test_the_same_weights_have_the_same_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in "ab":
        score = score_with()
        network(score, monkeypatch)
        scored(score, tmp_path / name)
        found.append((tmp_path / name / "fidelity/step-00000007.json").read_text())
    assert found[0] == found[1]


def test_other_processes_leave_it_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: list[Path]
) -> None:
    score = score_with()
    calls = network(score, monkeypatch)
    trainer = trainer_in(tmp_path, first=False)
    score.setup(trainer, stage(), "fit")
    score.look(trainer, stage())
    assert not calls and not folders and not (tmp_path / "fidelity").exists()


def test_the_classifier_lies_beside_the_data_or_where_it_is_named(tmp_path: Path, folders: list[Path]) -> None:
    trainer = trainer_in(tmp_path)
    score_with().setup(trainer, stage(), "fit")
    score_with(classifier=str(tmp_path / "mine")).setup(trainer, stage(), "fit")
    assert folders == [tmp_path / "data/classifier", tmp_path / "mine"]
    for data_dir in ("s3://bucket/tinyworld", None):
        trainer.datamodule = SimpleNamespace(data_dir=data_dir)
        with pytest.raises(UserError, match="no folder for its classifier"):
            score_with().setup(trainer, stage(), "fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prompts": 1}, "num_prompts, which is 1"),
        ({"pictures_per_prompt": 1}, "pictures_per_prompt, which is 1"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"sampling": SamplingSettings(width=40)}, "width, height.*draws no picture of 40x64"),
        ({"step_counts": [0]}, "num_inference_steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_with(**settings)
