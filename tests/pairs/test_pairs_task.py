"""`lightning run pairs` from a toy pipeline to batches: what is written, killed at any point, reviewed, refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from variants import write_pipeline

from data_modules import PreferenceDataModule
from data_modules.manifest import read_manifest
from data_modules.part_writer import split_of
from data_modules.verification import verify_task
from zimage_lit import cli
from zimage_lit.components import Qwen3TextEncoder
from zimage_lit.errors import UserError
from zimage_lit.pairs import preference_set, task
from zimage_lit.pairs.task import pairs_task
from zimage_lit.pipeline import load_pipeline
from zimage_lit.rewards import RewardCallback
from zimage_lit.rewards.pictures import picture_hash

PROMPTS = [f"{number} {color} {shape}" for number in ("one", "two") for color in ("red", "blue") for shape in
           ("circles", "squares", "moons")]  # fmt: skip


class Fallible(RewardCallback):
    """The blue channel's mean; `calls` counts pictures, and at picture `stop_at` it is broken off."""

    calls, stop_at = 0, 0

    def score(self, images, prompts, metadata):
        Fallible.calls += len(images)
        if Fallible.stop_at and Fallible.calls >= Fallible.stop_at:
            raise KeyboardInterrupt
        blue = torch.stack([image[2].float().mean() / 255 for image in images])
        unknown = torch.tensor([bool(known.get("blind")) for known in metadata])
        return torch.where(unknown, torch.nan, blue)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of random weights, and prompts of which one cannot be judged."""
    root = tmp_path_factory.mktemp("pairs")
    write_pipeline(root, "pipeline", seed=0)
    lines = [{"prompt": text, "metadata": {"number": place}} for place, text in enumerate(PROMPTS)]
    lines.append({"prompt": "in the dark", "metadata": {"blind": True}})
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def asked(root: Path) -> dict[str, Any]:
    """Brightness decides, about one picture in two passes."""
    return {
        "model": str(root / "pipeline"),
        "prompts": str(root / "prompts.jsonl"),
        "rewards": {
            "bright": {"class_path": "zimage_lit.rewards.controls.Brightness"},
            "look": {"class_path": f"{__name__}.Fallible", "init_args": {"name": "look", "invalid_limit": 1.0}},
        },
        "objective": "brightness",
        "winner_at_least": 0.51,
        "margin": [0.05, 1.0],
        "margin_scale": 0.02,
        "matched": {"look": 0.02},
        "samples_per_prompt": 6,
        "pairs_per_prompt": 2,
        "val_share": 0.4,
        "part_size": 3,
        "batch_size": 5,
        "output": str(root / "made" / "pairs"),
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def made(asked: dict[str, Any]) -> Path:
    Fallible.calls = 0
    pairs_task(asked)
    return Path(asked["output"])


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pairs"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples_of(folder: Path, split: str) -> list[dict[str, Any]]:
    """Each sample of a split as a batch has it, whatever the order."""
    module = PreferenceDataModule(str(folder), batch_size=1, drop_last=False, shuffle=False)
    module.setup()
    loader = module.train_dataloader() if split == "train" else module.val_dataloader()
    return [{name: values[0] for name, values in batch.items()} for batch in loader]


def test_the_set_is_read_by_the_preference_data_module_and_is_sound(made: Path) -> None:
    assert verify_task({"data": str(made), "num_workers": 1}) == 0
    listed = {row["id"]: row for row in rows(made / "pairs.jsonl")}
    read = {split: samples_of(made, split) for split in ("train", "val")}
    assert read_manifest(made).splits == {split: len(samples) for split, samples in read.items()}
    for split, samples in read.items():
        for sample in samples:
            row, known = listed.pop(sample["ids"]), dict(sample["metadata"])
            pair = known.pop("pair")
            assert row["prompt"] == sample["captions"] and row["metadata"] == known and row["split"] == split
            assert pair == {name: row[name] for name in pair} and pair["judges"].keys() == {"brightness", "look"}
            for role in ("winner", "loser"):
                assert picture_hash(sample[f"{role}s"]) == row["pictures"][role]
                bright = (sample[f"{role}s"].float() / 127.5 - 1).mean() / 2 + 0.5
                assert pair["scores"][role]["brightness"] == pytest.approx(bright.item(), abs=1e-6)
            ahead = pair["scores"]["winner"]["brightness"] - pair["scores"]["loser"]["brightness"]
            assert pair["margin"] == pytest.approx(ahead / 0.02, abs=1e-5) and 0.05 <= pair["margin"] <= 1
    assert not listed


def test_no_prompt_is_in_both_splits(made: Path) -> None:
    splits: dict[str, set[str]] = {"train": set(), "val": set()}
    for row in rows(made / "pairs.jsonl"):
        splits[row["split"]].add(row["prompt"])
        assert row["split"] == split_of(row["prompt"], 0.4)
    assert splits["train"] and splits["val"] and not splits["train"] & splits["val"]


def test_every_picture_can_be_drawn_again_from_its_seed(made: Path, asked: dict[str, Any]) -> None:
    row = rows(made / "pairs.jsonl")[0]
    pipeline = load_pipeline(asked["model"], "cpu")
    (stored,) = (sample for sample in samples_of(made, row["split"]) if sample["ids"] == row["id"])
    for seed, role in zip(row["seeds"], ("winners", "losers"), strict=True):
        (picture,) = pipeline(row["prompt"], seed=seed)
        again = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert (again.int() - stored[role].int()).abs().max() <= 1  # drawn alone instead of in a batch


def test_the_summary_counts_what_became_of_every_picture(made: Path) -> None:
    samples, summary = rows(made / "samples.jsonl"), json.loads((made / "summary.json").read_text())
    pairs = rows(made / "pairs.jsonl")
    assert len(samples) == sum(summary["pictures"].values()) == 6 * 13
    assert summary["pictures"]["in a pair"] == 2 * len(pairs)
    assert summary["pictures"]["not judged by look"] == 6
    assert summary["pairs"] == {**read_manifest(made).splits, "dropped by review": 0}
    by_prompt = {text: [one for one in samples if one["prompt"] == text] for text in PROMPTS}
    for row in pairs:
        bright = [one["scores"]["brightness"] >= 0.51 for one in by_prompt[row["prompt"]]]
        assert row["difficulty"] == pytest.approx(1 - sum(bright) / 6, abs=1e-6)


def test_the_same_command_again_draws_nothing(made: Path, asked: dict[str, Any]) -> None:
    before, Fallible.calls = files(made), 0
    pairs_task(asked)
    assert files(made) == before and Fallible.calls == 0
    with pytest.raises(UserError, match=r"prepared with samples_per_prompt=6 \(now samples_per_prompt=7\)"):
        pairs_task({**asked, "samples_per_prompt": 7})


def broken_off_while_judging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fallible, "calls", 0)
    monkeypatch.setattr(Fallible, "stop_at", 30)  # in the second part


def broken_off_in_mid_part(monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, task, "write_atomically", 18)  # not the first part


def broken_off_in_mid_set(monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, preference_set, "encode_sample", 3)


def broken_off_before_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, preference_set, "write_manifest", 0)


def after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int) -> None:
    """Break off at a function's call after so many."""
    own, done = getattr(module, name), iter(range(calls))

    def counted(*arguments: Any, **named: Any) -> Any:
        if next(done, None) is None:
            raise KeyboardInterrupt
        return own(*arguments, **named)

    monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize(
    "break_off",
    [broken_off_while_judging, broken_off_in_mid_part, broken_off_in_mid_set, broken_off_before_the_manifest],
)
def test_a_run_that_was_broken_off_goes_on_to_the_same_files(
    break_off: Callable[..., None],
    made: Path,
    asked: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {**asked, "output": str(tmp_path / "pairs")}
    with monkeypatch.context() as patched:
        break_off(patched)
        with pytest.raises(KeyboardInterrupt):
            pairs_task(own)
    assert not (tmp_path / "pairs" / "manifest.json").exists()
    Fallible.calls = 0
    pairs_task(own)
    assert files(tmp_path / "pairs") == files(made)
    assert Fallible.calls < 6 * 13  # finished parts were not judged again


def test_a_run_goes_on_from_other_places_and_with_smaller_batches(
    made: Path, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        broken_off_while_judging(patched)
        with pytest.raises(KeyboardInterrupt):
            pairs_task({**asked, "output": str(tmp_path / "before")})
    (tmp_path / "before").rename(tmp_path / "pairs")
    shutil.copytree(asked["model"], tmp_path / "model")
    shutil.copy(asked["prompts"], tmp_path / "listed.jsonl")
    monkeypatch.chdir(tmp_path)
    places = {"model": "model", "prompts": "listed.jsonl", "output": "pairs"}
    with pytest.raises(UserError, match=r"unfinished preparation with pass_rate="):
        pairs_task({**asked, **places, "pass_rate": [0.2, 0.8]})
    Fallible.calls = 0
    pairs_task({**asked, **places, "batch_size": 2})
    assert 0 < Fallible.calls < 6 * 13  # finished parts were not judged again
    settings = read_manifest(tmp_path / "pairs").settings
    assert (settings["model"], settings["prompts"], settings["batch_size"]) == ("model", "listed.jsonl", 2)
    assert page_id(tmp_path / "pairs") == page_id(made)
    Fallible.calls = 0
    pairs_task({**asked, **places, "model": str(tmp_path / "model")})
    assert Fallible.calls == 0 and read_manifest(tmp_path / "pairs").settings == settings
    write_pipeline(tmp_path, "other", seed=1)
    with pytest.raises(UserError, match=r"prepared with weights="):
        pairs_task({**asked, **places, "model": "other"})


def test_where_all_pairs_are_for_validation_a_lower_share_needs_no_drawing(
    made: Path, asked: dict[str, Any], tmp_path: Path
) -> None:
    own = {**asked, "output": str(tmp_path / "pairs")}
    number = len(rows(made / "pairs.jsonl"))
    with pytest.raises(UserError, match=f"all {number} pairs in .* for validation: lower val_share"):
        pairs_task({**own, "val_share": 0.999999})
    Fallible.calls = 0
    pairs_task(own)
    assert Fallible.calls == 0 and files(tmp_path / "pairs") == files(made)


def test_a_finished_set_is_put_together_anew_for_another_share_and_page(
    asked: dict[str, Any], copy: Path, tmp_path: Path
) -> None:
    listed = rows(copy / "pairs.jsonl")
    gone = next(row["id"] for row in listed if row["split"] == "val")
    pairs_task({"output": str(copy), "review": review_of(copy, tmp_path / "review.json", dropped=[gone])})
    before, own, Fallible.calls = files(copy), {**asked, "output": str(copy)}, 0
    with pytest.raises(UserError, match="would be for validation: lower val_share"):
        pairs_task({**own, "val_share": 0.999999})
    assert files(copy).items() >= before.items()  # all that was there is as it was
    pairs_task({**own, "val_share": 0.0, "review_pairs": 1})
    assert read_manifest(copy).splits == {"train": len(listed) - 1} and not (copy / "val").exists()
    assert {row["id"]: row["review"] for row in rows(copy / "pairs.jsonl")}[gone] == "dropped"
    assert (copy / "review.html").read_text().count("<article") == 1
    pairs_task(own)
    assert files(copy) == before and Fallible.calls == 0


def test_a_set_without_its_parts_is_made_already_and_cannot_change(asked: dict[str, Any], copy: Path) -> None:
    shutil.rmtree(copy / ".pairs")
    before, own, Fallible.calls = files(copy), {**asked, "output": str(copy)}, 0
    pairs_task(own)
    with pytest.raises(
        UserError, match=r"put together with val_share=0.4 \(now val_share=0.1\) and its parts in .pairs"
    ):
        pairs_task({**own, "val_share": 0.1})
    assert files(copy) == before and Fallible.calls == 0


def page_id(folder: Path) -> str:
    """The set's id on its page."""
    (name,) = re.findall('data-set="([0-9a-f]+)"', (folder / "review.html").read_text())
    return str(name)


def review_of(folder: Path, path: Path, **verdicts: list[str]) -> str:
    """A review.json as the page saves it."""
    path.write_text(json.dumps({"set": page_id(folder), "kept": [], "dropped": [], **verdicts}))
    return str(path)


def test_a_review_drops_pairs_without_drawing_and_can_be_taken_back(copy: Path, tmp_path: Path) -> None:
    before, Fallible.calls = files(copy), 0
    listed = [row["id"] for row in rows(copy / "pairs.jsonl")]
    dropped, kept = [listed[0], listed[-1]], listed[1]
    review = review_of(copy, tmp_path / "review.json", dropped=dropped, kept=[kept])
    assert cli.main(["run", "pairs", f"output={copy}", f"review={review}"]) == 0
    read = [sample["ids"] for split in read_manifest(copy).splits for sample in samples_of(copy, split)]
    assert sorted(read) == sorted(listed[1:-1]) and Fallible.calls == 0
    verdicts = {row["id"]: row["review"] for row in rows(copy / "pairs.jsonl")}
    assert verdicts == {name: "dropped" if name in dropped else "kept" if name == kept else None for name in listed}
    assert verify_task({"data": str(copy), "num_workers": 1}) == 0
    assert json.loads((copy / "summary.json").read_text())["pairs"]["dropped by review"] == 2

    pairs_task({"output": str(copy), "review": review_of(copy, tmp_path / "review.json")})
    assert files(copy) == before


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        (preference_set, "write_lines", 0),  # the manifest is gone, and nothing is written
        (preference_set, "encode_sample", 1),
        (preference_set.Path, "unlink", 0),  # the manifest of before is still there
    ],
)
def test_a_review_that_was_broken_off_is_applied_by_the_command_that_made_the_set(
    module: Any,
    name: str,
    calls: int,
    asked: dict[str, Any],
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = [row["id"] for row in rows(copy / "pairs.jsonl")]
    review = review_of(copy, tmp_path / "review.json", dropped=[listed[0]], kept=[listed[1]])
    with monkeypatch.context() as patched:
        after(patched, module, name, calls)
        with pytest.raises(KeyboardInterrupt):
            pairs_task({"output": str(copy), "review": review})
    Fallible.calls = 0
    pairs_task({**asked, "output": str(copy)})
    assert Fallible.calls == 0
    read = [sample["ids"] for split in read_manifest(copy).splits for sample in samples_of(copy, split)]
    assert sorted(read) == sorted(listed[1:])
    verdicts = [row["review"] for row in rows(copy / "pairs.jsonl")]
    assert verdicts == ["dropped", "kept", *[None] * (len(listed) - 2)]


def test_reviews_that_do_not_fit_change_nothing(copy: Path, tmp_path: Path) -> None:
    before = files(copy)
    every = [row["id"] for row in rows(copy / "pairs.jsonl")]
    path = tmp_path / "review.json"
    other = {"set": "0123456789abcdef", "kept": [], "dropped": []}
    for content, message in (
        (other, "is the review of another set"),
        ({"dropped": ["0-1-2"]}, "dropped is no list of this set's pairs"),
        ({"kept": "all"}, "kept is no list of this set's pairs"),
        ({"dropped": every}, "without a pair to train on: keep some"),
    ):
        review_of(copy, path, **content)
        with pytest.raises(UserError, match=message):
            pairs_task({"output": str(copy), "review": str(path)})
        assert files(copy).items() >= before.items()
    with pytest.raises(UserError, match=r"settings\.json is missing: name the output"):
        pairs_task({"output": str(tmp_path), "review": str(path)})
    with pytest.raises(UserError, match="margin has no effect on it: give output=… and review=… alone"):
        pairs_task({"output": str(copy), "review": str(path), "margin": [0.1, 0.2]})


def test_where_no_pair_is_found_the_counts_are_told(asked: dict[str, Any], tmp_path: Path) -> None:
    own = {**asked, "num_prompts": 2, "winner_at_least": 2.0, "output": str(tmp_path / "pairs")}
    with pytest.raises(UserError, match=r"among 12 pictures \(12 of a prompt that too few pictures pass\): draw"):
        pairs_task(own)
    assert len(rows(tmp_path / "pairs" / "samples.jsonl")) == 12
    pairs_task({**own, "winner_at_least": 0.5, "pass_rate": [0, 1], "val_share": 0.0})  # the folder is free for it
    assert read_manifest(tmp_path / "pairs").splits["train"] > 0


WARM = {"class_path": "toy_rewards.Warmth"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt must be at least 2 to make a pair, not 1"),
        ({"part_size": 0}, "part_size must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"review_pairs": 0}, "review_pairs must be at least 1"),
        ({"val_share": 1.0}, "val_share must be from 0 to below 1"),
        ({"margin": [0.5, 0.2]}, "margin must be"),
        ({"rewards": {}}, "rewards names no judge"),
        ({"rewards": {"warm": {}}}, "rewards.warm names no class"),
        ({"rewards": {"warm": {"class_path": "toy_rewards.Wramth"}}}, "rewards.warm.class_path"),
        ({"rewards": {"warm": {"class_path": "toys.Decay"}}}, "rewards.warm must be a RewardCallback"),
        ({"rewards": {"warm": {**WARM, "init_args": {"weight": 2.0}}}}, "rewards.warm.init_args.weight has no effect"),
        ({"rewards": {"warm": {**WARM, "init_args": {"batch_size": 0}}}}, "batch_size must be at least 1"),
        ({"rewards": {"a": WARM, "b": WARM}}, "two rewards are called warmth"),
        ({"objective": "brightnes"}, "objective names the reward brightnes, .* .did you mean 'brightness'"),
        ({"agree": {"warmth": 0.5}}, "agree names the reward warmth, which is not among rewards"),
        (
            {"rewards": {"warm": {**WARM, "init_args": {"held_out": True}}}, "objective": "warmth", "matched": {}},
            "the reward warmth is held out and must not decide: take it out of objective",
        ),
        ({"model": "absent"}, "model: there is no absent; give a pipeline"),
        ({"height": 33}, "height=33 does not fit this model"),
        ({"tasks": ["word"]}, "tasks are those of prompts=tinyworld"),
        ({"smaples": 3}, "smaples"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_drawn(
    asked: dict[str, Any], changes: dict, message: str, tmp_path: Path
) -> None:
    Fallible.calls = 0
    with pytest.raises(UserError, match=message) as caught:
        pairs_task({**asked, "output": str(tmp_path / "pairs"), **changes})
    assert "\n" not in str(caught.value)
    assert Fallible.calls == 0 and not (tmp_path / "pairs").exists()


def test_too_long_texts_show_without_the_encoders_network(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Any, ids: list[list[int]]) -> None:
        raise AssertionError("the network ran")

    monkeypatch.setattr(Qwen3TextEncoder, "_run", run)
    listed = tmp_path / "prompts.jsonl"
    listed.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a boat", "far " * 600)))
    own = {**asked, "output": str(tmp_path / "pairs")}
    for changes, start in (
        ({"prompts": str(listed)}, "far far"),
        ({"negative_prompt": "dull " * 600, "guidance_scale": 2.0}, "dull dull"),
    ):
        with pytest.raises(UserError, match=f'The prompt "{start}.* tokens and the model takes at most 512'):
            pairs_task({**own, **changes})
        assert not (tmp_path / "pairs").exists()  # nothing was noted that a shorter one would differ from


def test_tinyworlds_judges_need_tinyworlds_prompts(asked: dict[str, Any], tmp_path: Path) -> None:
    judge = {"class_path": "zimage_lit.rewards.tinyworld.TinyWorldReward", "init_args": {"aspect": "word"}}
    own = {**asked, "rewards": {"word": judge}, "objective": "tinyworld_word", "matched": {}, "height": 64, "width": 64}
    with pytest.raises(UserError, match="needs TinyWorld's metadata"):
        pairs_task({**own, "output": str(tmp_path / "pairs")})
    own |= {"prompts": "tinyworld", "tasks": ["counting"], "output": str(tmp_path / "pairs")}
    with pytest.raises(UserError, match="tinyworld_word has nothing to say about any of the 21 prompts"):
        pairs_task(own)
    count = {**judge, "init_args": {"aspect": "count"}}
    own |= {"rewards": {"word": judge, "count": count}, "objective": "tinyworld_count", "agree": {"tinyworld_word": 1}}
    with pytest.raises(UserError, match="tinyworld_word has nothing to say about any of the 21 prompts"):
        pairs_task(own)
