"""What a run's folder says about starting there: begin, continue where it stopped, or nothing left to do.

<output_dir>/config.yaml             the composed settings (an experiment file: it can be run again)
<output_dir>/run.json                {"status": "running" | "stopped" | "failed" | "finished", "step": …}
<output_dir>/checkpoints/last.ckpt   where `run.resume=auto` continues; a file, or a folder of a sharded run
.<name of output_dir>.lock           beside it: held by the command that is at work there
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from zimage_lit.config import RunSettings, as_typed, did_you_mean, flatten, read_yaml
from zimage_lit.errors import UserError
from zimage_lit.files import locked, read_json, write_atomically

# May differ between a run and its continuation: they change how long it runs and what is shown, not what is learned.
# Everything else that differs is an error, because the checkpoint belongs to other settings.
HARMLESS = (
    "description",
    "run.*",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.logger*",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "trainer.devices",  # the data's own state says whether batches stay what they were
    "trainer.num_nodes",
    "data.init_args.*num_workers",  # of a mixture's data sets too, and so below
    "data.init_args.*cache.*",
)
LIMITS = ("max_steps", "max_epochs", "max_time")
ABSENT = object()


@dataclass(frozen=True)
class Start:
    """How a run begins: from which checkpoint, whether there is nothing to do, and the line that says so."""

    checkpoint: Path | None = None
    finished: bool = False
    note: str = ""


def last_checkpoint(output_dir: Path) -> Path:
    return output_dir / "checkpoints" / "last.ckpt"


@contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """One command at a time: two would write over each other. Beside the folder, which resume=never moves aside; a run
    that is refused before it has a folder leaves nothing."""
    folder = output_dir.resolve()
    lock = folder.with_name(f".{folder.name}.lock")
    made = [parent for parent in lock.parents if not parent.exists()]
    busy = f"another command is at work in {output_dir}: wait for its end, stop it, or give another run.name."
    with locked(lock, "give another run.output_dir", busy):
        try:
            yield
        finally:
            if not folder.exists():
                lock.unlink(missing_ok=True)
                with suppress(OSError):  # where something else lies in them by now
                    for parent in made:
                        parent.rmdir()


def plan_start(run: RunSettings, config: dict[str, Any], first_process: bool) -> Start:
    """Decide from the folder alone, so that every process of a run decides alike; only the first one moves folders.

    `resume: never` moves an existing run to `<output_dir>.1` (`.2`, …): nothing is deleted. Raises UserError where the
    folder holds a run with other settings, or the checkpoint that `resume` names does not exist.
    """
    output_dir = Path(run.output_dir)
    if run.resume == "never":
        return Start(note=move_aside(output_dir) if first_process else "")
    if run.resume != "auto":
        return start_from(Path(run.resume), output_dir, first_process)
    checkpoint, old = last_checkpoint(output_dir), stored_config(output_dir)
    changed = differences(old, config) if old else {}
    if not checkpoint.exists():
        # an attempt that never reached a checkpoint: its settings no longer matter
        return Start(note=move_aside(output_dir) if changed and first_process else "")
    status = read_status(output_dir)
    if changed and first_process:
        state = "a finished" if status.get("status") == "finished" else "an unfinished"
        raise UserError(
            f"{output_dir} holds {state} run with other settings ({listed(changed)}): set them back,"
            " give another run.name, or start over with run.resume=never"
        )
    if status.get("status") == "finished" and old and limits(old) == limits(config):
        return Start(
            finished=True,
            note=f"{run.name} is finished (step {status.get('step')}, in {output_dir}): start over with"
            " run.resume=never, or go on with a larger trainer.max_steps (a decaying learning rate then rises again)",
        )
    return Start(checkpoint, note=f"continuing {run.name} from {checkpoint}")


def start_from(checkpoint: Path, output_dir: Path, first_process: bool) -> Start:
    """`run.resume=PATH`: a run that lies in the folder is kept only if the checkpoint is its own."""
    if not checkpoint.exists():
        hint = did_you_mean(str(checkpoint), ("auto", "never"))
        raise UserError(f"run.resume must be auto, never or a checkpoint: there is no {checkpoint}{hint}")
    own = output_dir.resolve() in checkpoint.resolve().parents
    moved = move_aside(output_dir) if first_process and not own else ""
    return Start(checkpoint, note="; ".join(part for part in (moved, f"continuing from {checkpoint}") if part))


def move_aside(output_dir: Path) -> str:
    """Rename the folder of an earlier run to the first free `<output_dir>.N`; a folder that is no run stays."""
    if not (output_dir / "run.json").is_file():
        return ""
    return f"the earlier run in {output_dir} is now in {set_aside(output_dir)}"


def set_aside(folder: Path) -> Path:
    """Rename a folder to the first free `<folder>.N`, and return that."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


# ---------------------------------------------------------------------------------------------------- the two files


def write_status(output_dir: Path, status: str, step: int) -> None:
    write_atomically(output_dir / "run.json", json.dumps({"status": status, "step": step}) + "\n")


def read_status(output_dir: Path) -> dict[str, Any]:
    path = output_dir / "run.json"
    return read_json(path, "delete it to continue from the last checkpoint") if path.is_file() else {}


def stored_config(output_dir: Path) -> dict[str, Any]:
    path = output_dir / "config.yaml"
    return read_yaml(path) if path.is_file() else {}


# ---------------------------------------------------------------------------------------------------- comparing


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for every setting that differs and matters."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key, ABSENT), after.get(key, ABSENT))
        for key in (before | after)
        if before.get(key, ABSENT) != after.get(key, ABSENT) and not any(fnmatch(key, pattern) for pattern in HARMLESS)
    }


def listed(changed: dict[str, tuple[Any, Any]]) -> str:
    def word(value: Any) -> str:
        return "absent" if value is ABSENT else as_typed(value)

    lines = [f"{key}: {word(old)} there, {word(new)} now" for key, (old, new) in changed.items()]
    return "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")


def limits(config: dict[str, Any]) -> list[Any]:
    return [config.get("trainer", {}).get(limit) for limit in LIMITS]
