"""Batches in an order that is a pure function of (seed, epoch), from any batch on.

litdata stores and streams the samples; which samples make up batch b of epoch e is decided by `planning`. A position
in training is then two numbers, epoch and batches done, and resuming at it is exact whatever the number of workers,
then or now.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data_modules.planning import EpochPlan, PlanSettings, SampleTable, check_budget, next_source, plan_epoch
from data_modules.samples import Batch, Key, SampleReader, read_batches
from zimage_lit.errors import UserError

POSITION = ("epoch", "batches_done", "steps_done")  # what of a loader's state is no setting


class ResumableLoader:
    """Endless epochs of batches, with the position as its state.

    Each pass of `iter` has as many batches as epoch 0 and begins where the loader stands. Epochs mostly have the same
    length, so a pass is an epoch; where later epochs differ by a few batches (windows with token counts, weights of
    concepts), passes keep their length and epochs begin inside them. A batch counts as done when it is handed out, so a
    state saved during a training step continues with the batch after it. Lightning finds `state_dict` and
    `load_state_dict` and keeps the state in its checkpoints.

    Every rank takes its own part of each step; for batch_size or token_budget, shuffle, drop_last and window see
    `planning.PlanSettings`.

    Args:
        table: what is known of the samples (`reader.table()`); None: nothing, so batches are slices of the order.

    Raises:
        UserError: fewer samples than one step of all ranks; a sample that exceeds the budget; a state saved with other
            data or settings, which could not be continued exactly.
    """

    def __init__(
        self,
        reader: SampleReader,
        fingerprint: str,
        batch_size: int | None,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        token_budget: int | None = None,
        window: int | None = None,
        table: SampleTable | None = None,
    ) -> None:
        self.reader = reader
        self.num_workers = num_workers
        self.rank = rank
        self.epoch = 0
        self.batches_done = 0  # of the epoch
        self.steps_done = 0  # of all epochs
        self._table = table or reader.plain_table()
        # then a step takes the same samples however many ranks share them
        self._is_sliced = self._table.tokens is None and drop_last
        self._plan_settings = PlanSettings(batch_size, token_budget, world_size, shuffle, drop_last, window, seed)
        self._settings: dict[str, Any] = {
            "fingerprint": fingerprint,
            "num_samples": len(reader),
            **asdict(self._plan_settings),
            "caption_weights": reader.choose_caption.weights,
            **self._table.settings,
        }
        share = self._plan_settings.share
        if drop_last and len(reader) < share:
            raise UserError(
                f"{reader.folder} has {len(reader)} samples, fewer than the {share} of one batch: "
                "lower data.init_args.batch_size or prepare more samples."
            )
        check_budget(self._table, self._plan_settings)
        self._plans: dict[int, EpochPlan] = {}
        self._announced: tuple[int, np.ndarray, np.ndarray] | None = None
        self._length: int | None = None

    def __len__(self) -> int:
        """Batches in a pass, wherever the loader stands in it."""
        if self._length is None:
            self._length = len(self._plan(0))
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        left = len(self) - self.steps_done % len(self)
        self.announce()
        for batch in read_batches(self.reader, islice(self.keys(), left), self.num_workers):
            self.advance()
            yield batch

    def keys(self) -> Iterator[list[Key]]:
        """What this rank's batches are made of, from where the loader stands, on and on through the epochs."""
        epoch, done = self.epoch, self.batches_done
        while True:
            plan = self._plan(epoch)
            for step in range(done, len(plan)):
                yield [(epoch, index) for index in plan.batch(step, self.rank).tolist()]
            epoch, done = epoch + 1, 0

    def advance(self) -> None:
        """Count one batch as handed out."""
        if self.batches_done >= len(self._plan(self.epoch)):
            self.epoch += 1
            self.batches_done = 0
        self.batches_done += 1
        self.steps_done += 1
        self.announce()

    def announce(self) -> None:
        """Tell the reader which samples of an epoch come next, so that chunks far away are fetched ahead."""
        if not self.reader.samples.is_remote:
            return
        epoch, done = self.epoch, self.batches_done
        if done >= len(self._plan(epoch)):
            epoch, done = epoch + 1, 0
        if self._announced is None or self._announced[0] != epoch:
            plan = self._plan(epoch)
            sizes = np.diff(plan.offsets)[self.rank :: plan.world_size]
            self._announced = epoch, plan.remaining(0, self.rank), np.append(0, np.cumsum(sizes))
        _, order, starts = self._announced
        self.reader.samples.upcoming(order[starts[done] :])

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch not in self._plans:
            kept = {number: plan for number, plan in self._plans.items() if number >= self.epoch}
            self._plans = {**kept, epoch: plan_epoch(self._table, self._plan_settings, epoch)}
        return self._plans[epoch]

    def state_dict(self) -> dict[str, Any]:
        position = {"epoch": self.epoch, "batches_done": self.batches_done, "steps_done": self.steps_done}
        return {**position, **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # group_size: of earlier versions, 1 in all of their runs
        saved = {name: value for name, value in state.items() if name not in (*POSITION, "group_size")}
        if self._is_sliced and saved["world_size"] * (saved["batch_size"] or 0) == self._plan_settings.share:
            saved |= {name: self._settings[name] for name in ("world_size", "batch_size")}
        _check_same_settings(saved, self._settings)
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]
        self.steps_done = state.get("steps_done", self.epoch * len(self) + self.batches_done)


