"""`lightning run merge`: mixes against arithmetic by hand, sweeps against a scorer whose best mix is known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from variants import PROMPTS, Nearest, backbone, write_pipeline, write_run

from zimage_lit import cli
from zimage_lit.backbone import S3DiT
from zimage_lit.errors import UserError
from zimage_lit.merge import MergeSettings, grid, merge_task, mixes_of, simplex, tinyworld
from zimage_lit.pipeline import ZImagePipeline, load_pipeline

QUIET: dict[str, Any] = {"experiment_name": None, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pipelines and a run."""
    root = tmp_path_factory.mktemp("variants")
    first, second = (write_pipeline(root, f"pipeline-{seed}", seed) for seed in range(2))
    third = backbone(seed=2)
    return [first, second, write_run(root / "run", first, dict(third.state_dict()), third.config)]


def mixed(weights: list[float]) -> dict[str, torch.Tensor]:
    """By hand, in float64."""
    states = [backbone(seed).state_dict() for seed in range(len(weights))]
    return {
        name: sum(w * state[name].double() for w, state in zip(weights, states, strict=True)).float()  # type: ignore[union-attr]
        for name in states[0]
    }


@pytest.mark.parametrize("weights", [[0.25, 0.75], [0.2, 0.3, 0.5], [1.5, -0.5], [0.0, 1.0]])
def test_a_given_mix_is_the_weighted_sum(variants: list[Path], weights: list[float], tmp_path: Path) -> None:
    names = [str(variant) for variant in variants[: len(weights)]]
    merge_task({"variants": names, "weights": weights, "output": str(tmp_path / "merge"), **QUIET})
    written = S3DiT.from_pretrained(tmp_path / "merge/pipeline").state_dict()
    for name, expected in mixed(weights).items():
        torch.testing.assert_close(written[name], expected, rtol=1e-6, atol=1e-6)
    table = json.loads((tmp_path / "merge/merge.json").read_text())
    assert table["best"] == weights and table["rows"] == []
    assert len(load_pipeline(tmp_path / "merge/pipeline", "cpu")("a red circle")) == 1


def test_with_a_base_the_differences_are_added_up(variants: list[Path], tmp_path: Path) -> None:
    names = [str(variant) for variant in variants]
    asked = {"variants": names[:2], "base": names[2], "weights": [1, 0.75], "output": str(tmp_path / "merge"), **QUIET}
    merge_task(asked)
    first, second, base = (backbone(seed).state_dict() for seed in range(3))
    written = S3DiT.from_pretrained(tmp_path / "merge/pipeline").state_dict()
    for name, weight in base.items():
        moved = [(state[name] - weight).double() for state in (first, second)]
        expected = (weight.double() + moved[0] + 0.75 * moved[1]).float()
        torch.testing.assert_close(written[name], expected, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "merge/merge.json").read_text())["best"] == [1, 0.75, -0.75]


def test_a_sweep_with_a_base_visits_a_grid() -> None:
    assert grid(1, 2) == [(1.0, 0.0), (0.5, 0.5)]
    two = grid(2, 2)
    assert two == [
        (1.0, 1.0, -1.0), (1.0, 0.5, -0.5), (1.0, 0.0, 0.0), (0.5, 1.0, -0.5), (0.5, 0.5, 0.0), (0.5, 0.0, 0.5),
        (0.0, 1.0, 0.0), (0.0, 0.5, 0.5),
    ]  # fmt: skip
    assert mixes_of(MergeSettings(variants=["a"], base="b", sweep=2, score="tinyworld")) == grid(1, 2)


def test_a_sweep_visits_the_simplex() -> None:
    assert simplex(2, 4) == [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]
    three = simplex(3, 5)
    assert len(three) == len(set(three)) == 21
    assert all(abs(sum(mix) - 1) < 1e-12 and min(mix) >= 0 for mix in three)


