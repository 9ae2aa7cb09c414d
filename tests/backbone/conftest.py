"""Small S3-DiTs beside diffusers' network with the same weights, and batches to feed both."""

from typing import Any, TypeVar

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from zimage_lit.backbone import S3DiT, S3DiTConfig

SMALL: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "cap_feat_dim": 48,
    "axes_dims": [4, 6, 6],
}
# The published head size and axes; wider than the conditioning's 256.
WIDE: dict[str, Any] = {
    "dim": 384,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 80,
    "axes_dims": [32, 48, 48],
}


Network = TypeVar("Network", bound=nn.Module)


class Twins:
    """Builders of networks and batches that the tests of this folder share."""

    SMALL, WIDE = SMALL, WIDE

    @staticmethod
    def randomize(model: Network, seed: int = 0) -> Network:
        """Weights of a size that lets every part of the network matter: no gate, scale or bias is near zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                matrix = parameter.ndim > 1 and len(parameter) > 1
                parameter.copy_(noise * parameter.shape[-1] ** -0.5 if matrix else 0.5 + 0.3 * noise)
        return model

    @classmethod
    def ours(cls, seed: int = 0, **sizes: Any) -> S3DiT:
        return cls.randomize(S3DiT(S3DiTConfig(**{**SMALL, **sizes})), seed)

    @classmethod
    def theirs(cls, seed: int = 0, **sizes: Any) -> ZImageTransformer2DModel:
        """diffusers' network; its parameters come in another order, so equal seeds are not equal weights."""
        network: Any = ZImageTransformer2DModel(**{"axes_lens": [1536, 512, 512], **SMALL, **sizes})
        return cls.randomize(network, seed)

    @classmethod
    def both(cls, **sizes: Any) -> tuple[S3DiT, ZImageTransformer2DModel]:
        ours, theirs = cls.ours(**sizes), cls.theirs(**sizes)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        return ours, theirs

    @staticmethod
    def batch(
        sizes: list[tuple[int, int]], lengths: list[int], features: int = 48, seed: int = 1
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Latents (16, H, W), times (B,) and captions (L, features)."""
        generator = torch.Generator().manual_seed(seed)
        latents = [torch.randn(16, *size, generator=generator) for size in sizes]
        captions = [torch.randn(length, features, generator=generator) for length in lengths]
        return latents, torch.rand(len(sizes), generator=generator), captions

    @staticmethod
    def run_theirs(
        model: ZImageTransformer2DModel, latents: list[Tensor], t: Tensor, captions: list[Tensor]
    ) -> list[Tensor]:
        frames = model([latent.unsqueeze(1) for latent in latents], t, captions, return_dict=False)[0]
        return [frame.squeeze(1) for frame in frames]

    @staticmethod
    def error(actual: Tensor, expected: Tensor) -> float:
        """|actual - expected| / |expected|; 0 where both are zero."""
        difference, size = (actual - expected).norm().item(), expected.norm().item()
        return difference / size if size else (0.0 if difference == 0 else float("inf"))


@pytest.fixture(scope="session")
def twins() -> type[Twins]:
    return Twins
