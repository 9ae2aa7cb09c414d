"""Prepare a folder of mixed pictures, one in twenty of them broken, and see that each arrives or is named rightly.

    python benchmarks/prepare_folder.py                    # 2,000 pictures of 100-3000 pixels, a few minutes
    python benchmarks/prepare_folder.py --count 200 --largest 800

The folder is made anew from a seed: eight formats, odd modes, turned by EXIF, captions in English and Chinese; ten ways
of being broken. It is prepared twice, by one process and by several, and every output file must be the same. Prints a
table and one line of JSON; exit code 1 where anything is not as expected.
"""

import argparse
import hashlib
import io
import json
import os
import random
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# Ending, Pillow's name, and the modes in which pictures of that format are made.
FORMATS = {
    ".jpg": ("JPEG", ("RGB", "RGB", "L", "CMYK", "turned")),
    ".png": ("PNG", ("RGB", "RGBA", "LA", "P", "1", "I;16")),
    ".webp": ("WEBP", ("RGB", "RGBA")),
    ".tiff": ("TIFF", ("RGB", "CMYK", "I;16", "1")),
    ".bmp": ("BMP", ("RGB", "P")),
    ".gif": ("GIF", ("P", "L")),
    ".avif": ("AVIF", ("RGB", "RGBA")),
    ".ppm": ("PPM", ("RGB", "L")),
}
OPTIONS = {"AVIF": {"speed": 10}, "WEBP": {"method": 0}, "PNG": {"compress_level": 1}}


def main() -> int:
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        expected = make_folder(folder / "pictures", options.count, options.largest, options.seed)
        size = sum(path.stat().st_size for path in (folder / "pictures").rglob("*"))
        print(f"{options.count:,} pictures, {size / 2**20:,.0f} MiB, {len(expected)} of them broken", flush=True)
        return judge(folder, options, expected)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--largest", type=int, default=3000, help="pixels of the longest side")
    parser.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 1), help="of the second preparation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; the system's folder for temporary files")
    return parser.parse_args()


def judge(folder: Path, options: argparse.Namespace, expected: dict[str, str]) -> int:
    from data_modules.preparation import PrepareSettings, prepare

    seconds = {}
    for workers in (1, options.workers):
        start = time.monotonic()
        output = folder / f"by{workers}" / "data"
        prepare(PrepareSettings(str(folder / "pictures"), str(output), part_size=100, num_workers=workers))
        seconds[workers] = time.monotonic() - start
    rejected = {}
    for line in (folder / "by1" / "data" / "rejected.jsonl").read_text(encoding="utf-8").splitlines():
        rejected[json.loads(line)["source"]] = json.loads(line)["reason"].partition(":")[0]
    arrived = json.loads((folder / "by1" / "data" / "manifest.json").read_text(encoding="utf-8"))["splits"]["train"]
    same = hashes(folder / "by1") == hashes(folder / f"by{options.workers}")
    print(f"{'reason':20} {'expected':>8} {'rejected':>8}")
    for reason in sorted({*expected.values(), *rejected.values()}):
        print(f"{reason:20} {Counter(expected.values())[reason]:8} {Counter(rejected.values())[reason]:8}")
    right = rejected == expected and arrived == options.count - len(expected)
    result = {
        "pictures": options.count,
        "arrived": arrived,
        "rejected": len(rejected),
        "each_broken_one_named_rightly": right,
        "identical_bytes": same,
        "seconds": {f"{workers}_workers": round(value, 1) for workers, value in seconds.items()},
        "pictures_per_second": {
            f"{workers}_workers": round(options.count / value, 1) for workers, value in seconds.items()
        },
    }
    print(json.dumps(result))
    return 0 if right and same else 1


