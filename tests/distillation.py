"""A distillation at toy size, for the tests of its stage: in one process and on several ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from ranks import Steps
from torch import Tensor
from torch.distributed.tensor import DTensor

from zimage_lit.backbone.parallelize import local
from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.callbacks.ema import EMA
from zimage_lit.lora import LoRASettings
from zimage_lit.objectives.timesteps import RenoiseLaw
from zimage_lit.rng import generator
from zimage_lit.stages import DMDRModule
from zimage_lit.stages.distillation_settings import ObjectiveSettings, RolloutSettings
from zimage_lit.stages.dmdr import Generated
from zimage_lit.stages.initial_weights import backbone_config, build_backbone
from zimage_lit.stages.optimizers import OptimizerSettings

SIZES = {
    "preset": "tiny", "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 12, "axes_dims": [4, 6, 6], "pad_multiple": 32,
}  # fmt: skip
# What makes the laptop's experiments small: of the teacher, and of its student.
SHARED = [
    "model.init_args.backbone={preset: tiny, dim: 64, n_layers: 1, n_heads: 2, n_kv_heads: 2, pad_multiple: 8}",
    "data.init_args.num_samples=80",
    "data.init_args.num_val_samples=4",
    "data.init_args.batch_size=4",
    "trainer.accelerator=cpu",
    "trainer.logger=false",
    "trainer.enable_progress_bar=false",
    "trainer.callbacks.samples.init_args.prompts=[a photo of a circle]",
]
SMALL_TEACHER = [
    *SHARED,
    "model.init_args.optimizer.name=adamw",
    "trainer.max_steps=1",
    "trainer.callbacks.score=null",
    "trainer.callbacks.report=null",
]
SMALL_STUDENT = [*SHARED, "trainer.max_steps=2", "model.init_args.ratio=1"]
LAYOUTS = ("copies", "fake_lora", "adapters")
WAYS = (*LAYOUTS, "student_lora")  # the layouts, and fake_lora with a LoRA as the student


class Encoder:
    """Stands for the text encoder: batches hold features already, but for the empty caption."""

    def to(self, device: torch.device) -> "Encoder":
        return self

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        return [torch.full((2, 12), 0.1) for _ in prompts]


class Codec:
    """Stands for the codec: a picture has the first three channels of its latent."""

    downsample = 1

    def to(self, device: torch.device) -> "Codec":
        return self

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].clamp(-1, 1)


def write_teacher(folder: Path, seed: int = 7) -> Path:
    """A backbone whose every part speaks: fresh gates would be zero."""
    backbone = build_backbone(backbone_config(dict(SIZES)), None, seed)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    backbone.save_pretrained(folder)
    return folder


def batch_of(ids: range) -> dict[str, Any]:
    sources = [torch.Generator().manual_seed(number) for number in ids]
    return {
        "ids": list(ids),
        "image_latents": [torch.randn(16, 4, 4 + 2 * (i % 2), generator=s) for i, s in zip(ids, sources, strict=True)],
        "caption_features": [torch.randn(3 + i % 3, 12, generator=s) for i, s in zip(ids, sources, strict=True)],
        "captions": [f"number {i}" for i in ids],
        "metadata": [{"number": i} for i in ids],
    }


class Data(lightning.LightningDataModule):
    def train_dataloader(self) -> Steps:
        return Steps(self.trainer.global_rank, self.trainer.world_size, batch_of)


@dataclass
class Turn:
    """One step of one role: who had gradients before it, and whose weights it changed."""

    role: str
    with_gradients: set[str]
    changed: set[str]


@dataclass
class Seen:
    turns: list[Turn] = field(default_factory=list)
    step_indices: list[int] = field(default_factory=list)
    forwards: int = 0
    losses: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)


class Stage(DMDRModule):
    """Watches itself; its noise and times depend on the sample, not on the rank."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(Encoder(), Codec(), backbone=dict(SIZES), **settings)  # type: ignore[arg-type]
        self.seen = Seen()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        self.ids = batch["ids"]
        output = super().training_step(batch, batch_idx)
        self.seen.losses.append(float(output["loss"]))
        return output

    def generate(self, batch: dict[str, Any], step: int) -> Generated:
        generated = super().generate(batch, step)
        self.seen.step_indices.append(generated.step_index)
        return generated

    def noise(self, shapes: list[tuple[int, ...]], purpose: str, step: int) -> list[Tensor]:
        draws = [generator(self.seed, f"{purpose}/{number}", step) for number in self.ids]
        return [torch.randn(shape, generator=draw) for shape, draw in zip(shapes, draws, strict=True)]

    def times(self, law: RenoiseLaw, generated: Generated, purpose: str, step: int) -> Tensor:
        draws = [generator(self.seed, f"{purpose}/times/{number}", step) for number in self.ids]
        present = torch.full((1,), 1 - generated.step_index / self.rollout.num_inference_steps)
        return torch.cat([law.sample(1, draw, present, self.student_step) for draw in draws])

    def take_step(self, role: str) -> Tensor:
        trained = {name: self.roles.trained(name) for name in ("student", "fake_score")}
        held = {name: any(p.grad is not None for p in parameters.values()) for name, parameters in trained.items()}
        before = self.snapshot()
        norm = super().take_step(role)
        after = self.snapshot()
        changed = {name for name in before if not same(before[name], after[name])}
        self.seen.turns.append(Turn(role, {name for name in held if held[name]}, changed))
        return norm

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """This rank's weights of each role."""
        weights: dict[str, Any] = {name: self.roles.trained(name) for name in ("student", "fake_score")}
        weights["teacher"] = self.roles.frozen()
        return {role: {k: local(w).detach().clone() for k, w in named.items()} for role, named in weights.items()}


