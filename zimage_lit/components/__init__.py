"""Frozen parts behind small protocols: latent codecs and text encoders, read from local folders at first use."""

from zimage_lit.components.codecs import FluxVAECodec, LatentCodec, PatchPCACodec, fingerprint
from zimage_lit.components.text_encoders import Qwen3TextEncoder, TextEncoder, build_tiny_qwen3

__all__ = [
    "FluxVAECodec",
    "LatentCodec",
    "PatchPCACodec",
    "Qwen3TextEncoder",
    "TextEncoder",
    "build_tiny_qwen3",
    "fingerprint",
]
