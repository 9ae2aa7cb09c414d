"""Latents and caption features worked out once: what is stored, that training sees no difference, what is refused."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from lightning import Trainer
from PIL import Image

from data_modules import EditingDataModule, MixtureDataModule, PromptDataModule, TextToImageDataModule, encoding
from data_modules.buckets import SizeMapping, resize_to
from data_modules.chunks import ChunkedSamples
from data_modules.encoding import EncodeSettings, encode
from data_modules.folder_lock import LOCK
from data_modules.manifest import data_files, read_manifest, sha256
from data_modules.preparation import PrepareSettings, prepare
from zimage_lit import cli
from zimage_lit.components import FluxVAECodec, PatchPCACodec, Qwen3TextEncoder, build_tiny_qwen3
from zimage_lit.errors import UserError
from zimage_lit.stages import FlowMatchingModule

PICTURES = 14  # in four chunks
SIZES = {"resolution": 64}
ROUNDING = 2.0**-8  # relative, at most, of a number of 8 bits


def picture(index: int) -> np.ndarray:
    """A smooth picture, uint8 (H, W, 3), 40 to 100 pixels a side."""
    dice = np.random.default_rng(index)
    width, height = (int(side) for side in dice.choice([40, 64, 100], 2))
    coarse = Image.fromarray(dice.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def captions_of(index: int) -> dict[str, dict[str, str]]:
    return {
        "en": {"short": f"a red cube {index}", "long": "a blue ball on a table " * (index % 3 + 1)},
        "zh": {"a": "猫"},
    }


def prepared(folder: Path, lines: list[dict[str, Any]], **settings: Any) -> Path:
    folder.mkdir()
    for line in lines:
        for role in {"image", "source"} & line.keys():
            Image.fromarray(picture(int(line[role].split(".")[0]))).save(folder / line[role])
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"min_side": 16, "part_size": 4, "num_workers": 1, "name": "raw", **settings}
    prepare(PrepareSettings(str(folder / "list.jsonl"), str(folder / "data"), **settings))
    return folder / "data"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As forked processes have: a product of matrices may be rounded otherwise by two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    lines = [
        {"image": f"{n}.png", "captions": captions_of(n), "id": f"id-{n}", "number": n, "concept": "ab"[n % 2]}
        for n in range(PICTURES)
    ]
    return prepared(
        tmp_path_factory.mktemp("raw") / "list", lines, val_share=0.2, tokenizer=str(parts / "text_encoder")
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pca/, another_pca/, vae/ and text_encoder/."""
    folder = tmp_path_factory.mktemp("parts")
    images = [resize_to(picture(n), 64, 64) for n in range(60)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    PatchPCACodec.fit(pixels, folder / "pca")
    PatchPCACodec.fit(pixels[:30], folder / "another_pca")
    texts = [text for n in range(PICTURES) for kinds in captions_of(n).values() for text in kinds.values()]
    build_tiny_qwen3(folder / "text_encoder", texts, hidden_size=32, num_layers=2)
    build_tiny_qwen3(folder / "another_text_encoder", texts, hidden_size=32, num_layers=2, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 8),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
    vae.save_pretrained(folder / "vae")
    return folder


def settings(raw: Path | str, output: Path, parts: Path, **changes: Any) -> EncodeSettings:
    usual = {
        "codec": str(parts / "pca"),
        "text_encoder": str(parts / "text_encoder"),
        "sizes": SIZES,
        "batch_size": 3,
        "device": "cpu",
    }
    return EncodeSettings(str(raw), str(output), **{**usual, **changes})


@pytest.fixture(scope="module")
def encoded(raw: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("encoded") / "data"
    encode(settings(raw, output, parts))
    return output


def stored(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    samples = ChunkedSamples(folder / split)
    return [samples[index] for index in range(len(samples))]


def content(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in ["manifest.json", *data_files(folder)]}


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def bfloat16(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).view(torch.bfloat16).float()


def resized(index: int, sizes: SizeMapping | None = None) -> torch.Tensor:
    """A picture as the codec gets it, (1, 3, H, W) in [-1, 1]."""
    pixels = picture(index)
    width, height = (sizes or SizeMapping(**SIZES))(pixels.shape[1], pixels.shape[0])
    return (
        torch.from_numpy(resize_to(pixels, int(width), int(height)).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    )


# ---------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("codec_class", [PatchPCACodec, FluxVAECodec])
def test_latents_are_those_of_the_codec_rounded(
    raw: Path, parts: Path, tmp_path: Path, codec_class: type[PatchPCACodec] | type[FluxVAECodec]
) -> None:
    folder = parts / {PatchPCACodec: "pca", FluxVAECodec: "vae"}[codec_class]
    encode(settings(raw, tmp_path / "data", parts, codec=str(folder), text_encoder=None))
    codec, shapes = codec_class(folder), set()
    for split in ("train", "val"):
        for before, after in zip(stored(raw, split), stored(tmp_path / "data", split), strict=True):
            assert set(after) == {"image_latents", "captions", "metadata", "id"}
            assert all(after[name] == before[name] for name in ("captions", "metadata", "id"))
            (expected,) = codec.encode(resized(json.loads(after["metadata"])["number"]))
            found = bfloat16(after["image_latents"])
            shapes.add(found.shape)
            torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=1e-5)
    assert len(shapes) > 2


def test_features_are_those_of_every_caption_rounded(encoded: Path, parts: Path) -> None:
    encoder = Qwen3TextEncoder(parts / "text_encoder")
    for sample in stored(encoded):
        captions = captions_of(json.loads(sample["metadata"])["number"])
        texts = [captions["en"]["long"].strip(), captions["en"]["short"], captions["zh"]["a"]]
        expected = encoder.encode(texts)
        assert sample["feature_lengths"].tolist() == [len(one) for one in expected]
        torch.testing.assert_close(bfloat16(sample["caption_features"]), torch.cat(expected), rtol=ROUNDING, atol=1e-5)


def test_batches_hold_the_features_of_the_caption_that_they_name(encoded: Path, parts: Path) -> None:
    module = TextToImageDataModule(str(encoded), batch_size=5, num_workers=2)
    module.setup("fit")
    encoder, kinds = Qwen3TextEncoder(parts / "text_encoder"), set()
    for batch in module.train_dataloader():
        assert "images" not in batch
        for caption, features, latents in zip(
            batch["captions"], batch["caption_features"], batch["image_latents"], strict=True
        ):
            assert features.dtype == latents.dtype == torch.float32 and latents.ndim == 3
            torch.testing.assert_close(features, encoder.encode([caption])[0], rtol=ROUNDING, atol=1e-5)
            kinds.add(caption[:3])
    assert kinds == {"a r", "a b", "猫"}


def test_one_part_alone_leaves_the_other_as_it_was(raw: Path, parts: Path, tmp_path: Path) -> None:
    encode(settings(raw, tmp_path / "data", parts, codec=None, sizes=None))
    for before, after in zip(stored(raw), stored(tmp_path / "data"), strict=True):
        assert set(after) == {"image", "caption_features", "feature_lengths", "captions", "metadata", "id"}
        assert np.array_equal(after["image"], before["image"])
    module = TextToImageDataModule(str(tmp_path / "data"), batch_size=2, sizes=SizeMapping(**SIZES))
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert len(batch["images"]) == len(batch["caption_features"]) == 2
    assert set(module.encoded_by) == {"text_encoder"}


def test_planning_knows_the_encoded_sizes(raw: Path, encoded: Path) -> None:
    for split in ("train", "val"):
        with np.load(raw / split / "planning.npz") as before, np.load(encoded / split / "planning.npz") as after:
            width, height = SizeMapping(**SIZES)(before["width"], before["height"])
            assert np.array_equal(after["width"], width) and np.array_equal(after["height"], height)
            assert not np.array_equal(after["width"], before["width"])
            assert np.array_equal(after["concept"], before["concept"])
            lengths = [max(sample["feature_lengths"]) for sample in stored(encoded, split)]
            assert after["caption_tokens"].tolist() == lengths == before["caption_tokens"].tolist()
    module = TextToImageDataModule(
        str(encoded), batch_size=None, token_budget=128, drop_last=False, concept_weights={"b": 2.0}
    )
    module.setup("fit")
    found: list[str] = []
    for batch in module.train_dataloader():
        tokens = [
            -(-latents[0].numel() // 4 // 32) * 32 + -(-len(features) // 32) * 32
            for latents, features in zip(batch["image_latents"], batch["caption_features"], strict=True)
        ]
        assert len(tokens) * max(tokens) <= 128
        found += map(str, batch["ids"])
    numbers = [json.loads(sample["metadata"])["number"] for sample in stored(encoded)]
    assert sorted(found) == sorted(f"id-{n}" for n in numbers for _ in range(1 + n % 2))


def test_edits_have_the_latents_of_both_pictures(parts: Path, tmp_path: Path) -> None:
    lines = [{"image": f"{20 + n}.png", "source": f"{n}.png", "caption": f"a red cube {n}"} for n in range(4)]
    data = prepared(tmp_path / "list", lines)
    encode(settings(data, tmp_path / "encoded", parts))
    module = EditingDataModule(str(tmp_path / "encoded"), batch_size=4)
    module.setup("fit")
    (batch,) = module.train_dataloader()
    codec = PatchPCACodec(parts / "pca")
    for caption, image, source in zip(batch["captions"], batch["image_latents"], batch["source_latents"], strict=True):
        number = int(caption.rsplit(" ", 1)[1])
        for found, index in ((image, 20 + number), (source, number)):
            torch.testing.assert_close(found, codec.encode(resized(index))[0], rtol=ROUNDING, atol=1e-5)


def test_prompts_have_features(parts: Path, tmp_path: Path) -> None:
    data = prepared(tmp_path / "list", [{"prompt": f"a red cube {n}"} for n in range(5)])
    assert "has no pictures, only prompts: leave out codec" in refused(
        lambda: encode(settings(data, tmp_path / "encoded", parts))
    )
    encode(settings(data, tmp_path / "encoded", parts, codec=None, sizes=None))
    module = PromptDataModule(str(tmp_path / "encoded"), batch_size=5)
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert len(batch["caption_features"]) == 5


def test_the_command_line_encodes_and_does_it_once(
    raw: Path, parts: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["run", "encode", f"data={raw}", f"output={tmp_path / 'data'}", f"codec={parts / 'pca'}", "batch_size=3"]
    words += [f"text_encoder={parts / 'text_encoder'}", "sizes.resolution=64", "device=cpu"]
    assert cli.main(words) == 0
    assert content(tmp_path / "data") == content(encoded)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    assert cli.main(words) == 0
    assert "is made already" in capsys.readouterr().out.replace("\n", "")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before
    assert cli.main(["run", "verify", f"data={tmp_path / 'data'}"]) == 0


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The raw data behind a web server, with a cache of one's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(raw)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_data_behind_an_address_are_encoded_alike(address: str, encoded: Path, parts: Path, tmp_path: Path) -> None:
    encode(settings(f"{address}/", tmp_path / "data", parts))
    assert content(tmp_path / "data") == content(encoded)
    message = refused(lambda: encode(settings(address, tmp_path / "other", parts, sizes=None)))
    assert "no multiple of 16 pixels" in message
    message = refused(lambda: TextToImageDataModule(address, batch_size=2).setup("fit"))
    assert (
        f"in {address}/train have sides that are no multiple of 16 pixels" in message
        and "data.init_args.sizes.resolution" in message
    )


# ---------------------------------------------------------------------------------------------------- killed


def killed_after(chunks: int, asked: EncodeSettings) -> None:
    """Encode in a process of its own that is killed with SIGKILL in the middle of a chunk."""

    def die(*arguments: Any) -> None:
        if len(list(Path(asked.output).glob(".parts/*/part.json"))) == chunks:
            writer = arguments[2].with_name(f"unfinished-{arguments[2].name}")
            writer.mkdir()
            (writer / "half-written.bin").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)

    def run() -> None:
        torch.set_num_threads(1)  # the threads of the parent did not come along
        encoding._encode_chunk = die
        encode(asked)

    original = encoding._encode_chunk
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_encoding_goes_on_and_ends_in_the_same_bytes(
    raw: Path, parts: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "data"
    asked = settings(raw, output, parts)
    finished: set[int] = set()
    for chunks in (1, 3):
        killed_after(chunks, asked)
        assert not (output / "manifest.json").exists()
        found = {path.stat().st_ino for path in output.glob(".parts/*/*.bin") if "unfinished" not in str(path)}
        assert found >= finished and len(found) == chunks
        finished = found
    with pytest.raises(UserError, match="never finished"):
        TextToImageDataModule(str(output)).setup("fit")

    message = refused(lambda: encode(settings(raw, output, parts, codec=str(parts / "another_pca"))))
    assert message.startswith(f"{output} holds an unfinished preparation with encoded_by=")

    for module, name in ((encoding, "write_manifest"), (shutil, "rmtree")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted)
            encode(asked)
    encode(asked)
    assert content(output) == content(encoded)
    assert finished <= {path.stat().st_ino for path in output.glob("*/*.bin")}
    assert not (output / ".parts").exists() and not (output / LOCK).exists()


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------- training


def stage(parts: Path, codec: str = "pca", text_encoder: str = "text_encoder", **options: Any) -> FlowMatchingModule:
    backbone = {
        "preset": "tiny", "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 32, "axes_dims": [4, 6, 6],
    }  # fmt: skip
    module = FlowMatchingModule(
        Qwen3TextEncoder(parts / text_encoder), PatchPCACodec(parts / codec), backbone=backbone, **options
    )
    module.configure_model()
    with torch.no_grad():
        for parameter in module.backbone.parameters():  # fresh gates are zero: let captions have their say
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    return module


def losses_of(module: FlowMatchingModule, data: Any, steps: int = 6) -> list[float]:
    losses: list[torch.Tensor] = []
    original = module.training_step

    def noted(*arguments: Any) -> torch.Tensor:
        losses.append(original(*arguments))
        return losses[-1]

    module.training_step = noted  # type: ignore[method-assign]
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return [float(loss) for loss in losses]


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_training_on_encoded_data_has_the_same_losses(raw: Path, encoded: Path, parts: Path, dropout: float) -> None:
    """Within the rounding of latents and features; the token budget makes the same batches of both."""
    options: dict[str, Any] = {"batch_size": None, "token_budget": 160, "seed": 4}
    plain = TextToImageDataModule(str(raw), sizes=SizeMapping(**SIZES), **options)
    expected = losses_of(stage(parts, caption_dropout=dropout), plain)
    module = stage(parts, caption_dropout=dropout)
    asked: list[list[str]] = []
    encode_captions = module.text_encoder.encode
    module.text_encoder.encode = lambda prompts: asked.append(prompts) or encode_captions(prompts)  # type: ignore
    found = losses_of(module, TextToImageDataModule(str(encoded), **options))
    assert len(set(expected)) == 6
    assert found == pytest.approx(expected, rel=5e-4) and found != expected
    assert asked == ([] if dropout == 0 else [[""]] * len(asked)) and (dropout == 0 or asked)


def test_training_with_other_components_is_refused(encoded: Path, parts: Path, raw: Path, tmp_path: Path) -> None:
    for options, made in (
        ({"codec": "another_pca"}, "latents of another codec than model.init_args.codec"),
        (
            {"text_encoder": "another_text_encoder"},
            "caption features of another text_encoder than model.init_args.text",
        ),
    ):
        data = TextToImageDataModule(str(encoded), batch_size=3)
        message = refused(lambda options=options, data=data: losses_of(stage(parts, **options), data))  # type: ignore
        assert f"The data hold {made}" in message and "run `encode` again" in message
        mixed = MixtureDataModule({"data": data}, {"data": 1.0})
        assert made in refused(lambda options=options, mixed=mixed: losses_of(stage(parts, **options), mixed))  # type: ignore
    plain = TextToImageDataModule(str(raw), batch_size=3, sizes=SizeMapping(**SIZES))
    assert len(losses_of(stage(parts, codec="another_pca"), plain, steps=1)) == 1


# ---------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_encoded_is_refused(raw: Path, encoded: Path, parts: Path, tmp_path: Path) -> None:
    def message(data: Path = raw, output: Path = tmp_path / "data", **changes: Any) -> str:
        found = refused(lambda: encode(settings(data, output, parts, **changes)))
        assert not (tmp_path / "data" / "manifest.json").exists()
        return found

    assert message(codec=None, text_encoder=None).startswith("encode has nothing to do: name a codec=FOLDER, a text_")
    assert "has latents or features already: give the data set that it was made from" in message(encoded)
    assert "There is no data folder" in message(tmp_path / "nowhere")
    assert "must be at least 1" in message(batch_size=0) and "must be at least 1" in message(chunk_mib=0)
    assert "sizes are those of the pictures that a codec encodes" in message(codec=None)
    assert message(sizes={"resolutoin": 64}).startswith("sizes.resolutoin is not a setting of SizeMapping")
    assert message(device="gpu").startswith("device=gpu cannot be used here")
    assert str(tmp_path / "no_codec") in message(codec=str(tmp_path / "no_codec"))
    assert str(tmp_path / "no_encoder") in message(text_encoder=str(tmp_path / "no_encoder"))
    assert 'describes a "None"' in message(codec=str(parts / "text_encoder"))
    assert "set output to another folder" in message(output=raw)
    assert "prepared with sizes=" in message(output=encoded, sizes={"resolution": 48})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    assert "is not empty and holds no data set" in message(output=tmp_path / "other")


def test_pictures_that_fit_no_latent_are_named_before_anything_is_encoded(
    raw: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(raw, tmp_path / "data", parts, sizes=None)
    message = refused(lambda: encode(asked))
    assert "have sides that are no multiple of 16 pixels" in message and "set sizes.resolution, for" in message
    assert not list(tmp_path.glob("data/.parts/*"))

    monkeypatch.setattr(encoding, "check_stored_sides", lambda *_: None)  # as with the second picture of an edit
    message = refused(lambda: encode(asked))
    assert message.startswith("A picture of sample id-") and message.endswith(
        "set sizes.resolution, for example to 1024."
    )


def test_damaged_data_are_not_encoded(raw: Path, parts: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(raw, tmp_path / "raw"))
    chunk = sorted((data / "train").glob("*.bin"))[1]
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-20] + bytes(20))
    asked = settings(data, tmp_path / "data", parts)
    assert refused(lambda: encode(asked)).startswith(f"{chunk} is damaged (its SHA-256 differs from the manifest)")
    chunk.write_bytes(whole[:-20])
    assert refused(lambda: encode(asked)).startswith(f"{chunk} has {len(whole) - 20} bytes")
    chunk.write_bytes(whole)
    encode(asked)
    assert read_manifest(tmp_path / "data").splits == read_manifest(raw).splits
