"""An epoch from an S3-compatible server on loopback, through a small cache, while the server stops in the middle.

    python benchmarks/remote.py                         # 1 GiB, cache of 200 MiB, the server is silent for 20 s
    python benchmarks/remote.py --stop kill             # ... or gone, its port closed

Makes chunks of noise pictures (which nothing can compress) below --folder, copies them into moto's S3 server in a
process of its own (which keeps them in memory), and trains next to nothing on them for an epoch in Lightning's Trainer,
by TextToImageDataModule, shuffled within windows of neighbouring chunks. Prints a table and one line of JSON: samples
expected, seen and doubled, the largest size of the cached chunks, seconds, MB/s with the stop and without, and what was
said. The exit code is 1 where a sample was lost or doubled.
"""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import litdata
import numpy as np
import requests
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from data_modules.cache import CacheSettings
from data_modules.manifest import write_manifest
from data_modules.samples import encode_sample
from data_modules.text_to_image import TextToImageDataModule

MEBIBYTE = 2**20
SIDE = 384  # pixels of a noise picture
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
# SIGUSR1 closes the port of the server, SIGUSR2 opens it again; its objects stay.
SERVER = """
import signal, sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False)
server.start()
signal.signal(signal.SIGUSR1, lambda *_: server.stop())
signal.signal(signal.SIGUSR2, lambda *_: server.start())
while True:
    time.sleep(1)
"""


def main() -> None:
    options = parse_options()
    folder = Path(tempfile.mkdtemp(prefix="remote-benchmark-", dir=options.folder))
    try:
        samples = write_data(folder / "data", options)
        with served(folder / "data", options.port) as server:
            shutil.rmtree(folder / "data")
            result = train_epoch(folder, server, samples, options)
    finally:
        shutil.rmtree(folder)
    report(result)
    sys.exit(result["samples_seen"] != result["samples_expected"] or result["samples_doubled"] > 0)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=1024, help="of chunks")
    parser.add_argument("--chunk", type=int, default=16, help="MiB of a chunk")
    parser.add_argument("--cache", type=int, default=200, help="MiB of the cache")
    parser.add_argument("--window", type=int, default=4, help="chunks that are shuffled together")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=20, help="seconds of the server's stop")
    parser.add_argument("--stop", choices=["silent", "kill"], default="silent", help="SIGSTOP, or its port closed")
    parser.add_argument("--folder", default=None, help="for the data and the cache; default: the system's for such")
    parser.add_argument("--port", type=int, default=5917)
    return parser.parse_args()


# The data and their server


def write_data(folder: Path, options: argparse.Namespace) -> int:
    """Prepare --mebibytes of noise pictures; how many samples."""
    per_sample = len(stored_sample(1)["image"]) + len(stored_sample(0)["image"])
    size = options.mebibytes * MEBIBYTE * 2 // per_sample
    litdata.optimize(
        stored_sample,
        inputs=list(range(size)),
        output_dir=str(folder / "train"),
        chunk_bytes=options.chunk * MEBIBYTE,
        keep_data_ordered=True,
        num_workers=1,
        start_method="fork",
        verbose=False,
    )
    write_manifest(folder, "noise", {"train": size}, {"en": ["short"]}, {})
    return size


def stored_sample(index: int) -> dict[str, Any]:
    """Every second one a PNG, the others JPEG files."""
    pixels = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image: np.ndarray | bytes = pixels
    if index % 2:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        image = buffer.getvalue()
    return encode_sample(image, {"en": {"short": f"noise {index}"}}, {}, index)


@contextmanager
def served(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """moto's server, with the folder at s3://bucket/data."""
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stderr=subprocess.DEVNULL)
    try:
        while not answers(port):
            time.sleep(0.2)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in folder.rglob("*.*"):
            if path.is_file():
                client.put_object(
                    Bucket="bucket", Key=f"data/{path.relative_to(folder).as_posix()}", Body=path.read_bytes()
                )
        yield server
    finally:
        server.kill()
        server.wait()


def answers(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}", timeout=1).ok
    except requests.RequestException:
        return False


def pause(server: subprocess.Popen[bytes], how: str, seconds: float) -> None:
    stop, go_on = (signal.SIGSTOP, signal.SIGCONT) if how == "silent" else (signal.SIGUSR1, signal.SIGUSR2)
    server.send_signal(stop)
    time.sleep(seconds)
    server.send_signal(go_on)


# The epoch


class Counting(LightningModule):
    """Learns next to nothing; counts the samples, and calls `in_the_middle` when half of the steps are done."""

    def __init__(self, in_the_middle: Callable[[], None]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.in_the_middle = in_the_middle
        self.seen: Counter[int | str] = Counter()
        self.longest, self.last = 0.0, time.monotonic()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        self.seen.update(batch["ids"])
        if batch_idx == int(self.trainer.num_training_batches) // 2:
            self.in_the_middle()
        return self.layer(torch.stack([image.float().mean() for image in batch["images"]])[:, None]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def train_epoch(
    folder: Path, server: subprocess.Popen[bytes], size: int, options: argparse.Namespace
) -> dict[str, Any]:
    data = TextToImageDataModule(
        "s3://bucket/data",
        batch_size=options.batch_size,
        num_workers=options.workers,
        drop_last=False,
        window=options.window,
        cache=CacheSettings(str(folder / "cache"), options.cache * MEBIBYTE),
    )
    stop = threading.Thread(target=pause, args=(server, options.stop, options.pause))
    module = Counting(stop.start if options.pause else lambda: None)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False
    )  # fmt: skip
    with watched_cache(folder / "cache") as sizes, heard(folder / "said") as said:
        began = module.last = time.monotonic()
        trainer.fit(module, datamodule=data)
        seconds = time.monotonic() - began
        if options.pause:
            stop.join()
    megabytes = options.mebibytes * MEBIBYTE / 1e6
    return {
        "samples_expected": size,
        "samples_seen": len(module.seen),
        "samples_doubled": sum(times - 1 for times in module.seen.values()),
        "largest_cache_MiB": max(sizes) / MEBIBYTE,
        "seconds": seconds,
        "longest_wait_for_a_batch_s": module.longest,
        "MB_per_second": megabytes / seconds,
        "MB_per_second_but_for_the_longest_wait": megabytes / (seconds - module.longest),
        "said": said,
    }


@contextmanager
def watched_cache(folder: Path) -> Iterator[list[int]]:
    """Bytes of all chunks in the cache, whole or on their way, looked at every few milliseconds."""
    sizes, end = [0], threading.Event()

    def watch() -> None:
        while not end.wait(0.005):
            try:
                sizes.append(sum(path.stat().st_size for path in folder.glob("*/train/*.bin*")))
            except FileNotFoundError:
                continue  # something changed: this sum would be of two moments

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        end.set()
        thread.join()


@contextmanager
def heard(path: Path) -> Iterator[list[str]]:
    """What this process and its workers say on standard error about the data; it is shown all the same."""
    said: list[str] = []
    with path.open("wb+") as stream:
        before = os.dup(2)
        os.dup2(stream.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            text = path.read_text()
            sys.stderr.write(text)
            said += [line for line in text.splitlines() if line.startswith("data: ")]


def report(result: dict[str, Any]) -> None:
    for name, value in result.items():
        if name != "said":
            print(f"{name.replace('_', ' '):40} {value:10.1f}".removesuffix(".0"))
    for line in result["said"]:
        print(f"said: {line}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
