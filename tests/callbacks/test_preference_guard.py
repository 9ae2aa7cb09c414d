"""Winners that become less likely end a run, at the same step whether it was interrupted or not."""

from pathlib import Path

import lightning
import pytest
import torch

from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.callbacks.preference_guard import PreferenceGuard
from zimage_lit.errors import UserError

RISING = [0.0, 0.0, 0.3, -0.1, 0.2, 0.2, 0.2, 0.2]  # means of three: 0.1, 0.067, 0.133, 0.1, 0.2, 0.2


class Winners(lightning.LightningModule):
    """Has the errors on winners that it is told to have, batch by batch."""

    def __init__(self, errors: list[float]) -> None:
        super().__init__()
        self.backbone, self.errors = torch.nn.Linear(1, 1), errors

    def training_step(self, batch, batch_idx):
        error = torch.tensor(self.errors[self.trainer.fit_loop.epoch_loop.total_batch_idx])
        return {"loss": self.backbone(batch).sum(), "winner_error": error}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Plain(Winners):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]


def fit(folder: Path, guard: PreferenceGuard, errors=RISING, kind=Winners, resume=None, keep=None, **settings):
    trainer = lightning.Trainer(
        max_steps=settings.pop("max_steps", len(errors)), accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[guard, RunCheckpoint(2, keep)], **settings,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader([torch.ones(1)] * 100, batch_size=None)
    trainer.fit(kind(errors), loader, ckpt_path=resume, weights_only=True)
    return trainer


def guard(**settings) -> PreferenceGuard:
    return PreferenceGuard(**{"max_winner_error": 0.09, "window": 3, "patience": 2, **settings})


def test_a_mean_above_the_limit_for_long_enough_ends_the_run(tmp_path):
    """The mean is above it at the third step, not at the fourth, and again at the fifth and sixth."""
    with pytest.warns(UserWarning, match="PreferenceGuard ends the run at step 6: since step 5") as warned:
        trainer = fit(tmp_path, guard(), keep=2)
    text = next(str(one.message) for one in warned if "PreferenceGuard" in str(one.message))
    assert trainer.global_step == 6 and "more than 0.09 above the reference's (0.1 now)" in text
    assert f"The last good checkpoint is {tmp_path / 'checkpoints/step-00000004.ckpt'}." in text and "\n" not in text
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


def test_without_a_kept_checkpoint_the_way_out_is_named(tmp_path):
    with pytest.warns(UserWarning, match="No checkpoint of step 4 or earlier was kept: .*keep_every_n_steps"):
        fit(tmp_path, guard())


def test_below_the_limit_or_without_patience_lost_the_run_goes_on(tmp_path):
    assert fit(tmp_path / "limit", guard(max_winner_error=0.21)).global_step == 8
    assert fit(tmp_path / "patience", guard(patience=5)).global_step == 8
    watched = guard(window=9)  # never full
    trainer = fit(tmp_path / "window", watched)
    assert trainer.global_step == 8
    assert float(trainer.callback_metrics["guard/winner_error"]) == pytest.approx(sum(RISING) / 8)


def test_an_interrupted_run_ends_at_the_same_step(tmp_path):
    fit(tmp_path, guard(), max_steps=5)
    resumed = guard()
    with pytest.warns(UserWarning, match="ends the run at step 6: since step 5"):
        trainer = fit(tmp_path, resumed, resume=tmp_path / "checkpoints/last.ckpt")
    assert trainer.global_step == 6
    assert list(resumed.errors) == pytest.approx([-0.1, 0.2, 0.2]) and resumed.in_a_row == 2


def test_accumulated_batches_are_one_step(tmp_path):
    doubled = [error + sign for error in RISING for sign in (0.05, -0.05)]
    assert fit(tmp_path, guard(), doubled, max_steps=8, accumulate_grad_batches=2).global_step == 6


def test_what_is_not_finite_is_left_out(tmp_path):
    watched = guard()
    fit(tmp_path, watched, [0.0, float("nan"), 0.0, 0.0])
    assert list(watched.errors) == [0.0, 0.0, 0.0]


def test_a_stage_without_winners_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"PreferenceGuard watches winners, which a Plain does not have"):
        fit(tmp_path, guard(), kind=Plain)


@pytest.mark.parametrize("settings", [{"max_winner_error": -0.1}, {"window": 0}, {"patience": 0}])
def test_settings_without_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        PreferenceGuard(**settings)
