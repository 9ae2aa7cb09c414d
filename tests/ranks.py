"""Processes that stay, so that many checks share the seconds it takes to start them."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch


class Ranks:
    """`size` forked processes that a trainer takes for the ranks of one run on the CPU."""

    def __init__(self, size: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        self.processes, self.pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, port), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank at once; what each returns, in order."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [pipe.recv() if pipe.poll(120) else (False, "no answer") for pipe in self.pipes]
        for rank, (fine, answer) in enumerate(answers):
            assert fine, f"rank {rank}: {answer}"
        return [answer for _, answer in answers]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(pipe: Any, rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ["OMP_NUM_THREADS"] = "1"  # else Lightning sets more where there are more cores, which hangs after a fork
    torch.set_num_threads(1)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


SAMPLES = 4  # in a step, of all ranks together


class Steps:
    """Batches of numbered samples, made by `batch_of`: the same make a step, however many ranks share them."""

    def __init__(self, rank: int, world_size: int, batch_of: Callable[[range], dict[str, Any]]) -> None:
        self.rank, self.world_size, self.batch_of, self.done = rank, world_size, batch_of, 0

    def __len__(self) -> int:
        return 1000

    def __iter__(self) -> Any:
        while True:
            share = SAMPLES // self.world_size
            first = self.done * SAMPLES + self.rank * share
            self.done += 1
            yield self.batch_of(range(first, first + share))

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]
