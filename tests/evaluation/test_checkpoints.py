"""Judges' weights: what may be in a pickle, and what does not fit."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from evaluation.judges.checkpoints import filled, read_folder, read_pickle
from zimage_lit.errors import UserError

TENSORS = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


class Harmful:
    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_scripts_checkpoint_is_read(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "checkpoint.pth"
    groups = [{"lr": np.float64(0.1), "momentum": np.float32(0.5), "step": np.int64(3), "params": [0]}]
    content = {"model": TENSORS, "args": argparse.Namespace(lr=1.0, name="x"), "groups": groups}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    for mmap in (False, True):
        found = read_pickle(file, mmap)
        assert torch.equal(found["model"]["a"], TENSORS["a"])
        assert found["args"].lr == 1 and found["groups"] == groups


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "harmful.pth"
    torch.save({"a": TENSORS["a"], "b": Harmful(tmp_path / "made")}, file)
    with pytest.raises(UserError, match=r"harmful\.pth cannot be read as weights"):
        read_pickle(file)
    assert not (tmp_path / "made").exists()


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no"):
        read_pickle(tmp_path / "absent.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04torn")
    with pytest.raises(UserError, match=r"torn\.pth cannot be read"):
        read_pickle(tmp_path / "torn.pth")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        read_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        read_folder(tmp_path)


def test_a_folders_tensors_whole_and_in_parts(tmp_path: Path) -> None:
    whole, parts, pickled = (tmp_path / name for name in ("whole", "parts", "pickled"))
    for folder in (whole, parts, pickled):
        folder.mkdir()
    save_file(TENSORS, whole / "model.safetensors")
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, parts / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(TENSORS, pickled / "pytorch_model.bin")
    for folder in (whole, parts, pickled):
        found = read_folder(folder)
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_what_does_not_fit_is_named() -> None:
    tensors = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    assert torch.equal(filled(nn.Linear(3, 2), tensors, "file").weight, tensors["weight"])
    with pytest.raises(UserError, match="file holds other weights than expected, it lacks bias"):
        filled(nn.Linear(3, 2), {"weight": tensors["weight"]}, "file")
    with pytest.raises(UserError, match="it has another shape for weight"):
        filled(nn.Linear(4, 2), tensors, "file")
    with pytest.raises(UserError, match="it also has a, c, d and 1 more"):
        filled(nn.Linear(3, 2), tensors | dict.fromkeys("acde", torch.ones(1)), "file")
