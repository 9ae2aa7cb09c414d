"""The review page: everything in one file, nothing in it that a prompt could run."""

import base64
import hashlib
import io
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zimage_lit.grids import encoded
from zimage_lit.pairs.review_page import PREVIEW, ShownPair, review_page

NASTY = "</h2><script>alert(1)</script><img src=x onerror='alert(2)'> & \"quoted\""


class Page(HTMLParser):
    """Tags with their attributes, and the text between."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def shown(name: str = "0a-1-2", size: tuple[int, int] = (32, 16), verdict: str | None = None) -> ShownPair:
    dice = np.random.default_rng(0)
    pictures = [Image.fromarray(dice.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(2)]
    winner, loser = (encoded(picture, "PNG") for picture in pictures)
    return ShownPair(name, NASTY, 0.25, 0.5, winner, loser, {"a<b": 1.0}, {"a<b": None}, verdict)


def test_prompts_and_names_are_text() -> None:
    page = Page(review_page([shown("<b>id")], "a <i>set</i>", "0123"))
    assert NASTY in page.texts and "a<b" in page.texts and "<b>id" in page.texts and "a <i>set</i>" in page.texts
    assert len(page.all("script")) == 1 and len(page.all("img")) == 2
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.all("article")[0]["data-id"] == "<b>id" and page.all("body")[0]["data-set"] == "0123"
    assert "not judged" in page.texts and "margin 0.25, difficulty 0.5" in page.texts


def test_only_the_pages_own_script_may_run() -> None:
    text = review_page([shown()], "set", "0123")
    policy = next(meta["content"] for meta in Page(text).all("meta") if "http-equiv" in meta)
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")


@pytest.mark.parametrize(("size", "form", "expected"), [((32, 16), "PNG", (32, 16)), ((1024, 512), "WEBP", (384, 192))])
def test_pictures_are_inside_the_page(size: tuple[int, int], form: str, expected: tuple[int, int]) -> None:
    pair = shown(size=size)
    for attributes, content in zip(
        Page(review_page([pair], "set", "0")).all("img"), (pair.winner, pair.loser), strict=True
    ):
        kind, _, data = attributes["src"].partition(";base64,")
        assert kind == f"data:image/{form.lower()}"
        inside = Image.open(io.BytesIO(base64.b64decode(data)))
        assert inside.size == expected and max(inside.size) <= PREVIEW
        if form == "PNG":
            assert inside.tobytes() == Image.open(io.BytesIO(content)).tobytes()


def test_an_earlier_verdict_is_shown() -> None:
    articles = Page(review_page([shown("a", verdict="dropped"), shown("b")], "set", "0")).all("article")
    assert [article.get("data-verdict") for article in articles] == ["dropped", None]
