"""DPG-Bench: does a picture answer the questions that a dense prompt was broken into with yes?

Scoring only: the answers come from a judge of visual questions, which this module does not know. Rules as published
with the benchmark (ELLA, Hu et al. 2024, dpg_bench/compute_dpg_bench.py).

Modes differ in two things. `official` leaves out the first row of the official table, as the original does: question 1
of prompt partiprompts97, and with it the whole prompt if another question depends on it. And `official` takes the
scores of the categories, as the original does, from the last of a prompt's pictures alone, and from the answers as they
are; `fixed` takes them from all pictures, and from what the prompts' scores are made of: a question whose parent fails
counts as failed. Neither scrambles the categories, as the original does on several GPUs.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.benchmarks.protocol import (
    Judgements,
    Lost,
    OfficialFolder,
    PlannedImage,
    Question,
    answers_of_pictures,
    cells,
)
from evaluation.benchmarks.tally import (
    Count,
    Mode,
    Row,
    Scored,
    Table,
    Tally,
    check_questions,
    clustered,
    mean_of_prompts,
    mean_of_scores,
    require,
    score_records,
    summarized,
)

COLUMNS = ("images", "correct", "asked")
ROLES_USED = ("vqa",)  # of judges,
OPTIONAL_ROLES = ()  # and those among them without which there are scores all the same
IMAGES_PER_PROMPT = 4
SEED = 42  # the protocol has no rule
FIRST = ("partiprompts97", "1")  # prompt and question of the official table's first row
TABLE = "dpg_bench.csv"
TABLE_BLOB = "98457fc9901943f51ff9a30367250fc292533bed"  # the name that git gives its contents
PROMPTS = "prompts"  # the folder of the prompts' texts, a file each
# of what `sha256sum *.txt` prints in that folder, in the C locale
PROMPTS_SHA256 = "317085a5cddf9620595bb38cba7b9fa25ecfb081846bc91b840c98366d46f56e"
OFFICIAL = OfficialFolder("DPG-Bench", "https://github.com/TencentQQGYLab/ELLA (dpg_bench/, commit 3c228f1)", {})


def prompts(data_dir: str | Path) -> list[dict[str, Any]]:
    """The 1,065 prompts under `data_dir`, in the official table's order, with their questions, as records have them.

    {"item_id", "prompt", "questions", "dependency" (question -> the questions that it depends on, [0]: none),
    "tuples" (question -> what it asks about, its category first)}; questions are numbered by strings. UserError when
    the table or a text is absent or altered.
    """
    texts = _texts(data_dir)
    table = OFFICIAL.read_unchecked(data_dir, TABLE)
    OFFICIAL.check(Path(data_dir) / TABLE, blob_id(table), TABLE_BLOB, "git blob id")
    found: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(io.StringIO(table.decode(), newline="")):
        item = line["item_id"]
        if item not in found:
            found[item] = {"item_id": item, "prompt": texts[item], "questions": {}, "dependency": {}, "tuples": {}}
        question = str(int(line["proposition_id"]))
        found[item]["questions"][question] = line["question_natural_language"]
        found[item]["dependency"][question] = [int(parent) for parent in line["dependency"].split(",")]
        found[item]["tuples"][question] = line["tuple"]
    OFFICIAL.check_number(data_dir, len(found), len(texts))
    return list(found.values())


def plan(prompts: Sequence[Mapping[str, Any]], size: int = 1024, seed: int = SEED) -> list[PlannedImage]:
    """The pictures to draw: four a prompt, square with `size` pixels a side (the protocol leaves the size free).

    The protocol has no rule for seeds: the pictures of every prompt have `seed`, `seed` + 1 and so on. The official
    file is a grid of two rows of two.
    """
    return [
        PlannedImage(
            prompt["item_id"],
            image,
            prompt["prompt"],
            seed + image,
            0,
            size,
            size,
            f"{prompt['item_id']}.png",
            cell,
        )
        for prompt in prompts
        for image, cell in enumerate(cells(2, IMAGES_PER_PROMPT))
    ]


def group(prompt: Mapping[str, Any]) -> str:
    """Where a prompt was taken from, by its name: partiprompts, COCOval and so on; "" for those named by a number."""
    return str(prompt["item_id"]).rstrip("0123456789")


def questions(prompt: Mapping[str, Any], number_of_pictures: int) -> list[Question]:
    """What has to be asked: all of the prompt's questions about every picture."""
    return [
        Question("vqa", (picture,), {"question": question})
        for picture in range(number_of_pictures)
        for question in prompt["questions"].values()
    ]


