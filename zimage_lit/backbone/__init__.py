"""The S3-DiT backbone: one network class shared by every stage."""

from zimage_lit.backbone.config import S3DiTConfig
from zimage_lit.backbone.model import S3DiT

__all__ = ["S3DiT", "S3DiTConfig"]
