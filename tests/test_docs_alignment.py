"""docs/alignment.md as its reader would follow it: the laptop's commands are run, made small, the others checked."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from distillation import SHARED, SMALL_TEACHER
from docs_pages import DOCS, Walk, blocks_of, started_by, tasks_of

from zimage_lit import cli
from zimage_lit.callbacks.preference_guard import PreferenceGuard
from zimage_lit.config import find_experiment, list_experiments
from zimage_lit.pairs import task
from zimage_lit.pairs.preference_set import set_id
from zimage_lit.rewards.tinyworld import TinyWorldReward

PAGE = "alignment.md"
NO_SCORES = ["trainer.callbacks.score=null", "trainer.callbacks.fidelity=null"]
CURVES = "trainer.logger={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: outputs/curves}}"
NETWORK, *_, PROMPTS = SHARED
SMALL = {
    "quickstart": SMALL_TEACHER,
    "tiny/grpo": [
        *SHARED, *NO_SCORES, CURVES, "trainer.max_steps=1", "trainer.log_every_n_steps=1",
        "model.init_args.minibatches=2", "model.init_args.rollout.group_size=3",
    ],
    "pairs": ["num_prompts=8", "samples_per_prompt=4", "num_inference_steps=1", "val_share=0.5", "device=cpu"],
    "tiny/dpo": [
        NETWORK, PROMPTS, *NO_SCORES, CURVES, "trainer.max_steps=2", "trainer.log_every_n_steps=1",
        "trainer.val_check_interval=1", "data.init_args.batch_size=1", "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false", "trainer.callbacks.winners.init_args.window=1",
    ],
}  # fmt: skip


class EverySecond(TinyWorldReward):
    """Calls every second picture of a call right: an untrained model draws nothing that TinyWorld's rules would."""

    def score(self, images: Sequence[torch.Tensor], prompts: Sequence[str], metadata: Sequence[dict]) -> torch.Tensor:
        return torch.arange(len(images)).float() % 2


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The page followed from its first block to its last; the reviewer drops the first pair."""
    walk = Walk(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("docs-alignment"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        build = task.build_rewards
        patch.setattr(task, "build_rewards", lambda asked: [EverySecond(name=one.name) for one in build(asked)])
        for language, content in blocks_of(PAGE):
            if "review=review.json" in content:
                first = json.loads(Path("data/pairs/pairs.jsonl").read_text().splitlines()[0])
                of = set_id(json.loads(Path("data/pairs/.pairs/settings.json").read_text()))
                Path("review.json").write_text(json.dumps({"set": of, "kept": [], "dropped": [first["id"]]}))
                walk.small = {**walk.small, "pairs": []}
            walk.follow(language, content)
        yield walk


def test_every_command_is_followed_and_those_of_the_laptop_are_run(walk: Walk) -> None:
    assert walk.count() == started_by(PAGE) and tasks_of(PAGE) <= {*cli.TASKS, *list_experiments()}
    assert [command.split()[2] for command in walk.ran] == [
        "quickstart", "tiny/grpo", "tiny/grpo", "pairs", "pairs", "tiny/dpo",
    ]  # fmt: skip


def test_the_table_names_experiments_and_tasks_that_there_are() -> None:
    named = re.findall(r"`lightning run (\S+?)`", (DOCS / PAGE).read_text(encoding="utf-8"))
    assert len(named) >= 5 and set(named) <= {*list_experiments(), *cli.TASKS}


def test_the_curves_of_the_page_are_logged(walk: Walk) -> None:
    named = set(re.findall(r"`((?:train|val|reward)/\w+)`", (DOCS / PAGE).read_text(encoding="utf-8")))
    logged = [next(csv.reader(curves.open(encoding="utf-8"))) for curves in Path("outputs/curves").rglob("metrics.csv")]
    assert len(named) >= 7 and named <= {name for header in logged for name in header}


def test_a_dropped_pair_is_gone_and_the_settings_of_the_page_exist(walk: Walk) -> None:
    pairs = [json.loads(line) for line in Path("data/pairs/pairs.jsonl").read_text().splitlines()]
    summary = json.loads(Path("data/pairs/summary.json").read_text())
    assert len(pairs) >= 3 and Path("data/pairs/review.html").is_file() and summary["pairs"]["dropped by review"] == 1
    text = (DOCS / PAGE).read_text(encoding="utf-8")
    fields = set(task.PairsSettings.__dataclass_fields__)
    assert {"samples_per_prompt", "winner_at_least", "margin", "matched", "agree", "pass_rate"} <= fields
    tables = find_experiment("tiny/dpo").read_text(encoding="utf-8") + find_experiment("tiny/grpo").read_text()
    for key in ("beta", "anchor", "timesteps", "curriculum", "refresh_every_n_steps", "clip_range", "minibatches"):
        assert f"{key}:" in tables and f"{key}" in text
    assert PreferenceGuard.__name__ in text
