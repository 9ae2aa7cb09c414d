"""Judges' files of tensors, read without running anything that a pickle may hold, and networks filled from them."""

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from zimage_lit.errors import UserError
from zimage_lit.files import read_json

# What training scripts leave beside the weights: their arguments, and learning rates that are NumPy's numbers, under
# the names that these have had. None of it runs code.
NUMBER = np.float64(0).__reduce__()[0]  # makes one of NumPy's numbers of its bytes
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
    type(np.dtype(np.int64)),
    (NUMBER, "numpy._core.multiarray.scalar"),
    (NUMBER, "numpy.core.multiarray.scalar"),
]
Network = TypeVar("Network", bound=nn.Module)


def read_pickle(file: str | Path, mmap: bool = False) -> Any:
    """What `torch.save` has written, on the CPU.

    mmap: tensors are read when they are used, where the file's format allows it.

    UserError for a file that is absent, broken, or holds more than tensors and plain values.
    """
    if not Path(file).is_file():
        raise UserError(f"there is no {file} with a judge's weights: check the path, or download it there.")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and is_zipfile(file))
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read as weights ({reason}): download it again.") from None


def read_folder(folder: str | Path) -> dict[str, Tensor]:
    """All tensors that transformers has saved in a folder, whole or in parts: safetensors, else pytorch_model.bin.

    UserError for files that are absent or broken.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for file in _parts(folder):
        tensors |= read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    return tensors


def _parts(folder: Path) -> list[Path]:
    """The files of a folder that hold its tensors."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            names: dict[str, str] = read_json(index, "download it again").get("weight_map", {})
            return [folder / name for name in sorted(set(names.values()))]
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin: check the path.")


def read_safetensors(file: str | Path) -> dict[str, Tensor]:
    """The tensors of one file. UserError where it is absent or broken."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as weights ({error}): download it again.") from None


def filled(network: Network, tensors: Mapping[str, Tensor], source: str | Path) -> Network:
    """The network with the tensors of `source` in it, frozen. UserError, which names some, where they do not fit."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    misshapen = [name for name in wanted.keys() & given.keys() if wanted[name] != given[name]]
    for problem, names in (
        ("lacks", wanted.keys() - given.keys()),
        ("has another shape for", misshapen),
        ("also has", given.keys() - wanted.keys()),
    ):
        if names:
            raise UserError(
                f"{source} holds other weights than expected, it {problem} {some(sorted(names))}: check the path."
            )
    network.load_state_dict(dict(tensors))
    return network.eval().requires_grad_(False)


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
