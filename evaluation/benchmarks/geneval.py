"""GenEval: does a picture show the objects, counts, colours and relations that its prompt names?

Rule scoring only: plain dicts in, plain dicts out. The detections come from a judge, which this module does not know:
the benchmark's own detector and colour classifier, or TinyWorld's verifier. Rules as published with the benchmark
(djghosh13/geneval, evaluate_images.py and summary_scores.py; Ghosh et al. 2023, section 3).

Modes. The published rules have no known fault, so both modes judge every picture alike and give the same result.
"""

import json
import math
from collections import defaultdict
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
    mean_of_scores,
    require,
    score_records,
    summarized,
)

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3  # a detection counts above this score,
COUNTING_THRESHOLD = 0.9  # and above this one where the prompt is about a number
MAX_OBJECTS = 16  # of one class
POSITION_MARGIN = 0.1  # share of both objects' sizes by which their centres must be apart
POSITION_AXIS = 0.5  # sine of the angle off the axis beyond which a relation also holds along the other axis
COLUMNS = ("images", "correct")
ROLES_USED = ("detector",)  # of judges,
OPTIONAL_ROLES = ()  # and those among them without which there are scores all the same
IMAGES_PER_PROMPT = 4
SEED = 42  # set anew before each prompt
OFFICIAL = OfficialFolder(
    "GenEval",
    "https://github.com/djghosh13/geneval (prompts/, commit af4902f)",
    {"evaluation_metadata.jsonl": "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"},
)
Box = Sequence[float]


def prompts(data_dir: str | Path) -> list[dict[str, Any]]:
    """The 553 prompts of evaluation_metadata.jsonl under `data_dir`: {"index", "prompt", "metadata"}, as records have.

    UserError when the file is absent or altered.
    """
    lines = OFFICIAL.read(data_dir, "evaluation_metadata.jsonl").decode().splitlines()
    metadata = [json.loads(line) for line in lines]
    OFFICIAL.check_number(data_dir, len(metadata), 553)
    return [{"index": i, "prompt": line["prompt"], "metadata": line} for i, line in enumerate(metadata)]


def plan(prompts: Sequence[Mapping[str, Any]], size: int = 1024, seed: int = SEED) -> list[PlannedImage]:
    """The pictures to draw: four a prompt, square with `size` pixels a side (the protocol: the model's native size).

    Their noises are drawn one after the other from one generator, seeded anew with `seed` for every prompt.
    """
    return [
        PlannedImage(
            f"{prompt['index']:05d}",
            image,
            prompt["prompt"],
            seed,
            image,
            size,
            size,
            f"{prompt['index']:05d}/samples/{image:04d}.png",
            official_pattern=f"{prompt['index']:05d}/samples/[0-9]*.*",
        )
        for prompt in prompts
        for image in range(IMAGES_PER_PROMPT)
    ]


def group(prompt: Mapping[str, Any]) -> str:
    """What its score is part of: its task."""
    return str(prompt["metadata"]["tag"])


def questions(prompt: Mapping[str, Any], number_of_pictures: int) -> list[Question]:
    """What has to be asked: the objects of every class that the prompt wants or excludes, and the colours of those that
    it wants in a colour."""
    wanted = prompt["metadata"]["include"]
    classes = [clause["class"] for clause in (*wanted, *prompt["metadata"].get("exclude", ()))]
    colors = [clause["class"] for clause in wanted if "color" in clause]
    question = {"classes": list(dict.fromkeys(classes)), "colors": list(dict.fromkeys(colors))}
    return [Question("detector", (picture,), question) for picture in range(number_of_pictures)]


def records(prompt: Mapping[str, Any], judgements: Judgements, lost: Lost) -> list[dict[str, Any]]:
    """What `count` takes of a prompt, a record a picture, from the answers to its `questions`."""
    asked = {"index": prompt["index"], "metadata": prompt["metadata"]}
    return [
        {**asked, **({"lost": lost[picture]} if judged is None else {"detections": judged["detections"]})}
        for ((_, (picture,), _), judged) in judgements
    ]


def prompt_score(verdicts: Sequence[Mapping[str, Any]]) -> float:
    """How well a prompt did, in [0, 1], to find the worst: the share of its pictures that are correct."""
    return sum(verdict["correct"] for verdict in verdicts) / len(verdicts)


