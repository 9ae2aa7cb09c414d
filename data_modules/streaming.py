"""Samples from litdata chunks, in an order that is a pure function of (seed, epoch), from any batch on.

litdata stores and streams the samples; which samples make up batch b of epoch e is decided by `planning`. A position
in training is then two numbers, epoch and batches done, and resuming at it is exact whatever the number of workers,
then or now.
"""

import io
import json
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from litdata import StreamingDataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data_modules.buckets import SizeMapping, resize_to
from data_modules.images import read_picture
from data_modules.planning import (
    EpochPlan,
    PlanSettings,
    SampleTable,
    check_budget,
    next_source,
    plan_epoch,
    read_table,
)
from zimage_lit.errors import UserError

Captions = dict[str, dict[str, str]]  # language -> kind -> text
Key = tuple[int, int]  # (epoch, index of the sample in its split)
POSITION = ("epoch", "batches_done", "steps_done")  # what of a loader's state is no setting


class Batch(TypedDict):
    """What a training step gets. images: uint8 (3, H, W) RGB tensors, each of its own size."""

    images: list[torch.Tensor]
    captions: list[str]
    metadata: list[dict[str, Any]]
    ids: list[int | str]


def encode_sample(
    pictures: np.ndarray | bytes | Mapping[str, np.ndarray | bytes],
    captions: Captions,
    metadata: Mapping[str, Any],
    sample_id: int | str,
) -> dict[str, Any]:
    """One sample as litdata's writer is to store it.

    pictures: one for each role of the data set (`image`, `source`, `winner`, `loser`); a picture by itself is the
    `image`. A picture is uint8 (H, W, 3) RGB, stored as PNG, or the bytes of a file as it is (see `read_picture`).

    The bytes travel as arrays: litdata packs samples of plain Python values into Arrow tables of 256 rows and would
    decode a whole table for every sample read at random (measured: 40 ms instead of 2 ms for a batch of 64). A sample
    without a picture has an empty array for that reason.
    """
    if not isinstance(pictures, Mapping):
        pictures = {"image": pictures}
    arrays = {role: np.frombuffer(_as_file(picture), dtype=np.uint8) for role, picture in pictures.items()}
    return {
        **(arrays or {"no_picture": np.zeros(0, dtype=np.uint8)}),
        "captions": json.dumps(captions, ensure_ascii=False),
        "metadata": json.dumps(metadata, ensure_ascii=False),
        "id": sample_id,
    }


def _as_file(picture: np.ndarray | bytes) -> bytes:
    if isinstance(picture, bytes):
        return picture
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


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

    `folder` holds litdata's index.json and chunks. sizes: at which pictures are given; None: as they are stored.
    Reading a damaged sample gives {"error": one sentence} instead of raising: an exception crosses from a worker with
    its traceback glued to its message, a value as it is.
    """

    def __init__(self, folder: Path, choose_caption: CaptionChooser, sizes: SizeMapping | None = None) -> None:
        self.folder = folder
        self.choose_caption = choose_caption
        self.sizes = sizes
        chunks = json.loads((folder / "index.json").read_text(encoding="utf-8"))["chunks"]
        self._chunk_names = [chunk["filename"] for chunk in chunks]
        self._chunk_sizes = [chunk["chunk_size"] for chunk in chunks]
        self._chunk_ends = list(accumulate(self._chunk_sizes))
        self._stream: StreamingDataset | None = None

    def __len__(self) -> int:
        return self._chunk_ends[-1]

    def plain_table(self) -> SampleTable:
        """The chunks alone, as if all samples were alike."""
        return SampleTable(
            len(self), chunk=np.repeat(np.arange(len(self._chunk_sizes), dtype=np.int32), self._chunk_sizes)
        )

    def table(self, **options: Any) -> SampleTable:
        """What planning knows of these samples at this reader's sizes; for the options see `read_table`."""
        return read_table(self.folder, self._chunk_sizes, self.sizes, **options)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """A batch at once: read in the order of the chunks, so that each is opened once, given in the order asked."""
        samples = {key: self._read(*key) for key in sorted(keys, key=lambda key: key[1])}
        return [samples[key] for key in keys]

    def _read(self, epoch: int, index: int) -> dict[str, Any]:
        if self._stream is None:
            self._stream = StreamingDataset(str(self.folder), batch_decode=0)
        name: Any = f"number {index}"
        try:
            stored = self._stream[index]
            name = stored["id"]
            return {
                "image": self._picture(stored["image"].tobytes()),
                "caption": self.choose_caption(json.loads(stored["captions"]), epoch, index),
                "metadata": json.loads(stored["metadata"]),
                "id": name,
            }
        except UserError as error:
            return {"error": f"Sample {name} in {self._chunk_of(index)} {error}"}
        except Exception as error:  # damaged bytes break litdata, Pillow and json in many ways
            return {
                "error": f"Sample {name} in {self._chunk_of(index)} cannot be read ({type(error).__name__}: {error}): "
                "copy the file again, or prepare the data again."
            }

    def _picture(self, content: bytes) -> np.ndarray:
        image = read_picture(content, name="")
        if self.sizes is None:
            return image
        width, height = self.sizes(image.shape[1], image.shape[0])
        return resize_to(image, int(width), int(height))

    def _chunk_of(self, index: int) -> Path:
        return self.folder / self._chunk_names[bisect_right(self._chunk_ends, index)]


