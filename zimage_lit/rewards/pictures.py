"""Pictures in the forms that rewards need: arrays, PIL, PNG in base64, a hash."""

import base64
import hashlib
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def as_array(image: Tensor) -> np.ndarray:
    """uint8 (3, H, W) -> uint8 (H, W, 3), contiguous."""
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def as_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> RGB."""
    return Image.fromarray(as_array(image))


def as_png(image: Tensor) -> str:
    """uint8 (3, H, W) -> the bytes of a PNG file in base64."""
    buffer = io.BytesIO()
    as_pil(image).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_png(text: str) -> Tensor:
    """The inverse of `as_png`. Raises ValueError for anything but a PNG in base64."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture must be a PNG file in base64 ({error})") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()  # sums go over it in the usual order


def quantised(image: Tensor) -> Tensor:
    """float (3, H, W) in [-1, 1] -> uint8, as a pipeline writes it."""
    return ((image.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def picture_hash(image: Tensor) -> str:
    """SHA-256, as hex, of a uint8 (3, H, W) picture's "<width>x<height>\\n" and its RGB bytes, row by row."""
    pixels = as_array(image)
    digest = hashlib.sha256(f"{pixels.shape[1]}x{pixels.shape[0]}\n".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()
