"""The classifier: labels that say what is drawn, training that repeats, files that are checked, judges that work."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_modules.manifest import data_files
from data_modules.tinyworld.combinations import CLASSES, COLORS, TASKS
from data_modules.tinyworld.glyphs import LETTER_HEIGHT, LETTER_WIDTH, glyph_mask
from data_modules.tinyworld.world import OBJECT_SIZE, draw, shape_mask
from evaluation.benchmarks import geneval
from evaluation.fidelity import classifier_pictures, classifier_training
from evaluation.fidelity.classifier_pictures import IGNORED, WORLD_TASKS, Labelled, labelled_world, training_pictures
from evaluation.fidelity.classifier_training import accuracy, picture_targets, train_classifier
from evaluation.fidelity.tinyworld_classifier import (
    EMPTY,
    FEATURES,
    JUNK,
    KINDS,
    LETTERS,
    PICTURE_TARGETS,
    ClassifierConfig,
    Judgement,
    TinyWorldClassifier,
    as_input,
    judge,
    letter_corner,
    load_classifier,
    obtain,
    read_words,
    save_classifier,
)
from zimage_lit.errors import UserError

SMALL = ClassifierConfig(seed=3, width=8, steps=3, batch_size=16, num_pictures=48)


@pytest.fixture(autouse=True, scope="module")
def few_test_pictures():
    patch = pytest.MonkeyPatch()
    patch.setattr(accuracy, "__defaults__", (96,))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def classifier(few_test_pictures: None) -> TinyWorldClassifier:
    return train_classifier(SMALL, progress=False)


@pytest.fixture(scope="module")
def short_trained(few_test_pictures: None) -> TinyWorldClassifier:
    return train_classifier(ClassifierConfig(width=16, steps=200, batch_size=32, num_pictures=2400), progress=False)


def certain(labels: Labelled) -> Judgement:
    """The judgement of someone who knows the labels."""

    def log_one_hot(values: torch.Tensor, size: int) -> torch.Tensor:
        known = torch.nn.functional.one_hot(values.clamp(min=0), size).movedim(-1, 1)
        return known.float().clamp(min=1e-6).log()

    features = torch.zeros(len(labels.images), FEATURES)
    kinds, colors = log_one_hot(labels.kinds, len(KINDS)), log_one_hot(labels.colors, len(COLORS))
    return Judgement(kinds, colors, log_one_hot(labels.letters, len(LETTERS)), features)


@pytest.mark.parametrize("size", [(64, 64), (96, 80)])
def test_labels_of_the_world_satisfy_its_own_metadata(size: tuple[int, int]) -> None:
    samples = [draw(i, split="heldout", task=task, size=size) for task in TASKS for i in range(8)]
    judgement = certain(labelled_world(samples))
    objects = [i for i, sample in enumerate(samples) if sample.objects]
    records = judge(judgement, [sample.metadata for sample in samples])
    assert geneval.score([records[i] for i in objects])["overall"] == 1
    assert [tuple(d["box"][:4]) for d in records[0]["detections"]] == [item.box for item in samples[0].objects]
    assert all(record["correct"] for record in records if "read" in record) and len(objects) < len(records)
    others = judge(judgement, [sample.metadata for sample in reversed(samples)])
    assert geneval.score([others[i] for i in range(len(samples)) if "detections" in others[i]])["overall"] < 0.5


def test_a_lattice_holds_the_shapes_that_its_labels_say() -> None:
    labelled = training_pictures(30, seed=1, size=(64, 64))
    found = set()
    for picture in range(1, 30, 3):  # the lattices
        for row, column in np.ndindex(4, 4):
            kind = int(labelled.kinds[picture, row, column])
            patch = labelled.images[picture, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].float()
            assert (int(labelled.colors[picture, row, column]) == IGNORED) == (kind in (EMPTY, JUNK))
            if kind == EMPTY:
                assert float(patch.std((1, 2)).max()) == 0
            elif kind != JUNK:
                mask = np.pad(shape_mask(KINDS[kind], OBJECT_SIZE), 1).ravel()
                assert np.corrcoef(patch.mean(0).numpy().ravel(), mask)[0, 1] > 0.999
            found.add(kind)
    assert found == set(range(len(KINDS)))


def test_letters_stand_where_their_labels_say() -> None:
    labelled = training_pictures(60, seed=2, size=(64, 64))
    read = 0
    for picture in range(2, 60, 3):  # the strings
        for row, column in labelled.letters[picture].clamp(min=0).nonzero().tolist():
            x, y = letter_corner(row, column)
            patch = labelled.images[picture, :, y : y + LETTER_HEIGHT, x : x + LETTER_WIDTH].float().mean(0)
            mask = glyph_mask(LETTERS[int(labelled.letters[picture, row, column])])
            assert np.corrcoef(patch.numpy().ravel(), mask.ravel())[0, 1] > 0.999
            read += 1
    assert read > 20
    assert set(labelled.kinds[2::3].unique().tolist()) == {IGNORED, EMPTY, JUNK}


def test_junk_masks_resemble_no_shape() -> None:
    for mask in classifier_pictures._junk_masks()[:20]:
        for name in CLASSES:
            assert np.corrcoef(mask.ravel(), shape_mask(name, OBJECT_SIZE).ravel())[0, 1] <= 0.8


def test_a_broken_letter_is_one_only_where_nothing_is_broken() -> None:
    rng = random.Random(4)
    for _ in range(200):
        blocks, label = classifier_pictures._broken(classifier_pictures._blocks()["E"], rng)
        nearest = min(int(abs(blocks - other).sum()) for other in classifier_pictures._blocks().values())
        assert (nearest == 0) == (label > 0) and (nearest == 1) == (label == IGNORED)


def test_what_a_whole_picture_is_asked() -> None:
    sample = draw(0, task="counting", size=(96, 64))
    labelled = labelled_world([sample])
    targets = picture_targets(labelled, torch.tensor([[0.5, 2.0]]))[0]
    assert targets.shape == (PICTURE_TARGETS,)
    kind, count = KINDS.index(sample.objects[0].name) - 1, len(sample.objects)
    scale = 16 / 24
    assert targets[:7].tolist() == pytest.approx([count * scale if i == kind else 0 for i in range(7)])
    centres = [((item.box[0] + 7) / 16 - 0.5, (item.box[1] + 7) / 16 - 0.5) for item in sample.objects]
    across = sum(2 * x / 5 - 1 for x, _ in centres) * scale
    down = sum(2 * y / 3 - 1 for _, y in centres) * scale
    moments = targets[7 + len(COLORS) + len(LETTERS) - 1 :]
    assert moments[kind].item() == pytest.approx(across, abs=1e-5)
    assert moments[7 + kind].item() == pytest.approx(down, abs=1e-5)
    assert targets[-2:].tolist() == [0.5, 2.0]


def test_training_repeats_and_leaves_the_global_generator_alone(classifier: TinyWorldClassifier) -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    with torch.no_grad():
        again = train_classifier(SMALL, progress=False)
    assert torch.equal(torch.rand(4), expected)
    assert again.fingerprint() == classifier.fingerprint() and again.report == classifier.report
    other = train_classifier(ClassifierConfig(**{**vars(SMALL), "seed": 4}), progress=False)
    assert other.fingerprint() != again.fingerprint()


def test_features_are_standardised_over_real_pictures_and_bounded(short_trained: TinyWorldClassifier) -> None:
    images = as_input([draw(i, seed=9, task_weights=WORLD_TASKS).image for i in range(256)])
    features = short_trained.features(images)
    assert features.shape == (256, FEATURES)
    before = features.atanh()
    assert float(before.mean(0).abs().max()) < 0.5 and 0.6 < float(before.square().mean()) < 1.2
    assert torch.allclose(features[:5], short_trained.features(images[:5]), atol=1e-4)
    noise = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float(short_trained.features(noise).abs().max()) <= 1


@pytest.mark.parametrize("size", [(48, 48), (128, 64)])
def test_pictures_of_any_size_are_read_and_gradients_flow(
    classifier: TinyWorldClassifier, size: tuple[int, int]
) -> None:
    images = as_input([draw(i, size=size).image for i in range(3)]).requires_grad_()
    judgement = classifier(images)
    rows, columns = size[1] // 16, size[0] // 16
    assert judgement.kinds.shape == (3, len(KINDS), rows, columns)
    assert judgement.colors.shape == (3, len(COLORS), rows, columns)
    assert judgement.letters.shape == (3, len(LETTERS), 2 * rows, 2 * columns)
    assert torch.allclose(judgement.kinds.exp().sum(1), torch.ones(3, rows, columns), atol=1e-5)
    judgement.kinds[0, 1].sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all() and images.grad[0].any() and not images.grad[1:].any()
    with pytest.raises(ValueError, match="multiples of 16"):
        classifier(torch.zeros(1, 3, 40, 64))


def test_as_input_takes_pictures_and_arrays() -> None:
    array = draw(0).image
    assert torch.equal(as_input([Image.fromarray(array)]), as_input(array[None]))
    assert as_input(np.array([[[[0, 255, 0]]]], dtype=np.uint8)).flatten().tolist() == [-1, 1, -1]


def test_what_is_saved_is_loaded(classifier: TinyWorldClassifier, tmp_path: Path) -> None:
    save_classifier(classifier, tmp_path)
    loaded = load_classifier(tmp_path)
    images = as_input([draw(i).image for i in range(4)])
    assert all(torch.equal(mine, its) for mine, its in zip(classifier(images), loaded(images), strict=True))
    assert loaded.fingerprint() == classifier.fingerprint() and loaded.report == classifier.report
    assert loaded.config == SMALL and not loaded.training


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip_last_byte(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_last_byte, "is damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: edited(folder, format=0), "no TinyWorldClassifier of format 1"),
        (lambda folder: edited(folder, config={**vars(SMALL), "width": 9}), "cannot be read"),
        (lambda folder: edited(folder, config={"depth": 1}), "cannot be read"),
        (lambda folder: edited(folder, fingerprint="0"), "is damaged"),
    ],
)
def test_a_damaged_classifier_is_refused_with_the_way_out(
    classifier: TinyWorldClassifier, tmp_path: Path, damage: Any, message: str
) -> None:
    save_classifier(classifier, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=f"{message}.*delete {tmp_path}"):
        load_classifier(tmp_path)


def test_it_is_trained_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[ClassifierConfig] = []

    def train(config: ClassifierConfig, progress: bool) -> TinyWorldClassifier:
        trained.append(config)
        return TinyWorldClassifier(config)

    monkeypatch.setattr(classifier_training, "train_classifier", train)
    first = obtain(tmp_path / "classifier", SMALL)
    assert obtain(tmp_path / "classifier", SMALL).fingerprint() == first.fingerprint() and trained == [SMALL]
    with pytest.raises(UserError, match="classifier of other settings"):
        obtain(tmp_path / "classifier")
    assert sorted(path.name for path in (tmp_path / "classifier").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec/config.json").touch()
    assert data_files(tmp_path) == ["codec/config.json"]  # the classifier is no part of the data set
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        obtain(tmp_path / "file/classifier", SMALL)


def test_words_are_letters_in_one_line() -> None:
    letters = torch.zeros(4, len(LETTERS), 8, 8)
    letters[:, 0] = 1
    written = [(0, 3, 2, "D"), (0, 3, 4, "O"), (1, 3, 2, "D"), (1, 2, 4, "O"), (2, 3, 1, "A"), (2, 3, 5, "T")]
    for picture, row, column, letter in written:
        letters[picture, LETTERS.index(letter), row, column] = 2
    nothing = torch.zeros(4, 1, 1, 1)
    assert read_words(Judgement(nothing, nothing, letters, nothing)) == ["DO", None, None, None]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="classifier's width must be at least 1"):
        ClassifierConfig(width=0)


def test_a_short_training_already_reads(short_trained: TinyWorldClassifier) -> None:
    """The whole one, 600 steps, reads more than 99 % of the cells; its figures stand in the results."""
    assert short_trained.report["cells"] > 0.93 and short_trained.report["words"] > 0.9, short_trained.report
    assert short_trained.report["objects"] > 0.4 and short_trained.report["junk"] > 0.6, short_trained.report
