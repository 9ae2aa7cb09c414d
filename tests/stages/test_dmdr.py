"""Distillation: who learns when, from what, and that an interrupted run goes on exactly."""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from distillation import LAYOUTS, SIZES, WAYS, Codec, Encoder, Stage, batch_of, fit, same, stage, write_teacher
from lightning.pytorch.strategies import DDPStrategy
from ranks import SAMPLES
from variants import PROMPTS, write_pipeline

from zimage_lit.backbone.parallelize import ParallelizeSettings
from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.callbacks.ema import EMA
from zimage_lit.callbacks.export import PipelineExport
from zimage_lit.callbacks.guards import StepGuard
from zimage_lit.callbacks.sampling import SamplingSettings, draw_pictures
from zimage_lit.config import compose
from zimage_lit.errors import UserError
from zimage_lit.lora import LoRASettings, MergedWeights, adapters_of, base_weights
from zimage_lit.objectives.distillation import pseudo_loss
from zimage_lit.objectives.timesteps import RenoiseLaw
from zimage_lit.pipeline import ZImagePipeline
from zimage_lit.rewards import RewardCallback
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.sampling import sigmas
from zimage_lit.stages import DMDRModule
from zimage_lit.stages.distillation_settings import DynamicGuidanceSettings, ObjectiveSettings, RolloutSettings
from zimage_lit.stages.initial_weights import backbone_config, build_backbone, open_weights, read_checkpoint
from zimage_lit.stages.optimizers import OptimizerSettings
from zimage_lit.stages.reward_terms import RewardSettings, policy_losses
from zimage_lit.stages.rollouts import repeated
from zimage_lit.validate import check_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "transformer")


# ---------------------------------------------------------------------------------------------------- whose turn it is


@pytest.mark.parametrize("layout", WAYS)
def test_a_turn_has_gradients_of_its_role_alone_and_changes_nobody_else(teacher, tmp_path, layout):
    module = stage(teacher, layout)
    seen = fit(module, tmp_path, 7)
    fake, student = "fake_score", "student"
    assert [turn.role for turn in seen.turns] == [fake, fake, student, fake, fake, fake, student, fake, fake]
    for turn in seen.turns:
        assert turn.with_gradients == turn.changed == {turn.role}
    assert module.steps == {"student": 2, "fake_score": 7} and seen.states[-1]["iteration"] == 7
    assert seen.states[-1]["updates"] == 2  # the average follows the student
    assert all(parameter.grad is None for parameter in module.parameters())
    fresh = build_backbone(backbone_config(dict(SIZES)), str(teacher), 0).state_dict()
    assert same(dict(module.roles.frozen()), dict(fresh))


@pytest.mark.parametrize("layout", WAYS)
def test_a_checkpoint_holds_what_is_learnt_and_no_teacher(teacher, tmp_path, layout):
    module = stage(teacher, layout)
    fit(module, tmp_path, 3, save_every=100)
    state = read_checkpoint(last_checkpoint(tmp_path))["state_dict"]
    whole = len(build_backbone(backbone_config(dict(SIZES)), None, 0).state_dict())
    adapters = 2 * 2 * 7  # down and up, two blocks, seven matrices each
    expected = {
        "copies": (whole, whole),
        "fake_lora": (whole, adapters),
        "adapters": (adapters, adapters),
        "student_lora": (adapters, adapters),
    }[layout]
    prefixes = ("backbone.", "fake_score.")
    assert tuple(sum(name.startswith(prefix) for name in state) for prefix in prefixes) == expected
    assert len(state) == sum(expected)
    average = open_weights(last_checkpoint(tmp_path))
    assert {f"backbone.{name}" for name in average} == {name for name in state if name.startswith("backbone.")}


@pytest.mark.parametrize("layout", WAYS)
def test_a_run_killed_between_two_steps_of_the_student_goes_on_bit_for_bit(teacher, tmp_path, layout):
    straight = fit(stage(teacher, layout), tmp_path / "straight", 8)
    first = fit(stage(teacher, layout), tmp_path / "torn", 4, save_every=100)
    assert first.states[-1]["steps"] == {"student": 1, "fake_score": 4}  # in mid-cycle
    second = fit(stage(teacher, layout), tmp_path / "torn", 8, resume=last_checkpoint(tmp_path / "torn"))
    assert same(first.states[-1], second.states[0])
    assert first.losses + second.losses == straight.losses
    assert same(second.states[-1], straight.states[-1])
    assert straight.states[-1]["steps"] == {"student": 2, "fake_score": 8}
    assert 0 < straight.states[-1]["student.lr"] < 2e-3


