"""DMDRModule with one thing wrong or left out: the controls of distillation.py, which names them in its arms."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zimage_lit.objectives import flow_matching
from zimage_lit.sampling.guidance import guided_velocity
from zimage_lit.stages.dmdr import DMDRModule, Generated, Terms


class SwappedSign(DMDRModule):
    """The student goes where the teacher does not send it."""

    def terms(self, generated: Generated, step: int) -> Terms:
        terms = super().terms(generated, step)
        guidance = None if terms.guidance is None else [-x for x in terms.guidance]
        return replace(terms, matching=[-x for x in terms.matching], guidance=guidance)


class NotRenoised(DMDRModule):
    """In the roll-outs of training a step gets the clean sample of the one before as it is, in serving it does not."""

    @torch.no_grad()
    def simulate(self, noise: list[Tensor], features: list[Tensor], grid: Tensor, step: int) -> list[Tensor]:
        latents = noise
        for sigma in grid[:-1].tolist():
            t = torch.full((len(latents),), 1 - sigma, device=self.device)
            latents = flow_matching.clean_from_velocity(latents, self.backbone(latents, t, features), t)
        return latents


class RewardAlone(DMDRModule):
    """Neither distribution matching nor guidance: what a student becomes that is only rewarded."""

    def terms(self, generated: Generated, step: int) -> Terms:
        terms = super().terms(generated, step)
        return replace(terms, matching=[torch.zeros_like(x) for x in terms.matching], guidance=None)


class RewardAndL2(RewardAlone):
    """In place of distribution matching the distance from what the student drew from the same noise when it began.

    `init_from` is that student: it takes the teacher's place.
    """

    l2 = 1.0

    def student_losses(
        self, generated: Generated, batch: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses, figures = super().student_losses(generated, batch, step)
        distances = flow_matching.loss(generated.clean, self.drawn_at_first(generated, batch, step))
        return losses + self.l2 * distances, figures

    @torch.no_grad()
    def drawn_at_first(self, generated: Generated, batch: dict[str, Any], step: int) -> list[Tensor]:
        grid = self.rollout.grid[: generated.step_index + 1]
        with self.roles.acting("teacher") as network:
            velocity = guided_velocity(network, generated.features, None, guidance_scale=1.0)
            latents = self.noise(self.shapes(batch), "noise", step)
            for sigma, after in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
                latents = [x + (sigma - after) * v for x, v in zip(latents, velocity(latents, 1 - sigma), strict=True)]
            t = torch.full((len(latents),), 1 - float(grid[-1]), device=self.device)
            return flow_matching.clean_from_velocity(latents, network(latents, t, generated.features), t)
