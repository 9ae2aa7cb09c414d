"""GenEval's detector: which objects a picture shows, where, how surely, and in which colours.

Mask2Former through transformers, from its raw logits, with mmdet 2.27 in front and behind: the test pipeline of
configs/mask2former/mask2former_r50_lsj_8x2_50e_coco.py and MaskFormerFusionHead.instance_postprocess. (What
transformers makes of the logits, masks of 384 x 384 pixels painted over one another, is not what GenEval scores.)
Colours as in djghosh13/geneval, evaluation/evaluate_images.py.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from evaluation.judges.clip import MODEL, OpenAICLIP, clip_differs
from evaluation.judges.contract import Asked, JudgeRecord
from evaluation.judges.mask2former_checkpoint import UNUSED, load_mmdet
from evaluation.judges.weights import file_sha256, folder_revision, library_versions
from zimage_lit.errors import UserError
from zimage_lit.pipeline import usable_device

CHECKPOINT = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
SHA256_START = "743b7d99"  # mmdet puts the first digits into the name
NAMES = (  # of COCO's classes, in its order, as GenEval calls them (prompts/object_names.txt)
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
CLASSES = tuple(NAMES.split(","))
LONG_SIDE, SHORT_SIDE, DIVISOR = 1333, 800, 32  # pixels
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
PADDING = 128  # grey level, before normalisation
CANDIDATES = 100  # most of a picture
LEAST_SCORE = 0.3  # GenEval counts no detection that has not more
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {cls}", "a photo of a {color}-colored {cls}", "a photo of a {color} object")
BACKGROUND = "#999"
Size = tuple[int, int]  # (height, width)


class Instance(NamedTuple):
    """An object: the index of its class, score in [0, 1], tight box (x1, y1, x2, y2), mask bool (H, W)."""

    cls: int
    score: float
    box: tuple[int, int, int, int]
    mask: Tensor


class Mask2FormerDetector:
    """Role `detector`: objects of COCO's 80 classes, and the colours of those whose class is asked for.

    folder: of the detector: mmdet's checkpoint, the only .pth file in it, or what transformers' `save_pretrained`
        wrote. The benchmark's own is the checkpoint that CHECKPOINT names, from download.openmmlab.com, whatever the
        file is called now: it is known by its SHA-256. A config.json beside a checkpoint is of a network of another
        geometry.
    clip: folder of openai/clip-vit-large-patch14, which names the colours.
    device: what both compute on; by default a GPU where there is one.

    A judgement has the detections of the asked classes with a score above 0.3, best first: others never count. A
    picture's EXIF orientation must have been applied. Computes in float32, one picture at a time; the benchmark's
    script names colours in half precision.
    """

    def __init__(self, folder: str, clip: str, device: str | None = None) -> None:
        self.folder = folder
        self.clip = clip
        self.device = device

    def record(self) -> JudgeRecord:
        """UserError for a folder that is absent, has no weights, or more than one network's."""
        detector_differs, colors_differ = self._detector_differs(), clip_differs(self.clip)
        networks = ("Mask2Former" if detector_differs else Path(CHECKPOINT).stem, "CLIP" if colors_differ else MODEL)
        return JudgeRecord(
            judge=type(self).__name__,
            model=" + ".join(networks),
            revision=f"{folder_revision(self.folder)}+{folder_revision(self.clip)}",
            differs="; ".join(filter(None, (detector_differs, colors_differ))),
            settings={"least_score": LEAST_SCORE, "precision": "float32"},
            versions=library_versions("torch", "torchvision", "transformers", "pillow"),
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """Questions {"classes", "colors"} -> {"detections": [{"cls", "box", "color"}]}, as the role says.

        UserError for a class that the detector does not know and, at the first call, for weights that cannot be used.
        """
        return [{"detections": self._detections(one.pictures[0], one.question)} for one in asked]

    def _detections(self, picture: Image.Image, question: Mapping[str, Any]) -> list[dict[str, Any]]:
        colored = question.get("colors", ())
        unknown = [cls for cls in (*question["classes"], *colored) if cls not in CLASSES]
        if unknown:
            raise UserError(f"the judge detector knows the 80 classes of COCO, and {unknown[0]!r} is none of them.")
        detections = []
        for instance in self.instances(picture):
            cls = CLASSES[instance.cls]
            if cls in question["classes"]:
                color = self._colors.color(picture, instance) if cls in colored else None
                detections.append({"cls": cls, "box": [*instance.box, instance.score], "color": color})
        return detections

    def instances(self, picture: Image.Image) -> list[Instance]:
        """All objects of a picture with a score above 0.3, best first."""
        network = self._network  # loaded before inference mode, whose tensors are not like others
        with torch.inference_mode():
            pixels, resized = detector_input(picture)
            output = network(pixel_values=pixels[None].to(network.device))
            padded = (pixels.shape[1], pixels.shape[2])
            logits = (output.class_queries_logits[0], output.masks_queries_logits[0])
            return instances_of(*logits, padded, resized, (picture.height, picture.width))

    @cached_property
    def _network(self) -> Any:
        checkpoint = self._checkpoint()
        if checkpoint is None:
            network = load_transformers(self.folder)
        else:
            network = load_mmdet(checkpoint, self._config_beside())
        if network.config.num_labels != len(CLASSES):
            raise UserError(f"{self.folder} knows {network.config.num_labels} classes: give a detector of COCO's 80.")
        return network.to(usable_device(self.device))

    @cached_property
    def _colors(self) -> "ColorClassifier":
        return ColorClassifier(OpenAICLIP("the judge detector", self.clip, self.device))

    def _checkpoint(self) -> Path | None:
        """mmdet's file, if the folder holds one. UserError where it is not clear which weights are meant."""
        checkpoints = sorted(Path(self.folder).glob("*.pth"))
        others = sorted(path for kind in ("*.safetensors", "*.bin") for path in Path(self.folder).glob(kind))
        if len(checkpoints) > 1 or (checkpoints and others):
            names = ", ".join(path.name for path in (*checkpoints, *others))
            raise UserError(f"{self.folder} holds the weights of several networks ({names}): give each its own folder.")
        return checkpoints[0] if checkpoints else None

    def _config_beside(self) -> Any:
        if not (Path(self.folder) / "config.json").is_file():
            return None
        from transformers import Mask2FormerConfig

        try:
            return Mask2FormerConfig.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}/config.json cannot be read ({str(error).splitlines()[0]}).") from error

    def _detector_differs(self) -> str:
        checkpoint = self._checkpoint()
        if checkpoint is None:
            return f"its detector is not mmdet's {CHECKPOINT}, but weights saved by transformers"
        if not file_sha256(checkpoint).startswith(SHA256_START):
            return f"its detector is not mmdet's {CHECKPOINT}, for the SHA-256 of {checkpoint.name} is another"
        if (Path(self.folder) / "config.json").is_file():
            return "its detector is configured by a config.json, where the benchmark's has none"
        return ""


