"""One reward's judgement of a batch: cut into calls, each checked, timed and, where it fails, named."""

import math
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from zimage_lit.errors import UserError
from zimage_lit.rewards.contract import Metadata, PairwiseReward, RewardCallback, pairs_of, win_rates

# A run is not stopped for a handful of pictures: the share of those without a judgement is taken over about the last
# WINDOW pictures, and over no fewer than AT_LEAST.
WINDOW, AT_LEAST = 256, 32
T = TypeVar("T")


class Judge:
    """One reward, called as its settings say. Holds what must be remembered between calls: the share of failures."""

    def __init__(self, reward: RewardCallback) -> None:
        self.reward = reward
        self.clock = TimeLimit()
        self.recent: deque[tuple[int, int]] = deque()  # (pictures without a judgement, pictures) of the last calls

    def __call__(
        self,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        groups: Sequence[Sequence[int]] | None,
    ) -> Tensor:
        """Scores (B,) float32 on the CPU, NaN where there is no judgement.   groups: places of each group's pictures.

        Raises UserError for a required reward that fails, a result of the wrong form, and too many failures.
        """
        parts = self.parts(len(images), groups)
        scores = torch.full((len(images),), math.nan, dtype=torch.float32)
        for places in parts:
            chosen = take(images, places), take(prompts, places), take(metadata, places)
            if isinstance(self.reward, PairwiseReward):
                scores[places] = self.win_rates(*chosen)
            else:
                scores[places] = self.call(self.reward.score, len(places), *chosen)
        shown = [place for places in parts for place in places]
        self.count(int(scores[shown].isnan().sum()), len(shown))
        return scores

    def parts(self, number: int, groups: Sequence[Sequence[int]] | None) -> list[list[int]]:
        """The places of the pictures of each call; of a pairwise reward those that have another to compare with."""
        if self.reward.kind == "pointwise":
            size = self.reward.batch_size
            return [list(range(start, min(start + size, number))) for start in range(0, number, size)]
        if groups is None:
            raise UserError(
                f"the reward {self.reward.name} is {self.reward.kind}, and what asks for its scores knows no groups: "
                "use a pointwise reward here."
            )
        fewest = 2 if self.reward.kind == "pairwise" else 1  # a picture by itself is not one that failed
        return [list(group) for group in groups if len(group) >= fewest]

    def win_rates(self, images: list[Tensor], prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Of one group, its pairs in calls of `batch_size`."""
        reward = self.reward
        assert isinstance(reward, PairwiseReward)
        pairs = pairs_of(len(images), reward.both_orders)
        wins = []
        for start in range(0, len(pairs), reward.batch_size):
            part = pairs[start : start + reward.batch_size]
            first, second = [pair[0] for pair in part], [pair[1] for pair in part]
            shown = take(images, first), take(images, second), take(prompts, first), take(metadata, first)
            wins.append(self.call(reward.compare, len(part), *shown))
        return win_rates(len(images), pairs, torch.cat(wins) if wins else torch.zeros(0))

    def call(self, function: Callable[..., Tensor], number: int, *arguments: Any) -> Tensor:
        """The function's `number` values, or NaN where it failed and may."""
        try:
            result = self.clock.call(self.reward.time_limit, lambda: without_gradient(function, *arguments))
        except Exception as error:
            message = f"the reward {self.reward.name} failed ({told(error)})"
            if self.reward.required:
                raise UserError(
                    f"{message}: mend it, or give it required: false, and pictures that it fails at are left out."
                ) from error
            warnings.warn(f"{message}: {number} of its judgements are missing", stacklevel=2)
            return torch.full((number,), math.nan, dtype=torch.float32)
        return checked(self.reward.name, result, number)

    def count(self, invalid: int, number: int) -> None:
        """Stop the run where too many of the last pictures could not be judged."""
        self.recent.append((invalid, number))
        while sum(pictures for _, pictures in self.recent) - self.recent[0][1] >= WINDOW:
            self.recent.popleft()
        failed, pictures = self.failures()
        if failed > self.reward.invalid_limit * max(pictures, AT_LEAST):
            raise UserError(
                f"the reward {self.reward.name} could not judge {failed} of the last {pictures} pictures, more than "
                f"its invalid_limit of {self.reward.invalid_limit}: mend the reward, or raise that limit."
            )

    def failures(self) -> tuple[int, int]:
        """(pictures that could not be judged, pictures) of about the last WINDOW."""
        return sum(invalid for invalid, _ in self.recent), sum(number for _, number in self.recent)


def take(values: Sequence[T], places: Sequence[int]) -> list[T]:
    return [values[place] for place in places]


class TimeLimit:
    """Calls a function and gives up waiting after some seconds.

    A thread cannot be stopped from outside, so a call that is given up goes on in the background; the next one waits
    for it, within its own limit, because two calls of one network must not overlap.
    """

    def __init__(self) -> None:
        self.busy: threading.Thread | None = None

    def call(self, seconds: float | None, function: Callable[[], Any]) -> Any:
        """The function's value; what it raises; TimeoutError."""
        if seconds is None:
            return function()
        deadline = time.monotonic() + seconds
        if self.busy is not None:
            self.busy.join(seconds)
            if self.busy.is_alive():
                raise TimeoutError(f"an earlier call has still not ended after another {seconds:g} s")
        outcome: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def work() -> None:
            try:
                outcome.put((function(), None))
            except BaseException as error:
                outcome.put((None, error))

        self.busy = threading.Thread(target=work, name="reward", daemon=True)
        self.busy.start()
        try:
            value, error = outcome.get(timeout=max(deadline - time.monotonic(), 0))
        except Empty:
            raise TimeoutError(f"no answer within its time_limit of {seconds:g} s") from None
        if error is not None:
            raise error
        return value


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Inside, tensors are made in float32, whatever the training's precision: under bf16-true they would be bfloat16,
    in which scores that differ become alike."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def without_gradient(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call in the reward's own precision, whatever the training's autocast; its result when the device has it."""
    device = next((value.device for value in arguments[0]), torch.device("cpu"))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):  # both hold for one thread
        result = function(*arguments)
    return result.cpu() if isinstance(result, Tensor) else result


def checked(name: str, result: Any, number: int) -> Tensor:
    """A call's result as float32 (number,), infinite values as NaN. UserError for another form."""
    if not isinstance(result, Tensor) or result.is_complex() or result.shape != (number,):
        form = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise UserError(
            f"the reward {name} must return a tensor of shape ({number},), one number a picture, not {form}."
        )
    values = result.float()
    return torch.where(values.isfinite(), values, math.nan)


def told(error: BaseException) -> str:
    """What went wrong, and in whose line."""
    if isinstance(error, UserError | TimeoutError | ConnectionError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f", {frames[-1].filename} line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