class MixtureLoader:
    """Endless batches from several data sets, each batch from one, all ranks from the same at the same step.

    Each data set has its share of the steps at all times (`planning.next_source`: over any window of steps within two
    of what its weight says) and goes through its own epochs whole, faster or slower than the others. State and passes
    are as those of `ResumableLoader`; one pool of workers reads for all.

    Args:
        loaders: name -> loader of one data set; their `num_workers` do not count.
        weights: name -> weight above 0, the same names.
        steps_per_epoch: batches of a pass; None: as many as those of the data sets together.

    Raises:
        UserError: other names or weights of 0 and below; a state saved with other data or settings.
    """

    def __init__(
        self,
        loaders: Mapping[str, ResumableLoader],
        weights: Mapping[str, float],
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
    ) -> None:
        key = "data.init_args.weights"
        if weights.keys() != loaders.keys():
            raise UserError(f"{key} names {', '.join(weights)} and the data sets are {', '.join(loaders)}.")
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise UserError(f"{key}.{name} is {weight}: set it to a number above 0, or leave the data set out.")
        self.loaders = dict(loaders)
        self.num_workers = num_workers
        self._weights = {name: float(weights[name]) for name in sorted(loaders)}
        self._steps_per_epoch = steps_per_epoch

    def __len__(self) -> int:
        """Batches in a pass, wherever the loader stands in it."""
        return self._steps_per_epoch or sum(map(len, self.loaders.values()))

    def __iter__(self) -> Iterator[Batch]:
        left = len(self) - sum(self._steps_done().values()) % len(self)
        reader = _Readers({name: loader.reader for name, loader in self.loaders.items()})
        for loader in self.loaders.values():
            loader.announce()
        for batch in read_batches(reader, islice(self._keys(), left), self.num_workers):
            self.loaders[self._next(self._steps_done())].advance()
            yield batch

    def _keys(self) -> Iterator[list[tuple[str, Key]]]:
        steps_done = self._steps_done()
        keys = {name: loader.keys() for name, loader in self.loaders.items()}
        while True:
            name = self._next(steps_done)
            steps_done[name] += 1
            yield [(name, key) for key in next(keys[name])]

    def _next(self, steps_done: Mapping[str, int]) -> str:
        number = next_source(list(self._weights.values()), [steps_done[name] for name in self._weights])
        return list(self._weights)[number]

    def _steps_done(self) -> dict[str, int]:
        return {name: loader.steps_done for name, loader in self.loaders.items()}

    def state_dict(self) -> dict[str, Any]:
        states = {name: loader.state_dict() for name, loader in self.loaders.items()}
        return {"weights": self._weights, "steps_per_epoch": self._steps_per_epoch, "loaders": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = {"weights": state["weights"], "steps_per_epoch": state["steps_per_epoch"]}
        _check_same_settings(saved, {"weights": self._weights, "steps_per_epoch": self._steps_per_epoch})
        for name, loader in self.loaders.items():
            loader.load_state_dict(state["loaders"][name])


class _Readers(Dataset[dict[str, Any]]):
    """Several readers as one; a key is (name of the reader, its key), all of a batch of one name."""

    def __init__(self, readers: Mapping[str, SampleReader]) -> None:
        self.readers = readers

    def __getitems__(self, keys: Sequence[tuple[str, Key]]) -> list[dict[str, Any]]:
        return self.readers[keys[0][0]].__getitems__([key for _, key in keys])


def _check_same_settings(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """UserError names the first setting that differs; one that is missing counts as None."""
    for name in {**settings, **saved}:
        before, now = saved.get(name), settings.get(name)
        if before != now:
            raise UserError(
                f"The checkpoint stands in the middle of data with {name}={before} and this run has {name}={now}, so "
                "the run cannot be continued exactly: restore that setting, or start a new run from the checkpoint's "
                "weights with init_from."
            )


class OrderedLoader:
    """The same batches in the same order at every pass, for validation; captions are those of epoch 0.

    By count, or by a budget of tokens and a table as in `ResumableLoader`. On several ranks the few samples left over
    are dropped, so that all have as many; by count each rank takes every world_size-th sample.

    Raises:
        UserError: fewer samples than ranks; a sample that exceeds the budget.
    """

    def __init__(
        self,
        reader: SampleReader,
        batch_size: int | None,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        token_budget: int | None = None,
        table: SampleTable | None = None,
    ) -> None:
        self.reader = reader
        self.num_workers = num_workers
        if len(reader) < world_size:
            raise UserError(
                f"{reader.folder} has {len(reader)} samples for {world_size} devices: prepare the data with a larger "
                "val_share, or set trainer.limit_val_batches=0."
            )
        settings = PlanSettings(batch_size, token_budget, world_size, shuffle=False, drop_last=world_size > 1)
        batches: Iterable[Sequence[int]]
        if settings.batch_size is None:
            plan = plan_epoch(table or reader.plain_table(), settings, epoch=0)
            batches = (plan.batch(step, rank).tolist() for step in range(len(plan)))
        else:
            indices = range(rank, len(reader) - len(reader) % world_size, world_size)
            size = settings.batch_size
            batches = (indices[start : start + size] for start in range(0, len(indices), size))
        self._plan = [[(0, index) for index in batch] for batch in batches]

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        return read_batches(self.reader, self._plan, self.num_workers)
