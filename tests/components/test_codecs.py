"""Latent codecs against closed forms, a brute-force twin and diffusers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from zimage_lit.components import FluxVAECodec, PatchPCACodec, fingerprint
from zimage_lit.errors import UserError


def smooth_images(count: int = 40, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 5, width // 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 1.6 - 0.8


def patches_of(images: torch.Tensor, patch: int = 8) -> np.ndarray:
    rows = []
    for image in images.double().numpy():
        for top in range(0, image.shape[1], patch):
            for left in range(0, image.shape[2], patch):
                rows.append(image[:, top : top + patch, left : left + patch].reshape(-1))
    return np.stack(rows)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return smooth_images()


@pytest.fixture(scope="module")
def pca(images: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> PatchPCACodec:
    return PatchPCACodec.fit(images, tmp_path_factory.mktemp("pca"))


def test_pca_spans_the_subspace_of_the_singular_value_decomposition(images: torch.Tensor, pca: PatchPCACodec) -> None:
    rows = patches_of(images)
    _, singular, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    weights = load_file(pca.folder / "model.safetensors")
    ours = weights["components"].double().numpy()
    np.testing.assert_allclose(ours.T @ ours, vectors[:16].T @ vectors[:16], atol=1e-5)
    np.testing.assert_allclose(weights["mean"].numpy(), rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(weights["scale"].item() ** 2, (singular[:16] ** 2).sum() / len(rows) / 16, rtol=1e-5)


def test_pca_reconstruction_error_is_the_sum_of_the_dropped_eigenvalues(
    images: torch.Tensor, pca: PatchPCACodec
) -> None:
    rows = patches_of(images)
    dropped = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[:-16].sum()
    decoded = pca.decode(pca.encode(images))
    assert decoded.abs().max() < 1  # nothing was clamped
    error = ((decoded - images) ** 2).sum().item() / len(rows)
    assert error == pytest.approx(dropped, rel=1e-4)


def test_pca_latents_have_unit_size_overall_but_keep_their_relative_sizes(
    images: torch.Tensor, pca: PatchPCACodec
) -> None:
    latents = pca.encode(images)
    assert latents.shape == (len(images), 16, 4, 6) and latents.dtype == torch.float32
    assert latents.pow(2).mean().sqrt().item() == pytest.approx(1.0, abs=1e-4)
    deviations = latents.std((0, 2, 3))
    assert (deviations.diff() < 1e-3).all() and deviations[0] > 3 * deviations[-1]


def test_pca_with_all_components_loses_nothing(tmp_path: Path) -> None:
    noise = torch.rand(30, 3, 8, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codec = PatchPCACodec.fit(noise, tmp_path, channels=12, patch=2)
    torch.testing.assert_close(codec.decode(codec.encode(noise)), noise, atol=1e-5, rtol=0)


def test_pca_decodes_into_the_range_of_pixels(pca: PatchPCACodec) -> None:
    decoded = pca.decode(torch.full((1, 16, 2, 2), 50.0))
    assert decoded.abs().max() == 1.0


def test_pca_loaded_again_gives_the_same_bits(images: torch.Tensor, pca: PatchPCACodec, tmp_path: Path) -> None:
    again = PatchPCACodec(pca.folder)
    latents = pca.encode(images)
    assert again.channels == 16 and again.downsample == 8
    assert torch.equal(again.encode(images), latents)
    assert torch.equal(again.decode(latents), pca.decode(latents))
    refitted = PatchPCACodec.fit(images, tmp_path / "refitted")
    assert fingerprint(refitted.folder) == fingerprint(pca.folder)


def test_pca_does_not_depend_on_batch_mates_or_on_autocast(images: torch.Tensor, pca: PatchPCACodec) -> None:
    latents = pca.encode(images)
    assert torch.equal(pca.decode(latents)[5:6], pca.decode(latents[5:6]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pca.encode(images), latents)
        assert torch.equal(pca.decode(latents), pca.decode(latents.clone()))


def test_pca_hands_the_gradient_of_pictures_to_latents(images: torch.Tensor, pca: PatchPCACodec) -> None:
    latents = (0.1 * pca.encode(images[:1])).requires_grad_()  # nothing is clamped
    change = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)) * 1e-2
    weights = torch.randn(pca.decode(latents).shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((weights * pca.decode(latents)).sum(), latents)
    difference = (weights * (pca.decode(latents + change) - pca.decode(latents))).sum()  # it is linear
    torch.testing.assert_close((gradient * change).sum(), difference, rtol=1e-3, atol=1e-4)


def test_pca_is_made_before_its_folder_exists(tmp_path: Path) -> None:
    codec = PatchPCACodec(tmp_path / "later").to("cpu")
    with pytest.raises(UserError, match="later"):
        _ = codec.channels
    PatchPCACodec.fit(smooth_images(), tmp_path / "later")
    assert codec.channels == 16


@pytest.mark.parametrize(("height", "width"), [(36, 48), (32, 44)])
def test_pca_names_a_size_that_patches_do_not_divide(pca: PatchPCACodec, height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{width}x{height}.*multiples of 8"):
        pca.encode(torch.zeros(1, 3, height, width))


def test_pca_refuses_what_it_cannot_fit_or_decode(pca: PatchPCACodec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="floats"):
        PatchPCACodec.fit(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path)
    with pytest.raises(ValueError, match="channels=16"):
        PatchPCACodec.fit(torch.zeros(4, 3, 16, 16), tmp_path)  # one colour: no component at all
    with pytest.raises(ValueError, match=r"\(B, 16, h, w\)"):
        pca.decode(torch.zeros(1, 4, 2, 2))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def broken_pca(pca: PatchPCACodec, tmp_path: Path) -> Path:
    for path in pca.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_pca_names_damaged_and_missing_files(broken_pca: Path) -> None:
    weights = broken_pca / "model.safetensors"
    tensors = load_file(weights)
    image = torch.zeros(1, 3, 8, 8)

    save_file({**tensors, "mean": tensors["mean"][:10].clone()}, weights)
    with pytest.raises(UserError, match=r'"mean" has the shape \(10,\)'):
        PatchPCACodec(broken_pca).encode(image)
    save_file({"mean": tensors["mean"]}, weights)
    with pytest.raises(UserError, match='lacks the tensor "components"'):
        PatchPCACodec(broken_pca).encode(image)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        PatchPCACodec(broken_pca).encode(image)
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        PatchPCACodec(broken_pca).encode(image)
    (broken_pca / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match='"AutoencoderKL", but a PatchPCACodec'):
        _ = PatchPCACodec(broken_pca).downsample
    (broken_pca / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        _ = PatchPCACodec(broken_pca).downsample
    (broken_pca / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        _ = PatchPCACodec(broken_pca).downsample


def small_flux_autoencoder() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
    return vae.eval()


@pytest.fixture(scope="module")
def autoencoder() -> Any:
    return small_flux_autoencoder()


@pytest.fixture
def vae_folder(autoencoder: Any, tmp_path: Path) -> Path:
    autoencoder.save_pretrained(tmp_path / "pipeline" / "vae")
    return tmp_path / "pipeline" / "vae"


def test_flux_codec_equals_diffusers(autoencoder: Any, vae_folder: Path, images: torch.Tensor) -> None:
    with torch.no_grad():
        posterior = autoencoder.encode(images[:2]).latent_dist
        expected = (posterior.mode() - 0.1159) * 0.3611
        pixels = autoencoder.decode(expected / 0.3611 + 0.1159).sample.clamp(-1, 1)
    codec = FluxVAECodec(vae_folder)
    latents = codec.encode(images[:2])
    assert (codec.channels, codec.downsample) == (16, 4)
    assert latents.shape == (2, 16, 8, 12) and latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(codec.decode(latents), pixels, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(codec.decode(latents.requires_grad_()).sum(), latents)
    assert gradient.abs().sum() > 0
    assert pixels.abs().max() > 0


def test_flux_codec_reads_a_pipeline_folder_and_shards(
    autoencoder: Any, vae_folder: Path, images: torch.Tensor
) -> None:
    expected = FluxVAECodec(vae_folder).encode(images[:1])
    assert torch.equal(FluxVAECodec(vae_folder.parent).encode(images[:1]), expected)
    (vae_folder / "diffusion_pytorch_model.safetensors").unlink()
    autoencoder.save_pretrained(vae_folder, max_shard_size="50KB")
    assert len(list(vae_folder.glob("*.safetensors"))) > 1
    assert torch.equal(FluxVAECodec(vae_folder).encode(images[:1]), expected)
    min(vae_folder.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"-00001-of-.*is missing"):
        FluxVAECodec(vae_folder).encode(images[:1])


def test_flux_codec_samples_from_the_posterior_with_the_given_generator(
    autoencoder: Any, vae_folder: Path, images: torch.Tensor
) -> None:
    codec = FluxVAECodec(vae_folder)
    drawn = codec.encode(images[:1], sample=True, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        z = autoencoder.encode(images[:1]).latent_dist.sample(torch.Generator().manual_seed(7))
    torch.testing.assert_close(drawn, (z - 0.1159) * 0.3611, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(drawn, codec.encode(images[:1]), atol=1e-3)
    with pytest.raises(ValueError, match="generator"):
        codec.encode(images[:1], sample=True)


def test_flux_codec_decodes_in_float32_one_picture_at_a_time(vae_folder: Path, images: torch.Tensor) -> None:
    codec, exact = FluxVAECodec(vae_folder, dtype="bfloat16"), FluxVAECodec(vae_folder)
    latents = exact.encode(images[:3])
    rough = codec.encode(images[:3])
    assert rough.dtype == torch.float32 and not torch.equal(rough, latents)
    torch.testing.assert_close(rough, latents, atol=0.05, rtol=0.05)
    pixels = exact.decode(latents)
    assert torch.equal(codec.decode(latents), pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact.decode(latents[1:2]), pixels[1:2])
        assert torch.equal(exact.encode(images[:3]), latents)


def test_flux_codec_names_what_is_wrong(vae_folder: Path, tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 16, 16)
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        FluxVAECodec(tmp_path / "nowhere").encode(image)
    with pytest.raises(ValueError, match=r"18x16.*multiples of 4"):
        FluxVAECodec(vae_folder).encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match="float13"):
        FluxVAECodec(vae_folder, dtype="float13")

    path = vae_folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "encoder.extra": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r'"encoder\.extra"'):
        FluxVAECodec(vae_folder).encode(image)
    save_file({**tensors, "decoder.conv_in.bias": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r'"decoder\.conv_in\.bias" has the shape \(3,\)'):
        FluxVAECodec(vae_folder).encode(image)
    save_file({name: value for name, value in tensors.items() if name != "decoder.conv_in.bias"}, path)
    with pytest.raises(UserError, match=r'lacks the tensor "decoder\.conv_in\.bias"'):
        FluxVAECodec(vae_folder).encode(image)

    config = json.loads((vae_folder / "config.json").read_text())
    (vae_folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderTiny"}))
    with pytest.raises(UserError, match='"AutoencoderTiny"'):
        _ = FluxVAECodec(vae_folder).channels
    (vae_folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        _ = FluxVAECodec(vae_folder).channels


def test_fingerprint_sees_names_and_contents_only(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> Path:
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return tmp_path / name

    first = fingerprint(folder("a", {"x/1": "one", "2": "two"}))
    assert len(first) == 64
    assert fingerprint(folder("b", {"2": "two", "x/1": "one"})) == first
    others = [{"x/1": "one", "2": "too"}, {"x/1": "one", "3": "two"}, {"x1": "one", "2": "two"}, {"x/1": "one"}]
    assert len({fingerprint(folder(f"c{i}", files)) for i, files in enumerate(others)} | {first}) == 5
    with pytest.raises(UserError, match="nothing-here"):
        fingerprint(tmp_path / "nothing-here")
