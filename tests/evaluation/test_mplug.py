"""mPLUG against modelscope 1.32.0's code on the same small model, its beam search against an exhaustive one."""

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from small_mplug import write_folder

from evaluation.judges.mplug import CHECKPOINT, END, START, MPlug, beam_search
from zimage_lit.errors import UserError

QUESTIONS = ([101, 5, 6, 7, 102], [101, 9, 8, 102], [101, *range(20, 43), 102])
# What modelscope's MPlugForVisualQuestionAnswering answers with the weights of `published_weights`: question i % 3
# about picture i, for i from 0 to 8, without START; by how much likelier END is made in its bias.
ANSWERS = {
    4: [
        [10, 10, 79, 94, 94, 94, 94, 94, 94, 94],
        [57, 57, 57, 57, 57, 57, 57, 57, 57, 57],
        [67, 67, 99, 67, 67, 67, 67, 67, 67, 67],
        [35, 36, 81, 35, 35, 35, 52, 57, 57, 57],
        [81, 81, 81, 42, 81, 42, 81, 42, 42, 42],
        [51, 34, 34, 51, 51, 51, 51, 51, 51, 51],
        [23, 23, 23, 23, 23, 23, 23, 35, 23, 35],
        [36, 102],
        [57, 57, 42, 57, 57, 57, 57, 57, 57, 57],
    ],
    8: [
        [10, 102],
        [57, 57, 57, 102],
        [67, 102],
        [35, 36, 102],
        [81, 102],
        [51, 34, 34, 51, 51, 51, 51, 51, 51, 51],
        [91, 102],
        [36, 102],
        [57, 102],
    ],
}


def picture(seed: int) -> torch.Tensor:
    return torch.randn(3, 42, 42, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("end_bias", ANSWERS)
def test_answers_equal_those_of_the_published_code(tmp_path: Path, end_bias: int) -> None:
    model = MPlug.from_pretrained(write_folder(tmp_path, end_bias))
    answers = [model.answer(picture(i), torch.tensor(QUESTIONS[i % 3])) for i in range(len(ANSWERS[end_bias]))]
    assert answers == [[START, *answer] for answer in ANSWERS[end_bias]]


def test_with_beams_enough_the_search_finds_the_best_of_all_answers() -> None:
    """Of three words, one of them the end, at most three long: the twin scores every answer by the formula."""
    rng = random.Random(0)
    words = [5, 9, END]
    for _ in range(20):
        chances = {
            before: [math.log(chance / sum(row)) for chance in row]
            for before in itertools.chain.from_iterable(itertools.product(words, repeat=n) for n in range(3))
            if (row := [rng.random() for _ in words])
        }

        def next_word(answers: torch.Tensor, chances=chances) -> torch.Tensor:
            """More beams than answers: those that stand for none have no chance."""
            found = torch.full((len(answers), END + 1), -math.inf)
            for row, answer in enumerate(answers.tolist()):
                assert answer[0] == START
                found[row, words] = torch.tensor(chances.get(tuple(answer[1:]), [-math.inf] * 3))
            return found

        assert beam_search(next_word, 27, 0, 3) == [START, *best_answer(words, chances)]


def best_answer(words, chances):
    """The search by its definition: all continuations each step, until the best of them ends."""
    finished = []
    for length in range(1, 4):
        penalty = ((5 + length) / 6) ** 0.6
        scored = [
            (sum(chances[answer[:n]][words.index(answer[n])] for n in range(length)) / penalty, answer)
            for answer in itertools.product(words, repeat=length)
        ]
        scored.sort(reverse=True)
        over = scored[0][1][-1] == END or length == 3
        finished += [found for found in scored if over or found[1][-1] == END]
        if over:
            return max(finished)[1]
    raise AssertionError


def test_an_answer_is_not_shorter_than_it_may_be() -> None:
    always_ends = torch.log(torch.tensor([0.1] * END + [0.9]))
    assert beam_search(lambda answers: always_ends.repeat(len(answers), 1), 2, 0, 4) == [START, END]
    assert len(beam_search(lambda answers: always_ends.repeat(len(answers), 1), 2, 2, 4)) == 4


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mplug")
    saved = torch.load(folder / CHECKPOINT)
    del saved["module"]["model.visn_fc.weight"]
    saved["module"]["model.visn_fc.bias"] = torch.zeros(3)
    torch.save(saved, folder / CHECKPOINT)
    with pytest.raises(UserError, match=r"lacks \['visn_fc.weight'\] and has \['visn_fc.bias'\] in another shape"):
        MPlug.from_pretrained(folder)
    torch.save({"model": tmp_path}, folder / CHECKPOINT)  # an object that is no tensor
    with pytest.raises(UserError, match="cannot be read as a file of weights"):
        MPlug.from_pretrained(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"holds no mPLUG .*download damo/mplug"):
        MPlug.from_pretrained(folder)
