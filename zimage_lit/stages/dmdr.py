"""Distillation into a few steps: Decoupled DMD, and DMDR, which joins it with rewards.

One iteration draws a batch with the student, on the grid on which it will serve (back-simulation). The fake score
learns that batch in every iteration, the student learns from it in every `ratio`-th one.
Sources: DMD2 (arXiv 2405.14867), Decoupled DMD (arXiv 2511.22677), DMDR (arXiv 2511.13649).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from zimage_lit.backbone import S3DiT
from zimage_lit.backbone.parallelize import ParallelizeSettings, local
from zimage_lit.components import LatentCodec, TextEncoder
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.lora import LoRASettings, check_adapter_types
from zimage_lit.objectives import distillation, flow_matching
from zimage_lit.objectives.timesteps import RenoiseLaw, TimestepLaw, dynamic_teacher_scale
from zimage_lit.rewards import RewardSet, find_rewards
from zimage_lit.rng import generator
from zimage_lit.sampling.guidance import guided, guided_velocity
from zimage_lit.sampling.solvers import SOLVERS
from zimage_lit.stages.distillation_settings import DynamicGuidanceSettings, ObjectiveSettings, RolloutSettings
from zimage_lit.stages.frozen_parts import caption_features, check_text_to_image, picture_latents, prepare_frozen_parts
from zimage_lit.stages.gradients import back_propagate, clip_gradients
from zimage_lit.stages.initial_weights import backbone_config, check_weights, located, store_of
from zimage_lit.stages.optimizers import (
    LearningRate,
    OptimizerSettings,
    build_optimizer,
    check_can_shard,
    kind_of_states,
)
from zimage_lit.stages.reward_terms import RewardSettings, RewardTerm, check_reward, policy_losses
from zimage_lit.stages.roles import FAKE, Layout, Roles, check_layout, continue_from, fingerprints, make_networks
from zimage_lit.stages.rollouts import check_canvases, latent_shapes, repeated, roll_out

ROLES = ("student", FAKE)  # those that are trained, in the order of their optimisers


@dataclass
class Generated:
    """A batch that the student has drawn, and what it was drawn from."""

    features: list[Tensor]  # (L_i, D) of the captions
    clean: list[Tensor]  # (C, H_i, W_i) float32: what it sees at the last step it has made; with a graph in its turn
    step_index: int  # that step


@dataclass
class Terms:
    """Where the student's samples shall go, and what tells how far it has come; directions have the form of latents."""

    matching: list[Tensor]  # to be descended along
    guidance: list[Tensor] | None  # likewise; None where it is in `matching`, or where there is none
    gap: Tensor  # (B,)
    cosine: Tensor | None  # (B,) between distribution matching and guidance; None without guidance


