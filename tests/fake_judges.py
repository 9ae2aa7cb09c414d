"""Judges that know nothing and say the same of the same picture: what they say is a function of its pixels."""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from evaluation.judges.contract import Asked, JudgeRecord

CALLS: list[tuple[str, str]] = []  # (role, question and pictures) of all that was asked in this process


class FakeJudge:
    """Answers any role's questions.

    role: whose.   revision: of its weights.   differs: as a record has it.
    """

    def __init__(self, role: str, revision: str = "1", differs: str = "") -> None:
        self.role = role
        self.revision = revision
        self.differs = differs

    def record(self) -> JudgeRecord:
        return JudgeRecord("FakeJudge", "fake", self.revision, self.differs, {"role": self.role})

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        return [self.answer(one) for one in asked]

    def answer(self, one: Asked) -> dict[str, Any]:
        seen = "".join(hashlib.sha256(picture.tobytes()).hexdigest() for picture in one.pictures)
        key = json.dumps([self.role, self.revision, one.question, seen], sort_keys=True)
        CALLS.append((self.role, key))
        return said(self.role, one.question, random.Random(key))


class BrokenJudge(FakeJudge):
    """One that gives what no scoring can read."""

    def answer(self, one: Asked) -> dict[str, Any]:
        return {"answer": float("nan")} if self.revision == "nan" else {"something": "else"}


def said(role: str, question: Any, chance: random.Random) -> dict[str, Any]:
    """A judgement in the role's form."""
    if role == "detector":
        names = [name for name in question["classes"] if chance.random() < 0.8]
        return {
            "detections": [
                {
                    "cls": name,
                    "box": [x := chance.randint(0, 50), y := chance.randint(0, 50), x + 9, y + 9, chance.uniform(0.5, 1)],
                    "color": chance.choice(["red", "blue", "green"]) if name in question["colors"] else None,
                }
                for name in names
            ]
        }
    if role == "ocr":
        words = chance.choices(["sale", "open", "morning", "the"], k=3)
        return {"lines": [{"text": word, "confidence": chance.random()} for word in words]}
    if role in ("vlm", "vqa"):
        answers = ["Yes", "No", "the Sale"] if role == "vlm" else ["yes", "no"]
        return {"answer": chance.choice(answers)}
    if role == "style":
        return {encoder: [chance.uniform(-1, 1) for _ in range(3)] for encoder in ("csd", "se")}
    return {"distance" if role == "distance" else "similarity": chance.random()}
