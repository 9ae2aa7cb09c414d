"""CVTG-2K: are the words that a prompt puts in quotation marks, in two to five places, readable in the picture?

Scoring only: the lines of text come from an OCR judge, which this module does not know. Rules as published with the
benchmark (TextCrafter, Du et al. 2025, unified_metrics_eval.py of its evaluation).

Modes. The published rules have no known fault, so both modes give the same result. What may surprise is how the
measures are defined: a word that is read once answers all its occurrences in the prompt, other text costs nothing, a
word with punctuation is another word, and the word that NED compares with is the most alike in difflib's sense, which
need not be the nearest by edits.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.benchmarks.protocol import Judgements, Lost, OfficialFolder, PlannedImage, Question
from evaluation.benchmarks.tally import (
    Count,
    Mode,
    Row,
    Scored,
    Table,
    Tally,
    clustered,
    exact,
    inexact,
    mean_of_scores,
    require,
    score_records,
    summarized,
)
from evaluation.benchmarks.text import edit_distance

SETS = ("CVTG", "CVTG-Style")
AREAS = (2, 3, 4, 5)  # places with text that a prompt asks for
COLUMNS = ("images", "words", "correct", "ned", "clip_images", "clip")
ROLES_USED = ("ocr", "clip")  # of judges,
OPTIONAL_ROLES = ("clip",)  # and those among them without which there are scores all the same
IMAGES_PER_PROMPT = 1
SIZE = 1024  # pixels a side
SEED = 0
CLIP_TEXT = "A photo depicts {prompt}"  # what CLIPScore compares a picture with
CLIP_WEIGHT = 2.5  # CLIPScore is so many times a cosine, not below 0
CLIP_BOUNDS = (0.0, CLIP_WEIGHT)
OFFICIAL = OfficialFolder(
    "CVTG-2K",
    "https://huggingface.co/datasets/dnkdnk/CVTG-2K (folders CVTG and CVTG-Style)",
    {
        "CVTG/2.json": "e8aa98a4f5d609f8699131328876760fbbf33db8320770188fc3979f3fa345c8",
        "CVTG/3.json": "36fca11a221236643ed9595d5302884db01e832309a61b230fab3eefdeff1be0",
        "CVTG/4.json": "24fb02addf2caae050d2e67e29af98fe10d1e086093cf43d3592bcdac8557c2c",
        "CVTG/5.json": "24d5a3afc060477cdcf5b678018d81c78e18dc0054aafacf8b02a69ae24118b2",
        "CVTG-Style/2.json": "61324577c690c4383597fffe53614d87088be108a3e577288d8e8baf71381489",
        "CVTG-Style/3.json": "26a92b4a53e5dc497317fb3a219121790b7a7c9da10b87b8dd3633fcadff0f97",
        "CVTG-Style/4.json": "1d1fe6c367191fd8a3939687f70b3e8bda83c0539344977506e09e2732e4e3ff",
        "CVTG-Style/5.json": "da102c0239726d1fcdf3f4cfccacd34e71d4c0a588e5a893f4bc94b03fff353a",
    },
)


def prompts(data_dir: str | Path) -> list[dict[str, Any]]:
    """The 2,000 prompts under `data_dir`: {"set", "area", "index", "prompt", "gt_words"}, as records have them.

    UserError when a file is absent or altered.
    """
    found = []
    for subset in SETS:
        for area in AREAS:
            for item in json.loads(OFFICIAL.read(data_dir, f"{subset}/{area}.json"))["data_list"]:
                place = {"set": subset, "area": area, "index": item["index"]}
                found.append({**place, "prompt": item["prompt"], "gt_words": wanted_words(item["prompt"])})
    OFFICIAL.check_number(data_dir, len(found), 2000)
    return found


def plan(prompts: Sequence[Mapping[str, Any]], size: int = SIZE, seed: int = SEED) -> list[PlannedImage]:
    """The pictures to draw: one a prompt, square with `size` pixels a side, all from the noise of `seed`."""
    names = ["/".join(rows(prompt)[0]) for prompt in prompts]
    return [
        PlannedImage(name, 0, prompt["prompt"], seed, 0, size, size, f"{name}.png")
        for name, prompt in zip(names, prompts, strict=True)
    ]


def group(prompt: Mapping[str, Any]) -> str:
    """What its score is part of: its set and number of places with text."""
    return f"{prompt['set']}/{prompt['area']}"


def questions(prompt: Mapping[str, Any], number_of_pictures: int) -> list[Question]:
    """What has to be asked: the lines of text of every picture, and its likeness to the prompt."""
    text = {"text": CLIP_TEXT.format(prompt=prompt["prompt"])}
    return [
        question
        for picture in range(number_of_pictures)
        for question in (Question("ocr", (picture,), {}), Question("clip", (picture,), text))
    ]


def records(prompt: Mapping[str, Any], judgements: Judgements, lost: Lost) -> list[dict[str, Any]]:
    """What `count` takes of a prompt, a record a picture, from the answers to its `questions`."""
    asked = {field: prompt[field] for field in ("set", "area", "index", "gt_words")}
    found: dict[int, dict[str, Any]] = {}
    for (role, (picture,), _), judged in judgements:
        record = found.setdefault(picture, dict(asked))
        if judged is None:
            record["lost"] = lost[picture]
        elif role == "ocr":
            record["ocr_lines"] = [line["text"] for line in judged["lines"]]
        else:
            record["clip_score"] = CLIP_WEIGHT * max(judged["similarity"], 0.0)
    return list(found.values())


def prompt_score(verdicts: Sequence[Mapping[str, Any]]) -> float:
    """How well a prompt did, in [0, 1], to find the worst: the share of its words that are right."""
    return sum(verdict["correct_words"] for verdict in verdicts) / sum(verdict["total_words"] for verdict in verdicts)


def score(records: Sequence[Mapping[str, Any]], mode: Mode = "official") -> dict[str, Any]:
    """Scores read pictures, one record a picture: {"set", "area", "index", "gt_words", "ocr_lines": [text, …]}.

    `ocr_lines` is what the judge read, a text a line, in any order. "prompt" serves in place of "gt_words" (and of
    "set", "area" and "index", which name the prompt). "clip_score" is optional: 2.5·max(cosine, 0) of the picture and
    `CLIP_TEXT`, in all records or in none. A missing or broken picture has "lost", the reason, in place
    of what was judged: none of its words is right.

    Returns `overall` (correct words over words, all pictures pooled) with `ci_low`, `ci_high`; `scores`, each with
    score, n, ci_low and ci_high: `word_accuracy`, `ned` (mean over the words of how alike the read word is: 1 is the
    same), `clip_score` (mean over pictures, if judged); `areas` and `subsets`: the word accuracy by number of places
    with text (both sets pooled, as papers print it), and by set and number; `images`, `prompts`, `words`;
    `records`: `total_words`, `correct_words` and `ned` (a number a word) of each, in order; and what
    `tally.summarized` adds. Raises ValueError for an empty list, an unknown mode, and a record that lacks a field
    or asks for no words.
    """
    return score_records("CVTG-2K", records, mode, count, summary)


def wanted_words(prompt: str) -> list[str]:
    """The words in single quotation marks, in small letters."""
    return [word for quoted in re.findall(r"'(.*?)'", prompt) for word in quoted.lower().split()]


def read_words(lines: Sequence[str]) -> list[str]:
    """The words of the lines that were read, in small letters; one empty word when there are none."""
    return [word for line in lines for word in line.lower().split()] or [""]


def likeness(word: str, read: Sequence[str]) -> float:
    """NED of a word: 1 − edits over the longer one's length, with the word among those `read` that difflib ranks first.

    In [0, 1]; 1 is the same word. The 1e-5 in the length is the original's.
    """
    match = difflib.get_close_matches(word, read, n=1, cutoff=0)[0]
    return 1 - edit_distance(word, match) / (max(len(word), len(match)) + 1e-5)


def rows(prompt: Mapping[str, Any]) -> list[Row]:
    """The row of a prompt in the counts: its set, number of places and index, or, without them, its text."""
    if "index" in prompt:
        return [(prompt["set"], str(prompt["area"]), str(prompt["index"]))]
    return [("", "", prompt["prompt"])]


def count(record: Mapping[str, Any], mode: Mode) -> Scored:
    """One record's verdict, and what it adds to the counts."""
    lost = "lost" in record
    require(record, *(() if lost else ("ocr_lines",)))
    require(record, *(("set", "area", "index") if "index" in record else ("prompt",)))
    require(record, "gt_words" if "gt_words" in record else "prompt")
    words = record["gt_words"] if "gt_words" in record else wanted_words(record["prompt"])
    if not words:
        raise ValueError("asks for no words: its prompt has none in single quotation marks.")
    read = [] if lost else read_words(record["ocr_lines"])
    correct = sum(word in read for word in words)
    ned = [0.0 if lost else likeness(word, read) for word in words]
    values = {"images": 1, "words": len(words), "correct": correct, "ned": sum(exact(value) for value in ned)}
    if lost or "clip_score" in record:
        values |= {"clip_images": 1, "clip": 0 if lost else exact(record["clip_score"])}
    verdict = {"total_words": len(words), "correct_words": correct, "ned": ned}
    return Scored(verdict, [Count(rows(record)[0], values, lost)])


