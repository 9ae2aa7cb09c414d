"""DreamSim as a judge: how far apart two pictures look to people (OneIG's diversity).

Fu et al., arXiv 2306.09344. The benchmark uses the `dreamsim` package's ensemble: DINO, OpenAI's CLIP and OpenCLIP, all
ViT-B/16 with low-rank additions to their attention, whose features are put side by side.

The package itself is not used: to build DINO it fetches code from another repository and runs it (torch.hub), and it
needs open_clip. The same files are read here into timm's VisionTransformer instead. Checked once against dreamsim
0.2.1 under torch 2.15 with random weights of the full size in its own files' form: distances of 0.16 to 0.23 agreed
to 1e-6. The published weights have not been run here.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from evaluation.judges.checkpoints import filled, read_pickle, read_safetensors
from evaluation.judges.contract import Asked, JudgeRecord
from evaluation.judges.weights import file_sha256, library_versions
from zimage_lit.errors import UserError
from zimage_lit.files import read_json
from zimage_lit.pipeline import usable_device

SIDE = 224  # pixels of what the networks see; pictures are squeezed to a square
WEIGHTS_URL = "https://github.com/ssundaram21/dreamsim/releases (v0.2.0-checkpoints, dreamsim_ensemble_checkpoint.zip)"
DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
# where the package leaves it, or beside the others
DINO = ("checkpoints/dino_vitbase16_pretrain.pth", "dino_vitbase16_pretrain.pth")
CLIPS = ("clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar")
ADDITIONS = ("ensemble_lora/adapter_model.safetensors", "ensemble_lora/adapter_model.bin")
ADDITIONS_CONFIG = "ensemble_lora/adapter_config.json"
ADDITION = re.compile(r".*\bextractor_list\.(\d+)\.model\.(.+)\.lora_B\.weight")  # of which network, to what
SIZES = {"width": 768, "layers": 12, "patch": 16}  # of each of the three
CLIPS_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PIXELS = {  # network, in the ensemble's order -> mean and deviation of what it has learnt on
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": CLIPS_PIXELS,
    "open_clip": CLIPS_PIXELS,
}
HEAD_WIDTH = 64


class DreamSimJudge:
    """Role `distance`: 1 - the cosine of two pictures' features, 0 for the same picture.

    folder: with the ensemble's weights as the `dreamsim` package keeps them: clip_vitb16_pretrain.pth.tar,
        open_clip_vitb16_pretrain.pth.tar and ensemble_lora/ from its archive, and dino_vitbase16_pretrain.pth, in
        checkpoints/ or beside them.
    device: what it computes on; by default a GPU where there is one.

    No SHA-256 of the published files is known here: the networks are told by their sizes, and count as the benchmark's
    where these are right. In float32, one picture at a time.
    """

    def __init__(self, folder: str, device: str | None = None) -> None:
        self.folder = folder
        self.device = device

    def record(self) -> JudgeRecord:
        """UserError for a file that is absent or holds something else."""
        files = ensemble_files(self.folder)
        listing = "".join(f"{file_sha256(file)}  {role}\n" for role, file in files.items())
        return JudgeRecord(
            judge=type(self).__name__,
            model="DreamSim ensemble",
            revision=sha256(listing.encode()).hexdigest()[:16],
            differs=self._differs(files),
            settings={"precision": "float32"},
            versions=library_versions("torch", "torchvision", "timm", "pillow"),
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """Two pictures each -> {"distance"}, in [0, 2]. UserError, at the first call, for files of something else."""
        seen: dict[bytes, Tensor] = {}  # the pairs of four pictures share these
        return [
            {"distance": self._distance([self._features(picture, seen) for picture in one.pictures])} for one in asked
        ]

    def _features(self, picture: Image.Image, seen: dict[bytes, Tensor]) -> Tensor:
        key = sha256(repr(picture.size).encode() + picture.tobytes()).digest()
        if key not in seen:
            seen[key] = self._ensemble(picture)
        return seen[key]

    def _distance(self, features: Sequence[Tensor]) -> float:
        first, second = features
        return float((first - second).square().sum() / 2)  # of unit vectors: 1 - their cosine, and 0 for the same

    @cached_property
    def _ensemble(self) -> "Ensemble":
        return Ensemble(ensemble_files(self.folder), usable_device(self.device))

    def _differs(self, files: Mapping[str, Path]) -> str:
        for role in PIXELS:
            sizes = vit_sizes(vit_tensors(files[role], mmap=True)[0], files[role])
            if sizes != SIZES:
                return f"its {role} has {sizes}, DreamSim's {SIZES}"
        return ""


class Ensemble:
    """A picture -> its features (D,) in float64: the three networks' side by side, less their mean, with length 1."""

    def __init__(self, files: Mapping[str, Path], device: torch.device) -> None:
        additions = attention_additions(files["additions"], files["config"])
        self.networks: list[tuple[transforms.Normalize, Any, Tensor | None]] = []
        for place, (role, (mean, deviation)) in enumerate(PIXELS.items()):
            network, projection = vision_transformer(role, files[role], additions.get(place, {}))
            shown = transforms.Normalize(mean, deviation)
            self.networks.append((shown, network.to(device), None if projection is None else projection.to(device)))
        unknown = additions.keys() - set(range(len(PIXELS)))
        if unknown:
            raise UserError(f"{files['additions']} adds to networks that DreamSim's ensemble has not: {unknown}.")
        square = transforms.Resize((SIDE, SIDE), transforms.InterpolationMode.BICUBIC)
        self.prepare = transforms.Compose([square, transforms.ToTensor()])
        self.device = device

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Tensor:
        pixels = self.prepare(picture)[None].to(self.device)
        parts = []
        for shown, network, projection in self.networks:
            first = network.forward_features(shown(pixels))[0, 0]  # the class token
            parts.append(first if projection is None else first @ projection)
        features = torch.cat(parts).cpu().double()
        features = features - features.mean()
        return features / features.norm()


