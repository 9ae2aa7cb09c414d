"""Which samples make up each step of an epoch, on each rank: a pure function of the data, the settings and the epoch.

A plan is made from a few numbers a sample, without a look at a picture, and it is the same wherever it is made: that is
what lets a run be killed anywhere and continue exactly. No loop here runs over samples; ten million take seconds.

Batches are made by count, or by a budget of tokens: then long sequences make small batches and short ones large. With
token counts at hand, a step takes samples of one bucket (pictures of one size) with captions of about one length, dealt
to the ranks so that all have the same to do. What is left over of each bucket is mixed, neighbours in length together.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_modules.balancing import BalanceSettings, balanced_weights, read_tags, tags_file
from data_modules.buckets import PATCH_PIXELS, SizeMapping, image_tokens
from zimage_lit.errors import UserError
from zimage_lit.rng import generator

PLANNING = "planning.npz"
PLANNING_COLUMNS = ("width", "height", "caption_tokens", "concept")
BLOCK = 2**20  # samples
PAD_MULTIPLE = 32  # tokens; the backbone pads the image and the caption of each sample to a multiple of it


@dataclass(frozen=True)
class SampleTable:
    """What planning knows of N samples. Arrays of N; None: nothing is known, all samples are alike.

    tokens: int32, of the packed sequence, image and caption with their pads. bucket: int32, equal where the training
    sizes are. chunk: int32, the file that holds the sample, in stored order. weight: float64, how often an epoch has
    the sample. settings: what the table was made with, as plain values, which a resumed run must have too.
    """

    num_samples: int
    tokens: np.ndarray | None = None
    bucket: np.ndarray | None = None
    chunk: np.ndarray | None = None
    weight: np.ndarray | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanSettings:
    """How batches are made, alike on all ranks.

    batch_size: samples a rank and step; or token_budget: packed tokens a rank and step, at most, even if all samples of
    the batch were padded to its longest. One of them is None.
    shuffle: a new order each epoch; False keeps the stored order as far as batches allow.
    drop_last: leave out the last samples of the epoch's order that all ranks cannot share evenly: fewer than batch_size
    * world_size, with a token budget fewer than world_size. False leaves out none (see `plan_epoch`).
    window: chunks; samples are shuffled and put into batches inside windows of that many neighbours in a shuffled order
    of the chunks, so a cache of window + 1 chunks suffices if a chunk holds a step. None: over the whole data set.
    """

    batch_size: int | None
    token_budget: int | None = None
    world_size: int = 1
    shuffle: bool = True
    drop_last: bool = True
    window: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.token_budget is None):
            raise UserError("Set one of data.init_args.batch_size and data.init_args.token_budget, the other to null.")
        for name in ("batch_size", "token_budget", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.init_args.{name} is {value}: set it to 1 or more.")

    @property
    def share(self) -> int:
        """Samples that all ranks together take at least, so that none is ever without."""
        return self.world_size * (self.batch_size or 1)


@dataclass(frozen=True)
class EpochPlan:
    """The steps of an epoch. order: sample indices, one batch after the other; offsets: int64, where each begins.

    Batch (step, rank) is number step * world_size + rank.
    """

    order: np.ndarray
    offsets: np.ndarray
    world_size: int

    def __len__(self) -> int:
        """Steps, the same for every rank."""
        return (len(self.offsets) - 1) // self.world_size

    def batch(self, step: int, rank: int) -> np.ndarray:
        """Sample indices of a rank's batch."""
        number = step * self.world_size + rank
        return self.order[self.offsets[number] : self.offsets[number + 1]]

    def remaining(self, step: int, rank: int) -> np.ndarray:
        """Sample indices of all batches that a rank takes from `step` on, in their order."""
        numbers = slice(step * self.world_size + rank, None, self.world_size)
        starts, ends = self.offsets[:-1][numbers], self.offsets[1:][numbers]
        return self.order[_ranges(starts, ends - starts)]


