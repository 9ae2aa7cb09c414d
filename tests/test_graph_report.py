"""The report of a graph: what it says of a stage, from the files that its evaluation has left."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from result_folders import MODULES, result_folder
from scipy.stats import t as student

from evaluation.report.difference import common, paired_difference, pairs_of
from evaluation.report.results import read_result
from zimage_lit.graph import Graph, Stage
from zimage_lit.graph_report import change, curves_of, page, rows_of, shown_pictures, stage_grid
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
PRINTS = {"base": "1", "quick": "2", "tuned": "3", "late": "4"}


def scores_of(graph: Graph, name: str, group: str) -> dict[str, list[float]]:
    """The scores of a group's pictures by sentence, read by hand."""
    folder = graph.stage(name).folder / ("evaluation" if name != "quick" else "") / KEY
    found: dict[str, list[float]] = {}
    for line in map(json.loads, (folder / "prompts.jsonl").read_text().splitlines()):
        if line["group"] == group:
            found.setdefault(line["prompt"], []).append(line["score"])
    return found


def by_hand(graph: Graph, first: str, second: str, group: str) -> tuple[float, float]:
    """The mean difference, and half the width of its interval: the wider one of sentences, which weigh by their
    pictures, and of pictures."""
    before, after = scores_of(graph, first, group), scores_of(graph, second, group)
    sentences = [(sum(after[one]) - sum(before[one]), len(before[one])) for one in before]
    pictures = [(b - a, 1) for one in before for a, b in zip(before[one], after[one], strict=True)]
    value = sum(gained for gained, _ in sentences) / sum(weight for _, weight in sentences)
    return value, max(jackknife(sentences), jackknife(pictures))


def jackknife(parts: list[tuple[float, int]]) -> float:
    """Half the width of the interval of sum(gained) / sum(weight)."""
    gained, weight = np.array(parts, dtype=float).T
    without = (gained.sum() - gained) / (weight.sum() - weight)
    n = len(parts)
    variance = ((without - without.mean()) ** 2).sum() * (n - 1) / n
    return student.ppf(0.975, n - 1) * math.sqrt(variance)


def results(graph: Graph):
    rows = {row.stage.name: row.result for row in rows_of(graph, STATE, PRINTS)}
    return rows["base"], rows["tuned"]


@pytest.mark.parametrize("group", ["counting", "word"])
def test_the_change_of_a_group_is_that_of_its_pictures(graph, group):
    found = change([group], [results(graph)])
    value, half = by_hand(graph, "base", "tuned", group)
    assert found.value == pytest.approx(value) and value > 0
    assert (found.low, found.high) == pytest.approx((value - half, value + half))


def test_the_change_of_two_groups_is_their_mean_and_their_variances_add_up(graph):
    found = change(["counting", "word"], [results(graph)])
    parts = [by_hand(graph, "base", "tuned", group) for group in ("counting", "word")]
    value = sum(part[0] for part in parts) / 2
    half = math.sqrt(sum(part[1] ** 2 for part in parts)) / 2
    assert tuple(found) == pytest.approx((value, value - half, value + half))


def test_the_change_overall_is_that_of_the_reports(graph):
    first, second = results(graph)
    expected = paired_difference(pairs_of("tinyworld", common(first.prompts, second.prompts)))
    found = change(["overall"], [(first, second)])
    assert (
        found.value == pytest.approx(expected.value) and found.high - found.low >= expected.high - expected.low - 1e-9
    )
    told = [result.result["scores"]["official"]["overall"] for result in (first, second)]
    assert found.value == pytest.approx(told[1] - told[0])


def test_sentences_that_agree_by_chance_do_not_make_a_certain_change(graph):
    """Three sentences, each drawn 16 times, as many pictures of which get better: those tell how sure it is."""
    first, second = results(graph)
    better, worse = [1.0] * 3 + [0.0] * 13, [0.0] * 3 + [1.0] * 2 + [0.0] * 11

    def lines(scores: list[float]) -> list[dict]:
        return [
            {"prompt_id": f"{sentence}/{place}", "prompt": f"photo of {sentence}", "group": "counting", "score": score}
            for sentence in "abc"
            for place, score in enumerate(scores)
        ]  # fmt: skip

    found = change(["counting"], [(replace(first, prompts=lines(worse)), replace(second, prompts=lines(better)))])
    assert found.value == pytest.approx(1 / 16)
    assert found.low < 0 < found.high and found.high - found.value == pytest.approx(jackknife(
        [(b - a, 1) for _ in "abc" for a, b in zip(worse, better, strict=True)]
    ))  # fmt: skip


def test_of_several_runs_a_prompt_counts_with_all_that_was_drawn_of_it(graph):
    base, tuned = results(graph)
    other = replace(tuned, prompts=[{**line, "score": 1.0} for line in tuned.prompts])
    found = change(["counting"], [(base, tuned), (base, other)])
    sentences: dict[str, list[float]] = {}
    pictures: dict[str, list[float]] = {}
    for after in (tuned, other):
        for first, second in common(base.prompts, after.prompts):
            if first["group"] == "counting":
                gained = second["score"] - first["score"]
                sentences.setdefault(first["prompt"], []).append(gained)
                pictures.setdefault(first["prompt_id"], []).append(gained)
    halves = [jackknife([(sum(part), len(part)) for part in parts.values()]) for parts in (sentences, pictures)]
    value = np.mean([gained for part in pictures.values() for gained in part])
    assert {len(part) for part in pictures.values()} == {2}
    assert tuple(found) == pytest.approx((value, value - max(halves), value + max(halves)))


