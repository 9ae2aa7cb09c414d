"""The end of a run that makes the pictures that are preferred less likely, too."""

import math
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from zimage_lit.callbacks.reward_guard import kept_before
from zimage_lit.errors import UserError, at_least_one


class PreferenceGuard(Callback):
    """Ends a run of a `DPOModule` whose error on winners, relative to the reference's, keeps above a limit.

    Preferences are told apart the better the more the losers' error grows, and the winners' may grow with it: implicit
    accuracy rises while pictures fall apart. The mean over the last `window` optimiser steps is looked at, once there
    are as many; above `max_winner_error` for `patience` steps in a row the run ends as if `trainer.max_steps` had been
    reached, with a sentence that names the last checkpoint from before that, if any was kept
    (`checkpoint.keep_every_n_steps`). The mean is logged as `guard/winner_error`. Window and count survive a resume, so
    a run that is interrupted ends at the same step. With a reference that is refreshed the error is relative to the
    latest.

    max_winner_error: 0.02 is two hundredths above the reference.
    Raises UserError for settings that make no sense, and for a stage that has no winners.
    """

    def __init__(self, max_winner_error: float = 0.05, window: int = 50, patience: int = 20) -> None:
        if not 0 <= max_winner_error < math.inf:
            raise UserError(f"PreferenceGuard: max_winner_error must be 0 or more, not {max_winner_error}.")
        self.max_winner_error = max_winner_error
        self.window = at_least_one("PreferenceGuard: window", window)
        self.patience = at_least_one("PreferenceGuard: patience", patience)
        self.errors: deque[float] = deque(maxlen=self.window)  # of the last steps, means over ranks and batches
        self.in_a_row = 0  # steps above the limit, the last of them now
        self._of_this_step: list[Tensor] = []  # one for each accumulated batch, of this rank
        self._step_before = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if "winner_error" not in outputs:
            raise UserError(
                f"PreferenceGuard watches winners, which a {type(pl_module).__name__} does not have: remove it from "
                "trainer.callbacks, or set model.class_path to zimage_lit.stages.DPOModule."
            )
        self._of_this_step.append(outputs["winner_error"])
        if trainer.global_step == self._step_before:
            return  # gradients are being accumulated
        self._step_before = trainer.global_step
        own, self._of_this_step = torch.stack(self._of_this_step).mean(), []
        error = float(trainer.strategy.reduce(own, reduce_op="mean"))
        if not math.isfinite(error):
            return  # a StepGuard's business
        self.errors.append(error)
        mean = sum(self.errors) / len(self.errors)
        pl_module.log("guard/winner_error", mean)
        above = len(self.errors) == self.window and mean > self.max_winner_error
        self.in_a_row = self.in_a_row + 1 if above else 0
        if self.in_a_row >= self.patience:
            self.stop(trainer, mean)

    def stop(self, trainer: Trainer, mean: float) -> None:
        trainer.should_stop = True
        good = trainer.global_step - self.in_a_row
        rank_zero_warn(
            f"PreferenceGuard ends the run at step {trainer.global_step}: since step {good + 1} the error on winners, "
            f"in the mean of {self.window} steps, has been more than {self.max_winner_error:.3g} above the reference's "
            f"({mean:.3g} now), so what is preferred becomes less likely, too. "
            f"{kept_before(Path(trainer.default_root_dir), good)} A larger model.init_args.preference.beta or anchor, "
            "or a lower learning rate, goes on for longer."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"errors": list(self.errors), "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.errors.extend(state_dict["errors"])
        self.in_a_row = state_dict["in_a_row"]
