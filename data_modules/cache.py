"""A bounded local copy of a remote data set, shared by all processes of a machine.

    CACHE/<fingerprint>/manifest.json
    CACHE/<fingerprint>/train/index.json, planning.npz     small files, kept
    CACHE/<fingerprint>/train/samples-00007.bin            a chunk, whole and compared with the manifest
    CACHE/<fingerprint>/train/samples-00008.bin.part       one on its way, as large as it will be
    CACHE/<fingerprint>/.locks/                            through which the processes agree

Each chunk has a lock: shared by those who read it, exclusive for the one who fetches or removes it. The lock `room` is
held while the files are counted and one more is given its place, so that their total never passes the limit. Locks end
with their process: what a killed one leaves behind is a .part that nobody holds; the next who needs room removes it.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data_modules.manifest import FORMAT, MANIFEST, REMOTE_WAY_OUT, read_manifest
from data_modules.remote import FIRST_TIMEOUT, PATIENCE, FileLock, RemoteFolder, patiently
from zimage_lit.errors import UserError
from zimage_lit.files import write_atomically

DOWNLOADS = 2  # of a file that arrives damaged
POLL = 0.02  # seconds between two looks for room while all chunks are being read


@dataclass(frozen=True)
class CacheSettings:
    """Where and how remote data are kept. Local data need none of it.

    folder: below it every data set gets a folder named by its fingerprint; None: ~/.cache/zimage-lit.
    max_bytes: of all chunks of one data set together.
    patience: seconds to wait for a server that does not answer.
    """

    folder: str | None = None
    max_bytes: int = 20 * 2**30
    patience: float = PATIENCE


class ChunkCache:
    """The files of one remote data set. Works in forked processes and in several threads.

    Raises:
        UserError: an address without a readable manifest; later, where the server has no such file or refuses it, has
            a damaged one, or does not answer for as long as the settings say, and where nothing can be written.
    """

    def __init__(self, location: str, settings: CacheSettings) -> None:
        self.remote = RemoteFolder(location)
        self.settings = settings
        manifest = read_manifest(location, settings.patience)
        self._files = manifest.files
        complete = all({"bytes", "sha256"} <= set(entry) for entry in self._files.values())
        if not complete or not re.fullmatch("[0-9a-f]{64}", str(manifest.fingerprint)):
            raise UserError(f"{self.remote.address(MANIFEST)} is not a whole manifest: {REMOTE_WAY_OUT}.")
        parent = Path(settings.folder or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "zimage-lit")
        self.folder = parent.expanduser() / manifest.fingerprint[:16]
        content = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, ensure_ascii=False)
        with self._locked(MANIFEST):
            write_atomically(self.folder / MANIFEST, content)

    def has(self, name: str) -> bool:
        """Whether the data set has such a file."""
        return name in self._files

    def size(self, name: str) -> int:
        """Bytes of a file, here or there."""
        return int(self._files[name]["bytes"])

    def is_here(self, name: str) -> bool:
        with suppress(OSError):
            return (self.folder / name).stat().st_size == self.size(name)
        return False

    def small_file(self, name: str) -> Path:
        """The local copy of a file that is kept for good."""
        path, expected = self.folder / name, self._files[name]["sha256"]
        with self._locked(name):
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == expected:
                return path
            for _ in range(DOWNLOADS):
                content = self.remote.read(name, self.settings.patience)
                if hashlib.sha256(content).hexdigest() == expected:
                    write_atomically(path, content)
                    return path
        raise self._damaged(name)

    def hold(self, name: str) -> FileLock:
        """A lock that keeps the chunk, which is then here in whole, until it is let go; fetches the chunk if needed.

        Hold one at a time: whoever waits for room while holding a chunk may wait for himself.
        """
        lock = self._lock(name)
        try:
            while True:
                lock.take(fcntl.LOCK_SH)
                if self.is_here(name):
                    with suppress(FileNotFoundError):  # somebody empties the cache by hand
                        os.utime(self.folder / name)  # when it was last used
                    return lock
                lock.take(fcntl.LOCK_EX)
                if not self.is_here(name):
                    patiently(
                        lambda timeout: self._fetch(name, timeout),
                        self.remote.address(name),
                        self.settings.patience,
                        self._lock_path("waiting"),
                    )
        except BaseException:
            lock.let_go()
            raise

    def fetch_ahead(self, name: str, keep: Collection[str]) -> bool:
        """Fetch a chunk that will be needed, but remove none of `keep` for it.

        False where it is here already, another process is at it, or there is no room.
        Tries once and says nothing. Raises Unanswered, and UserError as the class does.
        """
        lock = self._lock(name)
        try:
            free = lock.take(fcntl.LOCK_EX | fcntl.LOCK_NB)
            return free and not self.is_here(name) and self._fetch(name, FIRST_TIMEOUT, keep)
        finally:
            lock.let_go()

    def _fetch(self, name: str, timeout: float, keep: Collection[str] | None = None) -> bool:
        """Download a chunk, whose lock is held. With `keep`, False where there is no room without removing those."""
        path = self.folder / name
        part = path.with_name(f"{path.name}.part")
        try:
            part.unlink(missing_ok=True)  # of a process that was killed
            if not self._reserve(part, name, keep):
                return False
            for _ in range(DOWNLOADS):
                if self._download(name, part, timeout):
                    with self._locked("room"):  # who counts sees it under one name or the other
                        os.replace(part, path)
                    return True
            raise self._damaged(name)
        except OSError as error:
            raise UserError(
                f"{part} cannot be written ({error.strerror}): make room there, or set data.init_args.cache.folder to "
                "another folder."
            ) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _download(self, name: str, part: Path, timeout: float) -> bool:
        """Whether what arrived is what the manifest says."""
        digest, expected = hashlib.sha256(), self._files[name]
        with part.open("r+b") as stream:
            for block in self.remote.blocks(name, timeout):
                if stream.tell() + len(block) > expected["bytes"]:
                    return False
                stream.write(block)
                digest.update(block)
            stream.flush()
            os.fsync(stream.fileno())  # after a power failure too, a file under its final name is a whole one
        return digest.hexdigest() == expected["sha256"]

    def _reserve(self, part: Path, name: str, keep: Collection[str] | None) -> bool:
        """Give `part` its full size as soon as there is room, which the longest unused chunks make."""
        size, give_up = self.size(name), time.monotonic() + self.settings.patience
        while True:
            with self._locked("room"):
                if self._make_room(size, keep or ()):
                    part.parent.mkdir(parents=True, exist_ok=True)
                    with part.open("wb") as stream:
                        stream.truncate(size)
                    return True
            if keep is not None:
                return False
            if time.monotonic() > give_up:
                raise UserError(
                    f"{self.folder} has no room for {name}, because all other chunks in it are being read: raise "
                    "data.init_args.cache.max_bytes."
                )
            time.sleep(POLL)

    def _make_room(self, size: int, keep: Collection[str]) -> bool:
        files = []
        for path in self.folder.glob("[!.]*/*.bin*"):  # not the locks
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(used for _, used, _ in files) + size - self.settings.max_bytes
        for _, freed, path in sorted(files):
            if excess <= 0:
                break
            name = path.relative_to(self.folder).as_posix().removesuffix(".part")
            if name not in keep and self._remove(name, path):
                excess -= freed
        return excess <= 0

    def _remove(self, name: str, path: Path) -> bool:
        """Remove a chunk, or its .part, unless somebody reads or fetches it."""
        lock = self._lock(name)
        try:
            if not lock.take(fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            path.unlink(missing_ok=True)
            return True
        finally:
            lock.let_go()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        lock = self._lock(name)
        try:
            lock.take(fcntl.LOCK_EX)
            yield
        finally:
            lock.let_go()

    def _lock(self, name: str) -> FileLock:
        path = self._lock_path(name)
        try:
            return FileLock(path)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): set data.init_args.cache.folder to a folder that can be."
            ) from error

    def _lock_path(self, name: str) -> Path:
        return self.folder / ".locks" / name.replace("/", "-")

    def _damaged(self, name: str) -> UserError:
        return UserError(
            f"{self.remote.address(name)} is damaged (its size or SHA-256 differs from the manifest): copy it there "
            "again, or prepare the data again."
        )
