"""Weights on disk: folders exchanged with diffusers, ComfyUI files, and one sentence for everything that is wrong."""

import json
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from zimage_lit.backbone import S3DiT, S3DiTConfig, checkpoints
from zimage_lit.errors import UserError

BATCH = ([(8, 8), (10, 6)], [5, 40])
WEIGHTS = "diffusion_pytorch_model.safetensors"


def assert_same_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit, dtype included."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.fixture
def folder(twins, tmp_path: Path) -> Path:
    twins.ours(n_layers=1, n_refiner_layers=1).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_a_folder_saved_by_diffusers_loads_and_draws_the_same(twins, tmp_path: Path, shard: str) -> None:
    theirs = twins.theirs()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / f"{WEIGHTS}.index.json").exists() == (shard == "100KB")
    ours = S3DiT.from_pretrained(tmp_path)
    assert_same_weights(ours.state_dict(), theirs.state_dict())
    batch = twins.batch(*BATCH)
    for actual, expected in zip(ours(*batch), twins.run_theirs(theirs, *batch), strict=True):
        assert twins.error(actual, expected) <= 1e-5


@pytest.mark.parametrize("shard", [10**10, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_saved_here_loads_in_diffusers(twins, tmp_path: Path, shard: int, dtype: torch.dtype) -> None:
    ours = twins.ours().to(dtype)
    checkpoints.save(ours, tmp_path / "out", max_shard_size=shard)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) == 1 if shard == 10**10 else len(files) > 3
    theirs, notes = ZImageTransformer2DModel.from_pretrained(
        tmp_path / "out", torch_dtype=dtype, output_loading_info=True
    )
    assert not any(notes.values())
    assert_same_weights(theirs.state_dict(), ours.state_dict())
    assert {key: theirs.config[key] for key in vars(ours.config) if key != "pad_multiple"} == {
        key: value for key, value in vars(ours.config).items() if key != "pad_multiple"
    }
    assert isinstance(AutoModel.from_pretrained(str(tmp_path / "out")), ZImageTransformer2DModel)


@pytest.mark.parametrize("shard", [10**10, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_is_exact(twins, tmp_path: Path, shard: int, dtype: torch.dtype) -> None:
    model = twins.ours(pad_multiple=8, norm_eps=1e-6, rope_theta=300.0).to(dtype)
    checkpoints.save(model, tmp_path / "out", max_shard_size=shard)
    loaded = S3DiT.from_pretrained(tmp_path / "out")
    assert loaded.config == model.config
    assert_same_weights(loaded.state_dict(), model.state_dict())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())


def test_shards_stay_below_the_limit_and_the_index_names_every_tensor(twins, tmp_path: Path) -> None:
    model = twins.ours()
    checkpoints.save(model, tmp_path, max_shard_size=100_000)
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert index["weight_map"].keys() == model.state_dict().keys()
    for shard in sorted(set(index["weight_map"].values())):
        tensors = load_file(tmp_path / shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 100_000 or len(tensors) == 1
        assert set(tensors) == {name for name, place in index["weight_map"].items() if place == shard}


def test_loading_casts_and_leaves_the_random_state_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    model = S3DiT.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(torch.random.get_rng_state(), before)


def test_loaded_weights_do_not_hang_on_the_file(folder: Path) -> None:
    model = S3DiT.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (folder / WEIGHTS).write_bytes(b"\0" * (folder / WEIGHTS).stat().st_size)
    assert_same_weights(model.state_dict(), before)


def test_a_pipeline_folder_is_entered(folder: Path) -> None:
    folder.rename(folder.with_name("transformer"))
    (folder.parent / "model_index.json").write_text("{}")
    assert isinstance(S3DiT.from_pretrained(folder.parent), S3DiT)


def test_diffusers_refuses_what_it_would_draw_wrongly(twins, tmp_path: Path) -> None:
    """It ignores an unknown pad_multiple with a warning only, so such a folder must not look like one of its own."""
    twins.ours(pad_multiple=8).save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        ZImageTransformer2DModel.from_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(str(tmp_path))
    assert S3DiT.from_pretrained(tmp_path).config.pad_multiple == 8


def test_saving_again_replaces_the_checkpoint_and_keeps_other_files(twins, tmp_path: Path) -> None:
    checkpoints.save(twins.ours(seed=1), tmp_path / "out", max_shard_size=100_000)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    second = twins.ours(seed=2)
    second.save_pretrained(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", WEIGHTS, "notes.txt"]
    assert_same_weights(S3DiT.from_pretrained(tmp_path / "out").state_dict(), second.state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_saved_files_are_readable_for_the_group(folder: Path) -> None:
    (folder.parent / "other").touch()
    usual = stat.S_IMODE((folder.parent / "other").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {usual}


@contextmanager
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond 20 kB: writing fails in the middle, as on a disk without space.

    Around the call alone, not as a fixture: pytest's own output may be a file, and longer.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_older_folder_untouched(twins, folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with full_disk(), pytest.raises(UserError, match=r"could not save to .*backbone.*unchanged"):
        twins.ours(seed=5).save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["backbone"]


def test_a_full_disk_leaves_the_older_comfyui_file_untouched(twins, tmp_path: Path) -> None:
    (tmp_path / "z.safetensors").write_bytes(b"older")
    with full_disk(), pytest.raises(UserError, match="could not save"):
        checkpoints.export_comfyui(twins.ours(), tmp_path / "z.safetensors")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"older"]


def test_saving_onto_a_file_is_refused(twins, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"taken.*is a file"):
        twins.ours().save_pretrained(tmp_path / "taken")
    with pytest.raises(UserError, match="could not save"):
        twins.ours().save_pretrained(tmp_path / "taken" / "below")


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comfyui_round_trip_is_exact(twins, tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    model = twins.ours().to(dtype)
    file = tmp_path / "z.safetensors"
    checkpoints.export_comfyui(model, file, prefix=prefix)
    stored = load_file(file)
    assert all(key.startswith(prefix) for key in stored)
    assert stored[f"{prefix}layers.0.attention.qkv.weight"].shape == (192, 64)
    for loaded in (S3DiT.from_pretrained(file), checkpoints.load_comfyui(S3DiT, file, config=model.config)):
        assert loaded.config == model.config
        assert_same_weights(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_diffusers_reads_our_comfyui_file(twins, tmp_path: Path, prefix: str) -> None:
    model = twins.ours()
    checkpoints.export_comfyui(model, tmp_path / "z.safetensors", prefix=prefix)
    converted = convert_z_image_transformer_checkpoint_to_diffusers(load_file(tmp_path / "z.safetensors"))
    assert_same_weights(converted, dict(model.state_dict()))


def comfyui_weights(model: S3DiT, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ComfyUI file as another program would write it: no metadata of ours."""
    checkpoints.export_comfyui(model, file)
    return load_file(file)


def test_sizes_are_inferred_from_a_foreign_file_of_the_published_head_size(twins, tmp_path: Path) -> None:
    model = twins.ours(**twins.WIDE)
    file = tmp_path / "z.safetensors"
    save_file(comfyui_weights(model, file), file)
    loaded = S3DiT.from_pretrained(file)
    assert loaded.config == model.config
    assert_same_weights(loaded.state_dict(), model.state_dict())


def test_sizes_that_cannot_be_inferred_ask_for_a_config(twins, tmp_path: Path) -> None:
    model = twins.ours()
    file = tmp_path / "z.safetensors"
    save_file(comfyui_weights(model, file), file)
    with pytest.raises(UserError, match=r"z.safetensors.*head size 16.*give a config"):
        S3DiT.from_pretrained(file)
    assert_same_weights(checkpoints.load_comfyui(S3DiT, file, model.config).state_dict(), model.state_dict())


def test_a_single_file_with_published_names_loads_unharmed(twins, folder: Path) -> None:
    model = S3DiT.from_pretrained(folder)
    assert_same_weights(S3DiT.from_pretrained(folder / WEIGHTS).state_dict(), model.state_dict())


def test_a_stray_final_norm_is_left_out_aloud(twins, tmp_path: Path) -> None:
    model, file = twins.ours(), tmp_path / "z.safetensors"
    stored = comfyui_weights(model, file)
    save_file({**stored, "model.diffusion_model.norm_final.weight": torch.ones(64)}, file)
    with pytest.warns(UserWarning, match=r"z.safetensors.*norm_final.weight.*left out"):
        loaded = checkpoints.load_comfyui(S3DiT, file, model.config)
    assert_same_weights(loaded.state_dict(), model.state_dict())


def test_other_parts_in_a_comfyui_file_are_named(twins, tmp_path: Path) -> None:
    model, file = twins.ours(), tmp_path / "z.safetensors"
    save_file({**comfyui_weights(model, file), "vae.decoder.weight": torch.ones(2)}, file)
    with pytest.raises(UserError, match=r"1 not part of the network: vae.decoder.weight"):
        checkpoints.load_comfyui(S3DiT, file, model.config)


def test_a_comfyui_file_with_split_and_fused_weights_is_refused(twins, tmp_path: Path) -> None:
    model, file = twins.ours(), tmp_path / "z.safetensors"
    extra = {"model.diffusion_model.layers.0.attention.to_k.weight": torch.zeros(64, 64)}
    save_file({**comfyui_weights(model, file), **extra}, file)
    with pytest.raises(UserError, match=r"both.*layers.0.attention.to_k.weight"):
        checkpoints.load_comfyui(S3DiT, file, model.config)


def test_comfyui_export_refuses_a_pad_multiple_that_comfyui_cannot_know(twins, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pad_multiple 8"):
        checkpoints.export_comfyui(twins.ours(pad_multiple=8), tmp_path / "z.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        checkpoints.export_comfyui(twins.ours(), tmp_path)


def test_quantised_weights_are_refused_unless_cast(twins, tmp_path: Path) -> None:
    model, file = twins.ours(), tmp_path / "z.safetensors"
    stored = comfyui_weights(model, file)
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in stored.items()}, file)
    with pytest.raises(UserError, match=r"F8_E4M3.*dtype"):
        checkpoints.load_comfyui(S3DiT, file, model.config)
    loaded = checkpoints.load_comfyui(S3DiT, file, model.config, dtype=torch.float32)
    expected = model.layers[0].feed_forward.w1.weight.to(torch.float8_e4m3fn).float()
    assert torch.equal(loaded.layers[0].feed_forward.w1.weight, expected)
    save_file({key: tensor.to(torch.int8) for key, tensor in stored.items()}, file)
    with pytest.raises(UserError, match="stored as I8"):
        checkpoints.load_comfyui(S3DiT, file, model.config, dtype=torch.float32)


# --- what is wrong is named ------------------------------------------------------------------------------------------


def change_tensors(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = {**load_file(folder / WEIGHTS), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cap_pad_token": None}, "backbone.*1 missing: cap_pad_token"),
        ({"layers.7.oddity": torch.ones(1)}, "1 not part of the network: layers.7.oddity"),
        (
            {"layers.0.ffn_norm1.weight": torch.ones(65)},
            r"1 of another shape: layers.0.ffn_norm1.weight \(65,\) instead of \(64,\)",
        ),
        (
            {"x_pad_token": torch.ones(64), "cap_pad_token": None, "a": torch.ones(1)},
            "1 missing: cap_pad_token; 1 not part of the network: a; 1 of another shape: x_pad_token",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: dict, message: str) -> None:
    change_tensors(folder, change)
    with pytest.raises(UserError, match=message):
        S3DiT.from_pretrained(folder)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layers": 3}))
    with pytest.raises(UserError, match=r"30 missing: layers.1.*and 26 more") as caught:
        S3DiT.from_pretrained(folder)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimension": 64}, "config.json: unknown key dimension"),
        ({"dim": "64"}, "config.json: dim cannot be '64'"),
        ({"n_heads": 0}, "config.json: n_heads cannot be 0"),
        ({"n_layers": True}, "n_layers"),
        ({"axes_dims": [4, 6.5, 6]}, "axes_dims"),
        ({"axes_dims": [4, 4, 4]}, "config.json: .*add up to the head size"),
        ({"_class_name": "FluxTransformer2DModel"}, "describes a FluxTransformer2DModel"),
        ({"siglip_feat_dim": 1152}, "config.json: .*siglip_feat_dim"),
    ],
)
def test_a_wrong_configuration_is_named(folder: Path, change: dict, message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        S3DiT.from_pretrained(folder)


def test_notes_of_other_writers_in_the_configuration_are_harmless(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "x", "_diffusers_version": "0.40"}))
    assert S3DiT.from_pretrained(folder).config == S3DiTConfig(**{k: v for k, v in config.items() if k[0] != "_"})


def test_absent_or_damaged_files_are_named(folder: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            S3DiT.from_pretrained(folder)
        assert "\n" not in str(caught.value)

    weights = (folder / WEIGHTS).read_bytes()
    for damaged in (weights[:-100], weights[:4], b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"):
        (folder / WEIGHTS).write_bytes(damaged)
        refused(f"{WEIGHTS} is not a readable safetensors file")
    (folder / WEIGHTS).unlink()
    refused(f"no weights in .*{WEIGHTS}")
    (folder / "config.json").write_text("{")
    refused("config.json is not JSON")
    (folder / "config.json").write_text("[]")
    refused("config.json must hold a JSON object")
    (folder / "config.json").unlink()
    refused("neither config.json nor transformer/config.json")
    folder.rmdir()
    refused("backbone: the folder does not exist")


def test_damaged_sets_of_shards_are_named(twins, tmp_path: Path) -> None:
    model, folder = twins.ours(), tmp_path / "sharded"
    checkpoints.save(model, folder, max_shard_size=200_000)
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].rename(tmp_path / "aside")
    with pytest.raises(UserError, match=rf"1 of {len(shards)} shards missing: {shards[1].name}"):
        S3DiT.from_pretrained(folder)
    save_file({**load_file(tmp_path / "aside"), **load_file(shards[0])}, shards[1])
    with pytest.raises(UserError, match=rf"stored both in .*{shards[0].name} and in {shards[1].name}"):
        S3DiT.from_pretrained(folder)
    (tmp_path / "aside").rename(shards[1])
    (folder / WEIGHTS).touch()
    with pytest.raises(UserError, match="two sets of weights"):
        S3DiT.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index.json: not an index"):
        S3DiT.from_pretrained(folder)
