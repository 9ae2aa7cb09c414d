"""Reinforcement learning: what is drawn, what is learnt from it, and that an interrupted run goes on exactly."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from distillation import SIZES, Codec, Encoder, batch_of, same, write_teacher
from lightning.pytorch.strategies import DDPStrategy
from policies import Bright, Same, Stage, fit, is_number, stage
from ranks import SAMPLES, Steps

from zimage_lit.backbone import S3DiT
from zimage_lit.callbacks.guards import StepGuard
from zimage_lit.errors import UserError
from zimage_lit.lora import LoRASettings
from zimage_lit.objectives import flow_matching
from zimage_lit.objectives.transitions import log_prob
from zimage_lit.rewards import RewardCallback, RewardSet
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.sampling import sigmas
from zimage_lit.stages import GRPOModule
from zimage_lit.stages.grpo import Judgement
from zimage_lit.stages.grpo_settings import (
    AdvantageSettings,
    ForwardProcessSettings,
    GroupRolloutSettings,
    PenaltySettings,
    PolicySettings,
    WindowSettings,
)
from zimage_lit.stages.initial_weights import backbone_config, build_backbone
from zimage_lit.stages.optimizers import OptimizerSettings

GROUP, LORA = 3, LoRASettings(rank=4)
FAST = OptimizerSettings(lr=3e-3, betas=(0.0, 0.99))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("start") / "transformer")


@pytest.fixture
def ready(start, tmp_path):
    """Makes a stage after one iteration, with the batch whose prompts its noise goes by."""

    def make(method: str = "grpo", callbacks: Any = None, **settings: Any) -> tuple[Stage, dict[str, Any]]:
        module = stage(start, method, optimizer=FAST, **settings)
        fit(module, tmp_path / "ready", 1, callbacks=callbacks)
        module.ids = list(range(SAMPLES))
        return module, batch_of(range(SAMPLES))

    return make


def policy(transition: str = "cps", **settings: Any) -> PolicySettings:
    return PolicySettings(transition, window=WindowSettings(2, 1, 1), **settings)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- the roll-out


@pytest.mark.parametrize(("transition", "guidance"), [("cps", 1.0), ("flow_sde", 2.0), ("dance_sde", 1.0)])
def test_a_roll_out_is_the_formula_written_out_sample_by_sample(ready, transition, guidance):
    rollout = GroupRolloutSettings(4, 2.0, guidance, group_size=GROUP, batch_size=5)
    module, batch = ready(rollout=rollout, grpo=policy(transition, level=0.5))
    packs = [pack for packs in module.draw(batch, 5) for pack in packs]
    assert [len(pack.places) for pack in packs] == [5, 5, 2]  # through groups
    (empty,) = module.text_encoder.encode([""])
    grid = sigmas(4, 2.0).tolist()
    for pack in packs:
        for row, place in enumerate(pack.places):
            shape = [tuple(batch["image_latents"][place // GROUP].shape)]
            caption = batch["caption_features"][place // GROUP]
            (x,) = module.noise([place], shape, "noise", 5)
            for number, (sigma, after) in enumerate(pairwise(grid)):
                t = torch.tensor([1 - sigma])
                with torch.no_grad():
                    (v,) = module.backbone([x], t, [caption])
                    if guidance != 1:
                        (u,) = module.backbone([x], t, [empty])
                        v = u + guidance * (v - u)
                if number not in (1, 2):
                    x = x + (sigma - after) * v
                    continue
                torch.testing.assert_close(pack.rollout.states[number - 1][row], x, rtol=1e-4, atol=1e-4)
                (fresh,) = module.noise([place], shape, f"noise/{number}", 5)
                clean, noise = x + sigma * v, x - (1 - sigma) * v
                if transition == "cps":
                    std = after * math.sin(math.pi / 4)
                    mean = (1 - after) * clean + math.sqrt(after**2 - std**2) * noise
                else:
                    g = 0.5 * (math.sqrt(sigma / (1 - sigma)) if transition == "flow_sde" else 1)
                    std = g * math.sqrt(sigma - after)
                    mean = x + (sigma - after) * (v - g**2 / (2 * sigma) * noise)
                torch.testing.assert_close(pack.rollout.made[number - 1].mean[row], mean, rtol=1e-4, atol=1e-4)
                x = mean + std * fresh
            torch.testing.assert_close(pack.rollout.states[-1][row].shape, x.shape)
            torch.testing.assert_close(pack.rollout.clean[row], x, rtol=1e-3, atol=1e-3)


def test_the_window_moves_with_the_iteration_alone(start, tmp_path):
    module = stage(start, grpo=PolicySettings(window=WindowSettings(1, 0, 2)))
    seen = fit(module, tmp_path, 8)
    starts = [window.start for window in seen.windows]
    assert set(starts) == {0, 1, 2} and {len(window) for window in seen.windows} == {1}
    module.ids = [7, 8]
    again = [module.draw(batch_of(range(7, 9)), step)[0] for step in range(8)]  # of other prompts
    assert [pack.window.start for packs in again for pack in packs] == [s for s in starts for _ in range(2)]
    assert len({pack.window.start for packs in again[:1] for pack in packs}) == 1


def test_a_group_can_begin_from_one_noise(ready):
    for same_noise in (False, True):
        rollout = GroupRolloutSettings(4, group_size=GROUP, batch_size=5, same_noise=same_noise)
        module, batch = ready(rollout=rollout, grpo=PolicySettings(window=WindowSettings(1, 0, 0)))
        packs = module.draw(batch, 0)[0]
        begun = [x for pack in packs for x in pack.rollout.states[0]]
        clean = [x for pack in packs for x in pack.rollout.clean]
        for place in range(0, len(begun), GROUP):
            group = begun[place : place + GROUP]
            assert all(torch.equal(group[0], x) == same_noise for x in group[1:])
            assert not torch.equal(clean[place], clean[place + 1])
        assert not torch.equal(begun[0], begun[2 * GROUP])


def test_rewards_see_whole_groups_however_they_are_packed(start, tmp_path):
    class Whole(RewardCallback):
        kind = "groupwise"

        def score(self, images, prompts, metadata):
            asked.append(list(prompts))
            return torch.arange(float(len(images)))

    asked: list[list[str]] = []
    fit(stage(start, minibatches=2), tmp_path, 2, callbacks=[Whole()])
    assert asked == [[f"number {number}"] * GROUP for number in range(2 * SAMPLES)]


def test_half_precision_does_not_reach_scores(start, tmp_path):
    class Close(RewardCallback):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.made: torch.dtype | None = None

        def prepare(self, device: Any) -> None:
            self.made = torch.zeros(()).dtype

        def score(self, images, prompts, metadata):
            return torch.tensor([0.7012, 0.7019, 0.7026] * SAMPLES)

    reward = Close(name="close")
    figures = fit(stage(start), tmp_path, 1, callbacks=[reward], precision="bf16-true").figures[0]
    assert reward.made == torch.float32 and is_number(figures)
    assert figures["reward/close_std"] == pytest.approx(7e-4 * math.sqrt(2 / 3), rel=1e-3)
    assert figures["train/zero_std_share"] == 0 and figures["train/gradient_norm"] > 0
    assert torch.get_default_dtype() == torch.float32


def test_prompts_of_one_batch_may_be_alike(ready):
    """Groups go by place: equal prompts in one batch, or on several devices, are groups of their own."""
    module, batch = ready()
    batch = {name: [values[0]] * SAMPLES for name, values in batch.items()}
    judgement, _ = module.judge(module.draw(batch, 3), batch, 3)
    sums = judgement.advantages.view(SAMPLES, GROUP).sum(1)
    assert sums.abs().max() < 1e-3 and judgement.advantages.abs().max() > 1


def test_pictures_are_drawn_on_the_canvases_a_group_on_one(ready):
    module, batch = ready(canvases=[(4, 6), (8, 4)])
    del batch["image_latents"]
    clean = [tuple(x.shape) for pack in module.draw(batch, 0)[0] for x in pack.rollout.clean]
    assert clean == ([(16, 6, 4)] * GROUP + [(16, 4, 8)] * GROUP) * 2
    module.canvases = None
    with pytest.raises(UserError, match="canvases how large"):
        module.draw(batch, 0)
    with pytest.raises(UserError, match="GRPOModule learns from captions, and the data give"):
        module.training_step({**batch, "sources": batch["captions"]}, 0)


# ---------------------------------------------------------------------------------------------------- ratios


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora": LORA},
        {"grpo": policy("flow_sde", ratio="guard")},
        {"grpo": policy("dance_sde", clip="dppo", clip_range=1e-6)},
        {"rollout": GroupRolloutSettings(4, guidance_scale=2.0, group_size=GROUP, batch_size=5)},
        {"grpo": policy(reduction="sum")},
    ],
    ids=["cps", "lora", "guard", "dppo", "guided", "sum"],
)
def test_the_first_update_has_a_ratio_of_exactly_one_and_the_next_has_not(start, tmp_path, settings, precision):
    def figures(**more: Any) -> dict[str, float]:
        return fit(
            stage(start, optimizer=FAST, **settings, **more), tmp_path / str(more), 1, precision=precision
        ).figures[0]

    once, twice = figures(), figures(epochs=2)
    assert once["train/ratio"] == 1 and once["train/ratio_std"] == 0 and once["train/clip_fraction"] == 0
    assert once["train/gradient_norm"] > 0
    assert twice["train/ratio_std"] > 1e-7  # the second pass is of other weights, in half precision as well
    assert twice["train/clip_fraction"] > 0


def test_everything_a_ratio_is_made_of_is_float32(ready):
    module, batch = ready()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ((pack, *_),) = module.draw(batch, 0)
    rollout = pack.rollout
    tensors = [
        x for latents in (*rollout.states, rollout.clean, *(made.mean for made in rollout.made)) for x in latents
    ]
    assert {x.dtype for x in [*tensors, *(made.std for made in rollout.made)]} == {torch.float32}
    assert any(not torch.equal(x, x.bfloat16().float()) for x in tensors)


# ---------------------------------------------------------------------------------------------------- the gradient


class Frozen(Stage):
    """Keeps the gradient of each update and does not take its step."""

    gradients: list[list[torch.Tensor]]

    def take_step(self, is_last: bool) -> torch.Tensor:
        self.gradients.append([p.grad.clone() for p in self.backbone.parameters() if p.grad is not None])
        for parameter in self.backbone.parameters():
            parameter.grad = None
        return torch.zeros(())


def gradients_of(module: Stage, batch: dict[str, Any], judgement: Any = None) -> list[list[torch.Tensor]]:
    module.__class__, module.gradients = Frozen, []  # type: ignore[attr-defined]
    drawn = module.draw(batch, 3)
    module.learn(drawn, judgement or module.judge(drawn, batch, 3)[0], 3)
    return module.gradients  # type: ignore[attr-defined]


def check_gradient(found: list[torch.Tensor], loss: torch.Tensor, module: Stage) -> None:
    expected = torch.autograd.grad(
        loss, [p for p in module.backbone.parameters() if p.requires_grad], allow_unused=True
    )
    expected = [gradient for gradient in expected if gradient is not None]
    assert len(found) == len(expected) and max(float(g.abs().max()) for g in expected) > 1e-4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_update_is_the_policy_gradient_in_one_batch(ready):
    """Over all pictures and steps of the window, whatever the packs are."""
    module, batch = ready()
    drawn = module.draw(batch, 3)
    judgement, _ = module.judge(drawn, batch, 3)
    (found,) = gradients_of(module, batch, judgement)
    losses = []
    for pack in drawn[0]:
        for number, place in enumerate(pack.window):
            x, sigma, after = pack.rollout.states[number], *module.rollout.grid[place : place + 2].tolist()
            v = module.backbone(x, torch.full((len(x),), 1 - sigma), pack.captions)
            made = module.transition(x, v, sigma, after)
            density = log_prob(pack.rollout.states[number + 1], made.mean, made.std)
            losses.append(-judgement.advantages[pack.places] * density)
    check_gradient(found, torch.cat(losses).mean(), module)


@pytest.mark.parametrize("space", ["velocity", "latent"])
def test_a_penalty_pulls_the_policy_back_to_where_it_began(ready, start, space):
    """Where no picture is better than another, it is all there is; a reference without a graph must not take the
    policy's away."""
    module, batch = ready(kl=PenaltySettings(0.7, space), callbacks=[Bright(), Same()])
    module.rewards = RewardSet([Same()])
    drawn = module.draw(batch, 3)
    judgement, figures = module.judge(drawn, batch, 3)
    assert figures["train/zero_std_share"].all() and not judgement.informative.any()
    (found,) = gradients_of(module, batch, judgement)
    begun, penalties = S3DiT.from_pretrained(start), []
    for pack in drawn[0]:
        for number, place in enumerate(pack.window):
            x, sigma, after = pack.rollout.states[number], *module.rollout.grid[place : place + 2].tolist()
            t = torch.full((len(x),), 1 - sigma)
            v = module.backbone(x, t, pack.captions)
            with torch.no_grad():
                reference = begun(x, t, pack.captions)
            a, b = (torch.stack([y.flatten()[:64] for y in of]) for of in (v, reference))
            if space == "latent":
                made, kept = (module.transition(x, of, sigma, after) for of in (v, reference))
                gap = [(p - q).square().mean() for p, q in zip(made.mean, kept.mean, strict=True)]
                penalties.append(torch.stack(gap) / (2 * made.std**2))
            else:
                penalties.append(torch.stack([(p - q).square().mean() for p, q in zip(v, reference, strict=True)]))
            assert not torch.equal(a, b)
    check_gradient(found, 0.7 * torch.cat(penalties).mean(), module)


