"""Text as the benchmarks compare it: what an OCR judge's reply is cleaned of, what is left of a text, distances."""

import re
from collections import Counter
from collections.abc import Iterable

# What LongText-Bench and OneIG-Bench keep: CJK ideographs up to U+9FA5, ASCII letters and digits, French accents. All
# else vanishes, without a space in its place: punctuation, full-width digits, U+3007.
_KEPT = "\u4e00-\u9fa5a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ"
_DROPPED = re.compile(rf"[^{_KEPT}\s]")
_DROPPED_WITH_SPACES = re.compile(rf"[^{_KEPT}]")
_CHINESE = re.compile("[\u4e00-\u9fff]")


def words_only(text: str) -> str:
    """The kept characters, with runs of white space as one space."""
    return " ".join(_DROPPED.sub("", text).split())


def characters_only(text: str) -> str:
    """The kept characters without any white space."""
    return _DROPPED_WITH_SPACES.sub("", text)


def has_chinese(text: str) -> bool:
    return _CHINESE.search(text) is not None


def common(wanted: Iterable[str], read: Iterable[str]) -> int:
    """How many of the wanted words (or characters) were read, each reading serving once: order does not matter."""
    return (Counter(wanted) & Counter(read)).total()


def without(text: str, *phrases: str) -> str:
    """The text with every occurrence of each phrase taken out."""
    for phrase in phrases:
        text = text.replace(phrase, "")
    return text


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: insertions, deletions and substitutions at unit cost.

    One column of the table of distances is kept as bits of two integers, where it grows and where it falls from one
    row to the next (Myers 1999, in Hyyrö's form of 2003): texts of a thousand characters take a millisecond, where the
    table takes a second. The text metrics of torchmetrics are no substitute: they search a band of the table only.
    """
    if len(a) < len(b):
        a, b = b, a
    if not b:
        return len(a)
    where: dict[str, int] = {}
    for row, character in enumerate(b):
        where[character] = where.get(character, 0) | 1 << row
    everywhere, last = (1 << len(b)) - 1, 1 << (len(b) - 1)
    grows, falls, distance = everywhere, 0, len(b)
    for character in a:
        equal = where.get(character, 0)
        diagonal = (((equal & grows) + grows) ^ grows) | equal | falls
        right_grows, right_falls = falls | (everywhere & ~(diagonal | grows)), diagonal & grows
        distance += bool(right_grows & last) - bool(right_falls & last)
        right_grows, right_falls = (right_grows << 1) | 1, right_falls << 1
        grows = (right_falls | ~(diagonal | right_grows)) & everywhere
        falls = right_grows & diagonal & everywhere
    return distance
