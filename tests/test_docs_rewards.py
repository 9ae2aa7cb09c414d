"""docs/rewards.md as its reader would follow it: the page's own rewards are written, followed by a run, and served."""

import csv
import importlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distillation import SHARED, SMALL_STUDENT, SMALL_TEACHER
from docs_pages import DOCS, Walk, blocks_of, check_settings, free_port, lightning_run, run_words, started_by
from lightning import Callback
from torch import Tensor

from zimage_lit.rewards import RewardCallback, RewardSet
from zimage_lit.rewards.remote import RemoteReward
from zimage_lit.rewards.server import RewardServer, build_server
from zimage_lit.validate import check_value, import_class

PAGE = "rewards.md"
TEXT = (DOCS / PAGE).read_text(encoding="utf-8")
PORT = "8000"  # of the page's servers
WRITTEN = ("my_rewards", "my_network", "my_kinds", "my_server")  # the page's files
CURVES = "trainer.logger={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: '${run.output_dir}'}}"
QUICK = [
    CURVES,
    "trainer.max_steps=1",
    "trainer.log_every_n_steps=1",
    *(f"trainer.callbacks.{name}=null" for name in ("score", "fidelity", "samples", "export", "report")),
]
SMALL = [*SMALL_STUDENT, *QUICK]
SMALL_GRPO = [*SHARED, *QUICK, "model.init_args.minibatches=2", "model.init_args.rollout.group_size=3"]


class RewardsWalk(Walk):
    """Starts the page's server in this process, on a free port."""

    server: RewardServer | None = None

    def run(self, command: str) -> None:
        served = re.match(r"python -m zimage_lit.rewards.server (.*) &\n", command)
        if served:
            words = served[1].split()
            words[words.index("--port") + 1] = "0"
            self.server = build_server(words)
            threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        elif self.server is not None and f"http://127.0.0.1:{PORT}" in command:
            super().run(command.replace(f":{PORT}", f":{self.server.server_port}"))
        else:
            super().run(command)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardsWalk]:
    """The page followed from its first block to its last, in a folder with the student that it takes for given."""
    walk = RewardsWalk({"tiny/dmdr": SMALL, "tiny/grpo": SMALL_GRPO})
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("docs-rewards")
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        forget_written()
        for words in (["quickstart", *SMALL_TEACHER], ["tiny/dmdr", *SMALL]):
            code, printed = lightning_run(words)
            assert code == 0, printed
        for language, content in blocks_of(PAGE):
            walk.follow(language, content)
        yield walk
        forget_written()
    assert walk.server is not None
    walk.server.shutdown()
    walk.server.server_close()


def forget_written() -> None:
    """Other tests have files of these names."""
    for name in WRITTEN:
        sys.modules.pop(name, None)


def pictures(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (3, 6, 8), dtype=torch.uint8, generator=generator) for _ in range(number)]


def warmths(images: list[Tensor]) -> list[float]:
    return [float(image[0].double().mean() - image[2].double().mean()) / 255 for image in images]


def records(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"outputs/{run}/rewards/rank-0.jsonl").read_text().splitlines()]


def test_every_command_is_followed(walk: RewardsWalk) -> None:
    assert walk.count() == started_by(PAGE) == 4
    assert [run_words(command)[0] for command in walk.ran] == ["tiny/grpo", "tiny/dmdr", "tiny/dmdr"]
    assert {tuple(line["scores"]) for line in records("warm-grpo")} == {
        ("tinyworld_all", "tinyworld_elements", "warmth")
    }


def test_a_file_of_ten_lines_is_a_reward_that_a_run_follows(walk: RewardsWalk) -> None:
    assert len(Path("my_rewards.py").read_text().strip().splitlines()) <= 10
    found = records("warm")
    groups = [line["group"] for line in found]
    assert groups == sorted(groups) and all(groups.count(group) == 4 for group in groups)
    scores = [line["scores"]["warmth"]["score"] for line in found]
    assert all(-1 < score < 1 for score in scores) and len(set(scores)) > 4
    settings = yaml.safe_load(Path("outputs/warm/config.yaml").read_text())
    assert settings["trainer"]["callbacks"]["warmth"]["init_args"]["weight"] == 0.5


def test_records_and_curves_are_those_of_the_page(walk: RewardsWalk) -> None:
    (shown,) = (json.loads(content) for language, content in blocks_of(PAGE) if language == "json")
    line = records("warm")[0]
    assert line.keys() == shown.keys() and line["scores"]["warmth"].keys() == shown["scores"]["warmth"].keys()
    assert line["step"] == shown["step"] and line["size"] == shown["size"]
    (curves,) = Path("outputs/warm").rglob("metrics.csv")
    named = {name.replace("<name>", "warmth") for name in re.findall(r"^\| `(reward/\S+)`", TEXT, re.MULTILINE)}
    assert len(named) == 3 and named <= set(next(csv.reader(curves.open(encoding="utf-8"))))


