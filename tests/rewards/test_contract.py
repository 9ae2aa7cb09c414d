"""The contract that every reward is called by: what is shown to it, what is made of its answers and of its failures."""

import hashlib
import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn
from toy_rewards import (
    NotANumber,
    NoTensor,
    Raising,
    RankInGroup,
    Red,
    Redder,
    Root,
    Slow,
    Warmth,
    WrongShape,
)

from zimage_lit.errors import UserError
from zimage_lit.rewards import RewardCallback, RewardRecord, RewardSet, find_rewards, picture_hash


def pictures(*reds: int, size: tuple[int, int] = (4, 3)) -> list[Tensor]:
    """Plain pictures with these red values, no blue, some green."""
    return [torch.tensor([red, 7, 0], dtype=torch.uint8)[:, None, None].expand(3, *size).clone() for red in reds]


def named(*names: str) -> list[str]:
    return [f"a photo of {name}" for name in names]


def trainer_with(*callbacks: Callback, folder: Path | str = ".") -> Any:
    return SimpleNamespace(callbacks=list(callbacks), default_root_dir=str(folder), global_rank=0)


# ------------------------------------------------------------------------------------------------------- the contract


def test_rewards_are_found_among_the_callbacks_in_their_order() -> None:
    first, second = Warmth(weight=2.0), Red(held_out=True)
    assert find_rewards(trainer_with(Callback(), first, Callback(), second)) == [first, second]
    assert find_rewards(trainer_with(Callback())) == []
    assert (first.name, first.weight, first.held_out, second.held_out) == ("warmth", 2.0, False, True)


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"two rewards are called red.*init_args\.name"):
        find_rewards(trainer_with(Red(), Red()))
    assert len(find_rewards(trainer_with(Red(), Red(name="red-again")))) == 2


def test_a_reward_that_forgets_the_constructor_above_is_named() -> None:
    class Forgetful(RewardCallback):
        def __init__(self) -> None:
            pass

    with pytest.raises(UserError, match=r"Forgetful has no name: call super\(\).__init__"):
        RewardSet([Forgetful()])


