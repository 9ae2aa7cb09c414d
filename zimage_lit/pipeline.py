"""Text to image for people: `ZImagePipeline` in Python, and the task behind `lightning run generate`."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self, TypeVar

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.progress import Progress
from safetensors import SafetensorError
from torch import Tensor

from zimage_lit import sampling
from zimage_lit.backbone import S3DiT
from zimage_lit.backbone.checkpoints import save_weights
from zimage_lit.components import FluxVAECodec, LatentCodec, PatchPCACodec, Qwen3TextEncoder, TextEncoder
from zimage_lit.config import one_line, read_yaml, settings_from
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.files import read_json
from zimage_lit.grids import labelled_grid
from zimage_lit.lora import adapter_names, add_adapters, kept_weights, plain_weights, read_lora
from zimage_lit.sampling.guidance import from_published_scale
from zimage_lit.sampling.solvers import OnStep

T = TypeVar("T")

# What `model_index.json` may name, and who reads it here.
CODECS: dict[str, Callable[[Path], LatentCodec]] = {"AutoencoderKL": FluxVAECodec, "PatchPCACodec": PatchPCACodec}
TEXT_ENCODERS: dict[str, Callable[[Path], TextEncoder]] = {
    "Qwen3Model": Qwen3TextEncoder,
    "Qwen3ForCausalLM": Qwen3TextEncoder,
}
DIFFUSERS_CLASSES = ("AutoencoderKL", "ZImageTransformer2DModel")
PROMPT_FILES = (".txt", ".csv", ".json", ".jsonl", ".tsv", ".md")  # one word with such an ending is no prompt
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*")


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model wants to be asked; `guidance_scale` in the standard convention, 1 = none, from t = `cfg_start` on."""

    shift: float = 3.0
    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 8
    guidance_scale: float = 1.0
    cfg_start: float = 0.0
    solver: str = "euler"
    eta: float = 0.0

    def filled(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What was asked, with the default for each None; the default eta goes with the default solver only."""
        chosen = {name: getattr(self, name) if value is None else value for name, value in asked.items()}
        if asked["eta"] is None and chosen["solver"] != self.solver:
            chosen["eta"] = 0.0
        return chosen

    @classmethod
    def published(cls, shift: float) -> "SamplingDefaults":
        """Those of the published models, told apart by their shift: Turbo has 3, the undistilled Z-Image has 6.

        Z-Image's README runs 50 steps at g = 4, which is 5 in the standard convention.
        """
        return cls(shift) if shift < 6 else cls(shift, num_inference_steps=50, guidance_scale=from_published_scale(4))


class ZImagePipeline:
    """A backbone, a text encoder and a codec that together turn prompts into pictures.

    Args:
        backbone: the velocity network; evaluation mode is switched on.
        text_encoder: prompts -> features; codec: latents -> pictures.
        shift: static shift of the noise schedule, which belongs to the model.
        height, width, num_inference_steps, guidance_scale, cfg_start, solver, eta: what a call uses where it does not
            say otherwise.

    The same prompt, seed and settings give the same picture, whatever it is asked for together with: noise comes from
    each picture's own seed, and with ``batch_size=1`` every picture is computed alone.
    """

    def __init__(
        self,
        backbone: S3DiT,
        text_encoder: TextEncoder,
        codec: LatentCodec,
        *,
        shift: float = 3.0,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 8,
        guidance_scale: float = 1.0,
        cfg_start: float = 0.0,
        solver: str = "euler",
        eta: float = 0.0,
    ) -> None:
        self.backbone = backbone.eval()
        self.text_encoder = text_encoder
        self.codec = codec
        self.defaults = SamplingDefaults(
            shift, height, width, num_inference_steps, guidance_scale, cfg_start, solver, eta
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Load the published layout: transformer/, text_encoder/, tokenizer/, vae/, scheduler/ and model_index.json.

        ``device``: None takes a GPU where there is one. ``dtype`` of the backbone: None is bfloat16 on a GPU (float16
        overflows) and float32 elsewhere. The frozen parts are read at their first use.
        Raises UserError that names what is missing, damaged or of an unknown class.
        """
        parts = parts_of(Path(folder))
        device = usable_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        backbone = S3DiT.from_pretrained(Path(folder) / "transformer", dtype)
        return cls(backbone, **parts).to(device)

    def load_lora(self, file: str | Path, scale: float = 1.0) -> Self:
        """Draw with the LoRA in a file from now on, beside those loaded before; returns itself.

        file: in diffusers' or ComfyUI's dialect.   scale: of its effect, 1 = as it was trained.
        Raises UserError that names what in the file is no LoRA of this backbone.
        """
        if not math.isfinite(scale):
            raise UserError(f"the scale of a LoRA must be a number, not {scale}.")
        adapters = read_lora(file, self.backbone)
        add_adapters(self.backbone, adapters, f"lora_{len(adapter_names(self.backbone))}", scale)
        self.backbone.eval()
        return self

    def save_pretrained(
        self,
        folder: str | Path,
        weights: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        on_bytes: Callable[[int], object] | None = None,
    ) -> None:
        """Write everything to one folder in the published layout; an older pipeline there is replaced as a whole.

        weights: of the backbone, by their published names; None for its own, with its LoRAs merged in.
        dtype: that they are written in; None for the backbone's.   on_bytes: called after each of them.
        Where the codec is an ``AutoencoderKL``, diffusers' ``ZImagePipeline`` loads the folder too. A save that fails
        half-way (full disk) leaves what was there before. Raises UserError where the folder holds anything else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / "model_index.json").is_file() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no pipeline; name another folder to save to.")
        partial, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("partial", "old"))
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            self._write_parts(partial)  # first, for what they lack would show only after all the weights
            own = plain_weights(self.backbone) if weights is None else weights
            dtype = dtype or self.backbone.x_pad_token.dtype
            save_weights(own, self.backbone.config, partial / "transformer", dtype, on_bytes=on_bytes)
            self._write_index(partial)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            cause = error.__cause__ or error  # the backbone has already made a sentence of its own
            if isinstance(cause, OSError | SafetensorError):
                reason = str(cause).replace(partial.name, folder.name)  # the partial folder is gone
                raise UserError(
                    f"Cannot save the pipeline to {folder} ({reason}); nothing there was changed."
                ) from error
            raise
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def to(self, device: torch.device | str) -> Self:
        """Run on this device from now on; returns itself."""
        self.backbone.to(device)
        self.text_encoder.to(device)
        self.codec.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the backbone runs."""
        return next(self.backbone.parameters()).device

    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        seed: int | list[int] = 0,
        cfg_start: float | None = None,
        cfg_truncation: float = 1.0,
        cfg_normalization: float = 0.0,
        batch_size: int = 1,
        solver: str | None = None,
        eta: float | None = None,
        on_step: OnStep[list[Tensor]] | None = None,
        draw: int | list[int] = 0,
    ) -> list[Image.Image]:
        """Pictures for one or several prompts, in their order; None stands for the model's defaults.

        Args:
            prompt: one or several; more than 512 tokens are refused by the text encoder.
            height, width: in pixels, multiples of the codec's downsampling times the patch size (16 for Z-Image).
            guidance_scale: the standard one, 1 = none; the g of Z-Image's own code is this minus 1.
            negative_prompt: what guidance leads away from; None is the empty prompt.
            seed: one for each prompt, or one for all; equals ``torch.Generator("cpu").manual_seed`` in diffusers.
            cfg_start, cfg_truncation: no guidance before and beyond these t (0 = noise, 1 = clean), where a step then
                costs half.
            cfg_normalization: longest a guided velocity may get, relative to the conditional one; 0 = unlimited.
            batch_size: pictures that are computed together. More than 1 is faster where pictures are small, and
                then equal to a picture computed alone only up to the rounding of the network's kernels.
            solver: euler, heun (asks the network twice a step), cps (draws some of the noise anew at each step) or
                renoise (all of it; for students that were distilled with it).
            eta: how much cps draws anew, in [0, 1].
            on_step: called as ``on_step(index, latents)`` after every step of every batch.
            draw: which of the noises that the seed's generator gives one after the other, from 0: some protocols seed
                once and draw several pictures. One for each prompt, or one for all.

        Raises UserError for a size that does not fit, a number out of its range, or numbers of prompts, negatives,
        seeds and draws that do not match.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        chosen = self.defaults.filled({
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "cfg_start": cfg_start,
            "solver": solver,
            "eta": eta,
        })  # fmt: skip
        latents = self.latents(
            prompts,
            _for_each("" if negative_prompt is None else negative_prompt, prompts, "negative_prompt"),
            _for_each(seed, prompts, "seed"),
            draws=_for_each(draw, prompts, "draw"),
            **chosen,
            batch_size=batch_size,
            cfg_truncation=cfg_truncation,
            cfg_normalization=cfg_normalization,
            on_step=on_step,
        )
        return [to_picture(self.codec.decode(one[None])[0]) for one in latents]

    def latents(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        cfg_start: float = 0.0,
        cfg_truncation: float = 1.0,
        cfg_normalization: float = 0.0,
        batch_size: int = 1,
        solver: str = "euler",
        eta: float = 0.0,
        draws: Sequence[int] | None = None,
        **settings: Any,
    ) -> list[Tensor]:
        """Clean latents (C, H / downsample, W / downsample) float32 of each prompt; ``settings`` as in ``sample``."""
        guidance: dict[str, Any] = {
            "guidance_scale": guidance_scale,
            "cfg_start": cfg_start,
            "cfg_truncation": cfg_truncation,
            "cfg_normalization": cfg_normalization,
        }
        self.check_settings(height, width, num_inference_steps, batch_size, solver, eta, **guidance)
        shape = (self.codec.channels, height // self.codec.downsample, width // self.codec.downsample)
        draws = [0] * len(prompts) if draws is None else draws
        noises = sampling.noises(seeds, shape, self.device, draws)
        captions = self.text_encoder.encode(list(prompts))
        negatives = self.text_encoder.encode(list(negative_prompts)) if guidance_scale != 1.0 else None
        finished: list[Tensor] = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            finished += sampling.sample(
                self.backbone,
                captions[part],
                noises[part],
                seeds=seeds[part],
                draws=draws[part],
                negative_captions=negatives[part] if negatives else None,
                num_inference_steps=num_inference_steps,
                shift=self.defaults.shift,
                solver=solver,
                eta=eta,
                **guidance,
                **settings,
            )
        return finished

    def check_settings(
        self,
        height: int,
        width: int,
        num_inference_steps: int,
        batch_size: int,
        solver: str,
        eta: float,
        **guidance: float,
    ) -> None:
        """Raise UserError where a call with these settings could not make pictures."""
        self.check_size(height, width)
        at_least_one("batch_size", batch_size)
        sampling.check_schedule(num_inference_steps, self.defaults.shift)
        sampling.check_solver(solver, eta)
        sampling.check_guidance(**guidance)

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError where pictures of this size, in pixels, cannot be made."""
        multiple = self.codec.downsample * self.backbone.config.patch_size
        largest = multiple * min(self.backbone.config.axes_lens[1:])  # rows and columns that have a position
        for name, side in (("height", height), ("width", width)):
            if not multiple <= side <= largest or side % multiple:
                raise UserError(
                    f"{name}={side} does not fit this model: use a multiple of {multiple} pixels, at most {largest}."
                )

    def _write_parts(self, folder: Path) -> None:
        codec_folder = _own_folder(self.codec, "vae")
        encoder_folder = _own_folder(self.text_encoder, "text_encoder")
        tokenizer_folder = encoder_folder
        if not (encoder_folder / "tokenizer_config.json").is_file():
            tokenizer_folder = encoder_folder.parent / "tokenizer"
        folder.mkdir(parents=True)
        shutil.copytree(codec_folder, folder / "vae")
        no_tokenizer = shutil.ignore_patterns(*TOKENIZER_FILES)
        shutil.copytree(encoder_folder, folder / "text_encoder", ignore=no_tokenizer)
        (folder / "tokenizer").mkdir()
        for pattern in TOKENIZER_FILES:
            for file in tokenizer_folder.glob(pattern):
                shutil.copy(file, folder / "tokenizer")
        scheduler = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": self.defaults.shift,
            "use_dynamic_shifting": False,
        }
        (folder / "scheduler").mkdir()
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)

    def _write_index(self, folder: Path) -> None:
        tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json")
        index = {
            "_class_name": "ZImagePipeline",
            "_sampling_defaults": asdict(self.defaults),  # diffusers passes over keys with a leading underscore
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3Model"],
            "tokenizer": ["transformers", tokenizer.get("tokenizer_class", "Qwen2Tokenizer")],
            "transformer": _index_entry(folder / "transformer"),
            "vae": _index_entry(folder / "vae"),
        }
        _write_json(folder / "model_index.json", index)  # last: a folder with an index is complete


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) float in [-1, 1] -> 8-bit RGB picture, rounded to the nearest level."""
    levels = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, a GPU where there is one for None; UserError where torch cannot compute on it."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if str(chosen).startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={chosen} was asked for, but torch finds no GPU here; leave it out to run on the CPU.")
    try:
        torch.ones(1, device=chosen).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # each kind of device has its own way to be absent
        reason = one_line(error).partition(". ")[0]
        raise UserError(f"device={chosen} cannot be used here ({reason}); give another one or leave it out.") from error
    return torch.device(chosen)


def _for_each(value: T | list[T], prompts: list[str], name: str) -> list[T]:
    """One value a prompt."""
    values = list(value) if isinstance(value, list) else [value] * len(prompts)
    if len(values) != len(prompts):
        raise UserError(
            f"{name} has {len(values)} entries for {len(prompts)} prompts: give one, or one for each prompt."
        )
    return values


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} to load a pipeline from.")
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} has no model_index.json, so it is not a pipeline's folder; check the path.")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "ZImagePipeline":
        found = index.get("_class_name")
        raise UserError(f'{folder / "model_index.json"} describes a "{found}", not a ZImagePipeline.')
    for part in ("transformer", "text_encoder", "vae", "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} lacks its {part}/ folder; write or download the whole pipeline again.")
    return index


def parts_of(folder: Path) -> dict[str, Any]:
    """All but the backbone in a pipeline's folder, as arguments of ZImagePipeline."""
    index = _read_index(folder)
    codec = _class_of(index, "vae", CODECS, folder)(folder / "vae")
    text_encoder = _class_of(index, "text_encoder", TEXT_ENCODERS, folder)(folder)
    return {"text_encoder": text_encoder, "codec": codec, **asdict(_read_defaults(folder, index))}


