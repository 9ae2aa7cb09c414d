"""Which pictures make pairs: against a brute-force twin, rule by rule, and reason by reason."""

import random
from itertools import permutations
from typing import Any

import pytest

from zimage_lit.errors import UserError
from zimage_lit.pairs import selection
from zimage_lit.pairs.selection import PairRules, Sample, Selection, drawn_lot, select_pairs

SETTINGS: dict[str, Any] = {
    "objective": "exact",
    "winner_at_least": 0.8,
    "margin": (0.2, 0.6),
    "margin_scale": 1.0,
    "agree": {"second": 0.5},
    "matched": {"look": 0.3},
    "pass_rate": (0.1, 0.9),
    "pairs_per_prompt": 3,
}


def rules(**changes: Any) -> PairRules:
    return PairRules(**{**SETTINGS, **changes})


def sample(exact: float | None, second: float | None = 0.5, look: float | None = 0.0, picture: str = "") -> Sample:
    return Sample({"exact": exact, "second": second, "look": look}, picture or f"{exact} {second} {look}")


def of_objective(*scores: float | None, **changes: Any) -> Selection:
    """With the objective alone."""
    samples = [Sample({"exact": score}, str(place)) for place, score in enumerate(scores)]
    return select_pairs(samples, rules(agree={}, matched={}, **changes), "lot")


def drawn(seed: int) -> list[Sample]:
    """Twelve samples of scores on a coarse grid, so that ties, NaN and identical pictures all occur."""
    dice = random.Random(seed)

    def score() -> float | None:
        return None if dice.random() < 0.05 else dice.randint(0, 10) / 10

    return [
        Sample({name: score() for name in ("exact", "second", "look")}, str(dice.randint(0, 30))) for _ in range(12)
    ]


def twin(samples: list[Sample], rules: PairRules, lot: str) -> tuple[list[tuple[int, int]], float | None]:
    """All ordered couples, each condition written out; then the best one that is still free, again and again."""
    table = [[one.scores[name] for name in ("exact", "second", "look")] for one in samples]
    judged = [place for place, row in enumerate(table) if None not in row]
    right = [place for place in judged if table[place][0] >= rules.winner_at_least and table[place][1] >= 0.5]  # type: ignore[operator]
    if not judged:
        return [], None
    rate = len(right) / len(judged)
    if rate < rules.pass_rate[0] or rate > rules.pass_rate[1]:
        return [], 1 - rate
    first = [p for p in judged if not any(samples[q].picture == samples[p].picture for q in judged if q < p)]
    fitting = {}
    for w, loser in permutations(first, 2):
        exact, second, look = (
            round(a - b, 6)  # type: ignore[operator]
            for a, b in zip(table[w], table[loser], strict=True)
        )
        if w in right and rules.margin[0] <= exact <= rules.margin[1] and second > 0 and abs(look) <= 0.3:
            fitting[w, loser] = (abs(look), drawn_lot(lot, (w, loser)))
    pairs: list[tuple[int, int]] = []
    while fitting and len(pairs) < rules.pairs_per_prompt:
        best = min(fitting, key=lambda couple: fitting[couple])
        pairs.append(best)
        fitting = {couple: key for couple, key in fitting.items() if not set(couple) & set(best)}
    return pairs, 1 - rate


def test_selection_equals_its_brute_force_twin() -> None:
    found = 0
    for seed in range(300):
        chosen = rules(winner_at_least=0.5, margin=(0.1, 0.7))
        selected = select_pairs(drawn(seed), chosen, "lot")
        pairs, difficulty = twin(drawn(seed), chosen, "lot")
        assert [(pair.winner, pair.loser) for pair in selected.pairs] == pairs
        assert selected.difficulty == (None if difficulty is None else pytest.approx(difficulty, abs=1e-6))
        assert selected.outcomes.count(selection.PAIRED) == 2 * len(pairs)
        found += len(pairs)
    assert found > 100  # the rules let something through


def test_a_margin_is_the_difference_over_its_scale() -> None:
    counts = of_objective(0.0, -1.0, -3.0, winner_at_least=0.0, margin=(0.2, 0.5), margin_scale=4.0)
    assert [(pair.winner, pair.loser, pair.margin) for pair in counts.pairs] == [(0, 1, 0.25)]
    assert counts.difficulty == pytest.approx(2 / 3, abs=1e-6)
    assert counts.outcomes[2] == "with no margin in the band"


def test_the_edges_of_bands_belong_to_them() -> None:
    """1 − 0.7 is a little more than 0.3 in binary, and 1 of 10 must be enough for 0.1."""
    edge = of_objective(1.0, *[0.7] * 9, margin=(0.3, 0.3))
    assert len(edge.pairs) == 1 and edge.pairs[0].margin == 0.3 and edge.difficulty == 0.9


