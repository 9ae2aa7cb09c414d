"""LightningDataModules over litdata, and the embedded TinyWorld data set."""

from importlib import import_module
from typing import Any

# Loaded at first use: torch, lightning and litdata take seconds to import, and `lightning run --list` needs none of
# them.
_HOMES = {
    "EditingDataModule": "data_modules.text_to_image",
    "MixtureDataModule": "data_modules.mixture",
    "PreferenceDataModule": "data_modules.text_to_image",
    "PromptDataModule": "data_modules.text_to_image",
    "TextToImageDataModule": "data_modules.text_to_image",
    "TinyWorldDataModule": "data_modules.tinyworld.datamodule",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