def records(prompt: Mapping[str, Any], judgements: Judgements, lost: Lost) -> list[dict[str, Any]]:
    """What `count` takes of a prompt, one record, from the answers to its `questions`."""
    asked = {field: prompt[field] for field in ("item_id", "tuples", "dependency")}
    return [{**asked, "answers": answers_of_pictures(list(prompt["questions"]), judgements)}]


def prompt_score(verdicts: Sequence[Mapping[str, Any]]) -> float:
    """How well a prompt did, in [0, 1], to find the worst: its score, 0 where the original's fault leaves it out."""
    return float(verdicts[0]["score"] or 0.0)


def score(records: Sequence[Mapping[str, Any]], mode: Mode = "official") -> dict[str, Any]:
    """Scores judged pictures, one record a prompt: {"item_id", "tuples", "dependency", "answers"}.

    `answers` has a mapping of questions to answers for each of the prompt's pictures, in order; None stands for a
    missing or broken picture, which answers nothing with yes. `dependency` has the questions in the official table's
    order. "item_id" is optional and names the prompt.

    Returns `overall` (the mean over prompts of the share of questions that hold, in [0, 1]; papers print it times 100)
    with `ci_low`, `ci_high`; `scores`: `dpg`, the same; `categories` and `subcategories`: the share of their questions
    that hold, all prompts pooled (`global`, `entity`, …; `entity - whole`, …); each with score, n, ci_low, ci_high;
    `images`, `prompts`; `dropped`: prompts that the original's fault leaves out (where it leaves none, `overall` is
    None); `records`: `per_image` (shares), `score` (their mean) and `category_scores_used` (question -> what the
    categories' scores are made of) of each, in order; and what `tally.summarized` adds. Raises ValueError for an empty
    list, an unknown mode, a record that lacks a field and, in mode `fixed`, a question that depends on one which is not
    there.
    """
    return score_records("DPG-Bench", records, mode, count, summary)


def rows(prompt: Mapping[str, Any]) -> list[Row]:
    """The rows of a prompt in the counts: one for its score, one for each category of its questions."""
    name = _name(prompt)
    categories = {category_of(about) for about in prompt["tuples"].values()}
    return [("prompt", name), ("dropped", name), *(("category", category, name) for category in sorted(categories))]


def count(record: Mapping[str, Any], mode: Mode) -> Scored:
    """One record's verdict, and what it adds to the counts."""
    require(record, "tuples", "dependency", "answers")
    if not record["answers"]:
        raise ValueError("has no pictures: give None for each that is lost.")
    dependency = _dependency(record, mode)
    answers = [{question: (given or {}).get(question) for question in dependency} for given in record["answers"]]
    raw = [{question: float(answer == "yes") for question, answer in given.items()} for given in answers]
    try:
        held = [holding(dependency, given) for given in raw]
    except KeyError as error:
        if mode == "fixed":
            raise ValueError(f"has a question that depends on question {error}, which is not there.") from None
        return _dropped(record)
    used = {question: raw[-1][question] for question in dependency}
    if mode == "fixed":
        used = {question: sum(given[question] for given in held) / len(held) for question in dependency}
    per_image = [sum(given.values()) / len(given) for given in held]
    verdict = {"per_image": per_image, "score": sum(per_image) / len(per_image), "category_scores_used": used}
    counts = [
        Count(("prompt", _name(record)), _values(given.values()), lost=record["answers"][image] is None)
        for image, given in enumerate(held)
    ]
    pictures = [(record["answers"][-1], raw[-1])] if mode == "official" else zip(record["answers"], held, strict=True)
    for given, holds in pictures:
        counts += _category_counts(record, holds, lost=given is None)
    return Scored(verdict, counts)


def summary(tally: Tally, mode: Mode) -> dict[str, Any]:
    """The result, less the records' verdicts, of raw counts (see `score`)."""
    return summarized("dpg", mode, tally, _scores)


