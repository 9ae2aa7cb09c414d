"""WebDataset tars, read where they lie."""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from data_modules.images import Rejected
from data_modules.sources.parts import PICTURES, SIDECARS, Part, Source, described, files_below, listing, printable
from data_modules.sources.records import ROLE_SETS, ROLES, Columns, Record, Rejection


@dataclass(frozen=True)
class TarPart:
    """Groups of members with one key in a tar file, from the header at byte `offset` on."""

    folder: Path
    name: str
    offset: int
    groups: int
    columns: Columns
    broken: str | None = None  # what is wrong with the file: a record of its own, to be rejected

    @property
    def count(self) -> int:
        return self.groups + (self.broken is not None)

    def records(self) -> Iterator[Record | Rejection]:
        for key, members in self._groups():
            place = f"{printable(self.name)}:{printable(key)}"
            try:
                yield self._record(place, members)
            except Rejected as reason:
                yield Rejection(place, str(reason))
        if self.broken is not None:
            yield Rejection(printable(self.name), self.broken)

    def _groups(self) -> Iterator[tuple[str, dict[str, bytes | None]]]:
        if not self.groups:
            return
        with (self.folder / self.name).open("rb") as stream:
            stream.seek(self.offset)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                groups = _groups(archive, lambda member: _member_bytes(archive, member))
                for _, key, members in islice(groups, self.groups):
                    yield key, members

    def _record(self, place: str, members: dict[str, bytes | None]) -> Record:
        pictures = {}
        for ending, content in members.items():
            if content is None:
                raise Rejected(f"broken archive: it ends in the middle of {ending}")
            role = _role(ending)
            if role in self.columns.roles and role not in pictures:
                pictures[role] = (f"{role}.{ending.rpartition('.')[2]}", content)
        missing = [role for role in self.columns.roles if role not in pictures]
        if missing:
            raise Rejected(f"no picture: only {', '.join(members)}, no {' and '.join(missing)}")
        sidecars = {f".{ending}": content or b"" for ending, content in members.items() if f".{ending}" in SIDECARS}
        return described(place, {role: pictures[role] for role in self.columns.roles}, sidecars, self.columns)


Group = tuple[int, str, dict[str, bytes | None]]


def _groups(archive: tarfile.TarFile, read: Callable[[tarfile.TarInfo], bytes | None]) -> Iterator[Group]:
    """(offset of the first header, key, ending -> what `read` gives) of every row of members with one key.

    The key is the path up to the first dot of the file's name, the ending what follows, in small letters. Raises
    tarfile.ReadError behind the last group of a file that breaks off.
    """
    group: Group | None = None
    broken: tarfile.ReadError | None = None
    members = iter(archive)
    while True:
        try:
            member = next(members, None)
        except tarfile.ReadError as error:
            member, broken = None, error
        if member is None:
            break
        archive.members = []  # type: ignore[attr-defined]  # it would keep them all
        folder, slash, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        key, ending = folder + slash + stem, ending.lower()
        if not member.isfile() or not stem:
            continue
        if group is None or group[1] != key or ending in group[2]:
            if group is not None:
                yield group
            group = (member.offset, key, {})
        group[2][ending] = read(member)
    if group is not None:
        yield group
    if broken is not None:
        raise broken


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """A member's content; None where the file ends before it does."""
    stream = archive.extractfile(member)
    assert stream is not None  # of a regular file
    try:
        content = stream.read()
    except tarfile.ReadError:
        return None
    return content if len(content) == member.size else None


def _role(ending: str) -> str | None:
    """`jpg` and `image.jpg` are an image, `source.jpg` a source; None for what is no picture."""
    role, _, rest = ending.rpartition(".")
    if f".{rest}" not in PICTURES:
        return None
    return (role or "image") if role in ("", *ROLES) else None


def open_webdataset(path: Path, part_size: int, columns: Columns) -> Source:
    folder, names = (path, list(files_below(path, (".tar",)))) if path.is_dir() else (path.parent, [path.name])
    scans = {name: _scan_tar(folder / name, part_size) for name in names}
    given = {role for scan in scans.values() for role in map(_role, scan.endings) if role}
    roles = next((roles for roles in ROLE_SETS[:-1] if given >= set(roles)), ("image",))
    columns = replace(columns, roles=list(roles))
    parts: list[Part] = []
    for name, scan in scans.items():
        parts += [TarPart(folder, name, offset, count, columns) for offset, count in scan.starts]
        if scan.broken:
            parts.append(TarPart(folder, name, 0, 0, columns, scan.broken))
    return Source("webdataset", columns.roles, parts, listing(folder, names))


@dataclass
class TarScan:
    """What a first look at a tar file tells: where each part begins and how many groups it has."""

    starts: list[tuple[int, int]]
    endings: set[str]  # of all groups
    broken: str | None


def _scan_tar(path: Path, part_size: int) -> TarScan:
    scan = TarScan([], set(), None)
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for offset, _, endings in _groups(archive, lambda member: b""):
                scan.endings.update(endings)
                if not scan.starts or scan.starts[-1][1] == part_size:
                    scan.starts.append((offset, 0))
                scan.starts[-1] = (scan.starts[-1][0], scan.starts[-1][1] + 1)
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
                scan.broken = "broken archive: it has no proper end, what followed is lost"
    except tarfile.ReadError as error:
        scan.broken = f"broken archive: {error}"
    return scan
