"""Small classes that stand for the real ones where only configuration and launching are tested."""

import dataclasses
import os
import signal
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from zimage_lit.errors import SharedError, UserError


@dataclasses.dataclass
class OptimiserSettings:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


class ToyEncoder:
    def __init__(self, folder: str, width: int = 4) -> None:
        if width > 1000:
            raise ValueError("width must not exceed 1000")
        self.folder, self.width = folder, width


class ToyModule(LightningModule):
    """Fits one weight; `trace` collects `step weight` lines, one per step, for comparisons between runs."""

    def __init__(
        self,
        encoder: ToyEncoder,
        backbone: str | OptimiserSettings = "tiny",
        optimiser: OptimiserSettings | None = None,
        kind: Literal["velocity", "noise"] = "velocity",
        names: list[str] | None = None,
        dropout: float = 0.1,
        compile_model: bool = False,
        trace: str | None = None,
        anything: Any = None,
    ) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.encoder, self.trace, self.dropout = encoder, trace, dropout
        self.optimiser = optimiser or OptimiserSettings()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.layer(batch) - 1).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trace and self.global_rank == 0:
            with open(self.trace, "a") as stream:
                stream.write(f"{self.global_step} {self.layer.weight.sum().item():.9f}\n")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.optimiser.lr, betas=self.optimiser.betas)


class ToyModuleAbove(ToyModule):
    """Takes the arguments of the class above through **kwargs."""

    def __init__(self, encoder: ToyEncoder, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(encoder, **kwargs)


class ToyDataModule(LightningDataModule):
    def __init__(self, folder: str = "data", batch_size: int = 4, num_workers: int = 0, size: int = 400) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.size = batch_size, num_workers, size

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        # every sample is the same, so that a resumed epoch sees what the uninterrupted one saw
        return torch.utils.data.DataLoader(
            torch.ones(self.size, 2),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )


class SignalAt(Callback):
    """Sends this process a signal in the midst of a step, as a scheduler or Ctrl-C would."""

    def __init__(self, step: int, number: int = int(signal.SIGTERM), rank: int = 0) -> None:
        self.step, self.number, self.rank = step, number, rank

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class FailAt(Callback):
    def __init__(self, step: int, friendly: bool = False, shared: bool = False) -> None:
        self.step, self.friendly, self.shared = step, friendly, shared

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            if self.shared:
                raise SharedError("all toys are broken: mend them")
            raise UserError("the toy is broken: mend it") if self.friendly else RuntimeError("a bug")


class Decay(Callback):
    def __init__(self, decay: float = 0.99, every: int = 1) -> None:
        self.decay, self.every = decay, every