class DMDRModule(LightningModule):
    """Distils the backbone of `init_from`, which needs guidance and many steps, into a student that needs neither.

    backbone: as in FlowMatchingModule. init_from: where student, fake score and teacher begin: never a distilled model.
    student_init_from: a student that has been distilled already; from a checkpoint of the same layout its fake score
        comes along.
    layout: see `roles.py`. lora, fake_lora: adapters of student and fake score, in the layouts that have them.
    frozen_dtype: of the weights that nobody trains; None for the trainer's.
    ratio: iterations (steps of the trainer, and of the fake score) for each step of the student.
    gradient_clip_val: largest norm of each role's gradient; None for no limit. Lightning's own does not know of roles.
    dynamic_guidance: None for a teacher that stays what it is. reward: None for distillation alone.
    canvases: [width, height] in pixels, which samples of batches without pictures take in turn.

    The frozen weights are not in the checkpoints, so `init_from` must stay where it is as long as the run is continued.
    `student_step` and `fake_step` count the steps that were taken; `trainer.global_step` counts iterations.
    """

    hands_over_gradient_norm = True  # to callbacks that have `on_gradient_norm`

    def __init__(
        self,
        text_encoder: TextEncoder,
        codec: LatentCodec,
        backbone: str | dict[str, Any] = "tiny",
        init_from: str | None = None,
        student_init_from: str | None = None,
        layout: Layout = "copies",
        lora: LoRASettings | None = None,
        fake_lora: LoRASettings | None = None,
        frozen_dtype: Literal["float32", "bfloat16"] | None = None,
        rollout: RolloutSettings | None = None,
        objective: ObjectiveSettings | None = None,
        dynamic_guidance: DynamicGuidanceSettings | None = None,
        reward: RewardSettings | None = None,
        student_optimizer: OptimizerSettings | None = None,
        fake_optimizer: OptimizerSettings | None = None,
        ratio: int = 5,
        gradient_clip_val: float | None = 1.0,
        canvases: list[tuple[int, int]] | None = None,
        seed: int = 0,
        parallelize: ParallelizeSettings | None = None,
    ) -> None:
        super().__init__()
        check_layout(layout, lora, fake_lora, dynamic_guidance is not None)
        self.automatic_optimization = False
        self.text_encoder, self.codec = text_encoder, codec
        self.config = backbone_config(backbone)
        self.init_from, self.student_init_from = init_from, student_init_from
        self.layout, self.lora, self.fake_lora = layout, lora, fake_lora
        self.frozen_dtype = frozen_dtype
        self.rollout = rollout or RolloutSettings()
        self.objective = objective or ObjectiveSettings()
        self.dynamic_guidance = dynamic_guidance
        self.reward = reward
        if reward is not None:
            check_reward(reward, self.objective, self.rollout.num_inference_steps)
        self.reward_term: RewardTerm | None = None
        self.optimizer_settings = {
            "student": student_optimizer or OptimizerSettings(),
            FAKE: fake_optimizer or OptimizerSettings(),
        }
        self.ratio = at_least_one("model.init_args.ratio", ratio)
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise UserError(
                f"model.init_args.gradient_clip_val must be more than 0 (or null for none), not {gradient_clip_val}."
            )
        self.gradient_clip_val = gradient_clip_val
        if self.objective.ida is not None and layout != "copies":
            raise UserError("model.init_args.objective.ida blends whole networks: set layout=copies, or ida to null.")
        check_canvases(canvases)
        self.canvases = canvases
        self.seed = seed
        self.parallelize = parallelize or ParallelizeSettings()
        self.steps = dict.fromkeys(ROLES, 0)
        self.frozen: dict[str, str] = {}  # fingerprints of the weights that nobody trains
        self.student_figures: dict[str, Tensor | float] = {}  # of its last turn
        self.strict_loading = False  # on_load_checkpoint has compared the names
        self.backbone: S3DiT = None  # type: ignore[assignment]  # configure_model makes it, on the trainer's terms
        self.roles: Roles = None  # type: ignore[assignment]

    @property
    def student_step(self) -> int:
        return self.steps["student"]

    @property
    def fake_step(self) -> int:
        return self.steps[FAKE]

    # --------------------------------------------------------------------------------------------------- networks

    def configure_model(self) -> None:
        if self.backbone is not None:
            return
        trains = self._trainer is not None
        if trains:
            self.check_can_train()
        networks = make_networks(self)
        for name, network in networks.items():
            setattr(self, name, network)
        self.frozen = fingerprints(networks, self.lora)
        if trains:
            fake = networks.get(FAKE, self.backbone)
            self.roles = Roles(self.layout, self.backbone, fake, networks.get("teacher", fake))
            if self.student_init_from:
                continue_from(self.roles, located(self.student_init_from, store_of(self)))

    def check_can_train(self) -> None:
        """UserError for settings with which nothing can be distilled."""
        if self.init_from is None:
            raise UserError("model.init_args.init_from is not given: name the model with guidance that is distilled.")
        for name, settings in self.optimizer_settings.items():
            if self.device_mesh is not None:
                check_can_shard(settings, "student_optimizer" if name == "student" else "fake_optimizer")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What checkpoints hold: `backbone.…`, what the student has learnt, and `fake_score.…`; nothing frozen."""
        if self.roles is None:
            return super().state_dict(*args, **kwargs)
        student = {f"backbone.{name}": weight for name, weight in self.roles.kept("student").items()}
        return student | {f"{FAKE}.{name}": weight for name, weight in self.roles.kept(FAKE).items()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if self.roles is None:
            return super().load_state_dict(state_dict, *args, **kwargs)
        with torch.no_grad():
            for name, target in self.state_dict().items():
                target.copy_(state_dict[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"layout": self.layout, "frozen": self.frozen, "role_steps": dict(self.steps)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "layout" not in checkpoint:
            raise UserError(
                "the checkpoint to continue from is of another stage: name it as model.init_args.init_from or "
                "student_init_from, or give the run an output_dir of its own."
            )
        if checkpoint["layout"] != self.layout:
            raise UserError(
                f"the checkpoint to continue from was trained with model.init_args.layout={checkpoint['layout']}: "
                f"set that back in place of {self.layout}, or name another checkpoint."
            )
        self.check_base(checkpoint)
        check_weights(checkpoint["state_dict"], self.state_dict())
        for role, state in zip(ROLES, checkpoint.get("optimizer_states", ()), strict=False):
            found, kind = kind_of_states(state), self.optimizer_settings[role].kind
            if found != kind:
                raise UserError(
                    f"the checkpoint to continue from trained the {role.replace('_', ' ')} with name={found}, not "
                    f"{kind}: set that back, or begin a new run with model.init_args.student_init_from."
                )
        self.steps = dict(checkpoint["role_steps"])

    def check_base(self, checkpoint: dict[str, Any]) -> None:
        """UserError where a checkpoint was trained beside other frozen weights than those here."""
        stored = checkpoint.get("frozen", {})
        if any(stored.get(name) != digest for name, digest in self.frozen.items()):
            raise UserError(
                f"the checkpoint was trained with another teacher or base than those of init_from={self.init_from} and "
                f"student_init_from={self.student_init_from}: put the right ones back there, or name them."
            )

    def configure_callbacks(self) -> list[Any]:
        """None of its own; the first moment at which settings of the trainer can be looked at."""
        if self.trainer.gradient_clip_val or self.trainer.accumulate_grad_batches != 1:
            raise UserError(
                "DMDRModule takes the steps of its roles by itself: set trainer.gradient_clip_val to null (there is "
                "model.init_args.gradient_clip_val) and trainer.accumulate_grad_batches to 1."
            )
        return []

    def setup(self, stage: str) -> None:
        if self.objective.ida is not None and str(self.trainer.precision) == "bf16-true":
            raise UserError(
                "model.init_args.objective.ida blends by less than the last digit of bfloat16 weights: set "
                "trainer.precision to bf16-mixed, or ida to null."
            )
        if isinstance(self.trainer.strategy, DDPStrategy):  # it waits for gradients of all roles in each turn
            raise UserError("DMDRModule trains on several devices with trainer.strategy=fsdp2: set that, or devices=1.")
        if self.reward is None and (rewards := find_rewards(self.trainer)):
            raise UserError(
                f"trainer.callbacks has rewards ({', '.join(reward.name for reward in rewards)}), and without "
                "model.init_args.reward nobody asks them: give reward.form, say, or remove them."
            )
        prepare_frozen_parts(self)

    def on_train_start(self) -> None:
        if self.reward is not None:
            rewards = RewardSet.of_run(self.trainer)
            rewards.forget_after(self.trainer.global_step)
            self.reward_term = RewardTerm(self.reward, rewards, self.codec)

    # --------------------------------------------------------------------------------------------------- iterations

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        if (step + 1) % self.ratio == 0:
            generated = self.student_turn(batch, step)
        else:
            with torch.no_grad():
                generated = self.generate(batch, step)
        loss = self.fake_turn(generated, step)
        counts = {"train/student_step": float(self.student_step), "train/fake_step": float(self.fake_step)}
        self.log_dict({**self.student_figures, **counts}, batch_size=len(batch["captions"]))
        return {"loss": loss}

    def student_turn(self, batch: dict[str, Any], step: int) -> Generated:
        """One step of the student, and the batch that it was made with."""
        if self.reward and self.reward.form == "advantage" and self.is_rewarded():
            batch = repeated(batch, self.reward.group_size)
        generated = self.generate(batch, step)
        losses, figures = self.student_losses(generated, batch, step)
        loss = losses.mean()
        back_propagate(self, loss)
        norm = self.take_step("student")
        figures |= {"student_loss": loss, "student_gradient_norm": norm, **moments("student", generated.clean)}
        self.student_figures = {f"train/{name}": value.detach() for name, value in figures.items()}
        if self.reward_term is not None:
            self.student_figures |= self.reward_term.figures
        return generated

    def fake_turn(self, generated: Generated, step: int) -> Tensor:
        """One step of the fake score on the samples of the student; returns its loss."""
        with self.roles.acting(FAKE) as network:
            loss = self.fake_losses(network, generated, step).mean()
            back_propagate(self, loss)
        norm = self.take_step(FAKE)
        if self.objective.ida is not None:
            fake, student = (map(local, self.roles.trained(role).values()) for role in (FAKE, "student"))
            distillation.blend(fake, student, self.objective.ida)
        self.log("train/fake_loss", loss, prog_bar=True)
        self.log("train/fake_gradient_norm", norm)
        return loss.detach()

    def take_step(self, role: str) -> Tensor:
        """Clip, let callbacks judge, step, and forget the gradients; returns their norm before clipping."""
        place = ROLES.index(role)
        optimizer, schedule = self.optimizers()[place], self.lr_schedulers()[place]  # type: ignore[index]
        parameters = list(self.roles.trained(role).values())
        norm = clip_gradients(self, optimizer.optimizer, parameters, self.gradient_clip_val)
        self.steps[role] += any(parameter.grad is not None for parameter in parameters)  # else a guard has skipped it
        if role == FAKE:
            optimizer.step()  # the one that the trainer counts
        else:
            optimizer.optimizer.step()
        schedule.step()  # type: ignore[call-arg]
        optimizer.zero_grad()
        return norm

    # --------------------------------------------------------------------------------------------------- what is learnt

    def generate(self, batch: dict[str, Any], step: int) -> Generated:
        """Draw a batch as in serving, up to a step that is the same on all ranks, so that they make as many forwards.

        Where gradients are on they are those of the last forward alone.
        """
        check_text_to_image(batch, "DMDRModule", pictures=False)
        features = caption_features(self.text_encoder, batch)
        grid = self.rollout.grid
        index = int(torch.randint(len(grid) - 1, (), generator=generator(self.seed, "train/step_index", step)))
        noise = self.noise(self.shapes(batch), "noise", step)
        latents = self.simulate(noise, features, grid[: index + 1], step)
        t = self.at(1 - float(grid[index]), latents)
        clean = flow_matching.clean_from_velocity(latents, self.backbone(latents, t, features), t)
        return Generated(features, clean, index)

    @torch.no_grad()
    def simulate(self, noise: list[Tensor], features: list[Tensor], grid: Tensor, step: int) -> list[Tensor]:
        """The student's latents after the steps of a grid."""
        shapes = [tuple(x.shape) for x in noise]
        options: dict[str, Callable[[int], list[Tensor]]] = {}
        if self.rollout.sampler == "renoise":
            options["fresh_noise"] = lambda number: self.noise(shapes, f"renoise/{number}", step)
        velocity = guided_velocity(self.backbone, features, None, guidance_scale=1.0)
        return list(SOLVERS[self.rollout.sampler](velocity, noise, grid, **options))

    def student_losses(
        self, generated: Generated, batch: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample losses of the student, (B,), and figures for the curves."""
        clean, terms = generated.clean, self.terms(generated, step)
        losses = distillation.pseudo_loss(clean, terms.matching)
        figures = {"gap": terms.gap.mean()}
        if terms.cosine is not None:
            figures["cos_dm_ca"] = terms.cosine.mean()
        advantages = torch.ones_like(losses)
        if self.reward is not None and self.is_rewarded():
            if self.reward.form == "advantage":
                advantages = self.reward.weight * self.rewarded.advantages(clean, batch, step + 1)
            else:
                reward_losses = self.reward_losses(generated, batch, step)
                losses, figures["reward_loss"] = losses + reward_losses.mean(), reward_losses.mean()
        if terms.guidance is not None:
            losses = losses + advantages * distillation.pseudo_loss(clean, terms.guidance)
        data = picture_latents(self.codec, batch, self.device)
        if data is not None:
            figures |= moments("data", data)
        return losses + self.data_losses(generated, data, step), figures

    def data_losses(self, generated: Generated, data: list[Tensor] | None, step: int) -> Tensor:
        """What the student learns from the data's own pictures, (B,)."""
        settings, losses = self.objective, self.at(0.0, generated.clean)
        if data is None and (settings.mean_variance or settings.data):
            raise UserError(
                "model.init_args.objective.mean_variance and objective.data need data with pictures: name such data, "
                "or set them to 0."
            )
        if data is not None and settings.mean_variance:
            flat = torch.cat([x.flatten(1) for x in data], dim=1)
            matched = distillation.mean_variance_loss(generated.clean, flat.mean(1), flat.std(1))
            losses = losses + settings.mean_variance * matched
        if data is not None and settings.data:
            law = TimestepLaw("grid", shift=self.rollout.shift, num_inference_steps=self.rollout.num_inference_steps)
            draw = generator(self.seed, "train/data/times", step, self.global_rank)
            t = law.sample([1] * len(data), draw).to(self.device)
            noise = self.noise([tuple(x.shape) for x in data], "data/noise", step)
            predicted = self.backbone(flow_matching.interpolate(noise, data, t), t, generated.features)
            target = flow_matching.target_velocity(noise, data)
            losses = losses + settings.data * flow_matching.loss(predicted, target)
        return losses

    # --------------------------------------------------------------------------------------------------- rewards

    def is_rewarded(self) -> bool:
        """Whether the student has come to where rewards join."""
        return self.reward is not None and self.student_step >= self.reward.start_step

    @property
    def rewarded(self) -> RewardTerm:
        assert self.reward_term is not None
        return self.reward_term

    def reward_losses(self, generated: Generated, batch: dict[str, Any], step: int) -> Tensor:
        """Minus what rewards give for the student's samples (backprop), or for roll-outs of its own (grpo)."""
        settings = self.rewarded.settings
        if settings.form == "grpo":
            return settings.weight * self.policy_losses(batch, settings, step)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it without declaring
        due = bool(every) and (step + 1) % every == 0
        return -settings.weight * self.rewarded.value(generated.clean, batch, step + 1, log_all=due)

    def policy_losses(self, batch: dict[str, Any], settings: RewardSettings, step: int) -> Tensor:
        """Roll out groups with noise, score what comes out, and learn from some of the stochastic steps."""
        shapes = [shape for shape in self.shapes(batch) for _ in range(settings.group_size)]
        batch = repeated(batch, settings.group_size)
        features = caption_features(self.text_encoder, batch)
        grid = self.rollout.grid
        eta = settings.eta if self.rollout.sampler == "euler" else 1.0
        drawn = roll_out(
            guided_velocity(self.backbone, features, None, guidance_scale=1.0),
            self.noise(shapes, "policy/noise", step), grid, range(len(grid) - 1), "cps", eta,
            fresh_noise=lambda number: self.noise(shapes, f"policy/{number}", step),
        )  # fmt: skip
        advantages = self.rewarded.advantages(drawn.clean, batch, step + 1)
        order = torch.randperm(len(grid) - 2, generator=generator(self.seed, "train/policy/steps", step))
        velocities: dict[int, list[Tensor]] = {}
        for number in order[: settings.policy_steps].tolist():
            t = self.at(1 - float(grid[number]), shapes)
            velocities[number] = self.backbone(drawn.states[number], t, features)
        return policy_losses(drawn.states, velocities, grid, eta, advantages)

    # --------------------------------------------------------------------------------------------------- the two terms

    @torch.no_grad()
    def terms(self, generated: Generated, step: int) -> Terms:
        """Where teacher and fake score send the student's samples."""
        settings, clean, features = self.objective, [x.detach() for x in generated.clean], generated.features
        noisy, t = self.renoised(generated, settings.matching, "matching", step)
        own = 1 - float(self.rollout.grid[generated.step_index])  # where the student steps
        guides = settings.guidance_scale != 1 and own >= settings.cfg_start
        noisy_ca, t_ca = noisy, t
        if guides and settings.name == "decoupled":
            law = settings.guidance or RenoiseLaw("cleaner", shift=self.rollout.shift)
            noisy_ca, t_ca = self.renoised(generated, law, "guidance", step)
        fake = self.seen_by(FAKE, noisy, t, features)
        if not guides:
            teacher = self.seen_by("teacher", noisy, t, features)
            dm = distillation.dm_direction(clean, teacher, fake, settings.clamp)
            return Terms(dm, None, distillation.gap(clean, teacher, fake), None)
        teacher, conditional, unconditional = self.seen_by_teacher(noisy, t, noisy_ca, t_ca, features)
        pairs = zip(conditional, unconditional, t_ca.tolist(), strict=True)
        unconditional = [c if time < settings.cfg_start else u for c, u, time in pairs]
        dm = distillation.dm_direction(clean, teacher, fake, settings.clamp)
        ca = distillation.ca_direction(clean, conditional, unconditional, settings.guidance_scale, settings.clamp)
        figures = distillation.gap(clean, teacher, fake), distillation.cosine(dm, ca)
        if settings.name == "decoupled":
            return Terms(dm, ca, *figures)
        target = guided(conditional, unconditional, settings.guidance_scale)
        return Terms(distillation.dm_direction(clean, target, fake, settings.clamp), None, *figures)

    def seen_by(self, role: str, latents: list[Tensor], t: Tensor, features: list[Tensor]) -> list[Tensor]:
        """The clean samples that a role sees in noisy ones."""
        with self.roles.acting(role, self.teacher_share()) as network:
            return flow_matching.clean_from_velocity(latents, network(latents, t, features), t)

    def seen_by_teacher(
        self, noisy: list[Tensor], t: Tensor, noisy_ca: list[Tensor], t_ca: Tensor, features: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What the teacher sees: in `noisy` with the captions, in `noisy_ca` with them and without; in one forward."""
        (empty,) = self.text_encoder.encode([""])
        without, n = [empty] * len(features), len(features)
        if noisy_ca is noisy:
            seen = self.seen_by("teacher", noisy * 2, torch.cat([t, t]), features + without)
            return seen[:n], seen[:n], seen[n:]
        times = torch.cat([t, t_ca, t_ca])
        seen = self.seen_by("teacher", noisy + noisy_ca * 2, times, features * 2 + without)
        return seen[:n], seen[n : 2 * n], seen[2 * n :]

    def teacher_share(self) -> float:
        """The share of the fake score's change that the teacher takes over at present."""
        if self.dynamic_guidance is None:
            return 0.0
        return dynamic_teacher_scale(self.student_step, self.dynamic_guidance.start, self.dynamic_guidance.steps)

    def fake_losses(self, network: S3DiT, generated: Generated, step: int) -> Tensor:
        """Per-sample flow-matching loss of the fake score on the student's samples, (B,)."""
        clean = [x.detach() for x in generated.clean]
        noise = self.noise([tuple(x.shape) for x in clean], "fake/noise", step)
        t = self.times(self.objective.fake, generated, "fake", step)
        predicted = network(flow_matching.interpolate(noise, clean, t), t, generated.features)
        return distillation.fake_score_loss(predicted, noise, clean)

    def renoised(self, generated: Generated, law: RenoiseLaw, purpose: str, step: int) -> tuple[list[Tensor], Tensor]:
        """The student's samples with noise of a law, and their times (B,)."""
        clean = [x.detach() for x in generated.clean]
        t = self.times(law, generated, purpose, step)
        noise = self.noise([tuple(x.shape) for x in clean], f"{purpose}/noise", step)
        return flow_matching.interpolate(noise, clean, t), t

    def times(self, law: RenoiseLaw, generated: Generated, purpose: str, step: int) -> Tensor:
        """Times of a law for the student's samples, (B,)."""
        before_shift = self.at(1 - generated.step_index / self.rollout.num_inference_steps, generated.clean)
        draw = generator(self.seed, f"train/{purpose}/times", step, self.global_rank)
        return law.sample(len(before_shift), draw, before_shift, self.student_step).to(self.device)

    def at(self, number: float, samples: Sequence[Any]) -> Tensor:
        """The same number for each sample, (B,) float32 whatever the trainer makes tensors of."""
        return torch.full((len(samples),), number, dtype=torch.float32, device=self.device)

    def noise(self, shapes: list[tuple[int, ...]], purpose: str, step: int) -> list[Tensor]:
        draw = generator(self.seed, f"train/{purpose}", step, self.global_rank)
        return [torch.randn(shape, generator=draw, dtype=torch.float32).to(self.device) for shape in shapes]

    # --------------------------------------------------------------------------------------------------- data

    def shapes(self, batch: dict[str, Any]) -> list[tuple[int, ...]]:
        """(C, H, W) of the latents to draw: those of the batch's pictures, else of the canvases."""
        return latent_shapes(batch, self.canvases, self.codec.downsample, self.config.in_channels)

    # --------------------------------------------------------------------------------------------------- optimisers

    def iterations(self) -> int:
        """Steps of the trainer in the run, which learning rates that decay must know; 0 where it has no end."""
        iterations = self.trainer.estimated_stepping_batches
        if iterations != math.inf:
            return int(iterations)
        for role, settings in self.optimizer_settings.items():
            if settings.decay != "constant":
                raise UserError(
                    f"a decay={settings.decay} of the {role.replace('_', ' ')} needs an end of training: give "
                    "trainer.max_steps or trainer.max_epochs, or set it to constant."
                )
        return 0

    def configure_optimizers(self) -> Any:
        configured = []
        for role in ROLES:
            settings = self.optimizer_settings[role]
            check_adapter_types(self.roles.kept(role))
            steps = self.iterations() // (self.ratio if role == "student" else 1)
            optimizer = build_optimizer(self.roles.trained(role), settings, self.seed)
            configured.append({"optimizer": optimizer, "lr_scheduler": LearningRate(optimizer, steps, settings)})
        return configured


def moments(name: str, latents: list[Tensor]) -> dict[str, Tensor]:
    """Mean and standard deviation of all elements of a batch."""
    flat = torch.cat([x.detach().float().flatten() for x in latents])
    return {f"{name}_mean": flat.mean(), f"{name}_std": flat.std()}
