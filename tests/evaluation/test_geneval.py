"""GenEval's rules against the published ones' golden vectors, and the aggregation against hand-made sums."""

import random

import benchmark_files
import pytest

from evaluation.benchmarks.geneval import (
    TASKS,
    evaluate,
    filter_detections,
    plan,
    prompts,
    relative_position,
    score,
)
from evaluation.benchmarks.tally import wilson_interval
from zimage_lit.errors import UserError


@pytest.fixture(scope="module")
def golden():
    return benchmark_files.golden("geneval/rule_vectors.json")


def detection(name="dog", confidence=0.95, box=(0, 0, 10, 10), color=None):
    return {"cls": name, "box": [*box, confidence], "color": color}


def record(correct, tag="single_object", prompt="a photo of a dog"):
    metadata = {"tag": tag, "include": [{"class": "dog", "count": 1}], "prompt": prompt}
    return {"metadata": metadata, "detections": [detection()] if correct else []}


def test_verdicts_and_reasons_equal_the_published_rules(golden):
    assert len(golden["cases"]) > 100
    for mode in ("official", "fixed"):
        result = score(golden["cases"], mode)
        for case, verdict in zip(golden["cases"], result["records"], strict=True):
            assert verdict == {"correct": case["correct"], "reason": case["reason"]}, case


def test_relative_positions_equal_the_published_rule(golden):
    assert len(golden["relative_position"]) > 100
    for pair in golden["relative_position"]:
        assert sorted(relative_position(pair["a"], pair["b"])) == sorted(pair["rel"]), pair


def test_task_means_and_overall_are_plain_means(golden):
    result = score(golden["cases"])
    means = []
    for tag in TASKS:
        correct = [case["correct"] for case in golden["cases"] if case["metadata"]["tag"] == tag]
        assert result["tasks"][tag]["accuracy"] == pytest.approx(sum(correct) / len(correct))
        assert result["tasks"][tag]["n"] == len(correct)
        means.append(sum(correct) / len(correct))
    assert result["overall"] == pytest.approx(sum(means) / 6)
    assert result["images_correct"] == pytest.approx(
        sum(case["correct"] for case in golden["cases"]) / len(golden["cases"])
    )


def test_overall_weighs_tasks_alike_and_a_prompt_needs_one_right_picture():
    records = [record(True), record(False), record(False, prompt="another dog")]
    records += [record(True, tag="two_object", prompt="third")]
    result = score(records)
    assert result["overall"] == pytest.approx((1 / 3 + 1) / 2)
    assert result["images_correct"] == pytest.approx(2 / 4)
    assert result["prompts_correct"] == pytest.approx(2 / 3)
    assert (result["images"], result["prompts"]) == (4, 3)


def test_the_order_of_the_records_does_not_matter():
    records = [record(i % 3 == 0, TASKS[i % 6], f"prompt {i % 11}") for i in range(200)]
    shuffled = random.Random(0).sample(records, len(records))
    for mode in ("official", "fixed"):
        one, other = score(records, mode), score(shuffled, mode)
        assert one["tasks"].keys() == other["tasks"].keys()
        for tag in one["tasks"]:
            assert one["tasks"][tag] == pytest.approx(other["tasks"][tag])


def test_thresholds_are_strict_and_counting_has_its_own():
    weak, just, strong = detection(confidence=0.3), detection(confidence=0.9), detection(confidence=0.91)
    assert filter_detections([weak, strong, just], "colors") == {"dog": [strong, just]}
    assert filter_detections([weak, strong, just], "counting") == {"dog": [strong]}


def test_at_most_sixteen_of_a_class_the_best_ones():
    crowd = [detection(confidence=0.5 + i / 100) for i in range(20)]
    kept = filter_detections([*crowd, detection("cat")], "two_object")
    assert kept["dog"] == crowd[:3:-1] and len(kept["cat"]) == 1


def test_only_the_best_detections_of_a_class_are_asked_for_their_colour():
    metadata = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    verdict = evaluate(metadata, [detection(confidence=0.5, color="red"), detection(confidence=0.9, color="blue")])
    assert verdict == {"correct": False, "reason": "expected red dog>=1, found 0 red; and 1 blue"}


def test_an_exclude_clause_forbids_one_object_more():
    metadata = {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
    }
    assert [evaluate(metadata, [detection()] * n)["correct"] for n in range(5)] == [False, False, True, False, False]


def test_every_pair_must_stand_in_the_named_relation():
    left, right = detection("cat", box=(0, 0, 10, 10)), detection("cat", box=(100, 0, 110, 10))
    dog = detection("dog", box=(50, 0, 60, 10))
    placed = {"class": "dog", "count": 1, "position": ["right of", 0]}
    metadata = {"tag": "position", "include": [{"class": "cat", "count": 2}, placed]}
    assert evaluate(metadata, [left, left, dog])["correct"]
    assert evaluate(metadata, [left, right, dog])["reason"] == "expected dog right of target, found left of target"


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        ((-20, 0, -10, 10), ["left of"]),
        ((20, 0, 30, 10), ["right of"]),
        ((0, -20, 10, -10), ["above"]),
        ((0, 20, 10, 30), ["below"]),
        ((50, 50, 60, 60), ["right of", "below"]),  # 45 degrees: both
        ((0, 0, 10, 10), []),  # the same box
        ((2, 0, 12, 10), []),  # apart by a tenth of both sizes: within the margin
    ],
)
def test_relative_position_by_hand(a, expected):
    assert relative_position(a, (0, 0, 10, 10)) == expected


