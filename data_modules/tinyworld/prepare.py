"""Draws TinyWorld and writes it to a folder: sample chunks, latent codec, text encoder, manifest.

data_dir/train, data_dir/val     litdata chunks, planning.npz and tags.npz; val holds held-out combinations only
data_dir/codec                   PatchPCACodec fitted to training pictures
data_dir/text_encoder            tiny Qwen3 with a tokenizer made from training captions
data_dir/manifest.json           written last: a folder with a manifest is a finished one

Codec and text encoder are those of the default pictures and tasks of the same seed, whichever are drawn: so a network
that has learnt one TinyWorld goes on in another.
"""

import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from litdata import optimize
from rich.console import Console

from data_modules.assembly import planning_file
from data_modules.balancing import TAGS, TagTable, tags_file
from data_modules.folder_lock import is_prepared, sole_preparation
from data_modules.manifest import MANIFEST, write_manifest
from data_modules.part_writer import BYTES_PER_TOKEN, MAX_TOKENS
from data_modules.planning import PLANNING
from data_modules.progress import counter_progress
from data_modules.samples import encode_sample
from data_modules.tinyworld.captions import KINDS, LANGUAGES, pick
from data_modules.tinyworld.combinations import CLASSES, COLORS, MIRROR, TASKS, Split
from data_modules.tinyworld.world import DEFAULT_SIZE, TASK_WEIGHTS, Size, TinyWorldSample, check_size, draw
from zimage_lit.errors import UserError

CHUNK_SAMPLES = 10_000  # about 14 MB
FIT_SAMPLES = 4_096  # of the default world, for the codec and the tokenizer
FEW_FIT_SAMPLES = 256  # for those of data sets that are smaller than that: quick, and the same for all of them
FOLDER_KEY = "data.init_args.data_dir"
SPLITS: dict[str, Split] = {"train": "train", "val": "heldout"}
COUNT_TAGS = ("one", "two", "three", "four")
TAG_NAMES = (*TASKS, *COUNT_TAGS, *MIRROR, *CLASSES, *COLORS)


