"""Preference training on two processes of a CPU, sharded, against one process that sees the same pairs."""

from pathlib import Path
from typing import Any

import pytest
from distillation import same, write_teacher
from pairs_of_pictures import Data, Seen, Stage, fit, pairs_of, settings_of
from torch.distributed.tensor import DTensor

from zimage_lit.callbacks.preference_guard import PreferenceGuard
from zimage_lit.lora import LoRASettings
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.stages.dpo import CurriculumSettings
from zimage_lit.stages.optimizers import OptimizerSettings
from zimage_lit.strategies import FSDP2Strategy

# The odd pairs, of .8 and .9, come in at the fourth step; each rank has one of either kind.
COURSE = CurriculumSettings(4, (0.0, 0.5), (0.0, 1.0), (0.2, 0.6), (0.0, 1.0))


SLOWLY = OptimizerSettings(lr=2e-4)


def check_together(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights are the same but for the few whose gradient is rounding noise, of which Adam makes a step like any other:
    in the mean of a matrix they differ by less than a hundredth of a step."""
    for name, value in expected.items():
        if name.startswith(("weights.", "average.")):
            apart = float((found[name] - value).abs().mean())
            assert apart < 0.01 * SLOWLY.lr, (name, apart)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("start") / "transformer")


def fit_sharded(start: Path, folder: Path, steps: int, resume: Path | None, settings: Any) -> tuple[Seen, list[float]]:
    module, guard = Stage(**settings_of(start, **settings)), PreferenceGuard()
    seen = fit(module, folder, steps, resume, callbacks=[guard], save_every=4, strategy=FSDP2Strategy(), devices=2)
    networks = (module.backbone, module.snapshots["reference"].network)
    assert all(isinstance(parameter, DTensor) for network in networks for parameter in network.parameters())
    return seen, list(guard.errors)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"curriculum": COURSE, "optimizer": SLOWLY}, id="whole"),
        pytest.param(
            {"lora": LoRASettings(rank=4), "refresh_every_n_steps": 3, "optimizer": SLOWLY}, id="lora, refreshed"
        ),
    ],
)
def test_two_ranks_learn_as_one_process_does_and_go_on_exactly(pair, start, tmp_path, settings):
    alone = fit(Stage(**settings_of(start, **settings)), tmp_path / "alone", 6)
    both = pair(fit_sharded, start, tmp_path / "both", 6, None, settings)
    (first, told), (second, also_told) = both
    losses = [sum(of_step) / 2 for of_step in zip(first.losses, second.losses, strict=True)]
    norms = [seen.logged[0]["train/gradient_norm"] for seen in (first, second, alone)]
    assert norms[0] == norms[1] == pytest.approx(norms[2], rel=1e-5)
    assert losses == pytest.approx(alone.losses, rel=1e-3)
    assert [sorted(a + b) for a, b in zip(first.pairs, second.pairs, strict=True)] == alone.pairs
    assert told == also_told and len(told) == 6
    assert same(first.states[-1], second.states[-1])
    check_together(first.states[-1], alone.states[-1])

    torn = last_checkpoint(tmp_path / "both").with_name("step-00000004.ckpt")
    resumed = pair(fit_sharded, start, tmp_path / "torn", 6, torn, settings)
    assert [seen.losses for seen, _ in resumed] == [seen.losses[4:] for seen, _ in both]
    assert same(resumed[0][0].states[-1], first.states[-1])


def unequal(ids: range) -> dict[str, Any]:
    """Of each four pairs the last one lies outside of the band."""
    batch = pairs_of(ids)
    for number, entry in zip(ids, batch["metadata"], strict=True):
        entry["pair"] = {"difficulty": 0.3, "margin": 0.9 if number % 4 == 3 else 0.4}
    return batch


def fit_unequally(start: Path, folder: Path, devices: int) -> Seen:
    module = Stage(**settings_of(start, curriculum=COURSE, optimizer=SLOWLY))
    strategy = FSDP2Strategy() if devices > 1 else "auto"
    return fit(module, folder, 2, data=Data(unequal), strategy=strategy, devices=devices)


def test_ranks_that_admit_unequal_numbers_of_pairs_weigh_each_pair_alike(pair, start, tmp_path):
    alone = fit_unequally(start, tmp_path / "alone", 1)
    both = pair(fit_unequally, start, tmp_path / "both", 2)
    assert alone.pairs == [[0, 1, 2], [4, 5, 6]]
    assert [seen.pairs for seen in both] == [[[0, 1], [4, 5]], [[2], [6]]]
    losses = [sum(of_step) / 2 for of_step in zip(*(seen.losses for seen in both), strict=True)]
    assert losses == pytest.approx(alone.losses, rel=1e-4)
    check_together(both[0].states[-1], alone.states[-1])
