"""Evaluates in forked children of one process that has imported everything, each killed at the nth thing it does.

Reads JSON lists [settings of evaluate, n] from standard input, one a line; answers each with the child's exit code
(negative: the signal that killed it). What counts is whatever is written, each answer of a judge, each prompt's score.
"""

import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import fake_judges  # noqa: F401
import torch

import evaluation.judges.tinyworld  # noqa: F401
from evaluation import drawing, judging, scoring
from evaluation.ledger import Ledger
from evaluation.task import evaluate_task


class Killer:
    """Ends this process, as `kill -9` does, at the nth thing that it does, with half of it done."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.add, self.write = Ledger.add, drawing.write_atomically

    def arm(self) -> None:
        Ledger.add = lambda ledger, entries: self.added(ledger, list(entries))  # type: ignore[method-assign]
        drawing.write_atomically = scoring.write_atomically = self.written  # type: ignore[attr-defined]
        judging._checked = self.before(judging._checked)  # asked, and not kept
        scoring._prompt_line = self.before(scoring._prompt_line)

    def now(self) -> bool:
        self.left -= 1
        return self.left == 0

    def added(self, ledger: Ledger, entries: list[Any]) -> None:
        if self.now():
            self.add(ledger, entries[: len(entries) // 2])
            assert ledger._stream is not None
            ledger._stream.write(json.dumps(entries[-1]).encode()[:-9])
            ledger._stream.flush()
            kill()
        self.add(ledger, entries)

    def written(self, path: Path, content: str | bytes) -> None:
        if self.now():
            whole = content if isinstance(content, bytes) else content.encode()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f"{path.name}.tmp").write_bytes(whole[: len(whole) // 2])
            kill()
        self.write(path, content)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if self.now():
                kill()
            return function(*arguments)

        return wrapped


def kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def main() -> None:
    answers, sys.stdout = sys.stdout, io.StringIO()
    for line in sys.stdin:
        settings, after = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                Killer(after).arm()
                evaluate_task(settings)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
