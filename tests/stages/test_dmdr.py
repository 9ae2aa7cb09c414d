"""Distillation: who learns when, from what, and that an interrupted run goes on exactly."""

import math
from pathlib import Path

import pytest
import torch
from distillation import LAYOUTS, SIZES, Encoder, Stage, batch_of, fit, same, stage, write_teacher

from zimage_lit.callbacks.guards import StepGuard
from zimage_lit.config import compose
from zimage_lit.errors import UserError
from zimage_lit.lora import LoRASettings
from zimage_lit.objectives.timesteps import RenoiseLaw
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.stages.dmdr import DynamicGuidanceSettings, ObjectiveSettings, RolloutSettings
from zimage_lit.stages.initial_weights import backbone_config, build_backbone, open_weights, read_checkpoint
from zimage_lit.stages.optimizers import OptimizerSettings
from zimage_lit.validate import check_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "transformer")


# ---------------------------------------------------------------------------------------------------- whose turn it is


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_turn_has_gradients_of_its_role_alone_and_changes_nobody_else(teacher, tmp_path, layout):
    module = stage(teacher, layout)
    seen = fit(module, tmp_path, 7)
    fake, student = "fake_score", "student"
    assert [turn.role for turn in seen.turns] == [fake, fake, student, fake, fake, fake, student, fake, fake]
    for turn in seen.turns:
        assert turn.with_gradients == turn.changed == {turn.role}
    assert module.steps == {"student": 2, "fake_score": 7} and seen.states[-1]["iteration"] == 7
    assert seen.states[-1]["updates"] == 2  # the average follows the student
    assert all(parameter.grad is None for parameter in module.parameters())
    fresh = build_backbone(backbone_config(dict(SIZES)), str(teacher), 0).state_dict()
    assert same(dict(module.roles.frozen()), dict(fresh))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_holds_what_is_learnt_and_no_teacher(teacher, tmp_path, layout):
    module = stage(teacher, layout)
    fit(module, tmp_path, 3)
    state = read_checkpoint(last_checkpoint(tmp_path))["state_dict"]
    whole = len(build_backbone(backbone_config(dict(SIZES)), None, 0).state_dict())
    adapters = 2 * 2 * 7  # down and up, two blocks, seven matrices each
    expected = {"copies": (whole, whole), "fake_lora": (whole, adapters), "adapters": (adapters, adapters)}[layout]
    prefixes = ("backbone.", "fake_score.")
    assert tuple(sum(name.startswith(prefix) for name in state) for prefix in prefixes) == expected
    assert len(state) == sum(expected)
    average = open_weights(last_checkpoint(tmp_path))
    assert {f"backbone.{name}" for name in average} == {name for name in state if name.startswith("backbone.")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_killed_between_two_steps_of_the_student_goes_on_bit_for_bit(teacher, tmp_path, layout):
    straight = fit(stage(teacher, layout), tmp_path / "straight", 8)
    first = fit(stage(teacher, layout), tmp_path / "torn", 4)
    assert first.states[-1]["steps"] == {"student": 1, "fake_score": 4}  # in mid-cycle
    second = fit(stage(teacher, layout), tmp_path / "torn", 8, resume=last_checkpoint(tmp_path / "torn"))
    assert same(first.states[-1], second.states[0])
    assert first.losses + second.losses == straight.losses
    assert same(second.states[-1], straight.states[-1])
    assert straight.states[-1]["steps"] == {"student": 2, "fake_score": 8}
    assert 0 < straight.states[-1]["student.lr"] < 2e-3
