"""What the text benchmarks compare, against twins that do the same the slow way."""

import random
import unicodedata

import pytest

from evaluation.benchmarks.text import characters_only, common, edit_distance, has_chinese, words_only

KEPT = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ")


def table_distance(a: str, b: str) -> int:
    """Wagner & Fischer's table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def texts(number, alphabet, length, seed=0):
    generator = random.Random(seed)
    return ["".join(generator.choices(alphabet, k=generator.randint(0, length))) for _ in range(number)]


@pytest.mark.parametrize(("alphabet", "length"), [("ab", 6), ("abc ", 12), ("一二三 a", 40), ("abcdefghij", 90)])
def test_edit_distance_equals_the_table(alphabet, length):
    for a, b in zip(texts(200, alphabet, length), texts(200, alphabet, length, seed=1), strict=True):
        assert edit_distance(a, b) == table_distance(a, b) == edit_distance(b, a), (a, b)


def test_edit_distance_of_a_long_text_to_parts_of_it():
    text = " ".join(texts(200, "abcdefgh", 6))
    assert edit_distance(text, text) == 0
    assert edit_distance(text, text[100:]) == 100
    assert edit_distance(text, "") == len(text)


def kept(character: str) -> bool:
    return character in KEPT or 0x4E00 <= ord(character) <= 0x9FA5


def test_what_is_kept_of_a_text_is_decided_character_by_character():
    alphabet = [chr(i) for i in range(0x3000) if unicodedata.category(chr(i)) != "Cs"]
    alphabet += [chr(i) for i in (0x3007, 0x4DFF, 0x4E00, 0x9FA5, 0x9FA6, 0x9FFF, 0xFF10, 0xFF21, 0x1F600)]
    for character in alphabet:
        assert characters_only(character) == (character if kept(character) else ""), hex(ord(character))
        middle = character if kept(character) else " " if character.isspace() else ""
        assert words_only(f"a{character}b") == f"a{middle}b", hex(ord(character))


def test_runs_of_space_are_one_and_punctuation_leaves_none():
    assert words_only(" Don't \n\t stop: 2-4 \u3000 km ") == "Dont stop 24 km"
    assert characters_only(" 雪 落·北平 2 ") == "雪落北平2"


def test_common_counts_every_reading_once():
    generator = random.Random(0)
    for _ in range(200):
        wanted, read = ("".join(generator.choices("abcd", k=generator.randint(0, 8))) for _ in range(2))
        left, found = list(read), 0
        for character in wanted:
            if character in left:
                left.remove(character)
                found += 1
        assert common(wanted, read) == found


def test_one_ideograph_makes_a_text_chinese():
    assert has_chinese("a 一") and not has_chinese("a 1 é 〇 ．")
