"""Counts that no order changes, and the intervals' coverage."""

import json
import random

import pytest

from evaluation.benchmarks.protocol import OfficialFolder
from evaluation.benchmarks.tally import Count, Tally, clustered, exact, inexact, mean_of_prompts, mean_of_scores
from zimage_lit.errors import UserError


def quotient(sums):
    return sums[0] / sums[1]


def test_fractions_add_up_the_same_in_any_order_and_lose_nothing_that_a_float_has():
    generator = random.Random(0)
    values = [generator.uniform(-1, 2.5) for _ in range(1000)]
    total = sum(exact(value) for value in values)
    for _ in range(5):
        generator.shuffle(values)
        assert sum(exact(value) for value in values) == total
    assert inexact(total) / 1000 == pytest.approx(sum(values) / 1000, abs=1e-14)
    assert all(inexact(exact(value)) == pytest.approx(value, abs=2**-51) for value in values)
    with pytest.raises(ValueError, match="lost"):
        exact(float("nan"))


def test_lost_pictures_are_kept_apart_and_counted():
    tally = Tally()
    tally.add(Count(("a",), {"images": 1, "correct": 1}))
    tally.add(Count(("a",), {"images": 1, "correct": 0}, lost=True))
    tally.add(Count(("b",), {"images": 2}, lost=True))
    assert tally.table() == {("a",): {"images": 2, "correct": 1}, ("b",): {"images": 2}}
    assert tally.judged() == {("a",): {"images": 1, "correct": 1}}
    assert tally.lost() == {("a",): {"images": 1, "correct": 0}, ("b",): {"images": 2}}


def test_the_interval_covers_the_mean_of_agreeing_pictures_as_often_as_it_says():
    """Prompts of unlike sizes whose pictures agree: pooled shares, as text benchmarks have them."""
    generator = random.Random(0)
    covered = 0
    for _ in range(400):
        prompts = []
        for _ in range(60):
            number, share = generator.choice((2, 8)), generator.betavariate(2, 1)
            prompts.append((sum(generator.random() < share for _ in range(number)), number))
        scored = clustered(prompts, quotient, 0, at_most=sum(number for _, number in prompts))
        covered += scored["ci_low"] <= 2 / 3 <= scored["ci_high"]
    assert 0.92 <= covered / 400 <= 0.98


def test_the_interval_of_a_mean_is_the_usual_one_where_prompts_are_many():
    generator = random.Random(0)
    values = [generator.uniform(0.2, 0.8) for _ in range(2000)]
    mean = sum(values) / 2000
    half = 1.96 * (sum((value - mean) ** 2 for value in values) / 1999 / 2000) ** 0.5
    scored = mean_of_prompts(values)
    assert scored["score"] == pytest.approx(mean) and scored["n"] == 2000
    assert (scored["ci_low"], scored["ci_high"]) == pytest.approx((mean - half, mean + half), abs=1e-4)
    shifted = mean_of_prompts([2 * value - 1 for value in values], bounds=(-1.0, 1.0))
    assert shifted["ci_high"] == pytest.approx(2 * scored["ci_high"] - 1)


def test_where_nothing_varies_the_interval_has_as_many_draws_as_prompts():
    assert mean_of_prompts([1.0] * 20)["ci_low"] == pytest.approx(0.8389, abs=1e-4)
    assert mean_of_prompts([0.0])["ci_high"] == pytest.approx(0.7935, abs=1e-4)
    alike = mean_of_prompts([0.3] * 50)
    assert 0.18 < alike["ci_low"] < 0.3 < alike["ci_high"] < 0.45


def test_the_mean_of_scores_adds_the_squares_of_their_half_widths():
    scores = [{"score": 0.5, "ci_low": 0.2, "ci_high": 0.6}, {"score": 0.7, "ci_low": 0.3, "ci_high": 0.9}]
    assert mean_of_scores(scores) == pytest.approx(
        {"overall": 0.6, "ci_low": 0.6 - 0.25, "ci_high": 0.6 + 0.05**0.5 / 2}
    )


def test_an_absent_or_altered_file_is_named_with_the_place_to_get_it(tmp_path):
    folder = OfficialFolder("Bench", "https://example.org/bench", {"a.json": "0" * 64})
    with pytest.raises(UserError, match=r"a\.json.*cannot be read.*https://example.org/bench"):
        folder.read(tmp_path, "a.json")
    (tmp_path / "a.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match=r"a\.json is not the official file.*SHA-256.*https://example.org/bench"):
        folder.read(tmp_path, "a.json")
