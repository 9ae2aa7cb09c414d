"""LongText-Bench (English and Chinese): how much of the long texts that a prompt asks for stands in the picture?

Scoring only: the text comes from a judge, a vision-language model asked to read (see `QUESTION`), which this module
does not know. Rules as published with the benchmark (X-Omni, Geng et al. 2025, textbench).

Modes differ in one thing. The published code means to take phrases of the judge's that stand for no text out of its
reply, but takes out the last in its list alone, "No text recognized." with a full stop; the judge is told to leave
the full stop out. `official` does as it does; `fixed` takes out what it means to, with and without the full stop.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.benchmarks.protocol import (
    Judgements,
    Lost,
    OfficialFolder,
    PlannedImage,
    Question,
    language_of,
)
from evaluation.benchmarks.tally import (
    Count,
    Mode,
    Row,
    Scored,
    Table,
    Tally,
    clustered,
    mean_of_scores,
    require,
    score_records,
    summarized,
)
from evaluation.benchmarks.text import characters_only, common, without, words_only

QUESTION = (
    "Recognize the text in the image, only reply with the text content, but avoid repeating previously mentioned "
    "content. If no text is recognized, please reply with 'No text recognized'."
)
NO_TEXT = ("No text recognized.", "No text recognized")  # how the judge says so
MAX_NEW_TOKENS = 1024  # of its reply
COLUMNS = ("images", "units", "matched")
ROLES_USED = ("vlm",)  # of judges,
OPTIONAL_ROLES = ()  # and those among them without which there are scores all the same
IMAGES_PER_PROMPT = 4
SEED = 42  # the protocol has no rule
OFFICIAL = OfficialFolder(
    "LongText-Bench",
    "https://github.com/X-Omni-Team/X-Omni (textbench/, commit 2b8237b)",
    {
        "text_prompts.jsonl": "a2130769e72bd8560470a066114cdac87f80f1eb071ba6bc0f7033225a9be0d8",
        "text_prompts_zh.jsonl": "6512cd121ac093e8113e114d76eb2c0ce967c220b18e2049e1063554ce496758",
    },
)


def prompts(data_dir: str | Path, language: str = "en") -> list[dict[str, Any]]:
    """The 160 prompts of a language ("en" or "zh") under `data_dir`, as records have them.

    {"mode": the language, "prompt_id", "category", "length" ("short" or "long"), "prompt", "ocr_gt": its texts}.
    UserError when the file is absent or altered, and for another language.
    """
    language = language_of("LongText-Bench", language)
    name = {"en": "text_prompts.jsonl", "zh": "text_prompts_zh.jsonl"}[language]
    lines = [json.loads(line) for line in OFFICIAL.read(data_dir, name).decode().splitlines()]
    OFFICIAL.check_number(data_dir, len(lines), 160)
    kept = ("prompt_id", "category", "length", "prompt")
    return [{"mode": language, **{key: line[key] for key in kept}, "ocr_gt": line["text"]} for line in lines]


def plan(prompts: Sequence[Mapping[str, Any]], size: int = 1024, seed: int = SEED) -> list[PlannedImage]:
    """The pictures to draw: four a prompt, square with `size` pixels a side (the protocol leaves the size free).

    The protocol has no rule for seeds: the pictures of every prompt have `seed`, `seed` + 1 and so on.
    """
    return [
        PlannedImage(
            f"{prompt['prompt_id']:04d}",
            image,
            prompt["prompt"],
            seed + image,
            0,
            size,
            size,
            f"{prompt['prompt_id']:04d}_{image + 1}.png",
            official_pattern=f"{prompt['prompt_id']:04d}_[0-9]*.*",
        )
        for prompt in prompts
        for image in range(IMAGES_PER_PROMPT)
    ]


def group(prompt: Mapping[str, Any]) -> str:
    """What its score is part of: its category."""
    return str(prompt["category"])


def questions(prompt: Mapping[str, Any], number_of_pictures: int) -> list[Question]:
    """What has to be asked: the text of every picture."""
    question = {"prompt": QUESTION, "max_new_tokens": MAX_NEW_TOKENS}
    return [Question("vlm", (picture,), question) for picture in range(number_of_pictures)]


def records(prompt: Mapping[str, Any], judgements: Judgements, lost: Lost) -> list[dict[str, Any]]:
    """What `count` takes of a prompt, a record a picture, from the answers to its `questions`."""
    asked = {field: prompt[field] for field in ("mode", "prompt_id", "category", "length", "ocr_gt")}
    return [
        {**asked, **({"lost": lost[picture]} if judged is None else {"answer": judged["answer"]})}
        for ((_, (picture,), _), judged) in judgements
    ]


def prompt_score(verdicts: Sequence[Mapping[str, Any]]) -> float:
    """How well a prompt did, in [0, 1], to find the worst: the share of its units that were read."""
    return sum(verdict["acc"] for verdict in verdicts) / len(verdicts)


def score(records: Sequence[Mapping[str, Any]], mode: Mode = "official") -> dict[str, Any]:
    """Scores read pictures, one record a picture: {"mode": "en" or "zh", "prompt_id", "ocr_gt", "ocr_results"}.

    `ocr_gt` are the texts that the prompt asks for, `ocr_results` what the judge read, cleaned as the original's result
    files have it; its whole reply goes in "answer" instead. "prompt_id", "category" and "length" are optional: the
    first names the prompt, the others the groups of `categories` and `lengths`. A missing or broken picture has "lost",
    the reason, in place of what was judged: none of its text is right.

    Units are words in English (small letters), characters in Chinese. Returns `overall` (units of the texts that were
    read, in any order, over units of the texts, all pictures pooled: long texts weigh more) with `ci_low`, `ci_high`;
    `scores`: `text_score`, and `categories` and `lengths`, each with score, n (units), ci_low and ci_high; `images`,
    `prompts`; `records`: `norm_gt`, `norm_ocr`, `match`, `gt_count` and `acc` of each, in order; and what
    `tally.summarized` adds. Raises ValueError for an empty list, records of both languages, an unknown mode, and a
    record that lacks a field or asks for no text.
    """
    return score_records("LongText-Bench", records, mode, count, summary)


def clean(answer: str, mode: Mode) -> str:
    """The judge's reply without the phrases of it that stand for no text (see the modes above)."""
    if mode == "official":
        return without(answer, NO_TEXT[0])
    return without(answer, "addCriterion", *NO_TEXT)


