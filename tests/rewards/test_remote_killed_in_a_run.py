"""A reward's server is killed in the middle of a run: the run waits, stops or goes on without, as it was told."""

import multiprocessing
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from distillation import same, write_teacher
from policies import Seen, fit, is_number, stage
from toy_rewards import Red

from zimage_lit.errors import UserError
from zimage_lit.rewards import remote
from zimage_lit.rewards.remote import RemoteReward
from zimage_lit.rewards.server import RewardServer
from zimage_lit.run_folder import last_checkpoint

KILLED_AT, ITERATIONS = 2, 4


class Server:
    """A reward's server in a process of its own, on a port that stays the same however often it is killed."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        listening = multiprocessing.get_context("fork").Event()
        self.process = multiprocessing.get_context("fork").Process(target=self.serve, args=(listening,), daemon=True)
        self.process.start()
        assert listening.wait(30)

    def serve(self, listening: Any) -> None:
        torch.set_num_threads(1)  # the parent's threads are not in this process
        server = RewardServer(Red(), port=self.port)
        listening.set()
        server.serve_forever(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Killer(lightning.Callback):
    """Kills the server before the roll-out of an iteration."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == KILLED_AT:
            self.server.kill()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server()
    yield running
    running.kill()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("start") / "transformer")


def train(start: Path, folder: Path, reward: RemoteReward, *others: lightning.Callback, **settings: Any) -> Seen:
    return fit(stage(start), folder, ITERATIONS, callbacks=[reward, *others], save_every=1, **settings)


def test_the_run_waits_for_it_and_ends_as_if_nothing_had_been(server, start, tmp_path, monkeypatch):
    def wait(seconds: float) -> None:
        time.sleep(seconds)
        if not server.process.is_alive():  # it comes back when it has been asked in vain
            server.start()

    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=time.monotonic, sleep=wait))
    straight = train(start, tmp_path / "straight", RemoteReward(server.url))
    with pytest.warns(UserWarning, match=r"does not answer .*; asking again for up to 30 s"):
        waited = train(start, tmp_path / "waited", RemoteReward(server.url, wait=30), Killer(server))
    assert waited.figures == straight.figures
    assert same(waited.states[-1], straight.states[-1])


def test_the_run_stops_with_a_sentence_and_goes_on_exactly(server, start, tmp_path):
    straight = train(start, tmp_path / "straight", RemoteReward(server.url))
    told = rf"the reward remote failed \({server.url}/score does not answer .*, after 0 s of asking\): mend it, or give"
    with pytest.raises(UserError, match=told):
        train(start, tmp_path / "stopped", RemoteReward(server.url, wait=0), Killer(server))
    checkpoint = last_checkpoint(tmp_path / "stopped")
    server.start()
    rest = train(start, tmp_path / "stopped", RemoteReward(server.url), resume=checkpoint)
    assert rest.states[0]["iteration"] == KILLED_AT
    assert rest.figures == straight.figures[KILLED_AT:]
    assert same(rest.states[-1], straight.states[-1])


def test_the_run_goes_on_without_it_where_it_is_not_required(server, start, tmp_path):
    reward = RemoteReward(server.url, wait=0, required=False, invalid_limit=1.0)
    with pytest.warns(UserWarning, match="judgements are missing"):
        masked = train(start, tmp_path / "masked", reward, Killer(server))
    judged = ["reward/remote" in figures for figures in masked.figures]
    assert judged == [True] * KILLED_AT + [False] * (ITERATIONS - KILLED_AT)  # not judged, and not a score of 0
    assert all(is_number(figures) for figures in masked.figures)
    assert masked.figures[-1]["reward/remote_invalid"] > 0


def test_the_run_stops_where_too_little_is_judged(server, start, tmp_path):
    reward = RemoteReward(server.url, wait=0, required=False, invalid_limit=0.2)
    with pytest.warns(UserWarning, match="judgements are missing"), pytest.raises(UserError, match="invalid_limit"):
        train(start, tmp_path / "stopped", reward, Killer(server))