def read_batches(reader: Dataset[dict[str, Any]], plan: Iterable[list[Any]], num_workers: int) -> Iterator[Batch]:
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

    Each pass of `iter` has as many batches as epoch 0 and begins where the loader stands. Epochs mostly have the same
    length, so a pass is an epoch; where later epochs differ by a few batches (windows with token counts, weights of
    concepts), passes keep their length and epochs begin inside them. A batch counts as done when it is handed out, so a
    state saved during a training step continues with the batch after it. Lightning finds `state_dict` and
    `load_state_dict` and keeps the state in its checkpoints.

    Every rank takes its own part of each step; for batch_size or token_budget, shuffle, drop_last and window see
    `planning.PlanSettings`.

    Args:
        table: what is known of the samples (`reader.table()`); None: nothing, so batches are slices of the order.
        upcoming: is told the samples that this rank will read, in their order, whenever an epoch is begun or
            continued, so that chunks far away can be fetched ahead.

    Raises:
        UserError: fewer samples than one step of all ranks; a sample that exceeds the budget; a state saved with other
            data or settings, which could not be continued exactly.
    """

    def __init__(
        self,
        reader: SampleReader,
        fingerprint: str,
        batch_size: int | None,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        token_budget: int | None = None,
        window: int | None = None,
        table: SampleTable | None = None,
        upcoming: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        self.reader = reader
        self.num_workers = num_workers
        self.rank = rank
        self.upcoming = upcoming
        self.epoch = 0
        self.batches_done = 0  # of the epoch
        self.steps_done = 0  # of all epochs
        self._table = table or reader.plain_table()
        self._plan_settings = PlanSettings(batch_size, token_budget, world_size, shuffle, drop_last, window, seed)
        self._settings: dict[str, Any] = {
            "fingerprint": fingerprint,
            "num_samples": len(reader),
            **asdict(self._plan_settings),
            **self._table.settings,
        }
        share = self._plan_settings.share
        if drop_last and len(reader) < share:
            raise UserError(
                f"{reader.folder} has {len(reader)} samples, fewer than the {share} of one batch: "
                "lower data.init_args.batch_size or prepare more samples."
            )
        check_budget(self._table, self._plan_settings)
        self._plans: dict[int, EpochPlan] = {}
        self._length: int | None = None

    def __len__(self) -> int:
        """Batches in a pass, wherever the loader stands in it."""
        if self._length is None:
            self._length = len(self._plan(0))
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        left = len(self) - self.steps_done % len(self)
        for batch in read_batches(self.reader, islice(self.keys(), left), self.num_workers):
            self.advance()
            yield batch

    def keys(self) -> Iterator[list[Key]]:
        """What this rank's batches are made of, from where the loader stands, on and on through the epochs."""
        epoch, done = self.epoch, self.batches_done
        while True:
            plan = self._plan(epoch)
            if self.upcoming is not None and done < len(plan):
                self.upcoming(plan.remaining(done, self.rank))
            for step in range(done, len(plan)):
                yield [(epoch, index) for index in plan.batch(step, self.rank).tolist()]
            epoch, done = epoch + 1, 0

    def advance(self) -> None:
        """Count one batch as handed out."""
        if self.batches_done >= len(self._plan(self.epoch)):
            self.epoch += 1
            self.batches_done = 0
        self.batches_done += 1
        self.steps_done += 1

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch not in self._plans:
            kept = {number: plan for number, plan in self._plans.items() if number >= self.epoch}
            self._plans = {**kept, epoch: plan_epoch(self._table, self._plan_settings, epoch)}
        return self._plans[epoch]

    def state_dict(self) -> dict[str, Any]:
        position = {"epoch": self.epoch, "batches_done": self.batches_done, "steps_done": self.steps_done}
        return {**position, **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = {name: value for name, value in state.items() if name not in POSITION}
        _check_same_settings(saved, self._settings)
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]
        self.steps_done = state.get("steps_done", self.epoch * len(self) + self.batches_done)