def test_settings_come_from_the_class_unless_they_are_given() -> None:
    class Half(Red):
        weight = 0.5
        time_limit = 3.0

    assert (Half().weight, Half().time_limit, Half(weight=2.0).weight) == (0.5, 3.0, 2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": math.inf}, "weight must be a finite number, not inf"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"time_limit": 0.0}, "time_limit must be more than 0 seconds"),
        ({"invalid_limit": 1.5}, r"invalid_limit is a share and must lie in \[0, 1\], not 1.5"),
        ({"name": "two words"}, "name may hold letters"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Red(**settings)


def test_scores_are_those_of_the_formula_on_pictures_of_any_sizes() -> None:
    images = pictures(255) + pictures(51, size=(9, 2)) + pictures(0)
    scores = RewardSet([Warmth(), Red(held_out=True)]).score(images, named("a", "b", "c"))
    torch.testing.assert_close(scores["warmth"], torch.tensor([1.0, 0.2, 0.0]))
    torch.testing.assert_close(scores["red"], torch.tensor([255.0, 51.0, 0.0]))
    assert scores["warmth"].dtype == torch.float32


def test_only_the_rewards_that_are_named_are_asked(tmp_path: Path) -> None:
    red = Red()
    rewards = RewardSet([red, Warmth()], RewardRecord(tmp_path / "r.jsonl"))
    assert list(rewards.score(pictures(1), named("a"), names=["warmth"])) == ["warmth"] and not red.calls
    (line,) = (tmp_path / "r.jsonl").read_text().splitlines()
    assert list(json.loads(line)["scores"]) == ["warmth"]


def test_calls_hold_batch_size_pictures_and_none_is_lost() -> None:
    red = Red(batch_size=4)
    prompts = [str(place) for place in range(10)]
    scores = RewardSet([red]).score(pictures(*range(10)), prompts)
    assert scores["red"].tolist() == list(range(10))
    assert red.calls == [prompts[:4], prompts[4:8], prompts[8:]]


def test_networks_are_loaded_once_frozen_and_moved() -> None:
    class WithNetwork(RewardCallback):
        loads = 0

        def load(self) -> None:
            self.loads += 1
            self.network = nn.Linear(3, 1)

        def score(self, images: Any, prompts: Any, metadata: Any) -> Tensor:
            assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
            return self.network(torch.stack([image.float().mean((1, 2)) for image in images]))[:, 0]

    reward = WithNetwork()
    reward.setup(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu"))), None, "fit")  # type: ignore[arg-type]
    assert not reward.network.training and not any(p.requires_grad for p in reward.network.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = RewardSet([reward]).score(pictures(1, 2), named("a", "b"))
    means = torch.tensor([[1.0, 7.0, 0.0], [2.0, 7.0, 0.0]])
    torch.testing.assert_close(scores["with_network"], reward.network(means)[:, 0], rtol=0, atol=0)
    assert reward.loads == 1


@pytest.mark.parametrize("reward", [WrongShape(required=False), NoTensor(required=False)])
def test_a_result_of_another_form_is_refused_even_of_rewards_that_may_fail(reward: RewardCallback) -> None:
    with pytest.raises(UserError, match=rf"{reward.name} must return a tensor of shape \(2,\)"):
        RewardSet([reward]).score(pictures(1, 2), named("a", "b"))


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one prompt, metadata and group id for each picture"):
        RewardSet([Red()]).score(pictures(1, 2), named("a"))
    with pytest.raises(ValueError, match="one prompt"):
        RewardSet([Red()]).score(pictures(1, 2), named("a", "b"), group_ids=torch.zeros(3, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------- failures


def test_a_raising_reward_stops_the_run_with_its_name_its_error_and_its_line() -> None:
    with pytest.raises(UserError, match=r"raising failed \(RuntimeError: the scorer fell over, .*toy_rewards.py"):
        RewardSet([Raising()]).score(pictures(1), named("a"))


def test_a_raising_reward_that_is_not_required_has_no_judgement_and_is_counted() -> None:
    rewards = RewardSet([Raising(required=False), Red()])
    with pytest.warns(UserWarning, match="raising failed.*: 2 of its judgements are missing"):
        scores = rewards.score(pictures(1, 2), named("a", "b"))
    assert scores["raising"].isnan().all() and scores["red"].tolist() == [1, 2]
    logged = rewards.logged(scores)
    assert logged == {"reward/raising_invalid": 1.0, "reward/red": 1.5, "reward/red_std": 0.5, "reward/red_invalid": 0}


def test_only_the_calls_that_failed_are_without_judgement() -> None:
    class FailsOnB(Red):
        def score(self, images: Any, prompts: Any, metadata: Any) -> Tensor:
            if "b" in prompts:
                raise ValueError("no b")
            return super().score(images, prompts, metadata)

    with pytest.warns(UserWarning, match="no b"):
        scores = RewardSet([FailsOnB(batch_size=2, required=False)]).score(pictures(1, 2, 3, 4), ["a", "b", "c", "d"])
    assert scores["fails_on_b"].isnan().tolist() == [True, True, False, False]


def test_nan_is_masked_and_never_counts_as_zero() -> None:
    rewards = RewardSet([NotANumber()])
    scores = rewards.score(pictures(0, 10, 30), named("a", "a", "a"))
    assert scores["not_a_number"].isnan().tolist() == [True, False, False]
    assert rewards.logged(scores)["reward/not_a_number"] == 20  # not 13.3
    advantages = rewards.combined_advantages(scores, torch.zeros(3, dtype=torch.long))
    judged_alone = rewards.combined_advantages(
        {"not_a_number": torch.tensor([10.0, 30.0])}, torch.zeros(2, dtype=torch.long)
    )
    assert advantages[0] == 0 and torch.equal(advantages[1:], judged_alone)
    assert judged_alone[0] < 0 < judged_alone[1]


def test_an_infinite_score_is_no_judgement() -> None:
    class Infinite(RewardCallback):
        def score(self, images: Any, prompts: Any, metadata: Any) -> Tensor:
            return torch.tensor([1.0, math.inf, -math.inf])

    assert RewardSet([Infinite()]).score(pictures(1, 2, 3), named(*"abc"))["infinite"].isnan().tolist() == [0, 1, 1]


def test_too_many_pictures_without_judgement_stop_the_run() -> None:
    rewards = RewardSet([NotANumber(invalid_limit=0.25)])
    for _ in range(7):  # one in eight
        rewards.score(pictures(0, *[9] * 7), named(*"abcdefgh"))
    rewards.score(pictures(*[0] * 8), named(*"abcdefgh"))  # 15 of 64
    with pytest.raises(UserError, match="could not judge 23 of the last 72 pictures, more than"):
        rewards.score(pictures(*[0] * 8), named(*"abcdefgh"))


def test_a_handful_of_failures_at_the_start_does_not_stop_the_run() -> None:
    rewards = RewardSet([NotANumber(invalid_limit=0.5)])
    for _ in range(16):
        rewards.score(pictures(0), named("a"))
    with pytest.raises(UserError, match="17 of the last 17"):
        rewards.score(pictures(0), named("a"))


def test_failures_long_ago_are_forgotten() -> None:
    rewards = RewardSet([NotANumber()])
    rewards.score(pictures(*[0] * 16), named(*"a" * 16))
    for _ in range(20):
        scores = rewards.score(pictures(*[9] * 16), named(*"a" * 16))
    assert rewards.logged(scores)["reward/not_a_number_invalid"] == 0


def test_a_slow_reward_is_given_up_after_its_time_limit() -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"slow failed \(no answer within its time_limit of 0.1 s\)"):
        RewardSet([Slow(time_limit=0.1)]).score(pictures(1), named("a"), [{"seconds": 1}])
    assert time.monotonic() - started < 0.9


def test_a_slow_call_that_was_given_up_is_waited_for_and_its_answer_is_nobody_elses() -> None:
    slow = Slow(time_limit=0.3, required=False, batch_size=1)
    rewards = RewardSet([slow])
    with pytest.warns(UserWarning, match="no answer within"):
        scores = rewards.score(pictures(5, 6), named("a", "b"), [{"seconds": 0.5}, {}])
    assert scores["slow"].isnan().tolist() == [True, False] and scores["slow"][1] == 6
    assert slow.calls == [["a photo of a"], ["a photo of b"]]


def test_calls_of_one_reward_never_overlap() -> None:
    class Counting(Slow):
        running = most = 0

        def score(self, images: Any, prompts: Any, metadata: Any) -> Tensor:
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                return super().score(images, prompts, metadata)
            finally:
                self.running -= 1

    reward = Counting(time_limit=0.1, required=False, batch_size=1)
    with pytest.warns(UserWarning) as said:
        RewardSet([reward]).score(pictures(1, 2), named("a", "b"), [{"seconds": 0.4}, {}])
    while any(thread.name == "reward" for thread in threading.enumerate()):
        time.sleep(0.02)
    assert reward.most == 1
    assert ["earlier call has still not ended" in str(warning.message) for warning in said] == [False, True]


def test_a_timed_call_computes_as_any_other() -> None:
    class Precision(RewardCallback):
        def score(self, images: Any, prompts: Any, metadata: Any) -> Tensor:
            assert not torch.is_grad_enabled()
            return (torch.ones(len(images), 2) @ torch.full((2, 1), 1 / 3))[:, 0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        timed = RewardSet([Precision(time_limit=10)]).score(pictures(1), named("a"))
        plain = RewardSet([Precision()]).score(pictures(1), named("a"))
    assert torch.equal(timed["precision"], plain["precision"]) and timed["precision"].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- groups


def test_a_groupwise_reward_sees_whole_groups_however_they_lie_and_whatever_the_batch_size() -> None:
    reward = RankInGroup(batch_size=2)
    prompts = ["a", "b", "a", "b", "a", "a"]
    ids = torch.tensor([7, 3, 7, 3, 7, 7])
    scores = RewardSet([reward]).score(pictures(5, 1, 9, 2, 6, 4), prompts, group_ids=ids)
    assert reward.calls == [["a"] * 4, ["b"] * 2]
    assert scores["rank_in_group"].tolist() == [1, 0, 3, 1, 2, 0]


def test_two_groups_of_one_prompt_stay_apart() -> None:
    reward = RankInGroup()
    rewards = RewardSet([reward])
    images, ids = pictures(1, 2, 101, 102), torch.tensor([0, 0, 1, 1])
    scores = rewards.score(images, ["a"] * 4, group_ids=ids)
    assert reward.calls == [["a", "a"], ["a", "a"]] and scores["rank_in_group"].tolist() == [0, 1, 0, 1]
    # as if each lay on a rank of its own
    alone = [
        rewards.combined_advantages({"rank_in_group": scores["rank_in_group"][i : i + 2]}, ids[:2]) for i in (0, 2)
    ]
    assert torch.equal(rewards.combined_advantages(scores, ids), torch.cat(alone))


def test_a_groupwise_reward_without_groups_is_refused() -> None:
    with pytest.raises(UserError, match=r"rank_in_group is groupwise, .* knows no groups"):
        RewardSet([RankInGroup()]).score(pictures(1, 2), named("a", "a"))


@pytest.mark.parametrize("both_orders", [True, False])
def test_pairs_become_shares_of_wins(both_orders: bool) -> None:
    reward = Redder(both_orders=both_orders, batch_size=2)
    scores = RewardSet([reward]).score(pictures(3, 9, 1, 8, 2), ["a"] * 3 + ["b"] * 2, group_ids=[0, 0, 0, 1, 1])
    assert scores["redder"].tolist() == [0.5, 1, 0, 1, 0]


def test_a_judge_that_prefers_the_first_of_two_is_levelled_out_by_both_orders() -> None:
    class First(Redder):
        def compare(self, first: Any, second: Any, prompts: Any, metadata: Any) -> Tensor:
            return torch.ones(len(first))

    assert RewardSet([First()]).score(pictures(1, 2, 3), ["a"] * 3, group_ids=[0] * 3)["first"].tolist() == [0.5] * 3


def test_pairs_that_could_not_be_judged_are_left_out_of_the_share() -> None:
    class Unsure(Redder):
        def compare(self, first: Any, second: Any, prompts: Any, metadata: Any) -> Tensor:
            pairs = zip(first, second, strict=True)
            unsure = torch.tensor([int(one[0, 0, 0]) + int(other[0, 0, 0]) <= 3 for one, other in pairs])
            return torch.where(unsure, math.nan, super().compare(first, second, prompts, metadata))

    scores = RewardSet([Unsure()]).score(pictures(1, 2, 9), ["a"] * 3, group_ids=[0] * 3)["unsure"]
    assert scores.tolist() == [0, 0, 1]  # the pair of 1 and 2 counts for neither
    scores = RewardSet([Unsure()]).score(pictures(1, 2), ["a"] * 2, group_ids=[0] * 2)["unsure"]
    assert scores.isnan().all()


def test_a_picture_with_none_to_compare_with_is_not_one_that_could_not_be_judged() -> None:
    rewards = RewardSet([Redder(invalid_limit=0.0)])
    scores = rewards.score(pictures(3, 9, 1), ["a", "b", "b"], group_ids=[0, 1, 1])
    assert scores["redder"].isnan().tolist() == [True, False, False]
    assert rewards.logged(scores)["reward/redder_invalid"] == 0


# ------------------------------------------------------------------------------------------------------- advantages


def test_each_reward_is_normalised_in_its_group_before_the_weights() -> None:
    rewards = RewardSet([Red(weight=1.0), Warmth(weight=3.0)])
    ids = torch.tensor([0, 0, 1, 1])
    red, warmth = torch.tensor([0.0, 2.0, 1000.0, 3000.0]), torch.tensor([0.2, 0.1, 0.1, 0.2])
    total = rewards.combined_advantages({"red": red, "warmth": warmth}, ids)
    # of two values the standardised ones are -1 and 1, whatever their scale
    torch.testing.assert_close(total, torch.tensor([2.0, -2.0, -4.0, 4.0]), rtol=0, atol=0.01)


def test_a_group_without_variance_teaches_nothing() -> None:
    rewards = RewardSet([Red()])
    total = rewards.combined_advantages({"red": torch.tensor([4.0, 4.0, 1.0, 2.0])}, torch.tensor([0, 0, 1, 1]))
    assert total[:2].tolist() == [0, 0] and total[2] < 0 < total[3]


def test_a_held_out_reward_is_scored_and_logged_and_never_weighs() -> None:
    rewards = RewardSet([Red(), Warmth(held_out=True, weight=100.0)])
    images, ids = pictures(1, 2), torch.zeros(2, dtype=torch.long)
    scores = rewards.score(images, named("a", "a"))
    assert "reward/warmth" in rewards.logged(scores)
    alone = RewardSet([Red()]).combined_advantages({"red": scores["red"]}, ids)
    assert torch.equal(rewards.combined_advantages(scores, ids), alone)


def test_without_a_reward_that_weighs_there_are_no_advantages() -> None:
    with pytest.raises(UserError, match=r"no reward .* is not held out \(there are: red\)"):
        RewardSet([Red(held_out=True)]).combined_advantages({"red": torch.ones(2)}, torch.zeros(2, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------- gradients


def test_the_differentiable_sum_has_the_gradients_of_its_parts() -> None:
    images = [torch.full((3, 2, 2), value, requires_grad=True) for value in (0.25, 0.64)]
    total = RewardSet([Root(weight=2.0), Root(name="again", weight=-0.5), Red()]).differentiable(
        images, named("a", "b")
    )
    torch.testing.assert_close(total.detach(), 1.5 * torch.tensor([0.5, 0.8]))
    total.sum().backward()
    for image, root in zip(images, (0.5, 0.8), strict=True):
        assert image.grad is not None
        torch.testing.assert_close(image.grad, torch.full((3, 2, 2), 1.5 / (2 * root) / 12))


def test_a_picture_that_cannot_be_judged_gets_no_gradient_not_even_nan() -> None:
    images = [torch.full((3, 2, 2), value, requires_grad=True) for value in (-0.25, 0.64)]
    rewards = RewardSet([Root()])
    scores = rewards.differentiable_scores(images, named("a", "b"))
    assert scores["root"].isnan().tolist() == [True, False]
    rewards.weighted_sum(scores).sum().backward()
    assert images[0].grad is not None and images[0].grad.abs().sum() == 0
    assert images[1].grad is not None and (images[1].grad > 0).all()


def test_held_out_rewards_are_not_differentiated() -> None:
    with pytest.raises(UserError, match="is differentiable and not held out"):
        RewardSet([Root(held_out=True), Red()]).differentiable([torch.zeros(3, 2, 2)], named("a"))


def test_a_reward_that_sees_groups_is_not_differentiated_over_the_whole_batch() -> None:
    class RootInGroup(Root):
        kind = "groupwise"

    with pytest.raises(UserError, match="root_in_group is differentiable and groupwise, but no groups"):
        RewardSet([RootInGroup()]).differentiable([torch.ones(3, 2, 2)] * 2, named("a", "b"))


def test_a_differentiable_reward_scores_finished_pictures_too() -> None:
    white = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    assert RewardSet([Root()]).score([white], named("a"))["root"].tolist() == [1.0]


# ------------------------------------------------------------------------------------------------------- prompts


def test_a_reward_that_does_not_apply_is_not_asked_and_not_counted() -> None:
    class OnlyA(NotANumber):
        def applies_to(self, prompt: str, metadata: Any) -> bool:
            return prompt == "a"

    reward = OnlyA(invalid_limit=0.0)
    rewards = RewardSet([reward])
    scores = rewards.score(pictures(1, 0, 3), ["a", "b", "a"])
    assert reward.calls == [["a", "a"]] and scores["only_a"].isnan().tolist() == [False, True, False]
    assert rewards.logged(scores)["reward/only_a_invalid"] == 0


# ------------------------------------------------------------------------------------------------------- the record


def test_the_record_says_what_scored_what(tmp_path: Path) -> None:
    rewards = RewardSet.of_run(trainer_with(NotANumber(), Warmth(held_out=True), folder=tmp_path))
    images = pictures(0, 10, size=(5, 8))
    scores = rewards.score(images, ["ein Kreis", "圆形"], group_ids=torch.tensor([4, 9]), step=12)
    lines = [json.loads(line) for line in (tmp_path / "rewards/rank-0.jsonl").read_text("utf-8").splitlines()]
    raw = b"8x5\n" + bytes([10, 7, 0]) * 40
    assert lines[1]["image"] == hashlib.sha256(raw).hexdigest() == picture_hash(images[1])
    assert [line["prompt"] for line in lines] == ["ein Kreis", "圆形"]
    assert [(line["step"], line["group"], line["size"]) for line in lines] == [(12, 4, [8, 5]), (12, 9, [8, 5])]
    assert lines[0]["scores"]["not_a_number"]["score"] is None
    assert lines[1]["scores"]["warmth"]["score"] == scores["warmth"][1].item()
    assert lines[1]["scores"]["warmth"]["version"].startswith("toy_rewards.Warmth-")
    second = SimpleNamespace(callbacks=[Warmth()], default_root_dir=str(tmp_path), global_rank=1)
    RewardSet.of_run(second).score(pictures(1), ["圆形"])  # another rank, the same prompt: a file of its own
    assert len((tmp_path / "rewards/rank-1.jsonl").read_text("utf-8").splitlines()) == 1


def test_the_record_leaves_out_rewards_that_do_not_apply(tmp_path: Path) -> None:
    class OnlyA(Red):
        def applies_to(self, prompt: str, metadata: Any) -> bool:
            return prompt == "a"

    RewardSet([OnlyA(), Warmth()], RewardRecord(tmp_path / "r.jsonl")).score(pictures(1, 2), ["a", "b"])
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [sorted(line["scores"]) for line in lines] == [["only_a", "warmth"], ["warmth"]]


def test_gradients_are_recorded_by_the_picture_they_were_taken_at(tmp_path: Path) -> None:
    rewards = RewardSet([Root()], RewardRecord(tmp_path / "r.jsonl"))
    rewards.differentiable([torch.full((3, 2, 2), 1.2, requires_grad=True)], ["a"], step=3)
    (line,) = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert line["image"] == picture_hash(torch.full((3, 2, 2), 255, dtype=torch.uint8)) and line["step"] == 3


def test_a_run_that_goes_on_writes_each_step_once(tmp_path: Path) -> None:
    record = RewardRecord(tmp_path / "r.jsonl")
    rewards = RewardSet([Red()], record)
    record.forget_after(0)  # nothing there yet
    for step in (1, 2, 3):
        rewards.score(pictures(step), ["a"], step=step)
    whole = record.path.read_text()
    record.path.write_text(whole + '{"step": 4, "ima')  # killed in mid-write
    rewards.forget_after(1)
    for step in (2, 3):
        rewards.score(pictures(step), ["a"], step=step)
    assert record.path.read_text() == whole


def test_a_record_is_cut_by_its_own_line_ends_wherever_it_was_torn(tmp_path: Path) -> None:
    record = RewardRecord(tmp_path / "r.jsonl")
    rewards = RewardSet([Red()], record)
    rewards.score(pictures(1), ["two\u2028lines\x85of one prompt"], step=1)
    whole = record.path.read_bytes()
    record.path.write_bytes(whole + '{"prompt": "圆'.encode()[:-1])  # killed within a character
    rewards.forget_after(1)
    assert record.path.read_bytes() == whole


def test_another_code_or_setting_of_the_class_is_another_version() -> None:
    class Power(RewardCallback):
        def __init__(self, power: float, **settings: Any) -> None:
            super().__init__(**settings)
            self.power = power
            self.calls = 0

    class Other(Power):
        """Another source."""

    one, same, two = Power(1.0), Power(1.0, weight=3.0, name="same"), Power(2.0)
    same.calls = 5  # what a reward remembers is no setting
    assert one.version == same.version and len({one.version, two.version, Other(1.0).version}) == 3
