"""The differentiable TinyWorld reward: every element against counting all cases, the gradient against differences."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_modules.tinyworld.combinations import COLORS
from data_modules.tinyworld.world import draw
from evaluation.benchmarks import geneval
from evaluation.fidelity.classifier_pictures import labelled_world
from evaluation.fidelity.tinyworld_classifier import (
    KINDS,
    LETTERS,
    ClassifierConfig,
    Judgement,
    TinyWorldClassifier,
    save_classifier,
)
from zimage_lit.rewards import RewardSet
from zimage_lit.rewards.tinyworld_likelihood import (
    TinyWorldLikelihood,
    log_exactly,
    log_likelihoods,
    log_related,
    presence,
    scene_log_likelihood,
    standing,
    word_log_likelihood,
)


def chances(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(2).log_softmax(0)


def chance_that(log_is: Tensor, event: Callable[[tuple[int, ...]], bool]) -> float:
    """Probability of an event over independent cells, by going through all 2^cells pictures."""
    p = log_is.exp().tolist()
    return sum(
        math.prod(q if present else 1 - q for q, present in zip(p, case, strict=True))
        for case in product((0, 1), repeat=len(p))
        if event(case)
    )


def test_a_number_is_as_likely_as_all_its_cases_together() -> None:
    cells = [presence(chances(4, 6, seed=i), 2) for i in range(5)]
    log_is, log_is_not = (torch.stack(pair) for pair in zip(*cells, strict=True))
    numbers = [0, 1, 2, 4, 6]
    for row, number in enumerate(numbers):
        expected = chance_that(log_is[row], lambda case, number=number: sum(case) == number)
        assert log_exactly(log_is, log_is_not, numbers)[row].exp().item() == pytest.approx(expected, rel=1e-12)


def test_a_colour_counts_objects_of_that_class_and_colour() -> None:
    kinds, colors = chances(len(KINDS), 5, seed=1), chances(len(COLORS), 5, seed=2)
    clause = {"class": "ring", "count": 2, "color": "blue"}
    ring, blue = kinds[KINDS.index("ring")], colors[COLORS.index("blue")]
    expected = math.log(chance_that(ring, lambda case: sum(case) == 2))
    expected += math.log(chance_that(ring + blue, lambda case: sum(case) == 2))
    assert scene_log_likelihood(kinds, colors, [clause], (1, 5)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("relation", geneval.RELATIONS)
def test_a_relation_is_as_likely_as_all_places_of_the_two_in_it(relation: str) -> None:
    rows, columns = 3, 2
    subject, reference = (presence(chances(3, 6, seed=seed), 1) for seed in (3, 4))
    holds = standing(relation, rows, columns)
    boxes = [
        (16 * column, 16 * row, 16 * column + 16, 16 * row + 16) for row in range(rows) for column in range(columns)
    ]

    def alone(log_is: Tensor, cell: int) -> float:
        """P(it is in this cell | it is in exactly one)."""
        here = chance_that(log_is, lambda case: case[cell] == 1 and sum(case) == 1)
        return here / chance_that(log_is, lambda case: sum(case) == 1)

    expected = sum(
        alone(subject[0], i) * alone(reference[0], j)
        for i, j in product(range(6), repeat=2)
        if relation in geneval.relative_position(boxes[i], boxes[j])
    )
    assert 0.01 < expected < 0.99
    assert log_related(subject, reference, holds).exp().item() == pytest.approx(expected, rel=1e-12)


def test_a_word_is_as_likely_as_all_its_places_together() -> None:
    letters = chances(len(LETTERS), 2, 5, seed=5)
    p = letters.exp()
    expected = 0.0
    for row, column in product(range(2), range(3)):
        written = {(row, column): LETTERS.index("G"), (row, column + 2): LETTERS.index("O")}
        expected += math.prod(p[written.get(place, 0), *place].item() for place in product(range(2), range(5)))
    assert word_log_likelihood(letters, "GO").exp().item() == pytest.approx(expected, rel=1e-10)
    assert word_log_likelihood(letters, "GOAL").item() < -1e8  # it has no room


def certain(sample: Any) -> Judgement:
    """What a classifier that is sure of the truth would say."""
    labels = labelled_world([sample])

    def sure(values: Tensor, number: int) -> Tensor:
        values = values.clamp(min=0)  # what is not labelled does not matter here
        return torch.nn.functional.one_hot(values, number).movedim(-1, 1).float().mul(20).log_softmax(1)

    kinds, colors = sure(labels.kinds, len(KINDS)), sure(labels.colors, len(COLORS))
    return Judgement(kinds, colors, sure(labels.letters, len(LETTERS)), torch.zeros(1))


@pytest.mark.parametrize("task", ["counting", "color_attr", "position", "word", "two_object", "colors"])
def test_the_truth_is_far_likelier_than_any_other_statement_of_its_task(task: str) -> None:
    samples = [draw(index, seed=11, task=task) for index in range(12)]
    for sample in samples[:4]:
        judgement = certain(sample)
        for other in samples:
            likelihood = log_likelihoods(judgement, [other.metadata]).item()
            same = other.metadata["prompt"] == sample.metadata["prompt"]
            true = same or geneval_holds(sample, other)
            assert (-0.1 < likelihood <= 1e-5) if true else likelihood < -5


def geneval_holds(sample: Any, other: Any) -> bool:
    """Whether the picture of one sample happens to show the other's statement too."""
    if other.metadata["tag"] == "word":
        return False
    detections = [{"cls": thing.name, "box": [*thing.box, 1.0], "color": thing.color} for thing in sample.objects]
    wanted = {clause["class"]: clause["count"] for clause in other.metadata["include"]}
    exact = all(sum(d["cls"] == name for d in detections) == count for name, count in wanted.items())
    return exact and geneval.evaluate(other.metadata, detections)["correct"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained classifier: what is tested here does not depend on what it has learnt."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    classifier = TinyWorldClassifier(ClassifierConfig(seed=1, width=16))
    for parameter in classifier.parameters():  # fresh ones are so small that every picture looks alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    save_classifier(classifier, folder)
    return folder


@pytest.mark.parametrize("task", ["counting", "color_attr", "position", "word"])
def test_the_gradient_is_that_of_finite_differences(task: str, folder: Path) -> None:
    reward = TinyWorldLikelihood(str(folder))
    reward.prepare("cpu")
    reward.classifier.double()
    sample = draw(2, task=task)
    generator = torch.Generator().manual_seed(1)
    image = torch.from_numpy(sample.image).permute(2, 0, 1).double() / 127.5 - 1
    image = (image + 0.3 * torch.randn(image.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    way = torch.randn(image.shape, generator=generator, dtype=torch.float64)

    def score(shift: float) -> Tensor:
        return reward.score([image + shift * way], ["a prompt"], [sample.metadata])[0]

    (gradient,) = torch.autograd.grad(score(0.0), image)
    slope = (score(1e-6) - score(-1e-6)) / 2e-6
    torch.testing.assert_close((gradient * way).sum(), slope.detach(), rtol=1e-5, atol=1e-7)
    assert slope.abs() > 0.01


def test_pictures_of_several_sizes_have_the_scores_that_they_have_alone(folder: Path) -> None:
    reward = TinyWorldLikelihood(str(folder))
    samples = [draw(index, size=size) for index, size in enumerate([(64, 64), (96, 64), (64, 64)])]
    images = [torch.from_numpy(sample.image).permute(2, 0, 1) for sample in samples]
    metadata = [sample.metadata for sample in samples]
    together = RewardSet([reward]).score(images, ["a"] * 3, metadata)["tiny_world_likelihood"]
    alone = [RewardSet([reward]).score([image], ["a"], [known]) for image, known in zip(images, metadata, strict=True)]
    expected = torch.cat([scores["tiny_world_likelihood"] for scores in alone])
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
    assert (together < 0).all() and reward.classifier.fingerprint()[:16] in reward.version


def test_a_step_along_the_gradient_makes_the_statement_likelier(folder: Path) -> None:
    sample = draw(0, task="counting")
    rewards = RewardSet([TinyWorldLikelihood(str(folder))])
    start = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    image = start.clone().requires_grad_()
    before = rewards.differentiable([image], ["a"], [sample.metadata])
    before.sum().backward()
    assert image.grad is not None and image.grad.abs().max() > 0
    after = rewards.differentiable([start + 1e-3 * image.grad / image.grad.norm()], ["a"], [sample.metadata])
    assert after.item() > before.item()