class MixtureLoader:
    """Endless batches from several data sets, each batch from one, all ranks from the same at the same step.

    Each data set has its share of the steps at all times (`planning.next_source`: over any window of steps within two
    of what its weight says) and goes through its own epochs whole, faster or slower than the others. State and passes
    are as those of `ResumableLoader`; one pool of workers reads for all.

    Args:
        loaders: name -> loader of one data set; their `num_workers` do not count.
        weights: name -> weight above 0, the same names.
        steps_per_epoch: batches of a pass; None: as many as those of the data sets together.

    Raises:
        UserError: other names or weights of 0 and below; a state saved with other data or settings.
    """

    def __init__(
        self,
        loaders: Mapping[str, ResumableLoader],
        weights: Mapping[str, float],
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
    ) -> None:
        key = "data.init_args.weights"
        if weights.keys() != loaders.keys():
            raise UserError(f"{key} names {', '.join(weights)} and the data sets are {', '.join(loaders)}.")
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise UserError(f"{key}.{name} is {weight}: set it to a number above 0, or leave the data set out.")
        self.loaders = dict(loaders)
        self.num_workers = num_workers
        self._weights = {name: float(weights[name]) for name in sorted(loaders)}
        self._steps_per_epoch = steps_per_epoch

    def __len__(self) -> int:
        """Batches in a pass, wherever the loader stands in it."""
        return self._steps_per_epoch or sum(map(len, self.loaders.values()))

    def __iter__(self) -> Iterator[Batch]:
        left = len(self) - sum(self._steps_done().values()) % len(self)
        reader = _Readers({name: loader.reader for name, loader in self.loaders.items()})
        for batch in read_batches(reader, islice(self._keys(), left), self.num_workers):
            self.loaders[self._next(self._steps_done())].advance()
            yield batch

    def _keys(self) -> Iterator[list[tuple[str, Key]]]:
        steps_done = self._steps_done()
        keys = {name: loader.keys() for name, loader in self.loaders.items()}
        while True:
            name = self._next(steps_done)
            steps_done[name] += 1
            yield [(name, key) for key in next(keys[name])]

    def _next(self, steps_done: Mapping[str, int]) -> str:
        number = next_source(list(self._weights.values()), [steps_done[name] for name in self._weights])
        return list(self._weights)[number]

    def _steps_done(self) -> dict[str, int]:
        return {name: loader.steps_done for name, loader in self.loaders.items()}

    def state_dict(self) -> dict[str, Any]:
        states = {name: loader.state_dict() for name, loader in self.loaders.items()}
        return {"weights": self._weights, "steps_per_epoch": self._steps_per_epoch, "loaders": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = {"weights": state["weights"], "steps_per_epoch": state["steps_per_epoch"]}
        _check_same_settings(saved, {"weights": self._weights, "steps_per_epoch": self._steps_per_epoch})
        for name, loader in self.loaders.items():
            loader.load_state_dict(state["loaders"][name])


class _Readers(Dataset[dict[str, Any]]):
    """Several readers as one; a key is (name of the reader, its key), all of a batch of one name."""

    def __init__(self, readers: Mapping[str, SampleReader]) -> None:
        self.readers = readers

    def __getitems__(self, keys: Sequence[tuple[str, Key]]) -> list[dict[str, Any]]:
        return self.readers[keys[0][0]].__getitems__([key for _, key in keys])


def _check_same_settings(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """UserError names the first setting that differs; one that is missing counts as None."""
    for name in {**settings, **saved}:
        before, now = saved.get(name), settings.get(name)
        if before != now:
            raise UserError(
                f"The checkpoint stands in the middle of data with {name}={before} and this run has {name}={now}, so "
                "the run cannot be continued exactly: restore that setting, or start a new run from the checkpoint's "
                "weights with init_from."
            )


class OrderedLoader:
    """The same batches in the same order at every pass, for validation; captions are those of epoch 0.

    By count, or by a budget of tokens and a table as in `ResumableLoader`. On several ranks the few samples left over
    are dropped, so that all have as many; by count each rank takes every world_size-th sample.
    """

    def __init__(
        self,
        reader: SampleReader,
        batch_size: int | None,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        token_budget: int | None = None,
        table: SampleTable | None = None,
    ) -> None:
        self.reader = reader
        self.num_workers = num_workers
        settings = PlanSettings(batch_size, token_budget, world_size, shuffle=False, drop_last=world_size > 1)
        batches: Iterable[Sequence[int]]
        if settings.batch_size is None:
            plan = plan_epoch(table or reader.plain_table(), settings, epoch=0)
            batches = (plan.batch(step, rank).tolist() for step in range(len(plan)))
        else:
            indices = range(rank, len(reader) - len(reader) % world_size, world_size)
            size = settings.batch_size
            batches = (indices[start : start + size] for start in range(0, len(indices), size))
        self._plan = [[(0, index) for index in batch] for batch in batches]

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
