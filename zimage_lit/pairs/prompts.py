"""What pairs are drawn for: prompts with what is known of each, and the seed of every picture."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from data_modules.chunks import ChunkedSamples
from data_modules.manifest import read_manifest
from data_modules.remote import is_remote
from data_modules.samples import CaptionChooser
from data_modules.tinyworld.captions import prompt as tinyworld_prompt
from data_modules.tinyworld.combinations import TASKS
from data_modules.tinyworld.world import fitting_statements
from zimage_lit.config import did_you_mean
from zimage_lit.errors import UserError, at_least_one

TINYWORLD = "tinyworld"
DEFAULT_TASKS = ("counting", "word")  # what can be judged exactly, and what DPO is for
PAIR = "pair"  # the key in metadata that belongs to pairs


@dataclass(frozen=True)
class Prompt:
    """A prompt, what the rewards are told of it, and as which caption a pair keeps it."""

    text: str
    metadata: dict[str, Any]
    language: str = "en"
    kind: str = "medium"

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits of its text: no two prompts of a set have the same."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()

    def seed(self, seed: int, number: int) -> int:
        """Of its picture `number`: a pure function of the arguments and the text; 53 bits, which JSON keeps exactly."""
        digest = hashlib.blake2b(f"{seed}/{number}/{self.text}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 11


def read_prompts(
    source: str, tasks: Sequence[str] | None, num_prompts: int | None, seed: int, width: int
) -> tuple[list[Prompt], int]:
    """(the first `num_prompts` different prompts of a source, how many were left out as repetitions of their texts).

    source: "tinyworld", a .jsonl file, or the folder or address of a prepared data set, whose split train is read.
    tasks: of TinyWorld alone; None: counting and word.   seed: of the order of TinyWorld's statements and of which
    caption of a prepared sample is taken.   width: of the pictures in pixels; TinyWorld's longer words need room.
    Raises UserError for a source that is missing or damaged, or holds no prompts, and for tasks that do not exist.
    """
    if source == TINYWORLD:
        found = tinyworld_prompts(DEFAULT_TASKS if tasks is None else tasks, seed, width)
    elif tasks is not None:
        raise UserError(f"tasks are those of prompts={TINYWORLD}: leave them out with prompts={source}.")
    elif source.endswith(".jsonl"):
        found = file_prompts(Path(source))
    else:
        found = prepared_prompts(source, seed)
    if num_prompts is not None:
        at_least_one("num_prompts", num_prompts)
    chosen, repeated = different(found, num_prompts)
    if not chosen:
        raise UserError(f"prompts={source} holds no prompts: name a source with some.")
    return chosen, repeated


def different(prompts: Iterable[Prompt], most: int | None) -> tuple[list[Prompt], int]:
    """The first prompts of different texts, and how many repetitions were met on the way."""
    chosen: dict[str, Prompt] = {}
    repeated = 0
    for prompt in prompts:
        if len(chosen) == most:
            break
        repeated += prompt.text in chosen
        chosen.setdefault(prompt.text, prompt)
    return list(chosen.values()), repeated


def tinyworld_prompts(tasks: Sequence[str], seed: int, width: int) -> Iterator[Prompt]:
    """All that the training split says in these tasks, one of each task in turn while it has any left, so that the
    first so many hold as much of a small task as they can; each task in an order of the seed's. Held-out statements
    stay for scoring."""
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"tasks: TinyWorld has no task {task}{did_you_mean(task, TASKS, listing='there are')}.")
    columns = []
    for task in dict.fromkeys(tasks):
        statements = list(fitting_statements(task, "train", width))
        random.Random(f"pairs/{seed}/{task}").shuffle(statements)
        columns.append(statements)
    for statement in (one for turn in zip_longest(*columns) for one in turn if one is not None):
        text = tinyworld_prompt(statement)
        yield Prompt(text, {**statement, "prompt": text}, kind="short")


def file_prompts(path: Path) -> Iterator[Prompt]:
    """Of a JSONL file, {"prompt": text, "metadata": {…} (may be left out)} on each line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"prompts={path} cannot be read ({error.strerror}): correct prompts=….") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield parse_line(line, f"{path} line {number}")


def parse_line(line: bytes, place: str) -> Prompt:
    wanted = 'it must be {"prompt": "…"}, and may have "metadata": {…}'
    try:
        entry = json.loads(line)
    except ValueError:  # also of bytes that are not UTF-8
        raise UserError(f"{place} is not JSON: {wanted}.") from None
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON may escape half of a surrogate pair, which no file in UTF-8 can keep
        raise UserError(f"{place} holds half a character (a lone surrogate, \\ud800 to \\udfff): correct it.") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise UserError(f"{place} has no prompt: {wanted}.")
    if unknown := sorted(entry.keys() - {"prompt", "metadata"}):
        raise UserError(f"{place} has the unknown key {unknown[0]}: {wanted}.")
    if not isinstance(entry.get("metadata", {}), dict):
        raise UserError(f"{place} has metadata that are no object: {wanted}.")
    return Prompt(entry["prompt"].strip(), without_pair(entry.get("metadata", {})))


def prepared_prompts(source: str, seed: int) -> Iterator[Prompt]:
    """Of a prepared data set of any kind, one caption a sample of its split train; pictures are not looked at."""
    if not is_remote(source) and not Path(source).is_dir():
        raise UserError(
            f"prompts={source} is neither {TINYWORLD}, a .jsonl file nor the folder of a prepared data set: correct it."
        )
    read_manifest(source)
    samples = ChunkedSamples(f"{source.rstrip('/')}/train")
    choose = CaptionChooser(None, seed)
    for index in range(len(samples)):
        stored = samples[index]
        captions = json.loads(stored["captions"])
        language, kind = choose(captions, 0, index)
        yield Prompt(captions[language][kind], without_pair(json.loads(stored["metadata"])), language, kind)


def without_pair(metadata: dict[str, Any]) -> dict[str, Any]:
    """What is known of a prompt, without what an earlier preference set knew of its pair."""
    return {key: value for key, value in metadata.items() if key != PAIR}
