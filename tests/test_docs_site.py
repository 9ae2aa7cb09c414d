"""The documentation as a site: it is built without a warning, and reads without anything from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOWHERE = "http://127.0.0.1:9"  # a proxy that does not answer
LINKS = ("a", "area")  # what a reader follows or does not; all else the browser fetches by itself


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built without the internet. `--strict` makes errors of broken links and of pages that nav lacks."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


class Fetched(HTMLParser):
    """The addresses that a page makes a browser fetch."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data") and tag not in LINKS]


def test_every_page_of_docs_is_on_the_site_and_in_its_navigation(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 15
    for page in [*pages, Path("contributing.md")]:
        assert (site / page).with_suffix(".html").is_file()
        assert f'href="{page.with_suffix(".html").as_posix()}"' in home


def test_nothing_is_fetched_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    fetched = {address for page in pages for address in Fetched(page).addresses}
    assert any(address.endswith(".js") for address in fetched) and any(address.endswith(".css") for address in fetched)
    assert [address for address in fetched if re.match(r"(\w+:)?//", address)] == []
    styles = "".join(style.read_text(encoding="utf-8") for style in site.rglob("*.css"))
    assert styles and not re.search(r"url\([\"']?(\w+:)?//|@import", styles)
    pictures = [picture.read_text(encoding="utf-8") for picture in (site / "images").glob("*.svg")]
    assert pictures and not any(re.search(r"<script|href=|url\((?!#)|@import", picture) for picture in pictures)


def test_every_name_that_the_reference_lists_is_shown(site):
    listed = re.compile(r"::: (\S+)(?:\n    options:\n      members: \[([^]]+)\])?")
    for page in (ROOT / "docs/reference").glob("*.md"):
        shown = (site / "reference" / page.with_suffix(".html").name).read_text(encoding="utf-8")
        objects = listed.findall(page.read_text(encoding="utf-8"))
        names = [f"{name}.{member}" for name, members in objects for member in re.findall(r"\w+", members)]
        assert objects and [name for name in names if f'id="{name}"' not in shown] == []


def test_the_reference_tells_what_a_docstring_tells_of_each_argument(site):
    page = re.sub(r"\s+", " ", (site / "reference/stages.html").read_text(encoding="utf-8"))
    assert "<code>caption_dropout</code>: share of captions replaced by the empty one" in page
    assert "<code>muon_lr</code>: peak learning rate of Muon, on AdamW's scale" in page  # a field and its comment
