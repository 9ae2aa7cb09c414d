"""Votes to ratings and rates: against closed forms, another fit, and votes drawn from ratings that are known."""

import json
import math
import random

import numpy as np
import pytest
from scipy.optimize import minimize

from evaluation.preference.bradley_terry import interval, ratings, resampled_ratings, strongly_connected
from evaluation.preference.task import as_markdown, as_page, preference, rated
from evaluation.preference.votes import Vote, read_votes
from zimage_lit.errors import UserError

WHEN = "2026-05-01T12:00:00Z"


def vote(winner="model_a", a="ours", b="theirs", prompt="p0", annotator="ann", seed=0):
    return Vote(a, b, winner, prompt, seed, annotator, WHEN)


def votes_of(**numbers):
    """So many votes of each kind on two models, each on a prompt of its own."""
    kinds = [kind for kind, number in numbers.items() for _ in range(number)]
    return [vote(kind, prompt=f"p{place}") for place, kind in enumerate(kinds)]


def rating(result, model):
    return next(line for line in result["ratings"] if line["model"] == model)


def drawn(true, prompts, votes_a_prompt, generator, wobble=0.0):
    """Votes by the law of Bradley and Terry; `wobble`: standard deviation by which a prompt moves every rating."""
    found = []
    for place in range(prompts):
        own = {model: value + generator.gauss(0, wobble) for model, value in true.items()}
        for number in range(votes_a_prompt):
            a, b = generator.sample(sorted(own), 2)
            wins = generator.random() < 1 / (1 + 10 ** ((own[b] - own[a]) / 400))
            found.append(vote("model_a" if wins else "model_b", a, b, f"p{place}", seed=number))
    return found


@pytest.mark.parametrize(
    ("wins", "ties", "both_bad", "losses"), [(3, 0, 0, 1), (70, 0, 0, 30), (10, 4, 2, 5), (1, 0, 0, 1)]
)
def test_two_models_lie_400_log10_of_wins_over_losses_apart(wins, ties, both_bad, losses):
    result = rated(votes_of(model_a=wins, tie=ties, both_bad=both_bad, model_b=losses), resamples=10)
    half = (ties + both_bad) / 2
    apart = 400 * math.log10((wins + half) / (losses + half))
    assert rating(result, "ours")["rating"] - rating(result, "theirs")["rating"] == pytest.approx(apart, abs=1e-5)
    assert sum(line["rating"] for line in result["ratings"]) / 2 == pytest.approx(1000)
    assert result["prior"] == ""


def test_many_models_have_the_ratings_of_greatest_likelihood():
    votes = drawn({"a": 1200, "b": 1000, "c": 950, "d": 850}, 120, 2, random.Random(1))

    def loss(strength):
        own = dict(zip("abcd", strength, strict=True))
        winners = [(v.model_a, v.model_b) if v.winner == "model_a" else (v.model_b, v.model_a) for v in votes]
        return sum(math.log1p(math.exp(own[b] - own[a])) for a, b in winners) + sum(strength) ** 2

    best = minimize(loss, np.zeros(4), tol=1e-10).x * 400 / math.log(10) + 1000
    result = rated(votes, resamples=2)
    assert [rating(result, model)["rating"] for model in "abcd"] == pytest.approx(best.tolist(), abs=0.05)


def test_the_ratings_that_votes_were_drawn_from_lie_in_the_intervals():
    true = {"a": 1180.0, "b": 1060.0, "c": 1000.0, "d": 930.0, "e": 830.0}
    inside = 0
    for seed in range(30):
        result = rated(drawn(true, 60, 6, random.Random(seed)), resamples=200)
        for model, value in true.items():
            found = rating(result, model)
            inside += found["ci_low"] < value < found["ci_high"]
            assert found["ci_low"] < found["rating"] < found["ci_high"] < found["ci_low"] + 220
    assert 0.90 <= inside / 150 <= 0.99


LIMIT = 1036.5  # rating of `a` for votes on 30,000 such prompts: their wobble draws ratings towards the mean


def test_intervals_hold_the_truth_as_often_as_they_say_where_votes_of_a_prompt_agree():
    true, generator, covered, naive = {"a": 1060.0, "b": 1000.0, "c": 940.0}, random.Random(0), 0, 0
    models = sorted(true)
    compared = ~np.eye(3, dtype=bool)
    for number in range(60):
        clusters = np.zeros((60, 3, 3))
        for one in drawn(true, 60, 12, generator, wobble=250.0):
            winner, loser = (one.model_a, one.model_b) if one.winner == "model_a" else (one.model_b, one.model_a)
            clusters[int(one.prompt_id[1:]), models.index(winner), models.index(loser)] += 1
        low, high = interval(resampled_ratings(clusters, compared, 200, number))[0]
        covered += low <= LIMIT <= high
        singles = clusters.reshape(-1, 9)
        alone = np.concatenate([np.repeat(np.eye(9)[place][None], int(n), 0) for place, n in enumerate(singles.sum(0))])
        low, high = interval(resampled_ratings(alone.reshape(-1, 3, 3), compared, 200, number))[0]
        naive += low <= LIMIT <= high
    assert covered >= 52 and naive < covered - 5  # single votes, taken for independent, promise too much


