"""A progress bar over a number that other processes count up."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def counter_progress(label: str, total: int, done: "Synchronized[int]") -> Iterator[None]:
    """A bar with rate and time left that follows a counter which other processes raise.

    What `done` holds at the start was done earlier: it counts for the bar and not for the rate.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}/s")
    with Progress(*columns, TimeRemainingColumn()) as progress:
        earlier = done.value
        task = progress.add_task(label, total=total, completed=earlier, rate="0")
        finished = threading.Event()
        start = time.monotonic()

        def show() -> None:
            rate = (done.value - earlier) / max(time.monotonic() - start, 1e-9)
            progress.update(task, completed=done.value, rate=f"{rate:,.0f}")

        def follow() -> None:
            while not finished.wait(0.2):
                show()

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            finished.set()
            follower.join()
            show()