def test_the_penalty_is_zero_at_first(start, tmp_path):
    for method in ("grpo", "nft"):
        seen = fit(stage(start, method, kl=PenaltySettings(0.1)), tmp_path / method, 2)
        assert seen.figures[0]["train/kl"] == 0 < seen.figures[1]["train/kl"]


@pytest.mark.parametrize("transition", ["cps", "dance_sde"])
def test_a_guarded_loss_is_divided_by_the_weight_of_the_velocity(ready, transition):
    """At the first update a guarded ratio has std times the gradient of the plain one."""
    gradients = []
    module, batch = ready()
    judgement = Judgement(torch.linspace(-1, 1, SAMPLES * GROUP), torch.ones(SAMPLES * GROUP, dtype=torch.bool))
    for ratio in ("plain", "guard"):
        module.grpo = PolicySettings(transition, 0.5, WindowSettings(1, 1, 1), ratio=ratio)
        gradients.append(torch.cat([g.flatten() for g in gradients_of(module, batch, judgement)[0]]))
    _, sigma, after, *_ = sigmas(4, 3.0).tolist()
    if transition == "cps":
        std, weight = after * math.sqrt(0.5), (1 - after) * sigma - after * math.sqrt(0.5) * (1 - sigma)
    else:
        std = 0.5 * math.sqrt(sigma - after)
        weight = (sigma - after) * (1 + 0.5**2 * (1 - sigma) / (2 * sigma))
    torch.testing.assert_close(gradients[1], gradients[0] * std / weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_pictures_that_are_all_alike_or_not_judged_teach_nothing(start, tmp_path, method):
    class Blind(RewardCallback):
        """Cannot judge the pictures of even prompts."""

        def score(self, images, prompts, metadata):
            bright = torch.stack([image.float().mean() for image in images])
            even = torch.tensor([of["number"] % 2 == 0 for of in metadata])
            return torch.where(even, math.nan, bright)

    seen = fit(stage(start, method), tmp_path / "same", 1, callbacks=[Same()])
    before, after = seen.states
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("weights."))
    assert seen.figures[0]["train/zero_std_share"] == 1 and seen.figures[0]["train/gradient_norm"] == 0
    seen = fit(stage(start, method), tmp_path / "blind", 1, callbacks=[Blind(invalid_limit=1.0)])
    figures = seen.figures[0]
    assert figures["train/zero_std_share"] == 0.5 and is_number(figures) and figures["train/gradient_norm"] > 0
    assert figures["reward/blind_invalid"] == 0.5


