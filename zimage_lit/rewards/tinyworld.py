"""TinyWorld's rewards: its verifier looks, GenEval's rules judge. No network, nothing to download."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_modules.tinyworld.verifier import detect, read_word
from evaluation.benchmarks import geneval
from zimage_lit.errors import UserError
from zimage_lit.rewards.contract import Metadata, RewardCallback
from zimage_lit.rewards.pictures import as_array
from zimage_lit.rewards.text import text_score

Aspect = Literal["all", "elements", "shape", "count", "color", "position", "word"]
Objects = Mapping[str, Sequence[Mapping[str, Any]]]  # class -> its detections that count, best first
Clauses = Sequence[Mapping[str, Any]]


class TinyWorldReward(RewardCallback):
    """Whether a picture shows what its statement says.

    aspect: what is looked at.
        all: everything, 1 or 0, by GenEval's rules; of a word, whether it is read exactly.
        elements: the share of the statement's elements that hold: each class, number, colour and relation it names.
        shape, count, color, position: that aspect of the statement alone: 1 where it holds for every object, else 0.
        word: whether the word is read exactly.
    graded: more than right and wrong: shape and color give the share of objects that are right, position the share of
        pairs; count gives −|found − wanted|, the mean over the classes; word 1 − its character error rate.

    Needs TinyWorld's metadata. Statements that say nothing of the aspect are not judged.
    Raises UserError for an aspect that cannot be graded, and for prompts that are not TinyWorld's.
    """

    device = "cpu"

    def __init__(self, aspect: Aspect = "all", graded: bool = False, **settings: Any) -> None:
        settings["name"] = settings.get("name") or f"tinyworld_{aspect}"
        super().__init__(**settings)
        if graded and aspect in ("all", "elements"):
            raise UserError(f"the reward {self.name}: aspect {aspect} has no grades: set graded to false.")
        self.aspect = aspect
        self.graded = graded

    def applies_to(self, prompt: str, metadata: Metadata) -> bool:
        check_statement(self.name, prompt, metadata)
        if metadata["tag"] == "word":
            return self.aspect in ("all", "elements", "word")
        return self.aspect in ("all", "elements") or bool(aspect_values(self.aspect, metadata["include"], {}))

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return torch.tensor([self.judge(as_array(image), known) for image, known in zip(images, metadata, strict=True)])

    def judge(self, image: np.ndarray, metadata: Metadata) -> float:
        """The score of one uint8 (H, W, 3) picture."""
        if metadata["tag"] == "word":
            read = verified(image.tobytes(), image.shape, word=True)
            return text_score(read or "", metadata["text"]) if self.graded else float(read == metadata["text"])
        detections = verified(image.tobytes(), image.shape, word=False)
        if self.aspect == "all":
            return float(geneval.evaluate(metadata, detections)["correct"])
        objects = geneval.filter_detections(detections, metadata["tag"])
        if self.aspect == "elements":
            held = element_verdicts(metadata, objects)
            return sum(held) / len(held)
        values = aspect_values(self.aspect, metadata["include"], objects)
        if self.graded:
            return sum(values) / len(values)
        perfect = 0.0 if self.aspect == "count" else 1.0
        return float(all(value == perfect for value in values))


@lru_cache(maxsize=256)
def verified(pixels: bytes, shape: tuple[int, ...], word: bool) -> Any:
    """What the verifier reads or detects; remembered, for several rewards look at the same pictures."""
    image = np.frombuffer(pixels, dtype=np.uint8).reshape(shape)
    return read_word(image) if word else detect(image)


def check_statement(name: str, prompt: str, metadata: Metadata) -> None:
    """UserError for a prompt without TinyWorld's metadata."""
    if "include" not in metadata and metadata.get("tag") != "word":
        raise UserError(
            f"the reward {name} needs TinyWorld's metadata, and the prompt “{prompt}” has none: use it with "
            "data_modules.TinyWorldDataModule alone."
        )


def element_verdicts(metadata: Metadata, objects: Objects) -> list[bool]:
    """Whether each element of a statement holds: classes, numbers (where it is about them), colours, relations."""
    clauses = metadata["include"]
    held = [
        value == 1 for aspect in ("shape", "color", "position") for value in aspect_values(aspect, clauses, objects)
    ]
    if metadata["tag"] == "counting":
        held += [value == 0 for value in counts(clauses, objects)]
    return held


def aspect_values(aspect: str, clauses: Clauses, objects: Objects) -> list[float]:
    """One aspect of each include clause that names it: in [0, 1], 1 where it holds; of `count` −|found − wanted|."""
    return ASPECTS[aspect](clauses, objects) if aspect in ASPECTS else []


def shapes(clauses: Clauses, objects: Objects) -> list[float]:
    return [float(bool(objects.get(clause["class"]))) for clause in clauses]


def counts(clauses: Clauses, objects: Objects) -> list[float]:
    return [-float(abs(len(objects.get(clause["class"], ())) - clause["count"])) for clause in clauses]


def colors(clauses: Clauses, objects: Objects) -> list[float]:
    """Of each clause with a colour the share of its objects that are there in that colour."""
    painted = [clause for clause in clauses if "color" in clause]
    found = [[thing["color"] for thing in objects.get(clause["class"], ())] for clause in painted]
    return [
        min(1.0, there.count(clause["color"]) / clause["count"]) for clause, there in zip(painted, found, strict=True)
    ]


def positions(clauses: Clauses, objects: Objects) -> list[float]:
    """Of each clause with a relation the share of pairs (one of its objects, one of the reference's) in it."""
    shares = []
    for clause in clauses:
        if "position" in clause:
            relation, reference = clause["position"]
            target = clauses[reference]
            pairs = [
                relation in geneval.relative_position(subject["box"], other["box"])
                for subject in objects.get(clause["class"], ())[: clause["count"]]
                for other in objects.get(target["class"], ())[: target["count"]]
            ]
            shares.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return shares


ASPECTS: dict[str, Callable[[Clauses, Objects], list[float]]] = {
    "shape": shapes,
    "count": counts,
    "color": colors,
    "position": positions,
}
