"""What the benchmarks' scoring shares: raw counts by prompt, and scores with intervals clustered by prompt.

Counts are whole numbers. Fractions enter as multiples of 2^-50 (see `exact`), below the rounding of a float, so that no
order of adding, no shard and no rank changes a sum in its last digit.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

Mode = Literal["official", "fixed"]
Row = tuple[str, ...]  # what a count belongs to: groups first, the prompt last
Table = Mapping[Row, Mapping[str, int]]
INTERVAL = "95 % Wilson, clustered by prompt"
_Z95 = 1.959963984540054  # standard normal quantile of a 95 % interval
_QUANTUM = 2.0**-50


@dataclass(frozen=True)
class Count:
    """What one record adds to a row: whole numbers by column."""

    row: Row
    values: Mapping[str, int]
    lost: bool = False  # of a picture that is missing or broken


class Scored(NamedTuple):
    """A record's verdict, for people and audits, and what it adds to the counts."""

    verdict: dict[str, Any]
    counts: list[Count]


class Tally:
    """Raw counts by row and column, of judged and of lost pictures apart. Its size does not grow with the pictures."""

    def __init__(self) -> None:
        self._judged: dict[Row, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._lost: dict[Row, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def add(self, count: Count) -> None:
        row = (self._lost if count.lost else self._judged)[count.row]
        for column, value in count.values.items():
            row[column] += value

    def table(self) -> Table:
        """Rows in order, lost pictures among them: they count, and add nothing to what is right."""
        both: dict[Row, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for part in (self._judged, self._lost):
            for row, values in part.items():
                for column, value in values.items():
                    both[row][column] += value
        return dict(sorted(both.items()))

    def judged(self) -> Table:
        """Rows in order as if the lost pictures had not been asked for."""
        return dict(sorted(self._judged.items()))

    def lost(self) -> Table:
        return dict(sorted(self._lost.items()))


def exact(value: float) -> int:
    """A fraction as a whole number of 2^-50, to be added without rounding; ValueError for NaN and infinities."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no score: mark a picture that could not be judged as lost.")
    return round(value / _QUANTUM)


def inexact(value: int) -> float:
    """The fraction that `exact` made a whole number."""
    return value * _QUANTUM


def check_mode(benchmark: str, mode: str) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"{benchmark} scores in mode official or fixed, not {mode!r}.")


def score_records(
    benchmark: str,
    records: Iterable[Mapping[str, Any]],
    mode: Mode,
    count: Callable[[Mapping[str, Any], Mode], Scored],
    summary: Callable[[Tally, Mode], dict[str, Any]],
) -> dict[str, Any]:
    """A benchmark's result over records: its summary of the counts, and each record's verdict, in order.

    ValueError, with the number of the record, for records that cannot be scored.
    """
    check_mode(benchmark, mode)
    tally, verdicts = Tally(), []
    for index, record in enumerate(records):
        try:
            scored = count(record, mode)
        except ValueError as error:
            raise ValueError(f"{benchmark} record {index} {error}") from None
        verdicts.append(scored.verdict)
        for part in scored.counts:
            tally.add(part)
    if not verdicts:
        raise ValueError(f"{benchmark} has nothing to score: the list of records is empty.")
    return {**summary(tally, mode), "records": verdicts}


def summarized(
    benchmark: str,
    mode: Mode,
    tally: Tally,
    scores: Callable[[Table], dict[str, Any]],
    name: Callable[[Row], str] = lambda row: row[-1],
) -> dict[str, Any]:
    """The frame of a result: `benchmark`, `mode`, what `scores` makes of the counts, `interval`, and `lost`.

    `lost` tells what is missing or broken, which counts as 0 in all scores above: `images` in all, `prompts` with the
    number of each by `name`, and `scores_if_skipped`: the scores had these pictures not been asked for, which is what
    the originals' code reports, for it leaves them out without a word (empty when nothing is left).
    """
    lost: dict[str, int] = {}
    for row, values in tally.lost().items():
        lost[name(row)] = max(lost.get(name(row), 0), values.get("images", 0))
    skipped = scores(tally.judged()) if tally.judged() else {}
    return {
        "benchmark": benchmark,
        "mode": mode,
        **scores(tally.table()),
        "interval": INTERVAL,
        "lost": {
            "images": sum(lost.values()),
            "prompts": lost,
            "scores_if_skipped": {key: score["score"] for key, score in skipped.get("scores", {}).items()},
        },
    }


def require(record: Mapping[str, Any], *fields: str) -> None:
    """ValueError that names the first field that a record lacks."""
    for field in fields:
        if field not in record:
            raise ValueError(f"has no {field!r}: give {', '.join(fields)}.")


def check_questions(dependency: Mapping[str, Any], answers: Iterable[Mapping[str, Any] | None]) -> None:
    """ValueError for questions that are not numbered by strings, and for answers to other questions."""
    for question in dependency:
        if not isinstance(question, str):
            raise ValueError(f"has question {question!r} by a number: name it by a string, as in the official files.")
    for given in answers:
        if given is not None and given.keys() != dependency.keys():
            raise ValueError("has answers to other questions than its dependency has.")


def clustered(
    clusters: Sequence[Sequence[float]],
    statistic: Callable[[Sequence[float]], float],
    number: int,
    bounds: tuple[float, float] = (0.0, 1.0),
    at_most: float = math.inf,
) -> dict[str, float | int]:
    """A score with its 95 % interval: `score`, `n` (= `number`, what it is taken over), `ci_low`, `ci_high`.

    `clusters` are a prompt each: the numbers whose sums over the prompts `statistic` makes the score of. The variance
    is the jackknife's over prompts (Efron & Stein 1981). The interval is Wilson's, for the share of the way between
    `bounds` that the score has gone, with as many draws as have that variance: it keeps within them, and is as good
    near them. As many draws as prompts are taken where the variance cannot be seen (one prompt, or all alike), and
    `at_most` that many where the score is a share of single things.
    """
    totals = [math.fsum(column) for column in zip(*clusters, strict=True)]
    score = statistic(totals)
    low, high = bounds
    share = min(max((score - low) / (high - low), 0.0), 1.0)
    variance = _jackknife_variance(clusters, totals, statistic) / (high - low) ** 2
    draws = share * (1 - share) / variance if variance > 0 and 0 < share < 1 else len(clusters)
    ci_low, ci_high = wilson_interval(share, min(draws, at_most))
    return {"score": score, "n": number, "ci_low": low + ci_low * (high - low), "ci_high": low + ci_high * (high - low)}


def mean_of_scores(scores: Sequence[Mapping[str, float | int]]) -> dict[str, float]:
    """Unweighted mean, as `overall`, `ci_low` and `ci_high`; squares and adds the half widths (Newcombe's MOVER)."""
    overall = sum(score["score"] for score in scores) / len(scores)
    below = math.sqrt(sum((score["score"] - score["ci_low"]) ** 2 for score in scores)) / len(scores)
    above = math.sqrt(sum((score["ci_high"] - score["score"]) ** 2 for score in scores)) / len(scores)
    return {"overall": overall, "ci_low": overall - below, "ci_high": overall + above}


def mean_of_prompts(prompts: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)) -> dict[str, float | int]:
    """The plain mean of prompts' scores, `n` of them, with its interval (see `clustered`)."""
    return clustered([(score, 1) for score in prompts], lambda sums: sums[0] / sums[1], len(prompts), bounds)


def _jackknife_variance(
    clusters: Sequence[Sequence[float]], totals: Sequence[float], statistic: Callable[[Sequence[float]], float]
) -> float:
    if len(clusters) < 2:
        return 0.0
    left_out = [statistic([t - c for t, c in zip(totals, cluster, strict=True)]) for cluster in clusters]
    mean = math.fsum(left_out) / len(left_out)
    # rounding in the sums must not pass for a variance
    squares = math.fsum((value - mean) ** 2 for value in left_out if abs(value - mean) > 1e-12)
    return squares * (len(clusters) - 1) / len(clusters)


def wilson_interval(share: float, number: float) -> tuple[float, float]:
    """95 % Wilson score interval of a share seen in `number` independent draws (Wilson 1927)."""
    squared = _Z95**2 / number
    centre = (share + squared / 2) / (1 + squared)
    half = math.sqrt(squared * (share * (1 - share) + squared / 4)) / (1 + squared)
    return max(centre - half, 0.0), min(centre + half, 1.0)
