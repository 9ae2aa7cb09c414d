"""The report of a graph: a row for each stage, with the same prompts drawn, its scores, and what it has changed.

Everything is read from the stages' folders, so the page can be written at any time: a stage that is not finished has a
row without figures.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from evaluation.benchmarks import geneval
from evaluation.drawing import TIMES
from evaluation.report.contents import named_scores
from evaluation.report.difference import (
    BY_TASK,
    WEIGHTS,
    Difference,
    Pair,
    common,
    paired_difference,
    pairs_of,
)
from evaluation.report.results import Prompt, Result, read_result
from zimage_lit.files import read_json
from zimage_lit.graph import OVERALL, SCORES, Graph, Stage
from zimage_lit.grids import labelled_grid
from zimage_lit.pages import document, figure, reduced
from zimage_lit.plots import is_mean_reward, line_plot
from zimage_lit.tables import STYLE as TABLE_STYLE
from zimage_lit.tables import html_table, with_interval
from zimage_lit.tracking import RUN_FILE, SPOOL_FOLDER

CELL = 96  # pixels of a picture in a row
MOST_PROMPTS = 10  # pictures in a row, of as many groups of the benchmark
STYLE = """
.pictures td,.pictures th{white-space:normal;font-weight:400;font-size:13px;text-align:left;padding:.2rem .3rem}
.pictures td:first-child{min-width:11rem}
.pictures img{width:88px;max-width:none}.pictures img.small{image-rendering:pixelated}"""
# The curve that says most about a training without rewards: the first of these that its run has logged.
CURVES = ("val/implicit_accuracy", "train/loss", "train/student_loss")


class Cost(NamedTuple):
    """What a picture costs, in the mean of those that were drawn."""

    evaluations: float  # samples that went through the network for it
    seconds: float


@dataclass(frozen=True)
class Row:
    """One stage as the report tells it."""

    stage: Stage
    seconds: float | None  # of work so far; None: it has not begun
    finished: bool
    result: Result | None  # of the benchmark that judges it
    cost: Cost | None
    changes: Mapping[str, Difference]  # by the stage that it is compared with

    def scores(self) -> dict[str, tuple[float, float | None, float | None]]:
        """(score, low, high) of the benchmark as a whole and of its groups."""
        if self.result is None:
            return {}
        named = named_scores(self.result.result["benchmark"], self.result.result["scores"]["official"])
        return {name: (one["score"], one["ci_low"], one["ci_high"]) for name, one in named.items() if one is not None}


def rows_of(graph: Graph, state: Mapping[str, Mapping[str, Any]], fingerprints: Mapping[str, str]) -> list[Row]:
    """state: of the stages that were begun, as graph.json has it.   fingerprints: of the stages as they are now; what
    was made with another one is no stage of this graph."""
    results: dict[str, Result | None] = {}
    rows = []
    key = ""  # of the benchmark that judges all stages
    for stage in graph.stages:
        known = state.get(stage.name)
        if known is not None and known["fingerprint"] != fingerprints[stage.name]:
            known = None
        finished = known is not None and known["status"] == "finished"
        judged = known is not None and known.get("judged_by", graph.judged_by(stage)) == graph.judged_by(stage)
        result = results[stage.name] = result_of(stage, key) if finished and judged else None
        key = key or (result.key if result else "")
        compared = {name: results[name] for name in stage.against} if result else {}
        changes = {name: change(stage.lifts, [(other, result)]) for name, other in compared.items() if other and result}
        seconds = None if known is None else known["seconds"]
        cost = cost_of(result.folder) if result else None
        rows.append(Row(stage, seconds, finished, result, cost, changes))
    return rows


def result_of(stage: Stage, key: str) -> Result | None:
    """What a benchmark said of the stage's model: that of the other stages, where it was asked."""
    folder = stage.folder / SCORES if stage.makes_a_pipeline else stage.folder
    results = [read_result(path.parent) for path in sorted(folder.glob("*/result.json"))]
    return next((result for result in results if result.key == key), results[0] if results else None)


