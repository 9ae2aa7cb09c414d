"""Hooks of mkdocs.yml: the README and CONTRIBUTING, which stand beside docs/, are pages of the site as they are."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}  # file -> page of the site


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(root / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to and from these files, as they are in the repository, to where they lead on the site."""
    beside_docs = page.file.src_uri in PAGES.values()
    for name, target in PAGES.items():
        markdown = markdown.replace(f"]({'' if beside_docs else '../'}{name}", f"]({target}")
    return markdown.replace("](docs/", "](") if beside_docs else markdown