def test_a_group_that_is_none_is_no_change(graph):
    with pytest.raises(KeyError):
        change(["overall", "wrod"], [results(graph)])


def test_what_another_graph_has_made_is_not_told(graph):
    rows = rows_of(graph, STATE, {**PRINTS, "base": "9", "tuned": "8"})
    assert [row.finished for row in rows] == [False, True, False, False] and rows[2].result is None


def test_a_torn_diary_still_tells_the_cost(graph):
    times = graph.stage("quick").folder / KEY / "images" / "times.jsonl"
    kept = times.read_bytes()
    try:
        times.write_bytes(kept + b'{"pictures": 3, "sec\n\0\0\n')
        assert rows_of(graph, STATE, PRINTS)[1].cost == pytest.approx((14.0, 1.0))
        times.write_bytes(b"")
        assert rows_of(graph, STATE, PRINTS)[1].cost is None
    finally:
        times.write_bytes(kept)


@pytest.mark.parametrize("key", sorted(MODULES))
def test_every_benchmark_can_judge_stages(tmp_path, key):
    stage = Stage("only", "toy", {}, tmp_path / "only", lifts=("overall",))
    result_folder(stage.folder / "evaluation", key, number=14)
    graph = Graph("one", tmp_path, (stage,))
    rows = rows_of(graph, {"only": {**STATE["base"]}}, {"only": "1"})
    assert "overall" in rows[0].scores() and "1 of 1 stages" in page(graph, rows)


def test_a_row_for_each_stage(graph):
    base, quick, tuned, late = rows_of(graph, STATE, PRINTS)
    assert base.changes == {} and quick.changes == {} and set(tuned.changes) == {"base", "quick"}
    assert base.cost is not None and base.cost == pytest.approx((14.0, 1.0))  # a picture of the four
    assert (late.seconds, late.finished, late.result, late.cost, late.changes) == (None, False, None, None, {})
    running = {**STATE, "late": {"fingerprint": "4", "status": "running", "seconds": 5.0}}
    assert rows_of(graph, running, PRINTS)[3].seconds == 5.0 and not rows_of(graph, running, PRINTS)[3].finished


def test_pictures_that_were_not_drawn_here_have_no_cost(graph):
    times = graph.stage("quick").folder / KEY / "images" / "times.jsonl"
    kept = times.read_bytes()
    times.unlink()
    try:
        assert rows_of(graph, STATE, PRINTS)[1].cost is None
    finally:
        times.write_bytes(kept)


def test_the_page_tells_all_of_it(graph):
    rows = rows_of(graph, STATE, PRINTS)
    told = page(graph, rows)
    assert "3 of 4 stages are finished, after 3.0 minutes of work" in told
    assert "tuned: its &lt;order&gt; is ours." in told and "<order>" not in told
    tuned = rows[2]
    for name in ("counting", "word"):
        score, low, high = tuned.scores()[name]
        assert f"{name} {score:.3f} [{low:.3f}, {high:.3f}]" in told
    assert f"{tuned.changes['quick'].value:+.3f}" in told and "against quick" in told
    assert told.count("<img") == 3 * 7  # of each stage that was judged a picture of each task
    nothing = page(graph, rows_of(graph, {}, PRINTS))
    assert "0 of 4 stages are finished" in nothing and "<h2>" not in nothing


def test_a_stage_s_pictures_are_those_of_the_first_one_s_prompts(graph):
    base, _, tuned, late = rows_of(graph, STATE, PRINTS)
    first, second = shown_pictures(base, base), shown_pictures(tuned, base)
    assert list(first) == list(second) and len(first) == 7
    assert all(list(first[prompt].getdata()) != list(second[prompt].getdata()) for prompt in first)
    assert stage_grid(late, base) is None


def test_the_curves_are_the_most_telling_ones_that_were_logged(tmp_path):
    assert curves_of(tmp_path) == {}
    (tmp_path / "mlflow_run.json").write_text('{"run_id": "abc"}')
    spool = Spool(tmp_path / "mlflow_spool/abc")
    for step, values in (
        (20, {"train/loss": 0.5, "lr": 1.0}),
        (40, {"train/loss": math.nan}),
        (40, {"train/loss": 0.4}),
    ):
        spool.append({"kind": "metrics", "step": step, "time": 0, "values": values})
    spool.append({"kind": "status", "status": "FINISHED", "time": 0})
    assert curves_of(tmp_path) == {"train/loss": [(20, 0.5), (40, 0.4)]}
    rewards = {"reward/right": 0.25, "reward/right_std": 0.5, "reward/right_invalid": 0.0, "reward/gold": 0.5}
    spool.append({"kind": "metrics", "step": 5, "time": 0, "values": rewards})
    assert curves_of(tmp_path) == {"reward/gold": [(5, 0.5)], "reward/right": [(5, 0.25)]}


def test_results_and_pictures_are_found_where_stages_leave_them(graph):
    rows = rows_of(graph, STATE, PRINTS)
    assert [row.result.folder for row in rows if row.result] == [
        graph.folder / "base/evaluation" / KEY, graph.folder / "quick" / KEY, graph.folder / "tuned/evaluation" / KEY
    ]  # fmt: skip
    assert read_result(Path(graph.folder / "quick" / KEY)).model == "quick"
