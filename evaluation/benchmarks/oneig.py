"""OneIG-Bench (English and Chinese): alignment, text, reasoning, style and diversity, each judged in its own way.

Scoring only: answers, texts, similarities and distances come from judges, which this module does not know. Rules as
published with the benchmark (OneIG-Bench, Chang et al. 2025, scripts/ of its repository).

Modes differ in one thing: where the judge that reads says that there is no text without the full stop that the
original looks for, `official` takes that for text of the picture, as the original does; `fixed` takes it out. What goes
wrong in the original when pictures are lost is in neither: it leaves such prompts out of its means (see `lost` in the
result), and reads text for a prompt without any picture off the pictures of the prompt before.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import isqrt
from pathlib import Path
from typing import Any

from evaluation.benchmarks.longtext import NO_TEXT
from evaluation.benchmarks.longtext import QUESTION as READING_QUESTION
from evaluation.benchmarks.protocol import (
    Judged,
    Judgements,
    Lost,
    OfficialFolder,
    PlannedImage,
    Question,
    answers_of_pictures,
    cells,
    language_of,
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
    exact,
    inexact,
    mean_of_prompts,
    mean_of_scores,
    require,
    score_records,
    summarized,
)
from evaluation.benchmarks.text import characters_only, common, edit_distance, has_chinese, without, words_only

DIMENSIONS = ("alignment", "text", "reasoning", "style", "diversity")
SETS = {  # the official file's category -> the set's name
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",  # in Chinese only
}
ALIGNED_SETS = ("anime", "human", "object", "multilingualism")
QUESTION_ENDING = ". Please answer 'Yes' or 'No' only."  # of every question of alignment
ALIGNMENT_TOKENS = 128  # of the reply to it, at most
MAX_EDIT_DISTANCE = {"en": 100, "zh": 50}  # the mean distance from which on a text scores nothing for it
BOUNDS = {"alignment": (0.0, 1.0), "reasoning": (-1.0, 1.0), "style": (0.0, 1.0), "diversity": (0.0, 2.0)}
COLUMNS = ("images", "correct", "asked", "edits", "complete", "matched", "units", "value", "values")
ROLES_USED = ("vlm", "llm2clip", "style", "distance")  # of judges,
OPTIONAL_ROLES = ("llm2clip", "style", "distance")  # and those among them without which there are scores all the same
IMAGES_PER_PROMPT = 4
SEED = 42
OFFICIAL = OfficialFolder(
    "OneIG-Bench",
    "https://github.com/OneIG-Bench/OneIG-Benchmark (commit 41b4983)",
    {
        "OneIG-Bench.csv": "e06c65b32252d82406fb1a27f13022b38d432c899a2486eb49ab0c100f83b3e1",
        "OneIG-Bench-ZH.csv": "8fc4ae1403db32dbb1203cc457361c3215500b34e741194a53f5002c9d824700",
        "scripts/alignment/Q_D/anime.json": "21ea3d0360e69d72bc5f4cbb93b203d293d16f5c2f626634a52b990119e0a6e3",
        "scripts/alignment/Q_D/anime_zh.json": "171740d2d7158f0da2d907481b5cd97380398e4a45b53f0976ad4d91e01151d4",
        "scripts/alignment/Q_D/human.json": "0e92b25c6bc4091cac05fa0f4269b3b37465a7cd43ca2768f55f56149cdbf13b",
        "scripts/alignment/Q_D/human_zh.json": "819f13b1efab67bdfba9ca633a37e009013350d148323f5d65b2a467f1789c64",
        "scripts/alignment/Q_D/object.json": "350dfdf72c2da143c78a7544d4c554faf6698c1ba4fcd27c7a9cc9199d487e0e",
        "scripts/alignment/Q_D/object_zh.json": "19f69cfdf17119ff5400919341c930468a0de5ee06b9c91d8f16ba2365f51498",
        "scripts/alignment/Q_D/multilingualism_zh.json": (
            "63614e72dbd86f1e56ed625a55f73d509323d34b68fb27d8fed0f87a49f69db9"
        ),
        "scripts/text/text_content.csv": "ffbf0b588c617b77caf1e9a733496ff5b4704b6534df5fba13201a83f21e0512",
        "scripts/text/text_content_zh.csv": "6250b3be96e9c4fd4c9cb858dd36b5b2dc4fc8fccb8e4ed0317f5da392db9a1a",
        "scripts/reasoning/gt_answer.json": "e46733770fc0b99632e77e54f59316bcc7f170752680dd0c24d43c722bae402b",
        "scripts/reasoning/gt_answer_zh.json": "faaf0849de1fb62829ed49ec5de7f582562847fb01f390b7a4bb106e48f0c116",
    },
)


def prompts(data_dir: str | Path, language: str = "en") -> list[dict[str, Any]]:
    """The prompts of a language ("en": 1,120, "zh": 1,320) under `data_dir`, with what their judges need.

    Each has "language", "set", "id", "prompt" and "class"; "questions" and "dependency" (question -> the questions
    that it depends on, [0]: none) where alignment is judged; "gt_raw", the text as the official table has it;
    "gt_answer", what a reasoning prompt's picture is compared with; "style", the name of the reference pictures.
    UserError when a file is absent or altered, and for another language.
    """
    language = language_of("OneIG-Bench", language)
    ending = {"en": "", "zh": "_zh"}[language]
    found = []
    judged_by = _judging(data_dir, ending)
    for line in _table(data_dir, {"en": "OneIG-Bench.csv", "zh": "OneIG-Bench-ZH.csv"}[language]):
        name = SETS[line["category"]]
        prompt = {"language": language, "set": name, "id": line["id"], "class": line["class"]}
        prompt["prompt"] = line[{"en": "prompt_en", "zh": "prompt_cn"}[language]]
        if name == "anime" and line["class"]:
            prompt["style"] = line["class"].lower().replace(" ", "_")
        found.append({**prompt, **judged_by.get((name, line["id"]), {})})
    OFFICIAL.check_number(data_dir, len(found), {"en": 1120, "zh": 1320}[language])
    return found


def plan(
    prompts: Sequence[Mapping[str, Any]], size: int = 1024, seed: int = SEED, model: str = "model"
) -> list[PlannedImage]:
    """The pictures to draw: four a prompt, square with `size` pixels a side (the protocol leaves the size free).

    The pictures of every prompt have `seed`, `seed` + 1 and so on (the protocol: different seeds). The official file
    is a grid of two rows of two in the folder of the `model`'s name.
    """
    return [
        PlannedImage(
            f"{prompt['set']}/{prompt['id']}",
            image,
            prompt["prompt"],
            seed + image,
            0,
            size,
            size,
            f"images/{prompt['set']}/{model}/{prompt['id']}.webp",
            cell,
            f"images/{prompt['set']}/*/{prompt['id']}.*",
        )
        for prompt in prompts
        for image, cell in enumerate(cells(2, IMAGES_PER_PROMPT))
    ]


def group(prompt: Mapping[str, Any]) -> str:
    """What its score is part of: its set."""
    return str(prompt["set"])


def questions(prompt: Mapping[str, Any], number_of_pictures: int) -> list[Question]:
    """What has to be asked, dimension after dimension: of every picture, and for diversity of every pair of them."""
    pictures = range(number_of_pictures)
    asked: list[Question] = []
    if "dependency" in prompt:
        texts = [question + QUESTION_ENDING for question in prompt["questions"].values()]
        alignment = [{"prompt": text, "max_new_tokens": ALIGNMENT_TOKENS} for text in texts]
        asked += [Question("vlm", (picture,), question) for picture in pictures for question in alignment]
    if "gt_raw" in prompt:
        reading = {"prompt": READING_QUESTION, "max_new_tokens": max_new_tokens(prompt["gt_raw"])}
        asked += [Question("vlm", (picture,), reading) for picture in pictures]
    if "gt_answer" in prompt:
        asked += [Question("llm2clip", (picture,), {"text": prompt["gt_answer"]}) for picture in pictures]
    if "style" in prompt:
        asked += [Question("style", (picture,), {"style": prompt["style"]}) for picture in pictures]
    return asked + [Question("distance", pair, {}) for pair in combinations(pictures, 2)]


def records(prompt: Mapping[str, Any], judgements: Judgements, lost: Lost) -> list[dict[str, Any]]:
    """What `count` takes of a prompt, from the answers to its `questions`: records of every dimension that is judged,
    in the order of `DIMENSIONS`, of the text one a picture.
    """
    asked = {field: prompt[field] for field in ("language", "set", "id")}
    said: dict[str, list[Judged]] = {}
    for one in judgements:
        said.setdefault(one.question.role, []).append(one)
    found: list[dict[str, Any]] = []
    if "vlm" in said and "dependency" in prompt:
        answers = answers_of_pictures(list(prompt["questions"]), said["vlm"])
        found.append({**asked, "dependency": prompt["dependency"], "answers": answers})
    if "vlm" in said and "gt_raw" in prompt:
        for (_, (picture,), _), judged in said["vlm"]:
            read = {"lost": lost[picture]} if judged is None else {"answer": judged["answer"]}
            found.append({**asked, "gt_raw": prompt["gt_raw"], **read})
    if "llm2clip" in said:
        found.append({**asked, "similarities": _each(said["llm2clip"], "similarity")})
    if "style" in said:
        cosines = {encoder: _each(said["style"], encoder) for encoder in ("csd", "se")}
        found.append({**asked, "style": prompt["style"], **cosines})
    if "distance" in said:
        found.append({**asked, "distances": _each(said["distance"], "distance")})
    return found


def prompt_score(verdicts: Sequence[Mapping[str, Any]]) -> float:
    """How well a prompt did, in [0, 1], to find the worst: in the first dimension that it is judged in, which is what
    its set is for; of a text, the share of its units that were read."""
    read = [verdict["wac"] for verdict in verdicts if "wac" in verdict]
    score = sum(read) / len(read) if read else verdicts[0]["score"]
    return min(max(score, 0.0), 1.0)


def max_new_tokens(gt_raw: str) -> int:
    """How long the reply of the judge that reads a text may be."""
    return 256 if len(gt_raw.split()) > 60 else 128


def score(records: Sequence[Mapping[str, Any]], mode: Mode = "official") -> dict[str, Any]:
    """Scores judged pictures, each record of one dimension, which its fields tell:

    - alignment, a prompt: {"set", "id", "dependency": {question: parents}, "answers": [{question: answer}, …]};
    - text, a picture: {"id", "gt_raw", "ocr": what was read, or "answer": the judge's whole reply, "language"?};
    - reasoning, a prompt: {"id", "similarities": [cosine of a picture and the answer, …]};
    - style, a prompt: {"id", "style", "csd": [[cosine to each reference picture], …], "se": the same by the other
      encoder};
    - diversity, a prompt: {"set", "id", "distances": [of pictures 0 and 1, 0 and 2, …, 1 and 2, …]}.

    A missing or broken picture is None in a list (in `distances`, every pair of it), and in a record of its own has
    "lost", the reason, in place of what was read: it scores 0. "language" ("en" or "zh") is that of the text; without
    it, it is Chinese if a text is. "set" and "id" name the prompt.

    Returns `scores`: dimension -> score, n, ci_low, ci_high, for the dimensions that occur: plain means over prompts,
    and for the text what its edits, completely right texts and right words make, all pictures pooled; `text`: these
    three, as `edit_distance`, `completion_rate` and `word_accuracy`; `sets`: alignment and diversity by set, style by
    style; `overall` with `ci_low` and `ci_high`: the plain mean of all five, as model reports (not the benchmark's
    authors) print it, None where a dimension lacks; `images`, `prompts`; `records`: `score` and `per_image` of each,
    for text instead `norm_gt`, `norm_ocr`, `ED`, `CR`, `match`, `gt_count` and `wac`, in order; and what
    `tally.summarized` adds. Raises ValueError for an empty list, an unknown mode, and a record that lacks a field.
    """
    return score_records("OneIG-Bench", records, mode, count, summary)


def rows(prompt: Mapping[str, Any]) -> list[Row]:
    """The rows of a prompt in the counts: one for each dimension that judges it."""
    found = [_row("diversity", prompt)]
    for field, dimension in (("dependency", "alignment"), ("gt_answer", "reasoning"), ("style", "style")):
        if field in prompt:
            found.append(_row(dimension, prompt))
    if "gt_raw" in prompt:
        found.append(_text_row(prompt))
    return found


def count(record: Mapping[str, Any], mode: Mode) -> Scored:
    """One record's verdict, and what it adds to the counts."""
    if "answers" in record:
        return _count_alignment(record)
    if "gt_raw" in record and {"ocr", "answer", "lost"} & record.keys():
        return _count_text(record, mode)
    for field, counted in (
        ("similarities", _count_reasoning),
        ("csd", _count_style),
        ("distances", _count_diversity),
    ):
        if field in record:
            return counted(record)
    raise ValueError("has nothing judged: give answers, ocr (or answer), similarities, csd and se, or distances.")


def summary(tally: Tally, mode: Mode) -> dict[str, Any]:
    """The result, less the records' verdicts, of raw counts (see `score`)."""
    return summarized("oneig", mode, tally, _scores, lambda row: "/".join(row[1:3]))


def aligned(dependency: Mapping[str, Sequence[int]], answers: Mapping[str, str]) -> int:
    """How many questions about a picture hold: answered "Yes" to the letter, as are all that they depend on directly.

    Only the answers count, not whether what they depend on holds in its turn: the order does not matter.
    """
    yes = {question: answers[question] == "Yes" for question in dependency}
    return sum(
        yes[question] and all(yes.get(str(parent), True) for parent in parents)
        for question, parents in dependency.items()
    )


def normalize(text: str) -> str:
    """What is compared of a text: characters if there is Chinese among them, else words between single spaces."""
    words = words_only(text)
    return characters_only(words) if has_chinese(words) else words


def clean(answer: str, mode: Mode) -> str:
    """The reading judge's reply without the phrases of it that stand for no text (see the modes above)."""
    return without(answer, "addCriterion", *(NO_TEXT[:1] if mode == "official" else NO_TEXT))


def _each(said: Judgements, field: str) -> list[Any]:
    """A field of every judgement, None for what is lost."""
    return [None if judged is None else judged[field] for _, judged in said]


def _judging(data_dir: str | Path, ending: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What the prompts' judges need, by set and id."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name in ALIGNED_SETS:
        path = f"scripts/alignment/Q_D/{name}{ending}.json"
        if path in OFFICIAL.sha256:
            for key, item in json.loads(OFFICIAL.read(data_dir, path)).items():
                graph = {"questions": json.loads(item["question"]), "dependency": json.loads(item["dependency"])}
                found[name, key] = graph
    for line in _table(data_dir, f"scripts/text/text_content{ending}.csv"):
        found["text", line["id"]] = {"gt_raw": line["text_content"]}
    for key, answer in json.loads(OFFICIAL.read(data_dir, f"scripts/reasoning/gt_answer{ending}.json")).items():
        found["reasoning", key] = {"gt_answer": answer}
    return found


def _table(data_dir: str | Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(OFFICIAL.read(data_dir, name).decode(), newline="")))


def _row(dimension: str, record: Mapping[str, Any], default_set: str = "") -> Row:
    """(dimension, set, id, group): the group is what sub-scores are taken over."""
    name = record.get("set", default_set)
    group = record["style"] if dimension == "style" else name
    return (dimension, name, record["id"], group)


def _text_row(record: Mapping[str, Any]) -> Row:
    language = record.get("language") or ("zh" if has_chinese(record["gt_raw"]) else "en")
    return ("text", "text", record.get("id", record["gt_raw"]), language_of("OneIG-Bench", language))


def _count_alignment(record: Mapping[str, Any]) -> Scored:
    require(record, "set", "id", "dependency")
    dependency, pictures = record["dependency"], record["answers"]
    check_questions(dependency, pictures)
    held = [None if answers is None else aligned(dependency, answers) for answers in pictures]
    shares = [(number or 0) / len(dependency) for number in held]
    counts = [
        Count(
            _row("alignment", record),
            {"images": 1, "correct": number or 0, "asked": len(dependency)},
            lost=number is None,
        )
        for number in held
    ]
    return _prompt_scored(shares, counts)


def _count_text(record: Mapping[str, Any], mode: Mode) -> Scored:
    row = _text_row(record)
    lost = "lost" in record
    wanted = normalize(record["gt_raw"])
    read = "" if lost else normalize(_read(record, mode))
    units, read_units = (wanted, read) if has_chinese(wanted) else (wanted.split(), read.split())
    match = common(units, read_units)
    # a lost picture is as far off as counts: read as blank, it would score something for a short text
    edits = MAX_EDIT_DISTANCE[row[3]] if lost else edit_distance(read, wanted)
    complete = int(edits == 0)
    values = {"images": 1, "edits": edits, "complete": complete, "matched": match, "units": len(units)}
    verdict = {"norm_gt": wanted, "norm_ocr": read, "ED": edits, "CR": complete, "match": match, "gt_count": len(units)}
    return Scored({**verdict, "wac": match / len(units) if units else 0.0}, [Count(row, values, lost)])


def _read(record: Mapping[str, Any], mode: Mode) -> str:
    """What counts as read. "ocr" is cleaned as the original cleans already."""
    if "answer" in record:
        return clean(record["answer"], mode)
    return record["ocr"] if mode == "official" else clean(record["ocr"], mode)


def _count_reasoning(record: Mapping[str, Any]) -> Scored:
    require(record, "id")
    return _count_values(_row("reasoning", record, "reasoning"), record["similarities"])


def _count_style(record: Mapping[str, Any]) -> Scored:
    """A picture's style is the mean of the two encoders' largest cosines to a reference picture, each not below 0."""
    require(record, "id", "style", "csd", "se")
    pairs = zip(record["csd"], record["se"], strict=True)
    values = [None if a is None or b is None else (max(0.0, *a) + max(0.0, *b)) / 2 for a, b in pairs]
    return _count_values(_row("style", record, "anime"), values)


def _count_diversity(record: Mapping[str, Any]) -> Scored:
    require(record, "set", "id")
    row, distances = _row("diversity", record), record["distances"]
    number = (1 + isqrt(1 + 8 * len(distances))) // 2  # of pictures
    if number * (number - 1) // 2 != len(distances):
        raise ValueError(f"has {len(distances)} distances: give one for every pair of its pictures.")
    pairs = zip(combinations(range(number), 2), distances, strict=True)
    judged = len({picture for pair, distance in pairs if distance is not None for picture in pair})
    lost = number - max(judged, 1)  # at least: one alone has no distance
    pictures = [Count(row, {"images": judged}), Count(row, {"images": lost}, lost=True)]
    scored = _count_values(row, distances, images=0)
    return Scored(scored.verdict, [*scored.counts, *(count for count in pictures if count.values["images"])])


def _count_values(row: Row, values: Sequence[float | None], images: int = 1) -> Scored:
    """A prompt's numbers, None for what is lost."""
    counts = [
        Count(row, {"images": images, "value": exact(value or 0.0), "values": 1}, lost=value is None)
        for value in values
    ]
    return _prompt_scored([value or 0.0 for value in values], counts)


def _prompt_scored(values: Sequence[float], counts: list[Count]) -> Scored:
    if not values:
        raise ValueError("has no pictures: give None for each that is lost.")
    return Scored({"score": sum(values) / len(values), "per_image": list(values)}, counts)


def _scores(table: Table) -> dict[str, Any]:
    scores = {}
    for dimension in DIMENSIONS:
        rows = [row for row in table if row[0] == dimension]
        if rows:
            scores[dimension] = _dimension_score(table, rows)
    complete = len(scores) == len(DIMENSIONS)
    images: dict[Row, int] = {}  # by prompt, which several dimensions may judge
    for row, values in table.items():
        images[row[1:3]] = max(images.get(row[1:3], 0), values["images"])
    return {
        **(mean_of_scores(list(scores.values())) if complete else dict.fromkeys(("overall", "ci_low", "ci_high"))),
        "scores": scores,
        "text": _text_measures(table),
        "sets": _sets(table),
        "images": sum(images.values()),
        "prompts": len(images),
    }


def _dimension_score(table: Table, rows: Sequence[Row]) -> dict[str, float | int]:
    if rows[0][0] == "text":
        return _text_score(table, rows)
    return mean_of_prompts([_prompt_mean(table[row]) for row in rows], BOUNDS[rows[0][0]])


def _prompt_mean(values: Mapping[str, int]) -> float:
    """Over a prompt's pictures, all asked the same questions; or over its values."""
    if values.get("asked"):
        return values["correct"] / values["asked"]
    return inexact(values["value"]) / values["values"]


def _sets(table: Table) -> dict[str, dict[str, float | int]]:
    """Sub-scores: alignment and diversity by set, style by style, as "dimension/group"."""
    groups: dict[str, list[Row]] = {}
    for row in table:
        if row[0] in ("alignment", "style", "diversity"):
            groups.setdefault(f"{row[0]}/{row[3]}", []).append(row)
    return {name: _dimension_score(table, rows) for name, rows in groups.items()}


def _text_score(table: Table, rows: Sequence[Row]) -> dict[str, float | int]:
    """1 − min(M, mean edit distance)·(1 − completion rate)·(1 − word accuracy)/M, M as the language has it."""
    limit = MAX_EDIT_DISTANCE["zh" if any(row[3] == "zh" for row in rows) else "en"]

    def statistic(sums: Sequence[float]) -> float:
        edits, complete, accuracy = _measures(sums)
        return 1 - min(limit, edits) * (1 - complete) * (1 - accuracy) / limit

    return clustered(_text_clusters(table, rows), statistic, sum(table[row]["images"] for row in rows))


def _text_measures(table: Table) -> dict[str, float]:
    rows = [row for row in table if row[0] == "text"]
    if not rows:
        return {}
    sums = [sum(column) for column in zip(*_text_clusters(table, rows), strict=True)]
    return dict(zip(("edit_distance", "completion_rate", "word_accuracy"), _measures(sums), strict=True))


def _text_clusters(table: Table, rows: Sequence[Row]) -> list[list[int]]:
    return [[table[row][column] for column in ("edits", "complete", "images", "matched", "units")] for row in rows]


def _measures(sums: Sequence[float]) -> tuple[float, float, float]:
    edits, complete, images, matched, units = sums
    return edits / images, complete / images, matched / units if units else 0.0
