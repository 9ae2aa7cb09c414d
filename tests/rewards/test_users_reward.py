"""A user's own reward, in a file of theirs, in a run through the command line."""

import json
from pathlib import Path

import pytest
import torch
from lightning import Callback

from zimage_lit import cli
from zimage_lit.errors import UserError
from zimage_lit.validate import check_value

TOY = """
trainer:
  max_steps: 6
  accelerator: cpu
  devices: 1
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: "${run.output_dir}"}}
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    checkpoint:
      class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: "${run.output_dir}/checkpoints", save_last: true, every_n_train_steps: 2}
    red: {class_path: toy_rewards.Red, init_args: {held_out: true}}
model:
  class_path: toy_rewards.RewardedModule
  init_args: {encoder: {class_path: toys.ToyEncoder, init_args: {folder: x}}}
data: {class_path: toys.ToyDataModule}
"""
OWN = """
import torch
from zimage_lit.rewards import RewardCallback

class Gray(RewardCallback):
    def score(self, images, prompts, metadata):
        return torch.stack([image.float().mean() for image in images]) / 255
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an experiment and a reward of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "toy.yaml").write_text(TOY)
    (tmp_path / "my_rewards.py").write_text(OWN)
    return tmp_path


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rewards/rank-0.jsonl").read_text().splitlines()]


def test_a_reward_of_ten_lines_is_named_on_the_command_line_and_judges_every_picture(project: Path) -> None:
    assert len(OWN.strip().splitlines()) <= 10
    assert cli.main(["run", "toy.yaml", "trainer.callbacks+=my_rewards.Gray"]) == 0
    found = lines(project / "outputs/toy")
    assert [line["step"] for line in found] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    grays = [line["scores"]["gray"]["score"] for line in found]
    torch.testing.assert_close(torch.tensor(grays), torch.tensor([0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55]) / 255)
    assert all(line["scores"]["gray"]["version"].startswith("my_rewards.Gray-") for line in found)
    logged = next((project / "outputs/toy").rglob("metrics.csv")).read_text().splitlines()
    assert {"reward/gray", "reward/gray_std", "reward/gray_invalid", "reward/red"} <= set(logged[0].split(","))


def test_a_run_that_goes_on_records_every_picture_once(project: Path) -> None:
    words = ["run", "toy.yaml", "trainer.callbacks+=my_rewards.Gray"]
    assert cli.main([*words, "run.name=whole"]) == 0
    fail = ["trainer.callbacks.fail.class_path=toys.FailAt", "trainer.callbacks.fail.init_args.step=5"]
    broken = [*words, "run.name=broken", *fail, "trainer.callbacks.fail.init_args.friendly=true"]
    assert cli.main(broken) == 1
    assert lines(project / "outputs/broken")[-1]["step"] == 5  # after the last checkpoint, which is of step 4
    assert cli.main([*words, "run.name=broken", "run.resume=outputs/broken/checkpoints/last.ckpt"]) == 0
    assert lines(project / "outputs/broken") == lines(project / "outputs/whole")


def test_a_setting_that_the_reward_does_not_have_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trainer.callbacks+=my_rewards.Gray", "trainer.callbacks.gray.init_args.wieght=2"]
    assert cli.main(["run", "toy.yaml", *words]) == 2
    assert "trainer.callbacks.gray.init_args.wieght is not a setting of Gray (did you mean 'weight'?)" in (
        capsys.readouterr().err
    )


def test_a_reward_that_raises_ends_the_run_in_one_sentence(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "toy.yaml", "trainer.callbacks+=toy_rewards.Raising"]) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert error.startswith("error: the reward raising failed (RuntimeError: the scorer fell over, ")
    assert "give it required: false" in error


def test_two_rewards_of_one_name_are_refused_before_the_training(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["trainer.callbacks.other.class_path=toy_rewards.Red"]
    assert cli.main(["run", "toy.yaml", *words]) == 1
    assert "two rewards are called red" in capsys.readouterr().err


def test_a_judge_by_its_address_that_is_away_is_done_without_where_the_settings_say_so(project: Path) -> None:
    judge = "trainer.callbacks.judge.init_args"
    words = [
        "trainer.callbacks.judge.class_path=zimage_lit.rewards.vision_language.YesNoReward",
        f"{judge}.endpoint={{url: 'http://127.0.0.1:9/v1', model: m, wait: 0}}",
        f"{judge}.required=false",
        f"{judge}.held_out=true",
        f"{judge}.invalid_limit=1.0",
    ]
    with pytest.warns(UserWarning, match=r"yes_no failed \(http://127.0.0.1:9/v1/chat/completions does not answer"):
        assert cli.main(["run", "toy.yaml", "trainer.callbacks+=my_rewards.Gray", *words]) == 0
    scores = [line["scores"] for line in lines(project / "outputs/toy")]
    assert {given["yes_no"]["score"] for given in scores} == {None}
    assert None not in {given["gray"]["score"] for given in scores}


BUILT_IN = {
    "clip.AestheticReward": {"folder": "f", "head": "h.pth"},
    "clip.CLIPReward": {"folder": "f", "differentiable": True},
    "clip.HPSReward": {"folder": "f"},
    "clip.PickScoreReward": {"folder": "f", "processor": "p"},
    "controls.Brightness": {},
    "controls.JPEGSize": {"quality": 90},
    "remote.RemoteReward": {"url": "http://localhost:8000", "kind": "groupwise"},
    "text.OCRReward": {"options": {"Rec.model_path": "r.onnx"}},
    "tinyworld.TinyWorldReward": {"aspect": "count", "graded": True},
    "tinyworld_likelihood.TinyWorldLikelihood": {"folder": "f"},
    "vision_language.InstructionReward": {"endpoint": {"url": "http://localhost/v1", "model": "m"}},
    "vision_language.RatingReward": {"endpoint": {"url": "http://localhost/v1", "model": "m"}, "high": 10},
    "vision_language.YesNoReward": {"endpoint": {"url": "http://localhost/v1", "model": "m"}},
}


@pytest.mark.parametrize("path", BUILT_IN)
def test_every_built_in_reward_can_be_named_in_an_experiment(path: str) -> None:
    settings = {**BUILT_IN[path], "weight": 0.5, "time_limit": 30.0, "required": False, "held_out": True}
    component = {"class_path": f"zimage_lit.rewards.{path}", "init_args": settings}
    check_value("trainer.callbacks.reward", component, Callback)
    with pytest.raises(UserError, match=r"trainer.callbacks.reward.init_args.wieght .*did you mean 'weight'"):
        check_value("trainer.callbacks.reward", {**component, "init_args": {**settings, "wieght": 1}}, Callback)
