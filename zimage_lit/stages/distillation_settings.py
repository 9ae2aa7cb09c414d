"""What an experiment says about a distillation, as plain settings; those of rewards are in `reward_terms.py`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from zimage_lit.errors import UserError, at_least_one
from zimage_lit.objectives.timesteps import RenoiseLaw
from zimage_lit.sampling import check_schedule, sigmas
from zimage_lit.sampling.guidance import check_guidance


@dataclass
class RolloutSettings:
    """How the student will be served, and is therefore asked in training."""

    num_inference_steps: int = 8  # network evaluations of a picture
    shift: float = 3.0  # more of the steps at high noise; static
    sampler: Literal["euler", "renoise"] = "euler"  # renoise: the clean sample of a step, noised anew for the next one

    def __post_init__(self) -> None:
        check_schedule(self.num_inference_steps, self.shift)
        if self.sampler not in ("euler", "renoise"):
            raise UserError(f"model.init_args.rollout.sampler must be euler or renoise, not {self.sampler}.")

    @property
    def grid(self) -> Tensor:
        """Noise levels 1 - t from 1 to 0, (num_inference_steps + 1,)."""
        return sigmas(self.num_inference_steps, self.shift)


@dataclass
class ObjectiveSettings:
    """What pulls the student towards the guided teacher.

    coupled: one term, as in DMD2. decoupled: distribution matching and guidance as two, each with times and noise of
    its own; its guidance acts more strongly at the same scale, so the scale has to be found anew.
    """

    name: Literal["decoupled", "coupled"] = "decoupled"
    guidance_scale: float = 4.0  # the teacher's; 1 = none
    cfg_start: float = 0.0  # no guidance at noise of an earlier t, nor for steps of the student from one (0 = noise)
    clamp: float = 0.1  # least distance by which a term is divided
    matching: RenoiseLaw = field(default_factory=RenoiseLaw)  # noise at which student and teacher are compared
    guidance: RenoiseLaw | None = None  # decoupled: noise at which guidance acts; null: cleaner than the student's step
    fake: RenoiseLaw = field(default_factory=RenoiseLaw)  # noise at which the fake score learns
    mean_variance: float = 0.0  # weight of matching mean and variance of the data's latents; 0 = none
    data: float = 0.0  # weight of the velocity's loss on the data's pictures, at the times of the rollout; 0 = none
    ida: float | None = None  # share of its weights that the fake score keeps, the rest is the student's; null: all

    def __post_init__(self) -> None:
        key = "model.init_args.objective"
        check_guidance(self.guidance_scale, cfg_start=self.cfg_start)
        if self.name not in ("decoupled", "coupled"):
            raise UserError(f"{key}.name must be decoupled or coupled, not {self.name}.")
        if self.name == "coupled" and self.guidance is not None:
            raise UserError(f"{key}.guidance is of name=decoupled alone: set it to null, or change the name.")
        if not self.clamp > 0:
            raise UserError(f"{key}.clamp must be more than 0, not {self.clamp}.")
        for name in ("mean_variance", "data"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{key}.{name} must be 0 or more, not {getattr(self, name)}.")
        if self.ida is not None and not 0 <= self.ida <= 1:
            raise UserError(f"{key}.ida must lie in [0, 1] or be null, not {self.ida}.")


@dataclass
class DynamicGuidanceSettings:
    """DynaDG: at first the teacher takes over a share of what the fake score has learnt, and so is near the student."""

    start: float = 0.375  # that share at first; the authors' LoRA scale of 0.75, where the fake score's is 2
    steps: int = 10000  # of the student, until none is left

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1:
            raise UserError(f"model.init_args.dynamic_guidance.start must lie in [0, 1], not {self.start}.")
        at_least_one("model.init_args.dynamic_guidance.steps", self.steps)