def holding(dependency: Mapping[str, Sequence[int]], scores: Mapping[str, float]) -> dict[str, float]:
    """The scores of a picture's questions, 0 for those that depend on a question of score 0.

    Taken one after the other in the official table's order, with the scores as they are by then: what fails because of
    a question makes those fail that depend on it and come later. KeyError for a question that is not there.
    """
    scores = dict(scores)
    for question, parents in dependency.items():
        if any(scores[str(parent)] == 0 for parent in parents if parent != 0):
            scores[question] = 0.0
    return scores


def category_of(about: str) -> str:
    """A question's category, "entity - whole" say, in what it asks about, "entity - whole (chair)"."""
    return about.split("(")[0].strip()


def blob_id(data: bytes) -> str:
    """The name that git gives to a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _texts(data_dir: str | Path) -> dict[str, str]:
    """The prompts' texts by name, checked in all."""
    folder = Path(data_dir) / PROMPTS
    files = sorted(folder.glob("*.txt"), key=lambda path: path.name)
    contents = {path.stem: OFFICIAL.read_unchecked(data_dir, f"{PROMPTS}/{path.name}") for path in files}
    OFFICIAL.check_number(folder, len(contents), 1065)
    listing = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}.txt\n" for name, data in contents.items())
    OFFICIAL.check(folder, hashlib.sha256(listing.encode()).hexdigest(), PROMPTS_SHA256, "SHA-256 of all texts")
    return {name: data.decode() for name, data in contents.items()}


def _name(record: Mapping[str, Any]) -> str:
    """The prompt's name or, without one, its questions' graph."""
    return record["item_id"] if "item_id" in record else json.dumps([record["tuples"], record["dependency"]])


def _dependency(record: Mapping[str, Any], mode: Mode) -> dict[str, Sequence[int]]:
    """The questions that are scored, in order, and what they depend on."""
    dependency = dict(record["dependency"])
    if dependency.keys() != record["tuples"].keys():
        raise ValueError("has tuples for other questions than its dependency has.")
    check_questions(dependency, record["answers"])
    if mode == "official" and record.get("item_id") == FIRST[0]:
        dependency.pop(FIRST[1], None)
    return dependency


def _dropped(record: Mapping[str, Any]) -> Scored:
    """What is left of a prompt that the original fails at: its name among the dropped."""
    verdict: dict[str, Any] = {"per_image": [], "score": None, "category_scores_used": {}}
    return Scored(verdict, [Count(("dropped", _name(record)), {"images": len(record["answers"])})])


def _category_counts(record: Mapping[str, Any], scores: Mapping[str, float], lost: bool) -> list[Count]:
    """What one picture adds to its prompt's rows of categories."""
    by_category: dict[str, list[float]] = {}
    for question, value in scores.items():
        by_category.setdefault(category_of(record["tuples"][question]), []).append(value)
    name = _name(record)
    return [Count(("category", category, name), _values(values), lost) for category, values in by_category.items()]


def _values(scores: Iterable[float]) -> dict[str, int]:
    scores = list(scores)
    return {"images": 1, "correct": int(sum(scores)), "asked": len(scores)}


def _scores(table: Table) -> dict[str, Any]:
    prompts = {row: values for row, values in table.items() if row[0] == "prompt"}
    shares = [values["correct"] / values["asked"] for values in prompts.values()]
    scores = {"dpg": mean_of_prompts(shares)} if shares else {}  # none where all that there is has been dropped
    categories: dict[str, dict[str, list[int]]] = {}  # category -> prompt -> right, asked
    subcategories: dict[str, dict[str, list[int]]] = {}
    for row, values in table.items():
        if row[0] == "category":
            for groups, group in ((categories, row[1].split("-")[0].strip()), (subcategories, row[1])):
                sums = groups.setdefault(group, {}).setdefault(row[2], [0, 0])
                sums[0] += values["correct"]
                sums[1] += values["asked"]
    return {
        **(mean_of_scores(list(scores.values())) if scores else dict.fromkeys(("overall", "ci_low", "ci_high"))),
        "scores": scores,
        "categories": {name: _share(list(group.values())) for name, group in categories.items()},
        "subcategories": {name: _share(list(group.values())) for name, group in subcategories.items()},
        "images": sum(values["images"] for values in prompts.values()),
        "prompts": len(prompts),
        "dropped": [row[1] for row in table if row[0] == "dropped"],
    }


def _share(prompts: Sequence[Sequence[int]]) -> dict[str, float | int]:
    asked = sum(number for _, number in prompts)
    return clustered(prompts, lambda sums: sums[0] / sums[1], asked, at_most=asked)
