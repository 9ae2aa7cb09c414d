"""A folder of pictures with captions beside them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_modules.images import Rejected
from data_modules.sources.parts import (
    SIDECARS,
    Part,
    Source,
    cut,
    described,
    files_below,
    listing,
    printable,
    read_file,
)
from data_modules.sources.records import Columns, Record, Rejection
from zimage_lit.errors import UserError


@dataclass(frozen=True)
class FolderPart:
    """Pictures of a folder; a sidecar in their place is one without a picture."""

    folder: Path
    names: tuple[str, ...]
    columns: Columns

    @property
    def count(self) -> int:
        return len(self.names)

    def records(self) -> Iterator[Record | Rejection]:
        for name in self.names:
            try:
                yield self._record(name)
            except Rejected as reason:
                yield Rejection(printable(name), str(reason))

    def _record(self, name: str) -> Record:
        path = self.folder / name
        if path.suffix.lower() in SIDECARS:
            raise Rejected("no picture: a caption file with no picture beside it")
        beside = [path.with_suffix(written) for ending in SIDECARS for written in (ending, ending.upper())]
        sidecars = {sidecar.suffix.lower(): read_file(sidecar) for sidecar in reversed(beside) if sidecar.exists()}
        return described(printable(name), {"image": (name, read_file(path))}, sidecars, self.columns)


def open_folder(path: Path, part_size: int, columns: Columns) -> Source:
    if not path.is_dir():
        raise UserError(f"format=folder needs a folder, and {path} is a file: correct source=… or format=….")
    names = list(files_below(path))
    stems = {name.rpartition(".")[0] or name for name in names if not name.lower().endswith(SIDECARS)}
    kept = [name for name in names if not (name.lower().endswith(SIDECARS) and name.rpartition(".")[0] in stems)]
    parts: list[Part] = [FolderPart(path, tuple(names), columns) for names in cut(kept, part_size)]
    return Source("folder", ["image"], parts, listing(path, names))
