"""From judgements to scores: prompt by prompt, in both modes, with every verdict kept beside what it rests on.

prompts.jsonl   a line a prompt, in the benchmark's order: its pictures, judgements, verdicts (mode `fixed`) and score
result.json     the scores in both modes, who judged, how the pictures were made, and whether the scores compare

Both depend on the pictures and judgements alone: neither on shards, nor on kills, nor on the time.
"""

import json
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from evaluation.benchmark_pass import BenchmarkPass, Prompt, Seen, judgement_entry
from evaluation.benchmarks.metric import BenchmarkMetric
from evaluation.benchmarks.protocol import Judged, Judgements
from evaluation.benchmarks.tally import Mode
from evaluation.judges.contract import JudgeRecord
from evaluation.judges.weights import library_versions
from evaluation.ledger import Ledger
from evaluation.shards import ANOTHER_OUTPUT, Shard
from zimage_lit import __version__
from zimage_lit.errors import UserError
from zimage_lit.files import locked, write_atomically
from zimage_lit.progress import progress_over

RESULT, PROMPTS = "result.json", "prompts.jsonl"
LIBRARIES = ("pillow", "torch", "torchmetrics")  # that scores and pictures go through; judges name their own


@dataclass(frozen=True)
class Described:
    """What a result says beside its scores.

    model: its name, for tables.   pictures: how they came about.   judges: by role.   reasons: why the scores do not
    compare with published ones; none where they do.
    """

    model: str
    pictures: Mapping[str, Any]
    judges: Mapping[str, JudgeRecord]
    reasons: tuple[str, ...]


class Unfinished(Exception):
    """A picture is not drawn, looked at or judged yet: another shard's share."""


