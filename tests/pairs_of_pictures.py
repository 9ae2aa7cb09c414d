"""Preference training at toy size, for the tests of its stage: in one process and on several ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from distillation import SIZES, Codec, Encoder, whole
from ranks import Steps
from torch import Tensor

from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.callbacks.ema import EMA
from zimage_lit.rng import generator
from zimage_lit.stages import DPOModule
from zimage_lit.stages.dpo import PreferenceSettings
from zimage_lit.stages.optimizers import OptimizerSettings


def pairs_of(ids: range) -> dict[str, Any]:
    """Numbered pairs of two sizes; of the first of every two, difficulty and margin are in the middle."""
    sources = [torch.Generator().manual_seed(number) for number in ids]
    known = [{"difficulty": 0.3, "margin": 0.4} if i % 2 == 0 else {"difficulty": 0.8, "margin": 0.9} for i in ids]
    shapes = [(16, 4, 4 + 2 * (i % 2)) for i in ids]
    return {
        "ids": list(ids),
        "winner_latents": [torch.randn(shape, generator=s) for shape, s in zip(shapes, sources, strict=True)],
        "loser_latents": [torch.randn(shape, generator=s) for shape, s in zip(shapes, sources, strict=True)],
        "caption_features": [torch.randn(3 + i % 3, 12, generator=s) for i, s in zip(ids, sources, strict=True)],
        "captions": [f"number {i}" for i in ids],
        "metadata": [{"number": i, "pair": pair} for i, pair in zip(ids, known, strict=True)],
    }


class Data(lightning.LightningDataModule):
    def __init__(self, pairs_of: Callable[[range], dict[str, Any]] = pairs_of, held_out: Sequence[Any] = ()) -> None:
        super().__init__()
        self.pairs_of, self.held_out = pairs_of, list(held_out)

    def train_dataloader(self) -> Steps:
        return Steps(self.trainer.global_rank, self.trainer.world_size, self.pairs_of)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.held_out, batch_size=None) if self.held_out else []


@dataclass
class Seen:
    losses: list[float] = field(default_factory=list)
    pairs: list[list[int]] = field(default_factory=list)  # ids that were learnt from
    logged: list[dict[str, float]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)


class Stage(DPOModule):
    """Its noise and times depend on the pair, not on the rank."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(Encoder(), Codec(), backbone=dict(SIZES), **settings)  # type: ignore[arg-type]
        self.seen = Seen()

    def compared(self, batch: dict[str, Any], phase: str, step: int) -> dict[str, Tensor]:
        self.ids = batch["ids"]
        if phase == "train":
            self.seen.pairs.append(self.ids)
        return super().compared(batch, phase, step)

    def times_and_noise(self, winners: list[Tensor], phase: str, step: int) -> tuple[Tensor, list[Tensor]]:
        draws = [generator(self.seed, f"{phase}/{number}", step) for number in self.ids]
        t = torch.cat([self.timesteps.sample([x[0].numel()], draw) for x, draw in zip(winners, draws, strict=True)])
        return t, [torch.randn(x.shape, generator=draw) for x, draw in zip(winners, draws, strict=True)]


def settings_of(start: Path, **changes: Any) -> dict[str, Any]:
    return {
        "init_from": str(start),
        "optimizer": OptimizerSettings(lr=2e-3, warmup_steps=2, decay="linear", weight_decay=0.1),
        "preference": PreferenceSettings(beta=20.0, anchor=0.0),
        "seed": 1,
    } | changes


class Watch(lightning.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.seen.states.append(whole_state(trainer, pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        pl_module.seen.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        pl_module.seen.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.seen.states.append(whole_state(trainer, pl_module))


def whole_state(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Weights (of a reference that moves, too), optimiser, average and counter, all of them whole."""
    state: dict[str, Any] = {f"weights.{name}": whole(weight) for name, weight in pl_module.state_dict().items()}
    names = {id(parameter): name for name, parameter in pl_module.backbone.named_parameters()}
    (optimizer,) = trainer.optimizers
    for parameter, of_one in optimizer.state.items():
        state |= {f"{key}.{names[id(parameter)]}": whole(value) for key, value in of_one.items()}
    for ema in (callback for callback in trainer.callbacks if isinstance(callback, EMA)):
        state |= {f"average.{name}": whole(average) for name, average in ema.average.items()}
    return state | {"lr": optimizer.param_groups[0]["lr"], "step": trainer.global_step}


def fit(
    module: Stage,
    folder: Path,
    steps: int,
    resume: Path | None = None,
    data: Data | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    length: int = 12,
    save_every: int | None = None,
    **settings: Any,
) -> Seen:
    """Train for `steps` steps; the learning rate always ends at step `length`.

    save_every: keep a checkpoint of every so many steps, and leave the last one.
    """
    saving = [RunCheckpoint(save_every, keep_every_n_steps=save_every)] if save_every else []
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, max_epochs=-1, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
        enable_checkpointing=bool(saving),
        callbacks=[Watch(), EMA(decay=0.9), *callbacks, *saving],
        **{"devices": 1, "limit_val_batches": 0, **settings},
    )  # fmt: skip
    module.total_steps = lambda: length  # type: ignore[method-assign]
    trainer.fit(module, datamodule=data or Data(), ckpt_path=resume, weights_only=True)
    return module.seen
