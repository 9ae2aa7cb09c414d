"""Samples a second of our loader against a plain folder loader and a WebDataset loader, in one process.

    python benchmarks/data.py                          # 200 pictures, 5 rounds, a few minutes on one core

Draws photograph-like pictures of 600 to 3,000 pixels a side (noise with the spectrum of photographs; JPEG, a few PNG,
some turned by EXIF, half with an sRGB profile) with captions, and reads all of them every turn, whichever loader's turn
it is. Every loader ends at the same thing: uint8 RGB tensors of the same training sizes and the captions, turned as
EXIF says, scaled until they cover the size and cut in the middle. One thread, no workers.

ours                 a prepared data set, TextToImageDataModule with a token budget; read_picture's colour management
                     and checks, JPEGs far larger than they are trained at decoded at a half or less, torch's Lanczos
ours, full decode    the same with every JPEG decoded in full
folder               a Dataset over the files in a DataLoader: Pillow, convert to RGB, ImageOps.fit with Lanczos;
                     batches by count, training sizes known beforehand, colour profiles ignored
folder, bilinear     the same with the filter that torchvision takes unless told otherwise
webdataset           the same files in a tar: .decode("pil"), then as folder
folder, webdataset + our decoding    the two with `training_picture` in place of Pillow's calls: what storage and
                     batches cost alone
encoded              `lightning run encode` of the same data: latents of 16 channels at an eighth of the size, features
                     2,560 wide, both bfloat16, given out as float32

The loaders take turns, as other work on the machine comes and goes; medians, lowest and highest are of the turns, by
the clock and by the processor's time for this one thread, which other work disturbs less; the ratios are of the latter.
A turn of `encoded` is ten epochs, since one is over at once. Pads: of sequences packed (the backbone's way), and
of batches padded to their longest. Prints tables and one line of JSON.
"""

import argparse
import io
import json
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import webdataset
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from data_modules import TextToImageDataModule
from data_modules.buckets import SizeMapping, image_tokens
from data_modules.encoding import EncodeSettings, encode
from data_modules.images import training_picture
from data_modules.planning import PLANNING, PlanSettings, SampleTable, padding_share, plan_epoch, read_table
from data_modules.preparation import PrepareSettings, prepare
from zimage_lit.components import PatchPCACodec, build_tiny_qwen3

ASPECTS = (4 / 3, 3 / 2, 3 / 2, 16 / 9, 1.0, 3 / 4, 2 / 3)
SMALLEST, LARGEST = 600, 3000  # pixels of a side
FEATURES = 2560  # the width of Qwen3-4B's
ENCODED_EPOCHS = 10
OTHERS = ("folder", "folder, bilinear", "webdataset")
OTHERS_BY_US = ("folder + our decoding", "webdataset + our decoding")

Transform = Callable[[bytes, str], torch.Tensor]  # (a file's bytes, its name) -> uint8 (3, H, W)
Speeds = dict[str, list[tuple[float, float]]]
Pass = Callable[[], int]  # reads every sample; gives how many there were


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        bits = make_pictures(folder / "pictures", options.count)
        stored = sum(path.stat().st_size for path in (folder / "pictures").iterdir())
        print(f"{options.count} pictures, {stored / 2**20:.0f} MiB, JPEGs of {bits:.2f} bits a pixel")
        make_data_sets(folder, options.resolution)
        report(options, take_turns(passes(folder, options), options), tokens_and_pads(folder, options))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--batch-size", type=int, default=12, help="of the others; about what the budget makes of ours")
    parser.add_argument("--folder", type=Path, help="where to work; the system's folder for temporary files")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------- the data


def make_pictures(folder: Path, count: int) -> float:
    """Pictures and captions, the same every time; gives the bits that a JPEG has for each pixel."""
    folder.mkdir()
    canvas, dice = draw_canvas(), random.Random(0)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 9))) for _ in range(400)]
    jpeg_bytes = jpeg_pixels = 0
    for number in range(count):
        width, height = draw_size(dice)
        rows = np.arange(height) + dice.randrange(LARGEST)
        columns = np.arange(width) + dice.randrange(LARGEST)
        picture = Image.fromarray(canvas[np.ix_(rows % LARGEST, columns % LARGEST)])
        exif = Image.Exif()
        if number % 10 == 3:
            exif[0x0112] = 6
        profile = {"icc_profile": srgb} if number % 2 else {}
        path = folder / f"{number:05d}.{'png' if number % 20 == 0 else 'jpg'}"
        picture.save(path, exif=exif, **({} if path.suffix == ".png" else {"quality": 90}), **profile)
        path.with_suffix(".txt").write_text(" ".join(dice.choices(words, k=dice.randint(8, 120))))
        if path.suffix == ".jpg":
            jpeg_bytes, jpeg_pixels = jpeg_bytes + path.stat().st_size, jpeg_pixels + width * height
    return 8 * jpeg_bytes / jpeg_pixels


