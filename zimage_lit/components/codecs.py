"""Latent codecs: frozen maps between pictures in pixels and the latents that the backbone is trained on.

Both codecs are lazy: the constructor only records the folder, so that an experiment can be put together before its data
are prepared; files are read at the first use. Both run in float32 outside autocast, so that a latent does not depend
on the precision of the training around it.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from zimage_lit.errors import UserError
from zimage_lit.files import read_json

WEIGHTS = "model.safetensors"


class LatentCodec(Protocol):
    """What the stages and the pipeline ask of a codec.

    ``encode`` takes images (B, 3, H, W), float in [-1, 1], H and W multiples of ``downsample``, and returns latents
    (B, channels, H / downsample, W / downsample) float32 of about unit size. ``decode`` goes back, clamped to [-1, 1];
    a gradient of the pictures reaches the latents.
    """

    @property
    def channels(self) -> int: ...

    @property
    def downsample(self) -> int: ...

    def encode(self, images: torch.Tensor) -> torch.Tensor: ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...

    def to(self, device: torch.device | str) -> Self: ...

    def fingerprint(self) -> str: ...


class PatchPCACodec:
    """Linear codec: every patch of pixels is projected on the leading principal components of such patches.

    All channels share ONE scale, which gives the latents an overall standard deviation of 1 and keeps the channels'
    relative sizes: whitening each channel would make the weakest, least visible component as loud as the strongest.

    Args:
        folder: where ``fit`` wrote ``config.json`` and ``model.safetensors``.

    Raises:
        UserError: at the first use, where the folder or one of its files is missing or wrong.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._device = torch.device("cpu")
        self._config: dict[str, Any] | None = None
        self._weights: dict[str, torch.Tensor] | None = None

    @classmethod
    def fit(cls, images: torch.Tensor, folder: str | Path, channels: int = 16, patch: int = 8) -> "PatchPCACodec":
        """Fit in closed form (eigenvectors of the patch covariance, float64) and write the codec to ``folder``.

        Args:
            images: (N, 3, H, W) float in [-1, 1], H and W multiples of ``patch``.
            folder: made if missing; files of the same names are replaced.
            channels: latent channels, at most 3 * patch * patch.
            patch: side of a patch in pixels.

        Raises:
            ValueError: images of another kind or size, more channels than the pictures have independent components.
        """
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}.")
        mean, covariance = _patch_moments(images, patch)
        variances, vectors = torch.linalg.eigh(covariance)  # ascending
        if not 0 < channels <= len(variances) or not variances[-channels] > 1e-12:
            raise ValueError(
                f"channels={channels} is more than these pictures have independent components; "
                f"use fewer channels (1 to {int((variances > 1e-12).sum())}) or more varied pictures."
            )
        components = vectors[:, -channels:].flip(1).T
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        components = components * largest.sign()  # an eigenvector's sign is arbitrary; the files should not be
        scale = variances[-channels:].mean().sqrt()

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": cls.__name__,
            "channels": channels,
            "patch": patch,
            "explained_variance": float(variances[-channels:].sum() / variances.sum()),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {"components": components, "mean": mean, "scale": scale}
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        return cls(folder)

    @property
    def config(self) -> dict[str, Any]:
        if self._config is None:
            self._config = _read_config(self.folder, type(self).__name__, required=("channels", "patch"))
        return self._config

    @property
    def channels(self) -> int:
        return int(self.config["channels"])

    @property
    def downsample(self) -> int:
        return int(self.config["patch"])

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float in [-1, 1] -> (B, channels, H / patch, W / patch) float32.

        Raises:
            ValueError: another shape, or a height or width that is no multiple of the patch.
            UserError: a missing or damaged codec folder.
        """
        weights, patch = self._load(), self.downsample
        _check_images(images, patch)
        with without_autocast(self._device):
            patches = _to_patches(images.to(self._device, torch.float32), patch)  # (B, rows, columns, 3 * patch²)
            latents = torch.einsum("brcp,kp->bkrc", patches - weights["mean"], weights["components"])
            return latents / weights["scale"]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, channels, h, w) -> (B, 3, h * patch, w * patch) float32, clamped to [-1, 1].

        Raises:
            ValueError: another number of channels.
            UserError: a missing or damaged codec folder.
        """
        weights, patch = self._load(), self.downsample
        _check_latents(latents, self.channels)
        with without_autocast(self._device):
            scaled = latents.to(self._device, torch.float32) * weights["scale"]
            # one picture at a time: the rounding of a matrix product may depend on how many rows it has
            tiles = [torch.einsum("bkrc,kp->brcp", one, weights["components"]) for one in scaled.split(1)]
            patches = torch.cat(tiles) + weights["mean"]
            batch, rows, columns, _ = patches.shape
            pixels = patches.view(batch, rows, columns, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
            return pixels.reshape(batch, 3, rows * patch, columns * patch).clamp(-1.0, 1.0)

    def to(self, device: torch.device | str) -> Self:
        """Run on this device from now on; returns itself."""
        self._device = torch.device(device)
        if self._weights is not None:
            self._weights = {name: tensor.to(self._device) for name, tensor in self._weights.items()}
        return self

    def fingerprint(self) -> str:
        """SHA-256 of its files: codecs with the same one give the same latents."""
        return fingerprint(self.folder)

    def _load(self) -> dict[str, torch.Tensor]:
        if self._weights is None:
            pixels = 3 * self.downsample**2
            shapes = {"components": (self.channels, pixels), "mean": (pixels,), "scale": ()}
            weights = _read_tensors(self.folder / WEIGHTS)
            _check_tensors(weights, shapes, self.folder / WEIGHTS)
            self._weights = {name: tensor.to(self._device) for name, tensor in weights.items()}
        return self._weights


class FluxVAECodec:
    """The convolutional autoencoder of Flux and Z-Image: diffusers' ``AutoencoderKL`` from a local folder.

    Latents are (z - shift_factor) * scaling_factor with both numbers from the folder's ``config.json``. The decoder
    always runs in float32, as Z-Image's own repository does, and one picture at a time: a picture then does not
    depend on what it is batched with, and memory does not grow with the batch.

    Args:
        folder: the autoencoder's folder, or a pipeline's folder with the autoencoder in ``vae/``.
        dtype: what the encoder computes in; None is float32. Latents come out float32 either way.

    Raises:
        UserError: at the first use, where a folder, file, class or tensor is missing or wrong.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
        self.folder = Path(folder)
        self.dtype = as_dtype(dtype) or torch.float32
        self._device = torch.device("cpu")
        self._config: dict[str, Any] | None = None
        self._vae: Any = None  # diffusers' AutoencoderKL

    @property
    def config(self) -> dict[str, Any]:
        if self._config is None:
            required = ("latent_channels", "block_out_channels", "scaling_factor")
            self._config = _read_config(self._vae_folder(), "AutoencoderKL", required)
        return self._config

    @property
    def channels(self) -> int:
        return int(self.config["latent_channels"])

    @property
    def downsample(self) -> int:
        return int(2 ** (len(self.config["block_out_channels"]) - 1))  # every block but the last halves the picture

    @torch.no_grad()
    def encode(
        self, images: torch.Tensor, sample: bool = False, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """(B, 3, H, W) float in [-1, 1] -> (B, channels, H / downsample, W / downsample) float32.

        Args:
            images: the pictures.
            sample: draw from the posterior instead of taking its mode.
            generator: the source of that draw; required with ``sample``, so that no draw depends on global state.

        Raises:
            ValueError: another shape, a size that is no multiple of ``downsample``, ``sample`` without a generator.
            UserError: a missing or damaged folder.
        """
        if sample and generator is None:
            raise ValueError("sample=True needs a generator: pass a torch.Generator made from the run's seed.")
        vae = self._load()
        _check_images(images, self.downsample)
        with without_autocast(self._device):
            posterior = vae.encode(images.to(self._device, self.dtype)).latent_dist
            mean = posterior.mean.float()
            if sample:
                assert generator is not None
                noise = torch.randn(mean.shape, generator=generator, device=generator.device)
                mean = mean + posterior.std.float() * noise.to(self._device)
            return (mean - self._shift()) * self.config["scaling_factor"]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, channels, h, w) -> (B, 3, h * downsample, w * downsample) float32, clamped to [-1, 1].

        Raises:
            ValueError: another number of channels.
            UserError: a missing or damaged folder.
        """
        vae = self._load()
        _check_latents(latents, self.channels)
        with without_autocast(self._device):
            z = latents.to(self._device, torch.float32) / self.config["scaling_factor"] + self._shift()
            pictures = [vae.decode(one).sample.clamp(-1.0, 1.0) for one in z.split(1)]
            return torch.cat(pictures)

    def to(self, device: torch.device | str) -> Self:
        """Run on this device from now on; returns itself."""
        self._device = torch.device(device)
        if self._vae is not None:
            self._vae.to(self._device)
        return self

    def fingerprint(self) -> str:
        """SHA-256 of its files: codecs with the same one give the same latents."""
        return fingerprint(self._vae_folder())

    def _vae_folder(self) -> Path:
        return self.folder / "vae" if (self.folder / "vae").is_dir() else self.folder

    def _shift(self) -> float:
        return float(self.config.get("shift_factor") or 0.0)  # older autoencoders have no shift

    def _load(self) -> Any:
        if self._vae is None:
            from diffusers import AutoencoderKL  # takes seconds: only those who need it pay for it

            config, folder = self.config, self._vae_folder()

            with torch.device("meta"):
                vae = AutoencoderKL.from_config(config)
            path, tensors = _read_sharded(folder, "diffusion_pytorch_model")
            _check_tensors(tensors, {name: tuple(value.shape) for name, value in vae.state_dict().items()}, path)
            vae.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
            vae.requires_grad_(False).eval().to(self._device)
            for part in (vae.encoder, vae.quant_conv):
                if part is not None:
                    part.to(self.dtype)
            self._vae = vae
        return self._vae


def fingerprint(folder: str | Path) -> str:
    """SHA-256, as hex, of a folder's files: their relative names, sizes and contents, whatever their times and order.

    Raises:
        UserError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} to take the fingerprint of; check the path.")
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix().encode()
        digest.update(f"{len(name)}:{path.stat().st_size}:".encode() + name)  # lengths keep name and content apart
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _patch_moments(images: torch.Tensor, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (p,) and covariance (p, p) in float64 of all patches, in chunks so that the float64 copy stays small."""
    _check_images(images, patch)
    count = 0
    total = torch.zeros(3 * patch**2, dtype=torch.float64)
    products = torch.zeros(3 * patch**2, 3 * patch**2, dtype=torch.float64)
    for chunk in images.split(256):
        patches = _to_patches(chunk.to("cpu", torch.float64), patch).flatten(0, 2)
        count += len(patches)
        total += patches.sum(0)
        products += patches.T @ patches
    mean = total / count
    return mean, products / count - mean.outer(mean)


def _to_patches(images: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, 3, H, W) -> (B, H / patch, W / patch, 3 * patch * patch); inside a patch: channel, row, column."""
    batch, _, height, width = images.shape
    tiles = images.view(batch, 3, height // patch, patch, width // patch, patch)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3)


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Switch off a surrounding autocast: frozen parts choose their own precision."""
    with torch.autocast(device.type, enabled=False):
        yield


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """``"bfloat16"`` as written in an experiment file, or the dtype itself."""
    if not isinstance(dtype, str):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ValueError(f'dtype "{dtype}" is unknown; use one of {", ".join(known)}.')
    return known[dtype]


def _check_images(images: torch.Tensor, multiple: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images must have the shape (B, 3, H, W) with B > 0, got {tuple(images.shape)}.")
    height, width = images.shape[-2:]
    if height % multiple or width % multiple:
        raise ValueError(f"The pictures are {width}x{height}; width and height must be multiples of {multiple}.")


def _check_latents(latents: torch.Tensor, channels: int) -> None:
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"latents must have the shape (B, {channels}, h, w), got {tuple(latents.shape)}.")


def _read_config(folder: Path, class_name: str, required: tuple[str, ...]) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} to read a {class_name} from; prepare or download it first.")
    path = folder / "config.json"
    config = read_json(path)
    if config.get("_class_name") != class_name:
        found = config.get("_class_name")
        raise UserError(f'{path} says _class_name "{found}", but a {class_name} is needed here; check the folder.')
    for key in required:
        if key not in config:
            raise UserError(f'{path} lacks the key "{key}" of a {class_name}; write or download it again.')
    return config


def _read_sharded(folder: Path, stem: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The tensors of ``stem.safetensors`` or of all the shards its index names, and the file to name in errors."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        path = folder / f"{stem}.safetensors"
        return path, _read_tensors(path)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f'{index} lacks the "weight_map" of a safetensors index; download it again.')
    shards = sorted(set(weight_map.values()))
    return index, {name: tensor for shard in shards for name, tensor in _read_tensors(folder / shard).items()}


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing; write or download the whole folder again.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); write or download it again.") from None


def _check_tensors(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f'{path} lacks the tensor "{name}"; write or download it again.')
        if tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape)
            raise UserError(f'{path}: the tensor "{name}" has the shape {found}, config.json asks for {shape}.')
    for name in tensors:
        if name not in shapes:
            raise UserError(f'{path} holds the tensor "{name}", which its config.json has no place for.')
