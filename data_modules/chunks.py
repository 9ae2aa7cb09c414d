"""Stored samples by index, from litdata chunks in a folder or behind an address."""

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from litdata import StreamingDataset
from litdata.streaming.item_loader import PyTreeLoader

from data_modules.balancing import TAGS
from data_modules.cache import CacheSettings, ChunkCache
from data_modules.planning import PLANNING
from data_modules.remote import FIRST_WAIT, LONGEST_WAIT, FileLock, Unanswered, is_remote
from zimage_lit.errors import UserError
from zimage_lit.files import read_json

INDEX = "index.json"
BLOCK = 65_536  # indices looked through at a time for the next chunks
LOOK_EVERY = 0.5  # seconds: how often `upcoming` looks whether there is something to fetch


class ChunkedSamples:
    """The samples of one split, read at random.

    location: the split's folder (litdata's index.json and chunks), as a path or an address (s3://, gs://, http://,
    https://). Chunks behind an address are fetched into the cache when they are needed, or before with `upcoming`.
    folder: the local folder with the split's index.json and, if the data set has them, planning.npz and tags.npz.
    chunk_ends: for each chunk the index after its last sample.

    Files and connections are opened at first use in the process that reads, so it can be handed to forked and to
    spawned workers. One thread of a process reads.

    Raises:
        UserError: no such data, damaged data, a cache smaller than the largest chunk; here and when reading, a server
            that refuses or does not answer.
    """

    def __init__(self, location: str | Path, cache: CacheSettings | None = None) -> None:
        self.location = str(location)
        self.folder = Path(location)
        self._cache: ChunkCache | None = None
        self._split = ""
        way_out = "copy it again, or prepare the data again"
        if is_remote(location):
            self.location = self.location.rstrip("/")
            root, _, self._split = self.location.rpartition("/")
            self._cache = ChunkCache(root, cache or CacheSettings())
            self.folder = _small_files(self._cache, self._split)
        index = read_json(self.folder / INDEX, way_out)
        try:
            self._names = [str(chunk["filename"]) for chunk in index["chunks"]]
            self.chunk_ends = list(accumulate(int(chunk["chunk_size"]) for chunk in index["chunks"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder / INDEX} is no index of chunks: {way_out}.") from error
        if self._cache:
            _check_chunks(self._cache, [self._file(number) for number in range(len(self._names))])
        self._start_anew()

    def _start_anew(self) -> None:
        """What belongs to one process. Of a parent's locks and open files nothing is touched."""
        self._process = os.getpid()
        self._loader = PyTreeLoader()
        self._stream: StreamingDataset | None = None
        self._held: tuple[int, FileLock] | None = None
        self._ahead: threading.Thread | None = None
        self._next: Sequence[int] | np.ndarray = []
        self._looked = 0.0

    def __getstate__(self) -> dict[str, Any]:
        own = ("_process", "_loader", "_stream", "_held", "_ahead", "_next", "_looked")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_anew()

    def __len__(self) -> int:
        return self.chunk_ends[-1] if self.chunk_ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample as it was stored. Its chunk stays open, and in the cache, until `release` or another chunk's sample.

        Damaged bytes in a local chunk raise what litdata makes of them; those behind an address are found on arrival.
        """
        self.fetch(index)
        if self._stream is None:
            self._stream = StreamingDataset(str(self.folder), item_loader=self._loader, batch_decode=0)
        sample: dict[str, Any] = self._stream[index]
        return sample

    def fetch(self, index: int) -> None:
        """Have the chunk of a sample here, as reading the sample does; UserError where that cannot be."""
        if self._process != os.getpid():
            self._start_anew()
        if self._cache:
            number = self.chunk_of(index)
            if self._held is None or self._held[0] != number:
                self.release()
                self._held = number, self._cache.hold(self._file(number))

    @property
    def is_remote(self) -> bool:
        return self._cache is not None

    @property
    def chunks_at_once(self) -> int:
        """How many chunks can be here at once. Samples drawn at random from more than these fetch each many times."""
        if self._cache is None:
            return len(self._names)
        largest = max(self._cache.size(self._file(number)) for number in range(len(self._names)))
        return min(self._cache.settings.max_bytes // largest, len(self._names))

    def chunk_of(self, index: int) -> int:
        """The number of the chunk that holds a sample."""
        return bisect_right(self.chunk_ends, index)

    def place_of(self, index: int) -> str:
        """The path or address of the chunk that holds a sample, for messages."""
        return f"{self.location}/{self._names[self.chunk_of(index)]}"

    def release(self) -> None:
        """Let go of the chunk that was read last: others may now remove it from the cache. Call it between batches."""
        if self._held and self._process == os.getpid():
            number, lock = self._held
            self._held = None
            self._loader.close(number)  # a removed file that is still open takes up its space
            lock.let_go()

    def upcoming(self, indices: Sequence[int] | np.ndarray) -> None:
        """A hint of what is read next, in this order, by this process or by its workers; it replaces the last hint.

        Call it with the rest of the epoch whenever a batch is done: it returns at once and copies nothing. A thread
        fetches as many of the next chunks as the cache holds and removes none of these to make room.
        """
        if self._process != os.getpid():
            self._start_anew()
        self._next = indices
        if self._cache is None or time.monotonic() < self._looked + LOOK_EVERY:
            return
        if self._ahead is None or not self._ahead.is_alive():
            self._looked = time.monotonic()
            self._ahead = threading.Thread(target=self._fetch_ahead, args=[self._cache], daemon=True)
            self._ahead.start()

    def _fetch_ahead(self, cache: ChunkCache) -> None:
        """Until all that is wanted and fits is here. What goes wrong is left to the reader who needs the chunk."""
        wait, fetched = FIRST_WAIT, True
        with suppress(UserError):
            while fetched:
                wanted = self._wanted(cache)
                try:
                    fetched = any(cache.fetch_ahead(name, wanted) for name in wanted if not cache.is_here(name))
                    wait = FIRST_WAIT
                except Unanswered:
                    time.sleep(wait)
                    wait = min(2 * wait, LONGEST_WAIT)

    def _wanted(self, cache: ChunkCache) -> list[str]:
        """The files of the next chunks in the order of their first use, as many as the cache holds."""
        wanted: dict[str, None] = {}
        room, indices = cache.settings.max_bytes, self._next
        for start in range(0, len(indices), BLOCK):
            numbers = np.searchsorted(self.chunk_ends, np.asarray(indices[start : start + BLOCK]), side="right")
            _, first_uses = np.unique(numbers, return_index=True)
            for number in numbers[np.sort(first_uses)].tolist():
                name = self._file(number)
                if name not in wanted:
                    room -= cache.size(name)
                    if room < 0:
                        return list(wanted)
                    wanted[name] = None
        return list(wanted)

    def _file(self, number: int) -> str:
        """A chunk's path below the data set's root."""
        return f"{self._split}/{self._names[number]}"


def _small_files(cache: ChunkCache, split: str) -> Path:
    """The local folder with a split's index, and what planning and balancing read."""
    if not cache.has(f"{split}/{INDEX}"):
        raise UserError(
            f"The manifest of {cache.remote.location} has no {split}/{INDEX}: correct data.init_args.data_dir, or "
            "prepare the data again."
        )
    for name in (PLANNING, TAGS):
        if cache.has(f"{split}/{name}"):
            cache.small_file(f"{split}/{name}")
    return cache.small_file(f"{split}/{INDEX}").parent


def _check_chunks(cache: ChunkCache, names: list[str]) -> None:
    for name in names:
        if not cache.has(name) or name.count("/") > 1:
            raise UserError(
                f"The manifest of {cache.remote.location} has no {name}, which its index names: copy the whole data "
                "set there again."
            )
    largest = max(map(cache.size, names), default=0)
    if cache.settings.max_bytes < largest:
        raise UserError(
            f"data.init_args.cache.max_bytes is {cache.settings.max_bytes}, less than the {largest} bytes of the "
            f"largest chunk of {cache.remote.location}: set it to a few times that."
        )
