"""`lightning run evaluate --self-test`: whether this installation scores, reads and judges as it should, in a minute.

Each check is a line: ok, failed with what was found, or skipped with what is not installed. Only a failure is an error.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_modules.tinyworld.world import draw_statement
from evaluation.benchmarks import cvtg2k, dpg, geneval, longtext, oneig, tinyworld
from evaluation.benchmarks.metric import Benchmark, BenchmarkMetric
from evaluation.judges.contract import Asked
from evaluation.judges.ocr import RapidOCRReader
from evaluation.judges.tinyworld import TinyWorldVerifier
from evaluation.oracle import blank, find_font, page
from zimage_lit.errors import UserError

ENGLISH, CHINESE = "OPEN 24 HOURS", "今日营业"
WORLD_PROMPTS = 3  # of each of TinyWorld's tasks


def self_test(golden: Path | None) -> int:
    """Prints a line a check. 0, or 1 where one failed.

    golden: folder of vectors that the published code has made (`geneval/rule_vectors.json` and so on), to be scored
        too.
    """
    states = []
    for name, check in checks(golden):
        try:
            state, detail = "ok", check()
        except UserError as error:
            state, detail = "skipped", str(error)
        except Exception as error:  # whatever goes wrong here would go wrong in an evaluation
            state, detail = "failed", f"{type(error).__name__}: {error}"
        states.append(state)
        print(f"{state:<8} {name}: {detail}", flush=True)
    print("\n" + ", ".join(f"{states.count(state)} {state}" for state in ("ok", "failed", "skipped")))
    return int("failed" in states)


def checks(golden: Path | None) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and check, which says what it has found, and raises where that is wrong (UserError: not installed)."""
    for name, check in BY_HAND.items():
        yield f"{name}, scored by hand", check
    for name, compare in PUBLISHED.items():
        yield f"{name}, published vectors", partial(against_published, golden, name, compare)
    yield "OCR reads English", read_english
    yield "OCR reads Chinese", read_chinese
    yield "TinyWorld's verifier", judge_tinyworld


def expect(found: Any, expected: Any, what: str) -> None:
    """ValueError unless the numbers agree to rounding, everything else to the letter."""
    if isinstance(expected, float) and isinstance(found, float | int):
        agree = math.isclose(found, expected, rel_tol=0, abs_tol=1e-12)
    else:
        agree = found == expected
    if not agree:
        raise ValueError(f"{what} is {found!r}, and should be {expected!r}")


# --------------------------------------------------------------------------------- a few records, scored by hand


def scored(benchmark: Any, records: Sequence[Mapping[str, Any]], expected: Mapping[str, float]) -> str:
    """The scores of some records, in both modes, at once and in parts as ranks would have them."""
    for mode in ("official", "fixed"):
        result = benchmark.score(records, mode)
        for name, value in expected.items():
            expect(result["scores"][name]["score"], value, f"{name} ({mode})")
        expect(in_parts(benchmark, records, mode), result["scores"], f"the score in parts ({mode})")
    return ", ".join(f"{name} {value:.4g}" for name, value in expected.items())


def in_parts(benchmark: Benchmark, records: Sequence[Mapping[str, Any]], mode: Any) -> Any:
    metric = BenchmarkMetric(benchmark, records, mode)
    for record in reversed(records):
        metric.update([record])
    return metric.compute()["scores"]


def geneval_by_hand() -> str:
    """Two dogs of two; one of two dogs; a cat left of a dog, which it is."""

    def seen(name: str, left: int, score: float = 0.95) -> dict[str, Any]:
        return {"cls": name, "box": [left, 0, left + 10, 10, score], "color": None}

    two = {"tag": "counting", "prompt": "two dogs", "include": [{"class": "dog", "count": 2}]}
    beside = {"class": "cat", "count": 1, "position": ["left of", 0]}
    left = {"tag": "position", "prompt": "a cat left of a dog", "include": [{"class": "dog", "count": 1}, beside]}
    records = [
        {"index": 0, "metadata": two, "detections": [seen("dog", 0), seen("dog", 50)]},
        {"index": 0, "metadata": two, "detections": [seen("dog", 0), seen("dog", 50, score=0.9)]},  # not above 0.9
        {"index": 1, "metadata": left, "detections": [seen("dog", 50), seen("cat", 0)]},
    ]
    return scored(geneval, records, {"counting": 0.5, "position": 1.0})