def _class_of(
    index: dict[str, Any], part: str, known: dict[str, Callable[[Path], T]], folder: Path
) -> Callable[[Path], T]:
    entry = index.get(part)
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
    if name not in known:
        raise UserError(f'{folder / "model_index.json"}: {part} is a "{name}"; known are {", ".join(known)}.')
    return known[name]


def codec_from(folder: str | Path) -> LatentCodec:
    """The latent codec in a folder, or in vae/ of a pipeline's folder. UserError where there is none that is known."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} to read a latent codec from: check the path.")
    inner = folder / "vae" if (folder / "vae").is_dir() else folder
    name = read_json(inner / "config.json").get("_class_name")
    if name not in CODECS:
        raise UserError(f'{inner / "config.json"} describes a "{name}"; known codecs are {", ".join(CODECS)}.')
    return CODECS[name](inner)


def _index_entry(folder: Path) -> list[str]:
    name = read_json(folder / "config.json")["_class_name"]
    return ["diffusers" if name in DIFFUSERS_CLASSES else "zimage_lit", name]


def _read_defaults(folder: Path, index: dict[str, Any]) -> SamplingDefaults:
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path)
    if scheduler.get("use_dynamic_shifting") or not isinstance(scheduler.get("shift"), int | float):
        raise UserError(f"{path} must hold a number as shift and no use_dynamic_shifting, as Z-Image's does.")
    stored = index.get("_sampling_defaults")
    if stored is None:
        return SamplingDefaults.published(float(scheduler["shift"]))
    return SamplingDefaults(**{**stored, "shift": float(scheduler["shift"])})


def _own_folder(component: Any, inner: str) -> Path:
    """Where a component's files lie: its folder, or the part of a pipeline's folder that is its own."""
    folder = getattr(component, "folder", None)
    if folder is None:
        raise UserError(f"A {type(component).__name__} keeps no folder, so it cannot be saved with the pipeline.")
    return Path(folder) / inner if (Path(folder) / inner).is_dir() else Path(folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------- lightning run generate


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of `lightning run generate`; None stands for what the model was saved with."""

    checkpoint: str  # a pipeline's folder, a run's folder, or a run's checkpoint (.ckpt)
    prompts: str  # one prompt, or a text file with one prompt a line
    output: str = "outputs/generate"  # folder for the pictures, grid.png and prompts.jsonl
    overwrite: bool = False  # replace the pictures of an earlier call in that folder
    negative_prompt: str = ""  # what guidance leads away from
    seed: int = 0  # of a prompt's first picture; the next ones count up
    images_per_prompt: int = 1  # pictures of each prompt
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    num_inference_steps: int | None = None  # steps of the solver
    guidance_scale: float | None = None  # the standard convention, 1 = none
    cfg_start: float | None = None  # no guidance before this t (0 = noise, 1 = clean)
    cfg_truncation: float = 1.0  # no guidance beyond this t
    cfg_normalization: float = 0.0  # longest guided velocity, relative to the conditional one; 0 = unlimited
    # heun asks the network twice a step, cps draws some of the noise anew, renoise all of it
    solver: Literal["euler", "heun", "cps", "renoise"] | None = None
    eta: float | None = None  # share of the noise that cps draws anew, 0 to 1
    batch_size: int = 1  # pictures at once; more is faster for small pictures and equal up to rounding
    device: str | None = None  # cpu, cuda, cuda:1, …; a GPU where there is one