def normalize(text: str, language: str) -> str:
    """What is compared of a text: words in small letters between single spaces ("en"), characters ("zh")."""
    return words_only(text).lower() if language == "en" else characters_only(text)


def rows(prompt: Mapping[str, Any]) -> list[Row]:
    """The row of a prompt in the counts: language, category, length, and its number or, without one, its texts."""
    name = f"{prompt['prompt_id']:04d}" if "prompt_id" in prompt else json.dumps(prompt["ocr_gt"], ensure_ascii=False)
    return [(language_of("LongText-Bench", prompt["mode"]), prompt.get("category", ""), prompt.get("length", ""), name)]


def count(record: Mapping[str, Any], mode: Mode) -> Scored:
    """One record's verdict, and what it adds to the counts."""
    require(record, "mode", "ocr_gt")
    lost = "lost" in record
    if not lost:
        require(record, "answer" if "answer" in record else "ocr_results")
    (row,) = rows(record)
    language = row[0]
    wanted, read = normalize(" ".join(record["ocr_gt"]), language), normalize(_read(record, mode), language)
    wanted_units = wanted.split() if language == "en" else list(wanted)
    if not wanted_units:
        raise ValueError("asks for no text: its ocr_gt has nothing that is compared.")
    match = common(wanted_units, read.split() if language == "en" else read)
    verdict = {"norm_gt": wanted, "norm_ocr": read, "match": match, "gt_count": len(wanted_units)}
    values = {"images": 1, "units": len(wanted_units), "matched": match}
    return Scored({**verdict, "acc": match / len(wanted_units)}, [Count(row, values, lost)])


def summary(tally: Tally, mode: Mode) -> dict[str, Any]:
    """The result, less the records' verdicts, of raw counts (see `score`)."""
    if len({row[0] for row in tally.table()}) > 1:
        raise ValueError("LongText-Bench scores one language at a time: the records are of en and zh.")
    return summarized("longtext", mode, tally, _scores)


def _read(record: Mapping[str, Any], mode: Mode) -> str:
    """What counts as read: nothing of a lost picture. `ocr_results` are cleaned as the original cleans already."""
    if "lost" in record:
        return ""
    if "answer" in record:
        return clean(record["answer"], mode)
    return record["ocr_results"] if mode == "official" else clean(record["ocr_results"], mode)


def _scores(table: Table) -> dict[str, Any]:
    text_score = _text_score(list(table.values()))
    groups = {
        name: {group: [table[row] for row in table if row[part] == group] for group in sorted({r[part] for r in table})}
        for name, part in (("categories", 1), ("lengths", 2))
    }
    return {
        **mean_of_scores([text_score]),
        "language": next(iter(table))[0],
        "scores": {"text_score": text_score},
        **{
            name: {group: _text_score(counts) for group, counts in parts.items() if group}
            for name, parts in groups.items()
        },
        "images": sum(values["images"] for values in table.values()),
        "prompts": len(table),
    }


def _text_score(counts: Sequence[Mapping[str, int]]) -> dict[str, float | int]:
    units = sum(row["units"] for row in counts)
    pairs = [(row["matched"], row["units"]) for row in counts]
    return clustered(pairs, lambda sums: sums[0] / sums[1], units, at_most=units)
