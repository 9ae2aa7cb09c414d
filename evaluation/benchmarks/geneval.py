"""GenEval: does a picture show the objects, counts, colours and relations that its prompt names?

Rule scoring only: plain dicts in, plain dicts out. The detections come from a judge, which this module does not know:
the benchmark's own detector and colour classifier, or TinyWorld's verifier. Rules as published with the benchmark
(djghosh13/geneval, evaluate_images.py and summary_scores.py; Ghosh et al. 2023, section 3).

Modes. The published rules have no known fault, so both modes judge every picture alike and give the same accuracies.
The modes differ in the intervals alone, which the original does not report: `official` takes all pictures as
independent; `fixed` takes the pictures of one prompt as a cluster, because they succeed and fail together.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3  # a detection counts above this score,
COUNTING_THRESHOLD = 0.9  # and above this one where the prompt is about a number
MAX_OBJECTS = 16  # of one class
POSITION_MARGIN = 0.1  # share of both objects' sizes by which their centres must be apart
POSITION_AXIS = 0.5  # sine of the angle off the axis beyond which a relation also holds along the other axis
_Z95 = 1.959963984540054  # standard normal quantile of a 95 % interval

Mode = Literal["official", "fixed"]
Box = Sequence[float]


class Verdict(TypedDict):
    """Judgement of one picture; `reason` is empty when it is correct, else one line for each broken clause."""

    correct: bool
    reason: str


def score(records: Sequence[Mapping[str, Any]], mode: Mode = "official") -> dict[str, Any]:
    """Scores judged pictures, one record a picture: {"metadata": …, "detections": [{"cls", "box", "color"}, …]}.

    `metadata` is a line of the benchmark's evaluation_metadata.jsonl: "tag", "include" clauses ("class", "count",
    "color"?, "position"? = [relation, index of the reference clause]), "exclude"?, "prompt". `box` is
    (x1, y1, x2, y2, score) in pixels, score in [0, 1]; `color` the classifier's word for that object, or None.

    Returns `overall` (unweighted mean of the task accuracies, over the tasks that occur) with `ci_low`, `ci_high`;
    `tasks`: tag -> accuracy, n, ci_low, ci_high; `images_correct` and `prompts_correct` (a prompt is right when any of
    its pictures is), as shares; `images`, `prompts` (counts); `records`: a Verdict each, in order; `mode`; `interval`,
    the name of the 95 % intervals. Shares lie in [0, 1]. Raises ValueError for an empty list, an unknown tag, mode or
    relation, and a record that lacks a field.
    """
    if mode not in ("official", "fixed"):
        raise ValueError(f"GenEval scores in mode official or fixed, not {mode!r}.")
    if not records:
        raise ValueError("GenEval has nothing to score: the list of records is empty.")
    for i, record in enumerate(records):
        _check(i, record)
    verdicts = [evaluate(record["metadata"], record["detections"]) for record in records]
    by_prompt: dict[str, list[bool]] = defaultdict(list)
    by_task: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for record, verdict in zip(records, verdicts, strict=True):
        prompt = json.dumps(record["metadata"], sort_keys=True, ensure_ascii=False)
        by_prompt[prompt].append(verdict["correct"])
        by_task[record["metadata"]["tag"]][prompt].append(verdict["correct"])
    clustered = mode == "fixed"
    tasks = {tag: _task_score(list(by_task[tag].values()), clustered) for tag in TASKS if tag in by_task}
    return {
        "benchmark": "geneval",
        "mode": mode,
        **_overall_score(list(tasks.values())),
        "tasks": tasks,
        "images_correct": sum(verdict["correct"] for verdict in verdicts) / len(verdicts),
        "prompts_correct": sum(any(images) for images in by_prompt.values()) / len(by_prompt),
        "images": len(verdicts),
        "prompts": len(by_prompt),
        "interval": "95 % Wilson, clustered by prompt" if clustered else "95 % Wilson, images independent",
        "records": verdicts,
    }


def evaluate(metadata: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> Verdict:
    """Judges one picture by the rules: every include clause must be met, no exclude clause may be.

    Clauses are met in order: the best `count` detections of the class; if a colour is named, all of them in it; if a
    position is named, every one of them in that relation to every object of the clause that it refers to.
    """
    objects = filter_detections(detections, metadata["tag"])
    matched: list[list[Mapping[str, Any]] | None] = []
    reasons = []
    for clause in metadata["include"]:
        found = objects.get(clause["class"], [])[: clause["count"]]
        reason = (
            _broken_count(clause, found) or _broken_color(clause, found) or _broken_position(clause, found, matched)
        )
        matched.append(None if reason else found)
        if reason:
            reasons.append(reason)
    for clause in metadata.get("exclude", []):
        number = len(objects.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return {"correct": not reasons, "reason": "\n".join(reasons)}


def filter_detections(detections: Sequence[Mapping[str, Any]], tag: str) -> dict[str, list[Mapping[str, Any]]]:
    """Detections that count, by class, best first: score above 0.3 (counting: 0.9), at most 16 a class, no NMS."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for detection in sorted(detections, key=lambda detection: -detection["box"][4]):
        if detection["box"][4] > threshold and len(kept[detection["cls"]]) < MAX_OBJECTS:
            kept[detection["cls"]].append(detection)
    return dict(kept)