def vision_transformer(role: str, file: Path, additions: Mapping[str, Tensor]) -> tuple[nn.Module, Tensor | None]:
    """timm's network with a file's weights, and the projection (W, D) of its class token; DINO's has none.

    additions: what is added to the weights of that name. DINO's class token is taken before its last norm. UserError
    for a file that holds something else.
    """
    from timm.models.vision_transformer import VisionTransformer

    tensors, projection = vit_tensors(file)
    sizes = vit_sizes(tensors, file)
    if (projection is None) != (role == "dino"):
        raise UserError(f"{file} is not DreamSim's {role}: download it again from {WEIGHTS_URL}.")
    network = VisionTransformer(
        img_size=SIDE,
        patch_size=sizes["patch"],
        embed_dim=sizes["width"],
        depth=sizes["layers"],
        num_heads=sizes["width"] // HEAD_WIDTH,
        num_classes=0,
        final_norm=role != "dino",
        norm_layer=partial(nn.LayerNorm, eps=1e-6 if role == "dino" else 1e-5),
        act_layer=QuickGELU if role == "clip" else nn.GELU,
        weight_init="skip",
    )
    if role == "dino":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("norm.")}
    else:
        network.norm_pre = nn.LayerNorm(sizes["width"], eps=1e-5)  # not `pre_norm`, which takes the patches' bias away
    return filled(network, added(tensors, additions, file), file), projection


class QuickGELU(nn.Module):
    """OpenAI's approximation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def added(tensors: Mapping[str, Tensor], additions: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors in float32, with the additions to those that have some."""
    for name, addition in additions.items():
        if name not in tensors or tensors[name].shape != addition.shape:
            raise UserError(f"{file} has no {name} of the shape {tuple(addition.shape)}, to which ensemble_lora adds.")
    return {name: tensor.float() + additions.get(name, 0) for name, tensor in tensors.items()}


def vit_tensors(file: Path, mmap: bool = False) -> tuple[dict[str, Tensor], Tensor | None]:
    """A network's tensors by timm's names, and its projection if it has one.

    DreamSim's files of the two CLIPs hold them, in DINO's names, as "state_dict"; what follows the positions, a norm in
    CLIP, is called pos_drop there.
    """
    content = read_pickle(file, mmap)
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    renamed = {name.replace("pos_drop.", "norm_pre."): tensor for name, tensor in tensors.items()}
    projection = renamed.pop("proj", None)
    return renamed, None if projection is None else projection.float()


def vit_sizes(tensors: Mapping[str, Tensor], file: Path) -> dict[str, int]:
    """A network's sizes, from its tensors' shapes."""
    patches = tensors.get("patch_embed.proj.weight")
    if patches is None:
        raise UserError(f"{file} holds no vision transformer of DreamSim: download it again from {WEIGHTS_URL}.")
    layers = sum(name.endswith(".attn.qkv.weight") for name in tensors)
    return {"width": patches.shape[0], "layers": layers, "patch": patches.shape[-1]}


def attention_additions(file: Path, config_file: Path) -> dict[int, dict[str, Tensor]]:
    """Number of the network -> name of a weight -> what low-rank adaptation adds to it: alpha / r · B A.

    UserError for another kind of adaptation than DreamSim's.
    """
    config = read_json(config_file)
    others = [name for name in ("use_rslora", "use_dora", "fan_in_fan_out") if config.get(name)]
    if others or config.get("bias", "none") != "none" or not config.get("r"):
        raise UserError(f"{config_file} is not DreamSim's: it asks for {', '.join(others) or 'biases or no rank'}.")
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    found: dict[int, dict[str, Tensor]] = {}
    for name, up in tensors.items():
        if match := ADDITION.fullmatch(name):
            down = tensors[name.replace(".lora_B.", ".lora_A.")]
            place, weight = match.groups()
            found.setdefault(int(place), {})[f"{weight}.weight"] = (
                config["lora_alpha"] / config["r"] * up.float() @ down.float()
            )
    if not found:
        raise UserError(f"{file} adds nothing: download it again from {WEIGHTS_URL}.")
    return found


def ensemble_files(folder: str | Path) -> dict[str, Path]:
    """The files that the ensemble is read from. UserError that says where to get the first one that is absent."""
    folder = Path(folder)
    found = {}
    for role, names, source in (
        ("dino", DINO, DINO_URL),
        ("clip", CLIPS[:1], WEIGHTS_URL),
        ("open_clip", CLIPS[1:], WEIGHTS_URL),
        ("additions", ADDITIONS, WEIGHTS_URL),
        ("config", (ADDITIONS_CONFIG,), WEIGHTS_URL),
    ):
        there = [folder / name for name in names if (folder / name).is_file()]
        if not there:
            raise UserError(f"DreamSim's {folder / names[-1]} is missing: get it from {source}.")
        found[role] = there[0]
    return found
