"""Samples from chunks behind an address: the same as the local ones, whatever happens to server, cache and readers."""

import json
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from data_modules import cache as cache_module
from data_modules import remote
from data_modules.cache import CacheSettings
from data_modules.chunks import ChunkedSamples
from data_modules.manifest import read_manifest, verify_files, write_manifest
from data_modules.samples import CaptionChooser, SampleReader
from data_modules.streaming import ResumableLoader
from data_modules.text_to_image import TextToImageDataModule
from zimage_lit.errors import UserError

NUM_SAMPLES, NUM_CHUNKS = 44, 5  # of the noise data set in conftest.py
FORK = multiprocessing.get_context("fork")


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder. The server counts the requests and asks its `answer`, if any, before it sends a file."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        if self.server.answer is None or not self.server.answer(self):
            super().do_GET()

    def log_message(self, *_: Any) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.requests: Counter[str] = Counter()
        self.answer: Callable[[Handler], bool] | None = None
        super().__init__(("127.0.0.1", port), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the machine, a cache of its own, and short waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "default cache"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr("data_modules.chunks.LOOK_EVERY", 0.0)


@pytest.fixture
def server(noise_copy: Path) -> Iterator[Server]:
    server = Server(noise_copy)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def moto(noise_folder: Path) -> Iterator[ThreadedMotoServer]:
    """An S3-compatible server with the noise data set at s3://bucket/noise."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret")
        client.create_bucket(Bucket="bucket")
        for path in noise_folder.rglob("*.*"):
            if path.is_file():
                client.upload_file(str(path), "bucket", f"noise/{path.relative_to(noise_folder).as_posix()}")
        yield server
    server.stop()


def settings(tmp_path: Path, chunks: float = 100, patience: float = 5.0) -> CacheSettings:
    """A cache for so many of the largest chunks."""
    return CacheSettings(str(tmp_path / "cache"), int(chunks * 6000), patience)


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*/[!.]*/*.bin*"))


def shuffled(seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).permutation(NUM_SAMPLES).tolist()


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def read_and_compare(samples: ChunkedSamples, local: Path, indices: list[int]) -> None:
    expected = ChunkedSamples(local / "train")
    for index in indices:
        assert_same(samples[index], expected[index])


def in_processes(*targets: Callable[[], None]) -> list[int | None]:
    """Exit codes of the targets, each in a forked process."""
    processes = [FORK.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Bytes of all chunks below a folder, whole or on their way, looked at all the time."""
    sizes, end = [0], threading.Event()

    def watch() -> None:
        while not end.is_set():
            total = 0
            for path in folder.glob("*/[!.]*/*.bin*"):
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    break  # something changed: this sum is of two moments
            else:
                sizes.append(total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        end.set()
        thread.join()


# The same samples


def test_a_folder_is_read_in_place(noise_folder: Path, tmp_path: Path) -> None:
    samples = ChunkedSamples(noise_folder / "train")
    samples.upcoming(range(NUM_SAMPLES))
    assert len(samples) == NUM_SAMPLES
    assert [samples[index]["id"] for index in shuffled()] == [f"id-{index}" for index in shuffled()]
    assert [samples.chunk_of(index) for index in (0, 9, 10, 43)] == [0, 0, 1, 4]
    assert samples.chunk_ends == [10, 20, 30, 40, 44] and samples.chunks_at_once == NUM_CHUNKS
    assert samples.place_of(10) == str(noise_folder / "train" / "chunk-0-1.bin")
    assert samples.folder == noise_folder / "train" and not (tmp_path / "default cache").exists()


def test_samples_from_s3_are_those_of_the_folder(moto: ThreadedMotoServer, noise_folder: Path, tmp_path: Path) -> None:
    samples = ChunkedSamples("s3://bucket/noise/train/", settings(tmp_path, chunks=2.5))
    assert samples.chunks_at_once == 2 and samples.chunk_ends[-1] == len(samples) == NUM_SAMPLES
    assert samples.place_of(43) == "s3://bucket/noise/train/chunk-0-4.bin"
    read_and_compare(samples, noise_folder, shuffled())
    assert len(ChunkedSamples("s3://bucket/noise/val", settings(tmp_path))) == 7


def test_samples_over_http_are_those_of_the_folder(server: Server, noise_folder: Path, tmp_path: Path) -> None:
    read_and_compare(ChunkedSamples(f"{server.url}/train", settings(tmp_path, 2)), noise_folder, shuffled())


def test_samples_from_google_storage_are_those_of_the_folder(
    noise_copy: Path, noise_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(noise_copy.parent)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    read_and_compare(ChunkedSamples("gs://copy/train", settings(tmp_path, 2)), noise_folder, shuffled())
    assert server.requests["/copy/train/chunk-0-0.bin"] >= 1
    server.stop()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_the_same_batches_from_s3(
    moto: ThreadedMotoServer, noise_folder: Path, tmp_path: Path, num_workers: int
) -> None:
    def loader(folder: str) -> ResumableLoader:
        reader = SampleReader(folder, CaptionChooser(None, 0), cache=settings(tmp_path, chunks=1))
        assert reader.samples[3]["id"] == "id-3"  # opened before the workers are forked
        reader.samples.release()
        return ResumableLoader(reader, "", batch_size=5, seed=0, num_workers=num_workers)

    remote_batches, local_batches = list(loader("s3://bucket/noise/train")), list(loader(f"{noise_folder}/train"))
    assert [batch["ids"] for batch in remote_batches] == [batch["ids"] for batch in local_batches]
    for found, expected in zip(remote_batches, local_batches, strict=True):
        assert all((one == other).all() for one, other in zip(found["images"], expected["images"], strict=True))


def test_it_can_be_sent_to_a_spawned_worker(server: Server, noise_folder: Path, tmp_path: Path) -> None:
    samples = ChunkedSamples(f"{server.url}/train", settings(tmp_path))
    read_and_compare(samples, noise_folder, [0])
    read_and_compare(pickle.loads(pickle.dumps(samples)), noise_folder, [1, 20])


def test_no_process_is_forked_while_a_connection_is_being_opened() -> None:
    """It would inherit locks that the opening thread holds."""
    begun, opened = threading.Event(), threading.Event()

    def open_slowly() -> None:
        with remote._connecting():
            begun.set()
            time.sleep(0.3)
            opened.set()

    thread = threading.Thread(target=open_slowly)
    thread.start()
    begun.wait()
    assert in_processes(lambda: sys.exit(0 if opened.is_set() else 1)) == [0]
    thread.join()


def test_the_manifest_is_read_from_an_address_and_planning_comes_along(
    server: Server, noise_copy: Path, tmp_path: Path
) -> None:
    np.savez(noise_copy / "train" / "planning.npz", width=np.arange(NUM_SAMPLES))
    manifest = write_manifest(noise_copy, "noise", {"train": NUM_SAMPLES, "val": 7}, {}, {})
    assert read_manifest(server.url) == manifest
    verify_files(server.url, manifest, "sha256")
    folder = ChunkedSamples(f"{server.url}/train", settings(tmp_path)).folder
    assert np.load(folder / "planning.npz")["width"].tolist() == list(range(NUM_SAMPLES))
    assert folder.parent == tmp_path / "cache" / manifest.fingerprint[:16]
    assert read_manifest(folder.parent) == manifest
    assert cached(tmp_path) == []


# The cache


def test_the_cache_never_passes_its_limit(server: Server, noise_folder: Path, tmp_path: Path) -> None:
    limit = settings(tmp_path, chunks=2)
    samples = ChunkedSamples(f"{server.url}/train", limit)
    order = shuffled()
    with watched(tmp_path / "cache") as sizes:
        for done, index in enumerate(order):
            samples.upcoming(order[done:])
            read_and_compare(samples, noise_folder, [index])
    assert limit.max_bytes / 2 < max(sizes) <= limit.max_bytes
    assert sum(server.requests.values()) > NUM_CHUNKS + 2  # chunks were removed and fetched again


def test_chunks_that_fit_are_fetched_once_by_all_processes(server: Server, noise_folder: Path, tmp_path: Path) -> None:
    samples = ChunkedSamples(f"{server.url}/train", settings(tmp_path))
    readers = [partial(read_and_compare, samples, noise_folder, shuffled(seed)) for seed in (0, 1)]
    assert in_processes(*readers) == [0, 0]
    again = ChunkedSamples(f"{server.url}/train", settings(tmp_path))
    read_and_compare(again, noise_folder, shuffled())
    fetched = {path: times for path, times in server.requests.items() if path.endswith(".bin")}
    assert fetched == {f"/train/chunk-0-{number}.bin": 1 for number in range(NUM_CHUNKS)}
    assert server.requests["/train/index.json"] == 1


def test_two_processes_share_a_cache_of_one_chunk(server: Server, noise_folder: Path, tmp_path: Path) -> None:
    limit = settings(tmp_path, chunks=1)
    samples = ChunkedSamples(f"{server.url}/train", limit)

    def read(seed: int) -> None:
        for index in shuffled(seed)[:20]:
            read_and_compare(samples, noise_folder, [index])
            samples.release()

    with watched(tmp_path / "cache") as sizes:
        assert in_processes(partial(read, 0), partial(read, 1)) == [0, 0]
    assert 0 < max(sizes) <= limit.max_bytes


def test_what_comes_next_is_fetched_before_it_is_asked_for(server: Server, tmp_path: Path) -> None:
    samples = ChunkedSamples(f"{server.url}/train", settings(tmp_path, chunks=2.5))
    for order, expected in [([5, 30, 31, 40, 12], [0, 3, 4]), (np.array([12, 5, 40]), [0, 1, 4]), ([], [0, 1, 4])]:
        names = [f"chunk-0-{number}.bin" for number in expected]
        for _ in range(500):
            samples.upcoming(order)
            if [path.name for path in cached(tmp_path)] == names:
                break
            time.sleep(0.01)
        assert [path.name for path in cached(tmp_path)] == names
    assert server.requests["/train/chunk-0-0.bin"] == 1  # kept, although the oldest: it was among the next both times


def test_a_chunk_that_is_read_is_not_removed(server: Server, noise_folder: Path, tmp_path: Path) -> None:
    limit = settings(tmp_path, chunks=1, patience=0.2)
    reader, other = (ChunkedSamples(f"{server.url}/train", limit) for _ in range(2))
    read_and_compare(reader, noise_folder, [0])
    with pytest.raises(UserError, match=r"no room for train/chunk-0-1\.bin, because all other .* being read"):
        other.fetch(10)
    read_and_compare(reader, noise_folder, [1])
    reader.release()
    read_and_compare(other, noise_folder, [10])
    assert [path.name for path in cached(tmp_path)] == ["chunk-0-1.bin"]


def test_a_chunk_is_closed_when_it_is_released(server: Server, tmp_path: Path) -> None:
    samples = ChunkedSamples(f"{server.url}/train", settings(tmp_path))

    def open_chunks() -> list[str]:
        paths = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return sorted(Path(path).name for path in paths if path.startswith(str(tmp_path)) and path.endswith(".bin"))

    samples[0], samples[10]
    assert open_chunks().count("chunk-0-1.bin") >= 1 and "chunk-0-0.bin" not in open_chunks()
    samples.release()
    assert open_chunks() == []


def test_a_shortened_chunk_in_the_cache_is_fetched_again(server: Server, noise_folder: Path, tmp_path: Path) -> None:
    read_and_compare(ChunkedSamples(f"{server.url}/train", settings(tmp_path)), noise_folder, [0])
    (chunk,) = cached(tmp_path)
    os.truncate(chunk, 100)
    read_and_compare(ChunkedSamples(f"{server.url}/train", settings(tmp_path)), noise_folder, [0])


# Trouble


def test_reading_goes_on_after_the_server_was_gone(
    moto: ThreadedMotoServer, noise_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reader = SampleReader("s3://bucket/noise/train", CaptionChooser(None, 0), cache=settings(tmp_path, 1, patience=20))
    loader = ResumableLoader(reader, "", batch_size=4, seed=0)
    batches = iter(loader)
    names = next(batches)["ids"]
    moto.stop()
    capfd.readouterr()
    threading.Timer(0.7, moto.start).start()
    names += [name for batch in batches for name in batch["ids"]]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("data: ")]
    assert Counter(names) == Counter(f"id-{index}" for index in range(NUM_SAMPLES))
    assert len(said) == 2, said
    assert said[0].startswith("data: s3://bucket/noise/train/chunk-0-") and "waiting for up to 20 s" in said[0]
    assert "is read again after" in said[1] and said[1].endswith("going on")


def test_of_all_processes_that_wait_one_says_so(
    server: Server, noise_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = ChunkedSamples(f"{server.url}/train", settings(tmp_path))
    again = time.monotonic() + 0.7

    def busy(handler: Handler) -> bool:
        if early := time.monotonic() < again:
            handler.send_error(503)
        return early

    server.answer = busy
    readers = [partial(read_and_compare, samples, noise_folder, [index]) for index in (0, 10, 20)]
    assert in_processes(*readers) == [0, 0, 0]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("data: ")]
    assert len(said) == 2 and "503: Service Unavailable" in said[0] and said[1].endswith("going on"), said


def test_a_server_that_stays_away_is_named(server: Server, tmp_path: Path) -> None:
    reader = SampleReader(f"{server.url}/train", CaptionChooser(None, 0), cache=settings(tmp_path, patience=0.2))
    server.stop()
    (answer, _) = reader.__getitems__([(0, 10), (0, 11)])
    assert answer["error"].startswith(f"{server.url}/train/chunk-0-1.bin could not be read for 0 s (")
    assert "Connection refused" in answer["error"] and "data.init_args.cache.patience" in answer["error"]


def test_a_silent_or_breaking_server_is_asked_again(
    server: Server, noise_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_TIMEOUT", 0.2)
    samples = ChunkedSamples(f"{server.url}/train", settings(tmp_path))
    troubles = iter(["silence", "half", "busy"])

    def answer(handler: Handler) -> bool:
        trouble = next(troubles, None)
        if trouble == "silence":
            time.sleep(0.5)
        if trouble == "half":
            handler.send_response(200)
            handler.send_header("Content-Length", "2000")
            handler.end_headers()
            handler.wfile.write(b"half")
        if trouble == "busy":
            handler.send_error(503)
        return trouble is not None

    server.answer = answer
    read_and_compare(samples, noise_folder, [0])
    assert server.requests["/train/chunk-0-0.bin"] == 4


@pytest.mark.parametrize("damage", ["flipped", "shorter", "longer"])
def test_a_damaged_chunk_on_the_server_is_named(server: Server, noise_copy: Path, tmp_path: Path, damage: str) -> None:
    samples = ChunkedSamples(f"{server.url}/train", settings(tmp_path))
    chunk = noise_copy / "train" / "chunk-0-2.bin"
    content = bytearray(chunk.read_bytes())
    content[50] ^= 1
    chunk.write_bytes({"flipped": content, "shorter": content[:-1], "longer": content + b"x"}[damage])
    with pytest.raises(UserError) as caught:
        samples[20]
    assert str(caught.value).startswith(f"{server.url}/train/chunk-0-2.bin is damaged (its size or SHA-256 differs")
    assert server.requests["/train/chunk-0-2.bin"] == 2 and cached(tmp_path) == []


def test_a_chunk_damaged_on_its_way_is_fetched_again(server: Server, noise_folder: Path, tmp_path: Path) -> None:
    samples = ChunkedSamples(f"{server.url}/train", settings(tmp_path))

    def answer(handler: Handler) -> bool:
        server.answer = None
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"the login page of a hotel")
        return True

    server.answer = answer
    read_and_compare(samples, noise_folder, [0])
    assert server.requests["/train/chunk-0-0.bin"] == 2


def test_a_reader_killed_in_mid_download_leaves_a_usable_cache(
    server: Server, noise_folder: Path, tmp_path: Path
) -> None:
    samples = ChunkedSamples(f"{server.url}/train", settings(tmp_path, chunks=1))
    half_sent, go_on = threading.Event(), threading.Event()

    def answer(handler: Handler) -> bool:
        server.answer = None
        content = (noise_folder / handler.path[1:]).read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2])
        half_sent.set()
        return go_on.wait(10)

    server.answer = answer
    victim = FORK.Process(target=samples.fetch, args=[0])
    victim.start()
    assert half_sent.wait(10)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert [path.name for path in cached(tmp_path)] == ["chunk-0-0.bin.part"]
    read_and_compare(samples, noise_folder, [10, 0])
    assert [path.name for path in cached(tmp_path)] == ["chunk-0-0.bin"]
    go_on.set()


# What is refused, in one sentence


def the_error(location: str, cache: CacheSettings) -> str:
    with pytest.raises(UserError) as caught:
        ChunkedSamples(location, cache)[0]
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_what_is_not_there_is_named(moto: ThreadedMotoServer, server: Server, tmp_path: Path) -> None:
    cache = settings(tmp_path, patience=0.1)
    assert "There is no s3://nowhere/noise/manifest.json (NoSuchBucket" in the_error("s3://nowhere/noise/train", cache)
    assert "There is no s3://bucket/no/manifest.json (NoSuchKey" in the_error("s3://bucket/no/train", cache)
    assert f"There is no {server.url}/no/manifest.json (404" in the_error(f"{server.url}/no/train", cache)
    assert f"The manifest of {server.url} has no test/index.json" in the_error(f"{server.url}/test", cache)
    assert "azure://x is not an address that data can be read from" in the_error("azure://x/train", cache)
    assert "s3://B!/x/manifest.json cannot be read (Param" in the_error("s3://B!/x/train", cache)


@pytest.mark.parametrize(
    ("scheme", "way_out"), [("s3", "set AWS_PROFILE"), ("gs", "run `gcloud auth"), ("http", "needs no login")]
)
def test_wrong_credentials_are_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, way_out: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)

    def answer(handler: Handler) -> bool:
        content = b"<Error><Code>InvalidAccessKeyId</Code><Message>No such key.</Message></Error>"
        handler.send_response(403)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
        return True

    server.answer = answer
    location = f"{server.url}/train" if scheme == "http" else f"{scheme}://bucket/noise/train"
    message = the_error(location, settings(tmp_path))
    assert "manifest.json may not be read with these credentials (" in message and way_out in message


