"""What a reward is: a Lightning callback that looks at pictures and says how good each one is.

A user's reward is a class like this in a file of their own, named in the experiment by its class path:

    import torch
    from zimage_lit.rewards import RewardCallback

    class Warmth(RewardCallback):
        def score(self, images, prompts, metadata):
            return torch.stack([(image[0].float() - image[2].float()).mean() / 255 for image in images])
"""

import hashlib
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from zimage_lit.config import snake_case
from zimage_lit.errors import UserError, at_least_one

Metadata = Mapping[str, Any]
Kind = Literal["pointwise", "groupwise", "pairwise"]
# Settings that every reward has: they say what becomes of a score, not which score a picture gets.
SETTINGS = ("weight", "held_out", "required", "name", "batch_size", "time_limit", "invalid_limit", "device")
PLAIN = (str, int, float, list, tuple, dict, Path)  # what the version of a reward can be told from


class RewardCallback(Callback):
    """A reward model: subclass it, implement `score`, name the class in `trainer.callbacks`.

    Each setting is an argument of the constructor and an attribute of the class; None stands for what the class says.

    weight: of this reward's advantages (or of its value, where it is differentiated) among the others'; below 0, less
        of it is better.
    held_out: whether it is only logged and recorded, and never weighs.
    required: whether a call that raises or takes too long stops the run; else its pictures count as not judged.
    name: in logs (`reward/<name>`) and records; none: that of the class, in small letters, without Reward.
    batch_size: pictures (or pairs) in one call; a group that has to be seen whole is never cut.
    time_limit: seconds that one call may take; none: any.
    invalid_limit: share of pictures without a judgement above which the run stops.
    device: where its networks compute; none: the device of the training.

    Raises UserError for settings that make no sense.
    """

    kind: Kind = "pointwise"  # groupwise: `score` gets one whole group (the pictures of one prompt) a call
    differentiable: bool = False  # `score` gets float pictures in [-1, 1] and returns values with a gradient
    weight: float = 1.0
    held_out: bool = False
    required: bool = True
    name: str = ""
    batch_size: int = 64
    time_limit: float | None = None
    invalid_limit: float = 0.5
    device: str | None = None
    _prepared: bool = False

    def __init__(
        self,
        weight: float | None = None,
        held_out: bool | None = None,
        required: bool | None = None,
        name: str | None = None,
        batch_size: int | None = None,
        time_limit: float | None = None,
        invalid_limit: float | None = None,
        device: str | None = None,
    ) -> None:
        given = (weight, held_out, required, name, batch_size, time_limit, invalid_limit, device)
        for key, value in zip(SETTINGS, given, strict=True):
            if value is not None:
                setattr(self, key, value)
        self.name = self.name or snake_case(type(self).__name__).removesuffix("_reward")
        check_settings(self)

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """How good each picture is: (B,), larger is better, NaN for "could not judge" (left out, never counted as 0).

        images: uint8 (3, H, W) RGB of any sizes, on this reward's device; of a differentiable reward float32 in
        [-1, 1]. prompts: what was asked for. metadata: what the data set knows of each prompt, perhaps nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement score(images, prompts, metadata) -> (B,).")

    def applies_to(self, prompt: str, metadata: Metadata) -> bool:
        """Whether this reward has anything to say about a prompt; where not, its pictures are not "not judged"."""
        return True

    def load(self) -> None:
        """Read what is too large for the constructor; called once, in each process, before the first score."""

    @property
    def version(self) -> str:
        """What a record calls this reward: another code or other settings of the class have another version."""
        return f"{type(self).__module__}.{type(self).__qualname__}-{digest_of(self)}"

    @property
    def state_key(self) -> str:
        """Under which a checkpoint holds what a reward remembers, if it does."""
        return f"{type(self).__qualname__}[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.prepare(trainer.strategy.root_device)

    def prepare(self, device: torch.device | str) -> None:
        """Load what there is to load and put this reward's networks, frozen, on its own device or else on `device`."""
        if self._prepared:
            return
        self.load()
        self.device = self.device or str(device)
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.requires_grad_(False).eval().to(self.device)
        self._prepared = True