def test_rates_are_those_of_the_user_study():
    """309 better, 273 the same and 84 worse of 666 votes: 46.4 %, 41.0 %, 12.6 %, and 87.4 % good or the same."""
    kinds = ["model_a"] * 309 + ["tie"] * 200 + ["both_bad"] * 73 + ["model_b"] * 84
    random.Random(0).shuffle(kinds)
    result = rated([vote(kind, prompt=f"{i // 3}", seed=i % 3) for i, kind in enumerate(kinds)], resamples=5)
    ours = next(pair for pair in result["pairs"] if pair["model"] == "ours")
    theirs = next(pair for pair in result["pairs"] if pair["model"] == "theirs")
    assert [round(100 * ours[name]["score"], 1) for name in ("good", "same", "bad", "good_or_same")] == [
        46.4, 41.0, 12.6, 87.4
    ]  # fmt: skip
    assert ours["both_bad"] == 73 and ours["tie"] == 200 and result["prompts"] == 222
    assert ours["good"] == theirs["bad"] and ours["same"] == theirs["same"]
    assert result["wins"] == {"ours": {"theirs": 309}, "theirs": {"ours": 84}}
    assert ours["good"]["ci_low"] < 0.464 < ours["good"]["ci_high"]


def test_a_model_that_never_loses_has_a_finite_rating_and_a_sentence_says_why():
    result = rated(votes_of(model_a=9))
    assert rating(result, "ours")["rating"] - rating(result, "theirs")["rating"] == pytest.approx(
        400 * math.log10(9.5 / 0.5), abs=1e-5
    )
    assert "ours never lost and theirs never won" in result["prior"] and result["prior"] in as_markdown(result)
    assert rating(result, "ours")["ci_low"] is None and result["pairs"][0]["good"]["ci_low"] == pytest.approx(
        0.70, abs=0.01
    )
    three = [vote(a="a", b="b"), vote(a="b", b="a"), vote(a="b", b="c", prompt="p1")]
    assert "c never won" in rated(three)["prior"]


def test_ratings_without_a_prior_exist_where_wins_lead_from_each_to_each():
    circle = np.roll(np.eye(5), 1, axis=1)
    broken = circle.copy()
    broken[4, 0] = 0
    assert strongly_connected(np.stack([circle, broken])).tolist() == [True, False]
    assert ratings(circle, circle + circle.T > 0) == pytest.approx(np.full(5, 1000.0))


def test_models_that_were_never_compared_are_not_rated_together():
    with pytest.raises(UserError, match=r"\(a, b; c, d\): add votes between"):
        rated([vote(a="a", b="b"), vote(a="d", b="c")])


def test_neither_the_order_of_votes_nor_of_the_two_models_matters():
    votes = drawn({"a": 1100, "b": 1000, "c": 900}, 30, 3, random.Random(5))
    other = {"model_a": "model_b", "model_b": "model_a"}
    turned = [v._replace(model_a=v.model_b, model_b=v.model_a, winner=other[v.winner]) for v in reversed(votes)]
    assert rated(turned, resamples=50) == rated(votes, resamples=50)
    assert rated(votes, resamples=50, seed=1) != rated(votes, resamples=50)


def test_votes_on_one_prompt_have_no_intervals():
    result = rated([vote(seed=1), vote("model_b", seed=2)])
    assert rating(result, "ours")["ci_low"] is None
    assert "no intervals" in as_markdown(result)


def test_the_file_becomes_tables(tmp_path):
    names = {"a": "we <b>", "b": "they|them", "c": "others"}
    votes = [
        v._replace(model_a=names[v.model_a], model_b=names[v.model_b])
        for v in drawn({"a": 1100, "b": 1000, "c": 900}, 30, 3, random.Random(5))
    ]
    source = tmp_path / "votes.jsonl"
    source.write_text("\n".join(json.dumps(v._asdict()) for v in votes) + "\n\n")
    result = preference(source, tmp_path / "out")
    assert json.loads((tmp_path / "out/preference.json").read_text()) == result
    page, text = ((tmp_path / "out" / f"preference.{end}").read_text() for end in ("html", "md"))
    assert page == as_page(result) and text == as_markdown(result)
    assert "we &lt;b&gt;" in page and "<b>" not in page and "they\\|them" in text
    best = result["ratings"][0]
    shown = f"{best['rating']:.0f} [{best['ci_low']:.0f}, {best['ci_high']:.0f}] | {best['votes']} |"
    assert best["model"] == names["a"] and f"| we \\<b> | {shown}" in text


GOOD = vote()._asdict()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({key: value for key, value in GOOD.items() if key != "seed"}, "line 2: the key seed is missing"),
        ({**GOOD, "voter": "x"}, "line 2: the key voter is unknown"),
        ({**GOOD, "winner": "ours"}, "line 2: winner must be one of model_a, model_b, tie, both_bad, not 'ours'"),
        ({**GOOD, "model_b": "ours"}, "line 2: model_a and model_b are both 'ours'"),
        ({**GOOD, "prompt_id": 7}, "line 2: prompt_id must be a text, and not empty, not 7"),
        ({**GOOD, "seed": True}, "line 2: seed must be a whole number, not true"),
        ({**GOOD, "timestamp": "yesterday"}, "line 2: timestamp must be a time such as"),
        (GOOD, "line 2 is the same vote as line 1"),
        ([1], "line 2 must hold a JSON object"),
    ],
)
def test_a_bad_line_is_named_with_its_key(tmp_path, line, told):
    path = tmp_path / "votes.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(line)}\n")
    with pytest.raises(UserError) as caught:
        read_votes(path)
    assert told in str(caught.value)


def test_a_file_without_votes_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_votes(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no votes"):
        read_votes(tmp_path / "empty.jsonl")