def generate_task(settings: dict[str, Any]) -> None:
    """Write one PNG for each prompt and seed, `prompts.jsonl` with how each was made, and `grid.png`.

    Each picture is written as soon as it is there, with its prompt, seed and settings inside the file.
    Raises UserError for wrong settings, where the output folder holds anything and `overwrite` is not set (both before
    anything is written or removed), and where writing fails.
    """
    asked = settings_from(GenerateSettings, settings)
    prompts, seeds = read_prompts(asked.prompts), _seeds(asked)
    output = Path(asked.output)
    earlier = _earlier_pictures(output, asked.overwrite)
    pipeline = load_pipeline(asked.checkpoint, asked.device)
    call = sampling_arguments(asked, pipeline)
    for text in (*prompts, asked.negative_prompt):  # one that is too long shows now, not after an hour of sampling
        pipeline.text_encoder.encode([text])

    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    try:
        for path in earlier:
            path.unlink(missing_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        pictures = _write_pictures(pipeline, jobs, call, output, asked.checkpoint)
        columns = asked.images_per_prompt if asked.images_per_prompt > 1 else None
        labelled_grid(pictures, [prompt for prompt, _ in jobs], columns).save(output / "grid.png")
    except OSError as error:
        raise UserError(
            f"Cannot write to {output} ({error}); the pictures already written there are kept: make room, or name "
            f"another output=…."
        ) from error
    print(f"{len(jobs)} pictures in {output}, together in {output / 'grid.png'}")


def _write_pictures(
    pipeline: ZImagePipeline, jobs: list[tuple[str, int]], call: dict[str, Any], output: Path, checkpoint: str
) -> list[Image.Image]:
    """Draw the (prompt, seed) of every job; each picture is on disk, and in `prompts.jsonl`, as soon as it is there."""
    pictures: list[Image.Image] = []
    with Progress() as progress, (output / "prompts.jsonl").open("w", encoding="utf-8") as records:
        bar = progress.add_task("pictures", total=len(jobs))
        for start in range(0, len(jobs), call["batch_size"]):
            batch = jobs[start : start + call["batch_size"]]
            share = len(batch) / call["num_inference_steps"]
            drawn = pipeline(
                [prompt for prompt, _ in batch],
                seed=[seed for _, seed in batch],
                on_step=lambda *_, share=share: progress.advance(bar, share),
                **call,
            )
            for picture, (prompt, seed) in zip(drawn, batch, strict=True):
                name = f"{len(pictures):05d}-seed{seed}.png"
                made = {"prompt": prompt, "seed": seed, **call, "checkpoint": checkpoint}
                save_picture(picture, output / name, made)
                records.write(json.dumps({"file": name, **made}, ensure_ascii=False) + "\n")
                records.flush()
                pictures.append(picture)
    return pictures


def load_pipeline(checkpoint: str | Path, device: str | None = None, key: str = "checkpoint") -> ZImagePipeline:
    """The pipeline behind a pipeline's folder, a run's folder or a run's checkpoint (.ckpt); `key` named it."""
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"{key}: there is no {path}; give a pipeline's folder, a run's folder or a .ckpt file.")
    if path.is_file() or path.suffix == ".ckpt":
        return _from_training_checkpoint(path, device)
    if (path / "model_index.json").is_file():
        return ZImagePipeline.from_pretrained(path, device)
    if (path / "pipeline" / "model_index.json").is_file():
        return ZImagePipeline.from_pretrained(path / "pipeline", device)
    if (path / "checkpoints" / "last.ckpt").exists():
        return _from_training_checkpoint(path / "checkpoints" / "last.ckpt", device)
    raise UserError(
        f"{path} holds neither a pipeline (model_index.json) nor a run's pipeline/ or checkpoints/last.ckpt."
    )


