"""What the judges said of a prompt's pictures, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.benchmarks.geneval import THRESHOLD
from evaluation.benchmarks.oneig import QUESTION_ENDING
from evaluation.report.results import Prompt

LONGEST = 240  # letters that are quoted of a text


def judges_words(line: Prompt) -> list[str]:
    """A sentence for every picture, by number from 1, and one for what was judged of all together."""
    verdicts = [verdict for verdict in line["verdicts"] if "per_image" not in verdict]
    of_each = verdicts if len(verdicts) == len(line["images"]) else [{}] * len(line["images"])
    told = []
    for number, (image, verdict) in enumerate(zip(line["images"], of_each, strict=True)):
        if image.get("lost"):
            words = [f"lost: {image['lost']}"]
        else:
            own = [one for one in line["judgements"] if one["pictures"] == [number] and one["judgement"]]
            words = [*filter(None, [verdict_in_words(verdict)]), *judgements_in_words(own)]
        if words:
            told.append(f"Picture {number + 1}: {'; '.join(words)}.")
    distances = [
        one["judgement"]["distance"] for one in line["judgements"] if one["role"] == "distance" and one["judgement"]
    ]
    if distances:
        told.append(f"Distances between pictures: {', '.join(f'{value:.2f}' for value in distances)}.")
    return told


def verdict_in_words(verdict: Mapping[str, Any]) -> str:
    """What the scoring made of one picture; "" for verdicts of whole prompts, which have other forms."""
    if "correct" in verdict:
        return "right" if verdict["correct"] else ", ".join(verdict["reason"].split("\n"))
    if "correct_words" in verdict:
        return f"{verdict['correct_words']} of {verdict['total_words']} words right"
    if "match" in verdict:
        return f"{verdict['match']} of {verdict['gt_count']} words or characters right"
    return ""


def judgements_in_words(judgements: Sequence[Mapping[str, Any]]) -> list[str]:
    """What judges said of one picture."""
    by_role: dict[str, list[Mapping[str, Any]]] = {}
    for one in judgements:
        by_role.setdefault(one["role"], []).append(one)
    told = []
    for role, own in by_role.items():
        if role == "vqa":
            told.append(yes_and_no("yes", [(one["question"]["question"], one["judgement"]["answer"]) for one in own]))
        elif role == "vlm" and own[0]["question"]["prompt"].endswith(QUESTION_ENDING):
            told.append(yes_and_no("Yes", [(one["question"]["prompt"], one["judgement"]["answer"]) for one in own]))
        else:
            told += [sentence for one in own if (sentence := in_words(role, one["judgement"]))]
    return told


def in_words(role: str, judgement: Mapping[str, Any]) -> str:
    """One judgement, by its role's form (see `evaluation.judges.contract`); "" for what says nothing to a reader."""
    if "detections" in judgement:  # a detector's, or TinyWorld's verifier's
        seen = [detection for detection in judgement["detections"] if detection["box"][4] > THRESHOLD]
        names = [f"{detection['color'] or ''} {detection['cls']}".strip() for detection in seen]
        return f"seen: {', '.join(counted(names)) or 'nothing'}"
    if role == "ocr":
        return f"read: {quoted(' / '.join(line['text'] for line in judgement['lines']))}"
    if role == "vlm":
        return f"read: {quoted(judgement['answer'])}"
    if role in ("clip", "llm2clip"):
        return f"likeness to the text {judgement['similarity']:.3f}"
    if role == "style":
        return f"likeness to the style {max(judgement['csd']):.2f} (CSD), {max(judgement['se']):.2f} (SE)"
    return ""


def yes_and_no(yes: str, answers: Sequence[tuple[str, str]]) -> str:
    """Questions that were not answered with `yes` to the letter, which is what counts, with the answer."""
    others = [(question, answer) for question, answer in answers if answer != yes]
    if not others:
        return f"yes to all {len(answers)} questions"
    asked = ", ".join(f"{quoted(question.removesuffix(QUESTION_ENDING))} ({answer})" for question, answer in others)
    return f"not {yes} to {len(others)} of {len(answers)} questions: {asked}"


def counted(names: Sequence[str]) -> list[str]:
    return [f"{names.count(name)} × {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]


def quoted(text: str) -> str:
    text = " ".join(text.split())
    return f"“{text[:LONGEST]}{'…' if len(text) > LONGEST else ''}”" if text else "nothing"
