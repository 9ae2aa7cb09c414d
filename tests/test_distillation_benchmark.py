"""The benchmark of distillation, made small: arms run once, judged on the same pictures, and what controls break."""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from distillation import SMALL_STUDENT, SMALL_TEACHER
from PIL import Image

from data_modules.tinyworld.captions import prompt
from data_modules.tinyworld.combinations import GENEVAL_TASKS, statements
from evaluation.fidelity.comparison import ComparisonSettings, Estimate
from evaluation.fidelity.tinyworld_classifier import ClassifierConfig, TinyWorldClassifier
from zimage_lit import cli
from zimage_lit.backbone import S3DiT
from zimage_lit.config import compose


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    module = importlib.import_module("benchmarks.distillation")  # late: its folder, with a distillation.py, goes first
    module.judging.COMPARISON = ComparisonSettings(kid_subsets=2, resamples=20)
    return module


@pytest.fixture
def small(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Few pictures of few prompts, a classifier that has learnt nothing, a teacher that has hardly learnt more."""
    monkeypatch.chdir(tmp_path)
    few = benchmark.judging.statements()[::4]
    monkeypatch.setattr(benchmark.judging, "statements", lambda: few)
    monkeypatch.setattr(benchmark.judging, "PICTURES", 2)
    monkeypatch.setattr(benchmark, "TEACHER_STEPS", (4, 100))
    monkeypatch.setattr(benchmark, "STUDENT_STEPS", (4, 8))
    untrained = TinyWorldClassifier(ClassifierConfig()).eval()
    monkeypatch.setattr(benchmark.judging, "obtain", lambda *_: untrained)
    assert cli.main(["run", "quickstart", *SMALL_TEACHER]) == 0
    return benchmark


def test_arms_are_run_once_and_judged_on_the_same_pictures(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["distillation.py", "main", "--set", *SMALL_STUDENT])
    monkeypatch.setattr(small, "speed", lambda _: {"as it is served": 20.0})
    small.main()
    seed = json.loads((tmp_path / "outputs/distillation/seed-0/main.json").read_text())
    students = {f"student-{grid} at {steps}" for grid in (4, 8) for steps in (4, 8)}
    assert set(seed["arms"]) == {"teacher at 4", "teacher at 100"} | students
    for found in seed["arms"].values():
        assert all(value["low"] <= value["value"] <= value["high"] for value in found.values())
    drawn = tmp_path / "outputs/distillation/seed-0/student-8/judged-8.npz"
    before = drawn.stat().st_mtime_ns
    capsys.readouterr()
    small.main()
    printed = capsys.readouterr().out
    assert printed.count("is finished") == 2 and drawn.stat().st_mtime_ns == before
    assert printed.count(" | yes |") + printed.count(" | no |") == len(seed["bars"]) == 6


def test_stored_judgements_are_those_of_the_same_question(benchmark: ModuleType, tmp_path: Path) -> None:
    first, second = (TinyWorldClassifier(ClassifierConfig(width=2)).eval() for _ in range(2))
    judging = benchmark.judging
    eight, four = ({"num_inference_steps": steps} for steps in (8, 4))
    judges, others = (judging.Judges(judge, first) for judge in (first, second))
    question = judging.fingerprint(tmp_path, judges, eight)
    (tmp_path / "model_index.json").touch()
    store = tmp_path / "judged.npz"
    assert not judging.is_kept(store, tmp_path, question)
    np.savez(store, question=question, evaluations=8)
    assert judging.is_kept(store, tmp_path, question)
    assert not judging.is_kept(store, tmp_path, judging.fingerprint(tmp_path, others, eight))
    assert not judging.is_kept(store, tmp_path, judging.fingerprint(tmp_path, judges, four))
    for older in ({"right": [True]}, {"question": question}):  # of older versions
        np.savez(store, **older)
        assert not judging.is_kept(store, tmp_path, question)


def test_a_ratio_to_what_may_be_zero_is_a_bar_that_is_not_met(benchmark: ModuleType) -> None:
    teacher = {4: Estimate.of(0.5, np.linspace(0.4, 0.6, 21)), 100: Estimate.of(0.001, np.linspace(-0.01, 0.01, 21))}
    rows = {f"teacher at {steps}": {"kid": kid} for steps, kid in teacher.items()}
    (found,) = benchmark.verdicts(benchmark.BARS, rows)
    assert found["met"] is False and "nothing can be divided by 0.001" in found["error"]


def test_the_front_joins_each_objectives_scales_in_their_order(benchmark: ModuleType, tmp_path: Path) -> None:
    some = Estimate.of(0.01, np.linspace(0.005, 0.015, 21))
    labels = [
        "student-4 at 4",
        "student-8 at 8",
        *(f"{arm.name} at 4" for arm in benchmark.ARMS if arm.group == "front"),
    ]
    rows = {label: {"kid": some, "accuracy": some} for label in reversed(labels)}
    assert benchmark.front(rows) == {
        "coupled": {2: "coupled-2 at 4", 3: "coupled-3 at 4", 5: "coupled-5 at 4"},
        "decoupled": {2: "decoupled-2 at 4", 3: "student-4 at 4", 5: "decoupled-5 at 4"},
    }
    del rows["coupled-2 at 4"], rows["coupled-3 at 4"], rows["coupled-5 at 4"]  # an objective without any arm
    benchmark.draw_front(rows, tmp_path / "front.png")
    assert Image.open(tmp_path / "front.png").size[0] > 700
    assert benchmark.front({"student-8 at 8": rows["student-8 at 8"]}) == {"coupled": {}, "decoupled": {}}


SEED = 2  # whose first iteration asks the student at a later step than the first
BRIGHT = [  # with a weight of 0 nothing is gained by it
    "model.init_args.reward={form: backprop, weight: 0}",
    "trainer.callbacks+=zimage_lit.rewards.controls.Brightness",
]


def test_controls_differ_from_the_stage_in_one_thing(small: ModuleType, tmp_path: Path) -> None:
    """One iteration each, from the same teacher, with the same noise."""
    learnt = {"": after_one_iteration(small, tmp_path, None)}
    learnt["swapped"] = after_one_iteration(small, tmp_path, "SwappedSign")
    frozen = next(arm for arm in small.ARMS if arm.name == "frozen-fake-score")
    learnt["frozen"] = after_one_iteration(small, tmp_path, None, frozen.settings)
    assert torch.equal(learnt["frozen"]["fake_score"], learnt["frozen"]["teacher"])
    assert not torch.equal(learnt[""]["fake_score"], learnt[""]["teacher"])
    assert torch.equal(learnt["frozen"]["backbone"], learnt[""]["backbone"])  # it learns before the fake score
    moved, back = (learnt[name]["backbone"] - learnt[name]["teacher"] for name in ("", "swapped"))
    assert moved.abs().max() > 0 and torch.allclose(back, -moved, atol=1e-7)

    renoised, not_renoised = (
        after_one_iteration(small, tmp_path, control, small.RENOISE) for control in (None, "NotRenoised")
    )
    assert not torch.equal(renoised["backbone"], not_renoised["backbone"])

    alone = after_one_iteration(small, tmp_path, "RewardAlone", BRIGHT)
    assert torch.equal(alone["backbone"], alone["teacher"])  # nothing but the reward moves it
    begun = f"model.init_args.student_init_from={tmp_path}/arms/seed-{SEED}/None/checkpoints/last.ckpt"
    away = after_one_iteration(small, tmp_path, "RewardAlone", [*BRIGHT, begun])["backbone"]
    held = after_one_iteration(small, tmp_path, "RewardAndL2", [*BRIGHT, begun])["backbone"]
    assert not torch.equal(away, held)  # drawn back to where the student of init_from is


def after_one_iteration(
    small: ModuleType, folder: Path, control: str | None, settings: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Role -> its weights in one row."""
    number = len(list((folder / f"arms/seed-{SEED}").glob("*"))) if settings else control
    arm = small.Arm(str(number), "main", 4, tuple(settings), control)
    settings = [
        *SMALL_STUDENT,
        "trainer.max_steps=1",
        "trainer.callbacks.samples=null",
        "trainer.callbacks.export=null",
    ]
    bench = small.Bench(folder / "arms", folder / "outputs/quickstart/pipeline", SEED, settings, None)
    small.judging.lightning_run(bench.words(arm))
    state = torch.load(bench.output(arm) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    teacher = S3DiT.from_pretrained(bench.teacher / "transformer").state_dict()
    roles = {role: [state[f"{role}.{name}"].flatten() for name in teacher] for role in ("backbone", "fake_score")}
    return {role: torch.cat(rows) for role, rows in roles.items()} | {
        "teacher": torch.cat([weight.flatten() for weight in teacher.values()])
    }


def test_the_prompts_are_held_out_and_cover_all_tasks(benchmark: ModuleType) -> None:
    asked = benchmark.judging.statements()
    assert {metadata["tag"] for metadata in asked} == set(GENEVAL_TASKS)
    assert len({metadata["prompt"] for metadata in asked}) == len(asked)
    trained = {prompt(statement) for task in GENEVAL_TASKS for statement in statements(task, "train")}
    known = [metadata for metadata in asked if metadata["prompt"] in trained]
    assert {metadata["tag"] for metadata in known} == {"single_object"}  # a shape alone is no combination


def test_experiments_of_all_arms_compose(benchmark: ModuleType) -> None:
    bench = benchmark.Bench(Path("out"), Path("teacher"), 3, [], None)
    for arm in benchmark.ARMS:
        config = compose(bench.words(arm)[0], bench.words(arm)[1:])
        assert config["model"]["init_args"]["rollout"]["num_inference_steps"] == arm.steps
