"""`lightning run plan`: its command line, what it reads of an experiment, its memory against a measured run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from live_bytes import LiveBytes

from zimage_lit import cli
from zimage_lit.callbacks.ema import EMA
from zimage_lit.errors import UserError
from zimage_lit.lora import LoRASettings
from zimage_lit.plan import PlanSettings, make_plan, memory_parts, moments_of
from zimage_lit.plan_inputs import read_training
from zimage_lit.stages import FlowMatchingModule
from zimage_lit.stages.optimizers import OptimizerSettings

FULL = "model.init_args.parallelize.activation_checkpointing=full"
EIGHT = ["devices=8", "gpu_memory=80", "trainer.strategy=fsdp2", FULL]
FINETUNE = ["finetune", "model.init_args.backbone=z-image-6b"]


def plan(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str]:
    code = cli.main(["run", "plan", *words])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


# ---------------------------------------------------------------------------------------------------- command line


def test_a_fine_tune_of_all_weights_fits_eight_gpus_and_not_one(capsys: pytest.CaptureFixture) -> None:
    code, printed = plan(capsys, *FINETUNE, *EIGHT, "json=plan.json")
    assert code == 0 and "6,154,908,736 parameters" in printed and "fits" in printed
    found = json.loads(Path("plan.json").read_text())
    assert found["fits"] and found["memory"]["weights"] == 4 * 6_154_908_736 // 8
    assert found["memory"]["optimiser states"] == 8 * 6_154_908_736 // 8
    assert found["settings"]["overrides"] == ["model.init_args.backbone=z-image-6b", "trainer.strategy=fsdp2", FULL]

    code, printed = plan(capsys, *FINETUNE, "devices=1", "gpu_memory=80", "json=plan.json")
    assert code == 1 and "does not fit" in printed
    found = json.loads(Path("plan.json").read_text())
    fitting = [attempt for attempt in found["attempts"] if attempt["plan"]["fits"]]
    assert [attempt["what"] for attempt in fitting] == ["2 devices", "LoRA in place of all weights"]
    for override in fitting[0]["overrides"]:
        assert f"  {override}\n" in printed


def test_devices_that_nobody_counted_are_told(capsys: pytest.CaptureFixture) -> None:
    words = ["z-image-6b/lora", "trainer.devices=auto", "trainer.strategy=fsdp2"]
    assert "taken for one here: give devices=8" in plan(capsys, *words)[1]
    code, printed = plan(capsys, *words, "devices=2")
    assert code == 0 and "taken for one" not in printed and ", 2 shards" in printed


def test_the_experiment_may_be_named_as_a_key_and_any_key_may_be_mistyped(capsys: pytest.CaptureFixture) -> None:
    words = ["experiment=quickstart", "trainer.accelerator=cpu", "caption_tokens=40"]
    code, printed = plan(capsys, *words)
    assert code == 0 and "give peak_tflops" in printed  # a CPU is no h100
    for wrong, named in (
        (["quickstart", "device=8"], "device is not a setting of PlanSettings"),
        (["quickstart", "trainer.max_step=8"], "trainer.max_step is not a setting of Trainer"),
        (["quickstart", "mfu=0"], "mfu must be more than 0"),
        (["quickstat"], "there is no experiment 'quickstat' (did you mean 'quickstart'?)"),
        ([], "experiment has no value"),
    ):
        code, printed = plan(capsys, *wrong)
        assert code == 2 and named in printed, printed


def test_a_graph_is_told_by_a_dry_run(capsys: pytest.CaptureFixture) -> None:
    code, printed = plan(capsys, "lifecycle")
    assert code == 2 and "lifecycle is a graph: `lightning run lifecycle --dry-run`" in printed


def test_help_and_settings_of_the_task_name_the_experiment_first(capsys: pytest.CaptureFixture) -> None:
    code, printed = plan(capsys, "--help")
    assert code == 0 and "run plan EXPERIMENT [key=value …]" in printed and "gpu_hour_price=2.0" in printed
    code, printed = plan(capsys, "quickstart", "devices=2", "trainer.max_steps=5", "--print-config")
    assert code == 0 and "experiment: quickstart" in printed and "- trainer.max_steps=5" in printed


def test_what_an_experiment_leaves_open_may_stay_open_but_not_the_sizes(capsys: pytest.CaptureFixture) -> None:
    code, printed = plan(capsys, "finetune")
    assert code == 2 and "model.init_args.backbone=z-image-6b" in printed
    code, printed = plan(capsys, "z-image-6b/decoupled_dmd")
    assert code == 2 and "plan knows stages that train one network" in printed
    code, printed = plan(capsys, "z-image-6b/grpo")
    assert code == 2 and "a GRPOModule draws them" in printed
    code, printed = plan(capsys, "z-image-6b/dpo")
    assert code == 2 and "adds a third of the work" in printed
    code, printed = plan(capsys, *FINETUNE, "data.init_args.sizes=null")
    assert code == 2 and "data.init_args.sizes.resolution" in printed


# ---------------------------------------------------------------------------------------------------- reading


def config(**changes: Any) -> dict[str, Any]:
    """An experiment of a network wide enough that its own memory outweighs all else."""
    sizes = {"dim": 192, "n_layers": 4, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 32, 32], "pad_multiple": 32}
    model = {"backbone": {"preset": "tiny", "axes_lens": [1536, 64, 64], **sizes}, **changes.pop("model", {})}
    trainer = {"accelerator": "cpu", "max_steps": 3, **changes.pop("trainer", {})}
    return {
        "trainer": trainer,
        "model": {"class_path": "zimage_lit.stages.FlowMatchingModule", "init_args": model},
        "data": {
            "class_path": "data_modules.TextToImageDataModule",
            "init_args": {"sizes": {"resolution": 256}, "batch_size": 2, **changes},
        },
    }


def test_a_token_budget_is_filled_by_the_longest_samples_and_a_shorter_one() -> None:
    training = read_training(config(batch_size=None, token_budget=1024), caption_tokens=64)
    assert (training.images, training.captions) == ([256, 256, 256], [64, 64, 64])
    training = read_training(config(batch_size=None, token_budget=928), caption_tokens=64)
    assert (training.images, training.captions) == ([256, 256, 224], [64, 64, 64])


def test_shards_replicas_and_copies_are_told_apart() -> None:
    def parts(devices: int, strategy: Any) -> dict[str, int]:
        return memory_parts(read_training(config(trainer={"strategy": strategy}), devices))[1]

    def gradients(devices: int, strategy: str) -> int:
        training = read_training(config(trainer={"strategy": strategy}), devices)
        return moments_of(training)["the backward pass ends"]["gradients"]

    one, ddp, fsdp = parts(1, "auto"), parts(4, "auto"), parts(4, "fsdp2")
    hybrid = parts(4, {"class_path": "zimage_lit.strategies.FSDP2Strategy", "init_args": {"replicate": 2}})
    assert ddp["weights"] == one["weights"] == 4 * fsdp["weights"] == 2 * hybrid["weights"]
    assert ddp["gradients once more (DDP)"] == one["weights"] == 4 * gradients(4, "fsdp2") == gradients(1, "auto")
    assert one["optimiser states"] == 2 * one["weights"] == 4 * fsdp["optimiser states"]
    for devices, strategy, named in ((4, "deepspeed", "cannot be planned"), (3, hybrid_of(2), "does not divide")):
        with pytest.raises(UserError, match=named):
            parts(devices, strategy)


def test_muon_is_not_planned_in_shards() -> None:
    with pytest.raises(UserError, match="muon needs whole matrices"):
        read_training(config(trainer={"strategy": "fsdp2"}, model={"optimizer": {"name": "muon"}}), devices=4)


def hybrid_of(replicate: int) -> dict[str, Any]:
    return {"class_path": "zimage_lit.strategies.FSDP2Strategy", "init_args": {"replicate": replicate}}


def test_optimisers_and_lora_change_what_is_kept() -> None:
    def parts(**model: Any) -> dict[str, int]:
        return memory_parts(read_training(config(model=model)))[1]

    adamw = parts()
    assert parts(optimizer={"name": "adamw8bit"})["optimiser states"] < 0.26 * adamw["optimiser states"]
    assert 0.5 < parts(optimizer={"name": "muon"})["optimiser states"] / adamw["optimiser states"] < 0.7
    lora = parts(lora={"rank": 4, "base_dtype": "bfloat16"})
    assert lora["optimiser states"] < 0.1 * adamw["optimiser states"]
    assert 0.5 * adamw["weights"] < lora["weights"] < 0.6 * adamw["weights"]


def test_time_and_cost_follow_from_the_work_and_the_peak() -> None:
    training = read_training(config(trainer={"accumulate_grad_batches": 2}), devices=4)
    asked = PlanSettings("any", peak_tflops=100.0, mfu=0.5, gpu_hour_price=3.0)
    found = make_plan(training, asked)
    assert found.images == 2 * 2 * 4 and found.steps == 3
    assert found.step_seconds == pytest.approx(found.flops / 50e12)
    assert found.gpu_hours == pytest.approx(3 * 4 * found.flops / 50e12 / 3600)
    assert found.cost == pytest.approx(3 * found.gpu_hours)
    again = config(trainer={"accumulate_grad_batches": 2}, model={"parallelize": {"activation_checkpointing": "full"}})
    assert make_plan(read_training(again, devices=4), asked).flops == pytest.approx(found.flops * 4 / 3, rel=0.01)


# ---------------------------------------------------------------------------------------------------- a measured run


class Nothing:
    """A text encoder and a codec that are not needed: the batches hold latents and features."""

    def to(self, device: Any) -> "Nothing":
        return self


class Batches(LightningDataModule):
    def train_dataloader(self) -> Any:
        batch = {
            "image_latents": [torch.randn(16, 32, 32) for _ in range(2)],
            "caption_features": [torch.randn(64, 128) for _ in range(2)],
            "captions": ["a"] * 2,
            "ids": [0, 1],
        }
        return torch.utils.data.DataLoader([batch] * 12, batch_size=None)


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "float32": ({}, {}, True),
    "bfloat16 and an average": ({"precision": "bf16-mixed"}, {}, True),
    "checkpointed and accumulated": (
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
        {"parallelize": {"activation_checkpointing": "full"}},
        False,
    ),
    "lora": ({"precision": "bf16-mixed"}, {"lora": {"rank": 8, "base_dtype": "bfloat16"}}, False),
    "muon": ({}, {"optimizer": {"name": "muon"}}, False),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_memory_of_a_real_run_is_within_a_tenth_of_its_plan(name: str, tmp_path: Path) -> None:
    """Every tensor of two optimiser steps in the real Trainer, counted at the moment when they are most."""
    trainer_settings, model, average = RUNS[name]
    callbacks = {"ema": {"class_path": "zimage_lit.callbacks.ema.EMA"}} if average else {}
    settings = config(trainer={**trainer_settings, "callbacks": callbacks}, model=model)
    planned = sum(memory_parts(read_training(settings, caption_tokens=64))[1].values())

    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[EMA()] if average else [],
        **trainer_settings,
    )
    with LiveBytes() as live:
        stage = FlowMatchingModule(Nothing(), Nothing(), caption_dropout=0.0, **built(settings))  # type: ignore[arg-type]
        trainer.fit(stage, Batches())
    assert trainer.global_step == 2
    assert planned == pytest.approx(live.peak, rel=0.1)


def built(settings: dict[str, Any]) -> dict[str, Any]:
    """The stage's arguments, made by hand as the command line makes them."""
    from zimage_lit.backbone.parallelize import ParallelizeSettings

    kinds = {"lora": LoRASettings, "optimizer": OptimizerSettings, "parallelize": ParallelizeSettings}
    given = settings["model"]["init_args"]
    return {name: kinds[name](**value) if name in kinds else value for name, value in given.items()}
