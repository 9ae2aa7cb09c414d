"""The tables of a report, as rows of texts that both pages show."""

from collections.abc import Mapping, Sequence
from typing import Any

from zimage_lit.tables import with_interval

NONE = "–"
NONE_WORST = "Every picture of {} that is there is all right: there is no worst prompt to show."
Contents = Mapping[str, Any]  # see contents.py


def verdict(result: Contents) -> str:
    return "comparable" if result["comparable"]["verdict"] else "not comparable"


def score_cell(benchmark: Contents, row: Contents) -> str:
    """The score of mode official, and in a second line that of mode fixed where it is another."""
    official = score_text(benchmark, row["official"])
    return f"{official}\nfixed: {score_text(benchmark, row['fixed'])}" if row["differs"] else official


def score_text(benchmark: Contents, score: Contents | None) -> str:
    if score is None:
        return NONE
    return with_interval(score["score"], score["ci_low"], score["ci_high"], benchmark["digits"], benchmark["times"])


def published_text(benchmark: Contents, number: float | None) -> str:
    return NONE if number is None else f"{number:.{benchmark['published']['digits']}f}"


def anchors_with_numbers(benchmark: Contents) -> list[Contents]:
    return [anchor for anchor in benchmark["published"]["anchors"] if anchor["overall"] is not None]


def summary_table(contents: Contents) -> list[list[str]]:
    """A row a benchmark: the overall scores of all models, each with its verdict, and the published ones."""
    models = contents["models"]
    anchors = list(
        dict.fromkeys(anchor["model"] for one in contents["benchmarks"] for anchor in anchors_with_numbers(one))
    )
    rows = [["benchmark", *models, *anchors]]
    for benchmark in contents["benchmarks"]:
        ours = {result["model"]: result for result in benchmark["results"]}
        published = {anchor["model"]: anchor["overall"] for anchor in anchors_with_numbers(benchmark)}
        cells = [
            f"{score_cell(benchmark, ours[model]['scores'][0])}\n{verdict(ours[model])}" if model in ours else NONE
            for model in models
        ]
        rows.append(
            [benchmark["title"], *cells, *(published_text(benchmark, published.get(anchor)) for anchor in anchors)]
        )
    return rows


def score_table(benchmark: Contents, detail: bool) -> list[list[str]]:
    """A row a score, either the main ones or those in detail; the published numbers stand on the right."""
    anchors = [] if detail else anchors_with_numbers(benchmark)
    by_model = {result["model"]: {row["name"]: row for row in result["scores"]} for result in benchmark["results"]}
    names = list(
        dict.fromkeys(name for rows in by_model.values() for name, row in rows.items() if row["detail"] == detail)
    )
    table = [["score", *by_model, *(anchor["model"] for anchor in anchors)]]
    for name in names:
        ours = [score_cell(benchmark, rows[name]) if name in rows else NONE for rows in by_model.values()]
        numbers = [anchor["overall"] if name == "overall" else anchor["scores"].get(name) for anchor in anchors]
        table.append([name, *ours, *(published_text(benchmark, number) for number in numbers)])
    return table


def judge_table(results: Sequence[Contents]) -> list[list[str]]:
    """A row a judge: who judged which model's pictures, and why it is not the official one."""
    rows = [["role", "judge", "model", "revision", "differs from the official judge", "settings", "library versions"]]
    for result in results:
        for role, judge in sorted(result["judges"].items()):
            row = [
                role,
                judge["judge"].rpartition(".")[2],
                judge["model"],
                judge["revision"],
                judge["differs"] or "no",
                listed(judge["settings"]),
                listed(judge["versions"]),
            ]
            if row not in rows:
                rows.append(row)
    return rows


def setting_table(results: Sequence[Contents]) -> list[list[str]]:
    """How the pictures were made, and in which libraries: a row a setting, a column a model."""
    names = list(dict.fromkeys(name for result in results for name in result["pictures"]))
    versions = list(dict.fromkeys(name for result in results for name in result["versions"]))
    return [
        ["setting", *(result["model"] for result in results)],
        *([name, *(told(result["pictures"].get(name, NONE)) for result in results)] for name in names),
        *(
            [f"version of {name}", *(told(result["versions"].get(name, NONE)) for result in results)]
            for name in versions
        ),
    ]


def difference_sentence(benchmark: Contents, difference: Contents) -> str:
    """By how much a model differs from the first, and on how many prompts."""
    if difference["difference"] is None:
        return f"{difference['model']} and {difference['against']} have no prompt in common."
    low, high = difference["ci_low"], difference["ci_high"]
    value = with_interval(difference["difference"], low, high, benchmark["digits"], benchmark["times"])
    sign = "+" if difference["difference"] > 0 else ""
    if low is None:
        conclusion = "; these prompts do not show how much it varies, so there is no interval"
    elif low > 0 or high < 0:
        conclusion = ""
    else:
        conclusion = "; the interval holds 0, so neither is shown to be better"
    return (
        f"{difference['model']} less {difference['against']}: {sign}{value}{conclusion}. Of {difference['prompts']} "
        f"prompts it is better on {difference['better']}, worse on {difference['worse']}, and alike on "
        f"{difference['alike']}."
    )


def listed(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {told(value)}" for name, value in settings.items()) or NONE


def told(value: Any) -> str:
    if isinstance(value, Mapping):
        return listed(value)
    return "none" if value is None else str(value)
