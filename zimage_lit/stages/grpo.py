"""Reinforcement learning: a model draws groups of pictures, rewards judge them, and it learns what made some better.

One iteration, which the trainer counts as one step, is a roll-out of every prompt in a batch, the rewards' judgement,
and one or more updates from it.

    grpo    some steps of the sampler draw noise, and those that led to good pictures are made likelier
    nft     pictures are noised again, and the velocity is pulled towards good ones and away from bad ones

Sources: Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818), MixGRPO (arXiv 2507.21802) for the window,
DiffusionNFT (arXiv 2509.16117).
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from zimage_lit.backbone import S3DiT
from zimage_lit.backbone.parallelize import ParallelizeSettings
from zimage_lit.components import LatentCodec, TextEncoder
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.lora import LoRASettings
from zimage_lit.objectives import flow_matching, forward_process, policy
from zimage_lit.objectives.transitions import TRANSITIONS, Transition, velocity_weight
from zimage_lit.rewards import RewardSet
from zimage_lit.rng import generator
from zimage_lit.sampling.guidance import guided_velocity
from zimage_lit.stages.figures import of_all_ranks
from zimage_lit.stages.frozen_parts import caption_features, check_text_to_image
from zimage_lit.stages.gradients import back_propagate, clip_gradients
from zimage_lit.stages.grpo_settings import (
    AdvantageSettings,
    ForwardProcessSettings,
    GroupRolloutSettings,
    PenaltySettings,
    PolicySettings,
    check_method,
    snapshots_of,
)
from zimage_lit.stages.optimizers import OptimizerSettings
from zimage_lit.stages.rollouts import Rollout, check_canvases, latent_shapes, repeated, roll_out, scored
from zimage_lit.stages.snapshots import FrozenType
from zimage_lit.stages.stage import BackboneStage


@dataclass
class Pack:
    """Pictures that go through the network together, when they are drawn and when they are learnt from: then the same
    weights give the same velocities, to the last digit."""

    places: list[int]  # in the roll-out of this device
    captions: list[Tensor]  # their features (L_i, D)
    negatives: list[Tensor] | None  # with guidance, those of the empty caption
    shapes: list[tuple[int, ...]]  # (C, H, W) of the latents
    window: range  # steps that draw noise
    rollout: Rollout = field(init=False)


@dataclass
class Judgement:
    """What the rewards say of a roll-out."""

    advantages: Tensor  # (B,) float32, all rewards together
    informative: Tensor  # (B,) bool: whether any reward tells it from others of its group


class GRPOModule(BackboneStage):
    """Makes the backbone of `init_from` draw what the rewards among the trainer's callbacks like.

    method: grpo, with the settings `grpo`, or nft (DiffusionNFT), with the settings `nft`; those of the other method
        are not used, so that one key changes it.
    rollout, advantage, kl: of both methods. None stands for the defaults everywhere.
    minibatches: updates in one pass over a roll-out, each from whole groups.   epochs: passes.
    optimizer: its steps (warm-up, decay) are iterations here, however many updates one has.
    gradient_clip_val: largest norm of the gradient; None for no limit.
    canvases: [width, height] in pixels, which prompts of batches without pictures take in turn.
    frozen_dtype: of the reference, where `kl` needs one and there is no LoRA; None for the trainer's.
    The other settings are those of `BackboneStage`.

    A batch holds every prompt once; the stage draws `rollout.group_size` pictures of each, all on one device.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        codec: LatentCodec,
        backbone: str | dict[str, Any] = "tiny",
        init_from: str | None = None,
        method: Literal["grpo", "nft"] = "grpo",
        rollout: GroupRolloutSettings | None = None,
        grpo: PolicySettings | None = None,
        nft: ForwardProcessSettings | None = None,
        advantage: AdvantageSettings | None = None,
        kl: PenaltySettings | None = None,
        minibatches: int = 1,
        epochs: int = 1,
        optimizer: OptimizerSettings | None = None,
        gradient_clip_val: float | None = 1.0,
        canvases: list[tuple[int, int]] | None = None,
        seed: int = 0,
        lora: LoRASettings | None = None,
        frozen_dtype: FrozenType | None = None,
        parallelize: ParallelizeSettings | None = None,
    ) -> None:
        rollout, grpo, kl = rollout or GroupRolloutSettings(), grpo or PolicySettings(), kl or PenaltySettings()
        check_method(method, rollout, grpo, kl)
        snapshots = snapshots_of(method, kl)
        super().__init__(
            text_encoder, codec, backbone, optimizer, seed, init_from, lora, parallelize, snapshots, frozen_dtype
        )
        self.automatic_optimization = False
        self.method, self.rollout, self.grpo, self.kl = method, rollout, grpo, kl
        self.nft, self.advantage = nft or ForwardProcessSettings(), advantage or AdvantageSettings()
        if lora is not None and lora.dropout:
            raise UserError("model.init_args.lora.dropout must be 0: it would make a policy differ from itself.")
        self.minibatches = at_least_one("model.init_args.minibatches", minibatches)
        self.epochs = at_least_one("model.init_args.epochs", epochs)
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise UserError(
                f"model.init_args.gradient_clip_val must be more than 0 (or null for none), not {gradient_clip_val}."
            )
        self.gradient_clip_val = gradient_clip_val
        check_canvases(canvases)
        self.canvases = canvases
        self.rewards: RewardSet = None  # type: ignore[assignment]  # those of the trainer, once it starts
        self.judged: dict[str, float] = {}  # reward -> mean of the latest iteration over all ranks, where it judged any

    # --------------------------------------------------------------------------------------------------- the trainer

    def configure_model(self) -> None:
        if self._trainer is not None and self.init_from is None:
            raise UserError("model.init_args.init_from is not given: name the model that is to learn from rewards.")
        super().configure_model()

    def configure_callbacks(self) -> list[Any]:
        """None of its own; the first moment at which settings of the trainer can be looked at."""
        if self.trainer.gradient_clip_val or self.trainer.accumulate_grad_batches != 1:
            raise UserError(
                "GRPOModule takes its updates by itself: set trainer.gradient_clip_val to null (there is "
                "model.init_args.gradient_clip_val) and trainer.accumulate_grad_batches to 1 (there is "
                "model.init_args.rollout.batch_size)."
            )
        return []

    def setup(self, stage: str) -> None:
        if self.method == "nft" and str(self.trainer.precision) == "bf16-true":
            raise UserError(
                "method=nft lets a policy follow by less than the last digit of bfloat16 weights: set "
                "trainer.precision to bf16-mixed, or method=grpo."
            )
        if isinstance(self.trainer.strategy, DDPStrategy):  # it counts on one backward a step
            raise UserError("GRPOModule trains on several devices with trainer.strategy=fsdp2: set that, or devices=1.")
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.trainer.world_size > 1 and getattr(datamodule, "token_budget", None):
            raise UserError(
                "GRPOModule draws as many pictures on every device: give data.init_args.batch_size in place of "
                "token_budget."
            )
        super().setup(stage)

    def on_train_start(self) -> None:
        self.rewards = RewardSet.of_run(self.trainer)
        self.rewards.check_any(self.rewards.weighing, "is not held out")
        self.rewards.forget_after(self.trainer.global_step)

    # --------------------------------------------------------------------------------------------------- iterations

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        check_text_to_image(batch, "GRPOModule", pictures=False)
        step, clock = self.trainer.fit_loop.epoch_loop.total_batch_idx, StopWatch(self.device)
        minibatches = self.draw(batch, step)
        clock.lap("rollout")
        judgement, values = self.judge(minibatches, batch, step)
        clock.lap("reward")
        values |= self.learn(minibatches, judgement, step)
        clock.lap("update")
        values |= {name: torch.tensor([seconds]) for name, seconds in clock.seconds.items()}
        figures = of_all_ranks(self.trainer, values)
        names = {reward.name: f"reward/{reward.name}" for reward in self.rewards.rewards}
        self.judged = {name: figures[key] for name, key in names.items() if key in figures}
        self.log_dict(figures, batch_size=len(batch["captions"]))
        return {"loss": torch.tensor(figures["train/loss"], dtype=torch.float32, device=self.device)}

    def draw(self, batch: dict[str, Any], step: int) -> list[list[Pack]]:
        """The roll-out: packs of pictures, those of a minibatch together; every rank has as many."""
        size = self.rollout.group_size
        shapes = latent_shapes(batch, self.canvases, self.codec.downsample, self.config.in_channels)
        captions = caption_features(self.text_encoder, batch)
        empty = self.text_encoder.encode([""]) if self.rollout.guidance_scale != 1 else None
        window = range(0)
        if self.method == "grpo":
            window = self.grpo.window.place(generator(self.seed, "train/window", step))  # no rank: one for all

        def pack(places: list[int]) -> Pack:
            prompts = [place // size for place in places]
            negatives = None if empty is None else empty * len(places)
            return Pack(places, [captions[i] for i in prompts], negatives, [shapes[i] for i in prompts], window)

        minibatches = [[pack(places) for places in packs] for packs in self.plan(len(captions))]
        with self.drawing() as network:
            for one in chain.from_iterable(minibatches):
                one.rollout = self.sample(network, one, step)
        torch.clear_autocast_cache()  # casts of weights that were made to draw have no gradient
        return minibatches

    def plan(self, prompts: int) -> list[list[list[int]]]:
        """Minibatches of packs of places in a roll-out, whole groups in each minibatch."""
        if prompts < self.minibatches:
            raise UserError(
                f"a batch of {prompts} prompts cannot make model.init_args.minibatches={self.minibatches} updates of "
                "whole groups: set it lower, or data.init_args.batch_size higher; where it is the last batch of an "
                "epoch that is too small, set data.init_args.drop_last to true."
            )
        size, most = self.rollout.group_size, self.rollout.batch_size
        bounds = [number * prompts // self.minibatches * size for number in range(self.minibatches + 1)]
        return [
            [list(range(first, min(first + most, end))) for first in range(start, end, most)]
            for start, end in pairwise(bounds)
        ]

    def drawing(self) -> AbstractContextManager[S3DiT]:
        """The network that draws."""
        return self.snapshots["old_policy"].acting() if self.method == "nft" else nullcontext(self.backbone)

    def sample(self, network: S3DiT, pack: Pack, step: int) -> Rollout:
        size, places = self.rollout.group_size, pack.places
        begun = [place // size * size for place in places] if self.rollout.same_noise else places
        return roll_out(
            self.velocity(network, pack), self.noise(begun, pack.shapes, "noise", step), self.rollout.grid,
            pack.window, self.grpo.transition, self.grpo.noise_level,
            fresh_noise=lambda number: self.noise(places, pack.shapes, f"noise/{number}", step),
        )  # fmt: skip

    def velocity(self, network: S3DiT, pack: Pack) -> Callable[[Any, float], Any]:
        """What the sampler follows, of latents at a time: it is what is learnt, guidance included."""
        settings = self.rollout
        return guided_velocity(
            network, pack.captions, pack.negatives, settings.guidance_scale, cfg_start=settings.cfg_start
        )

    # --------------------------------------------------------------------------------------------------- judgement

    def judge(
        self, minibatches: list[list[Pack]], batch: dict[str, Any], step: int
    ) -> tuple[Judgement, dict[str, Tensor]]:
        """Ask the rewards; also values (N,) for the curves."""
        size, settings = self.rollout.group_size, self.advantage
        clean = [sample for packs in minibatches for pack in packs for sample in pack.rollout.clean]
        known: dict[str, Any] = {name: batch[name] for name in ("captions", "metadata") if name in batch}
        scores, groups = scored(self.rewards, self.codec, clean, repeated(known, size), size, step + 1)
        advantages = self.rewards.combined_advantages(scores, groups, settings.std, settings.clip)
        judged = [scores[reward.name].to(groups.device) for reward in self.rewards.weighing]
        silent = torch.stack([policy.uninformative(values, groups) for values in judged])
        informative = (~silent & torch.stack([~values.isnan() for values in judged])).any(0)
        values = {
            "train/advantage_std": advantages,
            "train/zero_std_share": silent.all(0),
            "train/diversity": policy.group_spread(clean, size),
        }
        return Judgement(advantages, informative), values | self.rewards.logged_values(scores)

    # --------------------------------------------------------------------------------------------------- learning

    def learn(self, minibatches: list[list[Pack]], judgement: Judgement, step: int) -> dict[str, Tensor]:
        """All updates of an iteration; values (N,) of what was seen on the way."""
        seen: dict[str, list[Tensor]] = defaultdict(list)
        terms = self.policy_terms if self.method == "grpo" else self.forward_process_terms
        for epoch in range(self.epochs):
            for number, packs in enumerate(minibatches):
                samples = sum(len(pack.places) for pack in packs)
                passes = len(packs[0].window) if self.method == "grpo" else self.nft.times
                for pack in packs:
                    for losses, figures in terms(pack, judgement, step, epoch):
                        back_propagate(self, losses.sum() / (samples * passes))
                        for name, values in {"loss": losses, **figures}.items():
                            seen[name].append(values.detach())
                is_last = (epoch, number) == (self.epochs - 1, len(minibatches) - 1)
                seen["gradient_norm"].append(self.take_step(is_last)[None])
        if self.method == "nft":
            self.snapshots["old_policy"].follow(
                forward_process.lag(step, self.nft.lag_flat, self.nft.lag_rate, self.nft.lag_largest)
            )
        found = {f"train/{name}": torch.cat(values) for name, values in seen.items()}
        return found | ({"train/ratio_std": found["train/ratio"]} if "ratio" in seen else {})

    def policy_terms(
        self, pack: Pack, judgement: Judgement, step: int, epoch: int
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """GRPO: losses (B,) and figures (B,) of a pack, one step of the window after the other."""
        settings, grid, drawn = self.grpo, self.rollout.grid.tolist(), pack.rollout
        advantages = judgement.advantages[pack.places]
        for number, (place, old) in enumerate(zip(pack.window, drawn.made, strict=True)):
            x, levels = drawn.states[number], (grid[place], grid[place + 1])
            v = self.velocity(self.backbone, pack)(x, 1 - levels[0])
            made = self.transition(x, v, *levels)
            change = policy.log_ratio(
                drawn.states[number + 1], made.mean, old.mean, made.std, settings.reduction, settings.ratio
            )
            if settings.clip == "dppo":
                moved = policy.divergence(made.mean, old.mean, made.std, settings.reduction)
                losses, ratio, held = policy.masked_policy_loss(change, moved, advantages, settings.clip_range)
            else:
                unchanged = torch.zeros_like(change)
                losses, ratio, held = policy.clipped_policy_loss(change, unchanged, advantages, settings.clip_range)
            if settings.ratio == "guard":  # its gradient is as long as the velocity's part in the step
                losses = losses / velocity_weight(settings.transition, *levels, settings.noise_level)
            figures = {"ratio": ratio, "clip_fraction": held.float()}
            if self.kl.weight:
                with self.snapshots["reference"].acting() as network:
                    reference = self.velocity(network, pack)(x, 1 - levels[0])
                figures["kl"] = flow_matching.loss(v, reference)
                if self.kl.space == "latent":
                    mean, _ = self.transition(x, reference, *levels)
                    figures["kl"] = policy.divergence(made.mean, mean, made.std, settings.reduction)
                losses = losses + self.kl.weight * figures["kl"]
            yield losses, figures

    def transition(self, x: list[Tensor], v: list[Tensor], sigma: float, sigma_next: float) -> Transition[list[Tensor]]:
        """The Gaussian of a step of the window."""
        return TRANSITIONS[self.grpo.transition](x, v, sigma, sigma_next, self.grpo.noise_level)

    def forward_process_terms(
        self, pack: Pack, judgement: Judgement, step: int, epoch: int
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """DiffusionNFT: losses (B,) and figures (B,) of a pack, one noised copy after the other."""
        clean, captions, area = pack.rollout.clean, pack.captions, self.config.patch_size**2
        advantages, informative = (values[pack.places] for values in (judgement.advantages, judgement.informative))
        tokens = [height * width // area for _, height, width in pack.shapes]
        for copy in range(self.nft.times):
            purpose = f"nft/{epoch}/{copy}"
            sources = self.sources(pack.places, f"{purpose}/times", step)
            times = [self.nft.timesteps.sample([n], source) for n, source in zip(tokens, sources, strict=True)]
            t = torch.cat(times).to(self.device)
            noise = self.noise(pack.places, pack.shapes, f"{purpose}/noise", step)
            noisy = flow_matching.interpolate(noise, clean, t)
            v = self.backbone(noisy, t, captions)
            with self.snapshots["old_policy"].acting() as network:
                old = network(noisy, t, captions)
            losses = forward_process.forward_process_loss(
                v, old, noisy, clean, t, advantages, self.nft.mixing, self.advantage.clip
            )
            losses = torch.where(informative, losses, 0.0)
            figures = {"policy_distance": flow_matching.loss(v, old)}
            if self.kl.weight:
                with self.snapshots["reference"].acting() as network:
                    reference = network(noisy, t, captions)
                figures["kl"] = flow_matching.loss(v, reference)
                losses = losses + self.kl.weight * figures["kl"]
            yield losses, figures

    def take_step(self, is_last: bool) -> Tensor:
        """Clip, let callbacks judge, step, and forget the gradients; returns their norm before clipping.

        is_last: of the iteration, the one that the trainer and the schedule of the learning rate count.
        """
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        norm = clip_gradients(self, optimizer.optimizer, self.backbone.parameters(), self.gradient_clip_val)  # type: ignore[union-attr]
        if is_last:
            optimizer.step()  # type: ignore[union-attr]
            schedule.step()  # type: ignore[union-attr, call-arg]
        else:
            optimizer.optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        torch.clear_autocast_cache()  # it holds the weights as they were
        return norm

    # --------------------------------------------------------------------------------------------------- small things

    def sources(self, places: list[int], purpose: str, step: int) -> list[torch.Generator]:
        """A generator for each picture of this device's roll-out, whatever it is packed with."""
        return [generator(self.seed, f"train/{purpose}/{place}", step, self.global_rank) for place in places]

    def noise(self, places: list[int], shapes: list[tuple[int, ...]], purpose: str, step: int) -> list[Tensor]:
        return [
            torch.randn(shape, generator=source, dtype=torch.float32).to(self.device)
            for shape, source in zip(shapes, self.sources(places, purpose, step), strict=True)
        ]


class StopWatch:
    """Seconds of the parts of an iteration, by the names they are logged with."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.began = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else a part's work would be the next one's waiting
        return time.perf_counter()

    def lap(self, part: str) -> None:
        began, self.began = self.began, self.now()
        self.seconds[f"time/{part}_seconds"] = self.began - began