def test_a_step_that_is_not_finite_is_as_if_the_student_had_not_had_a_turn(teacher, tmp_path):
    class Broken(Stage):
        def student_losses(self, generated, batch, step):
            losses, figures = super().student_losses(generated, batch, step)
            return losses * (math.nan if step == 2 else 1), figures

    module, guard = stage(teacher, "copies"), StepGuard()
    module.__class__ = Broken
    seen = fit(module, tmp_path, 6, callbacks=[guard])
    assert [turn.changed for turn in seen.turns if turn.role == "student"] == [set(), {"student"}]
    assert module.steps == {"student": 1, "fake_score": 6} and seen.states[-1]["updates"] == 1
    assert guard.skipped == 1 and guard.watch(0).in_a_row == 0 and len(guard.watch(1).losses) == 6
    assert '"optimizer": 0' in (tmp_path / "guard.jsonl").read_text()


def test_recomputed_blocks_see_the_adapters_of_the_turn(teacher, tmp_path):
    plain = fit(stage(teacher, "adapters"), tmp_path / "plain", 4)
    settings = ParallelizeSettings(activation_checkpointing="full")
    again = fit(stage(teacher, "adapters", parallelize=settings), tmp_path / "again", 4)
    assert again.losses == plain.losses and same(again.states[-1], plain.states[-1])


# ---------------------------------------------------------------------------------------------------- what is learnt


def ready(teacher: Path, layout: str, folder: Path, save_every: int | None = None, **settings) -> Stage:
    """A stage whose roles differ from each other, after three iterations."""
    module = stage(teacher, layout, **settings)
    fit(module, folder, 3, save_every=save_every)
    module.ids = list(range(SAMPLES))
    return module


def velocities(module: Stage, role: str, latents, t, features):
    with torch.no_grad(), module.roles.acting(role) as network:
        return network(latents, t, features)


def test_bfloat16_weights_are_asked_at_float32_times(teacher, tmp_path):
    times = set()

    class Watched(Stage):
        def on_train_start(self):
            super().on_train_start()
            for network in self.roles.networks.values():
                network.register_forward_pre_hook(lambda _, arguments: times.add(arguments[1].dtype))

    module = stage(teacher, "copies", ratio=1)
    module.__class__ = Watched
    seen = fit(module, tmp_path, 1, precision="bf16-true")
    assert module.backbone.x_pad_token.dtype == torch.bfloat16 and times == {torch.float32}
    assert math.isfinite(seen.losses[0])


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_the_roll_out_is_the_serving_path_up_to_its_last_forward(teacher, tmp_path, sampler):
    module = ready(teacher, "copies", tmp_path, rollout=RolloutSettings(4, shift=2.0, sampler=sampler))
    batch = batch_of(range(SAMPLES))
    grid, seen = sigmas(4, 2.0).tolist(), set()
    for step in range(12):
        generated = module.generate(batch, step)
        x = module.noise(module.shapes(batch), "noise", step)
        for number, (sigma, after) in enumerate(pairwise(grid[: generated.step_index + 1])):
            t = torch.full((SAMPLES,), 1 - sigma)
            v = velocities(module, "student", x, t, batch["caption_features"])
            fresh = module.noise(module.shapes(batch), f"renoise/{number}", step)
            clean = [a + sigma * b for a, b in zip(x, v, strict=True)]
            if sampler == "euler":
                x = [a + (sigma - after) * b for a, b in zip(x, v, strict=True)]
            else:
                x = [(1 - after) * c + after * z for c, z in zip(clean, fresh, strict=True)]
        sigma = grid[generated.step_index]
        v = velocities(module, "student", x, torch.full((SAMPLES,), 1 - sigma), batch["caption_features"])
        for sample, a, b in zip(generated.clean, x, v, strict=True):
            torch.testing.assert_close(sample, a + sigma * b, rtol=1e-5, atol=1e-5)
            assert sample.requires_grad
        seen.add(generated.step_index)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize(("name", "scale"), [("coupled", 3.0), ("decoupled", 3.0), ("decoupled", 1.0)])
