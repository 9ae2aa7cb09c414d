"""The experiments at full size: the real network on the meta device, and a small twin through the whole code path."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from ranks import Ranks

from data_modules.preparation import PrepareSettings, prepare
from zimage_lit import cli
from zimage_lit.backbone import S3DiT
from zimage_lit.components import FluxVAECodec, build_tiny_qwen3
from zimage_lit.config import compose, is_graph, list_experiments
from zimage_lit.pipeline import ZImagePipeline
from zimage_lit.stages.initial_weights import backbone_config

NAMES = [name for name in list_experiments() if name.startswith("z-image-6b/") and not is_graph(name)]
CHAIN = ["low-res", "omni", "sft"]  # each begins where the one before it ended
KINDS = ("long", "medium", "short", "user", "metadata", "enhanced")

# Two blocks; all that is not a size is as in the real one.
SMALL_BACKBONE = {
    "preset": "z-image-6b", "dim": 96, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 64, "axes_dims": [16, 16, 16],
}  # fmt: skip
SMALL = [
    f"model.init_args.backbone={json.dumps(SMALL_BACKBONE)}",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.max_steps=2",
    "trainer.logger=false",
    "trainer.enable_progress_bar=false",
    "trainer.callbacks.samples.init_args.prompts=[a boat]",
    "trainer.callbacks.samples.init_args.sampling={height: 32, width: 48, num_inference_steps: 1}",
    "data.init_args.num_workers=0",
]
PICTURES = ["data.init_args.data_dir=data/pictures", "data.init_args.token_budget=1024"]
COMPILED = "model.init_args.parallelize.compile_backend=eager"  # inductor takes a minute
NOT_COMPILED = "model.init_args.parallelize.compile=false"  # one of them is enough
OWN = {
    "low-res": [COMPILED, "data.init_args.sizes.resolution=64"],
    "omni": [NOT_COMPILED, "data.init_args.sizes.max_resolution=128"],
    "sft": [NOT_COMPILED, "data.init_args.sizes.max_resolution=128", "data.init_args.balance.min_samples=2"],
    "finetune": [NOT_COMPILED, "data.init_args.sizes.resolution=96"],
    "lora": [NOT_COMPILED, "data.init_args.sizes.resolution=64"],
    "decoupled_dmd": [NOT_COMPILED, "data.init_args.sizes.resolution=64", "model.init_args.ratio=1"],
    "dmdr": [
        NOT_COMPILED,
        "data.init_args.sizes.resolution=64",
        "model.init_args.ratio=1",
        "trainer.callbacks.pickscore={class_path: zimage_lit.rewards.controls.JPEGSize}",
    ],
    "dpo": [NOT_COMPILED, "data.init_args.sizes.resolution=64", "data.init_args.data_dir=data/pairs"],
    "grpo": [
        "trainer.callbacks.pickscore={class_path: zimage_lit.rewards.controls.JPEGSize, init_args: {name: pick_score}}",
        "trainer.callbacks.gold={class_path: zimage_lit.rewards.controls.Brightness}",
        "trainer.callbacks.gold.init_args={name: gold, held_out: true}",
        "model.init_args.canvases=[[32, 48], [64, 32]]",
        "model.init_args.rollout.group_size=3",
        "model.init_args.lora.rank=4",
        "data.init_args.data_dir=data/prompts",
        "data.init_args.batch_size=2",
    ],
}


def test_every_experiment_at_full_size_is_tried_here() -> None:
    assert {name.rpartition("/")[2] for name in NAMES} == set(OWN)


ON_PROMPTS = ("grpo",)  # the others learn from pictures


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_the_published_one(name: str) -> None:
    config = compose(name, ["data.init_args.data_dir=data"])
    with torch.device("meta"):
        backbone = S3DiT(backbone_config(config["model"]["init_args"]["backbone"]))
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 6_154_908_736
    assert len(backbone.state_dict()) == 521


def test_each_stage_begins_where_the_one_before_it_ended() -> None:
    for before, name in pairwise(CHAIN):
        earlier, later = (compose(f"z-image-6b/{stage}", ["data.init_args.data_dir=data"]) for stage in (before, name))
        assert later["model"]["init_args"]["init_from"] == f"{earlier['run']['output_dir']}/checkpoints/last.ckpt"


def small_autoencoder(folder: Path) -> FluxVAECodec:
    """Random weights in the Flux VAE's shape: 16 channels, 8 pixels a latent."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
    autoencoder.save_pretrained(folder)
    return FluxVAECodec(folder)