def test_a_sweep_writes_the_best_mix(variants: list[Path], tmp_path: Path) -> None:
    low, high = (float(mixed(w)["t_embedder.mlp.2.bias"][0]) for w in ([1.0, 0.0], [0.0, 1.0]))
    target = 0.6 * low + 0.4 * high + 0.01 * (high - low)  # nearest to the third of six mixes
    settings: dict[str, Any] = {
        "variants": [str(variant) for variant in variants[:2]],
        "sweep": 5,
        "score": "variants:nearest",
        "score_arguments": {"target": target},
        "metric": "nearness",
        "output": str(tmp_path / "merge"),
        **QUIET,
    }
    merge_task(settings)
    table = json.loads((tmp_path / "merge/merge.json").read_text())
    assert [row["weights"] for row in table["rows"]] == [list(mix) for mix in simplex(2, 5)]
    expected = [share / 5 * low + (1 - share / 5) * high for share in range(5, -1, -1)]
    assert [row["metrics"]["bias"] for row in table["rows"]] == pytest.approx(expected, rel=1e-5)
    assert table["best"] == [0.6, 0.4]
    written = S3DiT.from_pretrained(tmp_path / "merge/pipeline").state_dict()
    for name, weight in mixed([0.6, 0.4]).items():
        torch.testing.assert_close(written[name], weight, rtol=1e-6, atol=1e-6)

    settings |= {"metric": None, "overwrite": True}  # the first number of the scorer: the larger bias
    merge_task(settings)
    assert json.loads((tmp_path / "merge/merge.json").read_text())["best"] == ([1.0, 0.0] if low > high else [0.0, 1.0])


def test_a_sweep_that_was_broken_off_goes_on(
    variants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "variants": [str(variant) for variant in variants[:2]],
        "sweep": 3,
        "score": "variants:nearest",
        "score_arguments": {"target": 0.0},
        "output": str(tmp_path / "merge"),
        **QUIET,
    }
    monkeypatch.setattr(Nearest, "calls", 0)
    monkeypatch.setattr(Nearest, "stop_at", 3)
    with pytest.raises(KeyboardInterrupt):
        merge_task(settings)
    merge_task(settings)
    assert Nearest.calls == 5  # the third again, and the fourth
    assert len(json.loads((tmp_path / "merge/merge.json").read_text())["rows"]) == 4
    written = (tmp_path / "merge/pipeline/transformer/config.json").stat().st_mtime_ns
    merge_task(settings)  # it is made already
    assert (tmp_path / "merge/pipeline/transformer/config.json").stat().st_mtime_ns == written and Nearest.calls == 5
    with pytest.raises(UserError, match="exists: name another output"):
        merge_task({**settings, "sweep": 1})


def test_a_merge_that_was_killed_before_it_said_so_goes_on(variants: list[Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "variants": [str(variant) for variant in variants[:2]],
        "weights": [0.5, 0.5],
        "output": str(tmp_path / "merge"),
        **QUIET,
    }
    merge_task(settings)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "merge/pipeline/transformer").iterdir()}
    table = tmp_path / "merge/merge.json"
    table.write_text(json.dumps({**json.loads(table.read_text()), "best": None}))
    merge_task(settings)
    assert {path.name: path.read_bytes() for path in (tmp_path / "merge/pipeline/transformer").iterdir()} == whole
    assert json.loads(table.read_text())["best"] == [0.5, 0.5]


