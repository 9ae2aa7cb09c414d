"""Checkpoints that every rank writes its own part of, as folders, and their safe reading.

<folder>/.metadata, __0_0.distcp, …   torch.distributed.checkpoint: tensors alone, `state_dict`, `optimizer_0`, …
<folder>/meta.pt                      everything else of the training state, as in a checkpoint file

Nothing here can run code from a file: meta.pt and the tensors are loaded as weights only, and the index, which torch
would unpickle as it is, is held to the few classes that it is made of.
"""

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.storage import StorageReader

from zimage_lit.errors import UserError

INDEX, META = ".metadata", "meta.pt"
# What an index of tensors consists of, as torch pickles it.
INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
INDEX_NAMES = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        found = module in INDEX_MODULES and "." not in name and isinstance(getattr(_module(module), name, None), type)
        if not (found or is_type or (module, name) in INDEX_NAMES):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the index of a checkpoint")
        return super().find_class(module, name)


def _module(name: str) -> Any:
    return {"metadata": dcp.metadata, "filesystem": dcp.filesystem}[name.rpartition(".")[2]]


def is_sharded(path: Path) -> bool:
    """Whether there is a folder at `path` that was meant to be a checkpoint, whole or not."""
    return path.is_dir() and ((path / INDEX).exists() or (path / META).exists())


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint's tensors; raises for one that holds anything else."""
    index = _IndexUnpickler(io.BytesIO((folder / INDEX).read_bytes())).load()
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise pickle.UnpicklingError("not an index of tensors")
    for entry in index.state_dict_metadata.values():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError("holds more than tensors")
    return index


def read_sharded(folder: Path) -> dict[str, Any]:
    """What meta.pt holds, and under `state_dict` the weights by name, on the meta device: shapes and types alone.

    Raises UserError for a folder that is not whole.
    """
    try:
        index = read_index(folder)
        for name, end in _file_ends(index).items():
            if (folder / name).stat().st_size < end:
                raise EOFError(f"{name} is cut off")
        checkpoint = torch.load(folder / META, map_location="cpu", weights_only=True)
    except Exception as error:  # torn files make the unpicklers raise all kinds, none of which names the file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{folder} cannot be read as a sharded checkpoint ({reason}): name a whole one, or start over."
        ) from error
    checkpoint["state_dict"] = ShardedTensors(folder, "state_dict.").shapes
    return checkpoint


def _file_ends(index: Metadata) -> dict[str, int]:
    """File name -> the least size it must have."""
    ends: dict[str, int] = {}
    for stored in index.storage_data.values():
        name = Path(stored.relative_path).name  # a file beside the index, whatever the index says
        ends[name] = max(ends.get(name, 0), stored.offset + stored.length)
    return ends


class TensorReader(FileSystemReader):
    """Reads a folder with the index that was checked, once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index = read_index(folder)
        self.entries = cast(dict[str, TensorStorageMetadata], self.index.state_dict_metadata)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of a folder whose names begin with `prefix`, by the rest of the name; each is read when asked for.

    No process group is needed, nor used where there is one.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.reader, self.prefix = TensorReader(folder), prefix
        self.entries = {
            name.removeprefix(prefix): entry for name, entry in self.reader.entries.items() if name.startswith(prefix)
        }

    @property
    def shapes(self) -> dict[str, Tensor]:
        """The same without their values, on the meta device."""
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in self.entries.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        load({f"{self.prefix}{name}": tensor}, self.reader, alone=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def load(tensors: dict[str, Any], reader: StorageReader, alone: bool = False) -> None:
    """Fill the tensors (each rank its part of DTensors) of a nested dict from a folder, in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=alone)


# ---------------------------------------------------------------------------------------------------- nested states


def split(state: Mapping[str, Any], kind: type = Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested dicts as two: the leaves that are of `kind`, and all others."""
    chosen: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, kind):
            chosen[key] = value
        elif isinstance(value, dict):
            inside, outside = split(value, kind)
            chosen |= {key: inside} if inside else {}
            others |= {key: outside} if outside or not value else {}
        else:
            others[key] = value
    return chosen, others


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """What `split` has taken apart."""
    both = {**first, **second}
    for key in first.keys() & second.keys():
        both[key] = joined(first[key], second[key])
    return both


def flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by the names under which a folder stores them."""
    leaves: dict[str, Any] = {}
    for key, value in state.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
