"""Solvers, schedules and guidance: plain functions, used by stages and pipeline alike."""

from zimage_lit.sampling.guidance import check_guidance
from zimage_lit.sampling.sample import LARGEST_SEED, check_solver, noises, sample
from zimage_lit.sampling.schedules import check_schedule, sigmas

__all__ = ["LARGEST_SEED", "check_guidance", "check_schedule", "check_solver", "noises", "sample", "sigmas"]
