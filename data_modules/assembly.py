"""The files of a split from the chunks of its parts: chunks in order, litdata's index, what planning needs."""

import hashlib
import json
from collections.abc import Iterable
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.balancing import TAGS
from data_modules.planning import PLANNING
from zimage_lit.errors import UserError
from zimage_lit.files import write_atomically


def assemble_split(
    folder: Path,
    parts: Iterable[tuple[Path, list[dict[str, Any]]]],
    config: dict[str, Any] | None,
    columns: np.ndarray,
    tags: bytes | None = None,
) -> dict[str, str]:
    """Move chunks to the folder of their split and describe them. Can be done twice, should the first time be killed.

    parts: (folder, litdata's entries of its chunks, each with its sha256), in the order of the samples. config:
    litdata's own. columns: (N, 4) width, height, caption tokens and concept of each sample. tags: of tags.npz, if any.
    Returns the SHA-256 of the chunks by their paths below the data set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = count()
    chunks: list[dict[str, Any]] = []
    hashes: dict[str, str] = {}
    for part, entries in parts:
        for chunk in entries:
            name = f"samples-{next(numbers):05d}.bin"
            _move(part / chunk["filename"], folder / name)
            hashes[f"{folder.name}/{name}"] = chunk["sha256"]
            entry = {key: value for key, value in chunk.items() if key != "sha256"}
            chunks.append({**entry, "filename": name})
    # litdata asks only whether `updated_at` changed: a hash instead of its clock keeps the file the same every time
    updated_at = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
    index = {"chunks": chunks, "config": config, "updated_at": updated_at}
    write_atomically(folder / "index.json", json.dumps(index, sort_keys=True))
    write_atomically(folder / PLANNING, planning_file(columns))
    if tags:
        write_atomically(folder / TAGS, tags)
    return hashes


def _move(chunk: Path, target: Path) -> None:
    if chunk.is_file():
        chunk.rename(target)
    elif not target.is_file():  # else moved already, before this was killed
        raise UserError(f"{chunk} is gone: delete {target.parent.parent} and make it again.")


def planning_file(columns: np.ndarray) -> bytes:
    """The bytes of planning.npz; columns: (N, 4) width, height, caption tokens and concept."""
    buffer = BytesIO()
    width, height, tokens, concept = columns.T
    np.savez(
        buffer,
        width=width.astype(np.uint16),
        height=height.astype(np.uint16),
        caption_tokens=tokens.astype(np.uint16),
        concept=concept.astype(np.int32),
    )
    return buffer.getvalue()
