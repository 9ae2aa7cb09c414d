"""What an experiment says about reinforcement learning, as plain settings."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from zimage_lit.errors import UserError, at_least_one
from zimage_lit.objectives import transitions
from zimage_lit.objectives.timesteps import TimestepLaw
from zimage_lit.sampling import check_guidance, check_schedule, sigmas
from zimage_lit.stages.snapshots import SnapshotKind

METHODS = ("grpo", "nft")
LEVELS = {"cps": 0.8, "flow_sde": 0.7, "dance_sde": 0.3}  # what the kernels' sources draw with


@dataclass
class GroupRolloutSettings:
    """How groups of pictures are drawn."""

    num_inference_steps: int = 10  # network evaluations of a picture; half of what serving takes will do
    shift: float = 3.0  # more of the steps at high noise; static, as in serving
    guidance_scale: float = 1.0  # 1 = none, and alone possible with nft; above, the guided velocity is what is learnt
    cfg_start: float = 0.0  # no guidance before this t (0 = noise, 1 = clean)
    group_size: int = 12  # pictures of a prompt that are compared with each other
    same_noise: bool = (
        False  # grpo: the pictures of a group begin from one noise, and the window alone makes them differ
    )
    batch_size: int = 64  # pictures in one forward, in drawing and in learning alike

    def __post_init__(self) -> None:
        key = "model.init_args.rollout"
        check_schedule(self.num_inference_steps, self.shift)
        check_guidance(self.guidance_scale, cfg_start=self.cfg_start)
        if self.cfg_start and self.guidance_scale == 1:
            raise UserError(f"{key}.cfg_start={self.cfg_start} means nothing without guidance: set it to 0.")
        if self.group_size < 2:
            raise UserError(f"{key}.group_size must be at least 2 to compare pictures, not {self.group_size}.")
        at_least_one(f"{key}.batch_size", self.batch_size)

    @property
    def grid(self) -> Tensor:
        """Noise levels, (num_inference_steps + 1,) float32."""
        return sigmas(self.num_inference_steps, self.shift)


@dataclass
class WindowSettings:
    """The steps of a roll-out that draw noise and are learnt from; the others are Euler's. Its place is drawn anew for
    each roll-out, one for all groups on all devices: pictures with windows of their own could not be compared."""

    steps: int = 3  # so many, one after the other
    first: int = 0  # earliest step at which it may begin; 0 = the noisiest
    last: int = 2  # latest step at which it may begin; as `first`: it stays there

    def __post_init__(self) -> None:
        at_least_one("model.init_args.grpo.window.steps", self.steps)
        if not 0 <= self.first <= self.last:
            raise UserError(
                f"model.init_args.grpo.window needs 0 <= first <= last, not first={self.first} and last={self.last}."
            )

    def place(self, source: torch.Generator) -> range:
        """The window of one roll-out."""
        start = int(torch.randint(self.first, self.last + 1, (), generator=source))
        return range(start, start + self.steps)


@dataclass
class PolicySettings:
    """method=grpo: a policy gradient on the stochastic steps of a roll-out. What the choices are: objectives/policy.py
    and objectives/transitions.py."""

    transition: Literal["cps", "flow_sde", "dance_sde"] = "cps"  # how these steps draw noise
    level: float | None = None  # how much; null: 0.8 with cps, 0.7 with flow_sde, 0.3 with dance_sde
    window: WindowSettings = field(default_factory=WindowSettings)
    reduction: Literal["mean", "sum"] = "mean"  # of densities over a picture's elements, which clip_range depends on
    clip: Literal["ppo", "dppo"] = "ppo"  # ppo: ratios are cut; dppo: pictures whose density has moved far are masked
    # ppo: how far a ratio may go from 1; dppo: how far a density may move, as KL divergence; acts only with more than
    # one update of a roll-out (model.init_args.minibatches, epochs)
    clip_range: float = 1e-5
    ratio: Literal["plain", "guard"] = "plain"  # guard: normalised, so that it does not drift; published with 2e-6

    def __post_init__(self) -> None:
        key = "model.init_args.grpo"
        choices = {
            "transition": tuple(LEVELS),
            "reduction": ("mean", "sum"),
            "clip": ("ppo", "dppo"),
            "ratio": ("plain", "guard"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise UserError(f"{key}.{name} must be one of {', '.join(values)}, not {getattr(self, name)}.")
        transitions.check_transition(self.transition, self.noise_level)
        if not 0 < self.clip_range < math.inf:
            raise UserError(f"{key}.clip_range must be more than 0, not {self.clip_range}.")

    @property
    def noise_level(self) -> float:
        return LEVELS[self.transition] if self.level is None else self.level


@dataclass
class ForwardProcessSettings:
    """method=nft: pictures are drawn without noise in between, and noised again to learn from them, see
    objectives/forward_process.py. The policy that draws lags behind the one in training."""

    mixing: float = 1.0  # b, in (0, 1]: how far the policy is thought to have gone; several rewards: 0.1
    times: int = 3  # noised copies of a picture in one pass
    timesteps: TimestepLaw = field(default_factory=lambda: TimestepLaw("uniform", shift=3.0))  # how noisy they are
    lag_flat: int = 0  # roll-outs in which the policy that draws is the one in training
    lag_rate: float = 0.001  # then it keeps so much more of itself after each roll-out
    lag_largest: float = 0.5  # and so much at most, in [0, 1)

    def __post_init__(self) -> None:
        key = "model.init_args.nft"
        if not 0 < self.mixing <= 1:
            raise UserError(f"{key}.mixing must lie in (0, 1], not {self.mixing}.")
        at_least_one(f"{key}.times", self.times)
        if self.lag_flat < 0 or not 0 <= self.lag_rate < math.inf or not 0 <= self.lag_largest < 1:
            raise UserError(
                f"{key} needs lag_flat and lag_rate of 0 or more and lag_largest in [0, 1), not {self.lag_flat}, "
                f"{self.lag_rate} and {self.lag_largest}."
            )


@dataclass
class AdvantageSettings:
    """How scores become advantages, for each reward by itself; these are added with the rewards' weights."""

    std: Literal["group", "global"] = "group"  # by whose spread: the group's, or that of all pictures on the device
    clip: float = 5.0  # largest advantage

    def __post_init__(self) -> None:
        if self.std not in ("group", "global"):
            raise UserError(f"model.init_args.advantage.std must be group or global, not {self.std}.")
        if not 0 < self.clip < math.inf:
            raise UserError(f"model.init_args.advantage.clip must be more than 0, not {self.clip}.")