class World:
    """Which samples are drawn: the world's seed, the canvases in turn by chance, the shares of the tasks.

    canvases: (width, height) of the pictures in pixels, all as often; None: 64x64.   task_weights: task -> share, in
    proportion, none for those not named; None: `TASK_WEIGHTS`.   downscale: how much smaller the finished pictures are
    made, a side.

    Raises UserError for canvases and tasks that do not exist, and a downscale that does not divide the canvases.
    """

    def __init__(
        self,
        seed: int = 0,
        canvases: Sequence[Sequence[int]] | None = None,
        task_weights: Mapping[str, float] | None = None,
        downscale: int = 1,
    ) -> None:
        self.seed = seed
        self.canvases = checked_canvases("data.init_args.canvases", canvases, downscale)
        self.downscale = downscale
        self.task_weights = _checked_tasks(task_weights)

    def __call__(self, index: int, split: Split) -> TinyWorldSample:
        size = self.canvases[0]
        if len(self.canvases) > 1:
            size = pick(random.Random(f"tinyworld canvas/{self.seed}/{split}/{index}"), self.canvases)
        return draw(index, self.seed, split, size=size, task_weights=self.task_weights, downscale=self.downscale)

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest says; of a default nothing, as before there was a choice."""
        canvases = [list(size) for size in self.canvases]
        return {
            "world_seed": self.seed,
            "canvases": None if canvases == [list(DEFAULT_SIZE)] else canvases,
            "task_weights": None if self.task_weights is TASK_WEIGHTS else dict(self.task_weights),
            "downscale": None if self.downscale == 1 else self.downscale,
        }

    @property
    def version(self) -> str:
        """A short hash of some samples: another value as soon as the world draws or says anything differently."""
        digest = hashlib.sha256()
        for split in SPLITS.values():
            for index in range(32):
                sample = self(index, split)
                digest.update(sample.image.tobytes())
                digest.update(json.dumps([sample.captions, sample.metadata], sort_keys=True).encode())
        return digest.hexdigest()[:16]


def checked_canvases(key: str, canvases: Sequence[Sequence[int]] | None, downscale: int = 1) -> tuple[Size, ...]:
    """The sizes that the setting `key` names, one at least; UserError where TinyWorld cannot draw one."""
    sizes = [DEFAULT_SIZE] if canvases is None else [tuple(size) for size in canvases]
    if not sizes or any(len(size) != 2 for size in sizes):
        raise UserError(f"{key} is {canvases}: give a list of [width, height], for example [[64, 64], [96, 64]].")
    for size in sizes:
        try:
            check_size(size, downscale)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None
    return tuple(sizes)  # type: ignore[arg-type]


def _checked_tasks(weights: Mapping[str, float] | None) -> Mapping[str, float]:
    if weights is None or dict(weights) == TASK_WEIGHTS:
        return TASK_WEIGHTS
    key = "data.init_args.task_weights"
    for task, weight in weights.items():
        if task not in TASKS:
            raise UserError(f"{key}.{task} is no task of TinyWorld: there are {', '.join(TASKS)}.")
        if not 0 <= weight < float("inf"):
            raise UserError(f"{key}.{task} is {weight}: a share is a number from 0 up.")
    if not any(weights.values()):
        raise UserError(f"{key} gives no task a share above 0: give one to any of {', '.join(TASKS)}.")
    return {task: float(weights[task]) for task in TASKS if weights.get(task)}


def tags_of(sample: TinyWorldSample) -> list[str]:
    """What a sample is about, for balancing: its task and every count, relation, class and colour that it shows."""
    include = sample.metadata.get("include", [])
    relations = [clause["position"][0] for clause in include if "position" in clause]
    counts = [COUNT_TAGS[len(sample.objects) - 1]] if sample.metadata["tag"] == "counting" else []
    shown = [word for item in sample.objects for word in (item.name, item.color)]
    return [sample.metadata["tag"], *counts, *relations, *shown]


def prepare(
    data_dir: str | Path,
    num_samples: int = 40_000,
    world_seed: int = 0,
    num_workers: int | None = None,
    num_val_samples: int = 512,
    canvases: Sequence[Sequence[int]] | None = None,
    task_weights: Mapping[str, float] | None = None,
    downscale: int = 1,
) -> None:
    """Prepare TinyWorld in `data_dir`; returns at once where the same was prepared before. For canvases, tasks and
    downscale see `World`.

    The files are the same whatever `num_workers` (default: one for each core). A preparation that was killed is begun
    anew; two at the same time wait for each other.

    Raises:
        UserError: `data_dir` holds a data set with other settings, or files that are no data set; sizes below 1;
            canvases and tasks that do not exist.
    """
    data_dir = Path(data_dir)
    if num_samples < 1 or num_val_samples < 1:
        raise UserError(
            f"TinyWorld needs samples: num_samples={num_samples}, num_val_samples={num_val_samples}, both at least 1."
        )
    world = World(world_seed, canvases, task_weights, downscale)
    settings = {
        "num_samples": num_samples,
        "num_val_samples": num_val_samples,
        **world.settings,
        "world": world.version,
    }
    if is_prepared(data_dir, settings, FOLDER_KEY):
        return
    with sole_preparation(data_dir, FOLDER_KEY):
        _clear(data_dir)
        if not is_prepared(data_dir, settings, FOLDER_KEY):  # the one that was waited for may have done it
            _prepare(data_dir, world, settings, num_workers or os.cpu_count() or 1)


def _clear(data_dir: Path) -> None:
    """Remove what a killed preparation left behind."""
    if not (data_dir / MANIFEST).exists():
        for left_behind in (path for path in data_dir.iterdir() if path.is_dir()):
            shutil.rmtree(left_behind, ignore_errors=True)


def _prepare(data_dir: Path, world: World, settings: dict[str, Any], num_workers: int) -> None:
    start = time.monotonic()
    sizes = {"train": settings["num_samples"], "val": settings["num_val_samples"]}
    for split, size in sizes.items():
        _write_split(data_dir / split, split, size, world, num_workers)
    _fit_components(data_dir, settings)
    described = {**settings, "concepts": list(TASKS)}
    write_manifest(data_dir, "tinyworld", sizes, {language: list(KINDS) for language in LANGUAGES}, described)
    seconds = time.monotonic() - start
    Console().print(
        f"TinyWorld: {sum(sizes.values()):,} samples in {seconds:.0f} s "
        f"({sum(sizes.values()) / seconds:,.0f}/s), in {data_dir}",
        highlight=False,
    )


def _write_split(folder: Path, split: str, size: int, world: World, num_workers: int) -> None:
    """Draw `size` samples and have litdata write them, each worker a row of full chunks, in order. Beside them lies
    what planning and balancing read."""
    unfinished = folder.with_name(f".{split}-{os.getpid()}")  # its own: workers of a killed preparation may still write
    # The platform's own way to start processes: litdata sets its choice for the whole program, and its default, spawn,
    # would slow down every DataLoader that comes after.
    start_method = multiprocessing.get_start_method()
    notes = _Notes(size)
    # litdata seeds Python's, numpy's and torch's random numbers: a run that prepares must not differ from another.
    with counter_progress(f"Drawing TinyWorld, {split}", size, notes.done), isolate_rng():
        optimize(
            _DrawAndNote(world, SPLITS[split], notes),
            inputs=list(range(size)),
            output_dir=str(unfinished),
            chunk_size=min(CHUNK_SAMPLES, size),
            align_chunking=True,
            keep_data_ordered=True,
            reorder_files=False,
            num_workers=max(1, min(num_workers, size // CHUNK_SAMPLES)),
            start_method=start_method,
            verbose=False,
        )
    _name_chunks_by_order(unfinished)
    (unfinished / PLANNING).write_bytes(planning_file(notes.columns()))
    (unfinished / TAGS).write_bytes(tags_file(notes.tags()))
    unfinished.rename(folder)


class _Notes:
    """What the workers note of each of `size` samples, in memory that they share with the preparation."""

    def __init__(self, size: int) -> None:
        self.done = multiprocessing.Value("q", 0)
        self._width, self._height, self._tokens, self._task = (multiprocessing.RawArray("H", size) for _ in range(4))
        self._tags = multiprocessing.RawArray("Q", size)  # a bit for each of TAG_NAMES

    def add(self, index: int, sample: TinyWorldSample) -> None:
        longest = max(len(text.encode()) for kinds in sample.captions.values() for text in kinds.values())
        self._height[index], self._width[index], _ = sample.image.shape
        self._tokens[index] = min(MAX_TOKENS, math.ceil(longest / BYTES_PER_TOKEN))
        self._task[index] = TASKS.index(sample.metadata["tag"])
        self._tags[index] = sum(1 << TAG_NAMES.index(name) for name in set(tags_of(sample)))
        with self.done.get_lock():
            self.done.value += 1

    def columns(self) -> np.ndarray:
        """(N, 4) width, height, caption tokens (estimated) and concept, which is the task."""
        return np.stack([np.array(column) for column in (self._width, self._height, self._tokens, self._task)], axis=1)

    def tags(self) -> TagTable:
        has = np.array(self._tags)[:, None] >> np.arange(len(TAG_NAMES), dtype=np.uint64) & np.uint64(1)
        return TagTable(has.sum(axis=1).cumsum().astype(np.int64), has.nonzero()[1].astype(np.int32), TAG_NAMES)


class _DrawAndNote:
    """What a worker does with a number: the sample, noted."""

    def __init__(self, world: World, split: Split, notes: _Notes) -> None:
        self.world, self.split, self.notes = world, split, notes
        self.parent = 0  # process id, known at the first call

    def __call__(self, index: int) -> dict[str, Any]:
        self._leave_if_orphaned()
        sample = self.world(index, self.split)
        self.notes.add(index, sample)
        return encode_sample(sample.image, sample.captions, sample.metadata, index)

    def _leave_if_orphaned(self) -> None:
        """End this worker, and litdata's helpers below it that would wait for ever, when the preparation was killed."""
        self.parent = self.parent or os.getppid()
        if os.getppid() != self.parent:
            for helper in multiprocessing.active_children():
                helper.kill()
            os._exit(1)


