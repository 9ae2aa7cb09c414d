"""One part of a source, checked record by record and written as litdata chunks: what a worker of a preparation does.

A part's folder appears in one step, when everything in it is on the disk:

part.json           what came in, what went out and what did not, see `PartSummary`
train/, val/        its chunks
"""

import hashlib
import json
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from litdata.streaming.writer import BinaryWriter

from data_modules.balancing import tags_of
from data_modules.images import Rejected, read_picture
from data_modules.manifest import sha256
from data_modules.samples import WRITTEN, caption_order, encode_sample
from data_modules.sources import Part, Record, Rejection

SUMMARY = "part.json"
UNFINISHED = "unfinished-"  # begins the name of a folder that a worker is filling
MAX_TOKENS = 512  # what a text encoder reads of a caption
BYTES_PER_TOKEN = 3  # UTF-8; on the short side for Qwen3 in English (4) and in Chinese (4 to 5)
LARGEST_FILE = 2**30  # bytes; litdata counts to 2**32 within a chunk
LARGEST_SIDE = 2**16 - 1  # pixels, what planning.npz can say


@dataclass(frozen=True)
class Rules:
    """What a record must be like, and where it goes; see PrepareSettings."""

    min_side: int
    max_pixels: int
    max_caption_length: int
    val_share: float
    chunk_bytes: int
    tokenizer: str | None


@dataclass(frozen=True)
class PartSummary:
    """What part.json says.

    samples: split -> rows of [number of the record in the part, id, width, height, caption tokens, concept or None,
    tags].
    rejected: rows of [place, reason]. caption_sets: the [language, kind] pairs of a sample, as JSON -> how many samples
    have just these. chunks: split -> litdata's entries of an index, each with its sha256. config: litdata's own of the
    chunks, the same in all parts.
    """

    count: int
    samples: dict[str, list[list[Any]]]
    rejected: list[list[str]]
    caption_sets: dict[str, int]
    chunks: dict[str, list[dict[str, Any]]]
    config: dict[str, Any] | None