def cost_of(folder: Path) -> Cost | None:
    """Read off the diary of drawing; None for pictures that were not drawn here."""
    path = folder / "images" / TIMES
    if not path.is_file():
        return None
    lines = list(json_lines(path))
    pictures = sum(line["pictures"] for line in lines)
    if not pictures:
        return None
    evaluations = sum(line["evaluations"] * line["pictures"] for line in lines) / pictures
    return Cost(evaluations, sum(line["seconds"] for line in lines) / pictures)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """What the lines of a file hold; those that a kill or a full disk has torn are left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            if isinstance(found := json.loads(line), dict):
                yield found


def change(lifts: Sequence[str], runs: Sequence[tuple[Result, Result]]) -> Difference:
    """By how much the mean of `lifts` has changed, each a group of the benchmark or its overall score (mode fixed).

    runs: results before and after. Of several runs a prompt counts with what all of them have drawn of it.
    The prompts of two `lifts` are different ones, so the variances of their differences add up. KeyError for a name
    that is none.
    """
    lines = [both for before, after in runs for both in common(before.prompts, after.prompts)]
    parts = [wider(pairs_for(name, runs[0][0].result["benchmark"], lines)) for name in lifts]
    value = math.fsum(part.value for part in parts) / len(parts)
    halves = [part.high - part.value for part in parts if part.high is not None]
    if not halves:
        return Difference(value, None, None)
    half = math.hypot(*halves) / len(parts)
    return Difference(value, value - half, value + half)


def pairs_for(name: str, benchmark: str, lines: Sequence[tuple[Prompt, Prompt]]) -> list[tuple[Pair, str]]:
    """The prompts' scores behind a name, each with its id."""
    if name == OVERALL:
        judged = [both for both in lines if benchmark not in BY_TASK or both[0]["group"] in geneval.TASKS]
        return [(pair, both[0]["prompt_id"]) for pair, both in zip(pairs_of(benchmark, judged), judged, strict=True)]
    weight = WEIGHTS.get(benchmark, lambda line: 1.0)
    found = [
        (Pair("", first["prompt"], weight(first), first["score"], second["score"]), first["prompt_id"])
        for first, second in lines
        if first["group"] == name
    ]
    if not found:
        raise KeyError(name)
    return found


def wider(pairs: Sequence[tuple[Pair, str]]) -> Difference:
    """The difference with the wider of two intervals: clustered by sentence, and by prompt. A benchmark of few
    sentences, each drawn many times, may have clusters that agree by chance."""
    told = paired_difference([pair for pair, _ in pairs])
    each = paired_difference([pair._replace(prompt=identity) for pair, identity in pairs])
    if told is None or each is None:
        return Difference(math.nan, None, None)
    return max(told, each, key=lambda one: 0.0 if one.high is None else one.high - one.value)


# ---------------------------------------------------------------------------------------------------------- the page


def page(graph: Graph, rows: Sequence[Row]) -> str:
    """The whole HTML file."""
    judged = [row for row in rows if row.result is not None]
    work = math.fsum(row.seconds or 0.0 for row in rows)
    finished = sum(row.finished for row in rows)
    notes = [f"<p>{escape(row.stage.name)}: {escape(row.stage.note)}.</p>" for row in rows if row.stage.note]
    parts = [
        f"<h1>{escape(graph.name)}</h1>",
        f"<p>{finished} of {len(rows)} stages are finished, after {minutes(work)} minutes of work. A score is of what "
        "the stage is for, with its 95 % interval, clustered by prompt. A change is of the mean of these, prompt by "
        "prompt; its interval is of the prompts' own differences, and missing where no prompt differs. "
        "Evaluations of the network are those for one picture.</p>",
        html_table(summary(rows)),
        *notes,
    ]
    if judged:
        parts += ["<h2>The same prompts, stage by stage</h2>", pictures(judged)]
        parts += ["<h2>Scores</h2>", html_table(score_table(judged))]
    if curves := [section for row in rows if (section := curve_section(row))]:
        parts += ["<h2>Curves</h2>", *curves]
    return document(graph.name, "".join(parts), TABLE_STYLE + STYLE)


