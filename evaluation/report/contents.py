"""All that a report tells, as plain data, which the pages show and `report.json` keeps."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from evaluation.report.anchors import PUBLISHED, Published
from evaluation.report.difference import (
    NOT_THE_HEADLINE,
    common,
    paired_difference,
    pairs_of,
    settings_that_differ,
)
from evaluation.report.results import Prompt, Result
from evaluation.report.words import judges_words

WORST = 8  # prompts that are shown of each result
APART = 6  # prompts that are shown of each pair of models
DETAILS = ("subsets", "subcategories", "sets")  # groups of sub-scores that are many
SAME_AS_OVERALL = {"cvtg2k": "word_accuracy", "longtext": "text_score", "dpg": "dpg"}
REPEATED = ("tasks",)  # of a result: what `scores` has already
NOTHING_PUBLISHED = Published(
    1,
    3,
    "Overall is the mean of GenEval's six tasks; word, a seventh, is no part of it. No numbers are published for this "
    "benchmark.",
    (),
)  # TinyWorld
NO_PHRASE = (
    "a judge that says that there is no text, without the full stop that the original looks for, is taken for text by "
    "the original (official) and is not by the rule as it is meant (fixed)"
)
WHY_MODES_DIFFER = {
    "longtext": NO_PHRASE,
    "oneig": NO_PHRASE,
    "dpg": (
        "the original leaves out the first row of its table, and takes the categories from each prompt's last picture "
        "and from answers as they are (official); the rule as it is meant has all rows, all pictures, and counts a "
        "question as failed where one fails that it depends on (fixed)"
    ),
}


def contents(results: Sequence[Result]) -> dict[str, Any]:
    """`models`: names in order; `benchmarks`: see `benchmark_contents`, in the order of their first result."""
    return {
        "models": list(dict.fromkeys(result.model for result in results)),
        "benchmarks": [
            benchmark_contents([result for result in results if result.key == key])
            for key in dict.fromkeys(result.key for result in results)
        ],
    }


def benchmark_contents(results: Sequence[Result]) -> dict[str, Any]:
    """What is told of one benchmark and language.

    `key`, `title`; `times` and `digits`: how ours are printed; `published`: how papers print theirs, and the anchors;
    `results`: see `result_contents`; `differences`: of every further model from the first, see `difference_contents`.
    """
    first, *others = results
    published = PUBLISHED.get(first.key, NOTHING_PUBLISHED)
    return {
        "key": first.key,
        "title": first.result["title"],
        "times": published.times,
        "digits": published.digits if published.times > 1 else max(published.digits, 3),
        "published": {**asdict(published), "anchors": [asdict(anchor) for anchor in published.anchors]},
        "results": [result_contents(result) for result in results],
        "differences": [difference_contents(first, other) for other in others],
    }


def result_contents(result: Result) -> dict[str, Any]:
    """What is told of one model on one benchmark.

    `scores`: name, `official` and `fixed` (each score, ci_low, ci_high, and n where it has one; None where the mode has
    no such score), `differs`, and whether it is a `detail`; `modes`: a sentence on where they differ; `remarks`:
    sentences; `comparable` with published numbers: verdict and reasons; `worst`: prompts (see `shown`); `lost`: every
    picture that is missing or broken, with the reason; and of result.json `model`, `pictures`, `slice`, `judges`,
    `versions`.
    """
    scores = score_rows(result.result["benchmark"], result.result["scores"])
    copied = ("model", "pictures", "slice", "judges", "versions", "comparable")
    lost = [
        {"prompt_id": line["prompt_id"], "image": number, "reason": image["lost"]}
        for line in result.prompts
        for number, image in enumerate(line["images"])
        if image.get("lost")
    ]
    return {
        **{key: result.result[key] for key in copied},
        "scores": scores,
        "interval": result.result["scores"]["official"]["interval"],
        "modes": modes_sentence(result.result["benchmark"], scores),
        "remarks": remarks(result, len(lost)),
        "lost": lost,
        "worst": [shown(line) for line in worst(result.result["benchmark"], result.prompts)],
    }


def score_rows(benchmark: str, scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The scores of both modes by name, the overall one first."""
    modes = {mode: named_scores(benchmark, summary) for mode, summary in scores.items()}
    rows = []
    for name in dict.fromkeys([*modes["official"], *modes["fixed"]]):
        official, fixed = modes["official"].get(name), modes["fixed"].get(name)
        detail = name.partition("/")[0] in DETAILS
        rows.append(
            {"name": name, "official": official, "fixed": fixed, "differs": official != fixed, "detail": detail}
        )
    return rows