def read_table(
    folder: Path,
    chunk_sizes: Sequence[int],
    sizes: SizeMapping | None = None,
    max_caption_tokens: int = 512,
    concepts: Sequence[str] = (),
    concept_weights: Mapping[str, float] | None = None,
    balance: BalanceSettings | None = None,
    pad_multiple: int = PAD_MULTIPLE,
    pictures: int = 1,
    sequences: int = 1,
) -> SampleTable:
    """The table of a prepared split, from its planning.npz; without that file only the chunks are known.

    chunk_sizes: samples in each chunk. sizes: at which pictures are trained; None: as they are stored.
    max_caption_tokens: where the text encoder cuts. concepts: names that the file's column `concept` points into.
    concept_weights: name -> how often its samples come in an epoch; 1 for all others.
    balance: how often each sample comes so that concepts have their shares, from the split's tags.npz.
    pictures: of about one size in each of a sample's sequences (editing: 2).   sequences: of a sample (preference: 2).

    Raises UserError: the file is needed and missing, damaged or of other samples; unknown concepts.
    """
    chunk = np.repeat(np.arange(len(chunk_sizes), dtype=np.int32), chunk_sizes)
    path = folder / PLANNING
    if not path.is_file():
        if sizes is not None or concept_weights or balance:
            raise UserError(
                f"{path} is missing, which data.init_args.sizes, concept_weights and balance need: prepare the data "
                "again, or leave them out."
            )
        return SampleTable(len(chunk), chunk=chunk)
    columns = _read_columns(path, len(chunk))
    image, bucket = _pictures(columns["width"], columns["height"], sizes)
    captions = np.minimum(columns["caption_tokens"], max_caption_tokens)
    settings: dict[str, Any] = {
        "sizes": sizes and sizes.settings,
        "max_caption_tokens": max_caption_tokens,
        "pad_multiple": pad_multiple,
        "concept_weights": dict(concept_weights or {}),
        "planning": hashlib.sha256(b"".join(column.tobytes() for column in columns.values())).hexdigest(),
    }
    weight = weights_of(columns["concept"], concepts, concept_weights) if concept_weights else None
    if balance:
        tags = read_tags(folder, len(chunk))
        weight = balanced_weights(tags, balance)
        settings["balance"] = {**asdict(balance), "tags": hashlib.sha256(tags_file(tags)).hexdigest()}
    return SampleTable(
        len(chunk),
        tokens=sequences * packed_tokens(pictures * image, captions, pad_multiple),
        bucket=bucket,
        chunk=chunk,
        weight=weight,
        settings=settings,
    )


