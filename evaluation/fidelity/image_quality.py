"""Two folders of pictures, drawn and real: FID, KID, Inception score, precision and recall, by torch-fidelity.

Its network (TensorFlow's Inception v3 of 2015, converted) and its formulas, with its defaults. Sources: FID: Heusel et
al. 2017. KID: Bińkowski et al. 2018. Inception score: Salimans et al. 2016. Precision and recall: Kynkäänniemi et al.
2019, here on Inception's features, where the paper's are of VGG-16.

FID and the Inception score depend on how many pictures there are, and all of these on how they were resized and
stored: compare only values of sets of one size that were made in the same way.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from evaluation.benchmarks.tally import wilson_interval
from evaluation.fidelity.distances import Array, polynomial_kernel
from evaluation.judges.checkpoints import read_pickle
from evaluation.judges.weights import file_sha256, library_versions
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.pipeline import usable_device

INCEPTION = "inception-v3-compat"  # torch-fidelity's name of its network
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"  # its first digits, which the file's name ends with
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LOSSY = ("JPEG", "WEBP")
BATCH = 64
Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True)
class FidelitySettings:
    """torch-fidelity's defaults. Raises UserError for numbers below 1.

    resize: side of a square to which every picture is brought, the shorter side first, then its middle; None: as they
        are, and then all pictures must have one size.
    """

    resize: int | None = None
    isc_splits: int = 10  # parts over which the Inception score is a mean
    kid_subsets: int = 100  # random subsets over which KID is a mean
    kid_subset_size: int = 1000  # pictures in one
    prc_neighborhood: int = 3  # k of precision and recall
    rng_seed: int = 2020  # of the parts and subsets

    def __post_init__(self) -> None:
        for name in ("isc_splits", "kid_subsets", "kid_subset_size", "prc_neighborhood"):
            at_least_one(name, getattr(self, name))
        if self.resize is not None:
            at_least_one("resize", self.resize)


def fidelity(
    images: Path,
    reference: Path,
    inception: Path | None = None,
    settings: FidelitySettings | None = None,
    extractor: str = INCEPTION,
    device: str | None = None,
) -> dict[str, Any]:
    """How far the drawn pictures in `images` are from the real ones in `reference`, in folders of any depth.

    inception: the network's weights file.   extractor: another network, registered with torch-fidelity by this name.

    Returns `metrics`: name -> `value`, with `low` and `high`, the ends of a 95 % interval, where there is one, and
    `std` over the subsets or parts, as papers print it: fid, kid, inception_score, precision (share of the drawn
    pictures that are among real ones), recall (of the real ones that are among drawn ones); `images` and `reference`:
    count, size [width, height] and a SHA-256 of the pictures; `settings`; `extractor`; `comparable`: verdict and
    reasons; `notes`: sentences on what limits the values; `versions`. Nothing in it depends on time or place.

    The intervals take pictures for independent: where several show the same prompt, they are too narrow. FID has none:
    resampled pictures are further from the real ones than the pictures themselves. Raises UserError for folders without
    pictures, broken ones, sizes that differ, and weights that are absent or others.
    """
    settings = settings or FidelitySettings()
    place = usable_device(device)
    files = {"images": picture_files(images), "reference": picture_files(reference)}
    opened = {name: [_header(file) for file in files[name]] for name in files}
    _check_sizes(opened, settings)
    network, layers, weights = _network(extractor, inception)
    found, sets = {}, {}
    for name in files:
        found[name], digest = features(files[name], network.to(place), settings.resize, place)
        size = [settings.resize, settings.resize] if settings.resize else list(opened[name][0].size)
        sets[name] = {"count": len(files[name]), "size": size, "sha256": digest}
    metrics, notes = _metrics(found["images"], found["reference"], layers, settings)
    return {
        "metrics": metrics,
        **sets,
        "settings": asdict(settings),
        "extractor": {"name": extractor, "layers": layers, "weights": weights},
        "comparable": _comparable(extractor, weights),
        "notes": [*_notes_of_files(opened), *notes],
        "versions": library_versions("torch-fidelity", "torch", "torchvision", "pillow", "numpy"),
    }


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder of any depth, by their names below it. UserError where there are fewer than four."""
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder} with pictures: check the path.")
    files = [path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if len(files) < 4:
        raise UserError(
            f"{folder} has {len(files)} pictures ({', '.join(SUFFIXES)}): the distances need four at least."
        )
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


@dataclass(frozen=True)
class _Header:
    file: Path
    size: tuple[int, int]
    lossy: bool


def _header(file: Path) -> _Header:
    try:
        with Image.open(file) as picture:
            return _Header(file, picture.size, picture.format in LOSSY)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file} is no picture that can be read ({error}): draw it again or take it out.") from None