def read_summary(folder: Path) -> PartSummary:
    return PartSummary(**json.loads((folder / SUMMARY).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Job:
    """A part to write; `duplicates` are the numbers of its records whose ids were taken by earlier ones."""

    part: Part
    folder: Path
    rules: Rules
    duplicates: AbstractSet[int] = frozenset()


# ---------------------------------------------------------------------------------------------------- in a worker

_done: "Synchronized[int] | None" = None


def start_worker(done: "Synchronized[int]", stop: Any) -> None:
    """Make a process ready for `write_part`: it counts records in `done` and ends with its parent, or at `stop`."""
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides what follows
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and not stop.value:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_part(job: Job) -> None:
    """Check the records of a part and write it. Raises OSError where the disk cannot be written or read."""
    unfinished = job.folder.with_name(f"{UNFINISHED}{job.folder.name}-{os.getpid()}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        summary = _write(job, unfinished)
        _write_through(unfinished / SUMMARY, json.dumps(asdict(summary), ensure_ascii=False).encode())
        if job.folder.exists():  # written before its duplicates were known
            shutil.rmtree(job.folder)
        unfinished.rename(job.folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write(job: Job, folder: Path) -> PartSummary:
    writers = {split: SplitWriter(folder / split, job.rules.chunk_bytes) for split in ("train", "val")}
    rejected: list[list[str]] = []
    sets: Counter[str] = Counter()
    for number, record in enumerate(job.part.records()):
        try:
            if isinstance(record, Rejection):
                raise Rejected(record.reason)
            if number in job.duplicates:
                raise Rejected(f"duplicate id: an earlier record has the id {record.id}")
            width, height = check(record, job.rules)
        except Rejected as reason:
            rejected.append([record.place, str(reason)])
        else:
            pictures = {role: content for role, (_, content) in record.pictures.items()}
            sample = encode_sample(pictures, record.captions, record.metadata, record.id)
            tokens = caption_tokens(record, job.rules.tokenizer)
            tags = tags_of(record.captions, record.concept)
            row = [number, record.id, width, height, tokens, record.concept, tags]
            writers[split_of(record.group, job.rules.val_share)].add(sample, row)
            sets[json.dumps(caption_order(record.captions), ensure_ascii=False)] += 1
        if _done is not None:
            with _done.get_lock():
                _done.value += 1
    chunks = {split: writer.close() for split, writer in writers.items()}
    return PartSummary(
        job.part.count,
        {split: writer.rows for split, writer in writers.items()},
        rejected,
        dict(sets),
        chunks,
        writers["train"].config or writers["val"].config,
    )


def check(record: Record, rules: Rules) -> tuple[int, int]:
    """(width, height) of the record's first picture as it is seen, (0, 0) where it has none. Raises Rejected."""
    for language, kinds in record.captions.items():
        for kind, text in kinds.items():
            if len(text) > rules.max_caption_length:
                raise Rejected(
                    f"caption too long: {language}.{kind} has {len(text):,} characters, at most "
                    f"{rules.max_caption_length:,} are taken"
                )
    sizes = [_size(name, content, rules) for name, content in record.pictures.values()]
    return sizes[0] if sizes else (0, 0)


def _size(name: str, content: bytes, rules: Rules) -> tuple[int, int]:
    if len(content) > LARGEST_FILE:
        raise Rejected(f"too large: a file of {len(content):,} bytes")
    height, width, _ = read_picture(content, name, rules.min_side, rules.max_pixels).shape
    if max(width, height) > LARGEST_SIDE:
        raise Rejected(f"too large: {width}x{height}, no side may have more than {LARGEST_SIDE:,} pixels")
    return width, height


def split_of(group: str, val_share: float) -> str:
    """A pure function of the group's name: neither the order nor other records change a sample's split."""
    digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") < val_share * 2**64 else "train"


def caption_tokens(record: Record, tokenizer: str | None) -> int:
    """Tokens of the longest caption, at most 512: counted with the chat template, or estimated from its bytes.

    What is written in the picture (kind `text`) counts only where there is no other caption: it is seldom trained on.
    """
    texts = [text for kinds in record.captions.values() for kind, text in kinds.items() if kind != WRITTEN]
    texts = texts or [text for kinds in record.captions.values() for text in kinds.values()]
    if tokenizer is None:
        longest = max(len(text.encode()) for text in texts)
        return min(MAX_TOKENS, math.ceil(longest / BYTES_PER_TOKEN))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # longer captions are cut
        return max(len(tokens) for tokens in _text_encoder(tokenizer).tokenize(texts))


@lru_cache(maxsize=1)
def _text_encoder(folder: str) -> Any:
    from zimage_lit.components import Qwen3TextEncoder  # transformers takes seconds to import

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # this process is one of many already
    return Qwen3TextEncoder(folder, on_long_prompt="truncate")


class SplitWriter:
    """Chunks of the samples of one split in one part, and a row of each for the summary."""

    def __init__(self, folder: Path, chunk_bytes: int) -> None:
        self.folder = folder
        self.rows: list[list[Any]] = []
        self.config: dict[str, Any] | None = None
        self._chunk_bytes = chunk_bytes
        self._writer: BinaryWriter | None = None

    def add(self, sample: dict[str, Any], row: list[Any]) -> None:
        if self._writer is None:
            self._writer = BinaryWriter(str(self.folder), chunk_bytes=self._chunk_bytes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of samples larger than a chunk, which get one of their own
            self._writer.add_item(len(self.rows), sample)
        self.rows.append(row)

    def close(self) -> list[dict[str, Any]]:
        """Put everything on the disk; gives litdata's entries for an index, with the SHA-256 of each chunk."""
        if self._writer is None:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._writer.done()
        (index_path,) = self.folder.glob("*.index.json")
        index = json.loads(index_path.read_text(encoding="utf-8"))
        index_path.unlink()
        self.config = index["config"]
        for chunk in index["chunks"]:
            path = self.folder / chunk["filename"]
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            chunk["sha256"] = sha256(path)
        return list(index["chunks"])


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