def test_the_advantages_of_several_rewards_add_up_and_held_out_ones_do_not_weigh(ready):
    class Red(RewardCallback):
        def score(self, images, prompts, metadata):
            return 1000 * torch.stack([image[0].float().mean() for image in images])

    rewards = [Bright(weight=0.5), Red(weight=2.0), Bright(name="other", held_out=True)]
    module, batch = ready(callbacks=rewards)
    drawn = module.draw(batch, 3)
    alone = []
    for reward in (Bright(), Red()):
        module.rewards = RewardSet([reward])
        alone.append(module.judge(drawn, batch, 3)[0].advantages)
    module.rewards = RewardSet(rewards)
    judgement, figures = module.judge(drawn, batch, 3)
    torch.testing.assert_close(judgement.advantages, 0.5 * alone[0] + 2 * alone[1])
    assert {"reward/bright", "reward/red", "reward/other"} <= figures.keys()


# ---------------------------------------------------------------------------------------------------- nft


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_the_policy_that_draws_lags_behind_the_one_in_training(start, tmp_path, lora):
    class Kept(Stage):
        def draw(self, batch, step):
            inputs = batch["image_latents"], torch.full((SAMPLES,), 0.5), batch["caption_features"]
            with torch.no_grad():
                new = self.backbone(*inputs)
            with self.drawing() as network:
                old = network(*inputs)
            gaps.append(float((old[0] - new[0]).abs().max()))
            return super().draw(batch, step)

    gaps: list[float] = []
    settings = ForwardProcessSettings(times=1, lag_flat=1, lag_rate=0.5)
    module = stage(start, "nft", lora=lora, nft=settings, optimizer=FAST)
    module.__class__ = Kept
    fit(module, tmp_path, 4)
    assert gaps[:3] == [0, 0, 0] and gaps[3] > 1e-4  # kept 0, 0 and a half of itself


