"""The benchmark of the curriculum, made small: equal compute, one command to continue, a bootstrap that pairs."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from data_modules.tinyworld.combinations import TASKS
from data_modules.tinyworld.world import heldout_prompts
from zimage_lit import cli

SMALL = [
    "--scale=0.004",
    "model.init_args.backbone={preset: tiny, dim: 64, n_layers: 1, n_heads: 2, n_kv_heads: 2, pad_multiple: 8}",
    "model.init_args.optimizer.name=adamw",
    "trainer.accelerator=cpu",
    "trainer.logger=false",
    "trainer.enable_progress_bar=false",
    "trainer.callbacks.samples=null",
    "trainer.callbacks.export=null",
    "trainer.callbacks.score.init_args.prompts_per_task=1",
    "trainer.callbacks.report=null",
    "data.init_args.num_samples=80",
    "data.init_args.num_val_samples=4",
    "data.init_args.batch_size=8",
]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return importlib.import_module("benchmarks.curriculum")


def test_arms_are_run_once_with_equal_compute_and_end_in_tables(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["curriculum.py", *SMALL])
    monkeypatch.setattr(benchmark, "BATCHES_COUNTED", 4)
    monkeypatch.setattr(cli, "TASKS", {name: task for name, task in cli.TASKS.items() if name != "merge"})
    arms = [arm for arm in benchmark.ARMS if not arm.name.startswith("sft-")]  # without the variants to be merged
    monkeypatch.setattr(benchmark, "ARMS", arms)
    benchmark.main()
    found = json.loads((tmp_path / "outputs/curriculum/curriculum.json").read_text())
    (seed,) = found["seeds"]
    assert [row["each"] for row in found["together"]] == [[row["difference"]] for row in seed["differences"]]
    arms = {row["arm"]: row for row in seed["arms"]}
    assert list(arms) == [arm.name for arm in benchmark.ARMS]
    for stage, control in benchmark.QUESTIONS:
        step = arms[control]["flops"] / arms[control]["steps"]
        assert abs(arms[stage]["flops"] - arms[control]["flops"]) <= step / 2
    assert arms["low-res-longer"]["steps"] > arms["omni"]["steps"]  # its steps are smaller
    assert [(row["stage"], row["control"]) for row in seed["differences"]] == list(benchmark.QUESTIONS)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["curriculum.py", *SMALL[:1], "--without", "low-res-longer", "--", *SMALL[1:]])
    benchmark.main()
    told = capsys.readouterr().out
    assert told.count("is finished") == len(benchmark.ARMS) - 1 and "low-res-longer" not in told


def test_the_control_differs_in_its_data_alone(benchmark: ModuleType) -> None:
    bench = benchmark.Bench(Path("out"), 3)
    bench.steps = dict.fromkeys((arm.name for arm in benchmark.ARMS), 5)
    for stage, control in benchmark.QUESTIONS:
        one, other = (
            benchmark.compose(arm.experiment, bench.words(arm)[1:])
            for name in (stage, control)
            for arm in benchmark.ARMS
            if arm.name == name
        )
        assert one["data"] != other["data"]
        for config in (one, other):
            del config["data"], config["run"], config["trainer"]["logger"]
            for part in ("codec", "text_encoder"):  # where the same part lies
                assert config["model"]["init_args"][part]["init_args"].pop("folder").startswith("data/tinyworld-")
        assert one == other


def pictures(correct: dict[str, list[bool]]) -> list[dict]:
    return [
        {"metadata": metadata, "canvas": "64x64", "correct": correct[metadata["tag"]][place % 6]}
        for place, metadata in enumerate(heldout_prompts(6))
    ]


def test_the_bootstrap_pairs_pictures_and_means_tasks(benchmark: ModuleType) -> None:
    half = [True, False] * 3
    better = pictures({task: [True] * 6 if task == "position" else half for task in TASKS})
    plain = pictures(dict.fromkeys(TASKS, half))
    difference, low, high = benchmark.paired_bootstrap(better, plain, "overall")
    assert difference == pytest.approx(0.5 / 6) and 0 < low < difference < high < 1 / 6 + 1e-9
    assert benchmark.paired_bootstrap(plain, plain, "overall") == (0, 0, 0)  # what is alike has no spread
    found = benchmark.accuracies(better)
    assert found["overall"] == pytest.approx((5 * 0.5 + 1) / 6) and found["skills"] == 0.5
    only = [record for record in better if record["metadata"]["tag"] in benchmark.SKILLS]
    assert np.isclose(benchmark.accuracies(only)["skills"], 0.5) and "overall" not in benchmark.accuracies(only)


def test_several_seeds_are_compared_as_one(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    half, all_right = [True, False] * 3, [True] * 6
    plain = pictures(dict.fromkeys(TASKS, half))
    better = pictures({task: all_right if task == "position" else half for task in TASKS})
    best = pictures({task: all_right if task in ("position", "colors") else half for task in TASKS})
    seeds = [[benchmark.Comparison("sft", "control", "overall", drawn, plain)] for drawn in (better, best)]
    (row,) = benchmark.report_together(seeds)
    assert row["each"] == pytest.approx([0.5 / 6, 1 / 6]) and row["difference"] == pytest.approx(0.75 / 6)
    low, high = row["by_prompt"]
    assert 0 < low < row["difference"] < high
    low, high = row["by_seed"]  # two runs, 1 degree of freedom
    assert (high - low) / 2 == pytest.approx(12.706 * (0.5 / 6) / 2, rel=1e-3)
    assert "| sft - control | overall | +0.125 |" in capsys.readouterr().out
