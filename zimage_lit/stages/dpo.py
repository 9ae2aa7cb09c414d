"""Alignment with preferences: flow-matching Diffusion-DPO on pairs of pictures.

At each step the winner and the loser of every pair are noised to the same time, and the backbone and its reference
(the weights with which the run began, or those of its last refresh) say what velocity they see there. The noise is one
for both, or for each picture the one from which it was drawn.
Sources: Diffusion-DPO (arXiv 2311.12908), Flow-DPO (arXiv 2501.13918); a picture's own noise after InPO (arXiv
2503.18454), which finds it by inversion where here its seed is known; anchor, curriculum and the times of distilled
students after the Z-Image technical report, §4.6.2 (arXiv 2511.22699), and its authors' answers.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zimage_lit.backbone.parallelize import ParallelizeSettings
from zimage_lit.components import LatentCodec, TextEncoder
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.lora import LoRASettings
from zimage_lit.objectives import flow_matching, preference
from zimage_lit.objectives.timesteps import TimestepLaw
from zimage_lit.rewards import find_rewards
from zimage_lit.rng import generator
from zimage_lit.sampling import noises
from zimage_lit.stages.frozen_parts import caption_features, check_preference, picture_latents
from zimage_lit.stages.optimizers import OptimizerSettings
from zimage_lit.stages.snapshots import FrozenType
from zimage_lit.stages.stage import BackboneStage


@dataclass
class PreferenceSettings:
    """How strongly preferences pull. The first setting to search is beta: the smaller, the further from the reference,
    and too small a one destroys the pictures while implicit accuracy rises."""

    beta: float = 500.0  # of the reduction below; a sum's is a mean's divided by the elements of a latent
    reduction: Literal["mean", "sum"] = "mean"  # of the squared error over a latent's elements
    anchor: float = 0.1  # weight of the winners' flow-matching loss (always a mean), which holds them up; 0 = none
    noise: Literal["shared", "own"] = "shared"  # own: that from which each picture was drawn, for students of few steps

    def __post_init__(self) -> None:
        key = "model.init_args.preference"
        if self.noise not in ("shared", "own"):
            raise UserError(f"{key}.noise must be shared or own, not {self.noise}.")
        if not 0 < self.beta < math.inf:
            raise UserError(f"{key}.beta must be more than 0, not {self.beta}.")
        if self.reduction not in ("mean", "sum"):
            raise UserError(f"{key}.reduction must be mean or sum, not {self.reduction}.")
        if not 0 <= self.anchor < math.inf:
            raise UserError(f"{key}.anchor must be 0 or more, not {self.anchor}.")


@dataclass
class CurriculumSettings:
    """Which pairs are learnt from: those in two bands, which move on straight lines from a start to an end. At first
    easy prompts with moderate margins, then harder prompts and also larger and subtler margins."""

    steps: int = 1000  # optimiser steps until the end's bands hold
    difficulty_start: tuple[float, float] = (0.0, 0.5)  # lowest and highest share of a prompt's samples that failed
    difficulty_end: tuple[float, float] = (0.0, 1.0)  # the same in the end
    margin_start: tuple[float, float] = (0.2, 0.6)  # lowest and highest difference of the deciding score
    margin_end: tuple[float, float] = (0.0, 1.0)  # the same in the end

    def __post_init__(self) -> None:
        key = "model.init_args.curriculum"
        at_least_one(f"{key}.steps", self.steps)
        for name in ("difficulty_start", "difficulty_end", "margin_start", "margin_end"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise UserError(f"{key}.{name} must be a lowest and a highest value in [0, 1], not {low} and {high}.")


class DPOModule(BackboneStage):
    """Teaches the backbone of `init_from` what is preferred, by pairs of pictures of one caption.

    preference: None for its defaults.
    timesteps: law of the training times, None for its default. Of a distilled student it must be `grid` with the
        student's num_inference_steps and shift, on pairs that the student itself has drawn: other times cost it its few
        steps.
    curriculum: None for all pairs at all steps. It reads what `lightning run pairs` writes into the metadata.
    refresh_every_n_steps: optimiser steps after which the present weights become the reference; None for never.
    frozen_dtype: of the reference where it is a copy of the network (without LoRA or refresh); None for the trainer's.
        In another type than the weights it is not quite the same network, so the loss does not begin at ln 2 exactly.
    The other settings are those of `BackboneStage`.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        codec: LatentCodec,
        backbone: str | dict[str, Any] = "tiny",
        optimizer: OptimizerSettings | None = None,
        preference: PreferenceSettings | None = None,
        timesteps: TimestepLaw | None = None,
        curriculum: CurriculumSettings | None = None,
        refresh_every_n_steps: int | None = None,
        seed: int = 0,
        init_from: str | None = None,
        lora: LoRASettings | None = None,
        frozen_dtype: FrozenType | None = None,
        parallelize: ParallelizeSettings | None = None,
    ) -> None:
        super().__init__(
            text_encoder, codec, backbone, optimizer, seed, init_from, lora, parallelize,
            snapshots={"reference": "fixed" if refresh_every_n_steps is None else "follows"}, frozen_dtype=frozen_dtype,
        )  # fmt: skip
        if lora and lora.dropout:
            raise UserError(
                "model.init_args.lora.dropout must be 0: it would make noise of what backbone and reference are "
                "compared by."
            )
        if refresh_every_n_steps is not None:
            at_least_one("model.init_args.refresh_every_n_steps", refresh_every_n_steps)
        self.preference = preference or PreferenceSettings()
        self.timesteps = timesteps or TimestepLaw()
        self.curriculum = curriculum
        self.refresh_every_n_steps = refresh_every_n_steps

    def configure_model(self) -> None:
        if self.backbone is None and self._trainer is not None and self.init_from is None:
            raise UserError("model.init_args.init_from is not given: name the model that learns what is preferred.")
        super().configure_model()

    def setup(self, stage: str) -> None:
        if rewards := find_rewards(self.trainer):
            raise UserError(
                f"trainer.callbacks has rewards ({', '.join(reward.name for reward in rewards)}), and a DPOModule asks "
                "nobody but its pairs: remove them, or make pairs with them by `lightning run pairs`."
            )
        if self.preference.noise == "own":
            self.check_solver_of_pairs()
        super().setup(stage)

    def check_solver_of_pairs(self) -> None:
        """UserError where the solver that drew the pictures drew more noise on the way than they came from."""
        manifest = getattr(getattr(self.trainer, "datamodule", None), "manifest", None)
        drawn = {} if manifest is None else manifest.settings
        if drawn.get("solver") == "renoise" or drawn.get("eta"):
            raise UserError(
                f"model.init_args.preference.noise is own, and these pairs were drawn by {drawn['solver']} with "
                "fresh noise at every step: set it to shared, or draw pairs with solver=euler."
            )

    # --------------------------------------------------------------------------------------------------- steps

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        check_preference(batch, "DPOModule")
        self.refresh_reference()
        pairs = self.admitted(batch)
        found = self.compared(pairs, "train", self.trainer.fit_loop.epoch_loop.total_batch_idx)
        count, means = len(pairs["captions"]), {name: value.mean() for name, value in found.items()}
        self.log("train/loss", means.pop("loss"), prog_bar=True, batch_size=count)
        self.log_dict({f"train/{name}": value for name, value in means.items()}, batch_size=count)
        loss = found["loss"].sum() / self.count_of_all_ranks(count)
        return {"loss": loss, "winner_error": means["winner_error"]}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        check_preference(batch, "DPOModule")
        found = self.compared(batch, "val", batch_idx)  # the same noise at every validation
        figures = {f"val/{name}": value.mean() for name, value in found.items()}
        self.log_dict(figures, batch_size=len(batch["captions"]), sync_dist=True)

    def refresh_reference(self) -> None:
        """Make the present weights the reference where it is time. Before a step, not after one: then a checkpoint
        from between the two has the old reference, and whoever continues from it comes through here as well."""
        step = self.trainer.global_step
        if self.refresh_every_n_steps and step and step % self.refresh_every_n_steps == 0:
            self.snapshots["reference"].follow(0.0)

    def compared(self, batch: dict[str, Any], phase: str, step: int) -> dict[str, Tensor]:
        """What backbone and reference make of a batch's pairs: the loss of each, with a graph, and its figures, (B,).

        The randomness depends on (seed, phase, step, rank) alone. Winners and losers are in one forward.
        """
        winners, losers = self.latents(batch)
        features = caption_features(self.text_encoder, batch)
        t, shared = self.times_and_noise(winners, phase, step)
        noise, clean, t = shared * 2, winners + losers, torch.cat([t, t])
        if self.preference.noise == "own":
            noise = self.own_noise(batch, clean)
        inputs = flow_matching.interpolate(noise, clean, t), t, features * 2
        target = flow_matching.target_velocity(noise, clean)
        settings = self.preference
        with self.snapshots["reference"].acting() as network:
            seen = network(*inputs)
        reference_winner, reference_loser = preference.denoising_errors(seen, target, settings.reduction).chunk(2)
        predicted = self.backbone(*inputs)
        winner, loser = preference.denoising_errors(predicted, target, settings.reduction).chunk(2)
        errors = winner, loser, reference_winner, reference_loser
        loss, accuracy = preference.dpo_loss(*errors, settings.beta)
        anchor = flow_matching.loss(predicted[: len(winners)], target[: len(winners)])
        return {
            "loss": loss + settings.anchor * anchor,
            "preference_loss": loss.detach(),
            "implicit_accuracy": accuracy,
            "margin": preference.preference_logit(*errors, settings.beta).detach(),
            "winner_error": preference.relative_change(winner, reference_winner),
            "loser_error": preference.relative_change(loser, reference_loser),
        }

    def times_and_noise(self, winners: list[Tensor], phase: str, step: int) -> tuple[Tensor, list[Tensor]]:
        """A time (B,) and a noise (C, h, w) for each pair."""
        draw = generator(self.seed, f"{phase}/timesteps", step, self.global_rank)
        patch_area = self.config.patch_size**2
        t = self.timesteps.sample([x[0].numel() // patch_area for x in winners], draw).to(self.device)
        draw = generator(self.seed, f"{phase}/noise", step, self.global_rank)
        return t, [torch.randn(x.shape, generator=draw, dtype=torch.float32).to(self.device) for x in winners]

    def own_noise(self, batch: dict[str, Any], clean: list[Tensor]) -> list[Tensor]:
        """The noise (C, h, w) from which each picture was drawn, first all winners', then all losers'."""
        known = [entry.get("pair", {}).get("seeds") for entry in batch["metadata"]]
        if None in known:
            raise UserError(
                "model.init_args.preference.noise=own needs the seed of every picture, which the data's metadata do "
                "not have: make the pairs by `lightning run pairs`, or set it to shared."
            )
        seeds = [pair[role] for role in (0, 1) for pair in known]  # winner, loser
        return noises(seeds, [tuple(x.shape) for x in clean], self.device)

    # --------------------------------------------------------------------------------------------------- data

    def latents(self, batch: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Latents (C, h, w) of the winners and of the losers; UserError where those of a pair differ in size."""
        winners, losers = (picture_latents(self.codec, batch, self.device, role) for role in ("winner", "loser"))
        assert winners is not None and losers is not None  # check_preference has seen them
        for place, (winner, loser) in enumerate(zip(winners, losers, strict=True)):
            if winner.shape != loser.shape:
                raise UserError(
                    f"the pictures of pair {batch['ids'][place]} differ in size (latents of {list(winner.shape)} and "
                    f"{list(loser.shape)}), and a pair shares its noise: leave it out, or give its pictures one size."
                )
        return winners, losers

    def admitted(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The pairs of a batch that the curriculum lets in at this optimiser step; UserError without their metadata."""
        if self.curriculum is None:
            return batch
        known = [entry.get("pair", {}) for entry in batch["metadata"]]
        if not all({"difficulty", "margin"} <= pair.keys() for pair in known):
            raise UserError(
                "model.init_args.curriculum goes by difficulty and margin, which the data's metadata do not have: make "
                "the pairs by `lightning run pairs`, or set curriculum to null."
            )
        difficulties, margins = (
            torch.tensor([pair[name] for pair in known], dtype=torch.float64) for name in ("difficulty", "margin")
        )
        course, share = self.curriculum, self.trainer.global_step / self.curriculum.steps
        inside = preference.admitted_pairs(
            difficulties,
            margins,
            preference.band_at(course.difficulty_start, course.difficulty_end, share),
            preference.band_at(course.margin_start, course.margin_end, share),
        ).tolist()
        self.log("train/admitted", sum(inside) / len(inside), batch_size=len(inside))
        return {
            name: [value for value, stays in zip(values, inside, strict=True) if stays]
            for name, values in batch.items()
        }

    def count_of_all_ranks(self, count: int) -> Tensor | int:
        """By what a rank divides its sum of losses, so that every pair weighs alike once gradients have been averaged
        over the ranks, however many of its pairs were admitted."""
        if self.curriculum is None:
            return count
        counts = torch.tensor(float(count), device=self.device)
        return self.trainer.strategy.reduce(counts, reduce_op="mean")  # type: ignore[no-any-return]
