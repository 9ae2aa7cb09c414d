import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from zimage_lit.errors import UserError
from zimage_lit.sampling import sigmas


def test_the_turbo_table_of_eight_steps():
    published = [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]
    times = [0, 0.045455, 0.1, 0.166667, 0.25, 0.357143, 0.5, 0.7]
    table = sigmas(8, shift=3.0)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, torch.tensor(published), atol=1e-6, rtol=0)
    torch.testing.assert_close(1 - table[:-1], torch.tensor(times), atol=1e-6, rtol=0)


def test_nine_steps_are_not_the_eight_step_schedule_with_an_idle_step():
    torch.testing.assert_close(sigmas(9, 3.0)[[1, 2, 8]], torch.tensor([0.96, 0.913, 0.273]), atol=5e-4, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 8, 28, 50])
def test_equal_to_the_schedule_that_the_published_pipeline_walks(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps))
    torch.testing.assert_close(sigmas(steps, shift), scheduler.sigmas, atol=2e-7, rtol=0)


def test_runs_down_from_one_to_zero():
    table = sigmas(28, 6.0)
    assert table[0] == 1 and table[-1] == 0 and (table.diff() < 0).all()


@pytest.mark.parametrize(
    ("steps", "shift", "message"),
    [(0, 3.0, "at least 1"), *((8, shift, "shift must be positive") for shift in (0.0, -1.0, math.inf, math.nan))],
)
def test_impossible_schedules_are_refused(steps, shift, message):
    with pytest.raises(UserError, match=message):
        sigmas(steps, shift)
