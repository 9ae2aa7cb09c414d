"""Folders of pictures against each other: torch-fidelity's own values, formulas written out, and what is refused."""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from evaluation.fidelity.image_quality import FidelitySettings, features, fidelity, kid_standard_error, picture_files
from zimage_lit.errors import UserError

SETTINGS = FidelitySettings(isc_splits=4, kid_subsets=20, kid_subset_size=10)


class Colours(FeatureExtractorBase):
    """Mean and deviation of each colour, and four logits of them."""

    def __init__(self, name: str, features_list: list[str], **settings: object) -> None:
        super().__init__(name, features_list)
        self.weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 3

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "colours", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "colours"

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        flat = pixels.flatten(2).float() / 255
        colours = torch.cat([flat.mean(-1), flat.std(-1)], dim=1)
        given = {"colours": colours, "logits": colours @ self.weights}
        return tuple(given[name] for name in self.features_list)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    register_feature_extractor("colours", Colours)
    yield
    FEATURE_EXTRACTORS_REGISTRY.pop("colours")


def fill(folder: Path, count: int, seed: int, brightness: int = 0, side: int = 12, suffix: str = "png") -> Path:
    rng = np.random.default_rng(seed)
    for number in range(count):
        levels = rng.integers(0, 120, (side, side, 3)) + rng.integers(0, 100, 3) + brightness
        file = folder / f"{number // 4:03d}" / f"{number % 4}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels.astype(np.uint8)).save(file)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pictures")
    drawn, real = fill(root / "drawn", 30, 0, brightness=30), fill(root / "real", 34, 1)
    (drawn / "manifest.jsonl").write_text("{}")
    return drawn, real


@pytest.fixture(scope="module")
def result(folders: tuple[Path, Path]) -> dict:
    return fidelity(*folders, settings=SETTINGS, extractor="colours", device="cpu")


def colours(folder: Path) -> np.ndarray:
    """(N, 6), from the pictures' levels."""
    found = [np.asarray(Image.open(file), dtype=np.float64) / 255 for file in sorted(folder.rglob("*.png"))]
    return np.stack([np.concatenate([one.mean((0, 1)), one.std((0, 1), ddof=1)]) for one in found])


def test_the_values_are_torch_fidelitys_own(folders: tuple[Path, Path], result: dict) -> None:
    theirs = calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        **{"isc": True, "fid": True, "kid": True, "prc": True, "feature_extractor": "colours"},
        **{"samples_find_deep": True, "cuda": False, "save_cpu_ram": True, "verbose": False, "cache": False},
        **{"isc_splits": 4, "kid_subsets": 20, "kid_subset_size": 10},
    )
    ours = result["metrics"]
    for name, value in (
        ("frechet_inception_distance", ours["fid"]["value"]),
        ("kernel_inception_distance_mean", ours["kid"]["value"]),
        ("kernel_inception_distance_std", ours["kid"]["std"]),
        ("inception_score_mean", ours["inception_score"]["value"]),
        ("inception_score_std", ours["inception_score"]["std"]),
        ("precision", ours["precision"]["value"]),
        ("recall", ours["recall"]["value"]),
    ):
        assert value == pytest.approx(theirs[name], rel=1e-6, abs=1e-9), name


