"""The file of votes: one JSON object a line, checked to the last key."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from zimage_lit.errors import UserError
from zimage_lit.files import parse_json

WINNERS = ("model_a", "model_b", "tie", "both_bad")


class Vote(NamedTuple):
    """What one person said of two pictures of one prompt."""

    model_a: str
    model_b: str
    winner: str  # of WINNERS: which of the two, or neither because both are good, or bad
    prompt_id: str
    seed: int  # of both pictures
    annotator: str  # any name for the person
    timestamp: str  # ISO 8601


def read_votes(path: Path) -> list[Vote]:
    """The votes of a .jsonl file; empty lines are skipped.

    UserError, with the number of the line and the key, for a line that is no vote or has been written twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"votes={path} cannot be read ({error}): name a .jsonl file of votes.") from error
    first: dict[Vote, int] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            vote = checked(parse_json(line, place, "write one vote a line"), place)
            if vote in first:
                raise UserError(
                    f"{place} is the same vote as line {first[vote]}, to the timestamp: delete one of them."
                )
            first[vote] = number
    if not first:
        raise UserError(f"votes={path} holds no votes: write one JSON object a line.")
    return list(first)


def checked(line: dict[str, Any], place: str) -> Vote:
    """The vote that a line is; UserError that names the `place` and the key for any other."""
    for key in Vote._fields:
        if key not in line:
            raise UserError(f"{place}: the key {key} is missing: a vote has {', '.join(Vote._fields)}.")
    for key, value in line.items():
        if key not in Vote._fields:
            raise UserError(f"{place}: the key {key} is unknown: a vote has {', '.join(Vote._fields)}.")
        wanted = int if key == "seed" else str
        if type(value) is not wanted or value == "":
            kind = "a whole number" if wanted is int else "a text, and not empty"
            raise UserError(f"{place}: {key} must be {kind}, not {json.dumps(value)}.")
    if line["winner"] not in WINNERS:
        raise UserError(f"{place}: winner must be one of {', '.join(WINNERS)}, not {line['winner']!r}.")
    if line["model_a"] == line["model_b"]:
        raise UserError(f"{place}: model_a and model_b are both {line['model_a']!r}: a vote is about two models.")
    try:
        datetime.fromisoformat(line["timestamp"])
    except ValueError:
        raise UserError(
            f"{place}: timestamp must be a time such as 2026-01-31T12:00:00Z, not {line['timestamp']!r}."
        ) from None
    return Vote(**line)
