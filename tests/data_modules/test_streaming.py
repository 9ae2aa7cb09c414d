"""Streaming without a trainer: what is read, in which order, and what is said about damage."""

import io
from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import pytest
import torch
from PIL import Image

from data_modules.buckets import SizeMapping, resize_to
from data_modules.chunks import ChunkedSamples
from data_modules.manifest import read_manifest, write_manifest
from data_modules.samples import CaptionChooser, SampleReader, encode_sample
from data_modules.streaming import MixtureLoader, OrderedLoader, ResumableLoader
from data_modules.text_to_image import TextToImageDataModule
from zimage_lit.errors import UserError
from zimage_lit.rng import generator

NUM_SAMPLES = 44  # of the noise data set in conftest.py
KINDS = {"en": ["long", "short"], "zh": ["short"]}


def data_module(folder: Path, **options: Any) -> TextToImageDataModule:
    module = TextToImageDataModule(str(folder), **{"batch_size": 8, "seed": 3, **options})
    module.setup("fit")
    return module


def epoch_of(loader: ResumableLoader) -> list[list[int | str]]:
    return [batch["ids"] for batch in loader]


def the_error(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        data_module(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What a batch holds


def test_a_batch_has_the_stored_pixels_captions_metadata_and_ids(
    noise_folder: Path, pixels: Callable[[int], np.ndarray]
) -> None:
    batches = list(data_module(noise_folder, shuffle=False, drop_last=False).train_dataloader())
    assert [len(batch["ids"]) for batch in batches] == [8, 8, 8, 8, 8, 4]
    index = 0
    for batch in batches:
        for image, caption, metadata, name in zip(*batch.values(), strict=True):
            assert name == f"id-{index}" and metadata == {"tag": "noise", "number": index}
            assert caption in [f"{language} {kind} {index}" for language in KINDS for kind in KINDS[language]]
            assert image.dtype == torch.uint8
            assert image.shape == pixels(index).transpose(2, 0, 1).shape
            if index % 4:  # stored without loss
                assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(index))
            index += 1
    assert index == NUM_SAMPLES


def test_images_of_other_modes_become_rgb(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (5, 4), 77).save(buffer, "PNG")
    grey = encode_sample(buffer.getvalue(), {"en": {"short": "grey"}}, {}, 0)
    litdata.optimize(
        lambda _: grey, inputs=[0], output_dir=str(tmp_path / "train"), chunk_size=1, num_workers=1,
        start_method="fork", verbose=False,
    )  # fmt: skip
    write_manifest(tmp_path, "grey", {"train": 1}, {"en": ["short"]}, {})
    module = data_module(tmp_path, batch_size=1)
    (image,) = next(iter(module.train_dataloader()))["images"]
    assert image.shape == (3, 4, 5) and bool((image == 77).all())
    assert module.val_dataloader() == []


def test_validation_is_the_same_at_every_pass(noise_folder: Path) -> None:
    loader = data_module(noise_folder, batch_size=4).val_dataloader()
    first, second = ([(batch["ids"], batch["captions"]) for batch in loader] for _ in range(2))
    assert first == second
    assert [name for ids, _ in first for name in ids] == [f"id-{index}" for index in range(7)]
    assert len(loader) == 2


# Order


def test_every_sample_comes_once_an_epoch_and_in_another_order_each_time(noise_folder: Path) -> None:
    loader = data_module(noise_folder, batch_size=4).train_dataloader()
    epochs = [[name for ids in epoch_of(loader) for name in ids] for _ in range(3)]
    for names in epochs:
        assert Counter(names) == Counter(f"id-{index}" for index in range(NUM_SAMPLES))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_depends_on_the_seed_and_not_on_the_workers(noise_folder: Path) -> None:
    def two_epochs(**options: Any) -> list[list[int | str]]:
        loader = data_module(noise_folder, **options).train_dataloader()
        return epoch_of(loader) + epoch_of(loader)

    assert two_epochs() == two_epochs(num_workers=2)
    assert two_epochs() != two_epochs(seed=4)


@pytest.mark.parametrize(("workers_before", "workers_after"), [(0, 0), (0, 2), (2, 0), (2, 1)])
@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_a_saved_position_continues_exactly(
    noise_folder: Path, done: int, workers_before: int, workers_after: int
) -> None:
    loader = data_module(noise_folder).train_dataloader()
    expected = epoch_of(loader) + epoch_of(loader)

    stopped = data_module(noise_folder, num_workers=workers_before).train_dataloader()
    assert [batch["ids"] for batch in islice(stopped, done)] == expected[:done]
    resumed = data_module(noise_folder, num_workers=workers_after).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    found = epoch_of(resumed)
    found += epoch_of(resumed)
    assert found[: len(expected) - done] == expected[done:]


def test_asking_for_an_iterator_twice_loses_nothing(noise_folder: Path) -> None:
    loader = data_module(noise_folder).train_dataloader()
    iter(loader)
    first = next(iter(loader))["ids"]
    assert first == next(iter(data_module(noise_folder).train_dataloader()))["ids"]


def test_ranks_share_an_epoch_without_overlap(noise_folder: Path) -> None:
    reader = data_module(noise_folder).train_dataloader().reader
    ranks = [epoch_of(ResumableLoader(reader, "", 4, seed=0, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [NUM_SAMPLES // 8] * 2
    names = [name for batches in ranks for ids in batches for name in ids]
    assert len(set(names)) == len(names) == NUM_SAMPLES // 8 * 8


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_no_sample_is_left_out_and_every_rank_gets_some_in_each_step(noise_folder: Path, world_size: int) -> None:
    reader = data_module(noise_folder).train_dataloader().reader
    loaders = [
        ResumableLoader(reader, "", 3, seed=0, drop_last=False, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    ranks = [epoch_of(loader) for loader in loaders]
    assert {len(batches) for batches in ranks} == {-(-NUM_SAMPLES // (3 * world_size))}
    assert all(ids for batches in ranks for ids in batches)
    names = [name for batches in ranks for ids in batches for name in ids]
    assert sorted(names) == sorted(f"id-{index}" for index in range(NUM_SAMPLES))


@pytest.mark.parametrize("world_size", [1, 2])
def test_plain_batches_are_slices_of_one_permutation_an_epoch(noise_folder: Path, world_size: int) -> None:
    """Runs that were started with earlier versions continue."""
    reader = data_module(noise_folder).train_dataloader().reader
    for rank in range(world_size):
        loader = ResumableLoader(reader, "", 4, seed=6, rank=rank, world_size=world_size)
        for epoch in range(2):
            order = torch.randperm(NUM_SAMPLES, generator=generator(6, "data order", epoch)).tolist()
            starts = range(4 * rank, NUM_SAMPLES // (4 * world_size) * 4 * world_size, 4 * world_size)
            assert epoch_of(loader) == [[f"id-{index}" for index in order[start : start + 4]] for start in starts]


def test_plain_batches_go_on_where_other_ranks_share_the_same_steps(noise_folder: Path) -> None:
    reader = data_module(noise_folder).train_dataloader().reader
    whole = ResumableLoader(reader, "", 4, seed=6)
    steps = epoch_of(whole)
    before = ResumableLoader(reader, "", 2, seed=6, rank=1, world_size=2)
    list(islice(before, 3))
    whole.load_state_dict(before.state_dict())
    assert epoch_of(whole) == steps[3:]
    other = ResumableLoader(reader, "", 4, seed=6, world_size=2)
    with pytest.raises(UserError, match=r"batch_size=2 and this run has batch_size=4"):
        other.load_state_dict(before.state_dict())
    uneven = ResumableLoader(reader, "", 4, seed=6, drop_last=False)
    with pytest.raises(UserError, match=r"cannot be continued exactly"):
        uneven.load_state_dict(before.state_dict())


def test_a_state_of_an_earlier_version_continues(noise_folder: Path) -> None:
    loader = data_module(noise_folder).train_dataloader()
    expected = epoch_of(loader) + epoch_of(loader)
    state = loader.state_dict() | {"epoch": 1, "batches_done": 2}
    for name in ("steps_done", "token_budget", "window"):
        del state[name]
    resumed = data_module(noise_folder).train_dataloader()
    resumed.load_state_dict(state)
    assert epoch_of(resumed) == expected[7:]


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"seed": 9}, {"shuffle": False}])
def test_a_position_in_other_data_is_refused(noise_folder: Path, change: dict[str, Any]) -> None:
    state = data_module(noise_folder).train_dataloader().state_dict()
    with pytest.raises(UserError, match=f"{next(iter(change))}=.* cannot be continued exactly"):
        data_module(noise_folder, **change).train_dataloader().load_state_dict(state)


def test_a_data_set_smaller_than_a_batch_is_refused(noise_folder: Path) -> None:
    with pytest.raises(UserError, match="has 44 samples, fewer than the 45 of one batch"):
        data_module(noise_folder, batch_size=45).train_dataloader()


# Sizes and budgets

SIZED = 60  # of the sized data set in conftest.py
SIZES = SizeMapping(resolution=128)
BUDGET = 700  # packed tokens; a sample has 64 to 288 of them


def sized_loader(
    folder: Path, concept_weights: dict[str, float] | None = None, sizes: SizeMapping = SIZES, **options: Any
) -> ResumableLoader:
    reader = SampleReader(folder / "train", CaptionChooser(None, 0), sizes)
    table = reader.table(concepts=["cat", "dog"], concept_weights=concept_weights)
    options = {"batch_size": None, "token_budget": BUDGET, "seed": 1, "drop_last": False, **options}
    return ResumableLoader(reader, "", table=table, **options)


def stream(loader: ResumableLoader | MixtureLoader, steps: int) -> list[list[int | str]]:
    """The samples of so many steps, pass after pass."""
    found: list[list[int | str]] = []
    while len(found) < steps:
        found += [batch["ids"] for batch in islice(loader, steps - len(found))]
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_hold_a_budget_and_pictures_their_training_size(
    sized_folder: Path, sized_pixels: Callable[[int], np.ndarray], num_workers: int
) -> None:
    loader = sized_loader(sized_folder, num_workers=num_workers)
    table = loader.reader.table()
    assert table.tokens is not None
    seen: Counter[int | str] = Counter()
    for batch in loader:
        assert len(batch["ids"]) * max(table.tokens[index] for index in batch["ids"]) <= BUDGET
        for image, index in zip(batch["images"], batch["ids"], strict=True):
            pixels = sized_pixels(int(index))
            width, height = (int(side) for side in SIZES(pixels.shape[1], pixels.shape[0]))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), resize_to(pixels, width, height))
        seen.update(batch["ids"])
    assert seen == Counter(range(SIZED))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 2, "concept_weights": {"cat": 0.4, "dog": 1.5}}, {"batch_size": 4, "token_budget": None}],
)
def test_planned_positions_continue_exactly(sized_folder: Path, options: dict[str, Any], world_size: int) -> None:
    """From positions in and between epochs and passes; workers read ahead of the position. The last rank of each."""
    steps = 30
    options = {**options, "rank": world_size - 1, "world_size": world_size}
    expected = stream(sized_loader(sized_folder, **options), steps)
    for done, workers_before, workers_after in ((1, 0, 0), (9, 1, 0), (13, 0, 2), (25, 0, 0)):
        stopped = sized_loader(sized_folder, num_workers=workers_before, **options)
        assert stream(stopped, done) == expected[:done]
        resumed = sized_loader(sized_folder, num_workers=workers_after, **options)
        resumed.load_state_dict(stopped.state_dict())
        assert stream(resumed, steps - done) == expected[done:]


def test_epochs_of_unlike_lengths_are_whole_and_passes_alike(sized_folder: Path) -> None:
    """Windows change how many batches an epoch has; Lightning is told one length for the whole run."""
    loader = sized_loader(sized_folder, window=2)
    passes = [epoch_of(loader) for _ in range(8)]
    assert {len(batches) for batches in passes} == {len(loader)}
    names = [name for batches in passes for ids in batches for name in ids]
    epochs = [names[start : start + SIZED] for start in range(0, len(names) - SIZED, SIZED)]
    assert len(epochs) > 5
    assert all(Counter(epoch) == Counter(range(SIZED)) for epoch in epochs)
    assert len({len(loader._plan(epoch)) for epoch in range(8)}) > 1


def test_a_budget_position_with_other_sizes_or_weights_is_refused(sized_folder: Path) -> None:
    state = sized_loader(sized_folder).state_dict()
    changes: dict[str, dict[str, Any]] = {
        "sizes": {"sizes": SizeMapping(resolution=96)},
        "concept_weights": {"concept_weights": {"cat": 2.0}},
        "token_budget": {"token_budget": 800},
        "window": {"window": 2},
    }
    for name, change in changes.items():
        with pytest.raises(UserError, match=f"{name}=.* cannot be continued exactly"):
            sized_loader(sized_folder, **change).load_state_dict(state)


@pytest.mark.parametrize("world_size", [1, 7])
def test_validation_by_budget_is_whole_and_the_same_at_every_pass(sized_folder: Path, world_size: int) -> None:
    reader = SampleReader(sized_folder / "train", CaptionChooser(None, 0), SIZES)
    table = reader.table()
    assert table.tokens is not None
    names: list[int | str] = []
    for rank in range(world_size):
        loader = OrderedLoader(reader, None, rank=rank, world_size=world_size, token_budget=BUDGET, table=table)
        batches = [batch["ids"] for batch in loader]
        assert batches == [batch["ids"] for batch in loader] and len(batches) == len(loader)
        assert all(len(ids) * max(table.tokens[index] for index in ids) <= BUDGET for ids in batches)
        names += [name for ids in batches for name in ids]
    assert len(set(names)) == len(names) == SIZED - SIZED % world_size


def test_a_sample_above_the_budget_is_named_before_training(sized_folder: Path) -> None:
    with pytest.raises(UserError, match=r"Sample number \d+ has \d+ tokens, more than data.init_args.token_budget=200"):
        sized_loader(sized_folder, token_budget=200)


def test_concept_weights_hold_over_epochs(sized_folder: Path) -> None:
    loader = sized_loader(sized_folder, {"cat": 0.5, "dog": 2.0})
    steps = sum(len(loader._plan(epoch)) for epoch in range(4))
    names = Counter(name for ids in stream(loader, steps) for name in ids)
    in_four_epochs = [4, 2, 8]  # of neither, cats and dogs
    assert names == Counter({index: in_four_epochs[index % 3] for index in range(SIZED)})


def test_what_comes_next_is_told_ahead(sized_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[int]] = []
    loader = sized_loader(sized_folder, rank=1, world_size=2)
    monkeypatch.setattr(ChunkedSamples, "is_remote", True)
    monkeypatch.setattr(ChunkedSamples, "upcoming", lambda _, indices: told.append(indices.tolist()))
    epoch = [int(name) for ids in stream(loader, len(loader)) for name in ids]
    assert told[0] == epoch
    for sooner, later in pairwise(told[:-1]):
        assert 0 < len(later) < len(sooner) and sooner[-len(later) :] == later
    assert told[-1] == [int(name) for ids in epoch_of(loader) for name in ids]  # the whole next epoch


# Mixtures


def mixture(sized: Path, noise: Path, num_workers: int = 0, **options: Any) -> MixtureLoader:
    plain = ResumableLoader(SampleReader(noise / "train", CaptionChooser(None, 0)), "", 5, seed=2)
    options = {"weights": {"sized": 3.0, "noise": 1.0}, "steps_per_epoch": 16, **options}
    return MixtureLoader({"sized": sized_loader(sized), "noise": plain}, num_workers=num_workers, **options)


def test_a_mixture_keeps_its_shares_and_every_data_set_its_epochs(sized_folder: Path, noise_folder: Path) -> None:
    loader = mixture(sized_folder, noise_folder)
    found = stream(loader, 64)
    from_noise = np.array([str(ids[0]).startswith("id-") for ids in found])
    for size in (4, 8, 16):
        shares = np.convolve(from_noise, np.ones(size), "valid")
        assert np.abs(shares - size / 4).max() <= 1
    batches = {
        kind: [ids for ids, noise in zip(found, from_noise, strict=True) if noise == kind] for kind in (True, False)
    }
    assert batches[True] == stream(mixture(sized_folder, noise_folder).loaders["noise"], 16)
    assert batches[False] == stream(mixture(sized_folder, noise_folder).loaders["sized"], 48)


@pytest.mark.parametrize(("workers_before", "workers_after"), [(0, 0), (2, 0), (0, 2)])
def test_a_mixture_continues_exactly(
    sized_folder: Path, noise_folder: Path, workers_before: int, workers_after: int
) -> None:
    expected = stream(mixture(sized_folder, noise_folder), 50)
    for done in (15, 16, 37):
        stopped = mixture(sized_folder, noise_folder, workers_before)
        assert stream(stopped, done) == expected[:done]
        resumed = mixture(sized_folder, noise_folder, workers_after)
        resumed.load_state_dict(stopped.state_dict())
        assert stream(resumed, 50 - done) == expected[done:]


def test_a_mixture_is_as_long_as_its_data_sets_together(sized_folder: Path, noise_folder: Path) -> None:
    loader = mixture(sized_folder, noise_folder, steps_per_epoch=None)
    assert len(loader) == len(loader.loaders["sized"]) + 44 // 5 == len(list(loader))


def test_wrong_mixtures_are_named(sized_folder: Path, noise_folder: Path) -> None:
    with pytest.raises(UserError, match=r"weights names sized and the data sets are sized, noise\."):
        mixture(sized_folder, noise_folder, weights={"sized": 1.0})
    with pytest.raises(UserError, match=r"weights.noise is 0: set it to a number above 0"):
        mixture(sized_folder, noise_folder, weights={"sized": 1.0, "noise": 0})
    state = mixture(sized_folder, noise_folder).state_dict()
    with pytest.raises(UserError, match=r"weights=.* cannot be continued exactly"):
        mixture(sized_folder, noise_folder, weights={"sized": 1.0, "noise": 1.0}).load_state_dict(state)


# Captions


def test_the_caption_is_a_function_of_seed_epoch_and_sample() -> None:
    captions = {"en": {"short": "a", "long": "b"}, "zh": {"short": "c"}}
    reordered = {"zh": {"short": "c"}, "en": {"long": "b", "short": "a"}}

    def choices(seed: int, epoch: int) -> list[tuple[str, str]]:
        choose = CaptionChooser(None, seed)
        return [choose(captions, epoch, index) for index in range(200)]

    assert choices(0, 0) == choices(0, 0)
    assert [CaptionChooser(None, 0)(reordered, 0, index) for index in reversed(range(200))] == choices(0, 0)[::-1]
    assert choices(0, 0) != choices(1, 0) and choices(0, 0) != choices(0, 1)


def test_captions_come_as_often_as_their_weights_say() -> None:
    choose = CaptionChooser({"en": {"short": 3.0, "long": 1.0, "tags": 5.0}, "zh": {"short": 0.0}}, seed=0)
    captions = {"en": {"short": "a", "long": "b"}, "zh": {"short": "c"}}  # no tags: their weight does not count
    found = Counter(choose(captions, epoch, index) for epoch in range(4) for index in range(1000))
    assert set(found) == {("en", "short"), ("en", "long")}
    assert abs(found["en", "short"] / 4000 - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5  # four standard deviations


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"fr": {"short": 1.0}}, r"caption_weights names the language 'fr': the data have en, zh\."),
        ({"zh": {"long": 1.0}}, r"caption_weights.zh names the kind 'long': the data have short\."),
        ({"en": {"short": -1.0}}, r"caption_weights.en.short is -1.0: a weight is a number from 0 up\."),
        ({"en": {"short": float("nan")}}, r"caption_weights.en.short is nan"),
        ({"en": {"short": 0.0}, "fr": {"long": 0.0}}, r"caption_weights gives no caption a weight above 0"),
    ],
)
def test_wrong_caption_weights_are_named(noise_folder: Path, weights: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data_module(noise_folder, caption_weights=weights)


# Damage


def chunk(folder: Path, number: int = 1) -> Path:
    return sorted((folder / "train").glob("*.bin"))[number]


def test_a_missing_or_unfinished_folder_is_named(noise_copy: Path) -> None:
    assert f"There is no data folder {noise_copy / 'gone'}" in the_error(noise_copy / "gone")
    (noise_copy / "manifest.json").unlink()
    assert "has no manifest.json" in the_error(noise_copy)
    (noise_copy / "manifest.json").write_text("{")
    assert f"{noise_copy / 'manifest.json'} is not JSON" in the_error(noise_copy)


@pytest.mark.parametrize("verify", ["size", "sha256"])
def test_a_missing_or_truncated_chunk_is_named(noise_copy: Path, verify: str) -> None:
    path = chunk(noise_copy)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    message = the_error(noise_copy, verify=verify)
    assert f"{path} has {len(content) - 1} bytes where its manifest says {len(content)}: copy it again" in message
    path.unlink()
    assert f"{path} is missing: copy it again" in the_error(noise_copy, verify=verify)


def test_one_flipped_bit_is_found_by_sha256(noise_copy: Path) -> None:
    path = chunk(noise_copy)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    data_module(noise_copy, verify="size")
    assert f"{path} is damaged (its SHA-256 differs from the manifest)" in the_error(noise_copy, verify="sha256")


def test_a_manifest_of_other_files_is_found(noise_copy: Path, noise_folder: Path) -> None:
    """The chunks were written anew, the manifest is the old one."""
    stale = (noise_folder / "manifest.json").read_text()
    chunk(noise_copy).write_bytes(chunk(noise_folder, number=2).read_bytes())
    write_manifest(noise_copy, "noise", {"train": NUM_SAMPLES, "val": 7}, KINDS, {})
    assert read_manifest(noise_copy).fingerprint != read_manifest(noise_folder).fingerprint
    (noise_copy / "manifest.json").write_text(stale)
    assert str(chunk(noise_copy)) in the_error(noise_copy, verify="sha256")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_that_cannot_be_decoded_is_named(noise_copy: Path, num_workers: int) -> None:
    path = chunk(noise_copy)
    content = path.read_bytes()
    start = content.index(b"\x89PNG")
    path.write_bytes(content[:start] + bytes(40) + content[start + 40 :])
    loader = data_module(noise_copy, shuffle=False, num_workers=num_workers).train_dataloader()
    with pytest.raises(UserError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(f"Sample id-10 in {path} cannot be read (Rejected: not a picture: no known format)")
    assert "\n" not in message and message.endswith("copy the file again, or prepare the data again.")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_without_any_weighted_caption_is_named(noise_folder: Path, num_workers: int) -> None:
    module = data_module(noise_folder, num_workers=num_workers, shuffle=False)
    module.caption_weights = {"en": {"poem": 1.0}}
    with pytest.raises(
        UserError, match=r"Sample id-0 in .* has captions of the kinds en.long, en.short, zh.short, and "
    ):
        list(module.train_dataloader())


def test_the_fingerprint_is_of_the_samples(noise_folder: Path, noise_copy: Path) -> None:
    module = TextToImageDataModule(str(noise_folder))  # before setup
    assert module.dataset_info() == {
        "name": "noise",
        "fingerprint": module.fingerprint,
        "num_samples": NUM_SAMPLES,
        "path": str(noise_folder),
    }
    assert module.fingerprint == TextToImageDataModule(str(noise_copy)).fingerprint
