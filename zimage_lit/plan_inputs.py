"""What of an experiment decides the memory and the work of its steps: read from its settings, for `lightning run plan`.

The backbone is built on the meta device, where it has sizes and no values. Of the data only the sizes that were written
down when they were prepared are looked at, where there are any.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import safe_open

from data_modules.buckets import PATCH_PIXELS, SizeMapping, image_tokens
from data_modules.manifest import MANIFEST, read_manifest
from data_modules.planning import PAD_MULTIPLE, PLANNING
from zimage_lit.backbone import S3DiT
from zimage_lit.backbone.flops import padded
from zimage_lit.backbone.memory import Adapters, Keeping
from zimage_lit.backbone.parallelize import PRECISIONS, ParallelizeSettings
from zimage_lit.config import compose, is_graph, settings_from
from zimage_lit.errors import UserError
from zimage_lit.lora import LoRASettings, apply_lora, lora_layers, type_of_base
from zimage_lit.stages.initial_weights import backbone_config
from zimage_lit.validate import check_config

NOT_GIVEN = "(not given)"  # stands for the values that an experiment leaves to the person who runs it
LONGEST_CAPTION = 512  # tokens: where the text encoder cuts
# Where the folders of the frozen parts are not there: parameters of the published ones, kept in bfloat16.
PUBLISHED = {"Qwen3TextEncoder": 4_022_000_000, "FluxVAECodec": 84_000_000, "codec_from": 84_000_000}
NOT_PLANNED = {  # by the class of the stage: why not, and what to do
    "DMDRModule": "plan knows stages that train one network, and a DMDRModule has up to three: with the student's "
    "average they take 38 bytes a parameter in layout=copies, 22 in fake_lora and 2 in adapters (with "
    "frozen_dtype=bfloat16), over all GPUs and before activations.",
    "DPOModule": "plan knows stages with one forward a step, and a DPOModule asks its reference as well: plan a "
    "FlowMatchingModule with as many packed tokens; to that the reference adds a third of the work (a quarter with "
    "activation_checkpointing=full) and, without LoRA, 4 bytes a parameter over all GPUs (2 with "
    "frozen_dtype=bfloat16).",
    "GRPOModule": "plan knows stages that learn from the data's own pictures, and a GRPOModule draws them: training "
    "holds as much as a fine-tune of the same lora on rollout.batch_size pictures (twice as many with guidance), and "
    "without lora a copy of the network for each of method=nft and kl.",
}
Strategy = Literal["one device", "ddp", "fsdp2"]


@dataclass(frozen=True)
class Training:
    """What of an experiment decides memory and work."""

    backbone: S3DiT  # on the meta device, adapters in it
    images: list[int]  # tokens of the largest picture, for each sample of one device's batch
    captions: list[int]  # tokens of the longest caption, likewise
    strategy: Strategy
    devices: int
    shards: int  # devices that share one copy of weights, gradients and states
    keeping: Keeping
    optimizer: dict[str, Any]
    average: bool  # an EMA of the weights
    frozen: int  # bytes of text encoder and codec
    accumulate: int  # batches an optimiser step
    steps: int | None  # None: nobody has said
    devices_guessed: bool = False  # the experiment takes all that a machine has, which is not known here

    @property
    def on_gpu(self) -> bool:
        return self.keeping.on_gpu


def compose_leniently(experiment: str, overrides: list[str]) -> dict[str, Any]:
    """The settings of an experiment, checked; what it leaves to the person who runs it may stay open here."""
    if is_graph(experiment):
        raise UserError(
            f"{experiment} is a graph: `lightning run {experiment} --dry-run` says what its stages would take."
        )
    config = compose(experiment, overrides, gaps=NOT_GIVEN)
    checked = dict(config)
    callbacks = config.get("trainer", {}).get("callbacks")
    if isinstance(callbacks, dict):  # prompts and the like
        closed = {name: value for name, value in callbacks.items() if NOT_GIVEN not in str(value)}
        checked["trainer"] = {**config["trainer"], "callbacks": closed}
    check_config(checked)
    return config


def read_training(config: Mapping[str, Any], devices: int | None = None, caption_tokens: int | None = None) -> Training:
    """What a composed experiment would do.

    devices: all machines together; None: the experiment's. caption_tokens: of the longest caption; None: the prepared
    data's, else as many as the text encoder takes.
    Raises UserError for an experiment that trains no backbone, and for sizes that neither settings nor data tell.
    """
    trainer, model, data = config["trainer"], arguments(config["model"]), config["data"]
    if "backbone" not in model:
        raise UserError(f"{config['model']['class_path']} has no model.init_args.backbone: there is nothing to plan.")
    if class_name(config["model"]) in NOT_PLANNED:
        raise UserError(NOT_PLANNED[class_name(config["model"])])
    if model["backbone"] == NOT_GIVEN:
        raise UserError(
            "the backbone's sizes are those of a folder that is not given: name it, or plan with "
            "model.init_args.backbone=z-image-6b."
        )
    precision = str(trainer.get("precision") or "32-true")
    precision = "32-true" if precision == "32" else precision
    if precision not in PRECISIONS:
        raise UserError(f"trainer.precision={precision} cannot be planned: set it to one of {', '.join(PRECISIONS)}.")
    lora = settings_from(LoRASettings, model["lora"], "model.init_args.lora") if model.get("lora") else None
    backbone = meta_backbone(model["backbone"], lora, precision)
    parallelize = settings_from(ParallelizeSettings, model.get("parallelize") or {}, "model.init_args.parallelize")
    guessed = devices is None and str(trainer.get("devices", "auto")) in ("auto", "-1")
    devices = devices or device_count(trainer)
    strategy, replicate = strategy_of(trainer, devices)
    keeping = Keeping(
        width=2 if precision.startswith("bf16") or (lora and lora.base_dtype == "bfloat16") else 4,
        autocast=precision == "bf16-mixed",
        on_gpu=trainer.get("accelerator") != "cpu",
        checkpointing=parallelize.activation_checkpointing,
        adapters=adapters_of(lora, backbone),
    )
    optimizer = model.get("optimizer") or {}
    if strategy == "fsdp2" and optimizer.get("name") == "muon":
        raise UserError("optimizer.name=muon needs whole matrices, which trainer.strategy=fsdp2 cuts: set it to adamw.")
    images, captions = largest_batch(data, caption_tokens)
    return Training(
        backbone=backbone,
        images=images,
        captions=captions,
        strategy=strategy,
        devices=devices,
        shards=devices // replicate if strategy == "fsdp2" else 1,
        keeping=keeping,
        optimizer=optimizer,
        average=any(class_name(callback) == "EMA" for callback in callbacks(trainer)),
        frozen=frozen_bytes(model, data),
        accumulate=int(trainer.get("accumulate_grad_batches") or 1),
        steps=step_count(trainer, data, len(images) * devices),
        devices_guessed=guessed,
    )


def meta_backbone(settings: Any, lora: LoRASettings | None, precision: str) -> S3DiT:
    """The backbone as the stage will train it, without values."""
    with torch.device("meta"), type_of_base(lora.frozen_dtype if lora else None):
        backbone = S3DiT(backbone_config(settings))
    if precision == "bf16-true":
        backbone.to(torch.bfloat16)
    return apply_lora(backbone, lora) if lora else backbone


def adapters_of(lora: LoRASettings | None, backbone: S3DiT) -> Adapters | None:
    """Which of a block's matrices have adapters; those of the modulation work on samples, not on tokens."""
    if lora is None:
        return None
    ends = {name.split(".", 3)[-1] for name in lora_layers(backbone)}
    targets = frozenset(end for end in ends if not end.startswith("adaLN"))
    return Adapters(lora.rank, targets, lora.refiners, lora.dora, lora.dropout > 0)