def draw_canvas() -> np.ndarray:
    """Noise whose amplitude falls as the frequency grows, as that of photographs does: uint8 (LARGEST, LARGEST, 3).

    It has no border: the left edge goes on at the right, the upper one below.
    """
    dice = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(LARGEST)[:, None], np.fft.rfftfreq(LARGEST)[None])
    frequency[0, 0] = np.inf
    layers = []
    for _ in range(3):
        noise = np.fft.irfft2(np.fft.rfft2(dice.standard_normal((LARGEST, LARGEST))) / frequency, (LARGEST, LARGEST))
        layers.append(noise / noise.std())
    light, warm, green = layers
    channels = np.stack([light + 0.3 * warm, light + 0.2 * green, light - 0.3 * warm], -1)
    grain = dice.normal(0, 1, (LARGEST, LARGEST, 1))
    return np.asarray((channels * 45 + 128 + grain).clip(0, 255), dtype=np.uint8)


def draw_size(dice: random.Random) -> tuple[int, int]:
    while True:
        area = SMALLEST**2 * (LARGEST / SMALLEST) ** (2 * dice.random())
        aspect = dice.choice(ASPECTS)
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if min(width, height) >= SMALLEST and max(width, height) <= LARGEST:
            return width, height


def make_data_sets(folder: Path, resolution: int) -> None:
    """Beside the pictures: pictures.tar, prepared/ and encoded/."""
    pictures = folder / "pictures"
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, path.name)
    prepare(PrepareSettings(str(pictures), str(folder / "prepared"), num_workers=1))
    some = [training_picture(path.read_bytes(), SizeMapping(128)) for path in sorted(pictures.glob("*.jpg"))[:64]]
    crops = torch.from_numpy(np.stack([picture[:64, :64] for picture in some])).permute(0, 3, 1, 2)
    PatchPCACodec.fit(crops.float() / 127.5 - 1, folder / "codec")
    make_text_encoder(folder / "text_encoder", [path.read_text() for path in sorted(pictures.glob("*.txt"))])
    sizes = {"resolution": resolution}
    places = {"data": "prepared", "output": "encoded", "codec": "codec", "text_encoder": "text_encoder"}
    encode(EncodeSettings(**{key: str(folder / name) for key, name in places.items()}, sizes=sizes, device="cpu"))


def make_text_encoder(folder: Path, captions: list[str]) -> None:
    """One whose features are as wide as a real one's, with next to nothing else in it."""
    from transformers import Qwen3Config, Qwen3Model  # takes seconds to import

    build_tiny_qwen3(folder, captions, hidden_size=32, num_layers=2)
    config = Qwen3Config.from_pretrained(folder)
    config.hidden_size = FEATURES
    torch.manual_seed(0)
    Qwen3Model(config).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------- the loaders


def passes(folder: Path, options: argparse.Namespace) -> dict[str, Pass]:
    sizes = SizeMapping(options.resolution)
    known = training_sizes(folder / "pictures", sizes)

    def plain(filter: Image.Resampling) -> Transform:
        return lambda content, name: pil_to_tensor(fitted(Image.open(io.BytesIO(content)), known[name], filter))

    def by_us(content: bytes, name: str) -> torch.Tensor:
        return torch.from_numpy(np.require(training_picture(content, sizes), requirements="W")).permute(2, 0, 1)

    def of_decoded(picture: Image.Image, name: str) -> torch.Tensor:
        return pil_to_tensor(fitted(picture, known[name], Image.Resampling.LANCZOS))

    lanczos = plain(Image.Resampling.LANCZOS)
    ours, size = our_pass(folder / "prepared", options.token_budget, sizes), options.batch_size
    return {
        "ours": ours,
        "folder": folder_pass(folder / "pictures", lanczos, size),
        "webdataset": webdataset_pass(folder / "pictures.tar", "pil", of_decoded, size),
        "ours, full decode": full_decode(ours),
        "folder, bilinear": folder_pass(folder / "pictures", plain(Image.Resampling.BILINEAR), size),
        "folder + our decoding": folder_pass(folder / "pictures", by_us, size),
        "webdataset + our decoding": webdataset_pass(folder / "pictures.tar", None, by_us, size),
        "encoded": our_pass(folder / "encoded", options.token_budget, None, ENCODED_EPOCHS),
    }


def training_sizes(pictures: Path, sizes: SizeMapping) -> dict[str, tuple[int, int]]:
    """Name -> training width and height."""
    known = {}
    for path in pictures.iterdir():
        if path.suffix != ".txt":
            with Image.open(path) as picture:
                turned = picture.getexif().get(0x0112) == 6
                width, height = sizes(*(picture.size[::-1] if turned else picture.size))
            known[path.name] = int(width), int(height)
    return known


def fitted(picture: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
    return ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), size, filter)


