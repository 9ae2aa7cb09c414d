"""A page of docs/ as its reader would follow it: its blocks, its commands, and the things that it takes for given."""

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zimage_lit import cli
from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.components import PatchPCACodec, build_tiny_qwen3
from zimage_lit.pipeline import ZImagePipeline

DOCS = Path(__file__).parents[1] / "docs"


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
