"""What TinyWorld can show, and which combinations training never sees.

Every statement that a picture can be asked to make is listed here in GenEval's form, once for each split. Held out,
by fixed tables and not by chance:

- `colors`: (class, colour) pairs: never drawn in train, whatever the task, and so never captioned;
- `counting`: (class, count) pairs: never drawn in train;
- `two_object`: unordered class pairs: never together in a train picture;
- `position`: statements "A left of / above B" with their mirror images "B right of / below A": never said in train;
- `color_attr`: unordered pairs of coloured objects: never together in a train picture, whatever the task;
- `word`: a list of words: never drawn in train, though each of their letters is.

`single_object` names one class and nothing else: it has no combination to hold out, both splits are the same.
Held-out statements of one task use nothing that another task holds out, so each task tests one thing.
"""

from collections.abc import Iterator
from functools import cache
from itertools import permutations, product
from typing import Any, Literal

Split = Literal["train", "heldout"]
Metadata = dict[str, Any]

CLASSES = ("circle", "square", "diamond", "cross", "ring", "moon")
COLORS = ("red", "yellow", "green", "blue", "purple", "pink", "white")
COUNTS = (1, 2, 3, 4)
MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TASKS = (*GENEVAL_TASKS, "word")

# Every colour once; no class more than twice.
HELDOUT_COLORS = frozenset({
    ("circle", "white"), ("square", "green"), ("square", "pink"), ("diamond", "purple"), ("cross", "yellow"),
    ("ring", "red"), ("moon", "blue"),
})  # fmt: skip
# Every count above one once; no class more than once.
HELDOUT_COUNTS = frozenset({("circle", 3), ("ring", 4), ("moon", 2)})
# Every class once.
HELDOUT_PAIRS = frozenset({
    frozenset({"circle", "moon"}), frozenset({"square", "cross"}), frozenset({"diamond", "ring"}),
})  # fmt: skip
# Every class stands once on each side of each relation; none of the held-out pairs occurs.
HELDOUT_POSITIONS = frozenset({
    ("circle", "left of", "square"), ("square", "left of", "ring"), ("ring", "left of", "moon"),
    ("moon", "left of", "diamond"), ("diamond", "left of", "cross"), ("cross", "left of", "circle"),
    ("square", "above", "moon"), ("moon", "above", "cross"), ("cross", "above", "ring"),
    ("ring", "above", "circle"), ("circle", "above", "diamond"), ("diamond", "above", "square"),
})  # fmt: skip
TRAIN_WORDS = (
    "A", "I", "AS", "AT", "BE", "BY", "DO", "GO", "HE", "IF", "IS", "IT", "OH", "OR", "SO", "TO", "UP", "US", "BED",
    "BOY", "BUS", "CAT", "CUP", "DAY", "EAR", "EAT", "EGG", "FLY", "FOG", "FUR", "GAS", "HAT", "HIT", "HOT", "ICE",
    "JOB", "JOY", "LEG", "LID", "LIP", "OIL", "PAD", "PEA", "PIE", "PIG", "RAT", "RED", "RIB", "ROD", "RUG", "SAD",
    "SEA", "SHY", "SIP", "SIT", "SUP", "TAG", "TAP", "TEA", "TIP", "TOP", "TOY", "TUB", "USE", "YES", "BALL",
    "BIRD", "BLUE", "BOAT", "BODY", "CAGE", "CITY", "COAL", "COLD", "DEAR", "DISH", "DUST", "EAST", "FACE", "FAST",
    "FIRE", "FLAG", "FOOD", "FROG", "GATE", "GIFT", "GOLD", "HAIR", "HEAD", "HERO", "IDEA", "JULY", "LADY", "LAST",
    "LEAF", "LIFE", "LUCY", "PATH", "POET", "POOR", "RAIL", "RICE", "ROAD", "ROSE", "SAFE", "SHIP", "SHOE", "SIDE",
    "SOUP", "STAR", "TALE", "TREE", "TYPE", "USED", "YEAR",
)  # fmt: skip
HELDOUT_WORDS = (
    "DOG", "JET", "PIT", "BAG", "LOAF", "HOUR", "SALT", "BEAR", "GIRL", "DUCT", "PUSH", "TOAD", "AH", "OF",
)  # fmt: skip


