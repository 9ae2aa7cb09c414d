"""`lightning run evaluate benchmark=preference votes=FILE`: who is preferred to whom, and how often.

output/preference.json    ratings, rates of every pair, wins, counts
output/preference.md      the same as tables
output/preference.html    the same as a page

Nothing in them depends on the order of the votes.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.benchmarks.tally import clustered
from evaluation.preference.bradley_terry import (
    CENTRE,
    PRIOR_TIES,
    SCALE,
    connected,
    interval,
    ratings,
    resampled_ratings,
    strongly_connected,
)
from evaluation.preference.votes import Vote, read_votes
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.files import write_atomically
from zimage_lit.pages import document
from zimage_lit.tables import STYLE, html_table, markdown_table, markdown_text, with_interval

RESULTS_OF = {  # rate -> how the model fared in the votes that count for it
    "good": ("good",),
    "same": ("tie", "both_bad"),
    "bad": ("bad",),
    "good_or_same": ("good", "tie", "both_bad"),
}
DECIMALS = 6  # of ratings in the file: beyond them, machines differ
INTERVALS = "95 %: ratings by the bootstrap over prompts, rates by Wilson's interval clustered by prompt"
EXPLANATION = (
    f"Bradley–Terry ratings: {SCALE:.0f} points are odds of ten to one, the mean of the models here is {CENTRE:.0f}; "
    "they compare these models with each other and not with ratings of other arenas. Ties and pairs of which both are "
    f"bad count as half a win for each. Intervals: {INTERVALS}."
)


class Outcome(NamedTuple):
    """How a model fared in one vote."""

    prompt_id: str
    result: str  # good, tie, both_bad, bad


def preference(votes: Path, output: Path, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Reads the votes, writes what they say below `output`, and returns it (see `rated`).

    resamples, seed: of the bootstrap. UserError for a file that is no file of votes (with the line and the key), and
    for models that were never compared, not even through others.
    """
    at_least_one("resamples", resamples)
    result = rated(read_votes(Path(votes)), resamples, seed)
    output = Path(output)
    write_atomically(output / "preference.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_atomically(output / "preference.md", as_markdown(result))
    write_atomically(output / "preference.html", as_page(result))
    return result


def rated(votes: Sequence[Vote], resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """What the votes say.

    `ratings`: the models, best first, each with `rating`, `ci_low` and `ci_high` (None for votes on one prompt, and
    with a prior), `votes` and the number of `wins`, `losses` and of votes for `neither`; `prior`: how ratings were kept
    finite, empty where they are so by themselves; `pairs`: for every model against every other the rates of RESULTS_OF,
    each with score, n, ci_low and ci_high, and `votes`, `tie`, `both_bad` (counts); `wins`: model -> other -> votes
    that preferred it; `votes`, `prompts`, `annotators` (counts), `interval`, `resamples`, `seed`.
    """
    models = sorted({name for vote in votes for name in (vote.model_a, vote.model_b)})
    by_prompt = wins_by_prompt(votes, models)
    wins = by_prompt.sum(0)
    compared = wins + wins.T > 0
    check_connected(models, connected(compared))
    found = ratings(wins, compared).round(DECIMALS).tolist()
    ends: Sequence[tuple[float | None, float | None]] = [(None, None)] * len(models)
    prior = prior_sentence(models, wins)
    if len(by_prompt) > 1 and not prior:  # resamples of votes without a loss have none either: they would all agree
        ends = interval(resampled_ratings(by_prompt, compared, resamples, seed).round(DECIMALS))
    outcomes = outcomes_by_pair(votes)
    order = sorted(range(len(models)), key=lambda place: (-found[place], models[place]))
    return {
        "benchmark": "preference",
        "ratings": [
            {
                "model": models[place],
                "rating": found[place],
                "ci_low": ends[place][0],
                "ci_high": ends[place][1],
                **counts_of([found for other in outcomes[models[place]].values() for found in other]),
            }
            for place in order
        ],
        "prior": prior,
        "pairs": [
            {"model": models[a], "against": models[b], **rates(outcomes[models[a]][models[b]])}
            for a in order
            for b in order
            if compared[a, b]
        ],
        "wins": {
            models[a]: {models[b]: counts_of(outcomes[models[a]].get(models[b], []))["wins"] for b in order if a != b}
            for a in order
        },
        "votes": len(votes),
        "prompts": len(by_prompt),
        "annotators": len({vote.annotator for vote in votes}),
        "interval": INTERVALS,
        "resamples": resamples,
        "seed": seed,
    }


def wins_by_prompt(votes: Sequence[Vote], models: Sequence[str]) -> np.ndarray:
    """(P, M, M) wins of the row's model over the column's, of each prompt in order; half a win to both for neither."""
    prompts = {name: place for place, name in enumerate(sorted({vote.prompt_id for vote in votes}))}
    place_of = {name: place for place, name in enumerate(models)}
    wins = np.zeros((len(prompts), len(models), len(models)))
    for vote in votes:
        a, b = place_of[vote.model_a], place_of[vote.model_b]
        share = {"model_a": 1.0, "model_b": 0.0}.get(vote.winner, 0.5)
        wins[prompts[vote.prompt_id], a, b] += share
        wins[prompts[vote.prompt_id], b, a] += 1 - share
    return wins


def check_connected(models: Sequence[str], groups: Sequence[Sequence[int]]) -> None:
    """UserError where ratings would compare models that no votes compare."""
    if len(groups) > 1:
        named = "; ".join(", ".join(models[place] for place in group) for group in groups)
        raise UserError(
            f"votes: the models fall into groups that were never compared with each other ({named}): add votes between "
            "them, or rate each group from its own file."
        )


def prior_sentence(models: Sequence[str], wins: np.ndarray) -> str:
    """The sentence about the prior, empty where it is not used."""
    if strongly_connected(wins):
        return ""
    never = [
        *(f"{model} never lost" for model, losses in zip(models, wins.sum(0), strict=True) if losses == 0),
        *(f"{model} never won" for model, won in zip(models, wins.sum(1), strict=True) if won == 0),
    ] or ["some of the models never lost to the others"]
    return (
        f"Ratings are not finite by themselves, because {' and '.join(never)}: {PRIOR_TIES:g} drawn vote was added to "
        "every pair that was compared. How far apart they lie is the doing of that vote, so they have no intervals; "
        "the rates below are without it."
    )


def outcomes_by_pair(votes: Sequence[Vote]) -> dict[str, dict[str, list[Outcome]]]:
    """Model -> other model -> how the first fared in each vote on the two: each vote is in it both ways."""
    found: dict[str, dict[str, list[Outcome]]] = {}
    for vote in votes:
        for model, against in ((vote.model_a, vote.model_b), (vote.model_b, vote.model_a)):
            result = vote.winner
            if result in ("model_a", "model_b"):
                result = "good" if getattr(vote, result) == model else "bad"
            found.setdefault(model, {}).setdefault(against, []).append(Outcome(vote.prompt_id, result))
    return found


def counts_of(outcomes: Sequence[Outcome]) -> dict[str, int]:
    results = [outcome.result for outcome in outcomes]
    wins, losses = results.count("good"), results.count("bad")
    return {"votes": len(results), "wins": wins, "losses": losses, "neither": len(results) - wins - losses}


def rates(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """G/S/B: the shares of the votes on two models in which the first is good, the same or bad beside the other."""
    by_prompt: dict[str, list[str]] = {}
    for outcome in sorted(outcomes):
        by_prompt.setdefault(outcome.prompt_id, []).append(outcome.result)

    def rate(results: Sequence[str]) -> dict[str, float | int]:
        clusters = [(sum(one in results for one in own), len(own)) for own in by_prompt.values()]
        return clustered(clusters, lambda sums: sums[0] / sums[1], len(outcomes), at_most=len(outcomes))

    found = [outcome.result for outcome in outcomes]
    return {
        **{name: rate(results) for name, results in RESULTS_OF.items()},
        "votes": len(found),
        "tie": found.count("tie"),
        "both_bad": found.count("both_bad"),
    }


def tables(result: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """What both pages show: tables with their titles, each with a row of headings first."""
    models = [line["model"] for line in result["ratings"]]
    rating_rows = [["model", "rating", "votes", "wins", "losses", "neither"]] + [
        [
            line["model"],
            with_interval(line["rating"], line["ci_low"], line["ci_high"], 0),
            *(str(line[name]) for name in ("votes", "wins", "losses", "neither")),
        ]
        for line in result["ratings"]
    ]
    rate_rows = [["model", "against", "good, %", "same, %", "bad, %", "G+S, %", "votes", "of them both bad"]] + [
        [
            pair["model"],
            pair["against"],
            *(percent(pair[name]) for name in RESULTS_OF),
            str(pair["votes"]),
            str(pair["both_bad"]),
        ]
        for pair in result["pairs"]
        if models.index(pair["model"]) < models.index(pair["against"])  # the other way round says nothing new
    ]
    wins = result["wins"]
    win_rows = [["wins of … over", *models]] + [
        [model, *("–" if model == other else str(wins[model][other]) for other in models)] for model in models
    ]
    return [("Ratings", rating_rows), ("Good, same, bad", rate_rows), ("Wins", win_rows)]


def percent(rate: Mapping[str, float]) -> str:
    return with_interval(rate["score"], rate["ci_low"], rate["ci_high"], 1, 100)


def sentences(result: dict[str, Any]) -> list[str]:
    counts = f"Votes: {result['votes']}; people: {result['annotators']}; prompts: {result['prompts']}."
    alone = [] if result["prompts"] > 1 else ["Votes on one prompt alone say nothing about others: no intervals."]
    return [counts, *alone, *filter(None, [result["prior"]]), EXPLANATION]


def as_markdown(result: dict[str, Any]) -> str:
    parts = ["# Preference", *map(markdown_text, sentences(result))]
    for title, rows in tables(result):
        parts += [f"## {title}", markdown_table(rows)]
    return "\n\n".join(parts) + "\n"


def as_page(result: dict[str, Any]) -> str:
    parts = ["<h1>Preference</h1>", *(f"<p>{escape(sentence)}</p>" for sentence in sentences(result))]
    for title, rows in tables(result):
        parts.append(f"<h2>{title}</h2>{html_table(rows)}")
    return document("Preference", "".join(parts), STYLE)