def named_scores(benchmark: str, summary: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Every score of a summary: `overall`, those of `scores` by their own names, others as group/name."""
    overall = {"score": summary["overall"], "ci_low": summary["ci_low"], "ci_high": summary["ci_high"]}
    found: dict[str, dict[str, Any] | None] = {"overall": overall if summary["overall"] is not None else None}
    for group, members in summary.items():
        if group in REPEATED or not isinstance(members, Mapping):
            continue
        for name, score in members.items():
            if isinstance(score, Mapping) and {"score", "ci_low", "ci_high"} <= score.keys():
                if group == "scores" and name == SAME_AS_OVERALL.get(benchmark):
                    continue
                found[name if group == "scores" else f"{group}/{name}"] = dict(score)
    return found


def modes_sentence(benchmark: str, scores: Sequence[Mapping[str, Any]]) -> str:
    differing = [row["name"] for row in scores if row["differs"]]
    if not differing:
        return "The modes official and fixed give the same numbers."
    named = ", ".join(differing[:6]) + (f" and {len(differing) - 6} more" if len(differing) > 6 else "")
    why = WHY_MODES_DIFFER.get(benchmark)
    return f"The modes differ in {named}" + (f": {why}." if why else ".")


def remarks(result: Result, lost: int) -> list[str]:
    """Sentences on the pictures: who made them, the prompts' rewriting, sizes, what is lost. That only a part of the
    prompts was evaluated is among the reasons of `comparable`."""
    told = []
    pictures = result.result["pictures"]
    if pictures.get("source") != "model":
        told.append("The pictures were there already: what is said of how they were made is the user's word.")
    rewriter = pictures.get("prompt_rewriter")
    told.append(f"Prompts were rewritten by {rewriter}." if rewriter else "Prompts were not rewritten.")
    if sizes := pictures.get("sizes"):
        commonest = sorted(sizes, key=lambda size: (-sizes[size], size))
        named = commonest if len(sizes) == 1 else [f"{size} ({sizes[size]:,} of them)" for size in commonest]
        told.append(f"Pictures have {', '.join(named)} pixels.")
    if lost:
        total = sum(len(line["images"]) for line in result.prompts)
        told.append(
            f"{lost:,} of {total:,} pictures are missing or broken and count as 0"
            f"{without_them(result.result['scores'])}."
        )
    return told


def without_them(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """What the scores would be had the lost pictures not been asked for, where that is another number."""
    summary = scores["official"]
    skipped = summary["lost"]["scores_if_skipped"]
    others = {name: score for name, score in skipped.items() if score != summary["scores"][name]["score"]}
    names = {name: "overall" if name == SAME_AS_OVERALL.get(summary["benchmark"]) else name for name in others}
    if not others:
        return ""
    return f" (left out, they would leave {', '.join(f'{names[name]} at {others[name]:.3f}' for name in others)})"


def worst(benchmark: str, prompts: Sequence[Prompt], number: int = WORST) -> list[Prompt]:
    """The prompts of lowest score, below 1, that have a picture; equal ones drawn by lot, the same ones each time.

    OneIG's sets are scored in ways that do not compare: there each set in turn gives its worst.
    """
    drawn = [line for line in prompts if has_picture(line) and line["score"] < 1]
    ranked = sorted(drawn, key=lambda line: (line["score"], lot(line)))
    if benchmark in NOT_THE_HEADLINE:
        rank: Counter[str] = Counter()
        turns = []
        for line in ranked:
            turns.append((rank[line["group"]], line["group"], line))
            rank[line["group"]] += 1
        ranked = [line for _, _, line in sorted(turns, key=lambda turn: turn[:2])]
    return ranked[:number]


def has_picture(line: Prompt) -> bool:
    return not all(image.get("lost") for image in line["images"])


def lot(line: Prompt) -> str:
    return sha256(line["prompt_id"].encode()).hexdigest()


def shown(line: Prompt) -> dict[str, Any]:
    """A prompt as the pages show it, with what the judges said."""
    kept = ("prompt_id", "prompt", "group", "score", "images")
    return {**{key: line[key] for key in kept}, "said": judges_words(line)}


def difference_contents(first: Result, second: Result) -> dict[str, Any]:
    """How a model differs from the first one, prompt by prompt.

    `difference` (second less first, in mode fixed) with `ci_low` and `ci_high`, None without prompts of both; `what` it
    is of; the numbers of `prompts` of both, on which the second is `better`, `worse`, `alike`; `remarks`: what else
    differs; `most`: the prompts with pictures of both on which they differ most, `models` (name -> see `shown`) each.
    """
    lines = common(first.prompts, second.prompts)
    drawn = [pair for pair in lines if all(map(has_picture, pair))]
    benchmark = first.result["benchmark"]
    found = paired_difference(pairs_of(benchmark, lines))
    gains = [b["score"] - a["score"] for a, b in lines]
    apart = sorted(drawn, key=lambda pair: (-abs(pair[1]["score"] - pair[0]["score"]), lot(pair[0])))
    return {
        "model": second.model,
        "against": first.model,
        "difference": found.value if found else None,
        "ci_low": found.low if found else None,
        "ci_high": found.high if found else None,
        "what": what_differs(benchmark, len(lines), first, second),
        "prompts": len(lines),
        "better": sum(gain > 0 for gain in gains),
        "worse": sum(gain < 0 for gain in gains),
        "alike": sum(gain == 0 for gain in gains),
        "remarks": settings_that_differ(first.result, second.result),
        "most": [
            {"prompt_id": a["prompt_id"], "models": {first.model: shown(a), second.model: shown(b)}}
            for a, b in apart[:APART]
            if a["score"] != b["score"]
        ],
    }


def what_differs(benchmark: str, number: int, first: Result, second: Result) -> str:
    """What the difference is of."""
    if benchmark in NOT_THE_HEADLINE:
        return (
            "Mean over prompts of how well each did in what its set is for; it is not the difference of overall scores."
        )
    if number < max(len(first.prompts), len(second.prompts)):
        return "Difference of the overall score (mode fixed) on the prompts that both have."
    return "Difference of the overall score (mode fixed)."