def test_a_damaged_index_or_manifest_is_named(server: Server, noise_copy: Path, tmp_path: Path) -> None:
    location, cache = f"{server.url}/train", settings(tmp_path)
    (noise_copy / "train" / "index.json").write_text("{}")
    assert the_error(location, cache).startswith(f"{server.url}/train/index.json is damaged (its size or SHA-256")
    manifest = json.loads((noise_copy / "manifest.json").read_text())
    (noise_copy / "manifest.json").write_text(json.dumps({**manifest, "name": "other"}))
    assert f"{server.url}/manifest.json is damaged (it does not fit its own checksum" in the_error(location, cache)
    del manifest["checksum"]
    for wrong in ({"fingerprint": "../.."}, {"files": {"train/index.json": {"bytes": 2}}}):
        (noise_copy / "manifest.json").write_text(json.dumps({**manifest, **wrong}))
        assert f"{server.url}/manifest.json is not a whole manifest" in the_error(location, cache)
    (noise_copy / "manifest.json").write_text("{")
    assert f"{server.url}/manifest.json is not JSON" in the_error(location, cache)
    (noise_copy / "train" / "index.json").write_text("{}")
    assert "index.json is no index of chunks" in the_error(str(noise_copy / "train"), cache)


def test_a_cache_that_cannot_be_is_refused(server: Server, tmp_path: Path) -> None:
    message = the_error(f"{server.url}/train", settings(tmp_path, chunks=0.1))
    assert message.startswith("data.init_args.cache.max_bytes is 600, less than the ")
    (tmp_path / "file").write_text("")
    message = the_error(f"{server.url}/train", CacheSettings(str(tmp_path / "file")))
    assert str(tmp_path / "file") in message and "data.init_args.cache.folder" in message


