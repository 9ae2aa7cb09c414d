"""Where a stage's backbone comes from: fresh weights, an exported folder, a checkpoint, or an MLflow run.

What is read from checkpoints is checked here too, so that a wrong one is named before Lightning trips over it.
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.backbone.checkpoints import read_config, stored_weights
from zimage_lit.backbone.config import PRESETS
from zimage_lit.backbone.parallelize import fill, fill_fresh, parallelize
from zimage_lit.config import settings_from
from zimage_lit.errors import UserError
from zimage_lit.lora import LoRASettings, apply_lora, is_adapter, kept_weights, reset_adapters, type_of_base
from zimage_lit.sharded_checkpoints import ShardedTensors, is_sharded, read_sharded
from zimage_lit.stages.optimizers import OptimizerSettings, kind_of_states

OF_A_RUN = "run:"  # before the id of an MLflow run, of which the last checkpoint is meant
PREFIX = "backbone."  # of the backbone's tensors in a checkpoint


def backbone_config(settings: str | dict[str, Any]) -> S3DiTConfig:
    """The sizes that `model.init_args.backbone` asks for: those of a preset or of the backbone in a folder, by name, or
    `preset` and the sizes that differ.

    Raises UserError for an unknown preset or size, a folder without a backbone, and a mapping without `preset`.
    """
    key, known = "model.init_args.backbone", ", ".join(sorted(PRESETS))
    if isinstance(settings, str):
        if settings not in PRESETS and Path(settings).is_dir():  # a folder called tiny is ./tiny
            return read_config(settings)
        if settings not in PRESETS:
            raise UserError(f"{key}={settings} is neither a preset ({known}) nor a folder.")
        return S3DiTConfig.preset(settings)
    changes = dict(settings)
    if changes.get("preset") not in PRESETS:
        raise UserError(
            f"{key}.preset must be {known} (its sizes are what the others change), not {changes.get('preset')}."
        )
    base = S3DiTConfig.preset(changes.pop("preset"))
    return settings_from(S3DiTConfig, {**vars(base), **changes}, section=key)


def check_beginning(config: Mapping[str, Any]) -> None:
    """UserError where an experiment's stage shall begin from what is not there, before any data are drawn for it."""
    model = config.get("model") or {}
    if str(model.get("class_path")).startswith("zimage_lit."):
        for name in ("init_from", "student_init_from"):
            source = (model.get("init_args") or {}).get(name)
            if source and not source.startswith(OF_A_RUN) and not Path(source).exists():
                raise UserError(
                    f"model.init_args.{name}: there is no {source}: run what makes it first, or name another one."
                )


def stage_backbone(
    stage: Any, init_from: str | None, adapters: Mapping[str, LoRASettings], frozen_dtype: torch.dtype | None = None
) -> S3DiT:
    """A network of a stage (its `config`, `seed` and `parallelize` say which) on the terms of its trainer.

    adapters: name -> settings of the LoRAs in it; the last one is active, and all that is not of it is frozen.
    frozen_dtype: the type in which it is made, None for the trainer's. Under the strategy `fsdp2` it is sharded: made
    without memory, and filled part by part. Errors as in `build_backbone`.
    """
    source = init_from, stage.seed, store_of(stage)
    mesh = stage.device_mesh
    with type_of_base(frozen_dtype):
        backbone = build_backbone(stage.config, *source) if mesh is None else empty_backbone(stage.config)
    for name, settings in adapters.items():
        apply_lora(backbone, settings, stage.seed, name)
    if stage._trainer is not None:  # who only draws pictures from a checkpoint needs none of it
        parallelize(backbone, mesh, stage.parallelize, str(stage.trainer.precision))
    if mesh is not None:
        backbone.to_empty(device=stage.trainer.strategy.root_device)
        fill_backbone(backbone, *source)
        for name, settings in adapters.items():
            reset_adapters(backbone, settings, stage.seed, name)
    return backbone