@pytest.mark.parametrize(("step", "early"), [(0, True), (8, False)])  # of the student, before and after guidance begins
def test_terms_are_the_formulas_written_out_sample_by_sample(teacher, tmp_path, name, scale, step, early):
    settings = ObjectiveSettings(name, guidance_scale=scale, cfg_start=0.4, clamp=0.1)
    module = ready(teacher, "copies", tmp_path, objective=settings)
    batch = batch_of(range(SAMPLES))
    generated = module.generate(batch, step)
    own = 1 - float(sigmas(module.rollout.num_inference_steps, module.rollout.shift)[generated.step_index])
    assert (own < 0.4) == early
    terms = module.terms(generated, step)
    noisy, t = module.renoised(generated, settings.matching, "matching", step)
    law = RenoiseLaw("cleaner", shift=module.rollout.shift)
    other = (noisy, t) if name == "coupled" else module.renoised(generated, law, "guidance", step)
    (empty,) = module.text_encoder.encode([""])

    def sees(role, x, time, caption):
        (v,) = velocities(module, role, [x], time[None], [caption])
        return x + (1 - time) * v

    for i in range(SAMPLES):
        x, caption = generated.clean[i].detach(), batch["caption_features"][i]
        real, fake = (sees(role, noisy[i], t[i], caption) for role in ("teacher", "fake_score"))
        c, u = (sees("teacher", other[0][i], other[1][i], text) for text in (caption, empty))
        if other[1][i] < 0.4 or early:
            u = c
        target = u + scale * (c - u) if name == "coupled" else real
        expected = (fake - target) / (x - target).abs().mean().clamp(min=0.1)
        torch.testing.assert_close(terms.matching[i], expected, rtol=1e-4, atol=1e-4)
        gap = (real - fake).abs().mean() / (x - real).abs().mean()
        assert terms.gap[i] == pytest.approx(float(gap), rel=1e-3)
        if name == "decoupled" and scale != 1 and not early:
            guidance = -(scale - 1) * (c - u) / (x - c).abs().mean().clamp(min=0.1)
            torch.testing.assert_close(terms.guidance[i], guidance, rtol=1e-4, atol=1e-4)
        else:
            assert terms.guidance is None


@pytest.mark.parametrize("objective", [ObjectiveSettings(guidance_scale=1.0), ObjectiveSettings(cfg_start=0.4)])
def test_without_guidance_the_teacher_is_not_asked_without_captions(teacher, tmp_path, objective):
    module = ready(teacher, "copies", tmp_path, objective=objective)  # the student's first step begins before 0.4
    asked = []
    module.teacher.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    module.terms(module.generate(batch_of(range(SAMPLES)), 0), 0)
    assert asked == [SAMPLES]


@pytest.mark.parametrize("layout", WAYS)
def test_a_step_of_the_student_takes_its_samples_where_they_are_sent(teacher, tmp_path, layout):
    class Kept(Stage):
        def terms(self, generated, step):
            self.before, self.sent = [x.detach() for x in generated.clean], super().terms(generated, step)
            return self.sent

    module = stage(teacher, layout, ratio=1, student_optimizer=OptimizerSettings(lr=1e-3, betas=(0.0, 0.99)))
    module.__class__ = Kept
    fit(module, tmp_path, 1)
    with torch.no_grad():
        after = module.generate(batch_of(range(SAMPLES)), 0).clean
    moved = torch.cat([(b - a).flatten() for a, b in zip(module.before, after, strict=True)])
    sent = -torch.cat([(a + b).flatten() for a, b in zip(module.sent.matching, module.sent.guidance, strict=True)])
    assert torch.nn.functional.cosine_similarity(moved, sent, dim=0) > 0.1


