"""When a run ends because it pleases its reward and nobody else."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.callbacks.reward_guard import RewardGuard
from zimage_lit.errors import UserError
from zimage_lit.rewards.controls import Brightness, JPEGSize
from zimage_lit.run_folder import last_checkpoint


class Scripted(lightning.LightningModule):
    """Tells what two rewards are supposed to have said in each step; None: nothing was judged."""

    def __init__(self, followed: list[Any], gold: list[Any]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.script = list(zip(followed, gold, strict=True))
        self.judged: dict[str, float] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        told = dict(zip(("brightness", "gold"), self.script[self.global_step], strict=True))
        self.judged = {name: value for name, value in told.items() if value is not None}
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder: Path, followed: list[Any], gold: list[Any], resume: Path | None = None, weight: float = 1.0, **more):
    guard = RewardGuard("brightness", "gold", **{"window": 2, "fall": 0.12, **more})
    trainer = lightning.Trainer(
        max_steps=len(gold) if resume or len(gold) < 4 else 8, accelerator="cpu", logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=-1,
        callbacks=[
            guard, Brightness(weight=weight), JPEGSize(name="gold", held_out=True, weight=weight),
            RunCheckpoint(every_n_steps=1, keep_every_n_steps=2),
        ],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.zeros(100, 1))  # type: ignore[arg-type]
    trainer.fit(Scripted(followed, gold), loader, ckpt_path=resume, weights_only=True)
    return trainer.global_step


RISES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
HACKED = [0.1, 0.2, 0.4, 0.4, 0.4, 0.2, 0.1, 0.0]  # best until step 5; its means .15 .3 .4 .4 .3 .15 .05


def test_a_run_that_pleases_its_reward_alone_ends_and_names_the_last_good_checkpoint(tmp_path):
    with pytest.warns(
        UserWarning, match=r"ends the run at step 7: since step 5 gold, .* worse by 0\.25, .* better by 0\.2"
    ):
        assert run(tmp_path, RISES, HACKED) == 7
    with pytest.warns(UserWarning, match=r"The last good checkpoint is .*step-00000004\.ckpt\."):
        run(tmp_path / "again", RISES, HACKED)
    assert last_checkpoint(tmp_path).exists()


@pytest.mark.parametrize(
    ("followed", "gold", "more"),
    [
        (RISES, RISES, {}),  # both get better
        ([0.5] * 5 + [0.2, 0.1, 0.0], HACKED, {}),  # both get worse: that is no hacking
        (RISES, HACKED, {"fall": 0.5}),
        (RISES, HACKED, {"rise": 0.5}),
        (RISES, [0.1, 0.2, 0.4, 0.4, 0.0, 0.4, 0.4, 0.4], {"window": 4}),  # one bad iteration
    ],
)
def test_other_runs_go_on(tmp_path, followed, gold, more):
    assert run(tmp_path, followed, gold, **more) == 8


def test_an_iteration_in_which_nothing_was_judged_is_no_iteration(tmp_path):
    with pytest.warns(UserWarning, match="ends the run at step 8: since step 6"):  # one later than without the gap
        assert run(tmp_path, [*RISES[:2], 9.0, *RISES[2:7]], [*HACKED[:2], None, *HACKED[2:7]]) == 8


def test_a_stage_that_tells_nothing_is_refused(tmp_path):
    trainer = lightning.Trainer(
        logger=False, callbacks=[RewardGuard("brightness", "gold"), Brightness(), JPEGSize(name="gold", held_out=True)]
    )
    with pytest.raises(UserError, match="a LightningModule does not tell"):
        RewardGuard("brightness", "gold").on_train_start(trainer, lightning.LightningModule())


def test_less_is_better_where_the_weight_is_negative(tmp_path):
    with pytest.warns(UserWarning, match="ends the run at step 7"):
        assert run(tmp_path, [-x for x in RISES], [-x for x in HACKED], weight=-1.0) == 7


def test_an_interruption_is_not_forgotten(tmp_path):
    run(tmp_path, RISES[:3], HACKED[:3])
    script = RISES[:3] + RISES[3:], HACKED[:3] + HACKED[3:]
    with pytest.warns(UserWarning, match="ends the run at step 7: since step 5"):
        assert run(tmp_path, *script, resume=last_checkpoint(tmp_path)) == 7


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("light", "gold"), r"followed=light must be .* not held out; there are brightness, gold \(held out\)"),
        (("gold", "brightness"), "followed=gold must be"),
        (("brightness", "brightness"), "held_out=brightness must be a reward of the run that is held out"),
    ],
)
def test_the_two_rewards_must_be_there(tmp_path, names, message):
    guard = RewardGuard(*names)
    trainer = lightning.Trainer(logger=False, callbacks=[guard, Brightness(), JPEGSize(name="gold", held_out=True)])
    with pytest.raises(UserError, match=message):
        guard.on_train_start(trainer, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"window": 0}, {"fall": -0.1}, {"rise": float("inf")}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=f"RewardGuard: {next(iter(settings))}"):
        RewardGuard("a", "b", **settings)