def device_count(trainer: Mapping[str, Any]) -> int:
    """Of the settings, all machines together; "auto" is taken for one a machine, as nobody knows them here."""
    devices = trainer.get("devices", "auto")
    named = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return max(named, 1) * int(trainer.get("num_nodes") or 1)


def strategy_of(trainer: Mapping[str, Any], devices: int) -> tuple[Strategy, int]:
    """The strategy, and how many copies of the weights FSDP2 keeps."""
    strategy = trainer.get("strategy") or "auto"
    options = arguments(strategy) if isinstance(strategy, dict) else {}
    name = class_name(strategy) if isinstance(strategy, dict) else str(strategy)
    if name in ("fsdp2", "FSDP2Strategy"):
        replicate = int(options.get("replicate") or 1)
        if devices % replicate:
            raise UserError(f"trainer.strategy: replicate={replicate} does not divide {devices} devices evenly.")
        return "fsdp2", replicate
    if name != "auto" and not name.startswith(("ddp", "DDP", "SingleDevice")):
        raise UserError(f"trainer.strategy={name} cannot be planned: set it to fsdp2, ddp or auto.")
    return ("ddp" if devices > 1 else "one device"), 1


def largest_batch(data: Mapping[str, Any], caption_tokens: int | None) -> tuple[list[int], list[int]]:
    """Image and caption tokens of each sample of one device's heaviest batch; of a mixture, of any part."""
    settings = arguments(data)
    if isinstance(settings.get("data"), dict):
        batches = [largest_batch(part, caption_tokens) for part in settings["data"].values()]
        return max(batches, key=lambda batch: sum(batch[0]) + sum(batch[1]))
    image, caption = longest_sample(data, caption_tokens)
    budget = settings.get("token_budget")
    if not budget:
        count = int(settings.get("batch_size") or 64)
        return [image] * count, [caption] * count
    padded_caption = padded(caption, PAD_MULTIPLE)
    sample = padded(image, PAD_MULTIPLE) + padded_caption
    count = max(1, budget // sample)
    images, captions = [image] * count, [caption] * count
    left = budget - count * sample - padded_caption
    if left >= PAD_MULTIPLE:  # a smaller picture fills the budget
        images, captions = [*images, left // PAD_MULTIPLE * PAD_MULTIPLE], [*captions, caption]
    return images, captions


def longest_sample(data: Mapping[str, Any], caption_tokens: int | None) -> tuple[int, int]:
    """Tokens of the largest picture and of the longest caption: those of the prepared data where they are at hand."""
    settings = arguments(data)
    sizes = settings_from(SizeMapping, settings["sizes"], "data.init_args.sizes") if settings.get("sizes") else None
    planning = Path(str(settings.get("data_dir", ""))) / "train" / PLANNING
    stored = np.load(planning, allow_pickle=False) if planning.is_file() else None
    caption = caption_tokens or (int(stored["caption_tokens"].max()) if stored is not None else LONGEST_CAPTION)
    if stored is not None:
        width, height = (stored[side].astype(np.int64) for side in ("width", "height"))
        image = int(image_tokens(*(sizes(width, height) if sizes else (width, height))).max())
    elif sizes:
        image = (sizes.side // PATCH_PIXELS) ** 2
    elif class_name(data) == "TinyWorldDataModule":
        largest = max(width * height for width, height in settings.get("canvases") or [(64, 64)])
        image = largest // (PATCH_PIXELS * int(settings.get("downscale") or 1)) ** 2
    else:
        raise UserError(
            "how large the pictures are is not known: set data.init_args.sizes.resolution, or data.init_args.data_dir "
            "to prepared data."
        )
    return max(image, 1), min(caption, LONGEST_CAPTION)


def step_count(trainer: Mapping[str, Any], data: Mapping[str, Any], samples: int) -> int | None:
    """Optimiser steps of the run; samples: of one batch on all devices. None where neither settings nor data tell."""
    steps, epochs = int(trainer.get("max_steps") or -1), trainer.get("max_epochs")
    folder = Path(str(arguments(data).get("data_dir", "")))
    if steps > 0 or not epochs or epochs < 0 or not (folder / MANIFEST).is_file():
        return steps if steps > 0 else None
    batches = read_manifest(folder).splits["train"] * int(epochs) / samples
    return max(1, int(batches / int(trainer.get("accumulate_grad_batches") or 1)))


def frozen_bytes(model: Mapping[str, Any], data: Mapping[str, Any]) -> int:
    """Text encoder and codec, as stored in their folders; where these are not there, as published, in bfloat16.

    TinyWorld makes its own when its data are prepared, of a few megabytes.
    """
    total = 0
    for name, inside in (("text_encoder", "text_encoder"), ("codec", "vae")):
        component = model.get(name)
        if not isinstance(component, dict):
            continue
        settings = arguments(component)
        folder = Path(str(settings.get("folder", "")))
        folder = folder / inside if (folder / inside).is_dir() else folder
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        width = {"bfloat16": 2, "float16": 2, "float32": 4}.get(str(settings.get("dtype")))
        if files:
            total += sum(stored_bytes(file, width) for file in files)
        elif class_name(data) != "TinyWorldDataModule":
            total += PUBLISHED.get(class_name(component), 0) * (width or 2)
    return total


def stored_bytes(file: Path, width: int | None) -> int:
    """Of a safetensors file's tensors, in their own type or in one of `width` bytes; only the head is read."""
    total = 0
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            part = tensors.get_slice(name)
            own = {"F64": 8, "F32": 4, "I64": 8, "I32": 4}.get(part.get_dtype(), 2)
            total += math.prod(part.get_shape()) * (width or own)
    return total


def arguments(component: Mapping[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], component.get("init_args") or {})


def class_name(component: Mapping[str, Any]) -> str:
    return str(component.get("class_path")).rpartition(".")[2]


def callbacks(trainer: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = trainer.get("callbacks") or []
    return list(found.values()) if isinstance(found, dict) else found
