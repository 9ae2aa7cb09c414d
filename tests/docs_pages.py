"""A page of docs/ as its reader would follow it: its blocks, its commands, and the things that it takes for given."""

import io
import re
import shlex
import socket
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zimage_lit import cli
from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.components import PatchPCACodec, build_tiny_qwen3
from zimage_lit.config import compose, list_experiments
from zimage_lit.pipeline import ZImagePipeline
from zimage_lit.validate import check_config

DOCS = Path(__file__).parents[1] / "docs"
PLACEHOLDER = "EXPERIMENT"  # where a page leaves the choice to the reader
GIVEN = {  # what the shipped experiments leave to the person who runs them
    "model.init_args.init_from": "models/z-image",
    "data.init_args.data_dir": "data/photos",
    "trainer.callbacks.samples.init_args.prompts": "[a boat]",
}


def blocks_of(page: str) -> list[tuple[str, str]]:
    """(language, content) of every block of a page of docs/, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[str]:
    """A block's commands; one goes on behind a backslash and up to the end of its here-document."""
    found = [""]
    for line in block.splitlines(keepends=True):
        found[-1] += line
        in_document = "<<'END'" in found[-1] and not found[-1].endswith("\nEND\n")
        if not in_document and not line.endswith("\\\n"):
            found.append("")
    return found[:-1]


def lightning_run(words: list[str]) -> tuple[int, str]:
    """(exit code, what was printed) of `lightning run …`, in this process."""
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(printed):
        code = cli.main(["run", *words])
    return code, printed.getvalue()


def run_words(command: str) -> list[str]:
    """What comes after `run` in a command that starts a run, by whichever launcher; nothing for any other command."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    words = words[: words.index("||")] if "||" in words else words
    for before in (["lightning"], ["zimage"], ["-m", "zimage_lit"]):
        for place in range(len(words)):
            if words[place : place + len(before) + 1] == [*before, "run"]:
                return words[place + len(before) + 1 :]
    return []


def tasks_of(page: str) -> set[str]:
    """Every task and experiment that a page's commands run."""
    blocks = [content for language, content in blocks_of(page) if language == "bash"]
    return {word for block in blocks for command in commands(block) for word in run_words(command)[:1]}


def check_settings(words: list[str]) -> None:
    """UserError for a setting that does not exist; what the experiment leaves open is given."""
    code, printed = lightning_run([*words, "--print-config"])
    given = [f"{key}={value}" for key, value in GIVEN.items() if f"{key} has no value" in printed]
    while code and given and (key := given[-1]) not in words:
        words = [*words, key]
        code, printed = lightning_run([*words, "--print-config"])
        given = [f"{key}={value}" for key, value in GIVEN.items() if f"{key} has no value" in printed]
    assert code == 0, f"{shlex.join(words)}\n{printed}"
    check_config(compose(words[0], words[1:]))


@dataclass
class Walk:
    """Who follows a page from its first block to its last: what was run, and what the page shows of it.

    small: first word after `run` -> settings that make it small. Commands of other words are only checked.
    """

    small: Mapping[str, list[str]]
    shown: list[tuple[str, str]] = field(default_factory=list)  # (what the page shows, what the command before printed)
    ran: dict[str, str] = field(default_factory=dict)  # command -> what it printed
    checked: list[str] = field(default_factory=list)  # commands whose settings alone were checked

    def follow(self, language: str, content: str) -> None:
        """A block; files, whose first line is a comment with their place, are written."""
        if language == "text" and self.ran:
            self.shown.append((content, list(self.ran.values())[-1]))
        elif named := re.match(r"# (\S+\.(?:py|yaml))\n", content):
            place = Path(named[1])
            place.parent.mkdir(exist_ok=True)
            place.write_text(content, encoding="utf-8")
        elif language == "bash":
            for command in commands(content):
                self.run(command)

    def run(self, command: str) -> None:
        words = run_words(command)
        if not words or words[0] == PLACEHOLDER:
            return
        if words[0] in self.small:
            code, printed = lightning_run([*words, *self.small[words[0]]])
            assert code == 0 or (code == 1 and "|| true" in command), f"{command}\n{printed}"
            self.ran[command] = printed
        else:
            assert words[0] in list_experiments(), f"make {words[0]} small, or mend the page: {command}"
            check_settings(words)
            self.checked.append(command)

    def count(self) -> int:
        """Commands that were run or checked."""
        return len([*self.ran, *self.checked])


def started_by(page: str) -> int:
    """How many commands of a page start a run by name."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return len(re.findall(rf"(?m)^(?:lightning|zimage) run (?!{PLACEHOLDER})", text))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def photograph(index: int) -> Image.Image:
    """A sky above a sea, of a size of its own."""
    dice = np.random.default_rng(index)
    width, height = dice.integers(80, 200, 2).tolist()
    picture = np.empty((height, width, 3), dtype=np.uint8)
    picture[: height // 2], picture[height // 2 :] = dice.integers(0, 256, (2, 3))
    return Image.fromarray(picture)


def write_pipeline(folder: Path) -> None:
    """The layout of a real one; as the quickstart exports it, but smaller, untrained, and padded as published."""
    config = S3DiTConfig(**{**vars(S3DiTConfig.preset("tiny")), "n_layers": 1, "pad_multiple": 32})
    pixels = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    ZImagePipeline(
        S3DiT(config),
        build_tiny_qwen3(folder.parent / "parts/text", ["a harbour at dusk with boats"]),
        PatchPCACodec.fit(pixels, folder.parent / "parts/codec"),
        height=64,
        width=64,
    ).save_pretrained(folder)
