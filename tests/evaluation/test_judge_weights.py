"""A judge's revision: the same for the same files wherever they lie, another for any change that can matter."""

import hashlib
import shutil

import pytest

from evaluation.judges.weights import file_sha256, folder_revision, library_versions
from zimage_lit.errors import UserError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "onnx").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "onnx" / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_revision_is_the_sha256_of_the_sorted_names_and_hashes(folder):
    lines = [(b"{}", "config.json"), (b"weights", "onnx/model.safetensors")]
    listing = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for content, name in lines)
    assert folder_revision(folder) == hashlib.sha256(listing.encode()).hexdigest()[:16]


def test_documents_hidden_files_and_the_place_do_not_matter(folder, tmp_path):
    before = folder_revision(folder)
    for name in ("README.md", "LICENSE", "LICENSE.txt", ".gitattributes", "teaser.png"):
        (folder / name).write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "model.safetensors").write_bytes(b"other")
    assert folder_revision(folder) == before
    shutil.move(folder, tmp_path / "elsewhere")
    assert folder_revision(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("change", ["content", "name", "file"])
def test_any_other_change_gives_another_revision(folder, change):
    before = folder_revision(folder)
    if change == "content":
        (folder / "onnx" / "model.safetensors").write_bytes(b"Weights")  # of the same size
    elif change == "name":
        (folder / "config.json").rename(folder / "config_2.json")
    else:
        (folder / "vocab.txt").write_text("")
    assert folder_revision(folder) != before


def test_what_holds_no_weights_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        folder_revision(tmp_path / "nowhere")
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(UserError, match="holds no weights"):
        folder_revision(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        file_sha256(tmp_path / "weights.pth")


def test_versions_are_of_the_libraries_that_are_there():
    versions = library_versions("torch", "no-such-library-at-all", "pillow")
    assert list(versions) == ["torch", "pillow"]
    assert all(version[0].isdigit() for version in versions.values())
