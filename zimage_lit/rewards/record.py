"""What scored what: one line for each picture that was judged, in the run's folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zimage_lit.files import write_atomically
from zimage_lit.rewards.pictures import picture_hash


class RewardRecord:
    """A JSONL file with a line a picture:

        {"step", "image", "size": [width, height], "prompt", "group", "scores": {name: {"score", "version"}}}

    `image` is `picture_hash` of what the rewards saw; `group` the number that the stage gave its group, or null.
    `score` is null where the reward could not judge; a reward that does not apply to the prompt has no entry.
    Each process of a run writes a file of its own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(
        self,
        step: int,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        groups: Sequence[int | None],
        scores: Sequence[Mapping[str, Mapping[str, Any]]],
    ) -> None:
        lines = [
            json.dumps(
                {
                    "step": step,
                    "image": picture_hash(image),
                    "size": [image.shape[2], image.shape[1]],
                    "prompt": prompt,
                    "group": group,
                    "scores": given,
                },
                ensure_ascii=False,
            )
            for image, prompt, group, given in zip(images, prompts, groups, scores, strict=True)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(line + "\n" for line in lines))

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps (and a torn last one): a run that goes on from `step` takes those again."""
        if self.path.exists():
            # bytes: a torn line may end within a character, and text has other line ends, which a prompt may hold
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
            write_atomically(self.path, b"".join(kept))
