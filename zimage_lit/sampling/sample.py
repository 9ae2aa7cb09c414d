"""From noise to clean latents: the one loop that stages' callbacks and the pipeline share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zimage_lit.errors import UserError
from zimage_lit.rng import generator
from zimage_lit.sampling.guidance import Backbone, guided_velocity
from zimage_lit.sampling.schedules import sigmas
from zimage_lit.sampling.solvers import SOLVERS, OnStep

LARGEST_SEED = 2**64 - 1  # torch takes no larger one, and counts negative ones down from here


def noises(
    seeds: Sequence[int],
    shapes: Sequence[Sequence[int]] | Sequence[int],
    device: torch.device | str = "cpu",
    draws: Sequence[int] | None = None,
) -> list[Tensor]:
    """Standard normal noise of each sample from its own seed, list of (C, H, W) float32.

    ``shapes``: one (C, H, W) for all, or one a sample. ``draws``: which of the noises that its seed's generator gives
    one after the other, from 0; None: the first. A sample's noise depends on its seed, draw and shape alone, neither on
    its batch nor on the device (it is drawn on the CPU), and equals what diffusers draws from
    ``torch.Generator("cpu").manual_seed(seed)``, called again and again with the same generator. Raises UserError for a
    seed below 0 or above ``LARGEST_SEED``, and for a draw below 0.
    """
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise UserError(f"seed must lie between 0 and {LARGEST_SEED}, not {seed}.")
    per_sample = [shapes] * len(seeds) if isinstance(shapes[0], int) else shapes
    draws = [0] * len(seeds) if draws is None else draws
    return [
        _noise(seed, tuple(shape), draw).to(device)  # type: ignore[arg-type]
        for seed, shape, draw in zip(seeds, per_sample, draws, strict=True)
    ]


def _noise(seed: int, shape: tuple[int, ...], draw: int) -> Tensor:
    if draw < 0:
        raise UserError(f"draw must be 0 or more, not {draw}.")
    source = torch.Generator().manual_seed(seed)
    for _ in range(draw):
        torch.randn(shape, generator=source)  # not skipped by its size: how many numbers it takes is torch's affair
    return torch.randn(shape, generator=source)


@torch.no_grad()
def sample(
    backbone: Backbone,
    captions: Sequence[Tensor],
    noises: Sequence[Tensor],
    *,
    num_inference_steps: int,
    shift: float = 1.0,
    guidance_scale: float = 1.0,
    negative_captions: Sequence[Tensor] | None = None,
    cfg_start: float = 0.0,
    cfg_truncation: float = 1.0,
    cfg_normalization: float = 0.0,
    solver: str = "euler",
    eta: float = 0.0,
    seeds: Sequence[int] | None = None,
    draws: Sequence[int] | None = None,
    on_step: OnStep[list[Tensor]] | None = None,
) -> list[Tensor]:
    """Clean latents for B captions, list of (C, H, W) float32.

    ``backbone``: ``(latents list, t (B,), captions list) -> velocities list``; ``captions``: (L_i, D) features;
    ``noises``: initial latents (C, H_i, W_i), of any sizes. ``guidance_scale`` is the standard one (1 = none).
    ``eta``: of the solver cps alone, how much noise it draws anew. ``seeds``: each sample's seed of that noise, for cps
    and renoise; samples of one seed and several ``draws`` (see ``noises``) have each their own.
    Mixed precision is the caller's: wrap the call in ``torch.autocast``; the state stays float32.
    Raises ValueError where captions, negatives, noises and seeds differ in number; UserError for an unknown solver, and
    for an eta, a number of steps, a shift or guidance that makes no sense.
    """
    check_solver(solver, eta)
    if len(captions) != len(noises):
        raise ValueError(
            f"{len(captions)} captions were given for {len(noises)} noises; each sample needs one of both."
        )
    velocity = guided_velocity(
        backbone, captions, negative_captions, guidance_scale, cfg_truncation, float(cfg_normalization), cfg_start
    )
    options: dict[str, Any] = {"eta": eta} if solver == "cps" else {}
    if solver in ("cps", "renoise"):
        options["fresh_noise"] = _fresh_noise(solver, noises, seeds, draws)
    latents = SOLVERS[solver](velocity, list(noises), sigmas(num_inference_steps, shift), on_step, **options)
    return list(latents)


def check_solver(solver: str, eta: float = 0.0) -> None:
    """Raise UserError for an unknown solver, and for an eta that it cannot use."""
    if solver not in SOLVERS:
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}, not {solver}.")
    if not 0 <= eta <= 1:
        raise UserError(f"eta must lie in [0, 1] (0 = nothing drawn anew), not {eta}.")
    if eta and solver != "cps":
        raise UserError(f"eta={eta} means nothing to the solver {solver}: give solver=cps, or eta=0.")


def _fresh_noise(
    solver: str, noises: Sequence[Tensor], seeds: Sequence[int] | None, draws: Sequence[int] | None
) -> Callable[[int], list[Tensor]]:
    """Noise of the samples for a step: a pure function of each one's seed and draw, like its first noise."""
    if seeds is None or len(seeds) != len(noises):
        raise ValueError(f"The solver {solver} needs the seed of each of {len(noises)} samples.")
    purposes = [f"cps/{draw}" if draw else "cps" for draw in draws or [0] * len(noises)]

    def draw(step: int) -> list[Tensor]:
        return [
            torch.randn(noise.shape, generator=generator(seed, purpose, step)).to(noise.device)
            for noise, seed, purpose in zip(noises, seeds, purposes, strict=True)
        ]

    return draw