@pytest.mark.parametrize(
    ("share", "number", "low", "high"),
    [(0.5, 10, 0.2366, 0.7634), (0.9, 10, 0.5958, 0.9821), (0.0, 20, 0.0, 0.1611), (1.0, 20, 0.8389, 1.0)],
)
def test_wilson_interval_equals_published_values(share, number, low, high):
    assert wilson_interval(share, number) == pytest.approx((low, high), abs=1e-4)


def test_intervals_know_that_pictures_of_one_prompt_agree():
    """Four pictures a prompt that all agree are worth one picture; pictures that do not care are worth themselves."""
    generator = random.Random(0)
    agreeing = [record(i % 2 == 0, prompt=f"prompt {i}") for i in range(50) for _ in range(4)]
    loose = [record(generator.random() < 0.5, prompt=f"prompt {i}") for i in range(50) for _ in range(4)]
    one_each = score([record(i % 2 == 0, prompt=f"prompt {i}") for i in range(50)])["tasks"]["single_object"]
    clustered = score(agreeing)["tasks"]["single_object"]
    assert clustered["ci_low"] == pytest.approx(one_each["ci_low"], abs=0.005)
    task = score(loose)["tasks"]["single_object"]
    low, high = wilson_interval(task["accuracy"], 200)
    assert high - low <= task["ci_high"] - task["ci_low"] < 1.25 * (high - low)


def test_modes_give_the_same_result(golden):
    results = [score(golden["cases"], mode) for mode in ("official", "fixed")]
    assert results[0] | {"mode": "fixed"} == results[1]


def test_the_official_file_holds_553_prompts_and_names_the_records():
    found = prompts(benchmark_files.official("geneval"))
    by_task = {task: sum(prompt["metadata"]["tag"] == task for prompt in found) for task in TASKS}
    assert list(by_task.values()) == [80, 99, 80, 94, 100, 100]
    result = score([{**prompt, "detections": []} for prompt in found])
    assert result["overall"] == 0 and result["prompts"] == 553


def test_an_absent_or_altered_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"evaluation_metadata\.jsonl.*cannot be read.*djghosh13/geneval"):
        prompts(tmp_path)
    lines = (benchmark_files.official("geneval") / "evaluation_metadata.jsonl").read_text().splitlines()
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UserError, match=r"evaluation_metadata\.jsonl is not the official file"):
        prompts(tmp_path)


def test_four_pictures_a_prompt_drawn_one_after_the_other_from_seed_42():
    planned = plan([{"index": 7, "prompt": "a photo of a dog", "metadata": {}}], size=512)
    assert [picture.official_file for picture in planned] == [f"00007/samples/000{i}.png" for i in range(4)]
    assert [picture.file for picture in planned] == [f"00007/{i}.png" for i in range(4)]
    assert [(picture.seed, picture.draw) for picture in planned] == [(42, i) for i in range(4)]


def test_a_lost_picture_is_wrong_and_counted_and_named():
    lost = {"index": 3, "metadata": record(True)["metadata"], "lost": "truncated"}
    judged = [{"index": i, **record(True)} for i in (3, 4)]
    result = score([*judged, lost])
    assert result["overall"] == 2 / 3 and result["images"] == 3
    assert result["records"][2] == {"correct": False, "reason": "lost: truncated"}
    assert result["lost"]["images"] == 1 and result["lost"]["prompts"] == {"00003": 1}
    assert result["lost"]["scores_if_skipped"] == {"single_object": 1.0}


def test_the_intervals_cover_the_truth_as_often_as_they_say():
    generator = random.Random(1)
    covered = 0
    for _ in range(300):
        records = [record(generator.random() < 0.8, tag, f"{tag} {i}") for tag in TASKS for i in range(20)]
        result = score(records, "fixed")
        covered += result["ci_low"] <= 0.8 <= result["ci_high"]
    assert 0.92 <= covered / 300 <= 1.0


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "nothing to score"),
        ([{"metadata": {}}], "record 0 has no 'detections'"),
        ([record(True), record(True, tag="word")], "record 1 has the tag 'word'"),
        ([{"metadata": {"tag": "colors", "include": []}, "detections": []}], "no include clauses"),
        (
            [record(True) | {"detections": [{"cls": "dog", "box": [0, 0, 1, 1], "color": None}]}],
            "without cls, color and box",
        ),
    ],
)
def test_records_that_cannot_be_scored_are_named(records, message):
    with pytest.raises(ValueError, match=message):
        score(records)


def test_unknown_modes_and_relations_are_refused():
    with pytest.raises(ValueError, match="official or fixed"):
        score([record(True)], "strict")
    wrong = record(True)
    wrong["metadata"]["include"].append({"class": "cat", "count": 1, "position": ["near", 0]})
    with pytest.raises(ValueError, match="earlier clause"):
        score([wrong])
