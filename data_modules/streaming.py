"""Samples from litdata chunks, in an order that is a pure function of (seed, epoch), from any batch on.

litdata stores and streams the samples; which samples make up batch b of epoch e is decided here. A position in training
is then two numbers, epoch and batches done, and resuming at it is exact whatever the number of workers, then or now.
"""

import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data_modules.cache import CacheSettings
from data_modules.chunks import ChunkedSamples
from data_modules.images import read_picture
from zimage_lit.errors import UserError
from zimage_lit.rng import generator

Captions = dict[str, dict[str, str]]  # language -> kind -> text
Key = tuple[int, int]  # (epoch, index of the sample in its split)


class Batch(TypedDict):
    """What a training step gets. images: uint8 (3, H, W) RGB tensors, each of its own size."""

    images: list[torch.Tensor]
    captions: list[str]
    metadata: list[dict[str, Any]]
    ids: list[int | str]


def encode_sample(
    image: np.ndarray | bytes, captions: Captions, metadata: Mapping[str, Any], sample_id: int | str
) -> dict[str, Any]:
    """One sample as litdata's `optimize` is to write it.

    `image` is uint8 (H, W, 3) RGB, stored as PNG, or the bytes of a file as it is (see `read_picture`). The bytes
    travel as an array: litdata packs samples of plain Python values into Arrow tables of 256 rows and would decode a
    whole table for every picture read at random (measured: 40 ms instead of 2 ms for a batch of 64).
    """
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        image = buffer.getvalue()
    return {
        "image": np.frombuffer(image, dtype=np.uint8),
        "captions": json.dumps(captions, ensure_ascii=False),
        "metadata": json.dumps(metadata, ensure_ascii=False),
        "id": sample_id,
    }


class CaptionChooser:
    """Chooses which caption of a sample is used: a pure function of (seed, epoch, sample index).

    weights: language -> kind -> weight; kinds that a sample lacks do not count. None: all captions alike.
    """

    def __init__(self, weights: Mapping[str, Mapping[str, float]] | None, seed: int) -> None:
        self.weights = weights
        self.seed = seed

    def __call__(self, captions: Captions, epoch: int, index: int) -> str:
        options = [
            (text, 1.0 if self.weights is None else self.weights.get(language, {}).get(kind, 0.0))
            for language, kinds in sorted(captions.items())
            for kind, text in sorted(kinds.items())
        ]
        total = sum(weight for _, weight in options)
        if not total > 0:
            found = ", ".join(f"{language}.{kind}" for language, kinds in captions.items() for kind in kinds)
            raise UserError(
                f"has captions of the kinds {found or 'none at all'}, and data.init_args.caption_weights gives none "
                "of them a weight above 0: add one of them."
            )
        uniform = random.Random(f"caption/{self.seed}/{epoch}/{index}").random() * total
        for text, weight in options:
            uniform -= weight
            if uniform < 0:
                return text
        return next(text for text, weight in reversed(options) if weight > 0)  # rounding in the sum of the weights


class SampleReader(Dataset[dict[str, Any]]):
    """One split of a prepared folder, read at random. The chunks are opened at first use, in the worker that reads.

    `folder` holds litdata's index.json and chunks; it may be an address (see `samples`, a `ChunkedSamples`).
    Reading a damaged sample gives {"error": one sentence} instead of raising: an exception crosses from a worker with
    its traceback glued to its message, a value as it is.
    """

    def __init__(self, folder: Path | str, choose_caption: CaptionChooser, cache: CacheSettings | None = None) -> None:
        self.folder = folder
        self.choose_caption = choose_caption
        self.samples = ChunkedSamples(folder, cache)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """A batch at once: read in the order of the chunks, so that each is opened once, given in the order asked."""
        samples: dict[Key, dict[str, Any]] = {}
        for key in sorted(keys, key=lambda key: key[1]):
            samples[key] = self._read(*key)
            if "error" in samples[key]:  # where the server is gone, each further sample would wait for it again
                samples = dict.fromkeys(keys, samples[key])
                break
        self.samples.release()
        return [samples[key] for key in keys]

    def _read(self, epoch: int, index: int) -> dict[str, Any]:
        name: Any = f"number {index}"
        try:
            self.samples.fetch(index)
        except UserError as error:
            return {"error": str(error)}
        try:
            stored = self.samples[index]
            name = stored["id"]
            return {
                "image": read_picture(stored["image"].tobytes(), name=""),
                "caption": self.choose_caption(json.loads(stored["captions"]), epoch, index),
                "metadata": json.loads(stored["metadata"]),
                "id": name,
            }
        except UserError as error:
            return {"error": f"Sample {name} in {self.samples.place_of(index)} {error}"}
        except Exception as error:  # damaged bytes break litdata, Pillow and json in many ways
            return {
                "error": f"Sample {name} in {self.samples.place_of(index)} cannot be read "
                f"({type(error).__name__}: {error}): copy the file again, or prepare the data again."
            }


