"""Concept balancing: samples of rare concepts come more often, until concepts have the shares that a prior asks for.

A sample is a document and its tags are the words (`tags.npz` beside planning.npz). BM25, the ranking formula of text
search, says how much of a sample each of its tags is: a rare tag takes the most of it. So a person beside an axolotl
counts for axolotls. The parts that fall to a concept make its share of the data; what the prior wants of it, over that
share, is how often those parts are drawn.

Source: Z-Image's report (arXiv 2511.22699) names tagged resampling with BM25 rarity against a target prior; it gives no
formula. BM25 as in Robertson and Zaragoza, "The Probabilistic Relevance Framework" (2009), §3.
"""

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from zimage_lit.errors import UserError, at_least_one

TAGS = "tags.npz"
SEPARATORS = str.maketrans("，、;；", ",,,,")  # between the tags of a caption, beside the comma
KEY = "data.init_args.balance"


@dataclass(frozen=True)
class BalanceSettings:
    """How an epoch is drawn so that concepts have their shares.

    Raises UserError for numbers that make no sense.
    """

    prior: dict[str, float] | None = None  # concept -> weight, 1 for those not named; null: all concepts alike
    strength: float = 1.0  # 0 leaves the data as they are, 1 goes all the way to the prior
    max_repeats: float = 10.0  # most times that an epoch has a sample, on average over epochs
    min_samples: int = 5  # tags of fewer samples are no concepts: misspelt ones would be drawn most of all
    k1: float = 1.2  # BM25: how little it adds that a sample names a tag again; 0 = nothing
    b: float = 0.75  # BM25: how much less a tag counts among many others; 0 = none

    def __post_init__(self) -> None:
        at_least_one(f"{KEY}.min_samples", self.min_samples)
        limits = {"strength": 1.0, "b": 1.0, "k1": float("inf"), "max_repeats": float("inf")}
        for name, most in limits.items():
            value, least = getattr(self, name), 1.0 if name == "max_repeats" else 0.0
            if not (least <= value <= most and value < float("inf")):
                bounds = f"from {least:g} up" if most == float("inf") else f"from {least:g} to {most:g}"
                raise UserError(f"{KEY}.{name} is {value}: set it to a number {bounds}.")
        for name, weight in (self.prior or {}).items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"{KEY}.prior.{name} is {weight}: a weight is a number from 0 up.")


@dataclass(frozen=True)
class TagTable:
    """The tags of N samples, one after the other.

    ends: int64 (N,), behind the last tag of each sample.   tags: int32, places in `names`; a sample may have none, or
    one several times.
    """

    ends: np.ndarray
    tags: np.ndarray
    names: tuple[str, ...]


def tags_of(captions: Mapping[str, Mapping[str, str]], concept: str | None = None) -> list[str]:
    """What a sample is about: the entries of its caption of the kind `tags`, between commas, and its `concept`.

    Of several languages the first by name speaks, so that a thing has one name. Upper and lower case are the same.
    """
    spoken = next((captions[language]["tags"] for language in sorted(captions) if "tags" in captions[language]), "")
    found = [entry.strip().casefold() for entry in spoken.translate(SEPARATORS).split(",")]
    return [entry for entry in [*found, (concept or "").casefold()] if entry]


def collect_tags(documents: Iterable[Sequence[str]]) -> TagTable:
    """The table of many samples' tags; names are numbered as they come."""
    numbers: dict[str, int] = {}
    ends, tags = array("q"), array("i")
    for document in documents:
        tags.extend(numbers.setdefault(name, len(numbers)) for name in document)
        ends.append(len(tags))
    return TagTable(np.array(ends, dtype=np.int64), np.array(tags, dtype=np.int32), tuple(numbers))


def tags_file(table: TagTable) -> bytes:
    """The bytes of tags.npz."""
    buffer = BytesIO()
    names = np.frombuffer(json.dumps(table.names, ensure_ascii=False).encode(), dtype=np.uint8)
    np.savez(buffer, ends=table.ends, tags=table.tags, names=names)
    return buffer.getvalue()


