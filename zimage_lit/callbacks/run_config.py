"""Keep with every run what it was run with: its settings, the environment, the code's commit."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from zimage_lit import __version__
from zimage_lit.config import setting_tags, to_yaml
from zimage_lit.errors import UserError
from zimage_lit.files import write_atomically
from zimage_lit.run_folder import write_status


class RunConfig(Callback):
    """Writes `<output_dir>/config.yaml` and `run.json`, and hands settings and environment to the loggers.

    A logger takes part by having `log_text(text, artifact_path)` and `log_tags(dict[str, str])`.

    Args:
        output_dir: folder of the run; made here.
        config: the composed settings.
    """

    def __init__(self, output_dir: str, config: dict[str, Any]) -> None:
        self.output_dir = Path(output_dir)
        self.config = config

    @rank_zero_only
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            write_atomically(self.output_dir / "config.yaml", to_yaml(self.config))
            write_status(self.output_dir, "running", step=trainer.global_step)

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tags = environment(trainer.strategy.root_device) | git_state(Path.cwd())
        tags["output_dir"] = str(self.output_dir.absolute())
        tags |= setting_tags(compared_settings(self.config))
        datamodule = getattr(trainer, "datamodule", None)
        info = datamodule.dataset_info() if datamodule and hasattr(datamodule, "dataset_info") else None
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):
                logger.log_text(to_yaml(self.config), "config/config.yaml")
            if hasattr(logger, "log_tags"):
                logger.log_tags(tags)
            if info and hasattr(logger, "log_dataset"):
                logger.log_dataset(info["name"], info["fingerprint"], info["path"])

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        stopped = isinstance(exception, KeyboardInterrupt | SystemExit)
        try:
            write_status(self.output_dir, "stopped" if stopped else "failed", step=trainer.global_step)
        except UserError as error:  # a full disk may be what ends the run: its own message must not be replaced
            rank_zero_warn(str(error))


def compared_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What runs are told apart by in a table: the stage's own settings, batch size, steps and seed.

    Tags, not parameters: MLflow writes a run's parameters over every picture, and a dozen push the next run's picture
    out of sight. All settings stand in config.yaml.
    """
    stage, data = (config[section].get("init_args") or {} for section in ("model", "data"))
    return {
        **{key: value for key, value in stage.items() if not (isinstance(value, dict) and "class_path" in value)},
        "batch_size": data.get("batch_size"),
        "max_steps": config["trainer"].get("max_steps"),
        "seed": config["seed_everything"],
    }


def environment(device: torch.device) -> dict[str, str]:
    """Versions and machine, as tags."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "zimage_lit": __version__,
        "platform": platform.platform(),
        "device": name,
    }


def git_state(folder: Path) -> dict[str, str]:
    """Commit of the repository around `folder` and whether tracked files differ from it; {} where there is none."""
    commit = git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changes = git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"git.commit": commit, "git.dirty": str(bool(changes)).lower()}


def git(folder: Path, *arguments: str) -> str | None:
    """git's answer, None where git or a repository (with a commit) is missing."""
    try:
        answer = subprocess.run(
            ["git", *arguments], check=False, cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