def test_the_values_are_those_of_the_formulas(folders: tuple[Path, Path], result: dict) -> None:
    x, y = (colours(folder) for folder in folders)
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    fid = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert result["metrics"]["fid"]["value"] == pytest.approx(fid, rel=1e-3)

    def near(points: np.ndarray, support: np.ndarray) -> float:
        """Share of the points no further from some row of the support than its third neighbour."""
        radii = np.sort(np.linalg.norm(support[:, None] - support, axis=-1), axis=1)[:, 3]
        return float((np.linalg.norm(points[:, None] - support, axis=-1) <= radii).any(axis=1).mean())

    assert result["metrics"]["precision"]["value"] == pytest.approx(near(x, y), abs=1e-6)
    assert result["metrics"]["recall"]["value"] == pytest.approx(near(y, x), abs=1e-6)
    assert 0 < near(x, y) < 1 and 0 < near(y, x) < 1
    for name in ("kid", "precision", "recall"):
        metric = result["metrics"][name]
        assert metric["low"] < metric["value"] < metric["high"]


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD, pair by pair."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    own = [np.mean([kernel(s[i], s[j]) for i, j in product(range(len(s)), repeat=2) if i != j]) for s in (x, y)]
    return float(own[0] + own[1] - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def test_kids_standard_error_is_the_jackknifes() -> None:
    """Each row is left out in turn."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 3)), rng.standard_normal((9, 3)) + 0.5
    variance = 0.0
    for rows, value in ((x, lambda rest: kid(rest, y)), (y, lambda rest: kid(x, rest))):
        left_out = np.array([value(np.delete(rows, row, axis=0)) for row in range(len(rows))])
        variance += (len(rows) - 1) / len(rows) * np.square(left_out - left_out.mean()).sum()
    assert kid_standard_error(x, y) == pytest.approx(variance**0.5, rel=1e-9)


def test_kids_standard_error_is_how_much_it_varies() -> None:
    rng = np.random.default_rng(1)
    draws = [(rng.standard_normal((40, 2)), rng.standard_normal((50, 2)) * 1.2 + 0.6) for _ in range(60)]
    values = [kid_by_matrix(x, y) for x, y in draws]
    errors = [kid_standard_error(x, y) for x, y in draws]
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)  # 60 draws know a deviation to a tenth


def kid_by_matrix(x: np.ndarray, y: np.ndarray) -> float:
    kernels = [(a @ b.T / 2 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    own = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernels[:2]]
    return float(sum(own) - 2 * kernels[2].mean())


def test_the_result_says_how_it_was_made(folders: tuple[Path, Path], result: dict) -> None:
    assert (result["images"]["count"], result["reference"]["count"]) == (30, 34)
    assert result["images"]["size"] == result["reference"]["size"] == [12, 12]
    assert result["settings"] == {
        **{"resize": None, "isc_splits": 4, "kid_subsets": 20, "kid_subset_size": 10},
        **{"prc_neighborhood": 3, "rng_seed": 2020},
    }
    assert result["extractor"]["layers"] == {"isc": "logits", "fid": "colours", "kid": "colours", "prc": "colours"}
    assert result["comparable"] == {
        "verdict": False,
        "reasons": ["the features are of colours, not of inception-v3-compat."],
    }
    assert result["notes"] == ["the folders have 30 and 34 pictures: FID depends on both numbers."]
    assert FidelitySettings() == FidelitySettings(None, 10, 100, 1000, 3, 2020)  # torch-fidelity's
    again = fidelity(*folders, settings=SETTINGS, extractor="colours", device="cpu")
    assert json.dumps(again) == json.dumps(result)


def test_a_folder_is_at_no_distance_from_itself(folders: tuple[Path, Path]) -> None:
    found = fidelity(folders[1], folders[1], settings=SETTINGS, extractor="colours", device="cpu")["metrics"]
    assert found["fid"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["precision"]["value"] == found["recall"]["value"] == 1
    assert found["precision"]["high"] == 1 > found["precision"]["low"]
    assert found["kid"]["value"] <= 0  # KID pairs no picture with itself within a set, but across the sets it does


def test_few_pictures_have_smaller_subsets_and_say_so(folders: tuple[Path, Path]) -> None:
    found = fidelity(*folders, extractor="colours", device="cpu")
    assert "KID is over subsets of 15 pictures, not 1000, as there are only 30." in found["notes"]
    small = fill(folders[0].parent / "small", 6, 3)
    notes = fidelity(small, small, extractor="colours", device="cpu")["notes"]
    assert "the Inception score is of all 6 pictures at once, too few for 10 parts." in notes
    assert "FID compares 6 features of 6 pictures: too few, its bias outweighs it." in notes


def test_lossy_pictures_are_noted(folders: tuple[Path, Path], tmp_path: Path) -> None:
    drawn = fill(tmp_path / "drawn", 8, 4, suffix="jpg")
    (drawn / "000" / "0.jpg").rename(drawn / "000" / "0.png")  # still a JPEG
    found = fidelity(drawn, folders[1], extractor="colours", device="cpu")
    lossy = "8 of 8 pictures in images are JPEG or WebP: lossy compression changes all values."
    assert lossy in found["notes"] and not any("in reference are" in note for note in found["notes"])


def test_sizes_must_be_one_or_made_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    larger = fill(tmp_path / "larger", 8, 4, side=16)
    with pytest.raises(UserError, match=r"all pictures must have one size, but .* 16 x 16 and .* 12 x 12: give resize"):
        fidelity(larger, folders[1], extractor="colours", device="cpu")
    found = fidelity(larger, folders[1], settings=FidelitySettings(resize=8), extractor="colours", device="cpu")
    assert found["images"]["size"] == found["reference"]["size"] == [8, 8]


def test_features_do_not_depend_on_which_pictures_go_together(folders: tuple[Path, Path]) -> None:
    files, network = picture_files(folders[0]), Colours("colours", ["colours", "logits"])
    together, _ = features(files, network, None, torch.device("cpu"))
    for row, file in enumerate(files[:3]):
        alone, _ = features([file], network, None, torch.device("cpu"))
        torch.testing.assert_close(together["colours"][row], alone["colours"][0])


def test_what_cannot_be_compared_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    few = fill(tmp_path / "few", 3, 0)
    with pytest.raises(UserError, match="has 3 pictures"):
        fidelity(few, folders[1], extractor="colours")
    with pytest.raises(UserError, match="there is no folder"):
        fidelity(tmp_path / "absent", folders[1], extractor="colours")
    broken = fill(tmp_path / "broken", 5, 0)
    whole = (broken / "000" / "2.png").read_bytes()
    (broken / "000" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"2\.png is broken"):
        fidelity(broken, folders[1], extractor="colours", device="cpu")
    (broken / "000" / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2\.png is no picture"):
        fidelity(broken, folders[1], extractor="colours", device="cpu")
    with pytest.raises(UserError, match="prc_neighborhood=40 needs more pictures"):
        settings = FidelitySettings(isc_splits=4, kid_subset_size=10, prc_neighborhood=40)
        fidelity(*folders, settings=settings, extractor="colours", device="cpu")
    with pytest.raises(UserError, match="kid_subsets must be at least 1"):
        FidelitySettings(kid_subsets=0)


def test_inceptions_weights_are_asked_for_and_checked(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights file was given for Inception: get it from https://github\.com"):
        fidelity(*folders)
    with pytest.raises(UserError, match=r"there is no .*absent\.pth for Inception: get it from https"):
        fidelity(*folders, inception=tmp_path / "absent.pth")
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not fit inception-v3-compat"):
        fidelity(*folders, inception=tmp_path / "other.pth")
    torch.save({"weight": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(UserError, match=r"harmful\.pth cannot be read as weights"):
        fidelity(*folders, inception=tmp_path / "harmful.pth")
    with pytest.raises(UserError, match="knows no extractor unheard"):
        fidelity(*folders, extractor="unheard")


class Harmful:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("code in a pickle was run",)
