"""Two models on the same prompts: how much one is better, with an interval from the prompts' own differences.

Prompts are drawn once for both models, so what is hard for both cancels out: the interval is far narrower than those of
the two scores suggest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student

from evaluation.benchmarks import geneval
from evaluation.report.results import Prompt

# How much a prompt counts, where it is not one as all others: by the units that the score is pooled over.
WEIGHTS: Mapping[str, Callable[[Prompt], float]] = {
    "cvtg2k": lambda line: sum(verdict["total_words"] for verdict in line["verdicts"]),
    "longtext": lambda line: sum(verdict["gt_count"] for verdict in line["verdicts"]),
}
BY_TASK = ("geneval", "tinyworld")  # whose score is the unweighted mean of tasks
NOT_THE_HEADLINE = ("oneig",)  # whose score is no mean over prompts


class Pair(NamedTuple):
    """One prompt's scores of two models."""

    stratum: str  # task over which scores are averaged first, "" where there are none
    prompt: str  # its text; what has the same text is one prompt
    weight: float
    first: float
    second: float


class Difference(NamedTuple):
    """Second less first. The interval, of 95 %, is None where the prompts do not show how much they vary."""

    value: float
    low: float | None
    high: float | None


def common(first: Sequence[Prompt], second: Sequence[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """The lines of the prompts that both have, in the first one's order."""
    others = {(line["prompt_id"], line["prompt"]): line for line in second}
    keys = [(line, (line["prompt_id"], line["prompt"])) for line in first]
    return [(line, others[key]) for line, key in keys if key in others]


def pairs_of(benchmark: str, lines: Sequence[tuple[Prompt, Prompt]]) -> list[Pair]:
    """The prompts' scores, weighed so that `paired_difference` is that of the benchmark's own scores (mode fixed).

    OneIG's score is of five dimensions, each over other prompts: there each prompt counts the same.
    """
    weight = WEIGHTS.get(benchmark, lambda line: 1.0)
    found = []
    for first, second in lines:
        task = first["group"] if benchmark in BY_TASK else ""
        if not task or task in geneval.TASKS:  # TinyWorld's words are not in its score
            found.append(Pair(task, first["prompt"], weight(first), first["score"], second["score"]))
    return found


def paired_difference(pairs: Sequence[Pair]) -> Difference | None:
    """The mean over the strata of the weighted mean differences; None without pairs.

    Interval: Student's t with the jackknife's variance over the prompts of every stratum (Efron & Stein 1981) and
    Welch's and Satterthwaite's degrees of freedom. For prompts of one weight in one stratum it is that of the paired
    t test.
    """
    strata: dict[str, dict[str, tuple[float, float]]] = {}
    for pair in pairs:
        prompts = strata.setdefault(pair.stratum, {})
        gained, weight = prompts.get(pair.prompt, (0.0, 0.0))
        prompts[pair.prompt] = (gained + pair.weight * (pair.second - pair.first), weight + pair.weight)
    if not strata:
        return None
    parts = [mean_and_variance(list(prompts.values())) for prompts in strata.values()]
    value = math.fsum(mean for mean, _, _ in parts) / len(parts)
    variances = [variance / len(parts) ** 2 for _, variance, _ in parts]
    numbers = [number for _, _, number in parts]
    if min(numbers) < 2 or sum(variances) == 0:
        return Difference(value, None, None)
    freedom = sum(variances) ** 2 / sum(v**2 / (n - 1) for v, n in zip(variances, numbers, strict=True))
    half = float(student.ppf(0.975, freedom)) * math.sqrt(sum(variances))
    return Difference(value, value - half, value + half)


def over_runs(changes: Sequence[float]) -> Difference:
    """The mean change of runs that differ in nothing but their seed, with the interval of the paired t test."""
    found = paired_difference([Pair("", f"run {number}", 1.0, 0.0, change) for number, change in enumerate(changes)])
    if found is None:
        raise ValueError("no runs, no change")
    return found


def mean_and_variance(prompts: Sequence[tuple[float, float]]) -> tuple[float, float, int]:
    """(Σ gained / Σ weight, its variance by leaving out one prompt after the other, the number of prompts)."""
    gained, weight = (math.fsum(column) for column in zip(*prompts, strict=True))
    number = len(prompts)
    if number < 2:
        return gained / weight, 0.0, number
    without = [(gained - own) / (weight - own_weight) for own, own_weight in prompts]
    centre = math.fsum(without) / number
    squares = math.fsum((value - centre) ** 2 for value in without if abs(value - centre) > 1e-12)
    return gained / weight, squares * (number - 1) / number, number


def settings_that_differ(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Sentences on what else than the model differs between two results: judges, slices, how pictures were made."""
    told = []
    for role in sorted(first["judges"].keys() | second["judges"].keys()):
        judges = [result["judges"].get(role) for result in (first, second)]
        names = [f"{judge['model']} ({judge['revision']})" if judge else "none" for judge in judges]
        if judges[0] != judges[1]:
            same = " with other settings or library versions" if names[0] == names[1] else ""
            told.append(f"The {role} differs{same}: {' and '.join(dict.fromkeys(names))}.")
    if first["slice"] != second["slice"]:
        told.append("They were evaluated on different parts of the benchmark: only prompts of both are compared.")
    for key in sorted(first["pictures"].keys() | second["pictures"].keys()):
        values = [result["pictures"].get(key, "not given") for result in (first, second)]
        if key == "sizes":  # not how many pictures have them
            values = [", ".join(sorted(result["pictures"].get(key, ()))) for result in (first, second)]
        if values[0] != values[1] and key not in ("model", "images"):
            told.append(f"Pictures differ in {key}: {values[0]} and {values[1]}.")
    return told
