"""Where a stage's backbone comes from: fresh weights, an exported folder, a checkpoint, or an MLflow run."""

import pickle
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
        raise UserError(f"init_from={path}: there is no such checkpoint.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"init_from={path}: the file cannot be read as a checkpoint ({error}).") from error
    for name, state in checkpoint.get("callbacks", {}).items():
        if name.split("{")[0] == "EMA" and state["average"]:
            return state["average"]
    prefix = "backbone."
    weights = {
        name.removeprefix(prefix): weight
        for name, weight in checkpoint.get("state_dict", {}).items()
        if name.startswith(prefix)
    }
    if not weights:
        raise UserError(f"init_from={path}: the checkpoint holds no backbone.")
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
    """The checkpoint of the run that MLflow knows as `run_id`: its `output_dir` tag says where it was written."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    from zimage_lit.tracking import default_tracking_uri

    try:
        run = MlflowClient(default_tracking_uri()).get_run(run_id)
    except MlflowException as error:
        raise UserError(f"init_from=run:{run_id}: MLflow at {default_tracking_uri()} does not know this run.") from error
    if "output_dir" not in run.data.tags:
        raise UserError(f"init_from=run:{run_id}: the run has no output_dir tag, name its checkpoint file instead.")
    return Path(run.data.tags["output_dir"]) / "checkpoints" / "last.ckpt"