def cvtg2k_by_hand() -> str:
    """Of `free`, `tea` and `open`, the first is read; both others are three edits of four letters from it."""
    prompt = {"set": "CVTG", "area": 2, "index": 0, "prompt": "'Free Tea' and 'OPEN'"}
    ned = (1 + 2 * (1 - 3 / (4 + 1e-5))) / 3
    return scored(cvtg2k, [{**prompt, "ocr_lines": ["FREE"]}], {"word_accuracy": 1 / 3, "ned": ned})


def longtext_by_hand() -> str:
    """Three of four words; two of four letters, in any order."""
    prompt = {"prompt_id": 0, "category": "sign", "length": "short"}
    english = {**prompt, "mode": "en", "ocr_gt": ["Fresh Brews,", "every day"], "answer": "FRESH brews every dai"}
    chinese = {**prompt, "mode": "zh", "ocr_gt": ["今日营业"], "answer": "日今"}
    found = scored(longtext, [english], {"text_score": 0.75})
    return f"{found} (en), {scored(longtext, [chinese], {'text_score': 0.5})} (zh)"


def oneig_by_hand() -> str:
    """Two pictures of a prompt, one of which answers its first question with no: both fail by it, 1 and 0.

    The text lacks six letters and one of two words: 1 − 6 · 1 · ½ / 100. All else are means.
    """
    anime = {"set": "anime", "id": "000"}
    answers = [{"1": "Yes", "2": "Yes"}, {"1": "No", "2": "Yes"}]
    records: list[dict[str, Any]] = [
        {**anime, "dependency": {"1": [0], "2": [1]}, "answers": answers},
        {"set": "text", "id": "001", "gt_raw": "['Hello World']", "ocr": "Hello"},
        {"set": "reasoning", "id": "002", "gt_answer": "", "similarities": [0.2, 0.4]},
        {**anime, "style": "clay", "csd": [[0.5, 0.1, -0.2]], "se": [[0.3, 0.2, 0.1]]},
        {**anime, "distances": [0.1, 0.2, 0.3]},
    ]
    expected = {"alignment": 0.5, "text": 0.97, "reasoning": 0.3, "style": 0.4, "diversity": 0.2}
    return scored(oneig, records, expected)


def dpg_by_hand() -> str:
    """Of three questions, the second depends on the first: two hold in one picture, one in the other."""
    about = dict.fromkeys(("1", "2", "3"), "entity - whole (chair)")
    answers = [{"1": "yes", "2": "no", "3": "yes"}, {"1": "no", "2": "yes", "3": "yes"}]
    record = {"item_id": "whoops0", "tuples": about, "dependency": {"1": [0], "2": [1], "3": [0]}, "answers": answers}
    return scored(dpg, [record], {"dpg": 0.5})


BY_HAND: Mapping[str, Callable[[], str]] = {
    "GenEval": geneval_by_hand,
    "CVTG-2K": cvtg2k_by_hand,
    "LongText-Bench": longtext_by_hand,
    "OneIG-Bench": oneig_by_hand,
    "DPG-Bench": dpg_by_hand,
}


# ---------------------------------------------------------------------------- what the published code makes of more


def against_published(golden: Path | None, name: str, compare: Callable[[Any], int]) -> str:
    if golden is None:
        raise UserError(
            "give golden=FOLDER, with what the benchmark's own code made of some cases, to have them scored too."
        )
    return f"{compare(json.loads((golden / FILES[name]).read_text(encoding='utf-8')))} cases as published"