def stage(teacher: Path, layout: str, **settings: Any) -> Stage:
    """A stage whose student is trained at every third iteration; layout: one of `WAYS`."""
    lora = LoRASettings(rank=4)
    optimizer = OptimizerSettings(lr=2e-3, betas=(0.0, 0.99), warmup_steps=3, decay="linear", weight_decay=0.1)
    arguments: dict[str, Any] = {
        "init_from": str(teacher),
        "layout": "fake_lora" if layout == "student_lora" else layout,
        "lora": lora if layout in ("adapters", "student_lora") else None,
        "fake_lora": None if layout == "copies" else lora,
        "rollout": RolloutSettings(num_inference_steps=4),
        "objective": ObjectiveSettings(guidance_scale=3.0),
        "student_optimizer": optimizer,
        "fake_optimizer": optimizer,
        "ratio": 3,
        "seed": 1,
    }
    return Stage(**(arguments | settings))


class Watch(lightning.Callback):
    """Keeps the whole state at the start and at the end, and counts the forwards of all networks."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.seen.states.append(whole_state(trainer, pl_module))
        for network in {id(n): n for n in pl_module.roles.networks.values()}.values():
            network.register_forward_pre_hook(lambda *_: self.count(pl_module.seen))

    def count(self, seen: Seen) -> None:
        seen.forwards += 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.seen.states.append(whole_state(trainer, pl_module))
        pl_module.seen.figures = {name: float(value) for name, value in trainer.callback_metrics.items()}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def whole_state(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Weights, both optimisers, average and counters, all of them whole."""
    state: dict[str, Any] = {f"weights.{name}": whole(weight) for name, weight in pl_module.state_dict().items()}
    for role, optimizer in zip(("student", "fake_score"), trainer.optimizers, strict=True):
        names = {id(parameter): name for name, parameter in pl_module.roles.trained(role).items()}
        for parameter, of_one in optimizer.state.items():
            state |= {f"{role}.{key}.{names[id(parameter)]}": whole(value) for key, value in of_one.items()}
        state[f"{role}.lr"] = optimizer.param_groups[0]["lr"]
    for ema in (callback for callback in trainer.callbacks if isinstance(callback, EMA)):
        state |= {f"average.{name}": whole(average) for name, average in ema.average.items()}
        state["updates"] = ema.updates
    return state | {"steps": dict(pl_module.steps), "iteration": trainer.global_step}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key]
        for key, value in first.items()
    )


def fit(
    module: Stage,
    folder: Path,
    steps: int,
    resume: Path | None = None,
    strategy: Any = "auto",
    devices: int = 1,
    callbacks: Sequence[lightning.Callback] = (),
    length: int = 12,
    save_every: int | None = None,
    **settings: Any,
) -> Seen:
    """Train for `steps` iterations; the learning rates always end at iteration `length`.

    save_every: keep a checkpoint of every so many steps, and leave the last one.
    """
    saving = [RunCheckpoint(save_every, keep_every_n_steps=save_every)] if save_every else []
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=devices, strategy=strategy, logger=False, max_epochs=-1,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
        enable_checkpointing=bool(saving),
        callbacks=[Watch(), EMA(decay=0.9), *callbacks, *saving], **settings,
    )  # fmt: skip
    module.iterations = lambda: length  # type: ignore[method-assign]
    trainer.fit(module, datamodule=Data(), ckpt_path=resume, weights_only=True)
    return module.seen