def relative_position(a: Box, b: Box) -> list[str]:
    """Where box `a` stands, seen from box `b`: none, one or two of "left of", "right of", "above", "below".

    Boxes are (x1, y1, x2, y2, …) in pixels, y downwards. The offset between the centres is shortened on each axis by a
    tenth of both boxes' sizes; a relation holds where what is left exceeds half the length of the whole offset.
    """
    offset, shortened = [], []
    for axis in (0, 1):
        distance = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
        sizes = abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis])
        offset.append(distance)
        shortened.append(math.copysign(max(abs(distance) - POSITION_MARGIN * sizes, 0.0), distance))
    if max(abs(value) for value in shortened) < 1e-3:
        return []
    dx, dy = (value / math.hypot(*offset) for value in shortened)
    holds = {
        "left of": dx < -POSITION_AXIS,
        "right of": dx > POSITION_AXIS,
        "above": dy < -POSITION_AXIS,
        "below": dy > POSITION_AXIS,
    }
    return [relation for relation, true in holds.items() if true]


def _broken_count(clause: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    if len(found) >= clause["count"]:
        return ""
    return f"expected {clause['class']}>={clause['count']}, found {len(found)}"


def _broken_color(clause: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    if "color" not in clause:
        return ""
    wanted = clause["color"]
    colors = [detection["color"] for detection in found]
    if colors.count(wanted) >= clause["count"]:
        return ""
    others = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color != wanted and color in colors)
    return (
        f"expected {wanted} {clause['class']}>={clause['count']}, found {colors.count(wanted)} {wanted}; and {others}"
    )


def _broken_position(
    clause: Mapping[str, Any],
    found: Sequence[Mapping[str, Any]],
    matched: Sequence[Sequence[Mapping[str, Any]] | None],
) -> str:
    if "position" not in clause:
        return ""
    wanted, reference = clause["position"]
    targets = matched[reference]
    if targets is None:
        return f"no target for {clause['class']} to be {wanted}"
    for detection in found:
        for target in targets:
            relations = relative_position(detection["box"], target["box"])
            if wanted not in relations:
                return f"expected {clause['class']} {wanted} target, found {' and '.join(relations)} target"
    return ""


def _check(index: int, record: Mapping[str, Any]) -> None:
    """ValueError, naming the record, for what would otherwise be scored wrongly or fail far from its cause."""
    missing = [key for key in ("metadata", "detections") if key not in record]
    if missing:
        raise ValueError(f"GenEval record {index} has no {missing[0]!r}: give metadata and detections for every image.")
    metadata = record["metadata"]
    if metadata.get("tag") not in TASKS:
        raise ValueError(
            f"GenEval record {index} has the tag {metadata.get('tag')!r}: it must be one of {', '.join(TASKS)}."
        )
    if not metadata.get("include"):
        raise ValueError(
            f"GenEval record {index} has no include clauses: take the metadata from the benchmark's own file."
        )
    for position, clause in enumerate(metadata["include"]):
        relation, reference = clause.get("position", ("above", 0))
        if relation not in RELATIONS or ("position" in clause and not 0 <= reference < position):
            raise ValueError(
                f"GenEval record {index} has the position {clause['position']}: give one of {', '.join(RELATIONS)}, "
                "and the number of an earlier clause."
            )
    for detection in record["detections"]:
        if not {"cls", "box", "color"} <= detection.keys() or len(detection["box"]) != 5:
            raise ValueError(
                f"GenEval record {index} has a detection without cls, color and box (x1, y1, x2, y2, score)."
            )


def _task_score(prompts: Sequence[Sequence[bool]], clustered: bool) -> dict[str, float | int]:
    """Accuracy over the images of a task and its interval; one inner list a prompt."""
    images = [correct for prompt in prompts for correct in prompt]
    accuracy = sum(images) / len(images)
    low, high = wilson_interval(accuracy, _effective_number(prompts) if clustered else len(images))
    return {"accuracy": accuracy, "n": len(images), "ci_low": low, "ci_high": high}


def wilson_interval(share: float, number: float) -> tuple[float, float]:
    """95 % Wilson score interval of a share seen in `number` independent draws (Wilson 1927)."""
    squared = _Z95**2 / number
    centre = (share + squared / 2) / (1 + squared)
    half = math.sqrt(squared * (share * (1 - share) + squared / 4)) / (1 + squared)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _effective_number(prompts: Sequence[Sequence[bool]]) -> float:
    """How many independent images a task's images are worth: their number over the design effect of prompts as
    clusters.

    The design effect is the ratio estimator's clustered variance over the binomial one, not below 1 (Kish 1965, chapter
    5). With one prompt, or all images alike, it cannot be estimated and is taken as 1.
    """
    number = sum(len(prompt) for prompt in prompts)
    accuracy = sum(sum(prompt) for prompt in prompts) / number
    if len(prompts) < 2 or accuracy in (0, 1):
        return number
    residuals = sum((sum(prompt) - accuracy * len(prompt)) ** 2 for prompt in prompts)
    clustered = residuals / number**2 * len(prompts) / (len(prompts) - 1)
    return number / max(clustered / (accuracy * (1 - accuracy) / number), 1.0)


def _overall_score(tasks: Sequence[Mapping[str, float | int]]) -> dict[str, float]:
    """Unweighted mean of the tasks; its interval squares and adds the tasks' own half widths (Newcombe's MOVER)."""
    overall = sum(task["accuracy"] for task in tasks) / len(tasks)
    below = math.sqrt(sum((task["accuracy"] - task["ci_low"]) ** 2 for task in tasks)) / len(tasks)
    above = math.sqrt(sum((task["ci_high"] - task["accuracy"]) ** 2 for task in tasks)) / len(tasks)
    return {"overall": overall, "ci_low": max(overall - below, 0.0), "ci_high": min(overall + above, 1.0)}
