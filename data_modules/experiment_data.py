"""`lightning run data`: what experiments learn from is made before any of them is trained.

For data that a data module makes by itself, TinyWorld: a training would do the same at its first start, while its
accelerators wait. Raw data of one's own go through `lightning run prepare`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_lit.config import compose, settings_from
from zimage_lit.errors import UserError
from zimage_lit.validate import check_component, instantiate


@dataclass(frozen=True)
class DataSettings:
    """Settings of `lightning run data`."""

    experiments: list[str]  # whose data are made, each in a folder of its name
    output: str = "data"  # folder of these folders


def data_task(settings: dict[str, Any]) -> None:
    """Make the data of every experiment in `output/<its name>`, and leave alone what is made already.

    Raises UserError for an experiment whose data module makes nothing, before anything is made.
    """
    asked = settings_from(DataSettings, settings)
    if not asked.experiments:
        raise UserError("experiments is empty: name at least one whose data are to be made.")
    for module in [data_module(name, Path(asked.output) / name) for name in asked.experiments]:
        module.prepare_data()


def data_module(experiment: str, folder: Path) -> Any:
    """An experiment's data module, for data in `folder`; UserError where it does not make its data by itself."""
    from lightning import LightningDataModule

    config = compose(experiment, [f"data.init_args.data_dir={folder}"])
    check_component("data", config["data"], partial=False)
    module = instantiate("data", LightningDataModule, config["data"])
    if type(module).prepare_data is LightningDataModule.prepare_data:
        raise UserError(
            f"{experiment} reads data that are there ({type(module).__name__}): make them with lightning run prepare."
        )
    return module
