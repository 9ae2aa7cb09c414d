import io

import numpy as np
import pytest
import torch
from PIL import Image

from zimage_lit.errors import UserError
from zimage_lit.rewards import RewardSet
from zimage_lit.rewards.controls import Brightness, JPEGSize


def test_jpeg_size_is_that_of_the_file() -> None:
    torch.manual_seed(0)
    rich = torch.randint(0, 256, (3, 24, 40), dtype=torch.uint8)
    plain = torch.full((3, 24, 40), 9, dtype=torch.uint8)
    scores = RewardSet([JPEGSize(quality=90)]).score([rich, plain], ["a", "b"])["jpeg_size"]
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(rich.permute(1, 2, 0))).save(buffer, "JPEG", quality=90)
    assert scores[0].item() == pytest.approx(-len(buffer.getvalue()) / 1000)
    assert scores[0] < scores[1] < 0
    with pytest.raises(UserError, match=r"quality must lie in \[1, 95\], not 0"):
        JPEGSize(quality=0)


def test_brightness_of_finished_pictures_and_its_gradient() -> None:
    black, white = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 4, 4), 255, dtype=torch.uint8)
    rewards = RewardSet([Brightness(weight=3.0)])
    assert rewards.score([black, white], ["a", "b"])["brightness"].tolist() == [0, 1]
    image = torch.zeros(3, 4, 4, requires_grad=True)
    rewards.differentiable([image], ["a"]).sum().backward()
    assert image.grad is not None
    torch.testing.assert_close(image.grad, torch.full((3, 4, 4), 3 / 2 / 48))
