"""TinyWorld's captions: plain sentences in English and Chinese, of five kinds, that say only what the picture shows.

`short` is GenEval's own phrasing and always the same; the other kinds have a few templates each, and may name colours
that GenEval's statement leaves open. `tags` count "shapes" and not circles, so that numbers are learnt apart from what
is counted: no picture shows all counts of all classes.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

from data_modules.tinyworld.combinations import Metadata

KINDS = ("tags", "short", "medium", "long", "user")
LANGUAGES = ("en", "zh")
Thing = tuple[str, str]  # (class, colour)
T = TypeVar("T")

_NUMBERS = {"en": ("no", "one", "two", "three", "four"), "zh": ("零", "一", "两", "三", "四")}
_PLURALS = {"cross": "crosses"}
_CHINESE = {
    "circle": "圆形", "square": "正方形", "diamond": "菱形", "cross": "十字", "ring": "圆环", "moon": "月牙",
    "shape": "图形", "red": "红色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色", "pink": "粉色",
    "white": "白色", "left of": "左边", "right of": "右边", "above": "上面", "below": "下面",
}  # fmt: skip

# {0} is the scene as a phrase. One template a line.
_TEMPLATES = {
    "en": {
        "short": ("a photo of {0}",),
        "medium": ("a picture of {0} on a dark background", "{0}, on plain black", "a simple drawing that shows {0}"),
        "long": (
            "This is a simple picture with a plain dark background. It shows {0}. There is nothing else in it.",
            "A small, clean drawing of {0} in front of an even dark background, with nothing else in it.",
        ),
        "user": ("draw {0}", "{0} please", "can you make a picture of {0}?", "i want {0}"),
    },
    "zh": {
        "short": ("一张{0}的照片",),
        "medium": ("深色背景上的{0}", "一幅简单的画，画着{0}", "{0}，深色的背景"),
        "long": (
            "这是一幅简单的画，背景是纯深色。画面里有{0}。除此之外什么都没有。",
            "一幅干净的小画：均匀的深色背景前有{0}，没有别的东西。",
        ),
        "user": ("画{0}", "请画{0}", "帮我画一张{0}的图", "我想要{0}"),
    },
}


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of the options; built on `random()` alone, whose values Python promises to keep from version to version."""
    return options[int(rng.random() * len(options))]


def captions(metadata: Metadata, things: Sequence[Thing], rng: random.Random) -> dict[str, dict[str, str]]:
    """All captions of a picture: language -> kind -> text.

    `metadata` is the statement in GenEval's form, `things` the (class, colour) of every drawn object in the order of
    its include clauses (nothing for words).
    """
    return {
        language: {kind: _caption(language, kind, metadata, things, rng) for kind in KINDS} for language in LANGUAGES
    }


def prompt(metadata: Metadata, language: str = "en") -> str:
    """The `short` caption of a statement: GenEval's phrasing, the same every time. `language` is "en" or "zh"."""
    if language not in LANGUAGES:
        raise ValueError(f"TinyWorld speaks {' and '.join(LANGUAGES)}, not {language!r}.")
    return _TEMPLATES[language]["short"][0].format(_scene(language, metadata, ()))


def _caption(language: str, kind: str, metadata: Metadata, things: Sequence[Thing], rng: random.Random) -> str:
    if kind == "tags":
        return _tags(language, metadata, things)
    # Colours that the statement leaves open: always named in the longer kinds, in half of the user's requests.
    named = things if kind in ("medium", "long") or (kind == "user" and rng.random() < 0.5) else ()
    return pick(rng, _TEMPLATES[language][kind]).format(_scene(language, metadata, named))


def _scene(language: str, metadata: Metadata, things: Sequence[Thing]) -> str:
    """The picture's content as a phrase. Colours come from the statement, or from `things` where those are given."""
    if metadata["tag"] == "word":
        return f'the word "{metadata["text"]}"' if language == "en" else f"单词“{metadata['text']}”"
    include = metadata["include"]
    colors = [clause.get("color", "") for clause in include]
    if things:
        colors = [color for _, color in things[: len(include)]]
    phrases = [
        _noun(language, clause["class"], color, clause["count"], metadata["tag"] == "counting")
        for clause, color in zip(include, colors, strict=True)
    ]
    if len(phrases) == 1:
        return phrases[0]
    relation = include[1].get("position", ("",))[0]
    if not relation:
        return f"{phrases[0]} and {phrases[1]}" if language == "en" else f"{phrases[0]}和{phrases[1]}"
    # GenEval lists the reference object first; the sentence begins with the placed one.
    if language == "en":
        return f"{phrases[1]} {relation} {phrases[0]}"
    return f"{phrases[1]}在{phrases[0]}{_CHINESE[relation]}"


def _noun(language: str, name: str, color: str, count: int, counted: bool) -> str:
    if language == "zh":
        return f"{_NUMBERS['zh'][count]}个{_CHINESE.get(color, '')}{_CHINESE[name]}"
    article = _NUMBERS["en"][count] if counted else "a"
    noun = name if count == 1 else _PLURALS.get(name, name + "s")
    return " ".join(word for word in (article, color, noun) if word)


def _tags(language: str, metadata: Metadata, things: Sequence[Thing]) -> str:
    comma = ", " if language == "en" else "，"
    if metadata["tag"] == "word":
        return f'word, "{metadata["text"]}"' if language == "en" else f"单词，“{metadata['text']}”"
    include = metadata["include"]
    if metadata["tag"] == "counting":
        _, color = things[0]
        counted = _noun(language, "shape", "", include[0]["count"], True)
        return comma.join((counted, color if language == "en" else _CHINESE[color]))
    tags = [f"{color} {name}" if language == "en" else _CHINESE[color] + _CHINESE[name] for name, color in things]
    if "position" in include[-1]:
        relation = include[1]["position"][0]
        reference, subject = include[0]["class"], include[1]["class"]
        if language == "en":
            tags.append(f"{subject} {relation} {reference}")
        else:
            tags.append(f"{_CHINESE[subject]}在{_CHINESE[reference]}{_CHINESE[relation]}")
    return comma.join(tags)
