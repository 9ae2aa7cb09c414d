"""Trains the TinyWorld classifier: a minute or two on one core, the same weights for the same settings."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, mse_loss, one_hot, pad

from data_modules.tinyworld.combinations import COLORS
from data_modules.tinyworld.world import CELL, DEFAULT_SIZE, TASK_WEIGHTS, draw
from evaluation.fidelity.classifier_pictures import IGNORED, SORTS, Labelled, labelled_world, training_pictures
from evaluation.fidelity.tinyworld_classifier import (
    EMPTY,
    JUNK,
    KINDS,
    LETTERS,
    ClassifierConfig,
    Judgement,
    TinyWorldClassifier,
    read_words,
)
from zimage_lit.components.codecs import LatentCodec, PatchPCACodec
from zimage_lit.rng import generator

SIZES = ((64, 64), (64, 64), (64, 64), (80, 48))  # of the pictures of successive steps
CODEC_CHANNELS = (16, 12, 24)  # of the codecs through which half of the pictures go
PEAK_LR, WEIGHT_DECAY = 4e-3, 0.02
NO_LETTER = 0.1  # weight of the places where no letter begins: nearly all
PICTURE_WEIGHT = 0.3  # of what the whole picture is asked, beside cells and letters
SPOILT = 0.12  # share of pictures blurred or drowned in noise until nothing in them is a shape
LEAST_SPREAD = 0.3  # of a feature that is standardised by its own spread, as a share of the usual one
MAX_SHIFT = 2  # pixels by which a picture is off the lattice and still counts
TEST_SEED = 51_000_000  # of the pictures that measure it
TEST_PICTURES = 1024  # held out, after the codec's reconstruction


def train_classifier(config: ClassifierConfig, progress: bool = True) -> TinyWorldClassifier:
    """A trained classifier in evaluation mode, its `report` filled, on the CPU.

    Can be called from anywhere: the global generator is left alone, and gradients are on in here.
    """
    with _one_thread(), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(generator(config.seed, "classifier/weights").initial_seed())
        classifier = TinyWorldClassifier(config)
        pools = _pools(config)
        codecs = fitted_codecs(pools[SIZES[0]].images)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=config.steps + 1, pct_start=0.2)
        classifier.train()
        for step in track(range(config.steps), "Training the TinyWorld classifier", disable=not progress):
            random_numbers = generator(config.seed, "classifier/step", step)
            batch = _drawn(pools[SIZES[step % len(SIZES)]], config, random_numbers)
            batch, quality = _varied(batch, codecs, random_numbers)
            loss = _loss(classifier, batch, quality)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        classifier.requires_grad_(False).eval()
        _settle_features(classifier, pools[SIZES[0]])
        classifier.report = accuracy(classifier, codecs[0])
    return classifier


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in an order that does not depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pools(config: ClassifierConfig) -> dict[tuple[int, int], Labelled]:
    """Size -> the pictures to train on, as many as the size's share of the steps."""
    each = -(-config.num_pictures // len(SIZES))
    return {size: training_pictures(each * SIZES.count(size), config.seed, size) for size in dict.fromkeys(SIZES)}


def fitted_codecs(images: Tensor) -> list[PatchPCACodec]:
    """Linear codecs of several qualities, fitted to uint8 pictures (B, 3, H, W): the first is as the data sets' own."""
    codecs = []
    with tempfile.TemporaryDirectory() as folder:
        for channels in CODEC_CHANNELS:
            codec = PatchPCACodec.fit(as_floats(images[:2048]), f"{folder}/{channels}", channels)
            codec.encode(torch.zeros(1, 3, CELL, CELL))  # reads its files while they are there
            codecs.append(codec)
    return codecs


def as_floats(images: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def _drawn(pool: Labelled, config: ClassifierConfig, random_numbers: torch.Generator) -> Labelled:
    batch = pool.at(torch.randint(len(pool.images), (config.batch_size,), generator=random_numbers))
    return batch._replace(images=as_floats(batch.images))


def _varied(batch: Labelled, codecs: list[PatchPCACodec], random_numbers: torch.Generator) -> tuple[Labelled, Tensor]:
    """The batch as a network in training might have drawn it, and how blurred and how noisy each picture is, (B, 2)."""
    count = len(batch.images)
    chance = torch.rand(5, count, generator=random_numbers)
    images = _shifted(batch.images, random_numbers)
    codec = codecs[int(torch.randint(len(codecs), (), generator=random_numbers))]
    images[::2] = codec.decode(codec.encode(images[::2]))
    images = images * (0.85 + 0.3 * chance[0]).view(-1, 1, 1, 1) + (0.1 * (chance[1] - 0.5)).view(-1, 1, 1, 1)
    spoilt, drowned = chance[2] < SPOILT, chance[2] < SPOILT / 2
    blur = torch.where(spoilt & ~drowned, 6.0, chance[3])
    noise = torch.where(drowned, 0.7 + chance[4], 0.12 * chance[4] ** 2)
    images = _blurred(images, blur)
    grain = torch.randn(images.shape, generator=random_numbers)
    images = (images + noise.view(-1, 1, 1, 1) * grain).clamp(-1, 1)
    quality = torch.stack([blur.clamp(max=2), noise.clamp(max=0.5) * 4], 1)
    return _relabelled(batch._replace(images=images), spoilt, drowned), quality


def _shifted(images: Tensor, random_numbers: torch.Generator) -> Tensor:
    """Half of the pictures as they are, the others in four groups by up to two pixels in a direction of their own."""
    height, width = images.shape[2:]
    still, *groups = images.tensor_split([len(images) * share // 8 for share in (4, 5, 6, 7)])
    moved = [still]
    for group in groups:
        x, y = torch.randint(2 * MAX_SHIFT + 1, (2,), generator=random_numbers).tolist()
        padded = pad(group, [MAX_SHIFT] * 4, mode="replicate")
        moved.append(padded[:, :, y : y + height, x : x + width])
    return torch.cat(moved)


def _blurred(images: Tensor, amount: Tensor) -> Tensor:
    """Each picture between itself and its mean over 3x3 pixels; amounts (B,) above 1 repeat that, blurring more."""
    share = amount.clamp(max=1).view(-1, 1, 1, 1)
    soft = avg_pool2d(pad(images, [1] * 4, mode="replicate"), 3, stride=1)
    blurred = images + share * (soft - images)
    more = amount > 1
    if more.any():
        blurred[more] = _blurred(blurred[more], amount[more] - 1)
    return blurred


def _relabelled(batch: Labelled, spoilt: Tensor, drowned: Tensor) -> Labelled:
    """In spoilt pictures shapes are junk and letters none; what was empty is unknown, and in noise all is junk."""
    hidden = spoilt.view(-1, 1, 1)
    shape = (batch.kinds > EMPTY) & (batch.kinds < JUNK)
    kinds = torch.where(hidden & shape, JUNK, batch.kinds)
    kinds = torch.where(hidden & (batch.kinds == EMPTY), IGNORED, kinds)
    kinds = torch.where(drowned.view(-1, 1, 1), JUNK, kinds)
    colors = torch.where(hidden, IGNORED, batch.colors)
    letters = torch.where(hidden, 0, batch.letters)
    return Labelled(batch.images, kinds, colors, letters)


def _loss(classifier: TinyWorldClassifier, batch: Labelled, quality: Tensor) -> Tensor:
    kinds, colors, letters, features = classifier.scores(batch.images)
    asked = classifier.picture_head(features.relu())
    letter_weights = torch.tensor([NO_LETTER] + [1.0] * (len(LETTERS) - 1))
    return (
        cross_entropy(kinds, batch.kinds, ignore_index=IGNORED)
        + cross_entropy(colors, batch.colors, ignore_index=IGNORED, reduction="sum")
        / (batch.colors != IGNORED).sum().clamp(min=1)
        + cross_entropy(letters, batch.letters, letter_weights, ignore_index=IGNORED)
        + PICTURE_WEIGHT * mse_loss(asked, picture_targets(batch, quality))
    )


def picture_targets(batch: Labelled, quality: Tensor) -> Tensor:
    """(B, PICTURE_TARGETS): how many of each kind, colour and letter, as in a picture of 4x4 cells; the mean place of
    each kind across and down in [-1, 1], times its number; blur and noise. What is IGNORED is not counted."""
    rows, columns = batch.kinds.shape[1:]
    scale = 16 / (rows * columns)
    kinds = one_hot(batch.kinds.clamp(min=EMPTY), len(KINDS))[..., 1:].float() * scale  # (B, rows, columns, 7)
    colors = one_hot(batch.colors + 1, len(COLORS) + 1)[..., 1:].sum((1, 2)) * scale
    letters = one_hot(batch.letters.clamp(min=0), len(LETTERS))[..., 1:].sum((1, 2)) * scale
    across, down = torch.linspace(-1, 1, columns)[:, None], torch.linspace(-1, 1, rows)[:, None, None]
    places = [(kinds * place).sum((1, 2)) for place in (across, down)]
    return torch.cat([kinds.sum((1, 2)), colors, letters, *places, quality], 1)


@torch.no_grad()
def _settle_features(classifier: TinyWorldClassifier, pool: Labelled) -> None:
    """Standardise the features over real pictures; one that hardly varies is not made as loud as the others."""
    real = pool.images[:: len(SORTS)]  # the world's own
    features = torch.cat([classifier.scores(as_floats(part))[3] for part in real.split(256)])
    spread = features.std(0)
    classifier.feature_mean.copy_(features.mean(0))
    classifier.feature_scale.copy_(spread.clamp(min=LEAST_SPREAD * float(spread.square().mean().sqrt())))


@torch.no_grad()
def accuracy(
    classifier: TinyWorldClassifier, codec: LatentCodec | None, pictures: int = TEST_PICTURES
) -> dict[str, float]:
    """Shares that are right on pictures that training has not seen, after the codec's reconstruction (None: before it).

    cells: of all cells of held-out combinations, with the kind right and of objects the colour too. objects: of the
    cells that hold an object. words: of pictures of words, read letter by letter. junk: of junk cells, called junk.
    """
    samples = [draw(i, TEST_SEED, "heldout", task_weights={**TASK_WEIGHTS, "word": 0.2}) for i in range(pictures)]
    shown = labelled_world(samples)
    lattice = training_pictures(pictures, TEST_SEED, DEFAULT_SIZE)
    lattice = lattice.at(torch.arange(1, pictures, len(SORTS)))
    right, words = [], []
    for part in torch.arange(pictures).split(256):
        judgement = classifier(_reconstructed(shown.at(part).images, codec))
        right.append(_right_cells(judgement, shown.at(part)))
        words += read_words(judgement)
    objects = (shown.kinds > EMPTY) & (shown.kinds < JUNK)
    known = shown.kinds != IGNORED
    texts = [(sample.metadata["text"], word) for sample, word in zip(samples, words, strict=True) if not sample.objects]
    junk = classifier(_reconstructed(lattice.images, codec)).kinds.argmax(1)[lattice.kinds == JUNK] == JUNK
    return {
        "cells": float(torch.cat(right)[known].float().mean()),
        "objects": float(torch.cat(right)[objects].float().mean()),
        "words": sum(text == word for text, word in texts) / max(len(texts), 1),
        "junk": float(junk.float().mean()),
    }


def _right_cells(judgement: Judgement, batch: Labelled) -> Tensor:
    colors_right = (batch.colors == IGNORED) | (judgement.colors.argmax(1) == batch.colors)
    return (judgement.kinds.argmax(1) == batch.kinds) & colors_right


def _reconstructed(images: Tensor, codec: LatentCodec | None) -> Tensor:
    """uint8 (B, 3, H, W) -> float in [-1, 1], after the codec and back if there is one."""
    pixels = as_floats(images)
    return pixels if codec is None else codec.decode(codec.encode(pixels))
