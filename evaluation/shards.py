"""Several processes that share one evaluation: who does what, and who may write where."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from zimage_lit.errors import UserError

T = TypeVar("T")
ANOTHER_OUTPUT = "name another output=…"  # the way out where a folder cannot be used


@dataclass(frozen=True)
class Shard:
    """One process's share of the work: the `number`th, from 0, of `of`."""

    number: int = 0
    of: int = 1

    @property
    def suffix(self) -> str:
        """What its own files have in their names, nothing where one process does all."""
        return "" if self.of == 1 else f".shard{self.number + 1}of{self.of}"

    def share(self, items: Sequence[T], block: int = 1) -> list[T]:
        """Every `of`th block of so many items: which items lie in one block does not depend on the shards."""
        return [item for place, item in enumerate(items) if place // block % self.of == self.number]


def shard_of(text: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """The share that "1/3" names, else that of torchrun's RANK and WORLD_SIZE, else everything.

    UserError for a text of another form, or a number that is not among the shards.
    """
    if text is None:
        under_torchrun = {"RANK", "WORLD_SIZE"} <= environment.keys()
        shard = Shard(int(environment["RANK"]), int(environment["WORLD_SIZE"])) if under_torchrun else Shard()
    elif match := re.fullmatch(r"(\d+)/(\d+)", text):
        shard = Shard(int(match[1]) - 1, int(match[2]))
    else:
        raise UserError(f"shard must be such as 1/3, the first of three, not {text}.")
    if not 0 <= shard.number < shard.of:
        raise UserError(f"shard={text}: there are the shards 1/{shard.of} to {shard.of}/{shard.of}.")
    return shard