def _check_sizes(opened: Mapping[str, Sequence[_Header]], settings: FidelitySettings) -> None:
    """UserError, unless they are resized, where two pictures of the folders have different sizes."""
    first, *others = [header for headers in opened.values() for header in headers]
    other = next((header for header in others if header.size != first.size), None)
    if other is not None and settings.resize is None:
        width, height = first.size
        raise UserError(
            f"all pictures must have one size, but {first.file} has {width} x {height} and {other.file} "
            f"{other.size[0]} x {other.size[1]}: give resize=299, say, to bring all to one size in the same way."
        )


def _network(extractor: str, inception: Path | None) -> tuple[Any, dict[str, str], dict[str, Any] | None]:
    """The network, which of its layers each metric is taken from, and what its weights file is."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # takes seconds
    from torch_fidelity.utils import create_feature_extractor

    if extractor not in FEATURE_EXTRACTORS_REGISTRY:
        raise UserError(f"torch-fidelity knows no extractor {extractor}: register it, or leave it out for {INCEPTION}.")
    weights = None
    if extractor == INCEPTION:
        if inception is None or not Path(inception).is_file():
            where = "no weights file was given" if inception is None else f"there is no {inception}"
            raise UserError(f"{where} for Inception: get it from {INCEPTION_URL} and name it as inception.")
        read_pickle(inception)  # torch-fidelity reads it without a check for code: what passes here has none
        weights = {"sha256": file_sha256(inception)}
    kind = FEATURE_EXTRACTORS_REGISTRY[extractor]
    layers = {metric: kind.get_default_feature_layer_for_metric(metric) for metric in ("isc", "fid", "kid", "prc")}
    path = None if inception is None else str(inception)
    try:
        network = create_feature_extractor(
            extractor, sorted(set(layers.values())), cuda=False, feature_extractor_weights_path=path, verbose=False
        )
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{inception} does not fit {extractor} ({reason}): get it from {INCEPTION_URL}.") from error
    return network, layers, weights


def features(
    files: Sequence[Path], network: Any, resize: int | None, device: torch.device
) -> tuple[dict[str, Tensor], str]:
    """Features (N, D) float32 by layer, and a SHA-256 of all files' contents in order."""
    prepare = [transforms.Resize(resize), transforms.CenterCrop(resize)] if resize else []
    show = transforms.Compose([*prepare, transforms.PILToTensor()])
    digest = hashlib.sha256()
    parts: list[dict[str, Tensor]] = []
    with ThreadPoolExecutor() as readers, torch.inference_mode():
        for start in range(0, len(files), BATCH):
            read = list(readers.map(_read, files[start : start + BATCH]))
            for content, _ in read:
                digest.update(hashlib.sha256(content).digest())
            pixels = torch.stack([show(picture) for _, picture in read])
            part = network.convert_features_tuple_to_dict(network(pixels.to(device)))
            parts.append({layer: values.cpu() for layer, values in part.items()})
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}, digest.hexdigest()


def _read(file: Path) -> tuple[bytes, Image.Image]:
    try:
        content = file.read_bytes()
        return content, Image.open(BytesIO(content)).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for files broken in one way or another
        raise UserError(f"{file} is broken ({error}): draw it again or take it out.") from None


