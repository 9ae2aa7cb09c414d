"""A bar with rate and time left, for work that may have been begun earlier."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


@contextmanager
def progress_over(label: str, total: int, earlier: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left; what it gives is called with the number of things just done.

    earlier: done before: it counts for the bar and not for the rate.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TextColumn("{task.fields[pace]}")) as progress:
        bar = progress.add_task(label, total=total, completed=earlier, pace="")
        start = time.monotonic()

        def done(number: int) -> None:
            completed = progress.tasks[bar].completed + number
            rate = (completed - earlier) / max(time.monotonic() - start, 1e-9)
            progress.update(bar, completed=completed, pace=f"{rate:,.1f}/s, {clock((total - completed) / rate)} left")

        yield done


def clock(seconds: float) -> str:
    """1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
