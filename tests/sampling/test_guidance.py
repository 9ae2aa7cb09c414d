import math

import pytest
import torch

from zimage_lit.errors import UserError
from zimage_lit.sampling import guidance


class Recorder:
    """A backbone whose velocity is t + mean(caption) + 0.1·x, and which counts what it is asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, latents, t, captions):
        self.batches.append(len(latents))
        return [t_i + caption.mean() + 0.1 * x for x, t_i, caption in zip(latents, t, captions, strict=True)]


CAPTIONS = [torch.full((3, 2), 1.0), torch.full((5, 2), 2.0)]
NEGATIVES = [torch.full((1, 2), -1.0), torch.full((1, 2), 0.5)]
LATENTS = [torch.randn(4, 2, 2), torch.randn(4, 2, 6)]


def published(pos: torch.Tensor, neg: torch.Tensor, g: float, normalization: float) -> torch.Tensor:
    """The published pipeline's arithmetic: g = 0 is no guidance."""
    pred = pos + g * (pos - neg)
    longest = normalization * torch.linalg.vector_norm(pos)
    if normalization > 0 and torch.linalg.vector_norm(pred) > longest:
        pred = pred * (longest / torch.linalg.vector_norm(pred))
    return pred


@pytest.mark.parametrize("normalization", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("g", [0.0, 1.0, 4.0])
def test_guidance_equals_the_published_arithmetic_at_w_minus_one(g, normalization):
    conditional, unconditional = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    w = guidance.from_published_scale(g)
    result = guidance.guided(conditional, unconditional, w, normalization)
    expected = [published(c, u, g, normalization) for c, u in zip(conditional, unconditional, strict=True)]
    torch.testing.assert_close(result, torch.stack(expected))
    as_list = guidance.guided(list(conditional), list(unconditional), w, normalization)
    assert torch.equal(torch.stack(as_list), result)


def test_scale_one_is_conditional_and_zero_is_unconditional():
    conditional, unconditional = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(guidance.guided(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guidance.guided(conditional, unconditional, 0.0), unconditional)


def test_renormalisation_only_ever_shortens():
    conditional, unconditional = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    lengths = guidance.guided(conditional, unconditional, 5.0, 1.0).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, conditional.flatten(1).norm(dim=1))
    parallel = guidance.guided(conditional, conditional, 5.0, 2.0)
    torch.testing.assert_close(parallel, conditional)


def test_both_branches_travel_in_one_forward_with_their_own_captions():
    backbone = Recorder()
    velocity = guidance.guided_velocity(backbone, CAPTIONS, NEGATIVES, guidance_scale=3.0)
    result = velocity(LATENTS, 0.25)
    assert backbone.batches == [4]
    for x, caption, negative, v in zip(LATENTS, CAPTIONS, NEGATIVES, result, strict=True):
        c, u = (0.25 + features.mean() + 0.1 * x for features in (caption, negative))
        torch.testing.assert_close(v, u + 3.0 * (c - u))


def test_steps_before_the_start_and_beyond_the_truncation_are_conditional_and_cheap():
    backbone = Recorder()
    velocity = guidance.guided_velocity(
        backbone, CAPTIONS, NEGATIVES, guidance_scale=3.0, cfg_start=0.1, cfg_truncation=0.5
    )
    results = {t: velocity(LATENTS, t) for t in (0.0, 0.09, 0.1, 0.5, 0.51, 0.9)}
    assert backbone.batches == [2, 2, 4, 4, 2, 2]
    for x, caption, v in zip(LATENTS, CAPTIONS, results[0.9], strict=True):
        torch.testing.assert_close(v, 0.9 + caption.mean() + 0.1 * x)


def test_without_guidance_the_negative_branch_is_never_evaluated():
    backbone = Recorder()
    guidance.guided_velocity(backbone, CAPTIONS, None, guidance_scale=1.0)(LATENTS, 0.1)
    assert backbone.batches == [2]


def test_tensors_come_back_as_tensors():
    latents = torch.randn(2, 4, 2, 2)
    for scale in (1.0, 2.0):
        velocity = guidance.guided_velocity(Recorder(), CAPTIONS, NEGATIVES, scale)
        assert torch.equal(velocity(latents, 0.3), torch.stack(velocity(list(latents), 0.3)))


@pytest.mark.parametrize("negatives", [None, NEGATIVES[:1]])
def test_guidance_without_negatives_is_refused(negatives):
    with pytest.raises(ValueError, match="one negative for each of 2 captions"):
        guidance.guided_velocity(Recorder(), CAPTIONS, negatives, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("guidance_scale", [math.nan, math.inf, -math.inf]),
        ("cfg_truncation", [-0.1, 1.1, math.nan]),
        ("cfg_start", [-0.1, 1.1, math.nan]),
        ("cfg_normalization", [-1.0, math.inf, math.nan]),
    ],
)
def test_numbers_that_make_no_sense_are_refused(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"{name} must .*, not {value}"):
            guidance.guided_velocity(Recorder(), CAPTIONS, NEGATIVES, **{"guidance_scale": 2.0, name: value})


def test_the_ends_of_the_ranges_are_allowed():
    for truncation, normalization in ((0.0, 0.0), (1.0, 1.0)):
        guidance.check_guidance(-1.0, truncation, normalization)