def write_pictures(folder: Path) -> None:
    """Sixteen, of many sizes, with captions of every level in two languages."""
    folder.mkdir()
    for index in range(16):
        dice = np.random.default_rng(index)
        width, height = dice.integers(64, 200, 2)
        Image.fromarray(dice.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
        english = {kind: f"a {kind} harbour with {index} boats" for kind in KINDS} | {"tags": "harbour, boats"}
        chinese = dict.fromkeys(KINDS, f"港口 {index}") | {"tags": "港口"}
        (folder / f"{index:02d}.json").write_text(json.dumps({"captions": {"en": english, "zh": chinese}}))


def write_pairs(pictures: Path) -> Path:
    """A list of pairs of these pictures and their mirror images, with the metadata that `pairs` writes."""
    lines = []
    for index, name in enumerate(sorted(pictures.glob("*.png"))):
        Image.open(name).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored := name.with_suffix(".webp"))
        pair = {"margin": (index + 1) / 16, "difficulty": index / 16}
        lines.append({"winner": name.name, "loser": mirrored.name, "prompt": f"harbour {index}", "pair": pair})
    path = pictures / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/z-image, the published layout of small parts, data/pictures, data/pairs and data/prompts."""
    folder = tmp_path_factory.mktemp("workplace")
    write_pictures(folder / "pictures")
    prepare(PrepareSettings(str(folder / "pictures"), str(folder / "data/pictures"), min_side=32, num_workers=1))
    pairs = write_pairs(folder / "pictures")
    prepare(PrepareSettings(str(pairs), str(folder / "data/pairs"), min_side=32, num_workers=1))
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{n} boats"}}\n' for n in range(8)))
    prepare(PrepareSettings(str(folder / "prompts.jsonl"), str(folder / "data/prompts"), num_workers=1))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ZImagePipeline(
            S3DiT(backbone_config(dict(SMALL_BACKBONE))),
            build_tiny_qwen3(folder / "text", ["a harbour with boats"], hidden_size=64),
            small_autoencoder(folder / "vae"),
        ).save_pretrained(folder / "models/z-image")
    return folder


@pytest.fixture(scope="module")
def process() -> Iterator[Ranks]:
    """A process beside this one, for a run may set up communication."""
    with Ranks(1) as one:
        yield one


def lightning_run(folder: Path, words: list[str]) -> tuple[int, str]:
    """(exit code, errors) of `lightning run …`."""
    os.chdir(folder)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = cli.main(["run", *words])
    return code, errors.getvalue()


def run(process: Ranks, folder: Path, stage: str) -> tuple[int, str]:
    """(exit code, errors) of the small twin of an experiment."""
    data = [] if stage in ON_PROMPTS else PICTURES
    (answer,) = process(lightning_run, folder, [f"z-image-6b/{stage}", *SMALL, *data, *OWN[stage]])
    return answer


def check_run(process: Ranks, folder: Path, stage: str) -> None:
    """It runs, and leaves what a finished run leaves."""
    code, errors = run(process, folder, stage)
    assert code == 0, errors
    output = folder / "outputs/z-image-6b" / stage
    assert json.loads((output / "run.json").read_text()) == {"status": "finished", "step": 2}
    assert Image.open(output / "samples/step-00000002.png").size > (1, 1)
    assert (output / "checkpoints/last.ckpt").exists()


def test_a_small_twin_goes_through_the_curriculum(process: Ranks, workplace: Path) -> None:
    for stage in CHAIN:
        check_run(process, workplace, stage)


@pytest.mark.parametrize("stage", ["finetune", "lora", "dpo"])
def test_a_small_twin_is_tuned(process: Ranks, workplace: Path, stage: str) -> None:
    check_run(process, workplace, stage)


def test_a_small_twin_is_distilled_and_follows_a_reward(process: Ranks, workplace: Path) -> None:
    for stage in ("decoupled_dmd", "dmdr"):
        check_run(process, workplace, stage)
    pipeline = ZImagePipeline.from_pretrained(workplace / "outputs/z-image-6b/dmdr/pipeline")
    defaults = pipeline.defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.shift) == (1, 1.0, 3.0)


def test_a_small_twin_learns_from_rewards(process: Ranks, workplace: Path) -> None:
    check_run(process, workplace, "grpo")
    lines = (workplace / "outputs/z-image-6b/grpo/rewards/rank-0.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 * 3  # iterations, prompts, pictures of each


def test_a_lora_is_handed_out_for_others_tools(process: Ranks, workplace: Path) -> None:
    check_run(process, workplace, "lora")  # or is finished already
    files = {path.name for path in (workplace / "outputs/z-image-6b/lora/lora").glob("*.safetensors")}
    assert files == {"diffusers.safetensors", "comfyui.safetensors"}


def test_a_stage_without_the_one_before_it_says_which_file_is_missing(
    process: Ranks, workplace: Path, tmp_path: Path
) -> None:
    for part in ("models", "data"):
        shutil.copytree(workplace / part, tmp_path / part)
    code, errors = run(process, tmp_path, "sft")
    assert code != 0 and "outputs/z-image-6b/omni/checkpoints/last.ckpt" in errors
