"""Prepared data sets of each kind, streamed into Lightning's Trainer with exact resume."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningDataModule

from data_modules.balancing import BalanceSettings
from data_modules.buckets import SizeMapping
from data_modules.cache import CacheSettings
from data_modules.manifest import Manifest, Verify, read_manifest, verify_files
from data_modules.planning import PlanSettings, SampleTable, check_stored_sides
from data_modules.remote import is_remote
from data_modules.samples import Batch, CaptionChooser, SampleReader
from data_modules.streaming import OrderedLoader, ResumableLoader
from zimage_lit.errors import UserError

CaptionWeights = dict[str, dict[str, float]]  # language -> kind -> weight


class TextToImageDataModule(LightningDataModule):
    """Text-to-image batches from a folder with manifest.json, train/ and perhaps val/ (litdata chunks).

    A batch is {"images": list of uint8 (3, H, W) tensors, "captions": list of str, "metadata": list of dict,
    "ids": list of int or str}; of an encoded data set see `samples.Batch`.
    The training loader keeps its position in Lightning's checkpoints: a run that is killed and resumed sees the samples
    that the uninterrupted run would have seen, in this and in later epochs, with any number of workers.

    Args:
        data_dir: the prepared folder, or its address (s3://, gs://, http://, https://).
        batch_size: samples per device and step; null where token_budget is given.
        num_workers: reading processes; 0 reads in the training process.
        seed: of the order of the samples and of the choice of captions.
        caption_weights: language -> kind -> weight, how often each kind of caption is used; None: all alike, but never
            `text`, which is what is written in a picture.
        shuffle: a new order every epoch; false keeps the stored order.
        drop_last: leave out the last samples of an epoch, which do not fill a batch on every device.
        verify: what `setup` compares with the manifest: the "size" of every file, or its "sha256" too.
        token_budget: packed tokens per device and step, in place of batch_size: long sequences make small batches.
        sizes: at which pictures are trained; None: as they are stored. Latents are of the sizes they were made with.
        concept_weights: concept -> how often an epoch has its samples, 1 for those not named.
        balance: draw each epoch so that the concepts of the samples' tags have the shares of a prior; None: do not.
        window: chunks that are mixed with each other at a time, for data behind an address; None: all.
        cache: where and how chunks behind an address are kept.

    Raises:
        UserError: at `setup`, for a missing, unfinished, truncated or (with "sha256") damaged folder, for data of
            another kind, and for weights and sizes that do not fit the data; in training, for a sample that cannot be
            read.
    """

    roles: tuple[str, ...] = ("image",)  # what pictures a sample must have
    pictures, sequences = 1, 1  # how its tokens are counted, see `planning.read_table`

    def __init__(
        self,
        data_dir: str,
        batch_size: int | None = 64,
        num_workers: int = 0,
        seed: int = 0,
        caption_weights: CaptionWeights | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        verify: Verify = "size",
        token_budget: int | None = None,
        sizes: SizeMapping | None = None,
        concept_weights: dict[str, float] | None = None,
        window: int | None = None,
        cache: CacheSettings | None = None,
        balance: BalanceSettings | None = None,
    ) -> None:
        super().__init__()
        PlanSettings(batch_size, token_budget, window=window)  # says what is wrong with them
        if balance and concept_weights:
            raise UserError(
                "data.init_args.balance and concept_weights both say how often samples come: leave one of them out; a "
                "concept's weight can be in balance.prior."
            )
        if num_workers < 0:
            raise UserError(f"data.init_args.num_workers is {num_workers}: set it to 0 or more.")
        self.data_dir: Path | str = data_dir if is_remote(data_dir) else Path(data_dir)
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.num_workers = num_workers
        self.seed = seed
        self.caption_weights = caption_weights
        self.concept_weights = concept_weights
        self.balance = balance
        self.sizes = sizes
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.window = window
        self.verify: Verify = verify
        self.cache = cache
        self._manifest: Manifest | None = None

    def setup(self, stage: str | None = None) -> None:
        """Check the data set and the settings against it. Called on every device, once for each stage."""
        if self._manifest is None:
            manifest = read_manifest(self.data_dir)
            verify_files(self.data_dir, manifest, self.verify)
            self._check_kind(manifest)
            check_caption_weights(self.caption_weights, manifest.captions)
            self._check_every_sample_has_a_caption(manifest)
            if self.roles and self.sizes is None and not self._has_latents(manifest):
                for split in manifest.splits:
                    samples = self._reader(split).samples
                    key = "data.init_args.sizes.resolution"
                    check_stored_sides(samples.folder, len(samples), samples.location, key)
            self._manifest = manifest

    def train_dataloader(self) -> ResumableLoader:
        rank, world_size = self._rank_and_world_size()
        reader = self._reader("train")
        self._check_window(reader)
        return ResumableLoader(
            reader,
            self.fingerprint,
            self.batch_size,
            self.seed,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world_size,
            token_budget=self.token_budget,
            window=self.window,
            table=self._table(reader, self.concept_weights, self.balance),
        )

    def val_dataloader(self) -> OrderedLoader | list[Any]:
        """The split `val` in its stored order, the same captions every time; nothing where there is no such split."""
        if "val" not in self.manifest.splits:
            return []
        rank, world_size = self._rank_and_world_size()
        reader = self._reader("val")
        table = self._table(reader)  # all of it, whatever is drawn how often in training
        return OrderedLoader(reader, self.batch_size, self.num_workers, rank, world_size, self.token_budget, table)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Only tensors move; Lightning's own search for them would walk through every word of the metadata."""
        moved = {
            name: [item.to(device, non_blocking=True) if isinstance(item, torch.Tensor) else item for item in items]
            for name, items in cast(dict[str, list[Any]], batch).items()
        }
        return cast(Batch, moved)

    @property
    def manifest(self) -> Manifest:
        return self._manifest or read_manifest(self.data_dir)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all stored samples: two runs with the same fingerprint trained on the same data."""
        return self.manifest.fingerprint

    @property
    def encoded_by(self) -> dict[str, str]:
        """ "codec", "text_encoder" -> fingerprint of the component whose results the data set holds, if any."""
        return dict(self.manifest.settings.get("encoded_by", {}))

    def dataset_info(self) -> dict[str, Any]:
        """What tracking records of the data: name, fingerprint, num_samples (of the split train) and path."""
        manifest = self.manifest
        path = self.data_dir.absolute() if isinstance(self.data_dir, Path) else self.data_dir
        return {
            "name": manifest.name,
            "fingerprint": manifest.fingerprint,
            "num_samples": manifest.splits["train"],
            "path": str(path),
        }

    def _has_latents(self, manifest: Manifest) -> bool:
        return "codec" in manifest.settings.get("encoded_by", {})

    def _reader(self, split: str) -> SampleReader:
        folder = self.data_dir / split if isinstance(self.data_dir, Path) else f"{self.data_dir.rstrip('/')}/{split}"
        choose_caption = CaptionChooser(self.caption_weights, self.seed)
        sizes = None if self._has_latents(self.manifest) else self.sizes  # latents have their sizes already
        return SampleReader(folder, choose_caption, sizes, self.cache)

    def _table(
        self,
        reader: SampleReader,
        concept_weights: dict[str, float] | None = None,
        balance: BalanceSettings | None = None,
    ) -> SampleTable | None:
        """What planning must know: nothing where batches are plain slices of the order."""
        if self.token_budget is None and self.sizes is None and not concept_weights and not balance:
            return None
        return reader.table(
            concepts=self.manifest.settings.get("concepts", ()),
            concept_weights=concept_weights,
            balance=balance,
            pictures=self.pictures,
            sequences=self.sequences,
        )

    def _check_kind(self, manifest: Manifest) -> None:
        """UserError where the samples have other pictures than this module gives out, or cannot be resized."""
        roles = tuple(manifest.settings.get("roles", ["image"]))
        if set(roles) != set(self.roles):
            raise UserError(
                f"{self.data_dir} has samples with {' and '.join(roles) or 'no picture'}, and {type(self).__name__} "
                f"needs {' and '.join(self.roles) or 'none'}: set data.class_path to {MODULES[frozenset(roles)]}."
            )
        encoded_at = manifest.settings.get("sizes")
        same_sizes = self.sizes is None or (encoded_at and SizeMapping(**encoded_at) == self.sizes)
        if self._has_latents(manifest) and not same_sizes:
            raise UserError(
                f"{self.data_dir} has latents of pictures of fixed sizes: leave out data.init_args.sizes, or use the "
                "data set that they were made from."
            )

    def _check_every_sample_has_a_caption(self, manifest: Manifest) -> None:
        """UserError where training would come upon a sample none of whose captions may be used."""
        weight = CaptionChooser(self.caption_weights, self.seed).weight
        for captions, count in manifest.settings.get("caption_sets", {}).items():
            names = json.loads(captions)
            if not any(weight(language, kind) > 0 for language, kind in names):
                found = ", ".join(".".join(name) for name in names)
                raise UserError(
                    f"{count} of the samples in {self.data_dir} have no captions but {found}, and "
                    "data.init_args.caption_weights gives none of them a weight above 0: add one of them."
                )

    def _check_window(self, reader: SampleReader) -> None:
        """UserError where shuffling reaches over more chunks than the cache holds: most would be fetched many times."""
        room, needed = reader.samples.chunks_at_once, len(reader.samples.chunk_ends)
        if self.window is not None:
            needed = min(needed, self.window + 1)
        if self.shuffle and room < needed:
            raise UserError(
                f"data.init_args.cache.max_bytes has room for {room} chunks and shuffling needs {needed} at once: set "
                f"data.init_args.window to {max(room // 2, 1)}, or raise cache.max_bytes."
            )

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class EditingDataModule(TextToImageDataModule):
    """Editing batches: `sources`, the `images` that they are to become, and as `captions` what is to be done.

    Which captions stand for that, the kind `instruction`, the kind `difference` (what differs between the two) or the
    target's own, is `caption_weights`' to say. Mix with text-to-image data by `MixtureDataModule`, four to one as
    published. The pictures of a sample may differ in size; the token budget counts both as large as the target.

    Args and errors: see TextToImageDataModule.
    """

    roles = ("image", "source")
    pictures = 2


class PreferenceDataModule(TextToImageDataModule):
    """Preference batches: `winners` and `losers`, the pictures of a pair at the same place, and their `captions`.

    A pair is one sample, so its two pictures are always in the same batch. The token budget counts both.

    Args and errors: see TextToImageDataModule.
    """

    roles = ("winner", "loser")
    sequences = 2


class PromptDataModule(TextToImageDataModule):
    """Batches of prompts alone, for stages that draw their own pictures: `captions`, `metadata` and `ids`.

    Args:
        batch_size: prompts per device and step, each once; a stage says how many pictures it draws of each.

    Other args and errors: see TextToImageDataModule.
    """

    roles = ()

    def __init__(
        self,
        data_dir: str,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        caption_weights: CaptionWeights | None = None,
        concept_weights: dict[str, float] | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        verify: Verify = "size",
        cache: CacheSettings | None = None,
    ) -> None:
        super().__init__(
            data_dir,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            caption_weights=caption_weights,
            concept_weights=concept_weights,
            shuffle=shuffle,
            drop_last=drop_last,
            verify=verify,
            cache=cache,
        )


MODULES = {
    frozenset(module.roles): f"data_modules.{module.__name__}"
    for module in (TextToImageDataModule, EditingDataModule, PreferenceDataModule, PromptDataModule)
}


def check_caption_weights(
    weights: Mapping[str, Mapping[str, float]] | None, available: Mapping[str, list[str]]
) -> None:
    """UserError for caption weights that are negative or all zero, or that ask for languages or kinds that there are
    not; a weight of 0 asks for nothing, so an experiment can switch off what its defaults name."""
    if weights is None:
        return
    key = "data.init_args.caption_weights"
    for language, kinds in weights.items():
        if language not in available and any(kinds.values()):
            raise UserError(f"{key} names the language {language!r}: the data have {', '.join(available)}.")
        for kind, weight in kinds.items():
            if weight and kind not in available[language]:
                raise UserError(
                    f"{key}.{language} names the kind {kind!r}: the data have {', '.join(available[language])}."
                )
            if not 0 <= weight < float("inf"):
                raise UserError(f"{key}.{language}.{kind} is {weight}: a weight is a number from 0 up.")
    if not any(weight > 0 for kinds in weights.values() for weight in kinds.values()):
        raise UserError(f"{key} gives no caption a weight above 0: give one to any of {dict(available)}.")