def test_judges_must_agree_on_the_order_and_on_the_winner() -> None:
    alone = {"matched": {}, "margin": (0.2, 0.6)}
    for winner, loser, count in ((0.6, 0.5, 1), (0.6, 0.6, 0), (0.6, 0.7, 0), (0.4, 0.1, 0)):
        scores = [sample(0.9, winner), sample(0.5, loser), sample(1.0, 0.9, picture="far"), sample(0.1, 0.9)]
        selected = select_pairs(scores, rules(**alone), "lot")
        assert [(p.winner, p.loser) for p in selected.pairs if p.winner == 0] == [(0, 1)] * count
    pair = [sample(0.9, 0.4), sample(0.5, 0.1), sample(1.0, 0.9), sample(0.1, 0.0)]
    assert select_pairs(pair, rules(**alone), "lot").outcomes[0] == "with judges that disagree"


def test_what_does_not_apply_to_a_prompt_has_no_say() -> None:
    samples = [Sample({"exact": 0.9}, "a"), Sample({"exact": 0.5}, "b")]
    assert len(select_pairs(samples, rules(), "lot").pairs) == 1


def test_no_judgement_is_not_a_bad_one() -> None:
    selected = of_objective(0.9, None, 0.5)
    assert [(pair.winner, pair.loser) for pair in selected.pairs] == [(0, 2)]
    assert selected.outcomes[1] == "not judged by exact" and selected.difficulty == 0.5
    silent = select_pairs([sample(0.9, None), sample(0.5), sample(0.9, look=None)], rules(), "lot")
    assert silent.outcomes[0] == "not judged by second" and silent.outcomes[2] == "not judged by look"
    assert of_objective(None, None) == Selection((), ("not judged by exact",) * 2, None)


def test_identical_pictures_are_in_one_pair_at_most() -> None:
    samples = [sample(None, picture="x"), sample(0.9, 0.9, picture="x"), sample(0.9, 0.9, picture="x")]
    selected = select_pairs([*samples, sample(0.5, 0.1), sample(0.4, 0.2)], rules(), "lot")
    assert len(selected.pairs) == 1 and selected.pairs[0].winner == 1  # the first was not judged
    assert selected.outcomes[2] == "identical to an earlier one"


def test_prompts_outside_the_band_are_left_out() -> None:
    assert set(of_objective(*[0.9] * 19, 0.5).outcomes) == {selection.TOO_EASY}
    assert set(of_objective(0.9, *[0.5] * 19).outcomes) == {selection.TOO_HARD}
    assert len(of_objective(*[0.9] * 19, 0.5, pass_rate=(0.1, 1.0)).pairs) == 1


def test_the_most_alike_go_together_and_the_rest_is_left_over() -> None:
    samples = [sample(0.9, 0.9, 0.1), sample(0.5, 0.1, 0.35), sample(0.5, 0.1, 0.2), sample(0.5, 0.1, 0.9)]
    selected = select_pairs(samples, rules(), "lot")
    assert [(pair.winner, pair.loser) for pair in selected.pairs] == [(0, 2)]
    assert selected.outcomes[1] == "left over: its partners are in other pairs"
    assert selected.outcomes[3] == "with other qualities that differ"


def test_no_more_pairs_than_asked_and_another_lot_chooses_others() -> None:
    scores = [0.9] * 10 + [0.5] * 10
    lots = {select_pairs([Sample({"exact": s}, str(i)) for i, s in enumerate(scores)], rules(agree={}, matched={}), lot)
            .pairs for lot in "abcd"}  # fmt: skip
    assert all(len(pairs) == 3 for pairs in lots) and len(lots) > 1


def test_a_picture_alone_is_said_to_be_alone() -> None:
    assert of_objective(0.9, None, pass_rate=(0, 1)).outcomes[0] == "without another picture of its prompt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": (0.0, 1.0)}, r"margin must be \[low, high\] with 0 < low <= high <= 1, not \[0.0, 1.0\]"),
        ({"margin": (0.5, 0.2)}, "margin must be"),
        ({"margin": (0.5, 1.2)}, "margin must be"),
        ({"margin_scale": 0.0}, "margin_scale must be more than 0"),
        ({"pass_rate": (0.5, 1.5)}, "pass_rate must be"),
        ({"pairs_per_prompt": 0}, "pairs_per_prompt must be at least 1"),
        ({"matched": {"look": -0.1}}, "matched.look is a largest difference"),
        ({"agree": {"exact": 1.0}}, "exact can be only one of objective, agree and matched"),
        ({"matched": {"second": 1.0}}, "second can be only one of"),
    ],
)
def test_wrong_rules_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rules(**changes)