def read_prompts(prompts: str) -> list[str]:
    """The lines of a text file that are not blank, or the one prompt that was given."""
    if not os.path.isfile(prompts):
        if not prompts.strip():
            raise UserError("prompts is empty: give a prompt, or a text file with one prompt a line.")
        one_word = len(prompts.split()) == 1
        if os.path.isdir(prompts) or (one_word and prompts.strip().lower().endswith(PROMPT_FILES)):
            raise UserError(
                f"There is no file {prompts} to read prompts from; give a text file with one prompt a line."
            )
        return [prompts]
    try:
        lines = Path(prompts).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{prompts} is not a text file in UTF-8; it should hold one prompt a line.") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{prompts} holds no prompts; write one on each line.")
    return found


def save_picture(picture: Image.Image, path: Path | IO[bytes], made: dict[str, Any]) -> None:
    """A PNG that carries how it was made: text fields prompt and seed, and all of ``made`` as JSON in parameters."""
    info = PngInfo()
    info.add_text("prompt", made["prompt"])
    info.add_text("seed", str(made["seed"]))
    info.add_text("parameters", json.dumps(made, ensure_ascii=False))
    picture.save(path, format="PNG", pnginfo=info)


def _seeds(asked: GenerateSettings) -> range:
    """The seeds of every prompt's pictures."""
    last = asked.seed + at_least_one("images_per_prompt", asked.images_per_prompt) - 1
    if asked.seed < 0 or last > sampling.LARGEST_SEED:
        raise UserError(
            f"seed={asked.seed} with images_per_prompt={asked.images_per_prompt} leaves the range of seeds, which is "
            f"0 to {sampling.LARGEST_SEED}."
        )
    return range(asked.seed, last + 1)


