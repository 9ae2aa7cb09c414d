"""`lightning run export`: weights as files that other programs load; one tensor in memory at a time, on a CPU."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from zimage_lit.backbone import S3DiTConfig
from zimage_lit.backbone.checkpoints import (
    export_comfyui_weights,
    published_shapes,
    save_weights,
    stored_weights,
)
from zimage_lit.callbacks.sampling import stage_pipeline
from zimage_lit.config import settings_from
from zimage_lit.errors import UserError
from zimage_lit.lora import (
    DTYPES,
    Adapters,
    LoRASettings,
    MergedWeights,
    base_fingerprint,
    is_adapter,
    linear_shapes,
    parse_lora,
    read_lora,
    write_lora,
)
from zimage_lit.pipeline import ZImagePipeline, build_stage, parts_of, run_config, sampling_of
from zimage_lit.stages.initial_weights import (
    backbone_config,
    build_backbone,
    empty_backbone,
    located,
    open_weights,
    read_checkpoint,
)

FOLDERS = ("pipeline", "transformer")  # forms that are folders; the others are single files


@dataclass(frozen=True)
class ExportSettings:
    """Settings of `lightning run export`."""

    source: str  # run:ID, a run's folder, a checkpoint of a run, a pipeline's or backbone's folder, a ComfyUI file
    output: str  # the folder (pipeline, transformer) or .safetensors file (the other forms) to write
    form: Literal["pipeline", "transformer", "comfyui", "lora-diffusers", "lora-comfyui"] = "pipeline"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the written weights; float32 to train on from them
    lora: str | None = None  # a LoRA file to merge into the source's weights
    lora_scale: float = 1.0  # of its effect
    overwrite: bool = False  # replace what an earlier export wrote there
    tracking_uri: str | None = None  # MLflow store of run:ID; MLFLOW_TRACKING_URI, else outputs/mlflow.db


@dataclass(frozen=True)
class Source:
    """Weights somewhere on disk, none of them read yet; those of a LoRA run are its base and its adapters."""

    name: str  # as it was asked for
    config: S3DiTConfig
    base: Mapping[str, Tensor]
    adapters: Adapters | None
    open_pipeline: (
        Callable[[], ZImagePipeline] | None
    )  # with a backbone that has no memory; None: it has no other parts

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """By published names, adapters merged in."""
        return MergedWeights(self.base, self.adapters) if self.adapters else self.base

    def pipeline(self) -> ZImagePipeline:
        """The source's text encoder, codec and sampling settings around a backbone without memory."""
        if self.open_pipeline is None:
            raise UserError(f"{self.name} holds a backbone alone: take form=transformer, or name a run or a pipeline.")
        return self.open_pipeline()


def export_task(settings: dict[str, Any]) -> None:
    """Write `output` in the form that is asked for; nothing is there until all of it is.

    Raises UserError for wrong settings and sources, where `output` exists and `overwrite` is not set (all of it before
    anything is written), and where writing fails.
    """
    asked = settings_from(ExportSettings, settings)
    output, dtype = Path(asked.output), DTYPES[asked.dtype]
    check_output(output, asked.form, asked.overwrite)
    source = open_source(asked.source, asked.tracking_uri)
    if asked.form.startswith("lora-"):
        if source.adapters is None or asked.lora:
            raise UserError(f"form={asked.form} needs a run that trained a LoRA as its source, and no lora=….")
        write_lora(source.adapters, output, "comfyui" if asked.form == "lora-comfyui" else "diffusers", dtype)
    else:
        weights = source.weights
        if asked.lora:
            weights = MergedWeights(weights, read_lora(asked.lora, source.config), asked.lora_scale)
        with progress_bar("export", source.config, dtype) as on_bytes:
            if asked.form == "pipeline":
                source.pipeline().save_pretrained(output, weights, dtype, on_bytes)
            elif asked.form == "transformer":
                save_weights(weights, source.config, output, dtype, on_bytes=on_bytes)
            else:
                export_comfyui_weights(weights, source.config, output, dtype=dtype, on_bytes=on_bytes)
    print(f"{asked.form} of {asked.source}: {output}")