def test_a_full_disk_is_named(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = ChunkedSamples(f"{server.url}/train", settings(tmp_path))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(
        UserError, match=r"chunk-0-0\.bin\.part cannot be written \(No space left on device\): make room"
    ):
        samples[0]
    assert cached(tmp_path) == []


# In a data module


def remote_module(address: str, tmp_path: Path, chunks: float, **options: Any) -> TextToImageDataModule:
    module = TextToImageDataModule(address, batch_size=8, seed=3, cache=settings(tmp_path, chunks), **options)
    module.setup("fit")
    return module


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_module_gives_the_same_batches_from_afar_and_resumes_anywhere(
    server: Server, noise_folder: Path, tmp_path: Path, num_workers: int
) -> None:
    near = TextToImageDataModule(str(noise_folder), batch_size=8, seed=3, window=2)
    near.setup("fit")
    local = near.train_dataloader()
    expected = [batch["ids"] for _ in range(2) for batch in local]
    loader = remote_module(server.url, tmp_path, chunks=4, window=2, num_workers=num_workers).train_dataloader()
    seen = [batch["ids"] for batch in islice(loader, 3)]
    state = loader.state_dict()
    again = remote_module(server.url, tmp_path, chunks=4, window=2, num_workers=2 - num_workers).train_dataloader()
    again.load_state_dict(state)
    seen += [batch["ids"] for batch in again] + [batch["ids"] for batch in again]
    assert seen == expected
    assert near.fingerprint == remote_module(server.url, tmp_path, chunks=4, window=2).fingerprint


def test_a_window_larger_than_the_cache_is_refused(server: Server, tmp_path: Path) -> None:
    message = r"room for 2 chunks and shuffling needs 5 at once: set data.init_args.window to 1, or raise"
    with pytest.raises(UserError, match=message):
        remote_module(server.url, tmp_path, chunks=2).train_dataloader()
    with pytest.raises(UserError, match="shuffling needs 4 at once"):
        remote_module(server.url, tmp_path, chunks=2, window=3).train_dataloader()
    remote_module(server.url, tmp_path, chunks=2, window=1).train_dataloader()
    remote_module(server.url, tmp_path, chunks=2, shuffle=False).train_dataloader()