def read_tags(folder: Path, num_samples: int) -> TagTable:
    """The tags of a prepared split. Raises UserError where there are none, or the file is damaged or of other data."""
    path = folder / TAGS
    if not path.is_file():
        raise UserError(
            f"{path} is missing, which {KEY} needs: prepare data whose samples have a caption of the kind tags or a "
            "concept, or leave it out."
        )
    try:
        with np.load(path) as file:
            table = TagTable(file["ends"], file["tags"], tuple(json.loads(file["names"].tobytes())))
    except Exception as error:  # damaged bytes break zipfile, zlib, json and numpy in many ways
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}): copy it again, or prepare the data again."
        ) from error
    if len(table.ends) != num_samples:
        raise UserError(
            f"{path} has the tags of {len(table.ends)} samples and the split has {num_samples}: copy the data again, "
            "or prepare them again."
        )
    return table


def inverse_document_frequency(documents_with: np.ndarray, documents: int) -> np.ndarray:
    """Rarity of tags, float64: Robertson's and Spärck Jones', with 1 added inside so that none is below 0."""
    return np.log1p((documents - documents_with + 0.5) / (documents_with + 0.5))


def balanced_weights(table: TagTable, settings: BalanceSettings) -> np.ndarray:
    """How often each sample comes in an epoch, float64 (N,); 1 for samples without any concept.

    With p(c | sample) the share of a sample that falls to concept c, its BM25 score among the scores of the sample's
    concepts, and with p(c) the mean of that over the samples: weight = sum over c of p(c | sample) * (prior(c) /
    p(c))^strength, brought to a mean of 1. Where every sample is of one concept alone, drawn shares are then the
    prior's exactly; elsewhere they come nearer to it, and the other concepts of the same samples come along. What
    `max_repeats` takes away is missing: an epoch is then shorter.

    Raises UserError for a prior that names unknown concepts or gives none any weight.
    """
    sample, tag, score, concepts = _bm25(table, settings)
    prior = _prior(concepts, table.names, settings)
    totals = np.bincount(sample, score, minlength=len(table.ends))
    part = score / totals[sample]
    known = max(int(np.count_nonzero(totals)), 1)
    share = np.bincount(tag, part, minlength=len(concepts)) / known
    pull = (prior / np.where(share > 0, share, 1)) ** settings.strength
    weights = np.bincount(sample, part * pull[tag], minlength=len(table.ends))
    weights = weights / max(weights.sum() / known, 1e-300)
    return np.where(totals > 0, np.minimum(weights, settings.max_repeats), 1.0)


def _bm25(table: TagTable, settings: BalanceSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(sample, concept, score) of every concept that a sample has, and the concepts as places in the table's names."""
    lengths = np.diff(table.ends, prepend=0)
    documents, width = len(lengths), max(len(table.names), 1)
    pairs = np.repeat(np.arange(documents, dtype=np.int64), lengths) * width + table.tags
    pairs, times = np.unique(pairs, return_counts=True)
    sample, name = np.divmod(pairs, width)
    documents_with = np.bincount(name, minlength=width)
    concepts = np.flatnonzero(documents_with >= settings.min_samples)
    place = np.full(width, -1)
    place[concepts] = np.arange(len(concepts))
    kept = place[name] >= 0
    sample, tag, times = sample[kept], place[name[kept]], times[kept]
    relative_length = lengths / max(lengths.mean(), 1e-12)
    damping = settings.k1 * (1 - settings.b + settings.b * relative_length[sample])
    rarity = inverse_document_frequency(documents_with[concepts], documents)
    return sample, tag, rarity[tag] * times * (settings.k1 + 1) / (times + damping), concepts


def _prior(concepts: np.ndarray, names: Sequence[str], settings: BalanceSettings) -> np.ndarray:
    """The share that each concept shall have, float64, together 1."""
    places = {names[name]: place for place, name in enumerate(concepts.tolist())}
    wanted = np.ones(len(concepts))
    for name, weight in (settings.prior or {}).items():
        if name not in places:
            listed = ", ".join(list(places)[:20]) or "none"
            raise UserError(
                f"{KEY}.prior.{name} is no concept of these data: with {settings.min_samples} samples or more there "
                f"are {listed}{', …' if len(places) > 20 else ''}."
            )
        wanted[places[name]] = weight
    if len(concepts) and not wanted.any():
        raise UserError(f"{KEY}.prior gives no concept a weight above 0: give one to any of them.")
    return wanted / max(wanted.sum(), 1e-300)
