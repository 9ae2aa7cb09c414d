"""The manifest of a prepared data set: what it holds, how it was made, and the size and SHA-256 of every file.

It is written last and in one step, so a folder with a manifest is a finished folder. Chunks carry no checksums of their
own: without the manifest a flipped byte would be trained on in silence.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from data_modules.remote import PATIENCE, RemoteFolder, is_remote
from zimage_lit.errors import UserError
from zimage_lit.files import parse_json, read_json, write_atomically

MANIFEST = "manifest.json"
CLASSIFIER = "classifier"  # folder in a data folder, no part of the data set
FORMAT = 1
REMOTE_WAY_OUT = "copy the whole data set there again"
Verify = Literal["size", "sha256"]


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    splits: split -> number of samples. captions: language -> kinds, those that a sample may carry. settings: what the
    preparation was asked for. files: path below the folder, with slashes -> {"bytes", "sha256"}. fingerprint: SHA-256
    over the hashes of the sample chunks, the same for the same samples wherever and by however many workers they were
    written.
    """

    name: str
    splits: dict[str, int]
    captions: dict[str, list[str]]
    settings: dict[str, Any]
    fingerprint: str
    files: dict[str, dict[str, Any]]


def write_manifest(
    data_dir: Path,
    name: str,
    splits: dict[str, int],
    captions: dict[str, list[str]],
    settings: dict[str, Any],
    known_hashes: Mapping[str, str] | None = None,
) -> Manifest:
    """Hash every file below `data_dir` and write its manifest.json, as the last step of a preparation.

    known_hashes: path below the folder -> SHA-256 of files that were hashed when they were written.
    """
    known_hashes = known_hashes or {}
    files = {
        path: {"bytes": (data_dir / path).stat().st_size, "sha256": known_hashes.get(path) or sha256(data_dir / path)}
        for path in data_files(data_dir)
    }
    manifest = Manifest(name, splits, captions, settings, _fingerprint(files), files)
    content = {"format": FORMAT, **asdict(manifest)}
    content["checksum"] = _checksum(content)
    write_atomically(data_dir / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False))
    return manifest


def read_manifest(data_dir: Path | str, patience: float = PATIENCE) -> Manifest:
    """The manifest of a prepared folder or of one behind an address (s3://, gs://, http://, https://).

    patience: seconds that a server which does not answer is waited for.
    Raises UserError where the folder or its manifest is missing or unreadable.
    """
    if is_remote(data_dir):
        folder = RemoteFolder(str(data_dir))
        address = folder.address(MANIFEST)
        content = folder.read(MANIFEST, patience).decode(errors="replace")
        return _as_manifest(parse_json(content, address, REMOTE_WAY_OUT), address, REMOTE_WAY_OUT)
    data_dir = Path(data_dir)
    path = data_dir / MANIFEST
    if not data_dir.is_dir():
        raise UserError(
            f"There is no data folder {data_dir}: prepare the data first, or correct data.init_args.data_dir."
        )
    if not path.is_file():
        raise UserError(
            f"{data_dir} has no {MANIFEST}, so its preparation never finished: delete it and prepare it again."
        )
    way_out = f"delete {data_dir} and prepare it again"
    return _as_manifest(read_json(path, way_out), str(path), way_out)


def _as_manifest(content: dict[str, Any], path: str, way_out: str) -> Manifest:
    checksum = content.pop("checksum", None)
    if checksum is not None and checksum != _checksum(content):
        raise UserError(f"{path} is damaged (it does not fit its own checksum): {way_out}.")
    version = content.pop("format", None)
    if version == FORMAT and content.keys() != {field.name for field in fields(Manifest)}:
        raise UserError(f"{path} cannot be read (its keys are {', '.join(content)}): {way_out}.")
    if version != FORMAT:
        raise UserError(f"{path} has format {version} and this version reads {FORMAT}: {way_out}.")
    manifest = Manifest(**content)
    if not isinstance(manifest.files, dict) or not isinstance(manifest.splits, dict):
        raise UserError(f"{path} cannot be read (files and splits must be objects): {way_out}.")
    return manifest


def verify_files(data_dir: Path | str, manifest: Manifest, verify: Verify) -> None:
    """Compare every file with the manifest: its size, and with "sha256" its content too. UserError names the first.

    The files behind an address are not read for this: each is compared, always with its SHA-256, when it arrives.
    """
    if is_remote(data_dir):
        return
    data_dir = Path(data_dir)
    for name, expected in manifest.files.items():
        problem = problem_with(data_dir, name, expected, verify)
        if problem:
            raise UserError(problem)


def problem_with(data_dir: Path, name: str, expected: Mapping[str, Any], verify: Verify) -> str | None:
    """What is wrong with a file of a data set, as a sentence with the way out; None where nothing is."""
    path, way_out = data_dir / name, f"copy it again, or delete {data_dir} and prepare it again."
    if not path.is_file():
        return f"{path} is missing: {way_out}"
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path} has {size} bytes where its manifest says {expected['bytes']}: {way_out}"
        if verify == "sha256" and sha256(path) != expected["sha256"]:
            return f"{path} is damaged (its SHA-256 differs from the manifest): {way_out}"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}): check the disk, then {way_out}"
    return None


def data_files(data_dir: Path) -> list[str]:
    """The files of a data set as paths below its folder, sorted; not its manifest, nor what is hidden, such as locks,
    nor the classifier that scoring makes beside it later."""
    paths = (path.relative_to(data_dir) for path in data_dir.rglob("*") if path.is_file())
    others = (MANIFEST, ".", f"{CLASSIFIER}/")
    return sorted(path.as_posix() for path in paths if not path.as_posix().startswith(others))


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    """Of all that a manifest says: its own bytes are in no list of files."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fingerprint(files: dict[str, dict[str, Any]]) -> str:
    lines = [f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items()) if name.endswith(".bin")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