@dataclass
class PenaltySettings:
    """What it costs to leave the weights that the run begins with."""

    weight: float = 0.0  # 0 = nothing, and no reference is kept
    # velocity: mean squared difference; latent: KL divergence of a step's density, with grpo.reduction; grpo alone
    space: Literal["velocity", "latent"] = "velocity"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise UserError(f"model.init_args.kl.weight must be 0 or more, not {self.weight}.")
        if self.space not in ("velocity", "latent"):
            raise UserError(f"model.init_args.kl.space must be velocity or latent, not {self.space}.")


def snapshots_of(method: str, penalty: PenaltySettings) -> dict[str, SnapshotKind]:
    """The earlier weights that a method and its penalty need."""
    kinds: dict[str, SnapshotKind] = {"old_policy": "follows"} if method == "nft" else {}
    return kinds | ({"reference": "fixed"} if penalty.weight else {})


def check_method(method: str, rollout: GroupRolloutSettings, policy: PolicySettings, penalty: PenaltySettings) -> None:
    """UserError for an unknown method, and for settings that do not go with it."""
    key = "model.init_args"
    if method not in METHODS:
        raise UserError(f"{key}.method must be one of {', '.join(METHODS)}, not {method}.")
    if method == "nft":
        wrong = {
            f"rollout.guidance_scale={rollout.guidance_scale}": ("1", rollout.guidance_scale != 1),
            "rollout.same_noise=true": ("false", rollout.same_noise),
            "kl.space=latent": ("velocity", penalty.space == "latent"),
        }
        for given, (cure, is_wrong) in wrong.items():
            if is_wrong:
                raise UserError(
                    f"{key}.{given} does not go with method=nft, which draws without guidance and without noise in "
                    f"between: set it to {cure}, or method=grpo."
                )
        return
    window, steps = policy.window, rollout.num_inference_steps
    if window.last + window.steps >= steps:
        raise UserError(
            f"{key}.grpo.window must end before the last of rollout.num_inference_steps={steps} steps, which draws no "
            f"noise: {window.steps} steps can begin at {steps - 1 - window.steps} at the latest, not at {window.last}."
        )
