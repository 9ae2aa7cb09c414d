"""TinyWorld's own GenEval: does a small picture show the held-out combination that its prompt asks for?

Scoring only: what is seen comes from a judge, TinyWorld's verifier. Objects are judged by GenEval's rules; the seventh
task, a word, is right where it is read to the letter, and is no part of the overall score. Both modes are the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.benchmarks import geneval
from evaluation.benchmarks.protocol import Judgements, Lost, PlannedImage, Question
from evaluation.benchmarks.tally import (
    Count,
    Mode,
    Row,
    Scored,
    Table,
    Tally,
    mean_of_scores,
    require,
    score_records,
    summarized,
)

TASKS = (*geneval.TASKS, "word")
COLUMNS = geneval.COLUMNS
ROLES_USED = ("verifier",)  # of judges,
OPTIONAL_ROLES = ()  # and those among them without which there are scores all the same
IMAGES_PER_PROMPT = 1
PROMPTS_PER_TASK = 50
SEED = 1000  # of the prompts' choice, and of the first one's noise; the next ones count up


def prompts(language: str = "en", per_task: int = PROMPTS_PER_TASK, seed: int = SEED) -> list[dict[str, Any]]:
    """Held-out statements, `per_task` of each of the seven tasks: {"index", "prompt", "metadata"}.

    ValueError for a language that TinyWorld does not speak.
    """
    from data_modules.tinyworld.world import heldout_prompts  # scoring alone needs no pictures, nor what draws them

    found = heldout_prompts(per_task, seed, language)
    return [{"index": i, "prompt": metadata["prompt"], "metadata": metadata} for i, metadata in enumerate(found)]


def plan(prompts: Sequence[Mapping[str, Any]], size: int = 64, seed: int = SEED) -> list[PlannedImage]:
    """The pictures to draw: one a prompt, square with `size` pixels a side, from the noise of `seed` + its index."""
    names = [f"{group(prompt)}/{prompt['index']:05d}" for prompt in prompts]
    return [
        PlannedImage(name, 0, prompt["prompt"], seed + prompt["index"], 0, size, size, f"{name}.png")
        for name, prompt in zip(names, prompts, strict=True)
    ]


def group(prompt: Mapping[str, Any]) -> str:
    """What its score is part of: its task."""
    return str(prompt["metadata"]["tag"])


def questions(prompt: Mapping[str, Any], number_of_pictures: int) -> list[Question]:
    """What has to be asked: whether every picture shows what it should."""
    return [Question("verifier", (i,), {"metadata": prompt["metadata"]}) for i in range(number_of_pictures)]


def records(prompt: Mapping[str, Any], judgements: Judgements, lost: Lost) -> list[dict[str, Any]]:
    """What `count` takes of a prompt, a record a picture, from the answers to its `questions`."""
    return [
        {"metadata": prompt["metadata"], **({"lost": lost[picture]} if judged is None else judged)}
        for ((_, (picture,), _), judged) in judgements
    ]


def prompt_score(verdicts: Sequence[Mapping[str, Any]]) -> float:
    """How well a prompt did, in [0, 1], to find the worst: the share of its pictures that are correct."""
    return geneval.prompt_score(verdicts)


def score(records: Sequence[Mapping[str, Any]], mode: Mode = "official") -> dict[str, Any]:
    """Scores judged pictures, one record a picture, as the verifier gives them.

    {"metadata", "detections"} for GenEval's tasks, as `geneval.score` takes them; {"metadata", "read", "correct"} for a
    word. A missing or broken picture has "lost", the reason, in place of what was judged: it is wrong, and counted.

    Returns `overall` (unweighted mean of the accuracies of GenEval's tasks that occur; None where words alone do) with
    `ci_low`, `ci_high`; `scores`: task -> score, n, ci_low, ci_high; `tasks`, the same with `accuracy` beside; `images`
    and `prompts` (pictures of one sentence are one prompt); `records`: `correct` and `reason` of each, in order; and
    what `tally.summarized` adds. Raises ValueError as `geneval.score` does.
    """
    return score_records("TinyWorld", records, mode, count, summary)


def rows(prompt: Mapping[str, Any]) -> list[Row]:
    """The row of a prompt in the counts: its task, and its sentence."""
    return [(prompt["metadata"]["tag"], prompt["metadata"]["prompt"])]


def count(record: Mapping[str, Any], mode: Mode) -> Scored:
    """One record's verdict, and what it adds to the counts."""
    verdict = verdict_on(record, mode)
    (row,) = rows(record)
    values = {"images": 1, "correct": int(verdict["correct"])}
    return Scored(verdict, [Count(row, values, lost="lost" in record)])


def verdict_on(record: Mapping[str, Any], mode: Mode = "official") -> dict[str, Any]:
    """`correct` and `reason` of one record: a word's as it was read, all else by GenEval's rules."""
    require(record, "metadata")
    if record["metadata"].get("tag") != "word":
        return geneval.count(record, mode).verdict
    if "lost" in record:
        return {"correct": False, "reason": f"lost: {record['lost']}"}
    require(record, "read", "correct")
    return {
        "correct": bool(record["correct"]),
        "reason": "" if record["correct"] else f"read {record['read'] or 'nothing'}",
    }


def summary(tally: Tally, mode: Mode) -> dict[str, Any]:
    """The result, less the records' verdicts, of raw counts (see `score`)."""
    return summarized("tinyworld", mode, tally, _scores)


def _scores(table: Table) -> dict[str, Any]:
    by_task = {task: [values for row, values in table.items() if row[0] == task] for task in TASKS}
    scores = {task: geneval.accuracy(counts) for task, counts in by_task.items() if counts}
    objects = [score for task, score in scores.items() if task != "word"]
    return {
        **(mean_of_scores(objects) if objects else dict.fromkeys(("overall", "ci_low", "ci_high"))),
        "scores": scores,
        "tasks": {task: {"accuracy": score["score"], **score} for task, score in scores.items()},
        "images": sum(values["images"] for values in table.values()),
        "prompts": len(table),
    }
