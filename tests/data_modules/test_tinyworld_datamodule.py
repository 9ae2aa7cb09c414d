"""TinyWorld as files: what is written, that it is finished when it says so, and what comes out again."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data_modules import TinyWorldDataModule
from data_modules.balancing import BalanceSettings, read_tags
from data_modules.folder_lock import LOCK
from data_modules.manifest import read_manifest
from data_modules.tinyworld import prepare as preparation
from data_modules.tinyworld.combinations import is_heldout
from data_modules.tinyworld.prepare import World, prepare, tags_of
from data_modules.tinyworld.world import TASK_WEIGHTS, draw
from zimage_lit.components import PatchPCACodec, Qwen3TextEncoder
from zimage_lit.errors import UserError

NUM_SAMPLES, NUM_VAL_SAMPLES, SEED = 90, 12, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prepared once, in several chunks by two workers."""
    path = tmp_path_factory.mktemp("tinyworld") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "CHUNK_SAMPLES", 20)
        prepare(path, NUM_SAMPLES, SEED, num_workers=2, num_val_samples=NUM_VAL_SAMPLES)
        yield path


def data_module(folder: Path, **options: object) -> TinyWorldDataModule:
    sizes = {"num_samples": NUM_SAMPLES, "num_val_samples": NUM_VAL_SAMPLES, "world_seed": SEED, "seed": SEED}
    return TinyWorldDataModule(str(folder), **{**sizes, "batch_size": 30, **options})  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def descendants(pid: int) -> list[int]:
    """Process ids below a process, on Linux; elsewhere nothing."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [below for child in found for below in descendants(child)]


def test_batches_hold_what_the_world_draws(folder: Path) -> None:
    module = data_module(folder)
    module.prepare_data()
    module.setup("fit")
    seen = set()
    for batch in module.train_dataloader():
        for image, caption, metadata, index in zip(*batch.values(), strict=True):
            sample = draw(index, SEED)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), sample.image)
            assert metadata == json.loads(json.dumps(sample.metadata))
            assert caption in [text for kinds in sample.captions.values() for text in kinds.values()]
            seen.add(index)
    assert seen == set(range(NUM_SAMPLES))


def test_validation_holds_held_out_samples_in_order(folder: Path) -> None:
    module = data_module(folder)
    module.setup("validate")
    (batch,) = module.val_dataloader()
    assert batch["ids"] == list(range(NUM_VAL_SAMPLES))
    for image, metadata, index in zip(batch["images"], batch["metadata"], batch["ids"], strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), draw(int(index), SEED, "heldout").image)
        assert is_heldout(metadata) or metadata["tag"] == "single_object"


def test_codec_and_text_encoder_lie_beside_the_samples(folder: Path) -> None:
    images = (
        torch.from_numpy(np.stack([draw(index, SEED).image for index in range(16)])).permute(0, 3, 1, 2) / 127.5 - 1
    )
    codec = PatchPCACodec(folder / "codec")
    error = (codec.decode(codec.encode(images)) - images).square().mean()
    assert error < 0.1 * images.var()
    encoder = Qwen3TextEncoder(folder / "text_encoder")
    (features,) = encoder.encode([draw(0, SEED).captions["zh"]["long"]])
    assert features.shape[1] == encoder.dim and bool(features.isfinite().all())


def test_the_manifest_describes_the_folder(folder: Path) -> None:
    manifest = read_manifest(folder)
    hashes = content(folder)
    del hashes["manifest.json"]
    assert {name: entry["sha256"] for name, entry in manifest.files.items()} == hashes
    assert len([name for name in hashes if name.startswith("train/samples")]) == 5
    assert data_module(folder).dataset_info() == {
        "name": "tinyworld",
        "fingerprint": manifest.fingerprint,
        "num_samples": NUM_SAMPLES,
        "path": str(folder),
    }


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_writes_the_same_bytes(folder: Path, tmp_path: Path, num_workers: int) -> None:
    preparation._write_split(tmp_path / "train", "train", NUM_SAMPLES, World(SEED), num_workers)
    assert content(tmp_path / "train") == content(folder / "train")


def test_preparing_changes_nothing_for_the_rest_of_the_program(tmp_path: Path) -> None:
    """litdata sets all random seeds, and a start method whose default would make later DataLoader workers spawn."""

    def state() -> tuple[object, ...]:
        return (
            multiprocessing.get_start_method(),
            random.getstate(),
            str(np.random.get_state()),
            torch.get_rng_state().tolist(),
        )

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(12345)
    before = state()
    preparation._write_split(tmp_path / "train", "train", 3, World(SEED), num_workers=1)
    assert state() == before


def test_a_world_prepared_before_there_was_a_choice_is_still_the_default(folder: Path, tmp_path: Path) -> None:
    """The hash of the default world, as it was then; the manifest then had no canvases and no shares of tasks."""
    assert World().version == "418d670c8f56d965"
    old = read_manifest(folder).settings
    assert old["canvases"] is None and old["task_weights"] is None and old["downscale"] is None
    explicit = data_module(folder, canvases=[[64, 64]], task_weights=dict(TASK_WEIGHTS))
    explicit.prepare_data()  # the same, so nothing is refused


CANVASES = [(64, 64), (96, 64), (64, 96), (96, 96)]
TASKS_DRAWN = {"word": 3.0, "counting": 1.0}


@pytest.fixture(scope="module")
def many_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sizes") / "data"
    prepare(path, 200, SEED, num_workers=1, num_val_samples=8, canvases=CANVASES, task_weights=TASKS_DRAWN)
    return path


def test_pictures_of_several_sizes_are_mixed_in_a_batch(many_sizes: Path) -> None:
    options = {"num_samples": 200, "num_val_samples": 8, "canvases": CANVASES, "task_weights": TASKS_DRAWN}
    module = data_module(many_sizes, batch_size=50, **options)
    module.prepare_data()
    module.setup("fit")
    shapes: Counter[tuple[int, int]] = Counter()
    world = World(SEED, CANVASES, TASKS_DRAWN)
    for batch in module.train_dataloader():
        sizes = [(image.shape[2], image.shape[1]) for image in batch["images"]]
        assert len(set(sizes)) > 1
        shapes.update(sizes)
        index = int(batch["ids"][0])
        assert np.array_equal(batch["images"][0].permute(1, 2, 0).numpy(), world(index, "train").image)
    assert set(shapes) == set(CANVASES) and min(shapes.values()) > 25
    budgeted = data_module(many_sizes, **{**options, "batch_size": None, "token_budget": 1024})
    budgeted.setup("fit")
    assert sum(len(batch["ids"]) for batch in budgeted.train_dataloader()) == 200


def test_a_world_of_low_resolution_is_streamed_small_and_keeps_codec_and_encoder(folder: Path, tmp_path: Path) -> None:
    module = data_module(tmp_path / "low", downscale=2)
    module.prepare_data()
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert {image.shape for image in batch["images"]} == {(3, 32, 32)}
    expected = World(SEED, downscale=2)(int(batch["ids"][0]), "train")
    assert np.array_equal(batch["images"][0].permute(1, 2, 0).numpy(), expected.image)
    for part in ("codec/model.safetensors", "text_encoder/model.safetensors"):
        assert (folder / part).read_bytes() == (tmp_path / "low" / part).read_bytes()


def test_planning_and_tags_say_what_was_drawn(many_sizes: Path) -> None:
    planning, tags = np.load(many_sizes / "train/planning.npz"), read_tags(many_sizes / "train", 200)
    world = World(SEED, CANVASES, TASKS_DRAWN)
    concepts = read_manifest(many_sizes).settings["concepts"]
    for index in range(0, 200, 7):
        sample = world(index, "train")
        assert (planning["height"][index], planning["width"][index]) == sample.image.shape[:2]
        assert concepts[planning["concept"][index]] == sample.metadata["tag"]
        start = tags.ends[index - 1] if index else 0
        assert {tags.names[tag] for tag in tags.tags[start : tags.ends[index]]} == set(tags_of(sample))
    tasks = Counter(concepts[number] for number in planning["concept"])
    assert set(tasks) == {"word", "counting"} and 110 < tasks["word"] < 190


def test_a_prior_over_concepts_decides_what_training_sees(many_sizes: Path) -> None:
    options = {"num_samples": 200, "num_val_samples": 8, "canvases": CANVASES, "task_weights": TASKS_DRAWN}
    seen = []
    for prior in ({"word": 200.0}, {"counting": 200.0}):
        module = data_module(many_sizes, balance=BalanceSettings(prior=prior), batch_size=10, **options)
        module.setup("fit")
        tasks = [metadata["tag"] for batch in module.train_dataloader() for metadata in batch["metadata"]]
        seen.append(tasks.count("word") / len(tasks))
    assert seen[0] > 0.8 and seen[1] < 0.4


def test_codec_and_text_encoder_are_those_of_the_default_world(folder: Path, many_sizes: Path) -> None:
    """So that a network that has learnt one world goes on in another."""
    for part in ("codec/model.safetensors", "text_encoder/model.safetensors", "text_encoder/tokenizer.json"):
        assert (folder / part).read_bytes() == (many_sizes / part).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canvases": [[64, 40]]}, r"data.init_args.canvases: TinyWorld draws no picture of 64x40"),
        ({"canvases": [[32, 64]]}, r"draws no picture of 32x64: its sides are multiples of 16 pixels, from 48 to 1024"),
        ({"downscale": 3}, r"makes no picture of 64x64 smaller by 3: what remains must be multiples of 16 pixels too"),
        ({"downscale": 0}, r"makes no picture of 64x64 smaller by 0"),
        ({"canvases": []}, r"canvases is \[\]: give a list of \[width, height\]"),
        ({"canvases": [[64]]}, r"canvases is \[\[64\]\]: give a list"),
        ({"task_weights": {"words": 1.0}}, r"task_weights.words is no task of TinyWorld: there are single_object"),
        ({"task_weights": {"word": -1.0}}, r"task_weights.word is -1.0: a share is a number from 0 up"),
        ({"task_weights": {"word": 0.0}}, r"task_weights gives no task a share above 0"),
    ],
)
def test_worlds_that_cannot_be_drawn_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        data_module(tmp_path / "data", **options).prepare_data()


def test_a_finished_folder_is_left_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(folder)
    monkeypatch.setattr(preparation, "_prepare", None)
    data_module(folder).prepare_data()
    assert content(folder) == before


@pytest.mark.parametrize(
    ("key", "value", "stored"),
    [
        ("num_samples", 91, 90),
        ("world_seed", 8, 7),
        ("num_val_samples", 3, 12),
        ("canvases", [[96, 64]], None),
        ("task_weights", {"word": 1.0}, None),
        ("downscale", 2, None),
    ],
)
def test_other_settings_are_refused_by_name(folder: Path, key: str, value: int, stored: int) -> None:
    with pytest.raises(
        UserError,
        match=rf"prepared with {key}={stored} \(now {key}={re.escape(str(value))}\).*: set data.init_args.data_dir",
    ):
        data_module(folder, **{key: value}).prepare_data()


def test_another_world_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_modules.tinyworld.world.BACKGROUND", 120.0)
    with pytest.raises(UserError, match="prepared with world="):
        data_module(folder).prepare_data()


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "holiday.jpg").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no data set"):
        prepare(tmp_path, NUM_SAMPLES)
    assert (tmp_path / "train" / "holiday.jpg").read_text() == "precious"


def runs(pid: int) -> bool:
    """Whether a process is there and not merely waiting for its parent to ask for its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_preparation_is_not_taken_for_a_finished_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    many = 500_000  # a few minutes
    process = multiprocessing.get_context("fork").Process(
        target=prepare, args=(data, many, SEED), kwargs={"num_workers": 2}
    )
    process.start()
    deadline = time.monotonic() + 60
    while len(list(data.glob(".train-*/*.bin"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    helpers = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 90  # they notice it between two samples, on a busy machine late
    while any(map(runs, helpers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in helpers if runs(pid)], "workers outlived the preparation"
    assert list(data.glob(".train-*/*.bin")) and not (data / "manifest.json").exists()
    with pytest.raises(UserError, match=r"has no manifest\.json, so its preparation never finished"):
        data_module(data).setup("fit")

    monkeypatch.setattr(preparation, "_fit_components", lambda *_: None)
    prepare(
        data, NUM_SAMPLES, SEED, num_workers=1, num_val_samples=NUM_VAL_SAMPLES
    )  # other settings: nothing holds them
    assert read_manifest(data).fingerprint == read_manifest(folder).fingerprint
    assert not (data / LOCK).exists()


def test_two_preparations_at_once_wait_for_each_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "_fit_components", lambda *_: None)
    context = multiprocessing.get_context("fork")
    options = {"num_workers": 1, "num_val_samples": NUM_VAL_SAMPLES}
    processes = [context.Process(target=prepare, args=(tmp_path, NUM_SAMPLES, SEED), kwargs=options) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert read_manifest(tmp_path).fingerprint == read_manifest(folder).fingerprint


def test_a_flipped_bit_in_codec_or_samples_is_found_at_setup(folder: Path, tmp_path: Path) -> None:
    for name in ("codec/model.safetensors", "train/samples-00002.bin"):
        copy = Path(shutil.copytree(folder, tmp_path / name.replace("/", "-")))
        damaged = bytearray((copy / name).read_bytes())
        damaged[-100] ^= 4
        (copy / name).write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            data_module(copy).setup("fit")