def our_pass(folder: Path, token_budget: int, sizes: SizeMapping | None, epochs: int = 1) -> Pass:
    module = TextToImageDataModule(str(folder), batch_size=None, token_budget=token_budget, sizes=sizes, num_workers=0)
    module.setup()
    loader = module.train_dataloader()
    return lambda: sum(len(batch["captions"]) for _ in range(epochs) for batch in loader)


def full_decode(ours: Pass) -> Pass:
    def read() -> int:
        with mock.patch.object(JpegImagePlugin.JpegImageFile, "draft", lambda *_: None):
            return ours()

    return read


class FolderDataset(Dataset[tuple[torch.Tensor, str]]):
    def __init__(self, folder: Path, transform: Transform) -> None:
        self.paths = sorted(path for path in folder.iterdir() if path.suffix != ".txt")
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        path = self.paths[index]
        return self.transform(path.read_bytes(), path.name), path.with_suffix(".txt").read_text()


def folder_pass(folder: Path, transform: Transform, batch_size: int) -> Pass:
    # pictures of several sizes cannot be stacked, so a batch is a list
    loader = DataLoader(FolderDataset(folder, transform), batch_size, shuffle=True, collate_fn=list)
    return lambda: sum(len(batch) for batch in loader)


def webdataset_pass(tar: Path, decode: str | None, transform: Callable[[Any, str], torch.Tensor], size: int) -> Pass:
    def sample(entry: dict[str, Any]) -> tuple[torch.Tensor, str | bytes]:
        (ending,) = entry.keys() & {"jpg", "png"}
        return transform(entry[ending], f"{entry['__key__']}.{ending}"), entry["txt"]

    stream = webdataset.WebDataset(str(tar), shardshuffle=False).shuffle(100)
    stream = (stream.decode(decode) if decode else stream).map(sample).batched(size, collation_fn=list)
    loader = DataLoader(stream, batch_size=None)
    return lambda: sum(len(batch) for batch in loader)


# ---------------------------------------------------------------------------------------------------- figures


def take_turns(loaders: dict[str, Pass], options: argparse.Namespace) -> Speeds:
    """Samples a second of each loader's turns, by the clock and by the processor's time."""
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for turn in range(options.rounds):
        for name, read in loaders.items():
            start = time.perf_counter(), time.process_time()
            samples = read()
            end = time.perf_counter(), time.process_time()
            speeds[name].append((samples / (end[0] - start[0]), samples / (end[1] - start[1])))
            expected = options.count * (ENCODED_EPOCHS if name == "encoded" else 1)
            assert samples == expected, f"{name} gave {samples} samples, not {expected}"
        print(f"round {turn + 1} of {options.rounds} done", flush=True)
    return speeds


def tokens_and_pads(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens of an average sample without pads, and the pads of our batches and of batches by count."""
    split, sizes = folder / "prepared" / "train", SizeMapping(options.resolution)
    with np.load(split / PLANNING) as columns:
        image, captions = image_tokens(*sizes(columns["width"], columns["height"])), columns["caption_tokens"]
    table = read_table(split, [options.count], sizes)
    ours = plan_epoch(table, PlanSettings(None, options.token_budget), 0)
    others = plan_epoch(SampleTable(options.count), PlanSettings(options.batch_size, drop_last=False), 0)
    return {
        "tokens": float((image + captions.astype(int)).mean()),
        "ours": vars(padding_share(ours, image, captions)),
        "others": vars(padding_share(others, image, captions)),
    }


def report(options: argparse.Namespace, speeds: Speeds, known: dict[str, Any]) -> None:
    medians = {name: statistics.median(turn[1] for turn in turns) for name, turns in speeds.items()}
    best = max(medians[name] for name in OTHERS)
    head = f"{'median':>8} {'lowest':>8} {'highest':>8} "
    print(f"\n{'samples a second':26} {'by the clock':>26} {'by processor time':>26}")
    print(f"{'':26} {head}{head}{'tokens/s':>10} {'/ best':>7} {'packed':>7} {'padded':>7}")
    for name, median in medians.items():
        columns = [[turn[place] for turn in speeds[name]] for place in (0, 1)]
        figures = [f"{statistics.median(turns):8.1f} {min(turns):8.1f} {max(turns):8.1f}" for turns in columns]
        pads = known["ours" if name.startswith(("ours", "encoded")) else "others"]
        print(
            f"{name:26} {' '.join(figures)} {statistics.median(columns[0]) * known['tokens']:10.0f} "
            f"{median / best:7.2f} {pads['packed']:7.1%} {pads['to_longest']:7.1%}"
        )
    ratios = {
        "ours / best other": medians["ours"] / best,
        "ours, full decode / best other": medians["ours, full decode"] / best,
        "ours / best other with our decoding": medians["ours"] / max(medians[name] for name in OTHERS_BY_US),
        "encoded / best other": medians["encoded"] / best,
    }
    print()
    for name, ratio in ratios.items():
        print(f"{name:36} {ratio:7.2f}")
    print(json.dumps({"pictures": options.count, "samples_per_second": speeds, "ratios": ratios, **known}))


if __name__ == "__main__":
    main()