def _pictures(width: np.ndarray, height: np.ndarray, sizes: SizeMapping | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and bucket of each picture, int32 (N,), from its stored size; worked out block by block to save memory."""
    tokens, codes = (np.empty(len(width), dtype=np.int64) for _ in range(2))
    for start in range(0, len(width), BLOCK):
        block = slice(start, start + BLOCK)
        wide, high = width[block].astype(np.int64), height[block].astype(np.int64)
        if sizes is not None:
            wide, high = sizes(wide, high)
        tokens[block] = image_tokens(wide, high)
        codes[block] = wide << 32 | high
    _, bucket = np.unique(codes, return_inverse=True)
    return tokens.astype(np.int32), bucket.astype(np.int32)


def packed_tokens(image: np.ndarray, captions: np.ndarray, pad_multiple: int = PAD_MULTIPLE) -> np.ndarray:
    """Tokens of each sample when both its segments are padded to a multiple: int32 (N,)."""
    padded = [-(-tokens.astype(np.int32) // pad_multiple) * pad_multiple for tokens in (image, captions)]
    return np.asarray(padded[0] + padded[1], dtype=np.int32)


def check_stored_sides(folder: Path, num_samples: int, place: str, key: str) -> None:
    """UserError where pictures of a split cannot be trained at the size they have; without planning.npz none is known.

    place: path or address of the split, for the message.   key: the setting that would resize them.
    """
    path = folder / PLANNING
    if not path.is_file():
        return
    columns = _read_columns(path, num_samples)
    width, height = columns["width"], columns["height"]
    odd = np.flatnonzero((width % PATCH_PIXELS > 0) | (height % PATCH_PIXELS > 0))
    if len(odd):
        raise UserError(
            f"{len(odd)} of the {num_samples} pictures in {place} have sides that are no multiple of {PATCH_PIXELS} "
            f"pixels, the first {width[odd[0]]}x{height[odd[0]]}: set {key}, for example to 1024, and they are resized."
        )


def weights_of(concept: np.ndarray, concepts: Sequence[str], weights: Mapping[str, float]) -> np.ndarray:
    """The weight of each sample, float64 (N,), from its concept's place in `concepts`; 1 where it has none (-1)."""
    table = np.ones(len(concepts) + 1)  # the last is that of -1
    for name, weight in weights.items():
        key = f"data.init_args.concept_weights.{name}"
        if name not in concepts:
            raise UserError(
                f"{key} names a concept that the data do not have: they have {', '.join(concepts) or 'none'}."
            )
        if not 0 <= weight < float("inf"):
            raise UserError(f"{key} is {weight}: a weight is a number from 0 up.")
        table[concepts.index(name)] = weight
    return table[concept]


def check_budget(table: SampleTable, settings: PlanSettings) -> None:
    """UserError where a budget of tokens is set and some sample exceeds it, or nothing is known of their tokens."""
    if settings.token_budget is None:
        return
    if table.tokens is None:
        raise UserError(
            f"data.init_args.token_budget needs the sizes of the pictures and the data have no {PLANNING}: prepare the "
            "data again, or set batch_size instead."
        )
    longest = int(np.argmax(table.tokens))
    tokens = int(table.tokens[longest])
    if tokens > settings.token_budget:
        raise UserError(
            f"Sample number {longest} has {tokens} tokens, more than data.init_args.token_budget="
            f"{settings.token_budget}: set that to {tokens} or more, or lower data.init_args.sizes.resolution."
        )


def plan_epoch(table: SampleTable, settings: PlanSettings, epoch: int) -> EpochPlan:
    """The batches of all ranks in an epoch.

    Every sample comes once (or as often as its weight says), every rank has as many steps, none is without samples in
    any, and no batch exceeds the budget. Without token counts, batches are slices of the epoch's order.

    With drop_last=False the few samples at the end that do not suffice for all ranks borrow from another step. Where
    every batch is of one sample there is nothing to borrow, and fewer than world_size samples come a second time.

    Raises UserError: the epoch has too few samples for one step of all ranks; see also `check_budget`.
    """
    check_budget(table, settings)
    order, window_ends = _epoch_order(table, settings, epoch)
    if table.tokens is None:
        starts = np.append(np.arange(0, len(order), settings.share), len(order))
        order, starts = _serve_every_rank(order, starts, settings.world_size)
        return _contiguous_plan(order, starts, settings.world_size)
    order, starts, window = _bucketed_steps(order, window_ends, table, settings)
    order, starts = _serve_every_rank(order, starts, settings.world_size)
    order, starts = _steps_in_epoch_order(order, starts, window, settings, epoch)
    return _dealt_plan(order, starts, settings.world_size)


@dataclass(frozen=True)
class PaddingShare:
    """Pads among all tokens. packed: as the backbone packs, where only segments are padded, each to a multiple.
    to_longest: if each batch were padded to its longest sample as well. beyond_multiple: what that adds to packed."""

    packed: float
    to_longest: float
    beyond_multiple: float


def padding_share(
    plan: EpochPlan, image: np.ndarray, captions: np.ndarray, pad_multiple: int = PAD_MULTIPLE
) -> PaddingShare:
    """The pads of an epoch. image, captions: the tokens of each of the data's N samples, without pads."""
    packed_of = packed_tokens(image, captions, pad_multiple)[plan.order]
    longest = np.maximum.reduceat(packed_of, plan.offsets[:-1])
    real = int(image[plan.order].sum(dtype=np.int64) + captions[plan.order].sum(dtype=np.int64))
    packed = int(packed_of.sum(dtype=np.int64))
    padded = int((longest * np.diff(plan.offsets)).sum())
    return PaddingShare(1 - real / packed, 1 - real / padded, 1 - packed / padded)


def next_source(weights: Sequence[float], steps_done: Sequence[int]) -> int:
    """Which of several data sets gives the next step, so that each gets its weight's share of the steps at all times.

    After any number of steps, each set has been chosen less than one step more or less often than its share says, so
    over any window of steps the difference is less than two. steps_done: how often each was chosen before; nothing else
    is remembered.

    Tijdeman's algorithm ("The chairman assignment problem", 1980): of the sets that may be chosen without coming too
    far ahead, the one that would be the first to fall too far behind. In fractions, so that no rounding adds up.
    """
    shares = [Fraction(weight) for weight in weights]
    total, step = sum(shares), sum(steps_done) + 1
    chosen = [number for number, share in enumerate(shares) if share > 0]
    slack = 1 - Fraction(1, max(2 * len(chosen) - 2, 1))  # what a set may be ahead or behind
    due = [n for n in chosen if step * shares[n] / total - steps_done[n] >= 1 - slack]
    return min(due, key=lambda n: (steps_done[n] + slack) * total / shares[n])


def _epoch_order(table: SampleTable, settings: PlanSettings, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample indices in the epoch's order, window by window, and where each window ends."""
    order = _appearing(table, settings, epoch)
    if settings.shuffle:
        order = order[_permutation(len(order), settings, "data order", epoch)]
    usable = len(order) - (len(order) % settings.share if settings.drop_last else 0)
    if usable < settings.world_size:
        raise UserError(
            f"Epoch {epoch} has {len(order)} samples, fewer than the {settings.share} of one step on "
            f"{settings.world_size} devices: use smaller batches or fewer devices, or prepare more samples."
        )
    if settings.window is None:
        return order[:usable], np.array([usable])
    return _in_windows(order, usable, table, settings, epoch)


def _appearing(table: SampleTable, settings: PlanSettings, epoch: int) -> np.ndarray:
    """The indices of the epoch's samples, ascending. Over epochs a sample of weight w comes w times an epoch exactly.

    Each sample's count of appearances grows by w an epoch, from a random phase of its own, and it appears whenever that
    count passes a whole number.
    """
    kind = np.int32 if table.num_samples < 2**31 else np.int64
    everyone = np.arange(table.num_samples, dtype=kind)
    if table.weight is None:
        return everyone
    draws = generator(settings.seed, "concept weights")
    phase = torch.rand(table.num_samples, dtype=torch.float64, generator=draws).numpy()
    before, after = (np.floor(count * table.weight + phase) for count in (epoch, epoch + 1))
    return np.repeat(everyone, (after - before).astype(np.int64))


def _in_windows(
    order: np.ndarray, usable: int, table: SampleTable, settings: PlanSettings, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `usable` samples when `order` is sorted into windows of neighbours in a shuffled order of the chunks.

    A window ends where the last of its chunks does, less the few samples that its steps could not share evenly among
    the ranks: those open the next window. So no window but the last has a remainder.
    """
    assert table.chunk is not None and settings.window is not None
    num_chunks = int(table.chunk[-1]) + 1
    place = np.arange(num_chunks)
    if settings.shuffle:
        place = _permutation(num_chunks, settings, "chunk order", epoch)
    chunk = place[table.chunk[order]]
    chunk_ends = np.cumsum(np.bincount(chunk, minlength=num_chunks))
    ends = chunk_ends[settings.window - 1 :: settings.window]
    ends = np.unique(np.append(ends - ends % settings.share, usable))
    ends = ends[(ends > 0) & (ends <= usable)]
    by_chunk = np.argsort(chunk, kind="stable")[:usable]
    window = np.full(len(order), len(ends))
    window[by_chunk] = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    return order[np.argsort(window, kind="stable")[:usable]], ends


def _bucketed_steps(
    order: np.ndarray, window_ends: np.ndarray, table: SampleTable, settings: PlanSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut each window into steps of all ranks. Returns the samples, where each step starts (and the last ends), and
    the window of each step. Within a step, longer samples come first."""
    assert table.tokens is not None
    window = np.repeat(np.arange(len(window_ends), dtype=np.int32), np.diff(window_ends, prepend=0))
    tokens, bucket = table.tokens[order], (table.tokens if table.bucket is None else table.bucket)[order]
    place = np.lexsort((-tokens, bucket, window))
    order, tokens, bucket = order[place], tokens[place], bucket[place]  # the windows stay where they were
    step_size = _samples_of_a_step(tokens, settings)

    starts = _cut(step_size, window, bucket)
    sizes = np.diff(starts)
    full = sizes == step_size[starts[:-1]]
    rest = np.flatnonzero(np.repeat(~full, sizes))
    rest = rest[np.lexsort((bucket[rest], -tokens[rest], window[rest]))]
    mixed_starts = _cut(step_size[rest], window[rest])

    samples = np.concatenate([np.flatnonzero(np.repeat(full, sizes)), rest])
    all_sizes = np.concatenate([sizes[full], np.diff(mixed_starts)])
    step_window = np.concatenate([window[starts[:-1][full]], window[rest[mixed_starts[:-1]]]])
    by_window = np.argsort(step_window, kind="stable")
    order, starts = _permute_steps(order[samples], np.append(0, np.cumsum(all_sizes)), by_window)
    return order, starts, step_window[by_window]


def _samples_of_a_step(tokens: np.ndarray, settings: PlanSettings) -> np.ndarray:
    """How many samples a full step has on all ranks together, by the tokens of its longest."""
    if settings.token_budget is None:
        return np.full(len(tokens), settings.share)
    return settings.token_budget // tokens.astype(np.int64) * settings.world_size


def _cut(step_size: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Cut a sequence into steps: where each starts, and the length of the whole.

    A step is as long as `step_size` says at its first place, or ends where the value of a column changes.
    """
    length = len(step_size)
    if length == 0:
        return np.zeros(1, dtype=np.int64)
    changes = np.zeros(length - 1, dtype=bool)
    for column in columns:
        changes |= column[1:] != column[:-1]
    ends = np.append(np.flatnonzero(changes) + 1, length)
    following = np.minimum(np.arange(length) + step_size, np.repeat(ends, np.diff(ends, prepend=0)))
    return _follow(np.append(following, length))


def _follow(following: np.ndarray) -> np.ndarray:
    """0, following[0], following[following[0]] and so on up to the last place, which follows itself.

    Each round doubles what is known: the places so far, and then those that lie as many hops on.
    """
    last = len(following) - 1
    places = np.zeros(1, dtype=np.int64)
    while places[-1] < last:
        places = np.concatenate([places, following[places]])
        following = following[following]
    return places[: np.searchsorted(places, last) + 1]


def _serve_every_rank(order: np.ndarray, starts: np.ndarray, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill the last step up to one sample a rank: from the latest step that can spare them, else with samples again."""
    missing = world_size - int(starts[-1] - starts[-2])
    if missing <= 0:
        return order, starts
    sizes = np.diff(starts)
    donors = np.flatnonzero(sizes >= world_size + missing)
    if len(donors) == 0:
        return np.concatenate([order, order[:missing]]), np.append(starts[:-1], starts[-1] + missing)
    end = int(starts[donors[-1] + 1])
    moved = np.concatenate([order[: end - missing], order[end:], order[end - missing : end]])
    sizes[donors[-1]] -= missing
    sizes[-1] += missing
    return moved, np.append(0, np.cumsum(sizes))


def _steps_in_epoch_order(
    order: np.ndarray, starts: np.ndarray, window: np.ndarray, settings: PlanSettings, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Steps shuffled inside their window; unshuffled, by their first sample."""
    if settings.shuffle:
        key = _permutation(len(window), settings, "step order", epoch)
    else:
        key = np.minimum.reduceat(order, starts[:-1])
    return _permute_steps(order, starts, np.lexsort((key, window)))


def _permute_steps(order: np.ndarray, starts: np.ndarray, permutation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.diff(starts)[permutation]
    return order[_ranges(starts[permutation], sizes)], np.append(0, np.cumsum(sizes))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1 ... for lengths[0] numbers, then the same of the others."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _contiguous_plan(order: np.ndarray, starts: np.ndarray, world_size: int) -> EpochPlan:
    """Each rank takes a slice of each step, the first ranks one sample more where the step does not divide."""
    sizes = np.diff(starts)[:, None]
    counts = sizes // world_size + (np.arange(world_size) < sizes % world_size)
    return EpochPlan(order, np.append(0, np.cumsum(counts)), world_size)


def _dealt_plan(order: np.ndarray, starts: np.ndarray, world_size: int) -> EpochPlan:
    """Each step's samples, longest first, are dealt to the ranks to and fro, so all get about the same tokens.

    The ranks differ by less than the tokens of one sample, and by nothing where all are alike and the step divides.
    """
    sizes = np.diff(starts)
    place = np.arange(len(order)) - np.repeat(starts[:-1], sizes)
    row, column = np.divmod(place, world_size)
    rank = np.where(row % 2 == 0, column, world_size - 1 - column)
    number = np.repeat(np.arange(len(sizes)), sizes) * world_size + rank
    offsets = np.append(0, np.cumsum(np.bincount(number, minlength=len(sizes) * world_size)))
    dealt = np.empty_like(order)
    dealt[offsets[number] + row] = order
    return EpochPlan(dealt, offsets, world_size)


def _permutation(length: int, settings: PlanSettings, purpose: str, epoch: int) -> np.ndarray:
    return torch.randperm(length, generator=generator(settings.seed, purpose, epoch)).numpy()


def _read_columns(path: Path, num_samples: int) -> dict[str, np.ndarray]:
    """The columns of a planning.npz that fit the samples."""
    try:
        with np.load(path) as file:
            columns = {name: file[name] for name in PLANNING_COLUMNS}
    except Exception as error:  # damaged bytes break zipfile, zlib and numpy in many ways
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}): copy it again, or prepare the data again."
        ) from error
    for name, column in columns.items():
        if column.shape != (num_samples,):
            raise UserError(
                f"{path} has {len(column)} values of {name} for {num_samples} samples: copy the data again, or prepare "
                "them again."
            )
    return columns
