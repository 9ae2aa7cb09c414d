"""How long a whole pass of GenEval takes to score, 2,212 pictures, from what a detector said of them.

    python benchmarks/scoring.py DATA                  # DATA/geneval has the official files; half a minute on two cores

The pictures are small, and the judge draws lots: a picture has up to `--detections` objects, among them, more often
than not, those that are wanted. Times the steps of `lightning run evaluate` apart: looking at the pictures, judging,
scoring in both modes with all that is written. Prints a table and one line of JSON.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from evaluation import task
from evaluation.judges.contract import Asked, JudgeRecord
from evaluation.suite import Part

OTHERS = ("person", "chair", "cup", "book", "car")


class Lots:
    """A detector that knows nothing and finds much.

    most: objects of a picture.
    """

    def __init__(self, most: int = 100) -> None:
        self.most = most

    def record(self) -> JudgeRecord:
        return JudgeRecord("Lots", "lots", "1", "It draws lots.", {"most": self.most})

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        return [{"detections": self.found(one)} for one in asked]

    def found(self, one: Asked) -> list[dict[str, Any]]:
        chance = random.Random(one.pictures[0].tobytes())
        names = chance.choices([*one.question["classes"], *OTHERS], k=chance.randint(1, self.most))
        corners = [[chance.randint(0, 900) for _ in range(2)] for _ in names]
        return [
            {"cls": name, "box": [x, y, x + 90, y + 90, chance.random()], "color": chance.choice(["red", "blue", None])}
            for name, (x, y) in zip(names, corners, strict=True)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--detections", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = timed_pass(options.data, Path(folder), options.detections)
    for name, value in seconds.items():
        print(f"{name:<12} {value:8.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**seconds, "peak_MiB": round(peak)}))


def timed_pass(data: Path, folder: Path, detections: int) -> dict[str, float]:
    """Seconds of each step, of a first pass and of one where everything has been judged."""
    part = Part("geneval")
    planned = [image for prompt in part.prompts(data) for image in part.plan(prompt)]
    for number, image in enumerate(planned):
        file = folder / "pictures" / image.file
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768)).save(file)
    judge = {"class_path": f"{__name__}.Lots", "init_args": {"most": detections}}
    settings = task.EvaluateSettings(
        benchmark=["geneval"],
        images=str(folder / "pictures"),
        data=str(data),
        output=str(folder / "out"),
        judges={"detector": judge},
    )
    seconds: dict[str, float] = {}
    with clocked("look", seconds), clocked("judge_all", seconds), clocked("finish", seconds):
        task.evaluate(settings)
    again = time.perf_counter()
    task.evaluate(settings)
    return {**seconds, "all again": time.perf_counter() - again}


@contextmanager
def clocked(name: str, seconds: dict[str, float]) -> Any:
    """Notes how long the task's function of that name takes."""
    function = getattr(task, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds.setdefault(name, time.perf_counter() - start)

    with mock.patch.object(task, name, timed):
        yield


if __name__ == "__main__":
    main()