class ColorClassifier:
    """Names the colour of an object: the most alike of ten, as CLIP sees texts about each and the object cut out."""

    def __init__(self, clip: OpenAICLIP) -> None:
        self._clip = clip
        self._classes: dict[str, Tensor] = {}

    def color(self, picture: Image.Image, instance: Instance) -> str:
        """One of COLORS."""
        seen = self._clip.of_picture(cut_out(picture, instance))
        return COLORS[int((self._features(CLASSES[instance.cls]) @ seen).argmax())]

    def _features(self, cls: str) -> Tensor:
        """(colours, D): of a class in each colour, the mean over the texts; kept, as they do not depend on pictures."""
        if cls not in self._classes:
            texts = [template.format(color=color, cls=cls) for color in COLORS for template in TEMPLATES]
            each = self._clip.of_texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._classes[cls] = normalize(each.mean(1), dim=-1)
        return self._classes[cls]


def cut_out(picture: Image.Image, instance: Instance) -> Image.Image:
    """The box of an object, grey outside its mask."""
    background = Image.new("RGB", picture.size, BACKGROUND)
    mask = Image.fromarray(instance.mask.cpu().numpy())
    return Image.composite(picture, background, mask).crop(instance.box)


def detector_input(picture: Image.Image) -> tuple[Tensor, Size]:
    """RGB -> float32 (3, H, W), H and W multiples of 32, and the size of the picture's part, at the top left."""
    scale = min(LONG_SIDE / max(picture.size), SHORT_SIDE / min(picture.size))
    height, width = (max(1, int(side * scale + 0.5)) for side in (picture.height, picture.width))
    levels = torch.from_numpy(resize_like_opencv(np.asarray(picture), height, width)).permute(2, 0, 1)
    levels = pad(levels, (0, -width % DIVISOR, 0, -height % DIVISOR), value=PADDING)
    mean, std = torch.from_numpy(MEAN)[:, None, None], torch.from_numpy(STD)[:, None, None]
    return (levels - mean) / std, (height, width)


