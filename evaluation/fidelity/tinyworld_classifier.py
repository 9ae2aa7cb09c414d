"""A small network that reads TinyWorld pictures: which object, in which colour, in each cell; which letter where.

It is made for three uses: its features of a whole picture are what the distances of `distances.py` compare; its
log-probabilities are a judge through which gradients flow; and `detect` and `read_word` are a second judge beside the
verifier, which has learnt instead of being told. Every picture of TinyWorld can be read, of any size, for the network
is convolutional. Trained by `classifier_training.py`; two seeds or widths give two independent judges, one to be
rewarded by and one to be measured by.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from data_modules.tinyworld.combinations import CLASSES, COLORS, Metadata
from data_modules.tinyworld.glyphs import GLYPHS
from data_modules.tinyworld.world import CELL, OBJECT_SIZE
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.files import locked, read_json, write_atomically

FORMAT = 1  # of the files, and of what is learnt: another number, and older classifiers are made anew
KINDS = ("empty", *CLASSES, "junk")  # what a cell holds; junk: a thing that is none of the shapes
EMPTY, JUNK = 0, len(KINDS) - 1
LETTERS = ("none", *GLYPHS)  # the letter whose upper left corner lies in a place
STEP = CELL // 2  # pixels between the places where a letter may begin, both ways
LETTER_LEFT, LETTER_TOP = 2, 4  # pixels, of a letter's corner in its place
FEATURES = 64
# What a picture's features are trained to tell: how much of each kind, colour and letter, where, blur and noise.
PICTURE_TARGETS = 3 * (len(KINDS) - 1) + len(COLORS) + len(LETTERS) - 1 + 2
WEIGHTS, CONFIG, LOCK = "model.safetensors", "config.json", ".training"


@dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier is, and how it is trained: the same settings give the same weights on one machine."""

    seed: int = 0  # of the weights, the training pictures and their order
    width: int = 24  # channels of the first layer, half of the others'
    steps: int = 600  # of training, each on `batch_size` pictures
    batch_size: int = 64
    num_pictures: int = 12_288  # drawn for training, then varied anew each time

    def __post_init__(self) -> None:
        for name in ("width", "steps", "batch_size", "num_pictures"):
            at_least_one(f"the classifier's {name}", getattr(self, name))


class Judgement(NamedTuple):
    """What the classifier says of B pictures with `rows` by `columns` cells; log-probabilities sum to 1 over dim 1.

    kinds: (B, len(KINDS), rows, columns), what each cell holds. colors: (B, len(COLORS), rows, columns), of the object
    in the cell, if there is one. letters: (B, len(LETTERS), 2 rows, 2 columns), which letter begins in each place.
    features: (B, FEATURES), of the whole picture, in (-1, 1): each is standardised over real pictures and bounded, so
    that a few odd pictures do not decide a distance between sets.
    """

    kinds: Tensor
    colors: Tensor
    letters: Tensor
    features: Tensor