def test_the_old_policy_draws_and_the_noised_copies_are_of_its_pictures(ready):
    module, batch = ready("nft")
    network = module.snapshots["old_policy"].network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    asked = Counter()
    for name, model in (("old", network), ("new", module.backbone)):
        model.register_forward_pre_hook(lambda *_, name=name: asked.update([name]))
    drawn = module.draw(batch, 3)
    assert asked == {"old": 4 * 3}  # steps, packs
    assert {x.shape for pack in drawn[0] for x in pack.rollout.clean} == {x.shape for x in batch["image_latents"]}
    gradients_of(module, batch)
    assert asked["new"] == 2 * 3  # copies, packs


# ---------------------------------------------------------------------------------------------------- following rewards


class SamePrompts(lightning.LightningDataModule):
    """The same four in every iteration; what is drawn is new."""

    def train_dataloader(self) -> Steps:
        return Steps(0, 1, lambda _: {**batch_of(range(SAMPLES)), "image_latents": [torch.zeros(16, 4, 4)] * SAMPLES})


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that draws something: latents of half the size of noise."""
    backbone, source = build_backbone(backbone_config(dict(SIZES)), None, 7), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=4e-3)
    features = batch_of(range(SAMPLES))["caption_features"]
    for _ in range(100):
        data, noise = ([torch.randn(16, 4, 4, generator=source) * size for _ in features] for size in (0.5, 1.0))
        t = torch.rand(len(features), generator=source)
        predicted = backbone(flow_matching.interpolate(noise, data, t), t, features)
        optimizer.zero_grad()
        flow_matching.loss(predicted, flow_matching.target_velocity(noise, data)).mean().backward()
        optimizer.step()
    backbone.save_pretrained(folder := tmp_path_factory.mktemp("flow") / "transformer")
    return folder


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_a_reward_is_followed_and_a_shuffled_one_is_not(flow, tmp_path, method):
    """Brightness, of which the model that it begins with gives 127 of 255, with a deviation of 12."""
    settings: dict[str, Any] = {
        "rollout": GroupRolloutSettings(3, 1.0, group_size=8),
        "grpo": PolicySettings(window=WindowSettings(1, 0, 0)),
        "nft": ForwardProcessSettings(times=1),
        "optimizer": FAST,
    }
    gains = {}
    for among in (False, True):
        rewards = [Bright(among), Bright(name="seen", held_out=True)]
        seen = fit(stage(flow, method, **settings), tmp_path / str(among), 10, callbacks=rewards, data=SamePrompts())
        bright = [figures["reward/seen"] for figures in seen.figures]
        gains[among] = sum(bright[-3:]) / 3 - bright[0]
    assert gains[False] > 25 and abs(gains[True]) < gains[False] / 2


# ---------------------------------------------------------------------------------------------------- iterations


def test_the_trainer_counts_iterations_whatever_updates_they_have(start, tmp_path):
    module = stage(start, minibatches=2, epochs=2)
    steps: list[bool] = []
    take = module.take_step
    module.take_step = lambda is_last: steps.append(is_last) or take(is_last)  # type: ignore[method-assign]
    seen = fit(module, tmp_path, 3)
    assert steps == [False, False, False, True] * 3
    assert seen.states[-1]["iteration"] == seen.states[-1]["updates"] == 3
    assert int(seen.states[-1]["optimizer.step.x_pad_token"]) == 12
    assert seen.states[-1]["lr"] == pytest.approx(1e-3 * (1 - (3 - 2) / (8 - 2)))
    for packs in module.plan(5):
        assert sum(map(len, packs)) % GROUP == 0 and all(len(pack) <= 5 for pack in packs)
    assert sorted(place for packs in module.plan(5) for pack in packs for place in pack) == list(range(15))
    with pytest.raises(UserError, match=r"1 prompts cannot make .* set data.init_args.drop_last to true"):
        module.plan(1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("grpo", {"minibatches": 2}),
        ("grpo", {"lora": LORA, "kl": PenaltySettings(0.1)}),
        ("nft", {"kl": PenaltySettings(0.1)}),
        ("nft", {"lora": LORA}),
    ],
    ids=["grpo", "grpo-lora", "nft", "nft-lora"],
)
def test_a_run_goes_on_bit_for_bit(start, tmp_path, method, settings):
    straight = fit(stage(start, method, **settings), tmp_path / "straight", 5)
    first = fit(stage(start, method, **settings), tmp_path / "torn", 3, save_every=100)
    second = fit(stage(start, method, **settings), tmp_path / "torn", 5, resume=last_checkpoint(tmp_path / "torn"))
    assert same(first.states[-1], second.states[0])
    assert first.figures + second.figures == straight.figures
    assert same(second.states[-1], straight.states[-1])
    lines = (tmp_path / "torn/rewards/rank-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [
        step + 1 for step in range(5) for _ in range(SAMPLES * GROUP)
    ]


def test_an_update_that_is_not_finite_is_left_out(start, tmp_path):
    class Broken(Stage):
        def policy_terms(self, pack, judgement, step, epoch):
            for losses, figures in super().policy_terms(pack, judgement, step, epoch):
                yield losses * (math.nan if step == 1 else 1), figures

    guard = StepGuard(spike_factor=None)
    module = stage(start)
    module.__class__ = Broken
    kept: list[dict[str, torch.Tensor]] = []
    take = module.take_step

    def watched(is_last: bool) -> torch.Tensor:
        before = {name: weight.clone() for name, weight in module.state_dict().items()}
        norm = take(is_last)
        kept.append(same(before, dict(module.state_dict())))  # type: ignore[arg-type]
        return norm

    module.take_step = watched  # type: ignore[method-assign]
    seen = fit(module, tmp_path, 3, callbacks=[Bright(), guard])
    assert kept == [False, True, False] and guard.skipped == 1
    assert seen.states[-1]["iteration"] == 3 and seen.states[-1]["updates"] == 2


@pytest.mark.parametrize("broken", [(0,), (1,), (0, 1)])
def test_the_average_follows_where_any_update_of_an_iteration_was_taken(start, tmp_path, broken):
    class Broken(Stage):
        def policy_terms(self, pack, judgement, step, epoch):
            number = int(pack.places[0] >= SAMPLES * GROUP // 2)
            for losses, figures in super().policy_terms(pack, judgement, step, epoch):
                yield losses * (math.nan if step == 1 and number in broken else 1), figures

    guard = StepGuard(spike_factor=None)
    module = stage(start, minibatches=2)
    module.__class__ = Broken
    seen = fit(module, tmp_path, 3, callbacks=[Bright(), guard])
    assert guard.skipped == len(broken) and seen.states[-1]["updates"] == (2 if len(broken) == 2 else 3)
    records = [json.loads(line) for line in (tmp_path / "guard.jsonl").read_text().splitlines()]
    assert [(record["step"], record["ids"]) for record in records] == [(2, list(range(4, 8)))] * len(broken)


def test_figures_of_the_curves(start, tmp_path):
    module = stage(start, kl=PenaltySettings(0.1))
    logged: dict[str, Any] = {}
    log = module.log_dict
    module.log_dict = lambda figures, **more: logged.update(figures) or log(figures, **more)  # type: ignore[method-assign]
    fit(module, tmp_path, 1)
    assert {
        "train/ratio", "train/ratio_std", "train/clip_fraction", "train/kl", "train/advantage_std", "train/loss",
        "train/zero_std_share", "train/diversity", "train/gradient_norm", "reward/bright", "reward/bright_std",
        "reward/bright_invalid", "time/rollout_seconds", "time/reward_seconds", "time/update_seconds",
    } == logged.keys()  # fmt: skip
    assert all(logged[f"time/{part}_seconds"] > 0 for part in ("rollout", "reward", "update"))


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ppo"}, "method must be one of grpo, nft, not ppo"),
        ({"method": "nft", "rollout": GroupRolloutSettings(guidance_scale=2.0)}, "guidance_scale=2.0 does not go with"),
        ({"method": "nft", "rollout": GroupRolloutSettings(same_noise=True)}, "same_noise=true does not go with"),
        ({"method": "nft", "kl": PenaltySettings(0.1, "latent")}, "kl.space=latent does not go with"),
        ({"rollout": GroupRolloutSettings(5)}, r"3 steps can begin at 1 at the latest, not at 2"),
        ({"lora": LoRASettings(dropout=0.1)}, "lora.dropout must be 0"),
        ({"minibatches": 0}, "minibatches must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"gradient_clip_val": 0.0}, "gradient_clip_val must be more than 0"),
        ({"canvases": [(64, 0)]}, "canvases: each width and height must be at least 1"),
        ({"frozen_dtype": "bfloat16"}, "frozen_dtype=bfloat16 is of a frozen copy"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        GRPOModule(Encoder(), Codec(), backbone=dict(SIZES), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        lambda: GroupRolloutSettings(0),
        lambda: GroupRolloutSettings(group_size=1),
        lambda: GroupRolloutSettings(batch_size=0),
        lambda: GroupRolloutSettings(cfg_start=0.1),
        lambda: WindowSettings(0),
        lambda: WindowSettings(1, 2, 1),
        lambda: PolicySettings("ode"),  # type: ignore[arg-type]
        lambda: PolicySettings(level=1.5),
        lambda: PolicySettings(clip="none"),  # type: ignore[arg-type]
        lambda: PolicySettings(clip_range=0.0),
        lambda: PolicySettings(reduction="max"),  # type: ignore[arg-type]
        lambda: PolicySettings(ratio="norm"),  # type: ignore[arg-type]
        lambda: ForwardProcessSettings(mixing=0.0),
        lambda: ForwardProcessSettings(times=0),
        lambda: ForwardProcessSettings(lag_largest=1.0),
        lambda: AdvantageSettings("batch"),  # type: ignore[arg-type]
        lambda: AdvantageSettings(clip=0.0),
        lambda: PenaltySettings(-0.1),
        lambda: PenaltySettings(0.1, "pixel"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError):
        settings()


def test_a_level_belongs_to_its_kernel():
    assert [PolicySettings(kernel).noise_level for kernel in ("cps", "flow_sde", "dance_sde")] == [0.8, 0.7, 0.3]  # type: ignore[arg-type]
    assert PolicySettings(level=0.5).noise_level == 0.5


@pytest.mark.parametrize(
    ("method", "settings", "trainer", "message"),
    [
        ("grpo", {}, {"gradient_clip_val": 1.0}, "set trainer.gradient_clip_val to null"),
        ("grpo", {}, {"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches to 1"),
        ("grpo", {}, {"callbacks": []}, "no reward among trainer.callbacks is not held out"),
        ("grpo", {}, {"callbacks": [Bright(held_out=True)]}, "there are: bright"),
        ("nft", {}, {"precision": "bf16-true"}, "method=nft lets a policy follow by less"),
        ("grpo", {"init_from": None}, {}, "init_from is not given"),
    ],
)
def test_settings_of_the_trainer_that_it_cannot_have_are_named(start, tmp_path, method, settings, trainer, message):
    with pytest.raises(UserError, match=message):
        fit(stage(start, method, **settings), tmp_path, 1, **trainer)


def test_several_devices_need_fsdp2_and_batches_of_one_size(start):
    module = stage(start)
    trainer = SimpleNamespace(strategy=DDPStrategy(), precision="32-true", world_size=2)
    module._trainer = trainer  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"trainer\.strategy=fsdp2: set that, or devices=1"):
        module.setup("fit")
    trainer.strategy, trainer.datamodule = SimpleNamespace(), SimpleNamespace(token_budget=1000)
    with pytest.raises(UserError, match=r"give data\.init_args\.batch_size in place of token_budget"):
        module.setup("fit")


def test_a_checkpoint_of_the_other_method_is_refused(start, tmp_path):
    fit(stage(start, "nft"), tmp_path / "nft", 1, save_every=100)
    with pytest.raises(UserError, match="kept old policy, and this one keeps no earlier weights"):
        fit(stage(start), tmp_path / "grpo", 2, resume=last_checkpoint(tmp_path / "nft"))


def test_another_type_of_the_reference_is_named(start, tmp_path):
    penalty = PenaltySettings(0.1)
    fit(stage(start, kl=penalty), tmp_path, 1, save_every=100)
    with pytest.raises(
        UserError, match=r"a reference in float32, and .* in bfloat16: set model\.init_args\.frozen_dtype"
    ):
        fit(stage(start, kl=penalty, frozen_dtype="bfloat16"), tmp_path, 2, resume=last_checkpoint(tmp_path))
