"""Which benchmarks there are, and each in each of its languages."""

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evaluation.benchmarks.metric import Benchmark
from evaluation.benchmarks.protocol import Judgements, Lost, PlannedImage, Question
from evaluation.benchmarks.tally import Mode
from zimage_lit.config import did_you_mean
from zimage_lit.errors import UserError

TITLES = {
    "geneval": "GenEval",
    "cvtg2k": "CVTG-2K",
    "longtext": "LongText-Bench",
    "oneig": "OneIG-Bench",
    "dpg": "DPG-Bench",
    "tinyworld": "TinyWorld",
}
LANGUAGES = {"longtext": ("en", "zh"), "oneig": ("en", "zh"), "tinyworld": ("en", "zh")}  # the others: English alone
WITHOUT_FILES = ("tinyworld",)  # whose prompts are made here


class BenchmarkModule(Benchmark, Protocol):
    """What a module of `evaluation.benchmarks` offers beside its scoring."""

    ROLES_USED: tuple[str, ...]
    OPTIONAL_ROLES: tuple[str, ...]
    IMAGES_PER_PROMPT: int
    SEED: int

    @staticmethod
    def group(prompt: Mapping[str, Any]) -> str: ...

    @staticmethod
    def questions(prompt: Mapping[str, Any], number_of_pictures: int) -> list[Question]: ...

    @staticmethod
    def records(prompt: Mapping[str, Any], judgements: Judgements, lost: Lost) -> list[dict[str, Any]]: ...

    @staticmethod
    def score(records: Sequence[Mapping[str, Any]], mode: Mode = "official") -> dict[str, Any]: ...

    @staticmethod
    def prompt_score(verdicts: Sequence[Mapping[str, Any]]) -> float: ...


@dataclass(frozen=True)
class Part:
    """A benchmark in one language, which is None for those that have one only."""

    benchmark: str
    language: str | None = None

    @property
    def name(self) -> str:
        """longtext-en, geneval: as folders are called."""
        return self.benchmark if self.language is None else f"{self.benchmark}-{self.language}"

    @property
    def title(self) -> str:
        """LongText-Bench EN, GenEval: for people."""
        return TITLES[self.benchmark] + (f" {self.language.upper()}" if self.language else "")

    @property
    def module(self) -> BenchmarkModule:
        found: Any = importlib.import_module(f"evaluation.benchmarks.{self.benchmark}")
        return found  # type: ignore[no-any-return]

    def prompts(self, data: Path | None) -> list[dict[str, Any]]:
        """All its prompts, those of official files from the benchmark's folder below `data`; UserError without it."""
        module: Any = self.module
        languages = [] if self.language is None else [self.language]
        if self.benchmark in WITHOUT_FILES:
            return list(module.prompts(*languages))
        if data is None:
            raise UserError(
                f"{self.title} reads its official files from data=FOLDER/{self.benchmark}, which is not given: get "
                f"them from {module.OFFICIAL.source}."
            )
        return list(module.prompts(data / self.benchmark, *languages))

    def plan(self, prompt: Mapping[str, Any], size: int | None = None, seed: int | None = None) -> list[PlannedImage]:
        """All pictures of a prompt; None for the protocol's own size and seed."""
        module: Any = self.module
        given = {"size": size, "seed": seed}
        return list(module.plan([prompt], **{name: value for name, value in given.items() if value is not None}))

    def first_of_each_group(self, prompts: Sequence[dict[str, Any]], number: int | None) -> list[dict[str, Any]]:
        """The first `number` prompts of every group, in their order; None for all."""
        if number is None:
            return list(prompts)
        taken: dict[str, int] = {}
        kept = []
        for prompt in prompts:
            group = self.module.group(prompt)
            taken[group] = taken.get(group, 0) + 1
            if taken[group] <= number:
                kept.append(prompt)
        return kept

    def judged(self, prompts: Sequence[dict[str, Any]], number: int, roles: Collection[str]) -> list[dict[str, Any]]:
        """The prompts of which judges of these roles are asked anything about `number` pictures each: OneIG-Bench's
        reasoning, for one, is nothing to a vision-language model."""
        asked = self.module.questions
        return [prompt for prompt in prompts if any(one.role in roles for one in asked(prompt, number))]


def parts_of(benchmarks: Sequence[str], language: str | None) -> list[Part]:
    """The benchmarks by name, or "all", each in the language or, for None, in all that it has.

    UserError for an unknown name, and for one that is not there in the language; "all" takes those that are.
    """
    names = [name.strip() for entry in benchmarks for name in entry.split(",")]
    every = names == ["all"]
    for name in names:
        if name not in TITLES and not every:
            raise UserError(f"benchmark={name}: there is none{did_you_mean(name, TITLES, listing='of these:')}.")
    if language not in (None, "en", "zh"):
        raise UserError(f"language must be en, zh or null for both, not {language}.")
    found = []
    for name in dict.fromkeys(TITLES if every else names):
        languages = LANGUAGES.get(name, ("en",))
        if language is not None and language not in languages and not every:
            raise UserError(f"{TITLES[name]} is in English only: leave it out, or leave language={language} out.")
        chosen = [one for one in languages if language in (None, one)]
        found += [Part(name, one if name in LANGUAGES else None) for one in chosen]
    return found
