"""Which pictures of one prompt make pairs: pure functions of their scores, without a model or a file.

Only what can be measured decides: one objective reward says how far the winner is ahead, further judges must confirm
it, and other qualities must be alike, so that a pair differs in one thing. After Z-Image's report, section on offline
DPO (objective dimensions only; moderate margins before large and subtle ones).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from zimage_lit.errors import UserError, at_least_one

Scores = Mapping[str, float | None]  # of the rewards that apply to the prompt; None: could not judge
Couple = tuple[int, int]  # places of a winner and a loser among a prompt's samples
DECIMALS = 6  # of scores and margins: float32 says 0.699999988 where a setting says 0.7

# What became of a picture, in the words of the summary. Where it is in no pair, the hurdle at which the best of its
# couples fell, counted by `hurdles_taken`.
PAIRED = "in a pair"
NOT_JUDGED = "not judged by"
IDENTICAL = "identical to an earlier one"
TOO_HARD = "of a prompt that too few pictures pass"
TOO_EASY = "of a prompt that too many pictures pass"
HURDLES = (
    "without another picture of its prompt",
    "in no couple whose winner passes",
    "with no margin in the band",
    "with judges that disagree",
    "with other qualities that differ",
    "left over: its partners are in other pairs",
)


@dataclass(frozen=True)
class PairRules:
    """What makes a pair; the fields are settings of `lightning run pairs` and documented there."""

    objective: str
    winner_at_least: float
    margin: tuple[float, float]
    margin_scale: float
    agree: Mapping[str, float]
    matched: Mapping[str, float]
    pass_rate: tuple[float, float]
    pairs_per_prompt: int

    def __post_init__(self) -> None:
        low, high = self.margin
        if not 0 < low <= high <= 1:
            raise UserError(f"margin must be [low, high] with 0 < low <= high <= 1, not [{low}, {high}].")
        if not self.margin_scale > 0:
            raise UserError(f"margin_scale must be more than 0, not {self.margin_scale}.")
        low, high = self.pass_rate
        if not 0 <= low <= high <= 1:
            raise UserError(f"pass_rate must be [low, high] with 0 <= low <= high <= 1, not [{low}, {high}].")
        at_least_one("pairs_per_prompt", self.pairs_per_prompt)
        for name, largest in self.matched.items():
            if not largest >= 0:
                raise UserError(f"matched.{name} is a largest difference and must be 0 or more, not {largest}.")
        roles = [self.objective, *self.agree, *self.matched]
        for name in roles:
            if roles.count(name) > 1:
                raise UserError(
                    f"the reward {name} can be only one of objective, agree and matched: leave it in one of them."
                )

    @property
    def needed(self) -> tuple[str, ...]:
        """The rewards without whose judgement a picture makes no pair."""
        return (self.objective, *self.agree, *self.matched)


@dataclass(frozen=True)
class Sample:
    """A picture: its scores, and something that only an identical picture has as well."""

    scores: Scores
    picture: str


@dataclass(frozen=True)
class Pair:
    """Places of two samples, and the difference of their objective scores over the scale, in (0, 1]."""

    winner: int
    loser: int
    margin: float


@dataclass(frozen=True)
class Selection:
    """The pairs of a prompt; what became of each sample (see HURDLES and above); 1 − the share of the judged samples
    that pass, None where none was judged."""

    pairs: tuple[Pair, ...]
    outcomes: tuple[str, ...]
    difficulty: float | None


def select_pairs(samples: Sequence[Sample], rules: PairRules, lot: str) -> Selection:
    """The pairs of one prompt's samples.

    Of all couples that take every hurdle those with the most alike other qualities come first, equals in the order of
    a lot that depends on `lot` and the couple alone; no picture is in two pairs.
    """
    outcomes = first_looks(samples, rules)
    judged = [sample for sample in samples if unjudged(sample, rules) is None]
    if not judged:
        return Selection((), tuple(outcomes), None)
    rate = sum(passes(sample, rules) for sample in judged) / len(judged)
    usable = [place for place, outcome in enumerate(outcomes) if not outcome]
    chosen: list[Couple] = []
    if rules.pass_rate[0] <= rate <= rules.pass_rate[1]:
        fitting, hurdles = judged_couples(samples, usable, rules)
        unlike = {couple: mismatch(samples[couple[0]], samples[couple[1]], rules) for couple in fitting}
        fitting.sort(key=lambda couple: (unlike[couple], drawn_lot(lot, couple)))
        chosen = disjoint(fitting, rules.pairs_per_prompt)
        reasons = {place: HURDLES[hurdles[place]] for place in usable}
        reasons |= {place: PAIRED for couple in chosen for place in couple}
    else:
        reasons = dict.fromkeys(usable, TOO_HARD if rate < rules.pass_rate[0] else TOO_EASY)
    final = [reasons.get(place, outcome) for place, outcome in enumerate(outcomes)]
    pairs = [Pair(*couple, margin_of(samples[couple[0]], samples[couple[1]], rules)) for couple in chosen]
    return Selection(tuple(pairs), tuple(final), round(1 - rate, DECIMALS))


def judged_couples(
    samples: Sequence[Sample], usable: Sequence[int], rules: PairRules
) -> tuple[list[Couple], dict[int, int]]:
    """(couples that take every hurdle; place of each usable sample -> hurdles that the best of its couples takes)."""
    fitting: list[Couple] = []
    best = dict.fromkeys(usable, 0)
    for couple in permutations(usable, 2):
        taken = hurdles_taken(samples[couple[0]], samples[couple[1]], rules)
        if taken == len(HURDLES) - 1:
            fitting.append(couple)
        for place in couple:
            best[place] = max(best[place], taken)
    return fitting, best


def first_looks(samples: Sequence[Sample], rules: PairRules) -> list[str]:
    """Why each sample cannot be in a pair whatever the others are; "" where it can."""
    outcomes, seen = [], set()
    for sample in samples:
        name = unjudged(sample, rules)
        outcome = f"{NOT_JUDGED} {name}" if name else IDENTICAL if sample.picture in seen else ""
        if name is None:
            seen.add(sample.picture)
        outcomes.append(outcome)
    return outcomes


def unjudged(sample: Sample, rules: PairRules) -> str | None:
    """The first needed reward that could not judge a sample, if any."""
    return next((name for name in rules.needed if name in sample.scores and sample.scores[name] is None), None)


def score_of(sample: Sample, name: str) -> float:
    """A score that is known to be there."""
    score = sample.scores[name]
    assert score is not None
    return score


def applying(names: Iterable[str], sample: Sample) -> list[str]:
    """Those of the rewards that apply to the sample's prompt."""
    return [name for name in names if name in sample.scores]