def test_a_served_reward_gives_what_it_gives_here(walk: RewardsWalk) -> None:
    assert walk.server is not None
    assert {tuple(line["scores"]) for line in records("far")} == {("remote",)}
    there = RemoteReward(f"http://127.0.0.1:{walk.server.server_port}", wait=5)
    images = pictures(4)
    torch.testing.assert_close(RewardSet([there]).score(images, ["a"] * 4)["remote"], torch.tensor(warmths(images)))


def test_a_server_of_the_standard_library_is_enough(walk: RewardsWalk) -> None:
    port = free_port()
    code = Path("my_server.py").read_text().replace(f", {PORT})", f", {port})")
    server = subprocess.Popen([sys.executable, "-S", "-c", code], stderr=subprocess.DEVNULL)
    try:
        plain = [torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)]
        scores = RewardSet([RemoteReward(f"http://127.0.0.1:{port}", wait=30)]).score(plain, ["a", "b"])["remote"]
        assert scores[0] > scores[1] > 0.05  # bytes of a PNG file, over 1000
    finally:
        server.terminate()
        server.wait()


def test_experiments_of_the_page_compose(walk: RewardsWalk) -> None:
    assert sorted(path.stem for path in Path("experiments").iterdir()) == ["judged", "warmer"]
    assert [command.split()[2] for command in walk.checked] == ["warmer"]
    check_settings(["judged"])


def test_each_kind_gets_what_the_page_says(walk: RewardsWalk) -> None:
    kinds, images = importlib.import_module("my_kinds"), pictures(4)
    groups = torch.tensor([0, 0, 1, 1])
    rewards = RewardSet([kinds.Different(), kinds.Redder(), kinds.Light()])
    scores = rewards.score(images, ["a", "a", "b", "b"], group_ids=groups)
    apart = (images[2].double() - images[3].double()).abs().mean() / 510  # each is half as far from their mean
    torch.testing.assert_close(scores["different"][2:], apart.float().expand(2))
    reds = [float(image[0].double().mean()) for image in images]
    assert scores["redder"].tolist() == [reds[0] > reds[1], reds[1] > reds[0], reds[2] > reds[3], reds[3] > reds[2]]
    shown = torch.zeros(3, 4, 4, requires_grad=True)
    rewards.differentiable([shown], ["a"]).sum().backward()
    torch.testing.assert_close(shown.grad, torch.full((3, 4, 4), 1 / 48))


def test_a_reward_with_a_network_loads_it_and_passes_over_other_prompts(walk: RewardsWalk) -> None:
    layer = torch.nn.Linear(3, 1)
    torch.save(layer.state_dict(), "probe.pt")
    image = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    config = {"class_path": "my_network.Probe", "init_args": {"weights": "probe.pt", "batch_size": 8}}
    check_value("trainer.callbacks.probe", config, Callback)  # as in an experiment: its argument has no type
    probe = importlib.import_module("my_network").Probe("probe.pt")
    scores = RewardSet([probe]).score([image, image], ["a circle", "a square"])["probe"]
    torch.testing.assert_close(scores[0], (layer.weight.sum() + layer.bias[0]).detach())
    assert scores[1].isnan() and not probe.network.weight.requires_grad


def test_the_tables_name_settings_and_classes_that_there_are() -> None:
    settings = TEXT.partition("## Settings that every reward has")[2].partition("## ")[0]
    named = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", settings, re.MULTILINE))
    for name, default in {"weight": "1.0", "held_out": "false", "batch_size": "64", "required": "true"}.items():
        assert named[name] == default == str(getattr(RewardCallback, name)).lower()
    values: dict[str, Any] = {"name": "mine", "time_limit": 3.0, "invalid_limit": 0.5, "device": "cpu"}
    init_args = values | {"weight": 1.0, "held_out": True, "batch_size": 4, "required": False}
    brightness = {"class_path": "zimage_lit.rewards.controls.Brightness", "init_args": init_args}
    check_value("trainer.callbacks.mine", brightness, Callback)
    assert set(re.findall(r"^\| `(\w+)` \|", settings, re.MULTILINE)) == set(init_args)
    paths = re.findall(r"^\| `(\w+\.\w+)` \|", TEXT, re.MULTILINE)
    assert len(paths) == len(set(paths)) == 13
    assert all(issubclass(import_class("class_path", f"zimage_lit.rewards.{path}"), RewardCallback) for path in paths)