def is_heldout(metadata: Metadata) -> bool:
    """Whether a statement in GenEval's form (or a word) uses any held-out combination, of its own task or another's."""
    if metadata["tag"] == "word":
        return metadata["text"] in HELDOUT_WORDS
    include = metadata["include"]
    if any((clause["class"], clause.get("color")) in HELDOUT_COLORS for clause in include):
        return True
    if metadata["tag"] == "counting":
        return any((clause["class"], clause["count"]) in HELDOUT_COUNTS for clause in include)
    if len(include) < 2:
        return False
    first, second = include
    if frozenset({first["class"], second["class"]}) in HELDOUT_PAIRS:
        return True
    if "position" in second and is_heldout_position(second["class"], second["position"][0], first["class"]):
        return True
    return "color" in first and "color" in second and is_heldout_scene(*((c["class"], c["color"]) for c in include))


def is_heldout_position(subject: str, relation: str, reference: str) -> bool:
    """Whether "subject relation reference", or the same said from the other side, is held out."""
    mirrored = (reference, MIRROR[relation], subject)
    return (subject, relation, reference) in HELDOUT_POSITIONS or mirrored in HELDOUT_POSITIONS


def is_heldout_scene(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether two (class, colour) objects in one picture are a held-out attribution: one in five, by their numbers."""
    return (_object_number(*first) + _object_number(*second)) % 5 == 0


def _object_number(name: str, color: str) -> int:
    return len(COLORS) * CLASSES.index(name) + COLORS.index(color)


@cache
def statements(task: str, split: Split) -> tuple[Metadata, ...]:
    """All that a split may say in a task: metadata without "prompt", in a fixed order. Do not change the entries.

    A held-out statement breaks the rule of its own task only (see the module's docstring).
    """
    wanted = split == "heldout" and task != "single_object"
    found = []
    for metadata in _candidates(task):
        own, other = _broken_rules(metadata)
        if own == wanted and not other:
            found.append(metadata)
    return tuple(found)


def _broken_rules(metadata: Metadata) -> tuple[bool, bool]:
    """(the task's own combination is held out, something else in the statement is)."""
    task, include = metadata["tag"], metadata.get("include", [])
    if task in ("word", "counting", "colors"):
        return is_heldout(metadata), False
    pair = len(include) == 2 and frozenset(clause["class"] for clause in include) in HELDOUT_PAIRS
    if task in ("single_object", "two_object"):
        return pair, False
    painted = any((clause["class"], clause.get("color")) in HELDOUT_COLORS for clause in include)
    if pair or painted:
        return False, True
    return is_heldout(metadata), False


def _candidates(task: str) -> Iterator[Metadata]:
    """Every statement of a task, held out or not, in GenEval's form: reference object first, placed one second."""
    if task == "word":
        yield from ({"tag": task, "text": text} for text in TRAIN_WORDS + HELDOUT_WORDS)
    elif task == "single_object":
        yield from ({"tag": task, "include": [{"class": name, "count": 1}]} for name in CLASSES)
    elif task == "colors":
        for name, color in product(CLASSES, COLORS):
            yield {"tag": task, "include": [{"class": name, "count": 1, "color": color}]}
    elif task == "counting":
        for name, count in product(CLASSES, COUNTS):
            exclude = [{"class": name, "count": count + 1}]
            yield {"tag": task, "include": [{"class": name, "count": count}], "exclude": exclude}
    elif task == "two_object":
        for names in permutations(CLASSES, 2):
            yield {"tag": task, "include": [{"class": name, "count": 1} for name in names]}
    elif task == "position":
        for (reference, subject), relation in product(permutations(CLASSES, 2), MIRROR):
            placed = {"class": subject, "count": 1, "position": [relation, 0]}
            yield {"tag": task, "include": [{"class": reference, "count": 1}, placed]}
    elif task == "color_attr":
        for names, colors in product(permutations(CLASSES, 2), permutations(COLORS, 2)):
            objects = zip(names, colors, strict=True)
            yield {"tag": task, "include": [{"class": n, "count": 1, "color": c} for n, c in objects]}
    else:
        raise ValueError(f"TinyWorld knows no task {task!r}: choose one of {', '.join(TASKS)}.")
