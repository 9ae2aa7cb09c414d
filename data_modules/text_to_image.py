"""Pictures with captions, streamed from a prepared folder into Lightning's Trainer, with exact resume."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule

from data_modules.manifest import Manifest, Verify, read_manifest, verify_files
from data_modules.streaming import Batch, CaptionChooser, OrderedLoader, ResumableLoader, SampleReader
from zimage_lit.errors import UserError

CaptionWeights = dict[str, dict[str, float]]  # language -> kind -> weight


class TextToImageDataModule(LightningDataModule):
    """Text-to-image batches from a folder with manifest.json, train/ and perhaps val/ (litdata chunks).

    A batch is {"images": list of uint8 (3, H, W) tensors, "captions": list of str, "metadata": list of dict,
    "ids": list of int or str}.
    The training loader keeps its position in Lightning's checkpoints: a run that is killed and resumed sees the samples
    that the uninterrupted run would have seen, in this and in later epochs, with any number of workers.

    Args:
        data_dir: the prepared folder.
        batch_size: samples per device and step.
        num_workers: reading processes; 0 reads in the training process.
        seed: of the order of the samples and of the choice of captions.
        caption_weights: language -> kind -> weight, how often each kind of caption is used; None: all alike.
        shuffle: a new order every epoch; false keeps the stored order.
        drop_last: leave out the last, smaller batch of an epoch (required on several devices).
        verify: what `setup` compares with the manifest: the "size" of every file, or its "sha256" too.

    Raises:
        UserError: at `setup`, for a missing, unfinished, truncated or (with "sha256") damaged folder and for caption
            weights that name what the data do not have; in training, for a sample that cannot be read.
    """

    def __init__(
        self,
        data_dir: str,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        caption_weights: CaptionWeights | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        verify: Verify = "size",
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.init_args.batch_size is {batch_size}: set it to 1 or more.")
        if num_workers < 0:
            raise UserError(f"data.init_args.num_workers is {num_workers}: set it to 0 or more.")
        self.data_dir = Path(data_dir)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.caption_weights = caption_weights
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.verify: Verify = verify
        self._manifest: Manifest | None = None

    def setup(self, stage: str | None = None) -> None:
        """Check the folder and the caption weights. Called on every device, once for each stage."""
        if self._manifest is None:
            manifest = read_manifest(self.data_dir)
            verify_files(self.data_dir, manifest, self.verify)
            check_caption_weights(self.caption_weights, manifest.captions)
            self._manifest = manifest

    def train_dataloader(self) -> ResumableLoader:
        rank, world_size = self._rank_and_world_size()
        return ResumableLoader(
            self._reader("train"),
            self.fingerprint,
            self.batch_size,
            self.seed,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world_size,
        )

    def val_dataloader(self) -> OrderedLoader | list[Any]:
        """The split `val` in its stored order, the same captions every time; nothing where there is no such split."""
        if "val" not in self.manifest.splits:
            return []
        rank, world_size = self._rank_and_world_size()
        return OrderedLoader(self._reader("val"), self.batch_size, self.num_workers, rank, world_size)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Only the images move; Lightning's own search for tensors would walk through every word of the metadata."""
        return {**batch, "images": [image.to(device, non_blocking=True) for image in batch["images"]]}

    @property
    def manifest(self) -> Manifest:
        return self._manifest or read_manifest(self.data_dir)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all stored samples: two runs with the same fingerprint trained on the same data."""
        return self.manifest.fingerprint

    def dataset_info(self) -> dict[str, Any]:
        """What tracking records of the data: name, fingerprint, num_samples (of the split train) and path."""
        manifest = self.manifest
        return {
            "name": manifest.name,
            "fingerprint": manifest.fingerprint,
            "num_samples": manifest.splits["train"],
            "path": str(self.data_dir.absolute()),
        }

    def _reader(self, split: str) -> SampleReader:
        return SampleReader(self.data_dir / split, CaptionChooser(self.caption_weights, self.seed))

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def check_caption_weights(
    weights: Mapping[str, Mapping[str, float]] | None, available: Mapping[str, list[str]]
) -> None:
    """UserError for caption weights that name unknown languages or kinds, are negative, or are all zero."""
    if weights is None:
        return
    key = "data.init_args.caption_weights"
    for language, kinds in weights.items():
        if language not in available:
            raise UserError(f"{key} names the language {language!r}: the data have {', '.join(available)}.")
        for kind, weight in kinds.items():
            if kind not in available[language]:
                raise UserError(
                    f"{key}.{language} names the kind {kind!r}: the data have {', '.join(available[language])}."
                )
            if not 0 <= weight < float("inf"):
                raise UserError(f"{key}.{language}.{kind} is {weight}: a weight is a number from 0 up.")
    if not any(weight > 0 for kinds in weights.values() for weight in kinds.values()):
        raise UserError(f"{key} gives no caption a weight above 0: give one to any of {dict(available)}.")