def check_output(output: Path, form: str, overwrite: bool) -> None:
    """UserError where `output` is not what the form writes, or holds something that nobody said to replace."""
    if (output.suffix == ".safetensors") == (form in FOLDERS):
        wanted = "a folder" if form in FOLDERS else "a file name that ends in .safetensors"
        raise UserError(f"output={output}: form={form} writes {wanted}, name one.")
    there = any(output.iterdir()) if output.is_dir() else output.exists()
    if there and not overwrite:
        raise UserError(f"{output} exists: name another output=…, or give overwrite=true to replace it.")


@contextmanager
def progress_bar(title: str, config: S3DiTConfig, dtype: torch.dtype) -> Iterator[Callable[[int], None]]:
    """A bar over all bytes of a backbone; what it gives is called with the bytes of each written tensor."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    total = sum(torch.Size(shape).numel() for shape in published_shapes(config).values()) * dtype.itemsize
    with Progress(*columns) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda size: progress.advance(bar, size)


# ----------------------------------------------------------------------------------------------------------- sources


def open_source(name: str, tracking_uri: str | None = None) -> Source:
    """What `name` stands for: `run:ID`, a run's folder, a checkpoint, a folder with a pipeline or a backbone, or a
    ComfyUI file. Only headers are read. Raises UserError where there is nothing of the kind."""
    path = located(name, tracking_uri)
    if not path.exists():
        raise UserError(f"there is no {path} to read weights from: check the path.")
    if (path / "checkpoints" / "last.ckpt").exists():
        path = path / "checkpoints" / "last.ckpt"
    elif (path / "pipeline" / "model_index.json").is_file():
        path = path / "pipeline"
    if path.suffix == ".ckpt":
        return from_checkpoint(name, path, tracking_uri)
    stored = stored_weights(path)
    stored.check_kinds(cast=True)
    whole = (path / "model_index.json").is_file()
    opened = (lambda: ZImagePipeline(empty_backbone(stored.config), **parts_of(path))) if whole else None
    return Source(name, stored.config, stored, None, opened)


def from_checkpoint(name: str, path: Path, tracking_uri: str | None) -> Source:
    """The averaged weights of a run's checkpoint, else the trained ones; of a LoRA run, on the base that it names."""
    run = run_config(path)
    arguments = run["model"].get("init_args", {})
    config = backbone_config(arguments.get("backbone", "tiny"))
    weights: Mapping[str, Tensor] = open_weights(path)

    def opened() -> ZImagePipeline:
        stage = build_stage(run["model"])
        stage.backbone = empty_backbone(config)
        return stage_pipeline(stage, sampling_of(run))

    if not any(is_adapter(tensor) for tensor in weights):
        return Source(name, config, weights, None, opened)
    lora = settings_from(LoRASettings, arguments["lora"], section="model.init_args.lora")
    adapters = parse_lora(weights, linear_shapes(empty_backbone(config)), str(path), lora.scale)
    base = frozen_weights(config, arguments, tracking_uri)
    known = read_checkpoint(path).get("lora_base")
    if known and known != base_fingerprint(base, lora.frozen_dtype):
        raise UserError(
            f"{name} holds adapters of other frozen weights than those of init_from={arguments.get('init_from')}: put "
            "the right ones back there."
        )
    return Source(name, config, base, adapters, opened)


def frozen_weights(config: S3DiTConfig, arguments: dict[str, Any], tracking_uri: str | None) -> Mapping[str, Tensor]:
    """What a LoRA run has its adapters on, from the arguments of its stage."""
    if arguments.get("init_from"):
        return open_source(arguments["init_from"], tracking_uri).weights
    return build_backbone(config, None, arguments.get("seed", 0)).state_dict()
