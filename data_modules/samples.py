"""One sample: how it is stored in litdata's chunks, and how it comes out of them into a batch."""

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

from data_modules.buckets import SizeMapping
from data_modules.cache import CacheSettings
from data_modules.chunks import ChunkedSamples
from data_modules.images import training_picture
from data_modules.planning import SampleTable, read_table
from zimage_lit.errors import UserError

Captions = dict[str, dict[str, str]]  # language -> kind -> text
Key = tuple[int, int]  # (epoch, index of the sample in its split)
WRITTEN = "text"  # the kind of a caption that is not one: what is written in the picture
ROLES = ("image", "source", "winner", "loser")  # what a picture may be to its sample


class Batch(TypedDict, total=False):
    """What a training step gets. Pictures are uint8 (3, H, W) RGB tensors, each of its own size; of encoded
    data sets they are left out, and `image_latents` and so on hold float32 (C, h, w) in their place."""

    images: list[torch.Tensor]  # text-to-image; editing: what the source is to become
    sources: list[torch.Tensor]  # editing
    winners: list[torch.Tensor]  # preference
    losers: list[torch.Tensor]
    captions: list[str]
    caption_features: list[torch.Tensor]  # float32 (L, D), only of encoded data sets
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


def caption_order(captions: Captions) -> list[tuple[str, str]]:
    """(language, kind) of a sample's captions in the one order in which they are drawn and their features stored."""
    return [(language, kind) for language in sorted(captions) for kind in sorted(captions[language])]


class CaptionChooser:
    """Chooses which caption of a sample is used: a pure function of (seed, epoch, sample index).

    weights: language -> kind -> weight; kinds that a sample lacks do not count. None: all alike, but never `text`: what
    is written in a picture does not describe it.
    """

    def __init__(self, weights: Mapping[str, Mapping[str, float]] | None, seed: int) -> None:
        self.weights = weights
        self.seed = seed

    def __call__(self, captions: Captions, epoch: int, index: int) -> tuple[str, str]:
        """(language, kind) of the caption that the sample has in this epoch."""
        options = [((language, kind), self.weight(language, kind)) for language, kind in caption_order(captions)]
        total = sum(weight for _, weight in options)
        if not total > 0:
            found = ", ".join(f"{language}.{kind}" for language, kinds in captions.items() for kind in kinds)
            raise UserError(
                f"has captions of the kinds {found or 'none at all'}, and data.init_args.caption_weights gives none "
                "of them a weight above 0: add one of them."
            )
        uniform = random.Random(f"caption/{self.seed}/{epoch}/{index}").random() * total
        for name, weight in options:
            uniform -= weight
            if uniform < 0:
                return name
        return next(name for name, weight in reversed(options) if weight > 0)  # rounding in the sum of the weights

    def weight(self, language: str, kind: str) -> float:
        """How often a caption is used, beside the sample's others."""
        if self.weights is None:
            return float(kind != WRITTEN)
        return self.weights.get(language, {}).get(kind, 0.0)


class SampleReader(Dataset[dict[str, Any]]):
    """One split of a prepared data set, read at random. Chunks are opened at first use, in the worker that reads.

    folder: of the split, a path or an address (see `ChunkedSamples`).   sizes: at which pictures are given; None: as
    they are stored.   cache: of chunks behind an address.
    Reading a damaged sample gives {"error": one sentence} instead of raising: an exception crosses from a worker with
    its traceback glued to its message, a value as it is.
    """

    def __init__(
        self,
        folder: Path | str,
        choose_caption: CaptionChooser,
        sizes: SizeMapping | None = None,
        cache: CacheSettings | None = None,
    ) -> None:
        self.folder = folder
        self.choose_caption = choose_caption
        self.sizes = sizes
        self.samples = ChunkedSamples(folder, cache)

    def __len__(self) -> int:
        return len(self.samples)

    def plain_table(self) -> SampleTable:
        """The chunks alone, as if all samples were alike."""
        sizes = np.diff(self.samples.chunk_ends, prepend=0)
        return SampleTable(len(self), chunk=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))

    def table(self, **options: Any) -> SampleTable:
        """What planning knows of these samples at this reader's sizes; for the options see `read_table`."""
        sizes = np.diff(self.samples.chunk_ends, prepend=0).tolist()
        return read_table(self.samples.folder, sizes, self.sizes, **options)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """A batch at once: read in the order of the chunks, so that each is opened once, given in the order asked."""
        read: dict[Key, dict[str, Any]] = {}
        for key in sorted(keys, key=lambda key: key[1]):
            read[key] = self._read(*key)
            if "error" in read[key]:
                return [read[key] for _ in keys]  # each further sample might wait for the same dead server
        self.samples.release()
        return [read[key] for key in keys]

    def _read(self, epoch: int, index: int) -> dict[str, Any]:
        name: Any = f"number {index}"
        try:
            self.samples.fetch(index)
        except UserError as error:
            return {"error": str(error)}
        try:
            stored = self.samples[index]
            name = stored["id"]
            captions = json.loads(stored["captions"])
            language, kind = self.choose_caption(captions, epoch, index)
            return {
                "arrays": self._arrays(stored, caption_order(captions).index((language, kind))),
                "caption": captions[language][kind],
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

    def _arrays(self, stored: Mapping[str, Any], caption: int) -> dict[str, np.ndarray]:
        """The arrays of a sample by their names in a batch; `caption`: the chosen one's place among the captions."""
        arrays = {f"{role}s": training_picture(stored[role].tobytes(), self.sizes) for role in ROLES if role in stored}
        arrays |= {name: stored[name] for name in (f"{role}_latents" for role in ROLES) if name in stored}
        if "caption_features" in stored:
            end = int(stored["feature_lengths"][: caption + 1].sum())
            start = end - int(stored["feature_lengths"][caption])
            arrays["caption_features"] = stored["caption_features"][start:end]
        return arrays


def read_batches(reader: Dataset[dict[str, Any]], plan: Iterable[list[Any]], num_workers: int) -> Iterator[Batch]:
    """The batches of a plan, in its order. UserError names a sample that cannot be read."""
    loader: Iterable[dict[str, Any]] = DataLoader(
        reader,
        batch_sampler=plan,
        num_workers=num_workers,
        collate_fn=_pack,
    )
    return map(_unpack, loader)


def _pack(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch as it leaves a worker: one tensor for all pixels, so one piece of shared memory, not one a picture."""
    errors = [sample["error"] for sample in samples if "error" in sample]
    if errors:
        return {"error": errors[0]}
    joined = {}
    for name in samples[0]["arrays"]:
        arrays = [sample["arrays"][name] for sample in samples]
        joined[name] = (
            torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays])),
            [array.shape for array in arrays],
        )
    return {
        "joined": joined,
        "captions": [sample["caption"] for sample in samples],
        "metadata": [sample["metadata"] for sample in samples],
        "ids": [sample["id"] for sample in samples],
    }


def _unpack(packed: Mapping[str, Any]) -> Batch:
    if "error" in packed:
        raise UserError(packed["error"])
    batch: dict[str, Any] = {}
    for name, (numbers, shapes) in packed["joined"].items():
        pieces = numbers.split([int(np.prod(shape)) for shape in shapes])
        arrays = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        if name.endswith("s") and name[:-1] in ROLES:
            batch[name] = [array.permute(2, 0, 1) for array in arrays]
        else:
            batch[name] = [array.view(torch.bfloat16).float() for array in arrays]
    batch |= {name: packed[name] for name in ("captions", "metadata", "ids")}
    return batch  # type: ignore[return-value]  # a TypedDict cannot be filled by computed names