def resize_like_opencv(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (height, width, 3), to the bit what cv2.resize gives by default.

    Bilinear between the two nearest pixels even where it shrinks, in fixed point: weights in 2048ths, and four bits
    cut off between the axes.
    """
    left, right, left_weight, right_weight = _neighbours(picture.shape[1], width)
    outside = right == left  # beyond the first or last column, which then has all the weight; not so with rows
    left_weight[outside], right_weight[outside] = 2048, 0
    rows = picture[:, left] * left_weight[:, None] + picture[:, right] * right_weight[:, None]
    upper, lower, *weights = _neighbours(picture.shape[0], height)
    upper_weight, lower_weight = (weight[:, None, None] for weight in weights)
    rows >>= 4
    return ((((rows[upper] * upper_weight) >> 16) + ((rows[lower] * lower_weight) >> 16) + 2) >> 2).astype(np.uint8)


def _neighbours(size: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The two pixels of an axis that each of `new` pixels lies between, and their int32 weights, in 2048ths."""
    place = ((np.arange(new) + 0.5) * (size / new) - 0.5).astype(np.float32)
    share = place - np.floor(place)
    before = np.floor(place).astype(np.int32)
    first, second = (np.rint(part * np.float32(2048)).astype(np.int32) for part in (1 - share, share))
    return before.clip(0, size - 1), (before + 1).clip(0, size - 1), first, second


def instances_of(
    class_logits: Tensor, mask_logits: Tensor, padded: Size, resized: Size, original: Size
) -> list[Instance]:
    """The objects that a network's answer to one picture means, with a score above 0.3, best first.

    class_logits: (queries, classes + 1), the last of them no object.   mask_logits: (queries, h, w).
    padded, resized, original: sizes of the network's input, of the picture in it, and of the picture itself.

    Every query may be an object of several classes; the 100 likeliest pairs are candidates. A score is the
    probability of the class times the mean of the mask's probabilities where these exceed one half.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    best, places = probabilities.flatten().topk(min(CANDIDATES, probabilities.numel()))
    found = []
    for probability, place in zip(best, places.tolist(), strict=True):
        if probability <= LEAST_SCORE:
            break  # nor do those that follow: no score exceeds the probability
        query, cls = divmod(place, probabilities.shape[1])
        logits = full_size(mask_logits[query], padded, resized, original)
        mask = logits > 0
        certainty = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        score = float(probability * certainty)
        if score > LEAST_SCORE:
            found.append(Instance(cls, score, tight_box(mask), mask))
    return sorted(found, key=lambda instance: -instance.score)


def full_size(logits: Tensor, padded: Size, resized: Size, original: Size) -> Tensor:
    """(h, w) -> (H, W) of the picture, through the network's input and without its padding."""
    upsampled = interpolate(logits.float()[None, None], padded, mode="bilinear")
    return interpolate(upsampled[..., : resized[0], : resized[1]], original, mode="bilinear")[0, 0]


def tight_box(mask: Tensor) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) around a mask that is not empty, x2 and y2 one pixel beyond it."""
    columns, rows = mask.any(0).nonzero().flatten().tolist(), mask.any(1).nonzero().flatten().tolist()
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def load_transformers(folder: str) -> Any:
    """What `save_pretrained` wrote, in float32. UserError for what is no Mask2Former or lacks weights."""
    from transformers import AutoConfig, Mask2FormerForUniversalSegmentation

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds neither mmdet's checkpoint (.pth) nor a config.json: check the path.")
    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind != "mask2former":
            raise UserError(f"{folder} holds a network of the type {kind}: give the folder of a Mask2Former.")
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded ({str(error).splitlines()[0]}).") from error
    network, report = loaded
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(UNUSED))
    if missing:
        raise UserError(f"{folder} does not fill a Mask2Former: {missing[0]} is missing: download it again.")
    return network.requires_grad_(False)