def _name_chunks_by_order(folder: Path) -> None:
    """Give the chunks names without a worker's number in them, and the index no time, so that the files do not tell how
    many workers wrote them, nor when."""
    index_path = folder / "index.json"
    index = json.loads(index_path.read_text(encoding="utf-8"))
    hashes = hashlib.sha256()
    for number, chunk in enumerate(index["chunks"]):
        name = f"samples-{number:05d}.bin"
        (folder / chunk["filename"]).rename(folder / name)
        chunk["filename"] = name
        hashes.update((folder / name).read_bytes())
    index["updated_at"] = hashes.hexdigest()  # litdata only asks whether it changed
    index_path.write_text(json.dumps(index, sort_keys=True), encoding="utf-8")


def _fit_components(data_dir: Path, settings: dict[str, Any]) -> None:
    """The codec from training pictures, the text encoder from their captions and from single letters."""
    from zimage_lit.components import PatchPCACodec, build_tiny_qwen3  # transformers takes seconds to import

    count = FIT_SAMPLES if settings["num_samples"] >= FIT_SAMPLES else FEW_FIT_SAMPLES
    samples = [draw(index, settings["world_seed"]) for index in range(count)]
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
    PatchPCACodec.fit(images.float() / 127.5 - 1, data_dir / "codec")
    texts = [text for sample in samples for kinds in sample.captions.values() for text in kinds.values()]
    build_tiny_qwen3(data_dir / "text_encoder", sorted(set(texts)), seed=settings["world_seed"])
