"""Draws TinyWorld and writes it to a folder: sample chunks, latent codec, text encoder, manifest.

data_dir/train, data_dir/val     litdata chunks; val holds held-out combinations only
data_dir/codec                   PatchPCACodec fitted to training pictures
data_dir/text_encoder            tiny Qwen3 with a tokenizer made from training captions
data_dir/manifest.json           written last: a folder with a manifest is a finished one
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from litdata import optimize
from rich.console import Console

from data_modules.folder_lock import is_prepared, sole_preparation
from data_modules.manifest import MANIFEST, write_manifest
from data_modules.progress import counter_progress
from data_modules.samples import encode_sample
from data_modules.tinyworld.captions import KINDS, LANGUAGES
from data_modules.tinyworld.combinations import Split
from data_modules.tinyworld.world import draw
from zimage_lit.errors import UserError

CHUNK_SAMPLES = 10_000  # about 14 MB
FIT_SAMPLES = 4_096  # for the codec and the tokenizer
FOLDER_KEY = "data.init_args.data_dir"
SPLITS: dict[str, Split] = {"train": "train", "val": "heldout"}


def prepare(
    data_dir: str | Path,
    num_samples: int = 40_000,
    world_seed: int = 0,
    num_workers: int | None = None,
    num_val_samples: int = 512,
) -> None:
    """Prepare TinyWorld in `data_dir`; returns at once where the same was prepared before.

    The files are the same whatever `num_workers` (default: one for each core). A preparation that was killed is begun
    anew; two at the same time wait for each other.

    Raises:
        UserError: `data_dir` holds a data set with other settings, or files that are no data set; sizes below 1.
    """
    data_dir = Path(data_dir)
    if num_samples < 1 or num_val_samples < 1:
        raise UserError(
            f"TinyWorld needs samples: num_samples={num_samples}, num_val_samples={num_val_samples}, both at least 1."
        )
    settings = {
        "num_samples": num_samples,
        "num_val_samples": num_val_samples,
        "world_seed": world_seed,
        "world": world_version(world_seed),
    }
    if is_prepared(data_dir, settings, FOLDER_KEY):
        return
    with sole_preparation(data_dir, FOLDER_KEY):
        _clear(data_dir)
        if not is_prepared(data_dir, settings, FOLDER_KEY):  # the one that was waited for may have done it
            _prepare(data_dir, settings, num_workers or os.cpu_count() or 1)


def world_version(seed: int = 0) -> str:
    """A short hash of some samples: another value as soon as the world draws or says anything differently."""
    digest = hashlib.sha256()
    for split in SPLITS.values():
        for index in range(32):
            sample = draw(index, seed, split)
            digest.update(sample.image.tobytes())
            digest.update(json.dumps([sample.captions, sample.metadata], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _clear(data_dir: Path) -> None:
    """Remove what a killed preparation left behind."""
    if not (data_dir / MANIFEST).exists():
        for left_behind in (path for path in data_dir.iterdir() if path.is_dir()):
            shutil.rmtree(left_behind, ignore_errors=True)


def _prepare(data_dir: Path, settings: dict[str, Any], num_workers: int) -> None:
    start = time.monotonic()
    sizes = {"train": settings["num_samples"], "val": settings["num_val_samples"]}
    for split, size in sizes.items():
        _write_split(data_dir / split, split, size, settings["world_seed"], num_workers)
    _fit_components(data_dir, settings)
    write_manifest(data_dir, "tinyworld", sizes, {language: list(KINDS) for language in LANGUAGES}, settings)
    seconds = time.monotonic() - start
    Console().print(
        f"TinyWorld: {sum(sizes.values()):,} samples in {seconds:.0f} s "
        f"({sum(sizes.values()) / seconds:,.0f}/s), in {data_dir}",
        highlight=False,
    )


def _write_split(folder: Path, split: str, size: int, seed: int, num_workers: int) -> None:
    """Draw `size` samples and have litdata write them, each worker a row of full chunks, in order."""
    unfinished = folder.with_name(f".{split}-{os.getpid()}")  # its own: workers of a killed preparation may still write
    # The platform's own way to start processes: litdata sets its choice for the whole program, and its default, spawn,
    # would slow down every DataLoader that comes after.
    start_method = multiprocessing.get_start_method()
    done = multiprocessing.Value("q", 0)
    # litdata seeds Python's, numpy's and torch's random numbers: a run that prepares must not differ from another.
    with counter_progress(f"Drawing TinyWorld, {split}", size, done), isolate_rng():
        optimize(
            _DrawAndCount(seed, SPLITS[split], done),
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
    unfinished.rename(folder)


class _DrawAndCount:
    """What a worker does with a number: the sample, counted for the progress bar."""

    def __init__(self, seed: int, split: Split, done: "Synchronized[int]") -> None:
        self.seed, self.split, self.done = seed, split, done
        self.parent = 0  # process id, known at the first call

    def __call__(self, index: int) -> dict[str, Any]:
        self._leave_if_orphaned()
        sample = draw(index, self.seed, self.split)
        with self.done.get_lock():
            self.done.value += 1
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

    samples = [draw(index, settings["world_seed"]) for index in range(min(FIT_SAMPLES, settings["num_samples"]))]
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
    PatchPCACodec.fit(images.float() / 127.5 - 1, data_dir / "codec")
    texts = [text for sample in samples for kinds in sample.captions.values() for text in kinds.values()]
    build_tiny_qwen3(data_dir / "text_encoder", sorted(set(texts)), seed=settings["world_seed"])
