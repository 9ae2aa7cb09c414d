"""`lightning run export`: every source in every form, without ever holding the weights as a whole."""

import resource
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from variants import SIZES, backbone, fill, write_pipeline, write_run, write_sharded_run

from zimage_lit import cli
from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.backbone.checkpoints import export_comfyui_weights, save_weights
from zimage_lit.errors import UserError
from zimage_lit.export import export_task
from zimage_lit.lora import LoRASettings, adapters_of, apply_lora, kept_weights, plain_weights, read_lora, write_lora
from zimage_lit.pipeline import ZImagePipeline, load_pipeline

LORA = {"rank": 4, "alpha": 8.0}


@dataclass
class Shelf:
    """A pipeline, a full run and a LoRA run on it, and the weights that each of them stands for."""

    root: Path
    pipeline: Path
    run: Path
    lora_run: Path
    adapted: S3DiT

    def weights(self, source: Path) -> dict[str, Tensor]:
        if source == self.lora_run:
            return dict(plain_weights(self.adapted))
        return dict(backbone(seed=1 if source == self.run else 0).state_dict())


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    root = tmp_path_factory.mktemp("shelf")
    pipeline = write_pipeline(root, "pipeline", seed=0)
    trained = backbone(seed=1)
    run = write_run(root / "run", pipeline, dict(trained.state_dict()), trained.config)
    adapted = apply_lora(backbone(seed=0), LoRASettings(**LORA))
    fill(adapted, seed=2, size=0.5)
    lora_run = write_run(root / "lora_run", pipeline, kept_weights(adapted), adapted.config, LORA)
    return Shelf(root, pipeline, run, lora_run, adapted.eval())


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert actual[name].dtype == weight.dtype, name
        torch.testing.assert_close(actual[name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["pipeline", "run", "lora_run"])
@pytest.mark.parametrize("form", ["pipeline", "transformer", "comfyui"])
def test_every_source_is_written_in_every_form(shelf: Shelf, kind: str, form: str, tmp_path: Path) -> None:
    source = getattr(shelf, kind)
    output = tmp_path / ("model.safetensors" if form == "comfyui" else "model")
    export_task({"source": str(source), "output": str(output), "form": form, "dtype": "float32"})
    written = S3DiT.from_pretrained(output)
    assert_same(written.state_dict(), shelf.weights(source))
    assert {path.name for path in tmp_path.iterdir()} == {output.name}
    if form == "transformer":
        theirs = ZImageTransformer2DModel.from_pretrained(output)
        assert_same(theirs.state_dict(), shelf.weights(source))
    if form == "pipeline":
        pictures = [p("a red circle", seed=3)[0] for p in (load_pipeline(output, "cpu"), load_pipeline(source, "cpu"))]
        assert np.abs(np.asarray(pictures[0], int) - np.asarray(pictures[1], int)).max() <= 1
        assert load_pipeline(output, "cpu").defaults == load_pipeline(source, "cpu").defaults


def test_the_command_writes_bfloat16_unless_told_otherwise(shelf: Shelf, tmp_path: Path, capsys: Any) -> None:
    checkpoint = shelf.run / "checkpoints" / "last.ckpt"
    words = [f"source={checkpoint}", f"output={tmp_path / 'model'}", "form=transformer"]
    assert cli.main(["run", "export", *words]) == 0
    assert f"transformer of {checkpoint}: {tmp_path / 'model'}" in capsys.readouterr().out
    expected = {name: weight.bfloat16() for name, weight in shelf.weights(shelf.run).items()}
    assert_same(S3DiT.from_pretrained(tmp_path / "model").state_dict(), expected)
    assert cli.main(["run", "export", *words]) == 2
    assert "exists: name another output" in capsys.readouterr().err
    assert cli.main(["run", "export", *words, "overwrite=true", "dtype=float32"]) == 0
    assert_same(S3DiT.from_pretrained(tmp_path / "model").state_dict(), shelf.weights(shelf.run))


def test_a_run_is_found_by_its_id(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    checkpoint = shelf.run / "checkpoints" / "last.ckpt"
    monkeypatch.setattr(
        "zimage_lit.stages.initial_weights.run_checkpoint", lambda *words: asked.append(words) or checkpoint
    )
    words = {"form": "transformer", "dtype": "float32", "tracking_uri": "sqlite:///x.db"}
    export_task({"source": "run:0123", "output": str(tmp_path / "model"), **words})
    assert asked == [("0123", "sqlite:///x.db")]
    assert_same(S3DiT.from_pretrained(tmp_path / "model").state_dict(), shelf.weights(shelf.run))


@pytest.mark.parametrize("kind", ["run", "lora_run"])
def test_a_sharded_checkpoint_is_made_one_of(shelf: Shelf, kind: str, tmp_path: Path) -> None:
    source = getattr(shelf, kind)
    run = write_sharded_run(tmp_path / "run", source)
    words = {"output": str(tmp_path / "model"), "form": "transformer", "dtype": "float32"}
    export_task({"source": str(run), **words})
    assert_same(S3DiT.from_pretrained(tmp_path / "model").state_dict(), shelf.weights(source))


@pytest.mark.parametrize("dialect", ["diffusers", "comfyui"])
def test_a_lora_run_gives_lora_files_and_they_merge_into_its_base(shelf: Shelf, dialect: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    words = {"output": str(file), "form": f"lora-{dialect}", "dtype": "float32"}
    export_task({"source": str(shelf.lora_run), **words})
    first = next(iter(load_file(file)))
    assert first.startswith("transformer." if dialect == "diffusers" else "diffusion_model.")
    read, wanted = read_lora(file, shelf.adapted), adapters_of(shelf.adapted)
    assert read.keys() == wanted.keys()
    for name, adapter in wanted.items():
        torch.testing.assert_close(read[name].up @ read[name].down, adapter.up @ adapter.down)

    words = {"output": str(tmp_path / "model"), "form": "transformer", "dtype": "float32"}
    export_task({"source": str(shelf.pipeline), "lora": str(file), **words})
    merged = S3DiT.from_pretrained(tmp_path / "model").state_dict()
    assert_same(merged, shelf.weights(shelf.lora_run))
    words["output"] = str(tmp_path / "half")
    export_task({"source": str(shelf.pipeline), "lora": str(file), "lora_scale": 0.5, **words})
    base = shelf.weights(shelf.pipeline)
    expected = {name: base[name] + (weight - base[name]) / 2 for name, weight in merged.items()}
    for name, weight in S3DiT.from_pretrained(tmp_path / "half").state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_pipelines_draw_with_a_lora_file_and_save_it_merged(shelf: Shelf, tmp_path: Path) -> None:
    write_lora(adapters_of(shelf.adapted), tmp_path / "lora.safetensors", "comfyui", torch.float32)

    def draw(pipeline: ZImagePipeline) -> Tensor:
        size: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2}
        return pipeline.latents(["a red circle"], [""], [3], **size)[0]

    plain = ZImagePipeline.from_pretrained(shelf.pipeline, "cpu")
    adapted = ZImagePipeline.from_pretrained(shelf.pipeline, "cpu").load_lora(tmp_path / "lora.safetensors")
    expected = draw(load_pipeline(shelf.lora_run, "cpu"))
    torch.testing.assert_close(draw(adapted), expected, rtol=1e-4, atol=1e-4)
    assert (expected - draw(plain)).norm() > 1e-2 * expected.norm()
    none = ZImagePipeline.from_pretrained(shelf.pipeline, "cpu").load_lora(tmp_path / "lora.safetensors", scale=0.0)
    torch.testing.assert_close(draw(none), draw(plain))
    adapted.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        draw(ZImagePipeline.from_pretrained(tmp_path / "merged", "cpu")), expected, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(UserError, match="scale of a LoRA must be a number"):
        adapted.load_lora(tmp_path / "lora.safetensors", scale=float("nan"))


# --- memory ----------------------------------------------------------------------------------------------------------


class Watched(Mapping[str, Tensor]):
    """Weights that are made when they are asked for; counts the bytes of those that are still alive."""

    def __init__(self, config: S3DiTConfig) -> None:
        with torch.device("meta"):
            self.shapes = {name: tensor.shape for name, tensor in S3DiT(config).state_dict().items()}
        self.alive = self.peak = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.full(self.shapes[name], len(name), dtype=torch.float64)
        self.alive += tensor.nbytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor, self.died, tensor.nbytes)
        return tensor

    def died(self, size: int) -> None:
        self.alive -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@pytest.mark.parametrize("form", ["folder", "shards", "comfyui"])
def test_only_the_tensor_that_is_being_written_is_in_memory(form: str, tmp_path: Path) -> None:
    config = S3DiTConfig(**{**SIZES, "n_layers": 12, "dim": 192, "axes_dims": [32, 32, 32]})
    watched = Watched(config)
    written: list[int] = []
    if form == "comfyui":
        export_comfyui_weights(
            watched, config, tmp_path / "m.safetensors", dtype=torch.float64, on_bytes=written.append
        )
    else:
        size = 10**9 if form == "folder" else 3_000_000
        save_weights(watched, config, tmp_path / "m", torch.float64, max_shard_size=size, on_bytes=written.append)
    largest = max(shape.numel() * 8 for shape in watched.shapes.values())
    total = sum(shape.numel() * 8 for shape in watched.shapes.values())
    assert sum(written) == total > 10 * largest
    assert watched.peak <= 2 * largest and watched.alive == 0


# --- what is wrong is named ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"source": "absent"}, "there is no absent to read weights from"),
        ({"source": "{root}/codec"}, "describes a PatchPCACodec, not an S3-DiT"),
        ({"source": "{pipeline}/transformer"}, "holds a backbone alone: take form=transformer"),
        ({"output": "{tmp}/x.safetensors"}, "form=pipeline writes a folder"),
        ({"form": "comfyui"}, r"form=comfyui writes a file name that ends in \.safetensors"),
        ({"form": "lora-comfyui", "output": "{tmp}/x.safetensors"}, "needs a run that trained a LoRA"),
        ({"lora": "{tmp}/absent.safetensors"}, "there is no file .*absent.safetensors"),
        ({"form": "onnx"}, "form must be one of"),
        ({"sourse": "x"}, "sourse is not a setting"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(
    shelf: Shelf, words: dict[str, str], message: str, tmp_path: Path
) -> None:
    names = {"root": shelf.root, "pipeline": shelf.pipeline, "tmp": tmp_path}
    asked = {"source": str(shelf.run), "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match=message) as caught:
        export_task(asked | {key: value.format(**names) for key, value in words.items()})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_lora_run_whose_base_was_exchanged_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", shelf.pipeline, kept_weights(shelf.adapted), shelf.adapted.config, LORA)
    path = run / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(path, weights_only=True), "lora_base": "another"}, path)
    words = {"source": str(run), "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match="adapters of other frozen weights"):
        export_task(words)
    with pytest.raises(UserError, match="adapters of other frozen weights"):
        load_pipeline(run, "cpu")


@pytest.mark.parametrize("form", ["pipeline", "transformer", "comfyui"])
def test_a_full_disk_leaves_the_earlier_export_alone(shelf: Shelf, form: str, tmp_path: Path) -> None:
    output = tmp_path / ("model.safetensors" if form == "comfyui" else "model")
    words = {"source": str(shelf.run), "output": str(output), "form": form}
    export_task(words)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"(could not|Cannot) save"):
            export_task({**words, "source": str(shelf.pipeline), "overwrite": True})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