def summary(tally: Tally, mode: Mode) -> dict[str, Any]:
    """The result, less the records' verdicts, of raw counts (see `score`)."""
    judged = [sum(row.get(column, 0) for row in tally.judged().values()) for column in ("images", "clip_images")]
    if judged[1] not in (0, judged[0]):
        raise ValueError(f"CVTG-2K has a clip_score for {judged[1]} of {judged[0]} pictures: give all or none.")
    with_clip = judged[1] > 0
    return summarized("cvtg2k", mode, tally, lambda table: _scores(table, with_clip), "/".join)


def _scores(table: Table, with_clip: bool) -> dict[str, Any]:
    counts = list(table.values())
    accuracy = _accuracy(counts)
    words = sum(row["words"] for row in counts)
    scores = {"word_accuracy": accuracy, "ned": _ratio([(inexact(row["ned"]), row["words"]) for row in counts], words)}
    if with_clip:
        clips = [(inexact(row.get("clip", 0)), row["clip_images"]) for row in counts]
        scores["clip_score"] = _ratio(clips, sum(number for _, number in clips), CLIP_BOUNDS)
    areas = {str(area): [values for row, values in table.items() if row[1] == str(area)] for area in AREAS}
    subsets = {
        f"{name}/{area}": [values for row, values in table.items() if row[:2] == (name, str(area))]
        for name in SETS
        for area in AREAS
    }
    return {
        **mean_of_scores([accuracy]),
        "scores": scores,
        "areas": {area: _accuracy(rows) for area, rows in areas.items() if rows},
        "subsets": {subset: _accuracy(rows) for subset, rows in subsets.items() if rows},
        "images": sum(row["images"] for row in counts),
        "prompts": len(counts),
        "words": words,
    }


def _accuracy(counts: Sequence[Mapping[str, int]]) -> dict[str, float | int]:
    words = sum(row["words"] for row in counts)
    return clustered([(row["correct"], row["words"]) for row in counts], _quotient, words, at_most=words)


def _ratio(
    pairs: Sequence[tuple[float, int]], number: int, bounds: tuple[float, float] = (0.0, 1.0)
) -> dict[str, float | int]:
    return clustered(pairs, _quotient, number, bounds)


def _quotient(sums: Sequence[float]) -> float:
    return sums[0] / sums[1]
