"""Reinforcement learning on two processes of a CPU, weights sharded, against one process that sees the same prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distillation import same, write_teacher
from policies import Bright, Seen, fit, is_number, stage
from torch.distributed.tensor import DTensor

from zimage_lit.backbone.parallelize import ParallelizeSettings
from zimage_lit.callbacks.reward_guard import RewardGuard
from zimage_lit.errors import UserError
from zimage_lit.lora import LoRASettings
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.stages.grpo_settings import GroupRolloutSettings, PenaltySettings
from zimage_lit.stages.initial_weights import read_checkpoint
from zimage_lit.strategies import FSDP2Strategy

WAYS: dict[str, dict[str, Any]] = {
    "grpo": {"kl": PenaltySettings(0.1, "latent")},
    "grpo-lora": {"lora": LoRASettings(rank=4), "kl": PenaltySettings(0.1)},
    "nft": {},
    "nft-lora": {"lora": LoRASettings(rank=4), "kl": PenaltySettings(0.1)},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("start") / "transformer")


def fit_sharded(start: Path, way: str, folder: Path, steps: int, resume: Path | None = None) -> Seen:
    module = stage(start, way.partition("-")[0], **WAYS[way])
    seen = fit(module, folder, steps, resume, strategy=FSDP2Strategy(), devices=2, save_every=2)
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_learn_as_one_process_does_and_go_on_exactly(pair, start, tmp_path, way):
    alone = fit(stage(start, way.partition("-")[0], **WAYS[way]), tmp_path / "alone", 3)
    both = pair(fit_sharded, start, way, tmp_path / "both", 3)
    for name in ("reward/bright", "train/loss", "train/diversity"):
        means = [figures[name] for figures in both[0].figures]
        assert means == pytest.approx([figures[name] for figures in alone.figures], rel=2e-3, abs=1e-4)
    assert both[0].figures[0].get("train/ratio", 1.0) == both[1].figures[0].get("train/ratio", 1.0) == 1
    assert both[0].figures == both[1].figures  # of all ranks together
    assert both[0].windows == both[1].windows == alone.windows
    assert both[0].forwards == both[1].forwards  # else ranks would wait for one another
    assert same(both[0].states[-1], both[1].states[-1])
    for name, value in alone.states[-1].items():
        if name.startswith(("weights.", "average.")):
            torch.testing.assert_close(both[0].states[-1][name], value, rtol=0, atol=1e-3)
            assert not torch.equal(value, alone.states[0][name]) or value.abs().max() == 0

    torn = last_checkpoint(tmp_path / "both").with_name("step-00000002.ckpt")
    kept = {name.partition(".")[0] for name in read_checkpoint(torn)["state_dict"]}
    assert kept == ({"backbone", "old_policy"} if "nft" in way else {"backbone"})
    resumed = pair(fit_sharded, start, way, tmp_path / "torn", 3, torn)
    assert [seen.figures for seen in resumed] == [seen.figures[2:] for seen in both]
    assert same(resumed[0].states[-1], both[0].states[-1])


class OfPart(Bright):
    """Has something to say of some prompts alone."""

    def __init__(self, numbers: tuple[int, ...], **settings: Any) -> None:
        super().__init__(**settings)
        self.numbers = numbers

    def applies_to(self, prompt: str, metadata: Any) -> bool:
        return metadata["number"] in self.numbers


def fit_guarded(start: Path, folder: Path) -> tuple[list[dict[str, float]], list[float], dict[str, float]]:
    """The second rank sees prompts 2 and 3, 6 and 7; the held-out reward judges in its first iteration alone."""
    guard = RewardGuard("bright", "part", window=1)
    module = stage(start)
    held_out = OfPart((2,), name="part", held_out=True)
    fit(module, folder, 2, callbacks=[Bright(), held_out, guard], strategy=FSDP2Strategy(), devices=2)
    return module.seen.figures, list(guard.recent["held_out"]), dict(module.judged)


def test_a_reward_that_judges_on_one_rank_is_known_on_all(pair, start, tmp_path):
    (first, recent, judged), other = pair(fit_guarded, start, tmp_path)
    assert (first, recent, judged) == other
    assert recent == [first[0]["reward/part"]] and 0 <= recent[0] <= 255
    assert "reward/part" not in first[1] and judged == {"bright": first[1]["reward/bright"]}


def fit_with_everything(start: Path, folder: Path) -> tuple[Seen, set[torch.dtype]]:
    """Half-precision base, recomputed blocks, guidance, several updates, mixed precision."""
    module = stage(
        start, lora=LoRASettings(rank=4, base_dtype="bfloat16"), kl=PenaltySettings(0.1), minibatches=2, epochs=2,
        rollout=GroupRolloutSettings(4, guidance_scale=2.0, group_size=3, batch_size=2),
        parallelize=ParallelizeSettings(activation_checkpointing="full"),
    )  # fmt: skip
    seen = fit(module, folder, 2, strategy=FSDP2Strategy(), devices=2, precision="bf16-mixed")
    return seen, {parameter.dtype for parameter in module.backbone.parameters() if not parameter.requires_grad}


def test_all_options_work_on_shards(pair, start, tmp_path):
    both = pair(fit_with_everything, start, tmp_path)
    for seen, types in both:
        assert types == {torch.bfloat16}
        assert all(map(is_number, seen.figures)) and seen.figures[0]["train/ratio_std"] > 0
    assert same(both[0][0].states[-1], both[1][0].states[-1])


def refusal(start: Path, folder: Path, resume: Path) -> str:
    with pytest.raises(UserError) as error:
        fit(stage(start), folder, 2, resume, strategy=FSDP2Strategy(), devices=2)
    return str(error.value)


def test_a_checkpoint_of_the_other_method_is_refused_for_that(pair, start, tmp_path):
    pair(fit_sharded, start, "nft", tmp_path, 1)
    for message in pair(refusal, start, tmp_path / "grpo", last_checkpoint(tmp_path)):
        assert "kept old policy, and this one keeps no earlier weights: set the stage, its method" in message