def _metrics(
    drawn: Mapping[str, Tensor], real: Mapping[str, Tensor], layers: Mapping[str, str], settings: FidelitySettings
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """The values, and sentences on what limits them."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    notes = []
    statistics = [fid_features_to_statistics(part[layers["fid"]]) for part in (drawn, real)]
    fid = float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])
    counts, width = sorted((len(drawn[layers["fid"]]), len(real[layers["fid"]]))), drawn[layers["fid"]].shape[1]
    if counts[0] <= width:
        notes.append(f"FID compares {width} features of {counts[0]} pictures: too few, its bias outweighs it.")
    if counts[0] != counts[1]:
        notes.append(f"the folders have {counts[0]} and {counts[1]} pictures: FID depends on both numbers.")
    kid, kid_notes = _kid(drawn[layers["kid"]], real[layers["kid"]], settings)
    score, score_notes = _inception_score(drawn[layers["isc"]], settings)
    precision, recall = _precision_recall(drawn[layers["prc"]], real[layers["prc"]], settings)
    metrics = {"fid": {"value": fid}, "kid": kid, "inception_score": score, "precision": precision, "recall": recall}
    return metrics, [*notes, *kid_notes, *score_notes]


def _kid(drawn: Tensor, real: Tensor, settings: FidelitySettings) -> tuple[dict[str, float], list[str]]:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    notes = []
    smaller, size = min(len(drawn), len(real)), settings.kid_subset_size
    if smaller < size:
        size = smaller // 2
        notes.append(
            f"KID is over subsets of {size} pictures, not {settings.kid_subset_size}, as there are only {smaller}."
        )
    subsets = {"kid_subsets": settings.kid_subsets, "kid_subset_size": size, "rng_seed": settings.rng_seed}
    found = kid_features_to_metric(drawn, real, **subsets, verbose=False)
    value, std = float(found[KEY_METRIC_KID_MEAN]), float(found[KEY_METRIC_KID_STD])
    # the pictures are a sample, and so are the subsets of them
    error = sqrt(kid_standard_error(drawn.numpy(), real.numpy()) ** 2 + std**2 / settings.kid_subsets)
    return {"value": value, "low": value - Z * error, "high": value + Z * error, "std": std}, notes


def kid_standard_error(first: Array, second: Array) -> float:
    """Of the unbiased squared MMD of two sets (N, D) and (M, D) under KID's kernel: the jackknife's, over both sets.

    Sums over rows are enough for it: its memory does not grow with N·M. At least three rows each.
    """
    first, second = (np.asarray(rows, dtype=np.float64) for rows in (first, second))
    n, m = len(first), len(second)
    first_own, second_own = _sums_without_self(first), _sums_without_self(second)
    first_across, second_across = _kernel_sums(first, second), _kernel_sums(second, first)
    own, other, across = first_own.sum(), second_own.sum(), first_across.sum()

    def left_out(own: float, sums: Array, n: int, other: float, sums_across: Array, m: int) -> Array:
        """The value without each row of one set."""
        within = (own - 2 * sums) / ((n - 1) * (n - 2)) + other / (m * (m - 1))
        return within - 2 * (across - sums_across) / ((n - 1) * m)

    variance = 0.0
    for values in (
        left_out(own, first_own, n, other, first_across, m),
        left_out(other, second_own, m, own, second_across, n),
    ):
        variance += (len(values) - 1) / len(values) * float(np.square(values - values.mean()).sum())
    return sqrt(variance)


def _kernel_sums(points: Array, others: Array, rows: int = 1000) -> Array:
    """KID's kernel of each point with all others, summed, (N,)."""
    blocks = (points[start : start + rows] for start in range(0, len(points), rows))
    return np.concatenate([polynomial_kernel(block, others).sum(axis=1) for block in blocks])


def _sums_without_self(points: Array) -> Array:
    return _kernel_sums(points, points) - (np.square(points).mean(axis=1) + 1) ** 3


def _inception_score(logits: Tensor, settings: FidelitySettings) -> tuple[dict[str, float], list[str]]:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    splits, notes = settings.isc_splits, []
    if len(logits) < splits:
        splits = 1
        notes.append(
            f"the Inception score is of all {len(logits)} pictures at once, too few for {settings.isc_splits} parts."
        )
    found = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=settings.rng_seed)
    return {"value": float(found[KEY_METRIC_ISC_MEAN]), "std": float(found[KEY_METRIC_ISC_STD])}, notes


def _precision_recall(
    drawn: Tensor, real: Tensor, settings: FidelitySettings
) -> tuple[dict[str, float], dict[str, float]]:
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if min(len(drawn), len(real)) <= settings.prc_neighborhood:
        raise UserError(f"prc_neighborhood={settings.prc_neighborhood} needs more pictures than that in each folder.")
    found = prc_features_to_metric(drawn, real, prc_neighborhood=settings.prc_neighborhood, verbose=False)
    return _share(found[KEY_METRIC_PRECISION], len(drawn)), _share(found[KEY_METRIC_RECALL], len(real))


def _share(value: float, count: int) -> dict[str, float]:
    low, high = wilson_interval(value, count)
    return {"value": value, "low": min(low, value), "high": max(high, value)}  # rounding may put an end across it


def _notes_of_files(opened: Mapping[str, Sequence[_Header]]) -> list[str]:
    notes = []
    for name, headers in opened.items():
        lossy = sum(header.lossy for header in headers)
        if lossy:
            notes.append(
                f"{lossy} of {len(headers)} pictures in {name} are JPEG or WebP: lossy compression changes all values."
            )
    return notes


def _comparable(extractor: str, weights: Mapping[str, Any] | None) -> dict[str, Any]:
    """Whether other people's values can stand beside these, as far as the network goes."""
    reasons = []
    if extractor != INCEPTION:
        reasons.append(f"the features are of {extractor}, not of {INCEPTION}.")
    elif weights is not None and not weights["sha256"].startswith(INCEPTION_SHA256):
        reasons.append(f"the Inception is not the one of {INCEPTION_URL}.")
    return {"verdict": not reasons, "reasons": reasons}
