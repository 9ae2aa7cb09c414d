"""One model's pictures of one benchmark in one language: what is planned, where it stands, what was seen of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.benchmarks.protocol import PlannedImage, Question
from evaluation.judges.contract import JudgeRecord
from evaluation.ledger import Ledger
from evaluation.pictures import MISSING, PictureFolder, Place
from evaluation.shards import Shard
from evaluation.suite import Part

Prompt = Mapping[str, Any]
Seen = Mapping[str, Any]  # of one picture: {"sha256", "size": [width, height]}, or {"lost": why}


@dataclass(frozen=True)
class BenchmarkPass:
    """What all steps of an evaluation share.

    prompts, of: those that are evaluated, each by one of the roles at least, and how many the benchmark has.
    number: of pictures of each prompt.   size, seed: of the pictures to draw, None for the protocol's own.
    drawn_together: pictures in one batch.
    folder: of all that is written.
    """

    part: Part
    prompts: Sequence[Prompt]
    of: int
    number: int
    roles: tuple[str, ...]
    pictures: PictureFolder
    folder: Path
    size: int | None = None
    seed: int | None = None
    drawn_together: int = 1

    def plan(self, prompt: Prompt) -> list[PlannedImage]:
        """The pictures of a prompt that are evaluated."""
        return self.part.plan(prompt, self.size, self.seed)[: self.number]

    def places(self, prompt: Prompt) -> list[Place | None]:
        """Where they stand."""
        return self.pictures.find(self.part.plan(prompt))[: self.number]

    def questions(self, prompt: Prompt) -> list[Question]:
        """What is asked about them, of the judges that there are."""
        return [one for one in self.part.module.questions(prompt, self.number) if one.role in self.roles]

    def share(self, shard: Shard) -> list[Prompt]:
        """A shard's prompts. What is drawn together is drawn by one shard, so that no picture depends on them."""
        return shard.share(self.prompts, block=-(-self.drawn_together // self.number))

    def sightings(self, shard: Shard) -> Ledger:
        """What was seen of pictures, prompt by prompt."""
        return Ledger(self.folder, "pictures", ("state", "compressed"), shard)

    def judgements(self, role: str, judge: JudgeRecord, shard: Shard) -> Ledger:
        """What a judge said."""
        return Ledger(self.folder / "judgements", f"{role}-{judge.key}", ("pictures", "question"), shard)

    def sighting(self, places: Sequence[Place | None]) -> dict[str, Any]:
        """What an entry of the sightings is found by."""
        return {"state": self.pictures.state(places), "compressed": self.pictures.compressed}

    def seen(self, places: Sequence[Place | None], sightings: Ledger) -> list[Seen] | None:
        """What was seen of a prompt's pictures as they are now; None where nobody has looked yet."""
        if not any(places):
            return [{"lost": MISSING}] * len(places)
        entry = sightings.get(self.sighting(places))
        return entry["seen"] if entry else None

    def load(self, places: Sequence[Place | None]) -> list[Image.Image | str]:
        return self.pictures.load(places)


def judgement_entry(question: Question, seen: Sequence[Seen]) -> dict[str, Any] | None:
    """What a judgement is kept by; None where one of the question's pictures is lost."""
    pictures = [seen[picture] for picture in question.pictures]
    if any("lost" in picture for picture in pictures):
        return None
    return {"pictures": [picture["sha256"] for picture in pictures], "question": question.question}