def build_backbone(config: S3DiTConfig, init_from: str | None, seed: int, tracking_uri: str | None = None) -> S3DiT:
    """A backbone of `config`'s sizes with the weights that `init_from` names, or seeded fresh ones for None.

    init_from: a folder in the published layout, a ComfyUI file, a checkpoint of a run (.ckpt, a file or a folder), or
    `run:<mlflow run id>`, which is looked up at `tracking_uri` (None: the environment's MLFLOW_TRACKING_URI, else
    outputs/mlflow.db).
    Raises UserError where nothing is found there or where its sizes are not `config`'s.
    """
    if init_from is None:
        with torch.random.fork_rng(), torch.device("cpu"):  # drawn there, the weights are the same on every device
            torch.manual_seed(seed)
            return S3DiT(config)
    weights, backbone = initial_weights(config, init_from, tracking_uri), empty_backbone(config)
    # stored in half, steps of training would vanish; and what is still on the disk has to be copied from there
    own = {name: weight.to(torch.get_default_dtype(), copy=True) for name, weight in weights.items()}
    backbone.load_state_dict(own, assign=True)
    return backbone


def empty_backbone(config: S3DiTConfig) -> S3DiT:
    """A backbone without memory, on the meta device."""
    with torch.device("meta"):
        return S3DiT(config)


def fill_backbone(backbone: S3DiT, init_from: str | None, seed: int, tracking_uri: str | None = None) -> None:
    """Give a sharded backbone the weights of `build_backbone`, read or drawn one at a time: no rank holds them all."""
    if init_from is None:
        fill_fresh(backbone, empty_backbone(backbone.config), seed)
    else:
        fill(backbone, initial_weights(backbone.config, init_from, tracking_uri))


def initial_weights(config: S3DiTConfig, init_from: str, tracking_uri: str | None) -> Mapping[str, torch.Tensor]:
    """The weights that `init_from` names, as they are stored, each read when it is asked for; arguments and errors as
    in `build_backbone`."""
    path = located(init_from, tracking_uri)
    if path.suffix != ".ckpt":
        stored = stored_weights(path)
        stored.check_kinds(cast=True)
        different = [name for name, value in vars(config).items() if getattr(stored.config, name) != value]
        if different:
            raise UserError(f"init_from={init_from}: its {', '.join(different)} differ from the experiment's backbone.")
        return stored
    weights = open_weights(path)
    if any(is_adapter(name) for name in weights):
        raise UserError(
            f"init_from={path}: it holds a LoRA without its base; make one folder of both by `lightning run export` "
            "and name that."
        )
    shapes = weights.shapes if isinstance(weights, ShardedTensors) else weights
    if wrong := misfits(empty_backbone(config).state_dict(), shapes):
        raise UserError(
            f"init_from={path}: {len(wrong)} tensors do not fit the experiment's backbone, the first is {wrong[0]}; "
            "set model.init_args.backbone to the sizes it was trained with."
        )
    return weights


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of a run holds, tensors still on disk; raises UserError for anything else.

    Of a sharded one, which is a folder, the weights' shapes alone (`state_dict`, on the meta device) and no average.
    """
    if is_sharded(path):
        return read_sharded(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint file {path}.")
    try:
        allow_low_bit_states(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # a torn file makes the unpickler raise all kinds, none of which names the file
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): name a whole one, or start over."
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of a training run: name one that a run has written.")
    return checkpoint


def allow_low_bit_states(path: Path) -> None:
    """torch reads 8-bit optimiser states only where torchao, which says that they are harmless, has been imported."""
    if any(name.startswith("torchao.") for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)):
        try:
            importlib.import_module("torchao.optim")
        except ImportError as error:
            raise UserError(
                f"{path} holds 8-bit optimiser states: pip install 'zimage-lit[8bit]' to read it."
            ) from error


def check_continues(checkpoint: dict[str, Any], backbone: S3DiT, optimizer: OptimizerSettings) -> None:
    """Raise UserError where a run of this backbone and optimiser cannot go on from the checkpoint."""
    weights = {name: w for name, w in checkpoint["state_dict"].items() if name.startswith(PREFIX)}
    check_weights(weights, {f"{PREFIX}{name}": weight for name, weight in kept_weights(backbone).items()})
    for state in checkpoint.get("optimizer_states", ()):
        found = kind_of_states(state)
        if found != optimizer.kind:
            raise UserError(
                f"the checkpoint to continue from was trained with optimizer.name={found}, not {optimizer.kind}: set "
                "that back, or begin a new run from its weights with model.init_args.init_from."
            )


def check_weights(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError where weights of a checkpoint, by their names in it, are not those that are expected."""
    lora = any(is_adapter(name) for name in found)
    if lora != any(is_adapter(name) for name in expected):
        raise UserError(
            f"the checkpoint to continue from was trained {'with' if lora else 'without'} model.init_args.lora: set "
            "that back, or name another checkpoint."
        )
    if wrong := misfits(expected, found):
        settings = "model.init_args.lora as it was there" if lora else "model.init_args.backbone to its sizes"
        raise UserError(
            f"the checkpoint to continue from is of another backbone: {len(wrong)} tensors do not fit, the first is "
            f"{wrong[0]}; set {settings}, or name another checkpoint."
        )


