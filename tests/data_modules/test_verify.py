"""`lightning run verify` finds every sort of damage, all of it at once, and says what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_modules.manifest import read_manifest
from zimage_lit import cli
from zimage_lit.errors import UserError


def flip(path: Path, place: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def verify(folder: Path, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    code = cli.main(["run", "verify", f"data={folder}", "num_workers=2"])
    said = capsys.readouterr()
    return code, said.out.splitlines()[-1] if said.out.strip() else "", said.err


def test_a_sound_folder_is_one_line(noise_folder: Path, capsys: pytest.CaptureFixture) -> None:
    code, last_line, complaints = verify(noise_folder, capsys)
    assert code == 0 and complaints == ""
    size = sum(entry["bytes"] for entry in read_manifest(noise_folder).files.values())
    assert last_line == f"{noise_folder} is sound: 8 files, 51 samples, {size:,} bytes"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path), "is damaged (its SHA-256 differs from the manifest): copy it again, or delete"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes where its manifest says"),
        (lambda path: path.write_bytes(b""), "has 0 bytes where its manifest says"),
        (lambda path: path.unlink(), "is missing: copy it again, or delete"),
        (lambda path: path.with_name("extra.bin").write_bytes(b"1"), "is not part of the data set: move it elsewhere"),
    ],
)
def test_each_sort_of_damage_is_named(
    noise_copy: Path, capsys: pytest.CaptureFixture, damage: Callable[[Path], None], message: str
) -> None:
    damage(next((noise_copy / "train").glob("*.bin")))
    code, _, complaints = verify(noise_copy, capsys)
    assert code == 1
    problem, summary = complaints.splitlines()
    assert problem.startswith(str(noise_copy / "train")) and message in problem
    assert summary == f"error: {noise_copy} has 1 problem, see above"


def test_all_problems_are_listed(noise_copy: Path, capsys: pytest.CaptureFixture) -> None:
    chunks = sorted((noise_copy / "train").glob("*.bin"))
    flip(chunks[0])
    chunks[1].unlink()
    flip(noise_copy / "val" / "index.json")
    (noise_copy / "val" / "chunk-9-9.bin").write_bytes(b"")
    code, _, complaints = verify(noise_copy, capsys)
    assert code == 1 and len(complaints.splitlines()) == 5
    for path in (*chunks[:2], noise_copy / "val" / "index.json", noise_copy / "val" / "chunk-9-9.bin"):
        assert str(path) in complaints
    assert complaints.splitlines()[-1] == f"error: {noise_copy} has 4 problems, see above"


def test_locks_and_other_hidden_files_are_no_problem(noise_copy: Path, capsys: pytest.CaptureFixture) -> None:
    (noise_copy / ".preparing").write_text("")
    assert verify(noise_copy, capsys)[0] == 0


@pytest.mark.parametrize("word", ["noise", '"train": 44', '"short"', '"bytes"', "samples"])
def test_a_manifest_that_was_changed_is_found(noise_copy: Path, word: str) -> None:
    path = noise_copy / "manifest.json"
    place = path.read_bytes().find(word.encode())
    if place < 0:
        place = path.read_bytes().find(b"chunk-")
    flip(path, place + 3)
    with pytest.raises(UserError, match=rf"{path} (is damaged|is not JSON|cannot be read)"):
        read_manifest(noise_copy)


def test_a_folder_without_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, complaints = verify(tmp_path, capsys)
    assert code == 2 and "never finished" in complaints
