"""The report of a graph: what it says of a stage, from the files that its evaluation has left."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from result_folders import result_folder
from scipy.stats import t as student

from evaluation.report.difference import common, paired_difference, pairs_of
from evaluation.report.results import read_result
from zimage_lit.graph import Graph, Stage
from zimage_lit.graph_report import change, curve, page, rows_of, stage_grid
from zimage_lit.spool import Spool

KEY = "tinyworld-en"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Two stages with results, a comparison that a task made, and one that has not begun."""
    folder = tmp_path_factory.mktemp("life")
    base = Stage("base", "toy", {}, folder / "base", lifts=("overall",))
    quick = Stage("quick", "evaluate", {}, folder / "quick", begins_from=("base",))
    tuned = Stage(
        "tuned", "toy", {}, folder / "tuned", "its <order> is ours", ("base",), ("counting", "word"), ("base", "quick")
    )
    late = Stage("late", "toy", {}, folder / "late", begins_from=("tuned",), lifts=("overall",), against=("tuned",))
    for stage, skill in ((base, 0.3), (quick, 0.2), (tuned, 0.8)):
        root = stage.folder / "evaluation" if stage.makes_a_pipeline else stage.folder
        made = result_folder(root, KEY, model=stage.name, skill=skill, number=70)
        lines = [
            {"pictures": 3, "seconds": 1.5, "evaluations": 16.0},
            {"pictures": 1, "seconds": 2.5, "evaluations": 8.0},
        ]
        (made / "images" / "times.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Graph("life", folder, (base, quick, tuned, late))


STATE = {
    "base": {"fingerprint": "1", "status": "finished", "seconds": 90.0},
    "quick": {"fingerprint": "2", "status": "finished", "seconds": 30.0},
    "tuned": {"fingerprint": "3", "status": "finished", "seconds": 60.0},
}


def scores_of(graph: Graph, name: str, group: str) -> dict[str, list[float]]:
    """The scores of a group's pictures by sentence, read by hand."""
    folder = graph.stage(name).folder / ("evaluation" if name != "quick" else "") / KEY
    found: dict[str, list[float]] = {}
    for line in map(json.loads, (folder / "prompts.jsonl").read_text().splitlines()):
        if line["group"] == group:
            found.setdefault(line["prompt"], []).append(line["score"])
    return found


def by_hand(graph: Graph, first: str, second: str, group: str) -> tuple[float, float]:
    """The mean difference, and half the width of its interval: sentences weigh by their pictures, the jackknife."""
    before, after = scores_of(graph, first, group), scores_of(graph, second, group)
    gained = np.array([sum(after[one]) - sum(before[one]) for one in before])
    weight = np.array([len(before[one]) for one in before])
    without = (gained.sum() - gained) / (weight.sum() - weight)
    n = len(gained)
    variance = ((without - without.mean()) ** 2).sum() * (n - 1) / n
    return gained.sum() / weight.sum(), student.ppf(0.975, n - 1) * math.sqrt(variance)


def results(graph: Graph):
    rows = {row.stage.name: row.result for row in rows_of(graph, STATE)}
    return rows["base"], rows["tuned"]


@pytest.mark.parametrize("group", ["counting", "word"])
def test_the_change_of_a_group_is_that_of_its_pictures(graph, group):
    found = change([group], *results(graph))
    value, half = by_hand(graph, "base", "tuned", group)
    assert found.value == pytest.approx(value) and value > 0
    assert (found.low, found.high) == pytest.approx((value - half, value + half))


def test_the_change_of_two_groups_is_their_mean_and_their_variances_add_up(graph):
    found = change(["counting", "word"], *results(graph))
    parts = [by_hand(graph, "base", "tuned", group) for group in ("counting", "word")]
    value = sum(part[0] for part in parts) / 2
    half = math.sqrt(sum(part[1] ** 2 for part in parts)) / 2
    assert tuple(found) == pytest.approx((value, value - half, value + half))


def test_the_change_overall_is_that_of_the_reports(graph):
    first, second = results(graph)
    expected = paired_difference(pairs_of("tinyworld", common(first.prompts, second.prompts)))
    found = change(["overall"], first, second)
    assert found == pytest.approx(expected)
    told = [result.result["scores"]["official"]["overall"] for result in (first, second)]
    assert found.value == pytest.approx(told[1] - told[0])


def test_a_row_for_each_stage(graph):
    base, quick, tuned, late = rows_of(graph, STATE)
    assert base.changes == {} and quick.changes == {} and set(tuned.changes) == {"base", "quick"}
    assert base.cost is not None and base.cost == pytest.approx((14.0, 1.0))  # a picture of the four
    assert (late.seconds, late.finished, late.result, late.cost, late.changes) == (None, False, None, None, {})
    running = {**STATE, "late": {"fingerprint": "4", "status": "running", "seconds": 5.0}}
    assert rows_of(graph, running)[3].seconds == 5.0 and not rows_of(graph, running)[3].finished


def test_pictures_that_were_not_drawn_here_have_no_cost(graph):
    times = graph.stage("quick").folder / KEY / "images" / "times.jsonl"
    kept = times.read_bytes()
    times.unlink()
    try:
        assert rows_of(graph, STATE)[1].cost is None
    finally:
        times.write_bytes(kept)


def test_the_page_tells_all_of_it(graph):
    rows = rows_of(graph, STATE)
    told = page(graph, rows)
    assert "3 of 4 stages are finished, after 3.0 minutes of work" in told
    assert "tuned: its &lt;order&gt; is ours." in told and "<order>" not in told
    tuned = rows[2]
    for name in ("counting", "word"):
        score, low, high = tuned.scores()[name]
        assert f"{name} {score:.3f} [{low:.3f}, {high:.3f}]" in told
    assert f"{tuned.changes['quick'].value:+.3f}" in told and "against quick" in told
    assert told.count("<img") == 3 * 7  # of each stage that was judged a picture of each task
    nothing = page(graph, rows_of(graph, {}))
    assert "0 of 4 stages are finished" in nothing and "None yet." in nothing


def test_a_stage_s_pictures_are_those_of_the_first_one_s_prompts(graph):
    base, _, tuned, late = rows_of(graph, STATE)
    first, second = stage_grid(base, base), stage_grid(tuned, base)
    assert first is not None and second is not None and first.width == second.width
    assert stage_grid(late, base) is None


def test_the_curve_is_the_most_telling_one_that_was_logged(tmp_path):
    assert curve(tmp_path) == ("", [])
    (tmp_path / "mlflow_run.json").write_text('{"run_id": "abc"}')
    spool = Spool(tmp_path / "mlflow_spool/abc")
    for step, values in (
        (20, {"train/loss": 0.5, "lr": 1.0}),
        (40, {"train/loss": math.nan}),
        (40, {"train/loss": 0.4}),
    ):
        spool.append({"kind": "metrics", "step": step, "time": 0, "values": values})
    spool.append({"kind": "status", "status": "FINISHED", "time": 0})
    assert curve(tmp_path) == ("train/loss", [(20, 0.5), (40, 0.4)])
    spool.append({"kind": "metrics", "step": 5, "time": 0, "values": {"reward/right": 0.25}})
    assert curve(tmp_path) == ("reward/right", [(5, 0.25)])


def test_results_and_pictures_are_found_where_stages_leave_them(graph):
    rows = rows_of(graph, STATE)
    assert [row.result.folder for row in rows if row.result] == [
        graph.folder / "base/evaluation" / KEY, graph.folder / "quick" / KEY, graph.folder / "tuned/evaluation" / KEY
    ]  # fmt: skip
    assert read_result(Path(graph.folder / "quick" / KEY)).model == "quick"