def misfits(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that only one of two models has, else of those whose shapes differ."""
    either = sorted(expected.keys() ^ found.keys())
    return either or [name for name, weight in expected.items() if found[name].shape != weight.shape]


def open_weights(path: Path) -> Mapping[str, torch.Tensor]:
    """The backbone's weights of a checkpoint, a file or a folder: their average where the run kept one, else the
    trained ones. Each is read when it is asked for, without a process group; names are those in the backbone.

    Raises UserError for a missing or damaged checkpoint, or one without a backbone.
    """
    checkpoint = read_checkpoint(path)
    if path.is_dir():
        average = ShardedTensors(path, "callbacks.EMA.average.")
        return average or ShardedTensors(path, f"state_dict.{PREFIX}")
    average = checkpoint.get("callbacks", {}).get("EMA", {}).get("average")
    if average:
        return average
    weights = {name.removeprefix(PREFIX): w for name, w in checkpoint["state_dict"].items() if name.startswith(PREFIX)}
    if not weights:
        raise UserError(f"{path} holds no tensors named {PREFIX}*, so it is not the checkpoint of a picture model.")
    return weights


def located(init_from: str, tracking_uri: str | None) -> Path:
    """The folder or file that `init_from` names, that of a run of MLflow looked up."""
    is_run = init_from.startswith(OF_A_RUN)
    return run_checkpoint(init_from.removeprefix(OF_A_RUN), tracking_uri) if is_run else Path(init_from)


def store_of(stage: Any) -> str | None:
    """The MLflow store in which a stage's run is logged, if it is."""
    return next((logger.tracking_uri for logger in stage.loggers if hasattr(logger, "tracking_uri")), None)


def run_checkpoint(run_id: str, tracking_uri: str | None) -> Path:
    """The checkpoint of the run that MLflow knows as `run_id`; its tag `output_dir` says where the run was written."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    from zimage_lit.tracking import check_server, is_server, resolve_store

    uri, _ = resolve_store(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), Path("outputs/any").absolute())
    if is_server(uri):
        check_server(uri)
    try:
        tags = MlflowClient(uri).get_run(run_id).data.tags
    except MlflowException as error:
        raise UserError(f"init_from=run:{run_id}: MLflow at {uri} does not know this run.") from error
    if "output_dir" not in tags:
        raise UserError(f"init_from=run:{run_id}: the run has no output_dir tag, name its checkpoint file instead.")
    return Path(tags["output_dir"]) / "checkpoints" / "last.ckpt"
