"""Reinforcement learning at toy size, for the tests of its stage: in one process and on several ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from distillation import SIZES, Codec, Data, Encoder, whole
from torch import Tensor

from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.callbacks.ema import EMA
from zimage_lit.rewards import RewardCallback
from zimage_lit.rng import generator
from zimage_lit.stages import GRPOModule
from zimage_lit.stages.grpo_settings import ForwardProcessSettings, GroupRolloutSettings, PolicySettings, WindowSettings
from zimage_lit.stages.optimizers import OptimizerSettings


class Bright(RewardCallback):
    """The mean of a picture; with `among`, the pictures of a call change their scores among each other."""

    among: bool = False

    def __init__(self, among: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.among, self.calls = among, 0

    def score(self, images: Any, prompts: Any, metadata: Any) -> Tensor:
        self.calls += 1
        scores = torch.stack([image.float().mean() for image in images])
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(self.calls))
        return scores[order] if self.among else scores


class Same(RewardCallback):
    """Likes all pictures of a prompt alike."""

    def score(self, images: Any, prompts: Any, metadata: Any) -> Tensor:
        return torch.tensor([float(of["number"]) for of in metadata])


@dataclass
class Seen:
    figures: list[dict[str, float]] = field(default_factory=list)  # of each iteration
    states: list[dict[str, Any]] = field(default_factory=list)
    forwards: int = 0
    windows: list[range] = field(default_factory=list)


class Stage(GRPOModule):
    """Watches itself; its noise and times depend on the prompt and the place in its group, not on the rank."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(Encoder(), Codec(), backbone=dict(SIZES), **settings)  # type: ignore[arg-type]
        self.seen = Seen()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        self.ids = batch["ids"]
        return super().training_step(batch, batch_idx)

    def log_dict(self, figures: Any, *args: Any, **kwargs: Any) -> None:
        self.seen.figures.append({name: float(value) for name, value in figures.items() if "time/" not in name})
        super().log_dict(figures, *args, **kwargs)

    def sources(self, places: list[int], purpose: str, step: int) -> list[torch.Generator]:
        size = self.rollout.group_size
        names = [f"{purpose}/{self.ids[place // size]}/{place % size}" for place in places]
        return [generator(self.seed, name, step) for name in names]

    def draw(self, batch: Any, step: int) -> Any:
        minibatches = super().draw(batch, step)
        self.seen.windows.append(minibatches[0][0].window)
        return minibatches


def stage(start: Path, method: str = "grpo", **settings: Any) -> Stage:
    """Groups of three in four steps, two of which draw noise; packs that cut through groups."""
    arguments: dict[str, Any] = {
        "init_from": str(start),
        "method": method,
        "rollout": GroupRolloutSettings(4, group_size=3, batch_size=5),
        "grpo": PolicySettings(window=WindowSettings(2, 0, 1)),
        "nft": ForwardProcessSettings(times=2, lag_rate=0.1),
        "optimizer": OptimizerSettings(lr=1e-3, betas=(0.0, 0.99), warmup_steps=2, decay="linear"),
        "seed": 1,
    }
    return Stage(**(arguments | settings))


class Watch(lightning.Callback):
    """Keeps the whole state at the start and at the end, and counts the forwards of the network in training."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.seen.states.append(whole_state(trainer, pl_module))
        pl_module.backbone.register_forward_pre_hook(lambda *_: self.count(pl_module.seen))

    def count(self, seen: Seen) -> None:
        seen.forwards += 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.seen.states.append(whole_state(trainer, pl_module))


def whole_state(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Weights, snapshots, optimiser, average and counters, all of them whole."""
    state: dict[str, Any] = {f"weights.{name}": whole(weight) for name, weight in pl_module.state_dict().items()}
    (optimizer,) = trainer.optimizers
    names = {id(parameter): name for name, parameter in pl_module.backbone.named_parameters()}
    for parameter, of_one in optimizer.state.items():
        state |= {f"optimizer.{key}.{names[id(parameter)]}": whole(value) for key, value in of_one.items()}
    for ema in (callback for callback in trainer.callbacks if isinstance(callback, EMA)):
        state |= {f"average.{name}": whole(average) for name, average in ema.average.items()}
        state["updates"] = ema.updates
    return state | {"lr": optimizer.param_groups[0]["lr"], "iteration": trainer.global_step}


def fit(
    module: Stage,
    folder: Path,
    steps: int,
    resume: Path | None = None,
    callbacks: Sequence[lightning.Callback] | None = None,
    length: int = 8,
    data: lightning.LightningDataModule | None = None,
    save_every: int | None = None,
    **settings: Any,
) -> Seen:
    """Train for `steps` iterations; the learning rate always ends at iteration `length`.

    save_every: keep a checkpoint of every so many steps, and leave the last one.
    """
    callbacks = [Bright()] if callbacks is None else callbacks
    arguments: dict[str, Any] = {"devices": 1, "log_every_n_steps": 1, **settings}
    saving = [RunCheckpoint(save_every, keep_every_n_steps=save_every)] if save_every else []
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, max_epochs=-1, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
        enable_checkpointing=bool(saving),
        callbacks=[Watch(), EMA(decay=0.9), *callbacks, *saving], **arguments,
    )  # fmt: skip
    module.total_steps = lambda: length  # type: ignore[method-assign]
    trainer.fit(module, datamodule=data or Data(), ckpt_path=resume, weights_only=True)
    return module.seen


def is_number(figures: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in figures.values())
