"""The difference of two models against closed forms, and against the benchmarks' own scores."""

import random
import statistics
from pathlib import Path

import pytest
from result_folders import MODULES, result_folder
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from evaluation.report.difference import Pair, common, over_runs, paired_difference, pairs_of, settings_that_differ
from evaluation.report.results import read_result


def of_dice(number, seed, stratum="", weight=None, prompts=""):
    dice = random.Random(seed)
    return [
        Pair(stratum, f"{prompts}{i}", weight or 1.0, a := dice.random(), min(1.0, max(0.0, a + dice.gauss(0.1, 0.3))))
        for i in range(number)
    ]


def test_prompts_of_one_weight_have_the_interval_of_the_paired_t_test():
    pairs = of_dice(40, 1)
    found = paired_difference(pairs)
    test = ttest_rel([pair.second for pair in pairs], [pair.first for pair in pairs]).confidence_interval()
    assert found == pytest.approx((statistics.fmean(p.second - p.first for p in pairs), test.low, test.high), abs=1e-12)
    assert paired_difference([pair._replace(weight=7.5) for pair in pairs]) == pytest.approx(found, abs=1e-12)


def test_the_mean_of_two_strata_has_the_interval_of_welchs_t_test():
    one, other = of_dice(12, 2, "one"), of_dice(30, 3, "other")
    gains = [[pair.second - pair.first for pair in stratum] for stratum in (one, other)]
    welch = ttest_ind(gains[0], [-gain for gain in gains[1]], equal_var=False).confidence_interval()
    mean = sum(map(statistics.fmean, gains)) / 2
    assert paired_difference([*one, *other]) == pytest.approx((mean, welch.low / 2, welch.high / 2), abs=1e-12)


def test_an_interval_of_unequal_prompts_holds_the_truth_as_often_as_it_says():
    """Prompts of few and of many words: the pooled share's difference is 0.1 · Σ weight / Σ weight."""
    dice, inside = random.Random(0), 0
    for _ in range(400):
        pairs = []
        for number in range(40):
            weight = dice.choice((2, 10, 30))
            pairs.append(Pair("", str(number), weight, 0.4, 0.5 + dice.gauss(0, 0.6 / weight**0.5)))
        found = paired_difference(pairs)
        inside += found.low <= 0.1 <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_what_has_the_same_text_is_one_prompt():
    pairs = of_dice(20, 4)
    twice = paired_difference([*pairs, *pairs])
    assert twice == pytest.approx(paired_difference(pairs), abs=1e-12)
    apart = paired_difference([*pairs, *(pair._replace(prompt=f"again {pair.prompt}") for pair in pairs)])
    assert apart.high - apart.low < 0.8 * (twice.high - twice.low)


def test_prompts_that_do_not_show_how_much_they_vary_give_no_interval():
    assert paired_difference(of_dice(1, 0)) == (pytest.approx(paired_difference(of_dice(1, 0)).value), None, None)
    assert paired_difference([Pair("", str(i), 1, 0.5, 0.75) for i in range(9)]) == (0.25, None, None)
    assert paired_difference([*of_dice(9, 1, "a"), *of_dice(1, 2, "b")]).low is None
    assert paired_difference([]) is None


def test_runs_have_the_interval_of_the_paired_t_test():
    changes = [0.05, 0.09, 0.14]
    test = ttest_1samp(changes, 0).confidence_interval()
    assert over_runs(changes) == pytest.approx((statistics.fmean(changes), test.low, test.high), abs=1e-12)
    assert over_runs([0.07] * 3) == (pytest.approx(0.07), None, None)
    assert over_runs([0.07]) == (0.07, None, None)


@pytest.mark.parametrize("key", [key for key in MODULES if not key.startswith("oneig")])
def test_it_is_the_difference_of_the_benchmarks_own_scores(key: str, tmp_path: Path):
    number = 23  # tasks and places with unequal numbers of prompts
    first = read_result(result_folder(tmp_path / "a", key, "a", 0.8, number, lost=[5], draw=False))
    second = read_result(result_folder(tmp_path / "b", key, "b", 0.5, number, draw=False))
    found = paired_difference(pairs_of(first.result["benchmark"], common(first.prompts, second.prompts)))
    scores = [result.result["scores"]["fixed"]["overall"] for result in (first, second)]
    assert found.value == pytest.approx(scores[1] - scores[0], abs=1e-12) and found.low < found.value < found.high


def test_what_else_differs_is_told(tmp_path: Path):
    first = read_result(result_folder(tmp_path / "a", "geneval", "a", draw=False)).result
    assert settings_that_differ(first, first) == []
    judge = {**first["judges"]["detector"], "revision": "other"}
    pictures = {**first["pictures"], "prompt_rewriter": "a rewriter", "model": "elsewhere"}
    told = settings_that_differ(first, {**first, "judges": {"detector": judge}, "pictures": pictures, "slice": None})
    assert told == [
        "The detector differs: detector of dice (0123456789abcdef) and detector of dice (other).",
        "They were evaluated on different parts of the benchmark: only prompts of both are compared.",
        "Pictures differ in prompt_rewriter: None and a rewriter.",
    ]
    other = {**first["judges"]["detector"], "versions": {"python": "3.12"}}
    assert settings_that_differ(first, {**first, "judges": {"detector": other}}) == [
        "The detector differs with other settings or library versions: detector of dice (0123456789abcdef)."
    ]


def test_other_numbers_of_pictures_are_no_other_sizes(tmp_path: Path):
    first = read_result(result_folder(tmp_path / "a", "geneval", "a", draw=False)).result
    fewer = {**first, "pictures": {**first["pictures"], "sizes": {"192x192": 5}}}
    other = {**first, "pictures": {**first["pictures"], "sizes": {"192x192": 5, "64x64": 1}}}
    assert settings_that_differ(first, fewer) == []
    assert settings_that_differ(first, other) == ["Pictures differ in sizes: 192x192 and 192x192, 64x64."]
