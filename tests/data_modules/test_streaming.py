"""Streaming without a trainer: what is read, in which order, and what is said about damage."""

import io
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import pytest
import torch
from PIL import Image

from data_modules.manifest import read_manifest, write_manifest
from data_modules.streaming import CaptionChooser, ResumableLoader, encode_sample
from data_modules.text_to_image import TextToImageDataModule
from zimage_lit.errors import UserError

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
    with pytest.raises(UserError, match="drop_last=false works on one device"):
        ResumableLoader(reader, "", 4, seed=0, drop_last=False, world_size=2)


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"seed": 9}, {"shuffle": False}])
def test_a_position_in_other_data_is_refused(noise_folder: Path, change: dict[str, Any]) -> None:
    state = data_module(noise_folder).train_dataloader().state_dict()
    with pytest.raises(UserError, match=f"{next(iter(change))}=.* cannot be continued exactly"):
        data_module(noise_folder, **change).train_dataloader().load_state_dict(state)


def test_a_data_set_smaller_than_a_batch_is_refused(noise_folder: Path) -> None:
    with pytest.raises(UserError, match="has 44 samples, fewer than the 45 of one batch"):
        data_module(noise_folder, batch_size=45).train_dataloader()


# Captions


def test_the_caption_is_a_function_of_seed_epoch_and_sample() -> None:
    captions = {"en": {"short": "a", "long": "b"}, "zh": {"short": "c"}}
    reordered = {"zh": {"short": "c"}, "en": {"long": "b", "short": "a"}}

    def choices(seed: int, epoch: int) -> list[str]:
        choose = CaptionChooser(None, seed)
        return [choose(captions, epoch, index) for index in range(200)]

    assert choices(0, 0) == choices(0, 0)
    assert [CaptionChooser(None, 0)(reordered, 0, index) for index in reversed(range(200))] == choices(0, 0)[::-1]
    assert choices(0, 0) != choices(1, 0) and choices(0, 0) != choices(0, 1)


def test_captions_come_as_often_as_their_weights_say() -> None:
    choose = CaptionChooser({"en": {"short": 3.0, "long": 1.0, "tags": 5.0}, "zh": {"short": 0.0}}, seed=0)
    captions = {"en": {"short": "a", "long": "b"}, "zh": {"short": "c"}}  # no tags: their weight does not count
    found = Counter(choose(captions, epoch, index) for epoch in range(4) for index in range(1000))
    assert set(found) == {"a", "b"}
    assert abs(found["a"] / 4000 - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5  # four standard deviations


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"fr": {"short": 1.0}}, r"caption_weights names the language 'fr': the data have en, zh\."),
        ({"zh": {"long": 1.0}}, r"caption_weights.zh names the kind 'long': the data have short\."),
        ({"en": {"short": -1.0}}, r"caption_weights.en.short is -1.0: a weight is a number from 0 up\."),
        ({"en": {"short": float("nan")}}, r"caption_weights.en.short is nan"),
        ({"en": {"short": 0.0}}, r"caption_weights gives no caption a weight above 0"),
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