class TinyWorldClassifier(nn.Module):
    """A few convolutions down to a vector for each cell; heads for cells, letters and whole pictures.

    Give it pictures as float (B, 3, H, W) in [-1, 1], H and W multiples of 16. `report` holds what it reached when it
    was trained, as shares of held-out pictures after a codec's reconstruction.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.report: dict[str, float] = {}
        width = 2 * config.width
        self.trunk = nn.Sequential(
            *_layer(3, config.width, 4, stride=2),
            *_layer(config.width, width, 3, stride=2),
            *_layer(width, width, 3, stride=2),
            *_layer(width, width, 3),
        )  # a vector for each place of 8x8 pixels
        self.letter_head = nn.Sequential(
            *_layer(width, width, 3), *_layer(width, width, 3), nn.Conv2d(width, len(LETTERS), 1)
        )
        self.to_cells = nn.Sequential(*_layer(width, width, 3), *_layer(width, width, 2, stride=2))
        self.kind_head = nn.Conv2d(width, len(KINDS), 1)
        self.color_head = nn.Conv2d(width, len(COLORS), 1)
        self.picture_features = nn.Linear(4 * width, FEATURES)
        self.picture_head = nn.Linear(FEATURES, PICTURE_TARGETS)
        self.register_buffer("feature_mean", torch.zeros(FEATURES))
        self.register_buffer("feature_scale", torch.ones(FEATURES))
        self.to(memory_format=torch.channels_last)  # half again as fast on a CPU

    def forward(self, images: Tensor) -> Judgement:
        kinds, colors, letters, features = self.scores(images)
        features = ((features - self.feature_mean) / self.feature_scale).tanh()
        return Judgement(log_softmax(kinds, 1), log_softmax(colors, 1), log_softmax(letters, 1), features)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, FEATURES)."""
        return self(images).features

    def scores(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Kinds, colours and letters before the softmax, and the features before they are standardised."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % CELL or images.shape[3] % CELL:
            raise ValueError(
                f"the classifier reads pictures (B, 3, H, W) with sides that are multiples of {CELL}, "
                f"not {tuple(images.shape)}."
            )
        places = self.trunk(images.to(memory_format=torch.channels_last))
        cells = self.to_cells(places)
        pooled = torch.cat([places.mean((2, 3)), _layout(cells)], 1)
        return (
            self.kind_head(cells),
            self.color_head(cells),
            self.letter_head(places),
            self.picture_features(pooled),
        )

    def fingerprint(self) -> str:
        """SHA-256, as hex, of its settings and weights: with the same one, the same numbers are compared."""
        digest = hashlib.sha256(json.dumps([FORMAT, asdict(self.config)], sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}:{tuple(tensor.shape)}:".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def save_classifier(classifier: TinyWorldClassifier, folder: str | Path) -> None:
    """Write `model.safetensors`, then `config.json` with settings, report and fingerprint."""
    folder = Path(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    write_atomically(folder / WEIGHTS, save(state))
    described = {
        "_class_name": type(classifier).__name__,
        "format": FORMAT,
        "config": asdict(classifier.config),
        "report": classifier.report,
        "fingerprint": classifier.fingerprint(),
    }
    write_atomically(folder / CONFIG, json.dumps(described, indent=2) + "\n")


def load_classifier(folder: str | Path) -> TinyWorldClassifier:
    """The classifier in a folder, frozen and in evaluation mode, on the CPU.

    Raises UserError where a file is missing or damaged, or of a format that this version does not read.
    """
    folder = Path(folder)
    way_out = f"delete {folder} to have it trained anew"
    described = read_json(folder / CONFIG, way_out)
    if (described.get("_class_name"), described.get("format")) != (TinyWorldClassifier.__name__, FORMAT):
        raise UserError(f"{folder} holds no {TinyWorldClassifier.__name__} of format {FORMAT}: {way_out}.")
    try:
        classifier = TinyWorldClassifier(ClassifierConfig(**described["config"]))
        classifier.load_state_dict(load((folder / WEIGHTS).read_bytes()))
        classifier.report = dict(described["report"])
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:160]  # torch names every tensor
        raise UserError(f"the classifier in {folder} cannot be read ({said}): {way_out}.") from None
    if classifier.fingerprint() != described.get("fingerprint"):
        raise UserError(f"the classifier in {folder} is damaged (its fingerprint is another): {way_out}.")
    return classifier.requires_grad_(False).eval()


def obtain(folder: str | Path, config: ClassifierConfig | None = None, progress: bool = True) -> TinyWorldClassifier:
    """The classifier in a folder, trained first where there is none: a minute or two on one core.

    Two processes that ask at the same time wait for each other. Raises UserError for a folder that holds a classifier
    of other settings, or a damaged one.
    """
    from evaluation.fidelity.classifier_training import train_classifier  # it needs this module

    folder, config = Path(folder), config or ClassifierConfig()
    if not (folder / CONFIG).is_file():
        with locked(folder / LOCK, "name another folder for the classifier"):
            if not (folder / CONFIG).is_file():  # the one that was waited for may have made it
                save_classifier(train_classifier(config, progress), folder)
        (folder / LOCK).unlink(missing_ok=True)
    classifier = load_classifier(folder)
    if classifier.config != config:
        raise UserError(
            f"{folder} holds a classifier of other settings ({classifier.config}) than those asked for ({config}): "
            "name another folder, or delete this one to have it trained anew."
        )
    return classifier


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Convolution, normalisation, non-linearity; padded so that the stride alone decides the size."""
    padding = (kernel - 1) // 2
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _layout(cells: Tensor) -> Tensor:
    """(B, C, rows, columns) -> (B, 3 C): the mean over the cells, and the means weighted by the place across and down
    in [-1, 1]."""
    rows, columns = cells.shape[2:]
    down = torch.linspace(-1, 1, rows, device=cells.device)[:, None]
    across = torch.linspace(-1, 1, columns, device=cells.device)
    return torch.cat([(cells * weight).mean((2, 3)) for weight in (torch.ones_like(across), across, down)], 1)


def as_input(images: Sequence[Any] | np.ndarray) -> Tensor:
    """Pictures of one size, PIL or uint8 (H, W, 3), as the classifier reads them: float (B, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.uint8) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def detect(judgement: Judgement) -> list[list[dict[str, Any]]]:
    """Objects of each picture as GenEval's rules read them: [{"cls": class, "box": [x1, y1, x2, y2, score], "color"}].

    The box is the square that a shape fills in its cell, the score the probability of its class. Junk is no object.
    """
    kinds, colors = judgement.kinds.exp(), judgement.colors.argmax(1)
    score, kind = kinds.max(1)
    inset = (CELL - OBJECT_SIZE) // 2
    found: list[list[dict[str, Any]]] = [[] for _ in kind]
    for picture, row, column in ((kind != EMPTY) & (kind != JUNK)).nonzero().tolist():
        x, y = CELL * column + inset, CELL * row + inset
        place = picture, row, column
        box = [x, y, x + OBJECT_SIZE, y + OBJECT_SIZE, round(float(score[place]), 4)]
        found[picture].append({"cls": KINDS[int(kind[place])], "box": box, "color": COLORS[int(colors[place])]})
    return found


def read_words(judgement: Judgement) -> list[str | None]:
    """The word in each picture: letters in one line, side by side; None where there is no letter, or no such line."""
    words: list[str | None] = []
    for best in judgement.letters.argmax(1):
        places = best.nonzero().tolist()
        columns = [column for _, column in places]
        in_line = len({row for row, _ in places}) == 1 and columns == list(range(columns[0], columns[-1] + 1, 2))
        words.append("".join(LETTERS[int(best[row, column])] for row, column in places) if in_line else None)
    return words


def judge(judgement: Judgement, metadata: Sequence[Metadata]) -> list[dict[str, Any]]:
    """One record a picture for scoring, as the verifier's `judge` gives: detections, or the word that was read."""
    return [
        {"metadata": asked, "read": word, "correct": word == asked["text"]}
        if asked["tag"] == "word"
        else {"metadata": asked, "detections": objects}
        for asked, objects, word in zip(metadata, detect(judgement), read_words(judgement), strict=True)
    ]


def letter_corner(row: int, column: int) -> tuple[int, int]:
    """(x, y) in pixels of the upper left corner of a letter that begins in this place."""
    return STEP * column + LETTER_LEFT, STEP * row + LETTER_TOP
