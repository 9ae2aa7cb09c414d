"""zimage-lit: the open training platform for Z-Image-class image models."""

__version__ = "0.1.0"