def passes(sample: Sample, rules: PairRules) -> bool:
    """Whether the objective and all that must agree with it call a judged picture right."""
    right = score_of(sample, rules.objective) >= rules.winner_at_least
    return right and all(score_of(sample, name) >= rules.agree[name] for name in applying(rules.agree, sample))


def margin_of(winner: Sample, loser: Sample, rules: PairRules) -> float:
    difference = score_of(winner, rules.objective) - score_of(loser, rules.objective)
    return round(difference / rules.margin_scale, DECIMALS)


def hurdles_taken(winner: Sample, loser: Sample, rules: PairRules) -> int:
    """How many hurdles this couple takes, each of them only if it took those before, 1 to len(HURDLES) - 1; it takes
    the first one by being two pictures."""
    if score_of(winner, rules.objective) < rules.winner_at_least:
        return 1
    if not rules.margin[0] <= margin_of(winner, loser, rules) <= rules.margin[1]:
        return 2
    for name in applying(rules.agree, winner):
        first, second = score_of(winner, name), score_of(loser, name)
        if first < rules.agree[name] or first <= second:
            return 3
    for name in applying(rules.matched, winner):
        if difference_in(name, winner, loser) > rules.matched[name]:
            return 4
    return 5


def difference_in(name: str, first: Sample, second: Sample) -> float:
    return round(abs(score_of(first, name) - score_of(second, name)), DECIMALS)


def mismatch(winner: Sample, loser: Sample, rules: PairRules) -> float:
    """How unlike two pictures are in what should be alike: the sum of the differences over the largest allowed ones."""
    limits = {name: rules.matched[name] for name in applying(rules.matched, winner) if rules.matched[name] > 0}
    return sum(difference_in(name, winner, loser) / limit for name, limit in limits.items())


def drawn_lot(lot: str, couple: Couple) -> bytes:
    return hashlib.blake2b(f"{lot}/{couple[0]}/{couple[1]}".encode(), digest_size=8).digest()


def disjoint(couples: Sequence[Couple], most: int) -> list[Couple]:
    """The first couples, `most` at the most, that share no picture with one before them."""
    chosen: list[Couple] = []
    used: set[int] = set()
    for couple in couples:
        if len(chosen) < most and used.isdisjoint(couple):
            chosen.append(couple)
            used.update(couple)
    return chosen
