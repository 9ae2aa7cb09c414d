"""Sharded checkpoints on disk: whole at every moment, refused in one sentence where they are not, and free of code."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from zimage_lit.callbacks import checkpoint as writing
from zimage_lit.callbacks.checkpoint import RunCheckpoint, spare_folder
from zimage_lit.errors import UserError
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.sharded_checkpoints import flat, joined, split
from zimage_lit.stages.initial_weights import check_continues, open_weights, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write(folder: Path, value: float, average: bool = True) -> Path:
    """What one rank alone would write."""
    weights = {"backbone.a.weight": torch.full((3, 2), value), "backbone.b": torch.full((1,), value)}
    state: dict = {"state_dict": weights, "optimizer_0": {"state": {"backbone.b": {"step": torch.tensor(4.0)}}}}
    if average:
        names = {name.removeprefix("backbone."): weight + 1 for name, weight in weights.items()}
        state["callbacks"] = {"EMA": {"average": names}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    meta = {"pytorch-lightning_version": "2", "global_step": 4, "optimizer_states": [{}], "callbacks": {}}
    torch.save(meta, folder / "meta.pt")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "run.ckpt", 2.0)


def test_weights_are_read_one_by_one_the_average_first(folder: Path, tmp_path: Path) -> None:
    weights = open_weights(folder)
    assert set(weights) == {"a.weight", "b"} and torch.equal(weights["a.weight"], torch.full((3, 2), 3.0))
    assert torch.equal(open_weights(write(tmp_path / "plain.ckpt", 2.0, average=False))["b"], torch.full((1,), 2.0))


def test_the_state_is_told_from_the_folder(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert checkpoint["global_step"] == 4
    assert {name: tuple(w.shape) for name, w in checkpoint["state_dict"].items()} == {
        "backbone.a.weight": (3, 2), "backbone.b": (1,)
    }  # fmt: skip
    with pytest.raises(UserError, match=r"of another backbone: 2 tensors do not fit, the first is backbone\.a\.weight"):
        check_continues(checkpoint, torch.nn.ParameterDict({"bias": torch.zeros(1), "b": torch.zeros(1)}), "adamw")


def damage(folder: Path, how: str) -> None:
    (data,) = folder.glob("*.distcp")
    if how == "cut":
        data.write_bytes(data.read_bytes()[:-10])
    elif how == "index":
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:50])
    elif how == "meta":
        (folder / "meta.pt").write_bytes(b"not a checkpoint")
    else:
        {"no data": data, "no index": folder / ".metadata", "no meta": folder / "meta.pt"}[how].unlink()


@pytest.mark.parametrize("how", ["cut", "index", "meta", "no data", "no index", "no meta"])
def test_a_torn_folder_is_one_sentence(folder: Path, how: str) -> None:
    damage(folder, how)
    with pytest.raises(
        UserError, match=r"run\.ckpt cannot be read as a sharded checkpoint \(.*\): name a whole"
    ) as error:
        read_checkpoint(folder)
    assert "\n" not in str(error.value)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("place", ["index", "meta", "inside"])
def test_no_code_in_a_folder_is_run(folder: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    if place == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(Bomb()))
    elif place == "meta":
        torch.save(Bomb(), folder / "meta.pt")
    else:  # torch would unpickle entries that are no tensors
        dcp.save({"state_dict": {"backbone.b": Bomb()}}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    with pytest.raises(UserError, match="cannot be read as a sharded checkpoint"):
        open_weights(folder)
    assert not Path("exploded").exists()


class Killed(BaseException):
    pass


CALLS = ["fsync", "readlink", "replace", "link", "rename", "symlink_to", "unlink", "rmtree", "copytree"]


def test_a_kill_at_any_moment_of_the_swap_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch) -> None:
    """Every call that changes the disk is the last one in turn, whatever was there before."""
    moments = 0
    for before in ("file", "folder", "nothing"):
        for moment in range(1, 30):
            last = last_checkpoint(tmp_path / f"{before}-{moment}")
            last.parent.mkdir(parents=True)
            if before == "file":
                torch.save({"state_dict": {}, "pytorch-lightning_version": "2"}, last)
            elif before == "folder":
                RunCheckpoint()._swap_in(write(spare_folder(last), 1.0), last, 2)
            fresh = write(spare_folder(last), 2.0)
            if not swap_and_die(fresh, last, moment, monkeypatch):
                break
            moments += 1
            if before != "nothing" or last.exists():
                read_checkpoint(last)
            # and the run that comes after can save again
            writing.remove(spare_folder(last))
            RunCheckpoint(2, keep_every_n_steps=2)._swap_in(write(spare_folder(last), 3.0), last, 4)
            assert torch.equal(open_weights(last)["b"], torch.full((1,), 4.0))
            assert torch.equal(open_weights(last.with_name("step-00000004.ckpt"))["b"], torch.full((1,), 4.0))
        assert torch.equal(open_weights(last)["b"], torch.full((1,), 3.0))  # the last round went through
        left = {path.name for path in last.parent.iterdir()}
        assert left == {"last.ckpt", os.readlink(last), "step-00000004.ckpt"}
    assert moments > 15


def swap_and_die(fresh: Path, last: Path, moment: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the process was killed before its call number `moment`."""
    count = 0

    def counted(original):
        def call(*args, **keywords):
            nonlocal count
            count += 1
            if count == moment:
                raise Killed
            return original(*args, **keywords)

        return call

    with monkeypatch.context() as patch:
        for owner in (os, shutil, Path):
            for name in CALLS:
                if hasattr(owner, name):
                    patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            RunCheckpoint(2, keep_every_n_steps=2)._swap_in(fresh, last, 4)
        except Killed:
            return True
    return False


def test_a_file_takes_the_place_of_a_folder_and_the_other_way_round(tmp_path: Path) -> None:
    last = last_checkpoint(tmp_path)
    RunCheckpoint()._swap_in(write(spare_folder(last), 1.0), last, 2)
    partial = last.with_name("last.ckpt.partial")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2"}, partial)
    RunCheckpoint()._swap_in(partial, last, 3)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"] and last.is_file()
    RunCheckpoint()._swap_in(write(spare_folder(last), 1.0), last, 4)
    shutil.copytree(last, copy := tmp_path / "copy")
    last.unlink()
    copy.rename(last)  # as `cp -L` leaves it
    RunCheckpoint()._swap_in(write(last.with_name("last.ckpt.1"), 5.0), last, 6)
    assert torch.equal(open_weights(last)["b"], torch.full((1,), 6.0))


def test_a_state_is_split_by_kind_and_joined_again() -> None:
    tensor = torch.ones(2)
    state = {"state": {"w": {"step": tensor, "name": "x"}, "empty": {}}, "groups": [{"lr": 1}]}
    tensors, rest = split(state)
    assert flat(tensors) == {"state.w.step": tensor}
    assert rest == {"state": {"w": {"name": "x"}, "empty": {}}, "groups": [{"lr": 1}]}
    assert joined(tensors, rest) == state
