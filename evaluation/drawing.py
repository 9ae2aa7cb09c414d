"""A model draws what a benchmark plans, picture by picture, and goes on after a kill with those that are missing."""

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_modules.folder_lock import differences
from evaluation.benchmark_pass import BenchmarkPass
from evaluation.benchmarks.protocol import PlannedImage
from evaluation.shards import ANOTHER_OUTPUT, Shard
from zimage_lit.errors import UserError
from zimage_lit.files import locked, read_json, write_atomically
from zimage_lit.lora import base_fingerprint
from zimage_lit.pipeline import ZImagePipeline, save_picture
from zimage_lit.progress import progress_over

MANIFEST = "manifest.json"
TIMES = "times.jsonl"  # beside it: of each batch how many pictures, seconds, and forwards of the network for a picture


def drawing_settings(pipeline: ZImagePipeline, call: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """All that decides how a prompt's pictures look; the model by what it is, for it may lie elsewhere by then."""
    return {
        **call,
        "seed": seed,
        "shift": pipeline.defaults.shift,
        "dtype": str(pipeline.backbone.x_pad_token.dtype).removeprefix("torch."),
        "weights": base_fingerprint(pipeline.backbone.state_dict())[:16],
        "text_encoder": pipeline.text_encoder.fingerprint()[:16],
        "codec": pipeline.codec.fingerprint()[:16],
    }


def note_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note how the pictures in `folder` are drawn; UserError where there are some that were drawn otherwise."""
    note = folder / MANIFEST
    with locked(folder.parent / ".manifest.lock", ANOTHER_OUTPUT):
        if note.is_file():
            different = differences(read_json(note, f"delete {folder} and draw again"), settings)
            if different:
                raise UserError(
                    f"{folder} holds pictures drawn with {', '.join(different)}: give the same settings, name another "
                    "output=…, or delete that folder to draw anew."
                )
        elif folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir()):  # left by a kill right here
            raise UserError(
                f"{folder} holds pictures and no {MANIFEST}, so it is not known how they came about: give them as "
                "images=…, or name another output=…."
            )
        else:
            write_atomically(note, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def draw(pipeline: ZImagePipeline, work: BenchmarkPass, call: Mapping[str, Any], checkpoint: str, shard: Shard) -> None:
    """Draw a shard's pictures that are missing; each is on disk, with how it was made, as soon as its batch is there.

    Batches are the same whatever is missing of them, and whoever draws them: so no picture depends on a kill.
    """
    folder = work.pictures.folder
    planned = [image for prompt in work.share(shard) for image in work.plan(prompt)]
    missing = sum(not (folder / image.file).is_file() for image in planned)
    label = f"{work.part.title}: drawing"
    with progress_over(label, len(planned), len(planned) - missing) as done:
        for batch in _batches(work, shard):
            wanted = [image for image in batch if not (folder / image.file).is_file()]
            if not wanted:
                continue
            began = time.monotonic()
            pictures, evaluations = counted(
                pipeline,
                [image.prompt for image in batch],
                seed=[image.seed for image in batch],
                draw=[image.draw for image in batch],
                **call,
            )
            seconds = time.monotonic() - began
            for image, picture in zip(batch, pictures, strict=True):
                if image in wanted:
                    made = {"prompt": image.prompt, "seed": image.seed, "draw": image.draw, **call}
                    _write(picture, folder / image.file, {**made, "checkpoint": checkpoint})
            note_time(folder, len(batch), seconds, evaluations / len(batch))
            done(len(wanted))


def counted(pipeline: ZImagePipeline, prompts: list[str], **call: Any) -> tuple[list[Any], int]:
    """The pictures of a call, and how many samples went through the network for them all."""
    asked = 0

    def count(_: Any, arguments: Sequence[Any]) -> None:
        nonlocal asked
        asked += len(arguments[0])

    hook = pipeline.backbone.register_forward_pre_hook(count)
    try:
        return pipeline(prompts, **call), asked
    finally:
        hook.remove()


def note_time(folder: Path, pictures: int, seconds: float, evaluations: float) -> None:
    """A line more in the diary; no picture is lost for the want of one."""
    line = {"pictures": pictures, "seconds": round(seconds, 4), "evaluations": evaluations}
    with suppress(OSError), (folder / TIMES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _batches(work: BenchmarkPass, shard: Shard) -> Iterator[Sequence[PlannedImage]]:
    """The shard's pictures in batches of `drawn_together`, which no batch of another shard's is part of."""
    prompts = work.share(shard)
    block = -(-work.drawn_together // work.number)
    for start in range(0, len(prompts), block):
        images = [image for prompt in prompts[start : start + block] for image in work.plan(prompt)]
        for first in range(0, len(images), work.drawn_together):
            yield images[first : first + work.drawn_together]


def _write(picture: Any, path: Path, made: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    save_picture(picture, buffer, made)
    write_atomically(path, buffer.getvalue())