def sampling_arguments(asked: Any, pipeline: ZImagePipeline) -> dict[str, Any]:
    """Every argument of a pipeline call but prompt and seed, the model's defaults filled in; UserError where wrong.

    asked: settings of a task with the fields of sampling that GenerateSettings has.
    """
    of_the_model = ("height", "width", "num_inference_steps", "guidance_scale", "cfg_start", "solver", "eta")
    chosen = pipeline.defaults.filled({name: getattr(asked, name) for name in of_the_model})
    chosen |= {name: getattr(asked, name) for name in ("cfg_truncation", "cfg_normalization", "batch_size")}
    pipeline.check_settings(**chosen)
    return chosen | {"negative_prompt": asked.negative_prompt}


def check_lengths(pipeline: ZImagePipeline, call: Mapping[str, Any], prompts: Sequence[str]) -> None:
    """UserError for the first text that is too long, before an hour of sampling; no network runs for that.

    call: arguments of the pipeline's call, as `sampling_arguments` gives them.
    """
    encoder = pipeline.text_encoder
    if isinstance(encoder, Qwen3TextEncoder):  # no other has a limit
        encoder.tokenize([call["negative_prompt"]] if call["guidance_scale"] != 1.0 else [])
        encoder.tokenize(list(prompts))


def _earlier_pictures(output: Path, overwrite: bool) -> list[Path]:
    """The pictures of an earlier call that this one replaces; UserError where the folder is not free for it."""
    file = next((place for place in (output, *output.parents) if place.exists() and not place.is_dir()), None)
    if file:
        raise UserError(f"output={output}: {file} is a file; name a folder for the pictures.")
    if not output.exists() or not any(output.iterdir()):
        return []
    if not overwrite:
        raise UserError(
            f"{output} is not empty; name another output=…, or give overwrite=true to replace its pictures."
        )
    index = output / "prompts.jsonl"
    if not index.is_file():
        return []
    try:
        with index.open(encoding="utf-8") as records:
            return [output / Path(json.loads(record)["file"]).name for record in records]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index} does not say which pictures to replace; name another output=….") from None