def summary(rows: Sequence[Row]) -> list[list[str]]:
    head = ["stage", "begins from", "score", "change", "evaluations", "seconds\na picture", "minutes"]
    return [head, *(summary_line(row) for row in rows)]


def summary_line(row: Row) -> list[str]:
    scores = row.scores()
    stage = row.stage
    return [
        f"{stage.name}\n({stage.runs})",
        "\n".join(stage.begins_from),
        "\n".join(f"{name} {with_interval(*scores[name], 3)}" for name in stage.lifts or (OVERALL,) if name in scores),
        "\n".join(f"{told(difference)}\nagainst {name}" for name, difference in row.changes.items()),
        f"{row.cost.evaluations:.4g}" if row.cost else "",
        f"{row.cost.seconds:.3g}" if row.cost else "",
        "" if row.seconds is None else minutes(row.seconds) + ("" if row.finished else "\nso far"),
    ]


def told(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return f"{difference.value:+.3f}"
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def score_table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each stage that was judged, a column for each score."""
    columns = list(dict.fromkeys(name for row in rows for name in row.scores()))
    lines = []
    for row in rows:
        scores = row.scores()
        cells = [with_interval(*scores[name], 2) if name in scores else "" for name in columns]
        lines.append([row.stage.name, *cells])
    return [["stage", *columns], *lines]


def pictures(judged: Sequence[Row]) -> str:
    """A row of pictures for each stage, a column for each prompt; the stages that have one are given."""
    shown = [shown_pictures(row, judged[0]) for row in judged]
    prompts = list(dict.fromkeys(prompt for found in shown for prompt in found))
    head = "".join(f"<th>{escape(prompt)}</th>" for prompt in prompts)
    lines = []
    for row, found in zip(judged, shown, strict=True):
        scores = row.scores()
        score = escape(with_interval(*scores[OVERALL], 2)) if OVERALL in scores else "none"
        cost = f"<br>{row.cost.evaluations:.4g} evaluations" if row.cost else ""
        cells = [reduced(found[prompt], CELL, prompt) if prompt in found else "" for prompt in prompts]
        images = "".join(f"<td>{image}</td>" for image in cells)
        lines.append(f"<tr><td>{escape(row.stage.name)}<br>{OVERALL} {score}{cost}</td>{images}</tr>")
    return f"<table class='pictures'><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def shown_pictures(row: Row, first: Row) -> dict[str, Image.Image]:
    """By prompt: the stage's pictures of the first prompt of each group of the `first` stage's result."""
    if row.result is None or first.result is None:
        return {}
    lines = {line["prompt_id"]: line for line in row.result.prompts}
    wanted = [line["prompt_id"] for line in first.result.examples(MOST_PROMPTS)]
    return row.result.first_pictures([lines[name] for name in wanted if name in lines])


def stage_grid(row: Row, first: Row) -> Image.Image | None:
    """The same pictures as one; None where there are none."""
    found = shown_pictures(row, first)
    return labelled_grid(list(found.values()), list(found), len(found), CELL) if found else None


def curve_section(row: Row) -> str:
    found = curves_of(row.stage.folder)
    if not found:
        return ""
    names = ", ".join(found)
    return figure(line_plot(found, names if len(found) == 1 else "reward"), f"{row.stage.name}: {names}")


def curves_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of a run's most telling curves by name, as they were logged: all rewards, or else the
    first of CURVES; none where nothing was logged."""
    if not (folder / RUN_FILE).is_file():
        return {}
    records = folder / SPOOL_FOLDER / read_json(folder / RUN_FILE)["run_id"] / "records.jsonl"
    logged: dict[str, dict[int, float]] = {}
    for record in json_lines(records) if records.is_file() else ():
        if record["kind"] == "metrics":
            for name, value in record["values"].items():
                if math.isfinite(value):
                    logged.setdefault(name, {})[record["step"]] = value
    rewards = [name for name in sorted(logged) if is_mean_reward(name)]
    chosen = rewards or [name for name in CURVES if name in logged][:1]
    return {name: sorted(logged[name].items()) for name in chosen}