@pytest.mark.parametrize("layout", WAYS)
def test_the_fake_score_learns_the_students_samples(teacher, tmp_path, layout):
    class Same(Stage):  # the first batch again and again
        def training_step(self, batch, batch_idx):
            self.ids = list(range(SAMPLES))
            losses.append(float(self.fake_turn(self.generate(batch_of(range(SAMPLES)), 0), 0)))
            return {"loss": torch.tensor(losses[-1])}

    losses: list[float] = []
    module = stage(teacher, layout, fake_optimizer=OptimizerSettings(lr=3e-3, betas=(0.0, 0.99)))
    module.__class__ = Same
    fit(module, tmp_path, 20)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_the_fake_score_takes_a_share_of_the_student(teacher, tmp_path):
    still = OptimizerSettings(lr=0.0)
    module = stage(teacher, "copies", objective=ObjectiveSettings(ida=0.75), fake_optimizer=still)
    seen = fit(module, tmp_path, 3)
    start, end = seen.states
    for name in ("x_pad_token", "layers.0.feed_forward.w1.weight"):
        student = end[f"weights.backbone.{name}"]
        expected = 0.75 * start[f"weights.fake_score.{name}"] + 0.25 * student  # it was the same before the third step
        torch.testing.assert_close(end[f"weights.fake_score.{name}"], expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(student, start[f"weights.backbone.{name}"])


def test_the_datas_pictures_teach_at_the_times_of_serving_alone(teacher, tmp_path):
    objective = ObjectiveSettings(guidance_scale=1.0, data=0.5, mean_variance=0.25)
    module = ready(teacher, "copies", tmp_path, objective=objective)
    times = []
    module.backbone.register_forward_pre_hook(lambda _, args: times.append(args[1]))
    batch = batch_of(range(SAMPLES))
    generated = module.generate(batch, 0)
    times.clear()
    losses = module.data_losses(generated, batch["image_latents"], 0)
    (t,) = times
    assert set(t.tolist()) <= {float(1 - sigma) for sigma in sigmas(4, 3.0)[:-1]}
    noise = module.noise(module.shapes(batch), "data/noise", 0)
    data = torch.cat([x.flatten(1) for x in batch["image_latents"]], dim=1)
    for i, (x1, x0) in enumerate(zip(batch["image_latents"], noise, strict=True)):
        (v,) = velocities(module, "student", [t[i] * x1 + (1 - t[i]) * x0], t[i : i + 1], [generated.features[i]])
        own = generated.clean[i].flatten(1)
        ratio, shift = own.var(1, correction=0) / data.var(1), (own.mean(1) - data.mean(1)).square() / data.var(1)
        expected = 0.5 * (v - (x1 - x0)).square().mean() + 0.25 * (0.5 * (ratio + shift - 1 - ratio.log())).mean()
        assert float(losses[i]) == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(UserError, match="need data with pictures"):
        module.data_losses(generated, None, 0)


# ---------------------------------------------------------------------------------------------------- DynaDG


@pytest.mark.parametrize("layout", ["fake_lora", "adapters"])
def test_the_effective_teacher_is_the_frozen_weights_and_a_falling_share_of_the_fake_scores_lora(
    teacher, tmp_path, layout
):
    module = ready(teacher, layout, tmp_path, dynamic_guidance=DynamicGuidanceSettings(start=0.6, steps=4))
    inputs = batch_of(range(SAMPLES))
    t = torch.linspace(0.1, 0.9, SAMPLES)
    base, fake = module.roles.frozen(), adapters_of(module.roles.networks["fake_score"], "fake_score")
    answers = []
    for done in range(6):
        module.steps["student"] = done
        share = 0.6 * 0.5 * (1 + math.cos(math.pi * min(done / 4, 1)))
        assert module.teacher_share() == pytest.approx(share)
        twin = build_backbone(module.config, None, 0)
        twin.load_state_dict(dict(MergedWeights(base, fake, share)))
        clean = module.seen_by("teacher", inputs["image_latents"], t, inputs["caption_features"])
        with torch.no_grad():
            expected = twin(inputs["image_latents"], t, inputs["caption_features"])
        for i, (x, v) in enumerate(zip(inputs["image_latents"], expected, strict=True)):
            torch.testing.assert_close(clean[i], x + (1 - t[i]) * v, rtol=1e-4, atol=1e-5)
        answers.append(clean[0].detach())
    assert not torch.allclose(answers[0], answers[3]) and torch.equal(answers[4], answers[5])


# ---------------------------------------------------------------------------------------------------- rewards


class Red(RewardCallback):
    """How red a picture is."""

    differentiable = True

    def score(self, images, prompts, metadata):
        return torch.stack([image[0].float().mean() - image[1:].float().mean() for image in images])


class Number(RewardCallback):
    """What the prompt's metadata says: all pictures of a prompt get the same."""

    def score(self, images, prompts, metadata):
        assert all(prompt == f"number {of['number']}" for prompt, of in zip(prompts, metadata, strict=True))
        return torch.tensor([float(of["number"]) for of in metadata])


class OwnNoise(Stage):
    """Groups are larger than the batch, whose ids its noise would go by."""

    noise = DMDRModule.noise
    times = DMDRModule.times


def rewarded(teacher: Path, form: str, **settings) -> Stage:
    module = stage(
        teacher,
        "copies",
        reward=RewardSettings(form, **settings),  # type: ignore[arg-type]
        student_optimizer=OptimizerSettings(lr=3e-3, betas=(0.0, 0.99)),
        ratio=1,
        rollout=RolloutSettings(2, shift=1.0, sampler="renoise"),
    )
    module.__class__ = OwnNoise
    return module


@pytest.mark.parametrize("form", ["backprop", "grpo"])
def test_rewards_are_followed(teacher, tmp_path, form):
    """Distribution matching is left out, so that what moves the student is the reward alone."""

    class RewardOnly(OwnNoise):
        def terms(self, generated, step):
            terms = super().terms(generated, step)
            return replace(terms, matching=[x * 0 for x in terms.matching], guidance=None)

    module = rewarded(teacher, form, group_size=8)
    module.__class__ = RewardOnly
    scores = []
    log = module.log_dict
    module.log_dict = lambda values, **more: scores.append(float(values["reward/red"])) or log(values, **more)
    fit(module, tmp_path, 20, callbacks=[Red(), Number(held_out=True)], log_every_n_steps=1)
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 0.1
    assert "reward/number" in module.student_figures  # logged, though it never weighs


def test_a_reward_that_does_not_tell_pictures_apart_leaves_distribution_matching_alone(teacher, tmp_path):
    module = rewarded(teacher, "advantage", group_size=3)
    fit(module, tmp_path / "a", 1, callbacks=[Number()])
    batch = repeated(batch_of(range(SAMPLES)), 3)
    generated = module.generate(batch, 4)
    losses, _ = module.student_losses(generated, batch, 4)
    torch.testing.assert_close(losses, pseudo_loss(generated.clean, module.terms(generated, 4).matching))


def test_the_guidance_of_better_pictures_weighs_more(teacher, tmp_path):
    module = rewarded(teacher, "advantage", group_size=3, weight=0.5)
    fit(module, tmp_path / "a", 1, callbacks=[Red()])
    batch = repeated(batch_of(range(SAMPLES)), 3)
    generated = module.generate(batch, 4)
    losses, _ = module.student_losses(generated, batch, 4)
    terms = module.terms(generated, 4)
    advantages = module.reward_term.advantages(generated.clean, batch, 4)
    assert advantages.abs().max() > 1 and advantages.view(SAMPLES, 3).sum(1).abs().max() < 1e-3
    guidance = pseudo_loss(generated.clean, terms.guidance)
    torch.testing.assert_close(losses, pseudo_loss(generated.clean, terms.matching) + 0.5 * advantages * guidance)


def test_rewards_wait_for_their_start(teacher, tmp_path):
    module = rewarded(teacher, "grpo", start_step=2)
    seen = fit(module, tmp_path, 3, callbacks=[Red()])
    assert seen.figures["train/student_step"] == 3 and "train/reward_loss" in seen.figures
    module = rewarded(teacher, "grpo", start_step=3)
    assert "train/reward_loss" not in fit(module, tmp_path / "b", 3, callbacks=[Red()]).figures


def test_a_run_that_goes_on_records_every_picture_once(teacher, tmp_path):
    def run(steps: int, resume: Path | None = None) -> None:
        fit(rewarded(teacher, "backprop"), tmp_path, steps, resume=resume, callbacks=[Red()], save_every=100)

    run(2)
    shutil.copy(last_checkpoint(tmp_path), tmp_path / "two.ckpt")
    run(3, tmp_path / "two.ckpt")
    run(3, tmp_path / "two.ckpt")  # the third step is taken again
    lines = (tmp_path / "rewards/rank-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1] * SAMPLES + [2] * SAMPLES + [3] * SAMPLES


def test_the_policys_loss_is_minus_the_advantage_times_the_density_of_the_step():
    grid = sigmas(3, 2.0)
    x, v, noise = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    weight = torch.tensor(1.3, requires_grad=True)
    sigma, after = float(grid[1]), float(grid[2])
    mean = (1 - after) * (x + sigma * weight * v)  # all noise is drawn anew
    reached = (mean + after * noise).detach()
    advantages = torch.tensor([1.5, -0.5])
    states = [[], list(x), list(reached)]
    loss = policy_losses(states, {1: list(weight * v)}, grid, 1.0, advantages)
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    density = -(reached - mean).square().flatten(1).mean(1) / (2 * after**2)
    (expected,) = torch.autograd.grad(-(advantages * density).sum(), weight)
    assert float(gradient) == pytest.approx(float(expected), rel=1e-4) and abs(float(expected)) > 1e-3


# ---------------------------------------------------------------------------------------------------- settings


def test_an_unknown_key_is_an_error():
    with pytest.raises(UserError, match="strenght"):
        check_config(compose("tiny/dmdr", ["model.init_args.objective.strenght=1"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "copy"}, "layout must be one of copies, fake_lora, adapters"),
        ({"layout": "adapters"}, r"layout=adapters needs model\.init_args\.lora"),
        ({"lora": LoRASettings()}, r"layout=copies has no use for model\.init_args\.lora"),
        ({"layout": "fake_lora"}, r"layout=fake_lora needs model\.init_args\.fake_lora"),
        ({"layout": "fake_lora", "fake_lora": LoRASettings(dropout=0.1)}, "dropout must be 0"),
        ({"dynamic_guidance": DynamicGuidanceSettings()}, "dynamic_guidance moves the teacher"),
        ({"objective": ObjectiveSettings(ida=0.9), "layout": "fake_lora", "fake_lora": LoRASettings()}, "ida blends"),
        ({"ratio": 0}, "ratio must be at least 1"),
        ({"canvases": [(64, 0)]}, "canvases: each width and height must be at least 1, not 0"),
        ({"gradient_clip_val": 0.0}, "gradient_clip_val must be more than 0"),
        ({"reward": RewardSettings("advantage"), "objective": ObjectiveSettings("coupled")}, "guidance term"),
        ({"reward": RewardSettings("grpo", policy_steps=8)}, "policy_steps must be less than"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        DMDRModule(Encoder(), Codec(), backbone=dict(SIZES), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        lambda: ObjectiveSettings("both"),  # type: ignore[arg-type]
        lambda: ObjectiveSettings(clamp=0.0),
        lambda: ObjectiveSettings(ida=2.0),
        lambda: ObjectiveSettings(mean_variance=-1.0),
        lambda: ObjectiveSettings("coupled", guidance=RenoiseLaw()),
        lambda: RolloutSettings(sampler="heun"),  # type: ignore[arg-type]
        lambda: RolloutSettings(0),
        lambda: RewardSettings("best"),  # type: ignore[arg-type]
        lambda: RewardSettings(weight=-1.0),
        lambda: RewardSettings("advantage", weight=0.0),  # no guidance would be left
        lambda: RewardSettings("grpo", group_size=1),
        lambda: DynamicGuidanceSettings(start=1.5),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError):
        settings()


@pytest.mark.parametrize(
    ("settings", "trainer", "message"),
    [
        ({}, {"gradient_clip_val": 1.0}, "set trainer.gradient_clip_val to null"),  # defaults/run.yaml's
        ({}, {"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches to 1"),
        ({}, {"callbacks": [Red()]}, r"has rewards \(red\), and without model.init_args.reward nobody asks"),
        ({"objective": ObjectiveSettings(ida=0.999)}, {"precision": "bf16-true"}, "ida blends by less"),
    ],
)
def test_settings_of_the_trainer_that_it_cannot_have_are_named(teacher, tmp_path, settings, trainer, message):
    with pytest.raises(UserError, match=message):
        fit(stage(teacher, "copies", **settings), tmp_path, 1, **trainer)


def test_whole_networks_on_several_devices_are_refused(teacher):
    module = stage(teacher, "copies")
    module._trainer = SimpleNamespace(strategy=DDPStrategy(), precision="32-true")  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"trainer\.strategy=fsdp2: set that, or devices=1"):
        module.setup("fit")


def test_a_run_goes_on_with_its_own_layout_and_teacher_alone(teacher, tmp_path):
    fit(stage(teacher, "fake_lora"), tmp_path / "run", 2, save_every=100)
    last = last_checkpoint(tmp_path / "run")
    with pytest.raises(UserError, match=r"was trained with .*layout=fake_lora"):
        fit(stage(teacher, "copies"), tmp_path / "other", 4, resume=last)
    kept = torch.load(last, weights_only=True)
    del kept["layout"]  # as a checkpoint of FlowMatchingModule is
    torch.save(kept, other := tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"is of another stage: name it as model\.init_args\.init_from"):
        fit(stage(teacher, "fake_lora"), tmp_path / "other", 4, resume=other)
    with pytest.raises(UserError, match="another teacher"):
        fit(stage(write_teacher(tmp_path / "transformer", seed=8), "fake_lora"), tmp_path / "other", 4, resume=last)
    with pytest.raises(UserError, match="init_from is not given"):
        fit(stage(teacher, "copies", init_from=None), tmp_path / "other", 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_phase_begins_with_the_student_and_fake_score_of_the_first(teacher, tmp_path, layout):
    first = fit(stage(teacher, layout), tmp_path / "first", 6, save_every=100)
    source = str(last_checkpoint(tmp_path / "first"))
    second = fit(stage(teacher, layout, student_init_from=source), tmp_path / "second", 1)
    start, end = second.states[0], first.states[-1]
    for name, value in start.items():
        if name.startswith("weights.backbone."):
            assert torch.equal(value, end[name.replace("weights.backbone.", "average.")])
        elif name.startswith("weights."):
            assert torch.equal(value, end[name])
    assert start["steps"] == {"student": 0, "fake_score": 0}


def test_a_lora_on_a_distilled_student_has_that_as_its_base_and_another_teacher(teacher, tmp_path):
    distilled = write_teacher(tmp_path / "distilled/transformer", seed=9)
    module = ready(teacher, "student_lora", tmp_path / "run", save_every=100, student_init_from=str(distilled))
    for network, source in ((module.backbone, distilled), (module.fake_score, teacher)):
        stored = build_backbone(module.config, str(source), 0).state_dict()
        assert same(base_weights(network), dict(stored))
    with pytest.raises(UserError, match="another teacher or base"):
        fit(stage(teacher, "student_lora"), tmp_path / "again", 4, resume=last_checkpoint(tmp_path / "run"))


def test_prompts_without_pictures_are_drawn_on_the_canvases(teacher, tmp_path):
    module = ready(teacher, "copies", tmp_path, canvases=[(4, 6), (8, 4)])
    batch = {name: values for name, values in batch_of(range(SAMPLES)).items() if name != "image_latents"}
    generated = module.generate(batch, 0)
    assert [tuple(x.shape) for x in generated.clean] == [(16, 6, 4), (16, 4, 8)] * 2
    module.canvases = None
    with pytest.raises(UserError, match="canvases how large"):
        module.generate(batch, 0)
    with pytest.raises(UserError, match="DMDRModule learns from captions, and the data give"):
        module.generate({**batch, "sources": batch["captions"]}, 0)


# ---------------------------------------------------------------------------------------------------- handed out


@pytest.mark.parametrize("layout", WAYS)
def test_an_exported_student_draws_what_the_average_draws(tmp_path, layout):
    source = write_pipeline(tmp_path, "teacher", seed=3)
    teacher = ZImagePipeline.from_pretrained(source)
    lora, fast = LoRASettings(rank=4), OptimizerSettings(lr=5e-3)
    is_lora = layout in ("adapters", "student_lora")
    module = DMDRModule(
        teacher.text_encoder, teacher.codec, backbone={"preset": "tiny", **vars(teacher.backbone.config)},
        init_from=str(source), layout="fake_lora" if layout == "student_lora" else layout,
        lora=lora if is_lora else None, fake_lora=None if layout == "copies" else lora,
        student_optimizer=fast, fake_optimizer=fast, ratio=1,
    )  # fmt: skip
    sampling = SamplingSettings(32, 32, num_inference_steps=2, guidance_scale=1.0, shift=3.0)
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path / "run", callbacks=[EMA(decay=0.5), PipelineExport(sampling), RunCheckpoint()],
    )  # fmt: skip
    batch = {"captions": list(PROMPTS), "images": [torch.zeros(3, 32, 32, dtype=torch.uint8) for _ in PROMPTS]}
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 3, batch_size=None))
    drawn = draw_pictures(trainer, module, sampling, PROMPTS, [1, 2, 3])
    exported = ZImagePipeline.from_pretrained(tmp_path / "run/pipeline")
    again = exported(PROMPTS, seed=[1, 2, 3])
    unlike = [np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(drawn, again, strict=True)]
    assert max(unlike) <= 1  # merging rounds
    assert any(
        np.asarray(a).tolist() != np.asarray(b).tolist()
        for a, b in zip(drawn, teacher(PROMPTS, seed=[1, 2, 3]), strict=True)
    )
