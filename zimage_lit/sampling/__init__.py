"""Solvers, schedules and guidance: plain functions, used by stages and pipeline alike."""

from zimage_lit.sampling.sample import noises, sample
from zimage_lit.sampling.schedules import sigmas

__all__ = ["noises", "sample", "sigmas"]
