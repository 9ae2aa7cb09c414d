"""The soak of `benchmarks/soak_data.py`, short: kills at random, workers at random, RunCheckpoint, token budgets."""

import random
from pathlib import Path

import pytest

from benchmarks.soak_data import Log, soak


def test_four_random_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)  # shown when the test fails
    result = soak(tmp_path, kills=4, epochs=2, samples=160, chance=random.Random(seed))
    assert result.kills == 4 and sum(result.starts.values()) == 5
    assert result.whole_epochs == 2 and result.replayed_alike and result.is_exact


@pytest.mark.parametrize(("again", "alike"), [(["a", "b"], True), (["b", "a"], False)])
def test_the_log_notices_a_step_that_is_done_again_otherwise(tmp_path: Path, again: list[str], alike: bool) -> None:
    path, log = tmp_path / "steps.jsonl", Log(tmp_path / "steps.jsonl")
    assert log.read() == 0
    path.write_text('[1, 0, ["a", "b"]]\n[2, 0, ["c"]]\n')
    assert log.read() == 2
    with path.open("a") as stream:
        stream.write(str([1, 0, again]).replace("'", '"') + "\n")
    assert log.read() == 1 and log.read() == 0
    assert log.done_again == 1 and log.replayed_alike == alike and log.steps[1] == (0, again)