class PairwiseReward(RewardCallback):
    """A reward that compares two pictures of one prompt: a picture's score is its mean share of wins in its group.

    Implement `compare`. Each pair is shown in both orders and its two results are averaged, for many a judge likes the
    first of two better; `both_orders: false` halves the calls.
    """

    kind: Kind = "pairwise"
    both_orders: bool = True

    def __init__(self, both_orders: bool | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if both_orders is not None:
            self.both_orders = both_orders

    def compare(
        self,
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> Tensor:
        """How likely the first picture of each pair is the better one: (P,) in [0, 1], NaN for "could not judge"."""
        raise NotImplementedError(f"{type(self).__name__} must implement compare(first, second, prompts, metadata).")


def win_rates(number: int, pairs: Sequence[tuple[int, int]], wins: Tensor) -> Tensor:
    """Mean share of wins of each of `number` pictures, (number,); NaN for one of which no pair was judged.

    pairs: (first, second) of each comparison.   wins: (P,) that the first one won, in [0, 1]; NaN: not judged.
    """
    total, count = torch.zeros(2, number, dtype=torch.float32)
    for (first, second), won in zip(pairs, wins.tolist(), strict=True):
        if not math.isnan(won):
            total[first] += won
            total[second] += 1 - won
            count[[first, second]] += 1
    return total / count  # 0 / 0 is NaN


def pairs_of(number: int, both_orders: bool) -> list[tuple[int, int]]:
    """Every pair of a group's pictures, once or in both orders."""
    pairs = list(combinations(range(number), 2))
    return pairs + [(second, first) for first, second in pairs] if both_orders else pairs


def find_rewards(trainer: Any) -> list[RewardCallback]:
    """The rewards among a trainer's callbacks, in their order. UserError where two have one name."""
    rewards = [callback for callback in trainer.callbacks if isinstance(callback, RewardCallback)]
    check_names(rewards)
    return rewards


def check_names(rewards: Iterable[RewardCallback]) -> None:
    """UserError where two rewards have one name, or one has none."""
    seen: set[str] = set()
    for reward in rewards:
        if not reward.name:
            raise UserError(
                f"{type(reward).__name__} has no name: call super().__init__(**settings) in its constructor."
            )
        if reward.name in seen:
            raise UserError(
                f"two rewards are called {reward.name}: give one of them a name of its own (init_args.name)."
            )
        seen.add(reward.name)


def check_settings(reward: RewardCallback) -> None:
    """UserError for the first setting that makes no sense."""
    place = f"the reward {reward.name}"
    at_least_one(f"{place}: batch_size", reward.batch_size)
    if not math.isfinite(reward.weight):
        raise UserError(f"{place}: weight must be a finite number, not {reward.weight}.")
    if reward.time_limit is not None and not reward.time_limit > 0:
        raise UserError(f"{place}: time_limit must be more than 0 seconds (or null for none), not {reward.time_limit}.")
    if not 0 <= reward.invalid_limit <= 1:
        raise UserError(f"{place}: invalid_limit is a share and must lie in [0, 1], not {reward.invalid_limit}.")
    if not re.fullmatch(r"[\w.\-]+", reward.name):
        raise UserError(f"{place}: name may hold letters, digits, dots, dashes and underscores only.")


def digest_of(reward: RewardCallback) -> str:
    """Eight hexadecimal digits that depend on the file of a reward's class and on the arguments it was made with."""
    kind: Any = type(reward)
    known = {name for name in constructor_arguments(kind) if name not in SETTINGS}
    own = {
        name: value
        for name, value in vars(reward).items()
        if name in known and (isinstance(value, PLAIN) or is_dataclass(value))
    }
    text = json.dumps([source_of(kind), own], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@cache
def source_of(reward_class: Any) -> str:
    """The text of the class's whole file, for what it calls there decides on its scores as well."""
    try:
        return inspect.getsource(inspect.getmodule(reward_class) or reward_class)
    except (OSError, TypeError):  # typed in by hand, it has no file
        return ""


@cache
def constructor_arguments(reward_class: Any) -> frozenset[str]:
    constructors = [vars(base)["__init__"] for base in reward_class.__mro__ if "__init__" in vars(base)]
    return frozenset(name for function in constructors for name in inspect.signature(function).parameters)
