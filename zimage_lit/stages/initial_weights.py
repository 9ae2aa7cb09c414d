"""Where a stage's backbone comes from: fresh weights, an exported folder, a checkpoint, or an MLflow run."""

import os
from pathlib import Path

import torch

from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.errors import UserError


def build_backbone(config: S3DiTConfig, init_from: str | None, seed: int) -> S3DiT:
    """A backbone of `config`'s sizes with the weights that `init_from` names, or seeded fresh ones for None.

    init_from: a folder written by `save_pretrained`, a Lightning checkpoint (.ckpt), or `run:<mlflow run id>`.
    Raises UserError where nothing is found there or where its sizes are not `config`'s.
    """
    if init_from is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return S3DiT(config)
    path = run_checkpoint(init_from.removeprefix("run:")) if init_from.startswith("run:") else Path(init_from)
    if path.suffix == ".ckpt":
        return _from_checkpoint(config, path)
    backbone = S3DiT.from_pretrained(path)
    if backbone.config != config:
        different = [name for name, value in vars(config).items() if getattr(backbone.config, name) != value]
        raise UserError(f"init_from={init_from}: its {', '.join(different)} differ from the experiment's backbone.")
    return backbone


def checkpoint_weights(path: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights of a Lightning checkpoint: their average where the run kept one, else the trained ones.

    Raises UserError for a missing or damaged file, or one without a backbone.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a torn file makes the unpickler raise all kinds, none of which names the file
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}); is the file whole?"
        ) from error
    average = checkpoint.get("callbacks", {}).get("EMA", {}).get("average")
    if average:
        return average
    prefix = "backbone."
    weights = {name.removeprefix(prefix): w for name, w in checkpoint["state_dict"].items() if name.startswith(prefix)}
    if not weights:
        raise UserError(f"{path} holds no tensors named {prefix}*, so it is not the checkpoint of a picture model.")
    return weights


def _from_checkpoint(config: S3DiTConfig, path: Path) -> S3DiT:
    weights = checkpoint_weights(path)
    with torch.device("meta"):
        backbone = S3DiT(config)
    expected = {name: parameter.shape for name, parameter in backbone.state_dict().items()}
    wrong = sorted(set(expected) ^ set(weights)) or [n for n, shape in expected.items() if weights[n].shape != shape]
    if wrong:
        raise UserError(
            f"init_from={path}: {len(wrong)} tensors do not fit the experiment's backbone, the first is {wrong[0]}; "
            "set model.init_args.backbone to the sizes it was trained with."
        )
    backbone.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
    return backbone


def run_checkpoint(run_id: str) -> Path:
    """The checkpoint of the run that MLflow knows as `run_id`; its tag `output_dir` says where the run was written."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    from zimage_lit.tracking import resolve_store

    uri, _ = resolve_store(os.environ.get("MLFLOW_TRACKING_URI"), Path("outputs/any").absolute())
    try:
        tags = MlflowClient(uri).get_run(run_id).data.tags
    except MlflowException as error:
        raise UserError(f"init_from=run:{run_id}: MLflow at {uri} does not know this run.") from error
    if "output_dir" not in tags:
        raise UserError(f"init_from=run:{run_id}: the run has no output_dir tag, name its checkpoint file instead.")
    return Path(tags["output_dir"]) / "checkpoints" / "last.ckpt"