def score(work: BenchmarkPass, described: Described, drawn: bool) -> bool:
    """Write the result; False, and nothing is written, where another shard has not done its share yet.

    drawn: whether a picture that is missing is one that is still to be drawn, and not a lost one.
    """
    metrics = {mode: BenchmarkMetric(work.part.module, work.prompts, mode) for mode in get_args(Mode)}
    sizes: Counter[str] = Counter()
    with locked(work.folder / ".score.lock", ANOTHER_OUTPUT):  # shards that end together would write the same at once
        try:
            write_lines(work.folder / PROMPTS, _prompt_lines(work, described, drawn, metrics, sizes))
        except Unfinished:
            return False
        result = _result(work, described, metrics, sizes)
        write_atomically(work.folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return True


def write_lines(path: Path, lines: Iterator[str]) -> None:
    """A file of lines as they come, which appears in one step: a process killed in mid-write leaves the old one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in lines)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): make that possible, then start the same command again."
        ) from error


def _prompt_lines(
    work: BenchmarkPass,
    described: Described,
    drawn: bool,
    metrics: Mapping[Mode, BenchmarkMetric],
    sizes: Counter[str],
) -> Iterator[str]:
    """The lines of prompts.jsonl; what they say is added to the metrics, and the pictures' sizes are counted."""
    sightings = work.sightings(Shard())
    ledgers = {role: work.judgements(role, judge, Shard()) for role, judge in described.judges.items()}
    with progress_over(f"{work.part.title}: scoring", len(work.prompts)) as done:
        for prompt in work.prompts:
            places = work.places(prompt)
            seen = work.seen(places, sightings)
            if seen is None or (drawn and None in places):
                raise Unfinished
            judgements = _judgements(work, prompt, seen, ledgers)
            sizes.update("{}x{}".format(*picture["size"]) for picture in seen if "size" in picture)
            yield json.dumps(_prompt_line(work, prompt, seen, judgements, metrics), ensure_ascii=False)
            done(1)
    for ledger in (sightings, *ledgers.values()):
        ledger.close()


def _judgements(work: BenchmarkPass, prompt: Prompt, seen: list[Seen], ledgers: Mapping[str, Ledger]) -> list[Judged]:
    """A prompt's questions and what was said to them; raises Unfinished where one has not been asked yet."""
    found = []
    for question in work.questions(prompt):
        entry = judgement_entry(question, seen)
        known = entry and ledgers[question.role].get(entry)
        if entry and not known:
            raise Unfinished
        found.append(Judged(question, known["judgement"] if known else None))
    return found


def _prompt_line(
    work: BenchmarkPass,
    prompt: Prompt,
    seen: list[Seen],
    judgements: Judgements,
    metrics: Mapping[Mode, BenchmarkMetric],
) -> dict[str, Any]:
    """A prompt's line; its records are added to the metrics."""
    module = work.part.module
    lost = {place: picture["lost"] for place, picture in enumerate(seen) if "lost" in picture}
    records = module.records(prompt, judgements, lost)
    for metric in metrics.values():
        metric.update(records)
    verdicts = [module.count(record, "fixed").verdict for record in records]
    return {
        "prompt_id": work.plan(prompt)[0].prompt_id,
        "prompt": prompt["prompt"],
        "group": module.group(prompt),
        "score": module.prompt_score(verdicts),
        "images": _images(work, prompt, seen),
        "verdicts": verdicts,
        "judgements": [
            {**question._asdict(), "pictures": list(question.pictures), "judgement": judgement}
            for question, judgement in judgements
        ],
    }


def _images(work: BenchmarkPass, prompt: Prompt, seen: list[Seen]) -> list[dict[str, Any]]:
    """Where each picture stands, seen from the result's folder if it is below it; "cell" = [row, column, rows, columns]
    of the grid that its file is; "lost" says why it is missing or broken."""
    folder = work.pictures.folder.resolve()
    if folder.is_relative_to(work.folder.resolve()):
        folder = folder.relative_to(work.folder.resolve())
    images = []
    for place, picture in zip(work.places(prompt), seen, strict=True):
        file = None if place is None else str(folder / work.pictures.name(place))
        image: dict[str, Any] = {"file": file, "sha256": picture.get("sha256")}
        if place and place.cut:
            image["cell"] = [*place.cell, *place.shape]
        images.append(image | ({"lost": picture["lost"]} if "lost" in picture else {}))
    return images


def _result(
    work: BenchmarkPass, described: Described, metrics: Mapping[Mode, BenchmarkMetric], sizes: Counter[str]
) -> dict[str, Any]:
    reasons = [*described.reasons, *_reasons_by_size(work, sizes), *_reasons_by_loss(work, sizes)]
    return {
        "benchmark": work.part.benchmark,
        "language": work.part.language,
        "title": work.part.title,
        "model": described.model,
        "pictures": {**described.pictures, "sizes": dict(sorted(sizes.items()))},
        "slice": None if len(work.prompts) == work.of else {"prompts": len(work.prompts), "of": work.of},
        "scores": {mode: metric.compute() for mode, metric in metrics.items()},
        "judges": {role: asdict(judge) for role, judge in described.judges.items()},
        "comparable": {"verdict": not reasons, "reasons": reasons},
        "versions": {"zimage-lit": __version__, "python": platform.python_version(), **library_versions(*LIBRARIES)},
    }


def _reasons_by_size(work: BenchmarkPass, sizes: Counter[str]) -> list[str]:
    """Why pictures of these sizes do not compare, where the protocol names one."""
    side = getattr(work.part.module, "SIZE", None)
    others = [size for size in sorted(sizes) if side and size != f"{side}x{side}"]
    return [f"The pictures have {', '.join(others)} pixels, not {side}x{side}."] if others else []


def _reasons_by_loss(work: BenchmarkPass, sizes: Counter[str]) -> list[str]:
    """Why a score with lost pictures does not compare: published ones leave such pictures out."""
    every = len(work.prompts) * work.number
    lost = every - sizes.total()
    return [f"{lost} of {every} pictures are missing or broken, and count as 0."] if lost else []
