"""A benchmark's score as a metric of Lightning's: updated batch by batch on every rank, summed over the ranks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from evaluation.benchmarks.tally import Count, Mode, Row, Scored, Tally, check_mode


class Benchmark(Protocol):
    """What a module of this package offers; `evaluation.benchmarks.cvtg2k`, say, is one."""

    COLUMNS: tuple[str, ...]

    @staticmethod
    def rows(prompt: Mapping[str, Any]) -> list[Row]: ...

    @staticmethod
    def count(record: Mapping[str, Any], mode: Mode) -> Scored: ...

    @staticmethod
    def summary(tally: Tally, mode: Mode) -> dict[str, Any]: ...


class BenchmarkMetric(Metric):
    """Scores records that come in parts, on any number of ranks, as the benchmark's `score` does all at once.

    Its state is two tables of whole numbers, a row for each of the `prompts` (in parts, where the benchmark has them)
    and a column for each raw count: they do not grow with the pictures, and ranks add them. So `compute` gives, to the
    last digit, what one process would have given, in whatever parts and order the records came; it lacks only the
    records' verdicts. ValueError for an unknown mode, and for a record of a prompt that is not among the `prompts`.
    """

    full_state_update = False
    judged: Tensor  # (rows, columns) int64
    lost: Tensor  # (rows, columns) int64, of missing and broken pictures

    def __init__(
        self, benchmark: Benchmark, prompts: Sequence[Mapping[str, Any]], mode: Mode = "official", **settings: Any
    ) -> None:
        super().__init__(**settings)
        check_mode("The metric", mode)
        self.benchmark, self.mode = benchmark, mode
        rows = {row for prompt in prompts for row in benchmark.rows(prompt)}
        self.rows = {row: number for number, row in enumerate(sorted(rows))}
        for name in ("judged", "lost"):
            table = torch.zeros(len(self.rows), len(benchmark.COLUMNS), dtype=torch.int64)
            self.add_state(name, table, dist_reduce_fx="sum")

    def update(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            for count in self.benchmark.count(record, self.mode).counts:
                if count.row not in self.rows:
                    raise ValueError(f"The metric has no prompt {'/'.join(count.row)}: make it with all prompts.")
                values = [count.values.get(column, 0) for column in self.benchmark.COLUMNS]
                table = self.lost if count.lost else self.judged
                table[self.rows[count.row]] += torch.tensor(values, dtype=torch.int64, device=table.device)

    def compute(self) -> dict[str, Any]:
        """The benchmark's result, as its `score` gives it, without `records`."""
        tally = Tally()
        for name, table in (("judged", self.judged), ("lost", self.lost)):
            for row, values in zip(self.rows, table.tolist(), strict=True):
                if any(values):
                    counts = dict(zip(self.benchmark.COLUMNS, values, strict=True))
                    tally.add(Count(row, counts, lost=name == "lost"))
        return self.benchmark.summary(tally, self.mode)
