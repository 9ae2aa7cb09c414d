import math

import pytest

from zimage_lit.callbacks.sampling import SamplingSettings
from zimage_lit.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_inference_steps", 0), ("shift", 0.0), ("shift", math.nan), ("guidance_scale", math.inf)],
)
def test_settings_that_make_no_sense_are_refused_before_the_training(name, value):
    with pytest.raises(UserError, match=f"{name} must .*, not {value}"):
        SamplingSettings(**{name: value})