def _from_training_checkpoint(path: Path, device: str | None) -> ZImagePipeline:
    """A checkpoint's weights with the text encoder, codec and sampling settings that its run's config.yaml names."""
    from zimage_lit.callbacks.sampling import stage_pipeline  # which imports the pipeline itself
    from zimage_lit.stages.initial_weights import misfits, open_weights, read_checkpoint

    chosen_device = usable_device(device)
    config = run_config(path)
    stage = build_stage(config["model"])
    stage.configure_model()
    weights = dict(open_weights(path))
    if wrong := misfits(kept_weights(stage.backbone), weights):
        raise UserError(f"{path} does not hold what its run's config.yaml describes: {wrong[0]} does not fit.")
    stage.check_base(read_checkpoint(path))
    stage.backbone.load_state_dict(weights, strict=False)
    return stage_pipeline(stage, sampling_of(config)).to(chosen_device)


def run_config(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint."""
    path = checkpoint.resolve().parent.parent / "config.yaml"
    if not path.is_file():
        raise UserError(f"{checkpoint} does not lie in a run's folder: {path} is missing, so its parts are unknown.")
    return read_yaml(path)


def sampling_of(config: dict[str, Any]) -> Any:
    """The SamplingSettings with which a run drew its pictures."""
    from zimage_lit.callbacks.sampling import SamplingSettings

    callbacks = config.get("trainer", {}).get("callbacks") or []
    callbacks = callbacks.values() if isinstance(callbacks, dict) else callbacks
    given = (callback.get("init_args", {}).get("sampling") for callback in callbacks)
    chosen: dict[str, Any] = next((settings for settings in given if settings), {})
    return SamplingSettings(**chosen)


def build_stage(settings: dict[str, Any]) -> Any:
    """The LightningModule of a run's config; its backbone starts fresh where a checkpoint brings the weights, that is,
    but for the frozen ones of a LoRA."""
    from lightning import LightningModule

    from zimage_lit.validate import instantiate

    arguments = dict(settings.get("init_args", {}))
    if not arguments.get("lora"):
        arguments |= {key: None for key in ("init_from", "student_init_from") if key in arguments}
    fresh = {**settings, "init_args": arguments}
    return instantiate("model", LightningModule, fresh)
