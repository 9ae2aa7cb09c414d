"""Plans of epochs: what must hold for any data and settings, and that they are what a plain loop would make."""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_modules.buckets import SizeMapping, image_tokens
from data_modules.planning import (
    EpochPlan,
    PlanSettings,
    SampleTable,
    next_source,
    packed_tokens,
    padding_share,
    plan_epoch,
    read_table,
    weights_of,
)
from zimage_lit.errors import UserError

BUDGET = 2000


def table(num_samples: int, seed: int = 0, chunk_size: int = 20, buckets: int = 6, **columns: Any) -> SampleTable:
    """Pictures of a few sizes, 64 to 1024 tokens, and captions of 8 to 300."""
    dice = np.random.default_rng(seed)
    bucket = dice.integers(0, buckets, num_samples).astype(np.int32)
    image = np.linspace(64, 1024, buckets).astype(np.int32)[bucket]
    captions = dice.integers(8, 301, num_samples)
    chunk = (np.arange(num_samples) // chunk_size).astype(np.int32)
    return SampleTable(
        num_samples, **{"tokens": packed_tokens(image, captions), "bucket": bucket, "chunk": chunk, **columns}
    )


def plain_table(num_samples: int) -> SampleTable:
    return SampleTable(num_samples, chunk=(np.arange(num_samples) // 20).astype(np.int32))


def batches(plan: EpochPlan) -> list[list[list[int]]]:
    """Step, rank -> sample indices."""
    return [[plan.batch(step, rank).tolist() for rank in range(plan.world_size)] for step in range(len(plan))]


def names(plan: EpochPlan) -> list[int]:
    return [index for step in batches(plan) for batch in step for index in batch]


SITUATIONS = [
    (num_samples, world_size, batching, window, shuffle)
    for num_samples in (24, 331, 1000)
    for world_size in (1, 2, 7)
    for batching in ({"batch_size": 3}, {"batch_size": None, "token_budget": BUDGET})
    for window in (None, 1, 4)
    for shuffle in (True, False)
]


# Every sample once, every rank served, no batch too large


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_epochs_are_complete_and_steps_are_fair(known: bool, drop_last: bool) -> None:
    for num_samples, world_size, batching, window, shuffle in SITUATIONS:
        if not known and batching["batch_size"] is None:
            continue
        samples = table(num_samples) if known else plain_table(num_samples)
        settings = PlanSettings(
            **batching, world_size=world_size, window=window, shuffle=shuffle, drop_last=drop_last, seed=2
        )
        plan = plan_epoch(samples, settings, epoch=1)
        found = Counter(names(plan))
        only_ones = {len(batch) for step in batches(plan) for batch in step} == {1}
        assert set(found.values()) == {1} or (only_ones and not drop_last and num_samples % world_size)
        left_out = num_samples % settings.share if drop_last else 0
        assert len(found) == num_samples - left_out and set(found) <= set(range(num_samples))
        for step in batches(plan):
            assert len(step) == world_size and all(step)
            check_step(step, samples, settings)


def check_step(step: list[list[int]], samples: SampleTable, settings: PlanSettings) -> None:
    counts = [len(batch) for batch in step]
    assert max(counts) - min(counts) <= 1
    if settings.batch_size is not None:
        assert max(counts) <= settings.batch_size
        assert not settings.drop_last or min(counts) == settings.batch_size
    if samples.tokens is None:
        return
    tokens = [samples.tokens[batch] for batch in step]
    if settings.token_budget is not None:
        assert max(len(batch) * batch.max() for batch in tokens) <= settings.token_budget
    totals = [int(batch.sum()) for batch in tokens]
    assert max(totals) - min(totals) <= max(batch.max() for batch in tokens)


def test_most_steps_have_one_bucket_and_the_others_are_of_neighbours_in_length() -> None:
    samples = table(4000, buckets=12)
    assert samples.bucket is not None and samples.tokens is not None
    for batching in ({"batch_size": 4}, {"batch_size": None, "token_budget": BUDGET}):
        plan = plan_epoch(samples, PlanSettings(**batching, world_size=2), 0)
        pure = [len({int(samples.bucket[i]) for batch in step for i in batch}) == 1 for step in batches(plan)]
        assert sum(not one for one in pure) <= 12
        spread = [np.ptp([samples.tokens[i] for batch in step for i in batch]) for step in batches(plan)]
        assert np.median(spread) <= 64  # two pads


def test_ranks_do_the_same_where_all_samples_of_a_step_are_alike() -> None:
    samples = table(700, tokens=np.full(700, 96, dtype=np.int32))
    sizes = [[len(batch) for batch in step] for step in batches(plan_epoch(samples, PlanSettings(None, BUDGET, 3), 0))]
    assert sorted(sizes) == [[13, 13, 13]] + [[20, 20, 20]] * 11  # one sample is left out


def test_a_last_step_too_small_for_the_ranks_borrows_from_another() -> None:
    """One sample is left over for seven ranks."""
    for samples in (plain_table(22), table(22, buckets=1)):
        plan = plan_epoch(samples, PlanSettings(3, world_size=7, drop_last=False), 0)
        sizes = [sorted(len(batch) for batch in step) for step in batches(plan)]
        assert sorted(sizes) == [[1] * 7, [2] * 6 + [3]]
        assert sorted(names(plan)) == list(range(22))


def test_where_nothing_can_be_borrowed_a_few_samples_come_twice() -> None:
    for samples in (plain_table(9), table(9)):
        plan = plan_epoch(samples, PlanSettings(1, world_size=4, drop_last=False), 0)
        found = Counter(names(plan))
        assert len(plan) == 3 and set(found) == set(range(9)) and sum(found.values()) == 12
        assert max(found.values()) == 2


# The same plan as a plain loop makes


def twin_steps(samples: SampleTable, settings: PlanSettings, members: Sequence[int]) -> list[list[int]]:
    """The steps of one window, all ranks together, cut one after the other."""
    tokens, bucket = samples.tokens, samples.bucket
    assert tokens is not None and bucket is not None

    def cut(sequence: list[int]) -> list[list[int]]:
        steps = []
        while sequence:
            size = (settings.batch_size or BUDGET // int(tokens[sequence[0]])) * settings.world_size
            steps.append(sequence[:size])
            sequence = sequence[size:]
        return steps

    done, left = [], []
    for _, group in itertools.groupby(
        sorted(members, key=lambda i: (bucket[i], -tokens[i])), key=lambda i: int(bucket[i])
    ):
        for step in cut(list(group)):
            size = (settings.batch_size or BUDGET // int(tokens[step[0]])) * settings.world_size
            if len(step) == size:
                done.append(step)
            else:
                left += step
    return done + cut(sorted(left, key=lambda i: (-tokens[i], bucket[i])))


@pytest.mark.parametrize("batching", [{"batch_size": 3}, {"batch_size": None, "token_budget": BUDGET}])
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("window", [None, 5])
def test_steps_are_those_of_a_plain_loop(batching: dict[str, Any], world_size: int, window: int | None) -> None:
    """Stored order; windows of 100 samples, of which the next one takes what the ranks cannot share."""
    samples = table(600, seed=3)
    settings = PlanSettings(**batching, world_size=world_size, window=window, shuffle=False)
    plan = plan_epoch(samples, settings, 0)
    ends = [end - end % settings.share for end in ([600] if window is None else range(100, 601, 100))]
    expected: list[list[int]] = []
    for start, end in itertools.pairwise([0, *ends]):
        expected += sorted(twin_steps(samples, settings, range(start, end)), key=min)
    dealt = [[[] for _ in range(world_size)] for _ in expected]
    for number, step in enumerate(expected):
        for place, index in enumerate(step):
            row, column = divmod(place, world_size)
            dealt[number][column if row % 2 == 0 else world_size - 1 - column].append(index)
    assert batches(plan) == dealt


def test_without_token_counts_batches_are_slices_of_a_permutation() -> None:
    plan = plan_epoch(plain_table(23), PlanSettings(3, world_size=2, seed=5), epoch=4)
    flat = names(plan)
    assert batches(plan) == [[flat[s : s + 3], flat[s + 3 : s + 6]] for s in range(0, 18, 6)]
    assert sorted(flat) != flat and len(set(flat)) == 18
    stored = plan_epoch(plain_table(23), PlanSettings(3, shuffle=False, drop_last=False), epoch=4)
    assert batches(stored) == [[list(range(s, min(s + 3, 23)))] for s in range(0, 23, 3)]


# A pure function of seed and epoch


@pytest.mark.parametrize("samples", [table(500), plain_table(500)])
@pytest.mark.parametrize("window", [None, 3])
def test_a_plan_is_a_function_of_seed_and_epoch(samples: SampleTable, window: int | None) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return names(plan_epoch(samples, PlanSettings(4, window=window, seed=seed), epoch))

    assert order(0, 0) == order(0, 0)
    others = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(a != b for a, b in itertools.combinations(others, 2))


def test_batches_are_shuffled_and_not_sorted_by_length() -> None:
    samples = table(3000)
    assert samples.tokens is not None
    plan = plan_epoch(samples, PlanSettings(None, BUDGET), 0)
    means = np.array([samples.tokens[step[0]].mean() for step in batches(plan)])
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 4 / len(means) ** 0.5


@pytest.mark.parametrize("samples", [table(2000), plain_table(2000)])
@pytest.mark.parametrize("batching", [{"batch_size": 3}, {"batch_size": None, "token_budget": BUDGET}])
def test_a_window_needs_few_chunks_at_a_time_and_mixes_them(samples: SampleTable, batching: dict[str, Any]) -> None:
    """100 chunks of 20 samples in windows of 5; a window may share a chunk with the one before and the one after."""
    if samples.tokens is None and batching["batch_size"] is None:
        return
    assert samples.chunk is not None
    plan = plan_epoch(samples, PlanSettings(**batching, window=5, world_size=2), 0)
    chunks = samples.chunk[plan.order]
    first_use, last_use = {}, {}
    for place, chunk in enumerate(chunks.tolist()):
        first_use.setdefault(chunk, place)
        last_use[chunk] = place
    open_at_once = [sum(first_use[c] <= place <= last_use[c] for c in first_use) for place in range(0, len(chunks), 10)]
    assert max(open_at_once) <= 6
    assert np.mean([len(set(chunks[place : place + 20].tolist())) for place in range(0, 2000, 20)]) > 3
    firsts = sorted(first_use, key=lambda c: first_use[c])
    assert np.abs(np.diff(firsts)).mean() > 10  # the windows themselves are of shuffled chunks


def test_the_rest_of_a_plan_is_what_its_batches_hold() -> None:
    plan = plan_epoch(table(300), PlanSettings(None, BUDGET, world_size=3), 0)
    for step, rank in ((0, 0), (0, 2), (5, 1), (len(plan) - 1, 1), (len(plan), 0)):
        expected = [index for number in range(step, len(plan)) for index in plan.batch(number, rank)]
        assert plan.remaining(step, rank).tolist() == expected


# What is refused


def test_a_sample_above_the_budget_is_named() -> None:
    samples = table(50)
    assert samples.tokens is not None
    samples.tokens[17] = 2016
    with pytest.raises(
        UserError, match=r"Sample number 17 has 2016 tokens, more than data.init_args.token_budget=2000"
    ):
        plan_epoch(samples, PlanSettings(None, 2000), 0)
    assert len(names(plan_epoch(samples, PlanSettings(None, 2016), 0))) == 50


def test_a_budget_without_token_counts_is_refused() -> None:
    with pytest.raises(UserError, match=r"token_budget needs the sizes of the pictures and the data have no planning"):
        plan_epoch(plain_table(50), PlanSettings(None, 2000), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": None}, "Set one of data.init_args.batch_size and data.init_args.token_budget"),
        ({"batch_size": 4, "token_budget": 100}, "Set one of"),
        ({"batch_size": 0}, r"batch_size is 0: set it to 1 or more"),
        ({"batch_size": None, "token_budget": -1}, r"token_budget is -1"),
        ({"batch_size": 1, "window": 0}, r"window is 0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PlanSettings(**settings)


def test_too_few_samples_for_a_step_are_refused() -> None:
    with pytest.raises(UserError, match="Epoch 0 has 5 samples, fewer than the 6 of one step on 2 devices"):
        plan_epoch(plain_table(5), PlanSettings(3, world_size=2), 0)
    with pytest.raises(UserError, match="Epoch 0 has 5 samples, fewer than the 6"):
        plan_epoch(table(5), PlanSettings(None, BUDGET, world_size=6, drop_last=False), 0)


# Concept weights


def test_samples_come_as_often_as_their_weights_say_over_any_epochs() -> None:
    weight = np.random.default_rng(0).choice([0, 0.25, 0.7, 1, 2.5], 400)
    samples = table(400, weight=weight)
    counts = np.zeros((30, 400))
    for epoch in range(30):
        plan = plan_epoch(samples, PlanSettings(2, drop_last=False), epoch)
        np.add.at(counts[epoch], names(plan), 1)
    for start, end in ((0, 1), (3, 7), (0, 30), (11, 30)):
        assert (np.abs(counts[start:end].sum(axis=0) - (end - start) * weight) < 1).all()
    assert abs(counts[0].sum() - weight.sum()) < 4 * 400**0.5 / 2  # the phases spread the load over the epochs
    assert np.array_equal(counts[:, weight == 1], np.ones((30, (weight == 1).sum())))


def test_weights_are_looked_up_by_concept() -> None:
    concept = np.array([0, 2, -1, 1, 2], dtype=np.int32)
    assert weights_of(concept, ["cat", "dog", "owl"], {"owl": 3.0, "cat": 0.5}).tolist() == [0.5, 3, 1, 1, 3]
    with pytest.raises(UserError, match=r"concept_weights.cow names a concept .*: they have cat\."):
        weights_of(concept, ["cat"], {"cow": 1.0})
    with pytest.raises(UserError, match=r"concept_weights.cat is -1: a weight is a number from 0 up\."):
        weights_of(concept, ["cat"], {"cat": -1})


# Pads


def test_padding_is_counted_as_a_loop_counts_it() -> None:
    dice = np.random.default_rng(1)
    image, captions = dice.integers(50, 900, 200), dice.integers(8, 300, 200)
    samples = table(200, tokens=packed_tokens(image, captions))
    plan = plan_epoch(samples, PlanSettings(3, world_size=2, drop_last=False), 0)
    real = packed = padded = 0
    for batch in (batch for step in batches(plan) for batch in step):
        each = [-(-int(image[i]) // 32) * 32 + -(-int(captions[i]) // 32) * 32 for i in batch]
        real += sum(int(image[i]) + int(captions[i]) for i in batch)
        packed += sum(each)
        padded += max(each) * len(batch)
    share = padding_share(plan, image, captions)
    assert share.packed == pytest.approx(1 - real / packed)
    assert share.to_longest == pytest.approx(1 - real / padded)
    assert share.beyond_multiple == pytest.approx(1 - packed / padded)
    assert padding_share(plan, image, captions, pad_multiple=1).packed == 0


@pytest.mark.parametrize("resolution", [1024, None])
@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("window", [None, 16])
def test_photographs_with_captions_have_at_most_three_percent_of_pads(
    tmp_path: Path, resolution: int | None, world_size: int, window: int | None
) -> None:
    """Usual aspect ratios, both ways up, log-normal areas; pads to a multiple and to the longest of a batch."""
    dice = np.random.default_rng(0)
    count = 40_000
    aspect = dice.choice([3 / 2, 4 / 3, 16 / 9, 1, 5 / 4], count) * np.exp(dice.normal(0, 0.03, count))
    aspect = np.where(dice.random(count) < 0.4, 1 / aspect, aspect)
    area = np.exp(dice.normal(np.log(1500**2), 0.8, count)).clip(256**2, 6000**2)
    width, height = np.sqrt(area * aspect).astype(np.uint16), np.sqrt(area / aspect).astype(np.uint16)
    captions = dice.integers(8, 301, count).astype(np.uint16)
    save_columns(tmp_path, width, height, captions)
    samples = read_table(tmp_path, [500] * 80, sizes := SizeMapping(resolution=resolution))
    plan = plan_epoch(samples, PlanSettings(None, 32768, world_size, window=window), 0)
    tokens = image_tokens(*sizes(width, height))
    assert padding_share(plan, tokens, captions).to_longest <= 0.03
    unplanned = plan_epoch(SampleTable(count), PlanSettings(8, None, world_size), 0)
    assert padding_share(unplanned, tokens, captions).to_longest > 0.08


# The table of a prepared folder


def save_columns(folder: Path, width: Any, height: Any, captions: Any, concept: Any = None) -> None:
    concept = np.full(len(width), -1) if concept is None else concept
    np.savez(
        folder / "planning.npz", width=np.asarray(width, dtype=np.uint16), height=np.asarray(height, dtype=np.uint16),
        caption_tokens=np.asarray(captions, dtype=np.uint16), concept=np.asarray(concept, dtype=np.int32),
    )  # fmt: skip


def test_a_table_has_the_tokens_and_buckets_of_the_training_sizes(tmp_path: Path) -> None:
    save_columns(tmp_path, [512, 64, 1024, 0], [512, 128, 1024, 0], [40, 33, 700, 5], [0, 1, -1, 0])
    found = read_table(
        tmp_path, [3, 1], SizeMapping(resolution=256), concepts=["cat", "dog"], concept_weights={"dog": 2.0}
    )
    assert found.num_samples == 4
    assert found.tokens is not None and found.tokens.tolist() == [256 + 64, 32 + 64, 256 + 512, 32]
    assert found.bucket is not None and found.bucket[0] == found.bucket[2] and len(set(found.bucket.tolist())) == 3
    assert found.chunk is not None and found.chunk.tolist() == [0, 0, 0, 1]
    assert found.weight is not None and found.weight.tolist() == [1, 2, 1, 1]
    same = read_table(
        tmp_path, [3, 1], SizeMapping(resolution=256), concepts=["cat", "dog"], concept_weights={"dog": 2.0}
    )
    assert same.settings == found.settings
    save_columns(tmp_path, [512, 64, 1024, 0], [512, 128, 1024, 0], [40, 33, 700, 6], [0, 1, -1, 0])
    assert read_table(tmp_path, [3, 1]).settings["planning"] != found.settings["planning"]


def test_a_folder_without_the_file_has_samples_that_are_alike(tmp_path: Path) -> None:
    found = read_table(tmp_path, [2, 2])
    assert found.num_samples == 4 and found.tokens is None and found.settings == {}
    with pytest.raises(
        UserError, match=r"planning.npz is missing, which data.init_args.sizes, concept_weights and balance need"
    ):
        read_table(tmp_path, [2, 2], SizeMapping())


def test_a_damaged_or_foreign_file_is_named(tmp_path: Path) -> None:
    save_columns(tmp_path, [512], [512], [40])
    with pytest.raises(UserError, match=r"planning.npz has 1 values of width for 3 samples"):
        read_table(tmp_path, [3])
    path = tmp_path / "planning.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"planning.npz cannot be read .*: copy it again") as caught:
        read_table(tmp_path, [1])
    assert "\n" not in str(caught.value)


# Mixtures


def chosen(weights: Sequence[float], steps: int) -> list[int]:
    done = [0] * len(weights)
    sources = []
    for _ in range(steps):
        source = next_source(weights, done)
        done[source] += 1
        sources.append(source)
    return sources


@pytest.mark.parametrize(
    "weights",
    [
        [1, 1],
        [4, 1],
        [0.8, 0.15, 0.05],
        [1, 0, 3],
        [1] * 7,
        [0.1, 0.2, 0.3, 0.4],
        [1e-3, 1, 0.5],
        [5],
        [7, 3, 2, 1, 0.5],
    ],
)
def test_a_mixture_keeps_its_shares_over_any_window(weights: list[float]) -> None:
    steps = 400
    sources = np.array(chosen(weights, steps))
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        ahead = np.append(0, np.cumsum(sources == number)) - share * np.arange(steps + 1)
        assert np.abs(ahead).max() < 1  # after any number of steps
        assert np.ptp(ahead) < 2  # the largest deviation over all windows: of the latest less the earliest
        assert weight > 0 or not (sources == number).any()


def test_a_mixture_of_two_is_within_one_step_over_any_window() -> None:
    for weights in ([4, 1], [0.37, 0.63], [1, 1]):
        ahead = np.append(0, np.cumsum(np.array(chosen(weights, 1000)) == 0)) - weights[0] / sum(weights) * np.arange(
            1001
        )
        assert np.ptp(ahead) <= 1


def test_a_mixture_of_four_to_one_takes_every_fifth_from_the_second() -> None:
    sources = chosen([4, 1], 50)
    assert np.diff(np.flatnonzero(np.array(sources) == 1)).tolist() == [5] * 9
