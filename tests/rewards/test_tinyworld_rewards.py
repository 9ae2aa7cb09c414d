"""TinyWorld's rewards on pictures whose content is known."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_modules.tinyworld.combinations import TASKS
from data_modules.tinyworld.world import COLOR_VALUES, draw, shape_mask
from zimage_lit.errors import UserError
from zimage_lit.rewards import RewardSet
from zimage_lit.rewards.tinyworld import TinyWorldReward


def painted(*things: tuple[str, str, int, int]) -> Tensor:
    """A 64x64 picture of (class, colour, column, row) in cells of 16 pixels."""
    canvas = np.full((64, 64, 3), 24.0, dtype=np.float32)
    for name, color, column, row in things:
        y, x = 16 * row + 1, 16 * column + 1
        alpha = shape_mask(name, 14)[..., None]
        place = canvas[y : y + 14, x : x + alpha.shape[1]]
        place[:] = alpha * np.array(COLOR_VALUES[color], dtype=np.float32) + (1 - alpha) * place
    return torch.from_numpy(canvas.round().astype(np.uint8)).permute(2, 0, 1)


def one(reward: TinyWorldReward, image: Tensor, metadata: dict[str, Any]) -> float:
    return RewardSet([reward]).score([image], ["a prompt"], [metadata])[reward.name].item()


COUNTING = {
    "tag": "counting",
    "include": [{"class": "circle", "count": 3}],
    "exclude": [{"class": "circle", "count": 4}],
}
CIRCLES = [("circle", "red", 0, 0), ("circle", "red", 2, 0), ("circle", "red", 0, 2), ("circle", "red", 2, 2)]
LEFT_OF = {
    "tag": "position",
    "include": [{"class": "square", "count": 1}, {"class": "ring", "count": 1, "position": ["left of", 0]}],
}
TWO_COLORS = {
    "tag": "color_attr",
    "include": [{"class": "square", "count": 1, "color": "blue"}, {"class": "ring", "count": 1, "color": "red"}],
}


@pytest.mark.parametrize("task", TASKS)
def test_a_true_picture_satisfies_every_aspect_of_its_statement(task: str) -> None:
    samples = [draw(index, seed=3, task=task) for index in range(6)]
    images = [torch.from_numpy(sample.image).permute(2, 0, 1) for sample in samples]
    metadata = [sample.metadata for sample in samples]
    for aspect in ("all", "elements", "shape", "count", "color", "position", "word"):
        scores = RewardSet([TinyWorldReward(aspect)]).score(images, [task] * 6, metadata)[f"tinyworld_{aspect}"]
        assert scores.isnan().all() or scores.tolist() == [1] * 6
        applies = aspect in {
            "word": ("all", "elements", "word"),
            "position": ("all", "elements", "shape", "count", "position"),
            "colors": ("all", "elements", "shape", "count", "color"),
            "color_attr": ("all", "elements", "shape", "count", "color"),
        }.get(task, ("all", "elements", "shape", "count"))
        assert scores.isnan().all() == (not applies)


@pytest.mark.parametrize(("number", "exact", "graded"), [(1, 0, -2), (2, 0, -1), (3, 1, 0), (4, 0, -1)])
def test_a_wrong_number_costs_its_distance(number: int, exact: float, graded: float) -> None:
    image = painted(*CIRCLES[:number])
    assert one(TinyWorldReward("count"), image, COUNTING) == exact
    assert one(TinyWorldReward("count", graded=True), image, COUNTING) == graded
    assert one(TinyWorldReward("all"), image, COUNTING) == exact
    assert one(TinyWorldReward("shape"), image, COUNTING) == 1
    assert one(TinyWorldReward("elements"), image, COUNTING) == (1 + exact) / 2


def test_a_position_on_the_wrong_side_is_the_only_element_that_fails() -> None:
    wrong = painted(("ring", "red", 3, 1), ("square", "red", 0, 1))
    right = painted(("ring", "red", 0, 1), ("square", "red", 3, 1))
    assert [one(TinyWorldReward("position"), image, LEFT_OF) for image in (wrong, right)] == [0, 1]
    assert one(TinyWorldReward("elements"), wrong, LEFT_OF) == pytest.approx(2 / 3)
    assert one(TinyWorldReward("all"), wrong, LEFT_OF) == 0
    lonely = painted(("ring", "red", 0, 1))
    assert one(TinyWorldReward("position", graded=True), lonely, LEFT_OF) == 0
    assert one(TinyWorldReward("elements"), lonely, LEFT_OF) == pytest.approx(1 / 3)


def test_graded_colours_and_shapes_are_shares() -> None:
    image = painted(("square", "blue", 0, 0), ("ring", "green", 2, 2))
    assert one(TinyWorldReward("color"), image, TWO_COLORS) == 0
    assert one(TinyWorldReward("color", graded=True), image, TWO_COLORS) == 0.5
    assert one(TinyWorldReward("elements"), image, TWO_COLORS) == 0.75
    assert one(TinyWorldReward("shape", graded=True), painted(("square", "blue", 0, 0)), TWO_COLORS) == 0.5


def test_a_misspelt_word_has_the_share_of_letters_that_are_right() -> None:
    sample = next(sample for index in range(99) if len((sample := draw(index, task="word")).metadata["text"]) == 4)
    image = torch.from_numpy(sample.image).permute(2, 0, 1)
    asked = {"tag": "word", "text": sample.metadata["text"][:3] + ("A" if sample.metadata["text"][3] != "A" else "B")}
    assert one(TinyWorldReward("word"), image, asked) == 0
    assert one(TinyWorldReward("word", graded=True), image, asked) == 0.75
    assert one(TinyWorldReward("word", graded=True), painted(), asked) == 0


def test_statements_that_say_nothing_of_the_aspect_are_not_judged_and_do_not_count_as_failures() -> None:
    rewards = RewardSet([TinyWorldReward("word", invalid_limit=0.0)])
    for _ in range(5):
        scores = rewards.score([painted(*CIRCLES)] * 16, ["circles"] * 16, [COUNTING] * 16)
    assert scores["tinyworld_word"].isnan().all() and rewards.logged(scores)["reward/tinyworld_word_invalid"] == 0


def test_prompts_of_another_world_are_refused() -> None:
    with pytest.raises(UserError, match=r"tinyworld_all needs TinyWorld's metadata, and the prompt “a cat” has none"):
        RewardSet([TinyWorldReward()]).score([painted()], ["a cat"], [{}])
    with pytest.raises(UserError, match="aspect all has no grades"):
        TinyWorldReward("all", graded=True)
    assert math.isfinite(one(TinyWorldReward(), painted(), COUNTING))
