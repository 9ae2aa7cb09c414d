"""How likely a picture says what its TinyWorld statement says, with a gradient: for rewards that are differentiated.

The classifier of evaluation/fidelity gives, for every cell of a picture, the chances of what it holds. Cells are taken
as independent, and so are the elements of a statement; what follows is exact under that.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from data_modules.tinyworld.combinations import COLORS
from data_modules.tinyworld.world import CELL
from evaluation.benchmarks import geneval
from evaluation.fidelity.tinyworld_classifier import KINDS, LETTERS, ClassifierConfig, Judgement, obtain
from zimage_lit.rewards.contract import Metadata, RewardCallback
from zimage_lit.rewards.tinyworld import check_statement

IMPOSSIBLE = -1e9  # stands for log 0, whose derivative would be NaN


class TinyWorldLikelihood(RewardCallback):
    """Log-likelihood of a statement's elements under a small classifier; at most 0. Differentiable.

    Elements: of each object the number (exactly so many), its colour, its relation to another; of a word its letters.

    folder: of the classifier; trained there, in a minute or two, where there is none.
    seed, width: of the classifier. Let them be others than those of the classifier that measures distances: what is
        rewarded must not be what is measured.

    Needs TinyWorld's metadata.
    """

    differentiable = True

    def __init__(
        self, folder: str = "data/tinyworld_reward_classifier", seed: int = 1, width: int = 16, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.folder = folder
        self.config = ClassifierConfig(seed=seed, width=width)

    def load(self) -> None:
        self.classifier = obtain(self.folder, self.config)

    @property
    def version(self) -> str:
        return f"{type(self).__name__} {self.classifier.fingerprint()[:16]}" if self._prepared else super().version

    def applies_to(self, prompt: str, metadata: Metadata) -> bool:
        check_statement(self.name, prompt, metadata)
        return True

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        scores: dict[int, Tensor] = {}
        for shape in dict.fromkeys(image.shape for image in images):
            places = [place for place, image in enumerate(images) if image.shape == shape]
            judgement = self.classifier(torch.stack([images[place] for place in places]))
            likelihoods = log_likelihoods(judgement, [metadata[place] for place in places])
            scores.update(zip(places, likelihoods, strict=True))
        return torch.stack([scores[place] for place in range(len(images))])


def log_likelihoods(judgement: Judgement, statements: Sequence[Metadata]) -> Tensor:
    """Log-likelihood of each picture's statement, (B,)."""
    parts = []
    for place, statement in enumerate(statements):
        if statement["tag"] == "word":
            parts.append(word_log_likelihood(judgement.letters[place], statement["text"]))
        else:
            kinds, colors = judgement.kinds[place].flatten(1), judgement.colors[place].flatten(1)
            rows, columns = judgement.kinds.shape[2:]
            parts.append(scene_log_likelihood(kinds, colors, statement["include"], (rows, columns)))
    return torch.stack(parts)


def scene_log_likelihood(
    kinds: Tensor, colors: Tensor, clauses: Sequence[Metadata], lattice: tuple[int, int]
) -> Tensor:
    """Sum over the clauses of log P(number), log P(colour), log P(relation), (), for one picture.

    kinds: (kinds, cells) and colors: (colours, cells), log-probabilities.   lattice: (rows, columns) of the cells.
    """
    there = [presence(kinds, KINDS.index(clause["class"])) for clause in clauses]
    numbers, chances = [clause["count"] for clause in clauses], list(there)
    for clause, (log_is, log_is_not) in zip(clauses, there, strict=True):
        if "color" in clause:
            log_painted, log_not_painted = presence(colors, COLORS.index(clause["color"]))
            chances.append((log_is + log_painted, torch.logaddexp(log_is_not, log_is + log_not_painted)))
            numbers.append(clause["count"])
    log_is, log_is_not = (torch.stack(logs) for logs in zip(*chances, strict=True))
    total = log_exactly(log_is, log_is_not, numbers).sum()
    for clause, subject in zip(clauses, there, strict=True):
        if "position" in clause:
            relation, reference = clause["position"]
            total = total + log_related(subject, there[reference], standing(relation, *lattice))
    return total


def presence(log_chances: Tensor, which: int) -> tuple[Tensor, Tensor]:
    """log P(it is this one) and log P(it is another), (cells,) each, of log-probabilities (choices, cells)."""
    others = [place for place in range(len(log_chances)) if place != which]
    return log_chances[which], log_chances[others].logsumexp(0)


def log_exactly(log_is: Tensor, log_is_not: Tensor, numbers: Sequence[int]) -> Tensor:
    """log P(exactly so many of independent cells hold it), (M,): the Poisson binomial distribution, cell by cell.

    log_is, log_is_not: (M, cells).   numbers: M of them.
    """
    most = max(numbers)
    known = log_is.new_full((len(numbers), most + 1), IMPOSSIBLE)  # log P(k among the cells so far)
    known = torch.cat([torch.zeros_like(known[:, :1]), known[:, 1:]], 1)
    for cell in range(log_is.shape[1]):
        one_more = torch.cat([torch.full_like(known[:, :1], IMPOSSIBLE), known[:, :-1]], 1) + log_is[:, cell, None]
        known = torch.logaddexp(known + log_is_not[:, cell, None], one_more)
    return known[torch.arange(len(numbers)), list(numbers)]


def log_related(subject: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], holds: Tensor) -> Tensor:
    """log P(the one subject stands in the relation to the one reference), ().

    subject, reference: log P(a cell holds it) and log P(it does not), (cells,) each.   holds: (cells, cells) bool.
    Of exactly one such object, the chance to be in a cell is in proportion to the cell's odds.
    """
    there, other = ((log_is - log_is_not).log_softmax(0) for log_is, log_is_not in (subject, reference))
    pairs = there[:, None] + other[None, :]
    return pairs[holds.to(pairs.device)].logsumexp(0)


@cache
def standing(relation: str, rows: int, columns: int) -> Tensor:
    """Whether an object in one cell stands in a relation to one in another, by GenEval's rule: (cells, cells) bool."""
    boxes = [
        (CELL * column, CELL * row, CELL * (column + 1), CELL * (row + 1))
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.tensor([[relation in geneval.relative_position(one, other) for other in boxes] for one in boxes])


def word_log_likelihood(letters: Tensor, text: str) -> Tensor:
    """log P(this word in one line, somewhere, and no other letter), ().

    letters: (letters, places down, places across), log-probabilities of which letter begins in a place, the first of
    none. The letters of a word are two places apart.
    """
    none = letters[0]
    across = none.shape[1] - 2 * (len(text) - 1)
    if across < 1:
        return none.sum() + IMPOSSIBLE
    gains = [letters[LETTERS.index(letter)] - none for letter in text]
    starts = sum(gain[:, 2 * place : 2 * place + across] for place, gain in enumerate(gains))
    return none.sum() + starts.flatten().logsumexp(0)  # type: ignore[union-attr]
