"""The benchmark of alignment: its arms are valid runs, and its controls break the one thing that they are for."""

import importlib
import math
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from data_modules.tinyworld.world import draw
from evaluation.fidelity.comparison import Estimate
from zimage_lit import cli
from zimage_lit.config import compose, parse_overrides, settings_from
from zimage_lit.pairs.task import PairsSettings
from zimage_lit.stages import DPOModule
from zimage_lit.validate import check_config


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return importlib.import_module("benchmarks.alignment")  # late: its folder, with a distillation.py, goes first


@pytest.fixture
def bench(benchmark: ModuleType, tmp_path: Path) -> Any:
    return benchmark.Bench(tmp_path, tmp_path / "base", 3, [], None)


def test_all_arms_are_valid_runs(benchmark: ModuleType, bench: Any) -> None:
    for arm in benchmark.ARMS:
        words = bench.words(arm)
        config = compose(words[0], words[1:])
        check_config(config)
        assert config["trainer"]["max_steps"] >= 1 and config["run"]["output_dir"].endswith(f"seed-3/{arm.name}")
    served = compose(*split(bench.words(next(arm for arm in benchmark.ARMS if arm.experiment == benchmark.GRPO))))
    assert {name: served["model"]["init_args"]["rollout"][name] for name in benchmark.SERVED} == benchmark.SERVED


def split(words: list[str]) -> tuple[str, list[str]]:
    return words[0], words[1:]


def test_pairs_are_asked_for_as_the_task_takes_it(
    benchmark: ModuleType, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(benchmark, "lightning_run", asked.append)
    bench.make_pairs()
    (words,) = asked
    assert words[0] == "pairs" and words[0] in cli.TASKS
    settings = settings_from(PairsSettings, parse_overrides(words[1:]))
    assert settings.rules.objective == "tinyworld_all" and settings.guidance_scale == 1


def test_a_shuffled_reward_gives_as_much_to_others(benchmark: ModuleType) -> None:
    controls = importlib.import_module("alignment_controls")
    samples = [draw(number, 0, "train") for number in range(12)]
    wrong = [draw(number + 100, 0, "train").image for number in range(6)]
    pictures = [torch.from_numpy(s.image).permute(2, 0, 1) for s in samples[:6]]
    pictures += [torch.from_numpy(image).permute(2, 0, 1) for image in wrong]
    known = [sample.metadata for sample in samples]
    prompts = [metadata["prompt"] for metadata in known]
    honest = controls.TinyWorldReward(aspect="all").score(pictures, prompts, known)
    reward = controls.ShuffledReward(aspect="all")
    dealt = reward.score(pictures, prompts, known)
    assert Counter(dealt.tolist()) == Counter(honest.tolist()) and not torch.equal(dealt, honest)
    assert torch.equal(dealt, reward.score(pictures, prompts, known))


def test_random_labels_swap_about_half_of_the_pairs_always_the_same(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    controls = importlib.import_module("alignment_controls")
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(DPOModule, "training_step", lambda self, batch, number: seen.append(batch))
    module = controls.RandomLabels.__new__(controls.RandomLabels)
    torch.nn.Module.__init__(module)
    module.seed = 0
    pairs = {"ids": [str(n) for n in range(200)], "winners": list(range(200)), "losers": list(range(200, 400))}
    for _ in range(2):
        module.training_step(pairs, 0)
    first, second = seen
    swapped = sum(winner >= 200 for winner in first["winners"])
    assert first == second and 70 < swapped < 130
    assert all(abs(a - b) == 200 for a, b in zip(first["winners"], first["losers"], strict=True))
    assert pairs["winners"] == list(range(200))


def test_methods_are_compared_at_as_many_steps_and_after_as_long(benchmark: ModuleType) -> None:
    points = [(step, 10.0 * step, float(step)) for step in range(11)]
    assert benchmark.mean_until(points, 0, 4, count=2) == 3.5
    assert benchmark.mean_until(points, 1, 45.0, count=2) == 3.5
    assert math.isnan(benchmark.mean_until(points, 0, -1))


def test_seconds_are_those_of_work(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"rollout": 2.0, "reward": 0.5, "update": 1.5}
    logged = {f"time/{part}_seconds": [(1, seconds), (3, 2 * seconds)] for part, seconds in spent.items()}
    logged["reward/tinyworld_all"] = [(1, 0.5), (3, 0.7)]
    monkeypatch.setattr(benchmark, "curve", lambda output, metric: logged[metric])
    assert benchmark.rewards_over_time(Path()) == [(1, 8.0, 0.5), (3, 24.0, 0.7)]


def test_bars_are_of_differences_to_the_base(benchmark: ModuleType) -> None:
    flat = [0.0] * 21
    rows = {
        name: {metric: Estimate.of(value, torch.tensor(flat).numpy() + value) for metric in ("accuracy", "gold")}
        for name, value in {"base": 0.5, "grpo": 0.75, "shuffled-reward": 0.55}.items()
    }
    found = {row["bar"]: row for row in benchmark.verdicts(benchmark.BARS, rows)}
    assert found["accuracy, grpo less base"]["met"] and found["accuracy, grpo less base"]["value"] == pytest.approx(
        0.25
    )
    assert not found["accuracy moved by a shuffled reward"]["met"]


def test_the_score_of_one_task_has_an_interval(benchmark: ModuleType) -> None:
    judging = benchmark.judging
    tags = np.array([metadata["tag"] for metadata in judging.asked()])
    right = (tags == "counting") & (np.arange(len(tags)) % 2 == 0)
    counting, everything = judging.overall(right, ["counting"]), judging.overall(right)
    assert counting.value == pytest.approx(0.5) and not np.isnan([counting.low, counting.high]).any()
    assert everything.value == pytest.approx(0.5 / len(judging.GENEVAL_TASKS))
