"""Small pipelines and runs on disk, for tests of what reads weights from there."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.components import PatchPCACodec, build_tiny_qwen3
from zimage_lit.config import to_yaml
from zimage_lit.pipeline import ZImagePipeline
from zimage_lit.sharded_checkpoints import META, split

PROMPTS = ["a red circle", "two blue squares", "the word CAT"]
SIZES: dict[str, Any] = {
    "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64,
    "axes_dims": [8, 8, 8], "axes_lens": [1536, 64, 64],
}  # fmt: skip


def fill(model: nn.Module, seed: int, size: float = 1.0) -> None:
    """Random values for all that is trainable, of a size that lets every part matter."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=source)
                matrix = parameter.ndim > 1 and len(parameter) > 1
                parameter.copy_(size * noise * parameter.shape[-1] ** -0.5 if matrix else 0.5 + 0.3 * noise)


def backbone(seed: int, **sizes: Any) -> S3DiT:
    model = S3DiT(S3DiTConfig(**{**SIZES, **sizes}))
    fill(model, seed)
    return model.eval()


def write_pipeline(root: Path, name: str, seed: int, words: list[str] = PROMPTS, **sizes: Any) -> Path:
    """A pipeline's folder root/name; those of one root share codec and, with the same `words`, text encoder."""
    parts = root / f"parts-{len(words)}"
    encoder = build_tiny_qwen3(parts / "qwen", words, hidden_size=64)
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = PatchPCACodec.fit(images, root / "codec")
    own: dict[str, Any] = {"shift": 2.0, "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0}
    ZImagePipeline(backbone(seed, **sizes), encoder, codec, **own).save_pretrained(root / name)
    return root / name


def write_run(
    folder: Path, pipeline: Path, weights: dict[str, Tensor], config: S3DiTConfig, lora: dict[str, Any] | None = None
) -> Path:
    """What a run leaves behind: config.yaml, and a checkpoint with `weights` as the average; the last ones are 0."""
    codec = {"class_path": "zimage_lit.components.PatchPCACodec", "init_args": {"folder": str(pipeline / "vae")}}
    encoder = {"class_path": "zimage_lit.components.Qwen3TextEncoder", "init_args": {"folder": str(pipeline)}}
    sampling = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0, "shift": 2.0}
    export = {"class_path": "zimage_lit.callbacks.export.PipelineExport", "init_args": {"sampling": sampling}}
    arguments = {
        "backbone": {"preset": "tiny", **asdict(config)},
        "codec": codec,
        "text_encoder": encoder,
        "init_from": str(pipeline) if lora else None,
        "lora": lora,
    }
    settings = {
        "trainer": {"callbacks": {"export": export}},
        "model": {"class_path": "zimage_lit.stages.FlowMatchingModule", "init_args": arguments},
    }
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(settings))
    checkpoint = {
        "state_dict": {f"backbone.{name}": torch.zeros_like(weight) for name, weight in weights.items()},
        "callbacks": {"EMA": {"updates": 1, "average": weights}},
        "pytorch-lightning_version": "2",
    }
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


def write_sharded_run(folder: Path, run: Path) -> Path:
    """The same run with its checkpoint as a folder, as several ranks write it."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (folder / "checkpoints" / "last.ckpt").mkdir(parents=True)
    (folder / "config.yaml").write_text((run / "config.yaml").read_text())
    tensors, rest = split(checkpoint)
    dcp.save(tensors, checkpoint_id=folder / "checkpoints" / "last.ckpt", no_dist=True)
    torch.save(rest, folder / "checkpoints" / "last.ckpt" / META)
    return folder


class Nearest:
    """A scorer whose optimum is known: one number of the network shall be `target`; call `stop_at` is broken off."""

    calls, stop_at = 0, 0

    def __call__(self, pipeline: ZImagePipeline, target: float) -> dict[str, float]:
        Nearest.calls += 1
        if Nearest.calls == Nearest.stop_at:
            raise KeyboardInterrupt
        bias = pipeline.backbone.state_dict()["t_embedder.mlp.2.bias"][0].item()
        return {"bias": bias, "nearness": -abs(bias - target)}


nearest = Nearest()


def no_numbers(pipeline: ZImagePipeline) -> dict[str, float]:
    return {}
