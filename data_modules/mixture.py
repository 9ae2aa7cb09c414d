"""Several data sets as one, each with its share of the steps."""

import hashlib
from typing import Any

import torch
from lightning import LightningDataModule

from data_modules.samples import Batch
from data_modules.streaming import MixtureLoader, OrderedLoader
from data_modules.text_to_image import TextToImageDataModule
from zimage_lit.errors import UserError


class MixtureDataModule(LightningDataModule):
    """Steps from several data sets in turn, in exact proportion to their weights over any stretch of the training.

    A step's batch is of one data set, on all devices of the same one. Each data set keeps its own settings (batch size
    or token budget, caption weights) and goes through its own epochs. The proportion is one of steps: where batches
    differ in size, so does that of samples.

    Args:
        data: name -> a data module of this package, by class_path and init_args; its `num_workers` does not count.
        weights: name -> weight above 0. Text-to-image to editing as published: 4 to 1.
        num_workers: reading processes, shared by all data sets; 0 reads in the training process.
        steps_per_epoch: steps until the trainer counts an epoch; None: as many as the data sets have together.

    Raises:
        UserError: other names in `weights` than in `data`; see also TextToImageDataModule.
    """

    def __init__(
        self,
        data: dict[str, TextToImageDataModule],
        weights: dict[str, float],
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if not data:
            raise UserError("data.init_args.data names no data set: name at least one.")
        if num_workers < 0:
            raise UserError(f"data.init_args.num_workers is {num_workers}: set it to 0 or more.")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise UserError(
                f"data.init_args.steps_per_epoch is {steps_per_epoch}: set it to 1 or more, or leave it out."
            )
        self.data = data
        self.weights = weights
        self.num_workers = num_workers
        self.steps_per_epoch = steps_per_epoch

    def prepare_data(self) -> None:
        for module in self.data.values():
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        for module in self.data.values():
            module.trainer = self.trainer
            module.setup(stage or "fit")

    def train_dataloader(self) -> MixtureLoader:
        loaders = {name: module.train_dataloader() for name, module in self.data.items()}
        return MixtureLoader(loaders, self.weights, self.num_workers, self.steps_per_epoch)

    def val_dataloader(self) -> list[OrderedLoader]:
        """One loader for each data set that has a validation split."""
        loaders = (module.val_dataloader() for module in self.data.values())
        return [loader for loader in loaders if isinstance(loader, OrderedLoader)]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        module = next(iter(self.data.values()))
        return module.transfer_batch_to_device(batch, device, dataloader_idx)

    @property
    def encoded_by(self) -> dict[str, str]:
        """ "codec", "text_encoder" -> fingerprint of the component whose results the data sets hold.

        Raises UserError where two data sets were made with different ones.
        """
        together: dict[str, str] = {}
        for name, module in self.data.items():
            for part, fingerprint in module.encoded_by.items():
                if together.setdefault(part, fingerprint) != fingerprint:
                    raise UserError(f"data.init_args.data.{name} was encoded by another {part} than those before it.")
        return together

    def dataset_info(self) -> dict[str, Any]:
        """What tracking records: the data sets' names and paths joined, and a fingerprint over all of theirs."""
        infos = {name: module.dataset_info() for name, module in sorted(self.data.items())}
        lines = [f"{name} {self.weights.get(name)} {info['fingerprint']}" for name, info in infos.items()]
        return {
            "name": "+".join(info["name"] for info in infos.values()),
            "fingerprint": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            "num_samples": sum(info["num_samples"] for info in infos.values()),
            "path": ", ".join(info["path"] for info in infos.values()),
        }