def same_verdicts(benchmark: Any, cases: Sequence[Mapping[str, Any]]) -> int:
    """How many cases there are; ValueError where a verdict is another than its case has."""
    for place, (case, verdict) in enumerate(zip(cases, benchmark.score(cases)["records"], strict=True)):
        if not verdict.keys() & case.keys():
            raise ValueError(f"case {place} has none of {', '.join(verdict)}")
        for field in verdict.keys() & case.keys():
            expect(verdict[field], case[field], f"{field} of case {place}")
    return len(cases)


def same_geneval(vectors: Any) -> int:
    for pair in vectors["relative_position"]:
        expect(sorted(geneval.relative_position(pair["a"], pair["b"])), sorted(pair["rel"]), f"where {pair['a']} is")
    return same_verdicts(geneval, vectors["cases"]) + len(vectors["relative_position"])


def same_longtext(vectors: Any) -> int:
    for answer, cleaned in vectors["clean"]:
        expect(longtext.clean(answer, "official"), cleaned, f"{answer!r}, cleaned,")
    return sum(same_verdicts(longtext, vectors[language]) for language in ("en", "zh")) + len(vectors["clean"])


PUBLISHED: Mapping[str, Callable[[Any], int]] = {
    "GenEval": same_geneval,
    "CVTG-2K": lambda vectors: same_verdicts(cvtg2k, vectors["cases"]),
    "LongText-Bench": same_longtext,
    "OneIG-Bench alignment": lambda vectors: same_verdicts(oneig, vectors["cases"]),
    "OneIG-Bench text": lambda vectors: sum(same_verdicts(oneig, vectors[part]["cases"]) for part in ("EN", "ZH")),
    "DPG-Bench": lambda vectors: same_verdicts(dpg, vectors["cases"]),
}
FILES = {
    "GenEval": "geneval/rule_vectors.json",
    "CVTG-2K": "cvtg2k/ocr_vectors.json",
    "LongText-Bench": "longtext/scoring_vectors.json",
    "OneIG-Bench alignment": "oneig/alignment_vectors.json",
    "OneIG-Bench text": "oneig/text_vectors.json",
    "DPG-Bench": "dpg/dependency_vectors.json",
}


# ------------------------------------------------------------------------------- pictures, through the embedded judges


def read_english() -> str:
    """In the letters that come with Pillow: nothing has to be installed beside the reader."""
    picture = blank(512)
    letters = ImageFont.load_default(52)
    ImageDraw.Draw(picture).text((48, 220), ENGLISH, font=letters, fill="black")
    return read_as(picture, ENGLISH)


def read_chinese() -> str:
    return read_as(page([CHINESE], find_font(), 512), CHINESE)


def read_as(picture: Image.Image, text: str) -> str:
    reader = RapidOCRReader()
    reader.record()  # raises where it is not installed
    try:
        (judgement,) = reader.judge([Asked((picture,), {})])
    except UserError as error:  # it is installed, and does not work
        raise RuntimeError(str(error)) from error
    expect(" ".join(line["text"] for line in judgement["lines"]), text, "what was read")
    return f"{text} ({reader.record().model})"


def judge_tinyworld() -> str:
    """Pictures that the world draws of its held-out prompts are judged right, and empty ones wrong."""
    prompts = tinyworld.prompts(per_task=WORLD_PROMPTS)
    drawn = [Image.fromarray(draw_statement(prompt["metadata"], 0).image) for prompt in prompts]
    for verdict, pictures in ((True, drawn), (False, [blank(64)] * len(drawn))):
        asked = [Asked((picture,), prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        seen = TinyWorldVerifier().judge(asked)
        records = [{"metadata": prompt["metadata"], **found} for prompt, found in zip(prompts, seen, strict=True)]
        verdicts = [judged["correct"] for judged in tinyworld.score(records)["records"]]
        expect(verdicts.count(verdict), len(prompts), "right among drawn" if verdict else "wrong among empty pictures")
    return f"{len(prompts)} drawn pictures judged right, as many empty ones wrong"
