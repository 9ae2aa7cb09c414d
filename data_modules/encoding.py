"""`lightning run encode`: a prepared data set whose latents and caption features are worked out once, not every epoch.

The result is a data set of its own, with the same samples in the same order: latents in place of the pictures,
features beside the captions, both bfloat16. Which codec and text encoder made them stands in the manifest, and training
with others is refused.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_modules.assembly import assemble_split
from data_modules.balancing import TAGS
from data_modules.buckets import PATCH_PIXELS, SizeMapping
from data_modules.chunks import ChunkedSamples
from data_modules.folder_lock import GO_ON, PARTS, begin_or_go_on, clean_up, is_prepared, sole_preparation
from data_modules.images import training_picture
from data_modules.manifest import Manifest, read_manifest, sha256, verify_files, write_manifest
from data_modules.part_writer import SplitWriter
from data_modules.planning import PLANNING, PLANNING_COLUMNS, check_stored_sides
from data_modules.samples import ROLES, caption_order
from zimage_lit.components import LatentCodec, TextEncoder
from zimage_lit.config import settings_from
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.files import read_json, write_atomically

FOLDER_KEY = "output"
PART = "part.json"


@dataclass(frozen=True)
class EncodeSettings:
    """Settings of `lightning run encode`."""

    data: str  # folder of a prepared data set, or its address
    output: str  # folder for the data set with latents and features
    codec: str | None = None  # the latent codec's folder, or a pipeline's; null leaves the pictures as they are
    text_encoder: str | None = None  # the text encoder's folder, or a pipeline's; null leaves the captions alone
    sizes: dict[str, Any] | None = None  # at which pictures are encoded: sizes.resolution=1024 …; null: as stored
    batch_size: int = 8  # pictures of one size, and on a GPU captions of one length, that are encoded together
    chunk_mib: int = 64  # MiB, size of the stored files
    device: str | None = None  # cpu, cuda …; null: a GPU where there is one


def encode_task(settings: dict[str, Any]) -> None:
    """`lightning run encode`."""
    encode(settings_from(EncodeSettings, settings))


def encode(asked: EncodeSettings) -> Manifest:
    """Make the data set with latents and features; returns at once where the same was made before.

    A run that was killed goes on with the chunks that are missing.

    Raises:
        UserError: wrong settings, a data set that cannot be read, is damaged or has no pictures to encode, a component
            that is missing or damaged, an output folder with something else in it.
    """
    from zimage_lit.components import Qwen3TextEncoder  # transformers takes seconds to import
    from zimage_lit.pipeline import codec_from, usable_device

    at_least_one("batch_size", asked.batch_size)
    at_least_one("chunk_mib", asked.chunk_mib)
    if asked.codec is None and asked.text_encoder is None:
        raise UserError("encode has nothing to do: name a codec=FOLDER, a text_encoder=FOLDER, or both.")
    if asked.sizes is not None and asked.codec is None:
        raise UserError("sizes are those of the pictures that a codec encodes: name a codec=FOLDER, or leave them out.")
    sizes = None if asked.sizes is None else settings_from(SizeMapping, asked.sizes, section="sizes")
    device = usable_device(asked.device)
    codec = codec_from(asked.codec).to(device) if asked.codec else None
    text_encoder = None
    if asked.text_encoder:
        together = 1 if str(device) == "cpu" else asked.batch_size  # one by one, features repeat bit for bit
        text_encoder = Qwen3TextEncoder(
            asked.text_encoder, on_long_prompt="truncate", batch_size=together, cache_mib=0
        ).to(device)
    source = read_manifest(asked.data)
    if source.settings.get("encoded_by"):
        raise UserError(f"{asked.data} has latents or features already: give the data set that it was made from.")
    if codec is not None and not source.settings.get("roles", ["image"]):
        raise UserError(f"{asked.data} has no pictures, only prompts: leave out codec.")
    encoder = _Encoder(codec, text_encoder, sizes, asked.batch_size)
    parts = {"codec": codec, "text_encoder": text_encoder}
    settings = {
        **source.settings,
        "encoded_by": {name: part.fingerprint() for name, part in parts.items() if part is not None},
        "made_from": source.fingerprint,
        "sizes": sizes and sizes.settings,
        "chunk_mib": asked.chunk_mib,
    }
    output = Path(asked.output)
    if not is_prepared(output, settings, FOLDER_KEY):
        with sole_preparation(output, FOLDER_KEY):
            if not is_prepared(output, settings, FOLDER_KEY):
                try:
                    return _make(asked.data, source, output, settings, encoder)
                except OSError as error:
                    raise UserError(f"Encoding into {output} stopped ({error}): mend that; {GO_ON}.") from error
    clean_up(output, output / PARTS)
    Console().print(f"{output} is made already", highlight=False, soft_wrap=True)
    return read_manifest(output)


class _Encoder:
    """Stored samples in, samples with latents and features out."""

    def __init__(
        self, codec: LatentCodec | None, text_encoder: TextEncoder | None, sizes: SizeMapping | None, batch_size: int
    ) -> None:
        self.codec, self.text_encoder, self.sizes, self.batch_size = codec, text_encoder, sizes, batch_size

    def __call__(self, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        latents = self._latents(samples) if self.codec else [{} for _ in samples]
        features = self._features(samples) if self.text_encoder else [{} for _ in samples]
        for stored, encoded, described in zip(samples, latents, features, strict=True):
            replaced = {name.removesuffix("_latents") for name in encoded}
            kept = {name: value for name, value in stored.items() if name not in replaced}
            yield {**encoded, **described, **kept}

    def _latents(self, samples: list[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
        """The latents of each sample's pictures by role; pictures of one size are encoded together."""
        assert self.codec is not None
        wanted = [(number, role) for number, stored in enumerate(samples) for role in ROLES if role in stored]
        pictures = [self._picture(samples[number], role) for number, role in wanted]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, picture in enumerate(pictures):
            groups[picture.shape].append(place)
        found: list[dict[str, np.ndarray]] = [{} for _ in samples]
        for members in groups.values():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                pixels = torch.from_numpy(np.stack([pictures[place] for place in batch])).permute(0, 3, 1, 2)
                for place, latent in zip(batch, self.codec.encode(pixels.float() / 127.5 - 1), strict=True):
                    number, role = wanted[place]
                    found[number][f"{role}_latents"] = _stored(latent)
        return found

    def _picture(self, stored: Mapping[str, Any], role: str) -> np.ndarray:
        picture = training_picture(stored[role].tobytes(), self.sizes)
        if any(side % PATCH_PIXELS for side in picture.shape[:2]):
            raise UserError(
                f"A picture of sample {stored['id']} is {picture.shape[1]}x{picture.shape[0]}, and sides must be "
                f"multiples of {PATCH_PIXELS} pixels: set sizes.resolution, for example to 1024."
            )
        return picture

    def _features(self, samples: list[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
        """The features of each sample's captions, one after the other in `caption_order`, and how long each is."""
        assert self.text_encoder is not None
        texts = []
        for stored in samples:
            captions = json.loads(stored["captions"])
            texts.append([captions[language][kind] for language, kind in caption_order(captions)])
        features = iter(self.text_encoder.encode([text for own in texts for text in own]))
        found = []
        for own in texts:
            encoded = list(islice(features, len(own)))
            lengths = np.array([len(one) for one in encoded], dtype=np.int32)
            found.append({"caption_features": _stored(torch.cat(encoded)), "feature_lengths": lengths})
        return found


def _stored(tensor: torch.Tensor) -> np.ndarray:
    """bfloat16 as numpy can hold it: its bits."""
    return tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()


def _make(data: str, source: Manifest, output: Path, settings: dict[str, Any], encoder: _Encoder) -> Manifest:
    verify_files(data, source, "size")
    readers = {split: ChunkedSamples(f"{data.rstrip('/')}/{split}") for split in source.splits}
    if encoder.codec is not None and encoder.sizes is None:
        for reader in readers.values():
            check_stored_sides(reader.folder, len(reader), reader.location, "sizes.resolution")
    begin_or_go_on(output / PARTS, settings, FOLDER_KEY)
    work = [(split, number) for split, reader in readers.items() for number in range(len(reader.chunk_ends))]
    bar_columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("samples")
    with Progress(*bar_columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task(f"Encoding {source.name}", total=sum(source.splits.values()))
        for split, number in work:
            folder = output / PARTS / f"{split}-{number:05d}"
            if not folder.is_dir():
                _check_chunk(readers[split], number, source)
                _encode_chunk(readers[split], number, folder, encoder, settings["chunk_mib"] * 2**20)
            progress.advance(bar, len(_indices(readers[split], number)))
    hashes: dict[str, str] = {}
    for split, reader in readers.items():
        folders = [output / PARTS / f"{name}-{number:05d}" for name, number in work if name == split]
        summaries = [read_json(folder / PART) for folder in folders]
        columns = _planning_columns(reader, np.concatenate([summary["rows"] for summary in summaries]))
        chunks = [(folder, summary["chunks"]) for folder, summary in zip(folders, summaries, strict=True)]
        tags = reader.folder / TAGS
        known = tags.read_bytes() if tags.is_file() else None
        hashes |= assemble_split(output / split, chunks, summaries[0]["config"], columns, known)
    manifest = write_manifest(output, source.name, source.splits, source.captions, settings, hashes)
    shutil.rmtree(output / PARTS)
    return manifest


def _indices(samples: ChunkedSamples, number: int) -> range:
    """The samples of a chunk."""
    return range(samples.chunk_ends[number - 1] if number else 0, samples.chunk_ends[number])


def _check_chunk(samples: ChunkedSamples, number: int, source: Manifest) -> None:
    """UserError where a chunk is damaged, which nobody could see any more in what is made of it."""
    if samples.is_remote:  # checked when it arrives
        return
    path = Path(samples.place_of(_indices(samples, number).start))
    if sha256(path) != source.files[f"{path.parent.name}/{path.name}"]["sha256"]:
        raise UserError(f"{path} is damaged (its SHA-256 differs from the manifest): copy it again; {GO_ON}.")


def _encode_chunk(samples: ChunkedSamples, number: int, folder: Path, encoder: _Encoder, chunk_bytes: int) -> None:
    """One chunk of the source, encoded; its folder appears in one step."""
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    writer = SplitWriter(unfinished, chunk_bytes)
    indices = _indices(samples, number)
    step = 16 * encoder.batch_size  # samples that are in memory at a time
    for start in range(indices.start, indices.stop, step):
        for sample in encoder([samples[index] for index in range(start, min(start + step, indices.stop))]):
            tokens = int(max(sample.get("feature_lengths", [0])))
            writer.add(sample, [*_training_size(sample, encoder.codec), tokens])
    chunks = writer.close()
    write_atomically(unfinished / PART, json.dumps({"chunks": chunks, "config": writer.config, "rows": writer.rows}))
    unfinished.rename(folder)


def _training_size(sample: Mapping[str, Any], codec: LatentCodec | None) -> list[int]:
    """(width, height) in pixels of the first picture that is encoded, (0, 0) where none is."""
    found = next((sample[name] for name in (f"{role}_latents" for role in ROLES) if name in sample), None)
    return [0, 0] if codec is None or found is None else [side * codec.downsample for side in found.shape[:0:-1]]


def _planning_columns(source: ChunkedSamples, rows: np.ndarray) -> np.ndarray:
    """(N, 4) for planning: what is known now, (N, 3), and of the rest what the source knows."""
    columns = np.zeros((len(rows), 4), dtype=np.int64)
    columns[:, 3] = -1
    path = source.folder / PLANNING
    if path.is_file():
        with np.load(path) as known:
            columns = np.stack([known[name] for name in PLANNING_COLUMNS], axis=1).astype(np.int64)
    for column in range(3):
        columns[:, column] = np.where(rows[:, column] > 0, rows[:, column], columns[:, column])
    return columns
