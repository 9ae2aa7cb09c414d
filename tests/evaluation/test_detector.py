"""GenEval's detector: its input, what its logits mean, the colours, and mmdet's checkpoint in transformers' network."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mmdet_mask2former as mmdet
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import save_clip
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from evaluation.judges import detector
from evaluation.judges.clip import OpenAICLIP
from evaluation.judges.contract import Asked
from evaluation.judges.detector import (
    CLASSES,
    COLORS,
    ColorClassifier,
    Instance,
    Mask2FormerDetector,
    cut_out,
    detector_input,
    instances_of,
    resize_like_opencv,
)
from evaluation.judges.mask2former_checkpoint import load_mmdet, swin_s_config, transformers_state
from zimage_lit.errors import UserError
from zimage_lit.rewards.clip import CLIPFeatures


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    """mmdet's names, of a network that finds persons and cats in anything."""
    torch.manual_seed(0)
    network = mmdet.Mask2Former()
    for name, parameter in network.named_parameters():
        # offsets, biases and gains that all differ: swapped ones would not go unnoticed
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0, 0.2)
    network.panoptic_head.cls_embed.bias.data[[0, 15]] = 8.0
    network.panoptic_head.cls_embed.weight.data[[0, 15]] *= 0.2
    return network.state_dict()