def score(records: Sequence[Mapping[str, Any]], mode: Mode = "official") -> dict[str, Any]:
    """Scores judged pictures, one record a picture: {"metadata": …, "detections": [{"cls", "box", "color"}, …]}.

    `metadata` is a line of the benchmark's evaluation_metadata.jsonl: "tag", "include" clauses ("class", "count",
    "color"?, "position"? = [relation, index of the reference clause]), "exclude"?, "prompt". `box` is
    (x1, y1, x2, y2, score) in pixels, score in [0, 1]; `color` the classifier's word for that object, or None. A
    missing or broken picture has "lost", the reason, in place of "detections": it is wrong, and counted. "index", the
    number of the metadata's line, is optional and names the prompt.

    Returns `overall` (unweighted mean of the task accuracies, over the tasks that occur) with `ci_low`, `ci_high`;
    `tasks`: tag -> accuracy, n, ci_low, ci_high; `images_correct` and `prompts_correct` (a prompt is right when any of
    its pictures is), as shares; `images`, `prompts` (counts); `records`: `correct` and `reason` (empty when it is
    correct, else one line for each broken clause) of each, in order; and what `tally.summarized` adds. Shares lie in
    [0, 1]. Raises ValueError for an empty list, an unknown tag, mode or relation, and a record that lacks a field.
    """
    return score_records("GenEval", records, mode, count, summary)


def rows(prompt: Mapping[str, Any]) -> list[Row]:
    """The row of a prompt in the counts: its task, and its number or, without one, its metadata."""
    metadata = prompt["metadata"]
    name = f"{prompt['index']:05d}" if "index" in prompt else json.dumps(metadata, sort_keys=True, ensure_ascii=False)
    return [(metadata["tag"], name)]


def count(record: Mapping[str, Any], mode: Mode) -> Scored:
    """One record's verdict, and what it adds to the counts."""
    _check(record)
    (row,) = rows(record)
    verdict: dict[str, Any]
    if "lost" in record:
        verdict = {"correct": False, "reason": f"lost: {record['lost']}"}
    else:
        verdict = evaluate(record["metadata"], record["detections"])
    values = {"images": 1, "correct": int(verdict["correct"])}
    return Scored(verdict, [Count(row, values, lost="lost" in record)])


def summary(tally: Tally, mode: Mode) -> dict[str, Any]:
    """The result, less the records' verdicts, of raw counts (see `score`)."""
    return summarized("geneval", mode, tally, _scores)


def evaluate(metadata: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def _check(record: Mapping[str, Any]) -> None:
    """ValueError for what would otherwise be scored wrongly or fail far from its cause."""
    require(record, "metadata", "detections" if "lost" not in record else "metadata")
    metadata = record["metadata"]
    if metadata.get("tag") not in TASKS:
        raise ValueError(f"has the tag {metadata.get('tag')!r}: it must be one of {', '.join(TASKS)}.")
    if not metadata.get("include"):
        raise ValueError("has no include clauses: take the metadata from the benchmark's own file.")
    for position, clause in enumerate(metadata["include"]):
        relation, reference = clause.get("position", ("above", 0))
        if relation not in RELATIONS or ("position" in clause and not 0 <= reference < position):
            raise ValueError(
                f"has the position {clause['position']}: give one of {', '.join(RELATIONS)}, and the number of an "
                "earlier clause."
            )
    for detection in record.get("detections", ()):
        if not {"cls", "box", "color"} <= detection.keys() or len(detection["box"]) != 5:
            raise ValueError("has a detection without cls, color and box (x1, y1, x2, y2, score).")


def _scores(table: Table) -> dict[str, Any]:
    by_task = {tag: [values for row, values in table.items() if row[0] == tag] for tag in TASKS}
    scores = {tag: accuracy(counts) for tag, counts in by_task.items() if counts}
    images = sum(values["images"] for values in table.values())
    return {
        **mean_of_scores(list(scores.values())),
        "scores": scores,
        "tasks": {tag: {"accuracy": task["score"], **task} for tag, task in scores.items()},
        "images_correct": sum(values["correct"] for values in table.values()) / images,
        "prompts_correct": sum(values["correct"] > 0 for values in table.values()) / len(table),
        "images": images,
        "prompts": len(table),
    }


def accuracy(counts: Sequence[Mapping[str, int]]) -> dict[str, float | int]:
    """The share of a task's images that are correct, with its interval, from a row of counts for each prompt."""
    images = sum(row["images"] for row in counts)
    pairs = [(row["correct"], row["images"]) for row in counts]
    return clustered(pairs, lambda sums: sums[0] / sums[1], images, at_most=images)
