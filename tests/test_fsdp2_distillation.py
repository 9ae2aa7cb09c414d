"""Distillation on two processes of a CPU, each role sharded, against one process that sees the same batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distillation import LAYOUTS, Seen, fit, same, stage, write_teacher
from ranks import Ranks
from torch.distributed.tensor import DTensor

from zimage_lit.run_folder import last_checkpoint
from zimage_lit.stages.initial_weights import open_weights, read_checkpoint
from zimage_lit.strategies import FSDP2Strategy


@pytest.fixture(scope="module")
def pair():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "transformer")


def fit_sharded(teacher: Path, layout: str, folder: Path, steps: int, resume: Path | None, settings: Any) -> Seen:
    module = stage(teacher, layout, **settings)
    seen = fit(module, folder, steps, resume, FSDP2Strategy(), devices=2)
    networks = module.roles.networks.values()
    assert all(isinstance(parameter, DTensor) for network in networks for parameter in network.parameters())
    return seen


def train(ranks: Ranks, teacher: Path, layout: str, folder: Path, steps: int, resume=None, **settings) -> list[Seen]:
    return ranks(fit_sharded, teacher, layout, folder, steps, resume, settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_distil_as_one_process_does_and_go_on_exactly_in_mid_cycle(pair, teacher, tmp_path, layout):
    alone = fit(stage(teacher, layout), tmp_path / "alone", 8)
    both = train(pair, teacher, layout, tmp_path / "both", 8)
    losses = [sum(pair_of) / 2 for pair_of in zip(*(seen.losses for seen in both), strict=True)]
    assert losses == pytest.approx(alone.losses, rel=1e-4)
    assert both[0].step_indices == both[1].step_indices == alone.step_indices
    assert both[0].forwards == both[1].forwards  # else ranks would wait for one another
    assert len(set(alone.step_indices)) > 1
    assert same(both[0].states[-1], both[1].states[-1])
    for name, value in alone.states[-1].items():
        if name.startswith(("weights.", "average.")):
            torch.testing.assert_close(both[0].states[-1][name], value, rtol=0, atol=1e-4)

    train(pair, teacher, layout, tmp_path / "torn", 4)
    last = last_checkpoint(tmp_path / "torn")
    assert read_checkpoint(last)["role_steps"] == {"student": 1, "fake_score": 4}
    resumed = train(pair, teacher, layout, tmp_path / "torn", 8, resume=last)
    assert [seen.losses for seen in resumed] == [seen.losses[4:] for seen in both]
    assert same(resumed[0].states[-1], both[0].states[-1])
    average = open_weights(last_checkpoint(tmp_path / "torn"))
    assert all(torch.equal(weight, both[0].states[-1][f"average.{name}"]) for name, weight in average.items())