def hashes(folder: Path) -> dict[str, str]:
    """Path below the folder -> SHA-256 of every file."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# ---------------------------------------------------------------------------------------------------- the pictures


def make_folder(folder: Path, count: int, largest: int, seed: int = 0, broken_every: int = 20) -> dict[str, str]:
    """Write `count` pictures with captions, in three folders; gives name -> kind of reason of those to be rejected."""
    endings, ways = list(FORMATS), list(BREAKERS)
    expected = {}
    for number in range(count):
        dice = random.Random(f"{seed}/{number}")
        ending = endings[number % len(endings)]
        form, modes = FORMATS[ending]
        mode = modes[number // len(endings) % len(modes)]
        path = folder / ("abc"[number % 3]) / f"{number:05d}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = (round(100 * (largest / 100) ** dice.random()) for _ in range(2))
        content, caption = encoded(draw(width, height, dice), form, mode), f"picture number {number}, {width}x{height}"
        sidecar: tuple[str, str] | None = (".txt", caption)
        if number % 2:
            captions = {"en": {"short": caption, "tags": "picture, number"}, "zh": {"short": f"第{number}张图片"}}
            sidecar = (".json", json.dumps({"captions": captions, "number": number}, ensure_ascii=False))
        if number % broken_every == broken_every // 2:
            way = ways[number // broken_every % len(ways)]
            path, content, sidecar = BREAKERS[way](path, content, sidecar)
            expected[path.relative_to(folder).as_posix()] = way.partition(",")[0]
        path.write_bytes(content)
        if sidecar:
            path.with_suffix(sidecar[0]).write_text(sidecar[1], encoding="utf-8")
    return expected


def draw(width: int, height: int, dice: random.Random) -> Image.Image:
    """Soft colours with some detail, quick to make at any size."""
    small = np.random.default_rng(dice.randrange(2**32)).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, form: str, mode: str) -> bytes:
    options = dict(OPTIONS.get(form, {}))
    if mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    elif mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L"), dtype=np.uint16) * 257)
    elif mode == "P":
        picture = picture.quantize(64, method=Image.Quantize.FASTOCTREE)
    elif mode in ("RGBA", "LA"):
        picture = picture.convert(mode)
        picture.putalpha(picture.getchannel(0))
    elif mode != "RGB":
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- broken ones

Parts = tuple[Path, bytes, tuple[str, str] | None]  # path, content, (ending and text of the sidecar)


def a_bomb() -> bytes:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def a_jpeg() -> bytes:
    return encoded(draw(120, 90, random.Random(0)), "JPEG", "RGB")


def a_damaged_png() -> bytes:
    content = bytearray(encoded(draw(120, 90, random.Random(0)), "PNG", "RGB"))
    content[200:240] = bytes(40)
    return bytes(content)


# The kind of reason, and after a comma how it comes about.
BREAKERS: dict[str, Callable[[Path, bytes, tuple[str, str] | None], Parts]] = {
    "empty file": lambda path, content, sidecar: (path, b"", sidecar),
    "not a picture": lambda path, content, sidecar: (path, b"once upon a time " * 9, sidecar),
    "broken picture, cut off": lambda path, content, sidecar: (path.with_suffix(".jpg"), a_jpeg()[:-400], sidecar),
    "broken picture, damaged": lambda path, content, sidecar: (path.with_suffix(".png"), a_damaged_png(), sidecar),
    "wrong extension": lambda path, content, sidecar: (path.with_suffix(".webp"), a_jpeg(), sidecar),
    "too large": lambda path, content, sidecar: (path.with_suffix(".png"), a_bomb(), sidecar),
    "too small": lambda path, content, sidecar: (
        path.with_suffix(".jpg"),
        encoded(draw(300, 63, random.Random(0)), "JPEG", "RGB"),
        sidecar,
    ),
    "no caption": lambda path, content, sidecar: (path, content, None),
    "empty caption": lambda path, content, sidecar: (path, content, (".txt", " \n")),
    "caption too long": lambda path, content, sidecar: (path, content, (".txt", "very " * 2000)),
}


if __name__ == "__main__":
    sys.exit(main())