def test_every_mix_is_a_step_in_mlflow(variants: list[Path], tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = [f"variants=[{variants[0]}, {variants[2]}]", "sweep=1", "score=variants:nearest", "device=cpu"]
    words += ["score_arguments={target: 0.5}", f"output={tmp_path / 'merge'}", f"tracking_uri={store}"]
    assert cli.main(["run", "merge", *words, "pictures=[a red circle]"]) == 0
    client, run = MlflowClient(store), json.loads((tmp_path / "merge/mlflow_run.json").read_text())["run_id"]
    weights = {point.step: point.value for point in client.get_metric_history(run, "merge/weight_0")}
    assert weights == {0: 1.0, 1: 0.0}
    assert len(client.get_metric_history(run, "merge/nearness")) == 2
    names = [file.path for file in client.list_artifacts(run)]
    assert "merge.json" in names and "images" in names


def test_tinyworld_scores_a_pipeline_as_in_training(variants: list[Path]) -> None:
    from data_modules.tinyworld.world import heldout_prompts

    words = [metadata["prompt"] for metadata in heldout_prompts(1, 1000)]
    pipeline = ZImagePipeline.from_pretrained(variants[0], "cpu")
    asked: list[Any] = []

    def draw(prompts: list[str], **settings: Any) -> Any:
        asked.append((prompts, settings["seed"]))
        return ZImagePipeline.__call__(pipeline, prompts, height=64, width=64, num_inference_steps=1, **settings)

    metrics = tinyworld(draw, prompts_per_task=1)  # type: ignore[arg-type]
    assert asked == [(words, list(range(1000, 1000 + len(words))))]
    assert metrics["mean"] == (metrics["overall"] + metrics["word"]) / 2
    assert {"single_object", "counting", "position"} <= metrics.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"variants": ["a"]}, "variants must name at least two"),
        ({}, r"give either weights=.* or sweep=5"),
        ({"weights": [0.5, 0.5], "sweep": 3}, "give either weights"),
        ({"weights": [0.5, 0.6]}, r"weights must be 2 numbers.*add up to 1, not \[0.5, 0.6\]"),
        ({"weights": [1.0]}, "weights must be 2 numbers"),
        ({"weights": [1.0], "base": "x"}, r"weights must be 2 numbers, one for each variant, not \[1.0\]"),
        ({"weights": [1.0, float("nan")], "base": "x"}, "weights must be 2 numbers"),
        ({"variants": [], "base": "x", "weights": []}, "variants must name at least two models, or one beside a base"),
        ({"weights": [0.5, 0.5], "pictures": ["a boat"]}, "pictures, metric and score_arguments belong to a score"),
        ({"sweep": 3}, "sweep needs a score to choose by"),
        ({"sweep": 0, "score": "tinyworld"}, "sweep must be at least 1"),
        ({"sweep": 3, "score": "tiniworld"}, "score must be tinyworld, or module:function, not tiniworld"),
        ({"sweep": 3, "score": "absent_module:f"}, "cannot import absent_module"),
        ({"sweep": 3, "score": "variants:absent"}, "variants has no function absent"),
        ({"sweep": 1, "score": "variants:no_numbers"}, "must give a mapping from names to numbers"),
        (
            {"sweep": 1, "score": "variants:nearest", "score_arguments": {"target": 0.0}, "metric": "beauty"},
            "metric=beauty: score=variants:nearest gives bias, nearness",
        ),
    ],
)
def test_wrong_settings_are_named(variants: list[Path], words: dict, message: str, tmp_path: Path) -> None:
    names = [str(variant) for variant in variants[:2]]
    with pytest.raises(UserError, match=message) as caught:
        merge_task({"variants": names, "output": str(tmp_path / "merge"), **QUIET, **words})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merge" / "pipeline").exists()


def test_variants_that_do_not_belong_together_are_refused_by_name(variants: list[Path], tmp_path: Path) -> None:
    deeper = write_pipeline(tmp_path, "deeper", seed=0, n_layers=3)
    wordy = write_pipeline(variants[0].parent, "wordy", seed=0, words=[*PROMPTS, "a green moon"])
    other = write_pipeline(tmp_path / "other", "pipeline", seed=0)
    weights = other / "vae" / "config.json"
    weights.write_text(weights.read_text() + "\n")
    for stranger, reason in (
        (deeper, "n_layers of their backbones differ"),
        (wordy, "each has a text_encoder of its own"),
        (other, "each has a codec of its own"),
        (variants[0] / "transformer", "holds a backbone alone"),
    ):
        words = {"variants": [str(variants[0]), str(stranger)], "weights": [0.5, 0.5]}
        with pytest.raises(UserError, match=f"{stranger}.*{reason}"):
            merge_task({**words, "output": str(tmp_path / "merge"), **QUIET})


def test_mixes_of_given_weights_are_taken_as_they_are() -> None:
    assert mixes_of(MergeSettings(variants=["a", "b"], weights=[0.3, 0.7])) == [(0.3, 0.7)]
