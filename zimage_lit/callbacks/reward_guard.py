"""The end of a run that pleases its reward and nobody else."""

import math
from collections import deque
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from zimage_lit.errors import UserError, at_least_one
from zimage_lit.rewards import RewardCallback, find_rewards
from zimage_lit.run_folder import last_checkpoint


class RewardGuard(Callback):
    """Ends a run in which a reward that is followed has risen while a held-out one has fallen, since that was best.

    Both are means over the last `window` iterations in which both judged a picture, on any rank. The run ends as if
    `trainer.max_steps` had been reached, with a sentence that names the last checkpoint until the best moment, if any
    was kept (`checkpoint.keep_every_n_steps`). A reward of negative weight is better where it is lower, a held-out one
    as well.

    followed, held_out: names of rewards (`reward/<name>` in the curves).   window: such iterations.   fall: of the
        held-out one, at which the run ends, in its own units.   rise: of the other at the same time.
    """

    def __init__(self, followed: str, held_out: str, window: int = 20, fall: float = 0.05, rise: float = 0.0) -> None:
        self.names = {"followed": followed, "held_out": held_out}
        self.window = at_least_one("RewardGuard: window", window)
        for name, value in {"fall": fall, "rise": rise}.items():
            if not 0 <= value < math.inf:
                raise UserError(f"RewardGuard: {name} must be 0 or more, not {value}.")
        self.fall, self.rise = fall, rise
        self.recent: dict[str, deque[float]] = {role: deque(maxlen=window) for role in self.names}
        self.best: dict[str, float] | None = None  # of both, and the step, when the held-out one was best
        self.signs = dict.fromkeys(self.names, 1.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rewards = {reward.name: reward for reward in find_rewards(trainer)}
        for role, name in self.names.items():
            reward = rewards.get(name)
            if reward is None or reward.held_out != (role == "held_out"):
                raise UserError(
                    f"RewardGuard: {role}={name} must be a reward of the run that is "
                    f"{'held out' if role == 'held_out' else 'not held out'}; there are {listed(rewards)}."
                )
            self.signs[role] = math.copysign(1.0, reward.weight)
        if not hasattr(pl_module, "judged"):
            raise UserError(
                f"RewardGuard looks at what rewards say in each iteration, which a {type(pl_module).__name__} does not "
                "tell: remove it from trainer.callbacks, or set model.class_path to zimage_lit.stages.GRPOModule."
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        judged = pl_module.judged  # of all ranks together, so that they decide alike
        if not all(name in judged for name in self.names.values()):
            return
        for role, name in self.names.items():
            self.recent[role].append(self.signs[role] * judged[name])
        if len(self.recent["held_out"]) == self.window:
            self.judge(trainer, {role: fmean(recent) for role, recent in self.recent.items()})

    def judge(self, trainer: Trainer, now: dict[str, float]) -> None:
        """Compare the present means with those of the best moment."""
        if self.best is None or now["held_out"] >= self.best["held_out"]:
            self.best = now | {"step": trainer.global_step}
            return
        fallen, risen = self.best["held_out"] - now["held_out"], now["followed"] - self.best["followed"]
        if fallen > self.fall and risen > self.rise:
            trainer.should_stop = True
            best = int(self.best["step"])
            rank_zero_warn(
                f"RewardGuard ends the run at step {trainer.global_step}: since step {best} {self.names['held_out']}, "
                f"which is held out, has got worse by {fallen:.3g}, and {self.names['followed']}, which is followed, "
                f"better by {risen:.3g}. {kept_before(Path(trainer.default_root_dir), best)}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"recent": {role: list(values) for role, values in self.recent.items()}, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for role, values in state_dict["recent"].items():
            self.recent[role] = deque(values, maxlen=self.window)
        self.best = state_dict["best"]


def kept_before(folder: Path, step: int) -> str:
    """What to use: the last checkpoint that was kept until a step."""
    kept = [path for path in last_checkpoint(folder).parent.glob("step-*.ckpt") if int(path.stem[5:]) <= step]
    if kept:
        return f"The last good checkpoint is {max(kept)}."
    return (
        f"No checkpoint of step {step} or earlier was kept: set trainer.callbacks.checkpoint.init_args."
        "keep_every_n_steps, or begin again with trainer.max_steps of that step."
    )


def listed(rewards: dict[str, RewardCallback]) -> str:
    held = {True: " (held out)", False: ""}
    return ", ".join(f"{name}{held[reward.held_out]}" for name, reward in rewards.items()) or "none"
