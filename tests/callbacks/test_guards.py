"""Steps that are not finite are skipped as if they had not happened, counted and named; many in a row end the run."""

import csv
import json
import math
import os
import warnings
from pathlib import Path

import lightning
import pytest
import torch

from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.callbacks.ema import EMA
from zimage_lit.callbacks.guards import StepGuard
from zimage_lit.callbacks.report import HTMLReport
from zimage_lit.errors import SharedError, UserError


class Line(lightning.LightningModule):
    """A stage in miniature; `history` keeps the weights after every batch, before the first one too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Linear(3, 2)
        self.history = [self.weights()]

    def weights(self):
        return self.backbone.weight.detach().clone()

    def training_step(self, batch, batch_idx):
        loss = (self.backbone(batch["x"]) - 1).square().mean()
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.history.append(self.weights())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)


def batches(bad=(), number=8, size=2, rank=0):
    """Batches with ids; the last sample of those in `bad` holds a NaN."""
    source = torch.Generator().manual_seed(rank)
    made = [
        {"x": torch.randn(size, 3, generator=source), "ids": [f"{rank}/{size * i + j}" for j in range(size)]}
        for i in range(number)
    ]
    for place in bad:
        made[place]["x"][-1, 0] = math.nan
    return made


def fit(folder, data, guard, callbacks=(), module=None, resume=None, **settings):
    module = module or Line()
    trainer = lightning.Trainer(
        max_steps=settings.pop("max_steps", len(data)), accelerator="cpu", logger=settings.pop("logger", False),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[guard, *callbacks, *([] if any(isinstance(c, RunCheckpoint) for c in callbacks) else [Nothing()])],
        **settings,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return trainer, module


class Nothing(lightning.pytorch.callbacks.Checkpoint):
    """Keeps Lightning from adding a checkpoint callback of its own."""


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "guard.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_is_as_if_it_had_not_happened(tmp_path):
    guard, ema = StepGuard(), EMA(decay=0.5, warmup=False)
    trainer, module = fit(tmp_path, batches(bad=[2]), guard, [ema])
    assert torch.equal(module.history[2], module.history[3]) and not torch.equal(module.history[3], module.history[4])

    twin_ema, twin = EMA(decay=0.5, warmup=False), Line()
    fit(tmp_path / "twin", [b for i, b in enumerate(batches()) if i != 2], StepGuard(), [twin_ema], twin)
    assert torch.equal(module.weights(), twin.weights())
    assert torch.equal(ema.average["weight"], twin_ema.average["weight"]) and ema.updates == twin_ema.updates == 7
    state = trainer.optimizers[0].state[module.backbone.weight]
    assert state["step"] == 7 and torch.isfinite(state["exp_avg"]).all()
    assert trainer.global_step == 8 and guard.skipped == 1 and guard.watch(0).in_a_row == 0
    record = {"step": 3, "event": "skipped", "loss": "nan", "gradient_norm": "nan", "ranks": [0], "ids": ["0/4", "0/5"]}
    assert records(tmp_path) == [record]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_either_of_loss_and_gradient_is_enough(tmp_path, kind):
    class Broken(Line):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx != 1:
                return loss
            if kind == "loss":
                return loss + math.inf  # the gradient stays finite
            return loss + self.backbone.bias.sub(self.backbone.bias.detach()).abs().sqrt().sum()  # a slope of 1 / 0

    guard = StepGuard()
    _, module = fit(tmp_path, batches(number=3), guard, module=Broken())
    assert guard.skipped == 1 and torch.equal(module.history[1], module.history[2])
    numbers = {name: records(tmp_path)[0][name] for name in ("loss", "gradient_norm")}
    assert [name for name, value in numbers.items() if isinstance(value, str)] == [
        "loss" if kind == "loss" else "gradient_norm"
    ]


def test_too_many_in_a_row_stop_the_run_and_its_checkpoint_is_whole(tmp_path):
    guard, checkpoint = StepGuard(max_skipped_in_a_row=3), RunCheckpoint(every_n_steps=4)
    with pytest.raises(SharedError) as error:  # all ranks raise it, one says it
        fit(tmp_path, batches(bad=[1, 3, 4, 5]), guard, [checkpoint])
    text, last = str(error.value), tmp_path / "checkpoints/last.ckpt"
    assert "3 updates in a row had a loss or gradient that is not finite, the last of them at step 6" in text
    assert f"samples 0/10, 0/11); the last good checkpoint is {last}" in text and "\n" not in text
    stored = torch.load(last, weights_only=True)
    assert stored["global_step"] == 4 and all(torch.isfinite(w).all() for w in stored["state_dict"].values())
    assert guard.skipped == 4 and [record["step"] for record in records(tmp_path)] == [2, 4, 5, 6]

    again = StepGuard(max_skipped_in_a_row=3)  # continues with the two that the checkpoint knows, and one in a row
    trainer, _ = fit(tmp_path, batches(), again, [RunCheckpoint(every_n_steps=4)], resume=last)
    assert trainer.global_step == 8 and again.skipped == 2 and again.watch(0).in_a_row == 0
    assert [record["step"] for record in records(tmp_path)] == [2, 4]  # what had not happened is no longer told


def test_a_stop_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoint had been written before"):
        fit(tmp_path, batches(bad=[0]), StepGuard(max_skipped_in_a_row=1))


def test_with_accumulation_all_batches_of_the_step_are_named(tmp_path):
    guard = StepGuard()
    _, module = fit(tmp_path, batches(bad=[2]), guard, accumulate_grad_batches=2, max_steps=4)
    assert guard.skipped == 1 and records(tmp_path)[0]["ids"] == ["0/4", "0/5", "0/6", "0/7"]
    twin = Line()
    kept = [batch for i, batch in enumerate(batches()) if i not in (2, 3)]
    fit(tmp_path / "twin", kept, StepGuard(), module=twin, accumulate_grad_batches=2, max_steps=3)
    assert torch.equal(module.weights(), twin.weights())


def test_a_stage_hands_its_norm_over_before_the_step(tmp_path):
    class Stage(Line):
        hands_over_gradient_norm = True

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            norm = torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            for callback in self.trainer.callbacks:
                if hasattr(callback, "on_gradient_norm"):
                    callback.on_gradient_norm(self.trainer, self, optimizer, norm)

    guard = StepGuard()
    _, module = fit(tmp_path, batches(bad=[2]), guard, module=Stage())
    assert guard.skipped == 1 and torch.equal(module.history[2], module.history[3])
    assert all(torch.isfinite(weights).all() for weights in module.history)


def test_spikes_are_written_down_and_their_steps_taken(tmp_path):
    data = batches(number=24)
    data[20]["x"] *= 300
    guard = StepGuard(spike_factor=20, spike_window=20)
    _, module = fit(tmp_path, data, guard)
    (record,) = records(tmp_path)
    assert record["event"] == "spike" and record["step"] == 21 and record["ids"] == ["0/40", "0/41"]
    assert guard.spikes == 1 and guard.skipped == 0 and not torch.equal(module.history[20], module.history[21])
    other = StepGuard(spike_factor=None)
    fit(tmp_path / "off", data, other)
    assert other.spikes == 0 and not (tmp_path / "off/guard.jsonl").exists()


def test_the_window_of_losses_survives_a_checkpoint():
    guard, other = StepGuard(spike_window=3), StepGuard(spike_window=3)
    guard.watch(0).losses.extend([1.0, 2.0, 3.0, 4.0])
    guard.skipped, guard.watch(0).in_a_row, guard.spikes = 7, 2, 5
    other.load_state_dict(guard.state_dict())
    assert list(other.watch(0).losses) == [2.0, 3.0, 4.0] and other.watch(0).in_a_row == 2
    assert (other.skipped, other.spikes) == (7, 5)


def test_counts_reach_the_loggers(tmp_path):
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    fit(tmp_path, batches(bad=[1]), StepGuard(), logger=logger, log_every_n_steps=4)
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["guard/skipped"], row["guard/spikes"]) for row in rows] == [("1.0", "0.0")] * 2
    assert all(row["train/loss"] for row in rows)  # on the same lines


def test_the_reports_curve_leaves_skipped_steps_out(tmp_path):
    report = HTMLReport(every_n_steps=2)
    fit(tmp_path, batches(bad=[2, 4, 5]), StepGuard(), [report])
    assert [step for step, _ in report.curves["loss"]] == [2, 4, 8]  # nothing was learnt in 5 and 6
    assert all(math.isfinite(loss) for _, loss in report.curves["loss"])


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"max_skipped_in_a_row": 0}, {"spike_factor": 1.0}, {"spike_window": 0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            StepGuard(**settings)


# ---------------------------------------------------------------------------------------------------- two ranks


def train_rank(folder: Path) -> None:
    """What a launcher would start on each rank; only rank 1 has bad data."""
    rank = int(os.environ["LOCAL_RANK"])
    data = batches(bad=[2] if rank == 1 else [], number=24, rank=rank)
    if rank == 1:
        data[20]["x"] *= 300
    guard = StepGuard(spike_factor=20, spike_window=20)
    _, module = fit(folder, data, guard, strategy="ddp", devices=2, use_distributed_sampler=False)
    torch.save({"history": module.history, "skipped": guard.skipped, "spikes": guard.spikes}, folder / f"{rank}.pt")


def test_on_two_ranks_both_skip_and_the_one_at_fault_is_named(pair, tmp_path):
    pair(train_rank, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for result in results:
        assert result["skipped"] == result["spikes"] == 1
        assert torch.equal(result["history"][2], result["history"][3])
        assert not torch.equal(result["history"][3], result["history"][4])
    assert all(torch.equal(a, b) for a, b in zip(results[0]["history"], results[1]["history"], strict=True))
    skip, spike = records(tmp_path)
    assert (skip["event"], skip["ranks"], skip["ids"]) == ("skipped", [1], ["1/4", "1/5"])
    assert (spike["event"], spike["ranks"], spike["ids"]) == ("spike", [1], ["1/40", "1/41"])
