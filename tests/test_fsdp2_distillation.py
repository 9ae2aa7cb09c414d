"""Distillation on two processes of a CPU, each role sharded, against one process that sees the same batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation import LAYOUTS, Seen, Stage, fit, same, stage, write_teacher
from torch.distributed.tensor import DTensor

from zimage_lit.backbone.parallelize import ParallelizeSettings
from zimage_lit.callbacks.export import LoRAExport, whole_backbone
from zimage_lit.lora import adapters_of, base_weights, plain_weights, read_lora
from zimage_lit.rewards import RewardCallback
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.stages import DMDRModule
from zimage_lit.stages.distillation_settings import DynamicGuidanceSettings, ObjectiveSettings
from zimage_lit.stages.initial_weights import open_weights, read_checkpoint
from zimage_lit.stages.reward_terms import RewardSettings
from zimage_lit.strategies import FSDP2Strategy


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "transformer")


def fit_sharded(teacher: Path, layout: str, folder: Path, steps: int, resume: Path | None = None) -> Seen:
    module = stage(teacher, layout)
    seen = fit(module, folder, steps, resume, FSDP2Strategy(), devices=2, save_every=4)
    networks = module.roles.networks.values()
    assert all(isinstance(parameter, DTensor) for network in networks for parameter in network.parameters())
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_distil_as_one_process_does_and_go_on_exactly_in_mid_cycle(pair, teacher, tmp_path, layout):
    alone = fit(stage(teacher, layout), tmp_path / "alone", 6)
    both = pair(fit_sharded, teacher, layout, tmp_path / "both", 6)
    losses = [sum(pair_of) / 2 for pair_of in zip(*(seen.losses for seen in both), strict=True)]
    assert losses == pytest.approx(alone.losses, rel=1e-4)
    assert both[0].step_indices == both[1].step_indices == alone.step_indices
    assert both[0].forwards == both[1].forwards  # else ranks would wait for one another
    assert len(set(alone.step_indices)) > 1
    assert same(both[0].states[-1], both[1].states[-1])
    for name, value in alone.states[-1].items():
        if name.startswith(("weights.", "average.")):
            torch.testing.assert_close(both[0].states[-1][name], value, rtol=0, atol=1e-4)

    torn = last_checkpoint(tmp_path / "both").with_name("step-00000004.ckpt")
    assert read_checkpoint(torn)["role_steps"] == {"student": 1, "fake_score": 4}
    resumed = pair(fit_sharded, teacher, layout, tmp_path / "torn", 6, torn)
    assert [seen.losses for seen in resumed] == [seen.losses[4:] for seen in both]
    assert same(resumed[0].states[-1], both[0].states[-1])
    average = open_weights(last_checkpoint(tmp_path / "torn"))
    assert all(torch.equal(weight, both[0].states[-1][f"average.{name}"]) for name, weight in average.items())

    last = last_checkpoint(tmp_path / "torn")  # a second phase, of one process
    second = fit(stage(teacher, layout, student_init_from=str(last)), tmp_path / "second", 1).states[0]
    for name, value in second.items():
        if name.startswith("weights."):
            known = name if "fake_score" in name else name.replace("weights.backbone.", "average.")
            assert torch.equal(value, both[0].states[-1][known])


class Bright(RewardCallback):
    def score(self, images: Any, prompts: Any, metadata: Any) -> torch.Tensor:
        return torch.stack([image.float().mean() for image in images])


class OwnNoise(Stage):
    """Groups are larger than the batch, whose ids its noise would go by."""

    noise = DMDRModule.noise
    times = DMDRModule.times


def fit_with_everything(teacher: Path, folder: Path) -> tuple[Seen, set[torch.dtype], bool]:
    """Half-precision base, recomputed blocks, roll-outs with a policy gradient, the data's pictures, DynaDG."""
    module = stage(
        teacher, "adapters", ratio=1, frozen_dtype="bfloat16",
        objective=ObjectiveSettings(guidance_scale=3.0, data=0.5, mean_variance=0.1),
        dynamic_guidance=DynamicGuidanceSettings(), reward=RewardSettings("grpo", group_size=3),
        parallelize=ParallelizeSettings(activation_checkpointing="full"),
    )  # fmt: skip
    module.__class__ = OwnNoise
    export = LoRAExport("float32")
    seen = fit(
        module, folder, 2, strategy=FSDP2Strategy(), devices=2, precision="bf16-mixed", callbacks=[Bright(), export]
    )
    types = {parameter.dtype for parameter in module.backbone.parameters() if not parameter.requires_grad}
    rank = module.trainer.global_rank
    own = adapters_of(module.backbone)
    with whole_backbone(module, keep=True):
        merged = dict(plain_weights(module.backbone))
        base = base_weights(module.backbone)
    alike = all(torch.equal(merged[f"{n}.weight"], a.merged(base[f"{n}.weight"])) for n, a in own.items())
    written = read_lora(folder / "lora/diffusers.safetensors", module.config) if rank == 0 else {}
    return seen, types, alike and (rank > 0 or written.keys() == own.keys())


def test_all_options_work_on_shards(pair, teacher, tmp_path):
    both = pair(fit_with_everything, teacher, tmp_path)
    for seen, types, alike in both:
        assert types == {torch.bfloat16} and alike
        assert all(math.isfinite(loss) for loss in seen.losses) and seen.figures["train/student_gradient_norm"] > 0
        assert [turn.changed for turn in seen.turns] == [{"student"}, {"fake_score"}] * 2
    assert both[0][0].forwards == both[1][0].forwards
    assert same(both[0][0].states[-1], both[1][0].states[-1])