@pytest.fixture(scope="module")
def mmdet_folder(checkpoint: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mmdet")
    torch.save({"meta": {"CLASSES": ("person",), "epoch": 1}, "state_dict": checkpoint}, folder / "detector.pth")
    config().to_json_file(folder / "config.json")
    return folder


@pytest.fixture(scope="module")
def transformers_folder(mmdet_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    load_mmdet(mmdet_folder / "detector.pth", config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), longest=40)


@pytest.fixture
def small_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the benchmark's, for speed."""
    monkeypatch.setattr(detector, "LONG_SIDE", 266)
    monkeypatch.setattr(detector, "SHORT_SIDE", 160)


def config() -> Mask2FormerConfig:
    return Mask2FormerConfig(backbone_config=SwinConfig(**mmdet.CONFIG["backbone"]), **mmdet.CONFIG["head"])


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def question(*pictures: Image.Image, classes: tuple[str, ...] = CLASSES, colors: tuple[str, ...] = ()) -> list[Asked]:
    return [Asked((one,), {"classes": list(classes), "colors": list(colors)}) for one in pictures]


# ---- the network's input


@pytest.mark.parametrize(
    ("size", "channel", "levels"),  # from cv2.resize of OpenCV 4.11
    [
        (
            (8, 4),
            0,
            [
                [34, 161, 97, 96],
                [50, 178, 113, 112],
                [73, 186, 136, 129],
                [96, 70, 159, 92],
                [120, 23, 182, 85],
                [143, 46, 205, 108],
                [166, 69, 102, 132],
                [182, 85, 21, 148],
            ],
        ),
        (
            (3, 9),
            2,
            [
                [118, 179, 136, 65, 135, 206, 135, 92, 152],
                [180, 70, 55, 126, 197, 69, 83, 153, 214],
                [242, 131, 117, 150, 88, 92, 144, 158, 105],
            ],
        ),
    ],
)
def test_pictures_are_resized_to_the_bit_as_opencv_does(size: tuple[int, int], channel: int, levels: Any) -> None:
    y, x, c = np.mgrid[0:5, 0:7, 0:3]
    resized = resize_like_opencv(((37 * y + 91 * x + 53 * c) % 256).astype(np.uint8), *size)
    assert resized.dtype == np.uint8 and resized[..., channel].tolist() == levels


def test_a_size_that_stays_changes_nothing() -> None:
    pixels = np.asarray(picture(0))
    assert np.array_equal(resize_like_opencv(pixels, 60, 90), pixels)


@pytest.mark.parametrize(
    ("size", "resized", "padded"),  # width, height; the others height, width
    [
        ((1024, 1024), (800, 800), (800, 800)),
        ((512, 512), (800, 800), (800, 800)),
        ((1280, 720), (750, 1333), (768, 1344)),  # the long side decides
        ((896, 1152), (1029, 800), (1056, 800)),
        ((5000, 1), (1, 1333), (32, 1344)),
    ],
)
def test_the_input_keeps_the_pictures_shape(
    size: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    pixels, part = detector_input(Image.new("RGB", size, (10, 20, 30)))
    assert part == resized and pixels.shape == (3, *padded)
    inside = [(level - mean) / std for level, mean, std in zip((10, 20, 30), detector.MEAN, detector.STD, strict=True)]
    padding = [(128 - mean) / std for mean, std in zip(detector.MEAN, detector.STD, strict=True)]
    assert pixels[:, : part[0], : part[1]].amin((1, 2)).tolist() == pytest.approx(inside)
    assert pixels[:, : part[0], : part[1]].amax((1, 2)).tolist() == pytest.approx(inside)
    for beyond in (pixels[:, part[0] :], pixels[..., part[1] :]):
        if beyond.numel():
            assert torch.equal(beyond, torch.tensor(padding)[:, None, None].expand_as(beyond))


# ---- what logits mean


def stretched(grid: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Bilinear, pixel by pixel, from pixels' centres; at the sides the nearest pixel."""

    def between(place: float, size: int) -> tuple[int, int, float]:
        place = max(place, 0.0)
        first = min(int(place), size - 1)
        return first, min(first + 1, size - 1), place - first

    out = []
    for y in range(height):
        top, bottom, down = between((y + 0.5) * len(grid) / height - 0.5, len(grid))
        row = []
        for x in range(width):
            left, right, along = between((x + 0.5) * len(grid[0]) / width - 0.5, len(grid[0]))
            upper = grid[top][left] * (1 - along) + grid[top][right] * along
            lower = grid[bottom][left] * (1 - along) + grid[bottom][right] * along
            row.append(upper * (1 - down) + lower * down)
        out.append(row)
    return out


def instances_one_by_one(class_logits: Tensor, mask_logits: Tensor, *sizes: tuple[int, int]) -> list[dict[str, Any]]:
    """As mmdet says it, in plain loops: every candidate, whatever its score."""
    padded, resized, original = sizes
    candidates = []
    for query, logits in enumerate(class_logits.double().tolist()):
        total = sum(math.exp(logit) for logit in logits)
        candidates += [(math.exp(logit) / total, query, cls) for cls, logit in enumerate(logits[:-1])]
    found = []
    for probability, query, cls in sorted(candidates, reverse=True)[:100]:
        whole = stretched(mask_logits[query].double().tolist(), *padded)
        grid = stretched([row[: resized[1]] for row in whole[: resized[0]]], *original)
        inside = [(x, y, logit) for y, row in enumerate(grid) for x, logit in enumerate(row) if logit > 0]
        box, mean = (0, 0, 0, 0), 0.0
        if inside:
            columns, rows = [x for x, _, _ in inside], [y for _, y, _ in inside]
            box = (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
            mean = sum(1 / (1 + math.exp(-logit)) for _, _, logit in inside) / len(inside)
        pixels = {(x, y) for x, y, _ in inside}
        found.append({"cls": cls, "score": probability * mean, "box": box, "pixels": pixels})
    return sorted(found, key=lambda one: -one["score"])


def test_logits_mean_what_mmdet_makes_of_them() -> None:
    generator = torch.Generator().manual_seed(1)
    class_logits = torch.randn(60, 4, generator=generator) * 4  # 60 x 3 pairs: more than there are candidates
    mask_logits = torch.randn(60, 4, 6, generator=generator) * 3 - 1
    mask_logits[int(class_logits[:, 0].argmax())] = -1.0  # a sure object without a mask
    sizes = ((16, 24), (14, 21), (10, 15))
    answer = [one for one in instances_one_by_one(class_logits, mask_logits, *sizes) if one["score"] > 0.3]
    assert len(answer) > 20
    found = instances_of(class_logits, mask_logits, *sizes)
    assert [one.cls for one in found] == [one["cls"] for one in answer]
    assert [one.score for one in found] == pytest.approx([one["score"] for one in answer], rel=1e-5)
    assert [one.box for one in found] == [one["box"] for one in answer]
    masks = [{(x, y) for y, x in one.mask.nonzero().tolist()} for one in found]
    assert masks == [one["pixels"] for one in answer]


def test_only_the_hundred_likeliest_pairs_of_query_and_class_are_candidates() -> None:
    class_logits = torch.tensor([[8.0, 8.0, -8.0]]).repeat(60, 1)  # 120 pairs of probability 1/2
    class_logits[:, 1] -= 0.01 * torch.arange(60)  # the second class the less likely, the later the query
    found = instances_of(class_logits, torch.full((60, 2, 2), 9.0), (2, 2), (2, 2), (2, 2))
    assert len(found) == 100 and sum(one.cls == 0 for one in found) == 60


def test_an_objects_score_and_box_in_closed_form() -> None:
    mask = torch.full((1, 4, 8), -5.0)
    mask[0, 1:3, 2:5] = math.log(3)  # a probability of 3/4
    (found,) = instances_of(torch.tensor([[0.0, math.log(8), 0.0]]), mask, (4, 8), (4, 8), (4, 8))
    assert (found.cls, found.box) == (1, (2, 1, 5, 3))
    assert found.score == pytest.approx(0.8 * 0.75, rel=1e-6)


def test_what_cannot_count_is_left_out() -> None:
    mask = torch.full((1, 2, 2), 50.0)
    for logit, number in ((math.log(0.59 / 0.41), 2), (math.log(0.71 / 0.29), 1)):  # 0.59 + 0.41, 0.71 + 0.29
        class_logits = torch.tensor([[logit, 0.0, -90.0]])
        assert len(instances_of(class_logits, mask, (2, 2), (2, 2), (2, 2))) == number


# ---- the judge


@pytest.mark.usefixtures("small_input")
def test_a_judgement_is_that_of_the_network_alone(transformers_folder: Path, clip_folder: Path) -> None:
    judge = Mask2FormerDetector(str(transformers_folder), str(clip_folder), device="cpu")
    network = Mask2FormerForUniversalSegmentation.from_pretrained(transformers_folder)
    image = picture(2, (45, 30))
    pixels, resized = detector_input(image)
    with torch.no_grad():
        output = network(pixel_values=pixels[None])
    logits = (output.class_queries_logits[0], output.masks_queries_logits[0])
    answer = instances_of(*logits, (pixels.shape[1], pixels.shape[2]), resized, (30, 45))
    assert {CLASSES[one.cls] for one in answer} == {"person", "cat"}
    (judgement,) = judge.judge(question(image))
    assert json.loads(json.dumps(judgement)) == {
        "detections": [{"cls": CLASSES[one.cls], "box": [*one.box, one.score], "color": None} for one in answer]
    }


@pytest.mark.usefixtures("small_input")
def test_judgements_hold_the_asked_classes_and_do_not_depend_on_the_call(mmdet_folder: Path, clip_folder: Path) -> None:
    judge = Mask2FormerDetector(str(mmdet_folder), str(clip_folder), device="cpu")
    images = [picture(3), picture(4)]
    together = judge.judge(question(*images))
    assert together[0] != together[1]
    assert together == [judge.judge(question(image))[0] for image in images]
    (cats,) = judge.judge(question(images[0], classes=("cat", "dog")))
    assert cats["detections"] == [one for one in together[0]["detections"] if one["cls"] == "cat"] != []


@pytest.mark.usefixtures("small_input")
def test_mmdets_file_and_the_same_weights_saved_by_transformers_judge_alike(
    mmdet_folder: Path, transformers_folder: Path, clip_folder: Path
) -> None:
    folders = (mmdet_folder, transformers_folder)
    one, other = (Mask2FormerDetector(str(folder), str(clip_folder), "cpu") for folder in folders)
    assert one.judge(question(picture(5))) == other.judge(question(picture(5)))


@pytest.mark.usefixtures("small_input")
def test_colours_are_named_for_the_classes_asked_alone(mmdet_folder: Path, clip_folder: Path) -> None:
    judge = Mask2FormerDetector(str(mmdet_folder), str(clip_folder), "cpu")
    colors = ColorClassifier(OpenAICLIP("the test", str(clip_folder), "cpu"))
    image = picture(6)
    (judgement,) = judge.judge(question(image, colors=("cat",)))
    instances = judge.instances(image)
    assert {one.cls for one in instances} == {0, 15}
    for instance, detection in zip(instances, judgement["detections"], strict=True):
        assert detection["color"] == (colors.color(image, instance) if detection["cls"] == "cat" else None)


def test_a_colour_is_the_most_alike_by_genevals_script(clip_folder: Path) -> None:
    colors = ColorClassifier(OpenAICLIP("the test", str(clip_folder), "cpu"))
    features = CLIPFeatures("the test", str(clip_folder), str(clip_folder))
    rng = np.random.default_rng(0)
    named = []
    for cls in (0, 15, 60):
        for seed in range(4):
            mask = torch.from_numpy(rng.random((60, 90)) < 0.9)
            x, y = rng.integers(0, 30, 2).tolist()
            box = (x, y, x + int(rng.integers(9, 60)), y + int(rng.integers(5, 30)))
            instance = Instance(cls, 1.0, box, mask)
            named.append(colors.color(picture(seed), instance))
            assert named[-1] == color_one_by_one(features.model, features.tokenizer, picture(seed), instance)
    assert len(set(named)) > 3


def color_one_by_one(model: Any, tokenizer: Any, image: Image.Image, instance: Instance) -> str:
    """The colour of an object, with one text and one picture at a time, in plain steps."""
    pixels = np.asarray(image).copy()
    pixels[~instance.mask.numpy()] = 0x99
    x1, y1, x2, y2 = instance.box
    crop = Image.fromarray(pixels[y1:y2, x1:x2])
    width, height = (32 if side == min(crop.size) else int(32 * side / min(crop.size)) for side in crop.size)
    left, top = (round((side - 32) / 2) for side in (width, height))
    seen = crop.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    normalized = (torch.from_numpy(np.asarray(seen) / 255) - torch.tensor(mean)) / torch.tensor(std)
    cosines = []
    with torch.no_grad():
        features = model.get_image_features(normalized.permute(2, 0, 1)[None].float()).pooler_output[0]
        for color in COLORS:
            name = CLASSES[instance.cls]
            texts = (
                f"a photo of a {color} {name}",
                f"a photo of a {color}-colored {name}",
                f"a photo of a {color} object",
            )
            words = [tokenizer(text, truncation=True, max_length=40, return_tensors="pt") for text in texts]
            each = [model.get_text_features(**one).pooler_output[0] for one in words]
            together = torch.stack([one / one.norm() for one in each]).mean(0)
            cosines.append(float(together @ features / together.norm() / features.norm()))
    return COLORS[cosines.index(max(cosines))]


def test_an_object_is_cut_out_on_grey() -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1:3, 2] = mask[2, 3:5] = True
    cut = np.asarray(cut_out(Image.new("RGB", (6, 4), "red"), Instance(0, 1.0, (2, 1, 5, 3), mask)))
    assert cut[..., 0].tolist() == [[255, 153, 153], [255, 255, 255]] and cut[0, 1].tolist() == [153, 153, 153]


# ---- who it is


def test_only_mmdets_own_file_and_openais_clip_are_comparable(
    mmdet_folder: Path, transformers_folder: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, reason in ((mmdet_folder, "SHA-256 of detector.pth"), (transformers_folder, "saved by transformers")):
        record = Mask2FormerDetector(str(folder), str(clip_folder)).record()
        assert reason in record.differs and "openai/clip-vit-large-patch14" in record.differs
        assert record.model == "Mask2Former + CLIP"
    shutil.copy(mmdet_folder / "detector.pth", tmp_path)
    monkeypatch.setattr(detector, "file_sha256", lambda file: "743b7d99" + 56 * "0")
    monkeypatch.setattr(detector, "clip_differs", lambda folder: "")
    record = Mask2FormerDetector(str(tmp_path), str(clip_folder)).record()
    assert record.differs == ""
    assert record.model.startswith("mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco")
    assert "configured by a config.json" in Mask2FormerDetector(str(mmdet_folder), str(clip_folder)).record().differs


def test_the_revision_tells_both_networks_apart(mmdet_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    first = Mask2FormerDetector(str(mmdet_folder), str(clip_folder)).record()
    shutil.copytree(clip_folder, tmp_path / "clip")
    assert Mask2FormerDetector(str(mmdet_folder), str(tmp_path / "clip")).record().identity == first.identity
    (tmp_path / "clip" / "config.json").write_text("{}")
    assert Mask2FormerDetector(str(mmdet_folder), str(tmp_path / "clip")).record().revision != first.revision


@pytest.mark.usefixtures("small_input")
def test_what_cannot_be_used_is_named(
    mmdet_folder: Path, transformers_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        Mask2FormerDetector(str(tmp_path / "nowhere"), str(clip_folder)).record()
    with pytest.raises(UserError, match="'unicorn' is none of them"):
        Mask2FormerDetector(str(mmdet_folder), str(clip_folder)).judge(question(picture(0), classes=("unicorn",)))
    shutil.copytree(mmdet_folder, tmp_path / "two")
    (tmp_path / "two" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"several networks \(detector.pth, model.safetensors\)"):
        Mask2FormerDetector(str(tmp_path / "two"), str(clip_folder)).record()
    shutil.copytree(transformers_folder, tmp_path / "part")
    tensors = load_file(tmp_path / "part" / "model.safetensors")
    del tensors["class_predictor.weight"]
    save_file(tensors, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    for other, sentence in (
        (tmp_path / "part", "does not fill a Mask2Former: class_predictor.weight is missing"),
        (clip_folder, "holds a network of the type clip"),
        (tmp_path, "neither mmdet's checkpoint"),
    ):
        with pytest.raises(UserError, match=sentence):
            Mask2FormerDetector(str(other), str(clip_folder), "cpu").judge(question(picture(0)))


# ---- mmdet's checkpoint


@pytest.mark.parametrize("size", [(96, 160), (64, 32), (224, 96)])
def test_a_converted_checkpoint_answers_as_mmdets_network(
    checkpoint: dict[str, Tensor], mmdet_folder: Path, size: tuple[int, int]
) -> None:
    network = mmdet.Mask2Former()
    network.load_state_dict(checkpoint)
    converted = load_mmdet(mmdet_folder / "detector.pth", config())
    pixels = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        classes, masks = network(pixels)
        output = converted(pixel_values=pixels[None])
    assert classes.std() > 0.1 and masks.std() > 1
    torch.testing.assert_close(output.class_queries_logits[0], classes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.masks_queries_logits[0], masks, rtol=1e-3, atol=1e-3)


def test_every_tensor_of_a_checkpoint_is_used_once(checkpoint: dict[str, Tensor]) -> None:
    tensors = {name: tensor for name, tensor in checkpoint.items() if not name.endswith("relative_position_index")}
    converted = transformers_state(checkpoint)
    assert sum(tensor.numel() for tensor in converted.values()) == sum(tensor.numel() for tensor in tensors.values())
    sums = (sum(float(tensor.double().sum()) for tensor in state.values()) for state in (converted, tensors))
    assert math.isclose(*sums, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"panoptic_head.cls_embed.bias": None}, "lacks what becomes class_predictor.bias"),
        ({"backbone.norm2.weight": torch.ones(5)}, r"hidden_states_norms.stage3.weight has the shape \(5,\)"),
        ({"neck.conv.weight": torch.ones(5)}, "nothing takes neck.conv.weight"),
        ({"panoptic_head.transformer_decoder.layers.4.norms.0.bias": torch.ones(32)}, "of a larger network"),
        ({"backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": torch.zeros(9, 9)}, "in another order"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    checkpoint: dict[str, Tensor], tmp_path: Path, change: dict[str, Tensor | None], sentence: str
) -> None:
    state = {name: tensor for name, tensor in {**checkpoint, **change}.items() if tensor is not None}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=sentence):
        load_mmdet(tmp_path / "a.pth", config())


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"meta": {"path": Path("x")}, "state_dict": {}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth cannot be read as weights alone"):
        load_mmdet(tmp_path / "a.pth", config())
    torch.save({"weight": torch.ones(1)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"b\.pth is no checkpoint of mmdet"):
        load_mmdet(tmp_path / "b.pth", config())


def test_the_benchmarks_network_has_its_published_size() -> None:
    with torch.device("meta"):
        network = Mask2FormerForUniversalSegmentation(swin_s_config())
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert round(millions) == 69  # Mask2Former, table 1