def read_batches(reader: SampleReader, plan: Iterable[list[Key]], num_workers: int) -> Iterator[Batch]:
    """The batches of a plan, in its order. UserError names a sample that cannot be read."""
    loader: Iterable[dict[str, Any]] = DataLoader(
        reader,
        batch_sampler=plan,
        num_workers=num_workers,
        collate_fn=_pack,
    )
    return map(_unpack, loader)


class ResumableLoader:
    """Endless epochs of batches, with the position as its state.

    Each pass of `iter` runs to the end of the epoch from wherever the loader stands; at the end the next pass begins
    the next epoch. A batch counts as done when it is handed out, so a state saved during a training step continues with
    the batch after it. Lightning finds `state_dict` and `load_state_dict` and keeps the state in its checkpoints.

    Every rank takes its own part of each global batch of `batch_size * world_size` samples.

    Raises:
        UserError: fewer samples than one global batch; `drop_last=False` on several ranks, whose last batches could
            differ in number; a state saved with other data or settings, which could not be continued exactly.
    """

    def __init__(
        self,
        reader: SampleReader,
        fingerprint: str,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.reader = reader
        self.num_workers = num_workers
        self.rank = rank
        self.epoch = 0
        self.batches_done = 0
        self._settings: dict[str, Any] = {
            "fingerprint": fingerprint,
            "num_samples": len(reader),
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "drop_last": drop_last,
            "world_size": world_size,
        }
        if drop_last and len(reader) < batch_size * world_size:
            raise UserError(
                f"{reader.folder} has {len(reader)} samples, fewer than the {batch_size * world_size} of one batch: "
                "lower data.init_args.batch_size or prepare more samples."
            )
        if not drop_last and world_size > 1:
            raise UserError(
                f"data.init_args.drop_last=false works on one device; this run has {world_size}: set it to true."
            )

    def __len__(self) -> int:
        """Batches in an epoch, wherever the loader stands in it."""
        global_batch = self._settings["batch_size"] * self._settings["world_size"]
        full, rest = divmod(len(self.reader), global_batch)
        return full + (rest > 0 and not self._settings["drop_last"])

    def __iter__(self) -> Iterator[Batch]:
        if self.batches_done >= len(self):
            self.epoch += 1
            self.batches_done = 0
        for batch in read_batches(self.reader, self._remaining_batches(), self.num_workers):
            self.batches_done += 1
            yield batch

    def _remaining_batches(self) -> Iterator[list[Key]]:
        """This rank's share of the batches that the epoch still has."""
        epoch, batch_size = self.epoch, self._settings["batch_size"]
        order = self._epoch_order(epoch)
        for number in range(self.batches_done, len(self)):
            start = (number * self._settings["world_size"] + self.rank) * batch_size
            yield [(epoch, index) for index in order[start : start + batch_size].tolist()]

    def _epoch_order(self, epoch: int) -> torch.Tensor:
        if not self._settings["shuffle"]:
            return torch.arange(len(self.reader))
        return torch.randperm(len(self.reader), generator=generator(self._settings["seed"], "data order", epoch))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batches_done": self.batches_done, **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in self._settings.items():
            if state[name] != value:
                raise UserError(
                    f"The checkpoint stands in the middle of data with {name}={state[name]} and this run has "
                    f"{name}={value}, so the run cannot be continued exactly: restore that setting, or start a new run "
                    "from the checkpoint's weights with init_from."
                )
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]


class OrderedLoader:
    """The same batches in the same order at every pass, for validation; captions are those of epoch 0.

    On several ranks each takes every world_size-th sample, and the few left over are dropped, so that all have as many.
    """

    def __init__(
        self, reader: SampleReader, batch_size: int, num_workers: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.reader = reader
        self.num_workers = num_workers
        indices = range(rank, len(reader) - len(reader) % world_size, world_size)
        self._plan = [
            [(0, index) for index in indices[start : start + batch_size]]
            for start in range(0, len(indices), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        return read_batches(self.reader, self._plan, self.num_workers)


def _pack(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch as it leaves a worker: one tensor for all pixels, so one piece of shared memory, not one a picture."""
    errors = [sample["error"] for sample in samples if "error" in sample]
    if errors:
        return {"error": errors[0]}
    return {
        "pixels": torch.from_numpy(np.concatenate([sample["image"].reshape(-1) for sample in samples])),
        "shapes": [sample["image"].shape for sample in samples],
        "captions": [sample["caption"] for sample in samples],
        "metadata": [sample["metadata"] for sample in samples],
        "ids": [sample["id"] for sample in samples],
    }


def _unpack(packed: Mapping[str, Any]) -> Batch:
    if "error" in packed:
        raise UserError(packed["error"])
    shapes = packed["shapes"]
    pieces = packed["pixels"].split([int(np.prod(shape)) for shape in shapes])
    return {
        "images": [piece.view(shape).permute(2, 0, 1) for piece, shape in zip(pieces, shapes, strict=True)],
        "captions": packed["captions"],
        "metadata": packed["metadata"],
        "ids": packed["ids"],
    }
