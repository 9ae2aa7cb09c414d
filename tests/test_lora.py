"""LoRA: adapters in a backbone, in files of two dialects, in diffusers' own loader, and in a training run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from diffusers import ZImagePipeline as DiffusersPipeline
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_lit.backbone import S3DiT, S3DiTConfig, checkpoints
from zimage_lit.backbone.parallelize import ParallelizeSettings
from zimage_lit.callbacks.ema import EMA, averaged_weights
from zimage_lit.errors import UserError
from zimage_lit.lora import (
    Adapters,
    LoRASettings,
    MergedWeights,
    adapters_of,
    add_adapters,
    apply_lora,
    kept_weights,
    plain_weights,
    read_lora,
    reset_adapters,
    write_lora,
)
from zimage_lit.stages import FlowMatchingModule
from zimage_lit.stages.initial_weights import build_backbone
from zimage_lit.stages.optimizers import OptimizerSettings

SIZES: dict[str, Any] = {
    "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 48,
    "axes_dims": [4, 6, 6],
}  # fmt: skip
ALL = LoRASettings(rank=4, alpha=6, refiners=True)
CHOICES = {
    "all": ALL,
    "dora": LoRASettings(rank=4, alpha=6, dora=True),
    "some": LoRASettings(rank=3, targets=["to_q", "to_v", "w2"]),
    "modulation": LoRASettings(rank=2, targets=["adaLN_modulation.0", "to_k"], refiners=True),
}


def fill(model: torch.nn.Module, seed: int, size: float = 1.0) -> None:
    """Random weights that let every part of the network, and every adapter, matter."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=source)
                matrix = parameter.ndim > 1 and len(parameter) > 1
                parameter.copy_(size * noise * parameter.shape[-1] ** -0.5 if matrix else 0.5 + 0.3 * noise)


def base(**sizes: Any) -> S3DiT:
    model = S3DiT(S3DiTConfig(**{**SIZES, **sizes}))
    fill(model, seed=0)
    return model


def adapted(settings: LoRASettings, **sizes: Any) -> S3DiT:
    model = apply_lora(base(**sizes), settings)
    fill(model, seed=1, size=0.5)
    return model.eval()


def batch() -> tuple[list[Tensor], Tensor, list[Tensor]]:
    source = torch.Generator().manual_seed(2)
    latents = [torch.randn(16, *size, generator=source) for size in ((8, 8), (10, 6))]
    return latents, torch.rand(2, generator=source), [torch.randn(n, 48, generator=source) for n in (5, 40)]


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    latents, t, captions = batch()
    if isinstance(model, S3DiT):
        return torch.cat([v.flatten() for v in model(latents, t, captions)])
    frames = model([latent.unsqueeze(1) for latent in latents], t, captions, return_dict=False)[0]
    return torch.cat([frame.flatten() for frame in frames])


def difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def theirs(weights: dict[str, Tensor]) -> ZImageTransformer2DModel:
    network: Any = ZImageTransformer2DModel(**{"axes_lens": [1536, 512, 512], **SIZES})
    network.load_state_dict(weights, strict=True)
    return network.eval()


# --- in the backbone -------------------------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_alone_can_be_trained() -> None:
    plain, model = base(), apply_lora(base(), LoRASettings(rank=4))
    assert isinstance(model, S3DiT) and model.config == plain.config
    assert torch.equal(outputs(model), outputs(plain))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 2 * 7  # down and up of seven matrices in two main blocks
    assert all(name.startswith("layers.") and ".lora_" in name for name in trainable)
    assert set(kept_weights(model)) == trainable
    assert set(kept_weights(plain)) == set(plain.state_dict())


def test_the_effect_is_alpha_over_rank_times_up_down() -> None:
    model, plain = adapted(ALL), base()
    expected = dict(plain.state_dict())
    for name, weight in model.state_dict().items():
        if ".lora_A." in name:
            up = model.state_dict()[name.replace("lora_A", "lora_B")]
            expected[name.replace(".lora_A.default", "")] += 6 / 4 * (up.double() @ weight.double()).float()
    merged = plain_weights(model)
    assert merged.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-6, atol=1e-7)
    plain.load_state_dict(expected)
    assert difference(outputs(model), outputs(plain)) <= 1e-5
    assert difference(outputs(model), outputs(base())) > 1e-2


def test_dora_scales_every_row_to_its_magnitude() -> None:
    fresh = apply_lora(base(), CHOICES["dora"])
    assert difference(outputs(fresh), outputs(base())) <= 1e-6
    model = adapted(CHOICES["dora"])
    weight = plain_weights(model)["layers.1.feed_forward.w2.weight"]
    magnitude = adapters_of(model)["layers.1.feed_forward.w2"].magnitude
    assert magnitude is not None
    torch.testing.assert_close(weight.norm(dim=1), magnitude.abs())
    merged = base()
    merged.load_state_dict(dict(plain_weights(model)))
    assert difference(outputs(model), outputs(merged)) <= 1e-5


def test_adapters_are_float32_on_a_half_base_and_depend_on_the_seed_alone() -> None:
    bases = [base().bfloat16() for _ in range(3)]
    state = torch.random.get_rng_state()
    first, again, other = (apply_lora(model, ALL, seed) for model, seed in zip(bases, (3, 3, 4), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {w.dtype for w in kept_weights(first).values()} == {torch.float32}
    assert first.layers[0].attention.to_q.base_layer.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    one, two, three = (kept_weights(model) for model in (first, again, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    name = "layers.0.attention.to_q.lora_A.default.weight"
    assert not torch.equal(one[name], three[name])
    assert one[name].bfloat16().float().ne(one[name]).any()  # not rounded through the base's type
    with torch.autocast("cpu", torch.bfloat16):
        latents, t, captions = batch()
        sum(v.float().square().sum() for v in first(latents, t, captions)).backward()
    gradients = {n: p.grad for n, p in first.named_parameters() if p.grad is not None}
    assert set(gradients) == set(one)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_adapters_on_the_meta_device_get_their_values_later() -> None:
    with torch.device("meta"):
        model = apply_lora(S3DiT(S3DiTConfig(**SIZES)), CHOICES["dora"])
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    weights = {name.replace(".base_layer.", "."): name for name in model.state_dict()}
    model.load_state_dict({weights[name]: w for name, w in base().state_dict().items()}, strict=False)
    with torch.device("meta"):  # the trainer's default there is the GPU: values are drawn on the CPU all the same
        reset_adapters(model, CHOICES["dora"], seed=5)
    expected = apply_lora(base(), CHOICES["dora"], seed=5)
    assert all(torch.equal(w, expected.state_dict()[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1"),
        ({"alpha": 0}, "lora.alpha must be positive"),
        ({"dropout": 1.0}, r"lora.dropout must lie in \[0, 1\)"),
        ({"targets": []}, "lora.targets is empty"),
        ({"targets": ["to_qq"]}, "no layer of a block is called to_qq"),
        ({"targets": ["cap_embedder.1"]}, "no layer of a block is called cap_embedder.1"),
    ],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_lora(base(), LoRASettings(**settings))


# --- files -----------------------------------------------------------------------------------------------------------


def load_in_diffusers(file: Path) -> ZImageTransformer2DModel:
    """By diffusers' own loader, as `pipeline.load_lora_weights(file)` does it."""
    network = theirs(dict(base().state_dict()))
    state, metadata = DiffusersPipeline.lora_state_dict(str(file), return_lora_metadata=True)
    DiffusersPipeline.load_lora_into_transformer(state, network, adapter_name="a", metadata=metadata)
    return network


@pytest.mark.parametrize(
    ("choice", "dialect"), [*((c, "diffusers") for c in CHOICES), *((c, "comfyui") for c in CHOICES if c != "dora")]
)
def test_diffusers_draws_with_our_file_what_we_draw(choice: str, dialect: Any, tmp_path: Path) -> None:
    model = adapted(CHOICES[choice])
    write_lora(adapters_of(model), tmp_path / "lora.safetensors", dialect, torch.float32)
    network = load_in_diffusers(tmp_path / "lora.safetensors")
    expected, untouched = outputs(model), outputs(base())
    assert difference(outputs(network), expected) <= 1e-5
    effect, wanted = outputs(network) - untouched, expected - untouched
    assert difference(effect, wanted) <= 1e-4
    assert wanted.norm() > 1e-2 * untouched.norm()  # a load without effect would fail, not pass unseen


def comfyui_patched(file: Path, model_file: Path) -> dict[str, Tensor]:
    """What ComfyUI makes of a LoRA file: to its own matrix of that name, up @ down is added; all must be found."""
    weights, lora = load_file(model_file), load_file(file)
    for key in [key for key in lora if key.endswith(".lora.up.weight")]:
        up, down = lora.pop(key), lora.pop(key.replace("lora.up", "lora.down"))
        weights[f"model.{key.removesuffix('.lora.up.weight')}.weight"] += up @ down
    assert not lora
    return weights


@pytest.mark.parametrize("choice", ["all", "some", "modulation"])
def test_comfyui_finds_every_matrix_under_its_own_name(choice: str, tmp_path: Path) -> None:
    model = adapted(CHOICES[choice])
    checkpoints.export_comfyui(base(), tmp_path / "model.safetensors")
    write_lora(adapters_of(model), tmp_path / "lora.safetensors", "comfyui", torch.float32)
    patched = comfyui_patched(tmp_path / "lora.safetensors", tmp_path / "model.safetensors")
    save_file(patched, tmp_path / "patched.safetensors")
    merged = checkpoints.load_comfyui(S3DiT, tmp_path / "patched.safetensors", model.config)
    assert difference(outputs(merged), outputs(model)) <= 1e-5
    assert difference(outputs(merged), outputs(base())) > 1e-2


def assert_same(actual: Adapters, expected: Adapters) -> None:
    assert actual.keys() == expected.keys()
    for name, adapter in expected.items():
        torch.testing.assert_close(actual[name].down, adapter.down)
        torch.testing.assert_close(actual[name].up, adapter.up)
        if adapter.magnitude is not None:
            torch.testing.assert_close(actual[name].magnitude, adapter.magnitude)


@pytest.mark.parametrize(
    ("choice", "dialect"), [("all", "diffusers"), ("dora", "diffusers"), ("all", "comfyui"), ("some", "comfyui")]
)
def test_a_file_comes_back_into_a_backbone(choice: str, dialect: Any, tmp_path: Path) -> None:
    model = adapted(CHOICES[choice])
    write_lora(adapters_of(model), tmp_path / "lora.safetensors", dialect, torch.float32)
    adapters = read_lora(tmp_path / "lora.safetensors", model.config)
    present = {name: adapter for name, adapter in adapters.items() if adapter.up.any()}
    assert_same(present, adapters_of(model))
    again = base()
    add_adapters(again, adapters, "first")
    assert not any(parameter.requires_grad for name, parameter in again.named_parameters() if ".lora_" in name)
    assert difference(outputs(again), outputs(model)) <= 1e-5


def test_adapters_add_up_and_follow_their_scale(tmp_path: Path) -> None:
    one, two = adapters_of(adapted(ALL)), adapters_of(adapted(CHOICES["some"]))
    model = base()
    add_adapters(model, one, "one", scale=0.5)
    add_adapters(model, two, "two", scale=-2.0)
    merged = base()
    merged.load_state_dict(dict(MergedWeights(MergedWeights(base().state_dict(), one, 0.5), two, -2.0)))
    assert difference(outputs(model), outputs(merged)) <= 1e-5
    again = base()
    again.load_state_dict(dict(plain_weights(model)))
    assert difference(outputs(again), outputs(merged)) <= 1e-5


def test_names_and_alphas_of_other_trainers_are_read(tmp_path: Path) -> None:
    model = adapted(ALL)
    wanted, foreign = adapters_of(model), {}
    for number, (name, adapter) in enumerate(wanted.items()):
        stem = f"lora_unet_{name.replace('.', '_')}" if number % 2 else f"diffusion_model.{name}"
        foreign |= {f"{stem}.lora_down.weight": adapter.down, f"{stem}.lora_up.weight": adapter.up / 3}
        foreign[f"{stem}.alpha"] = torch.tensor(12.0)  # three times the rank
    save_file({key: tensor.contiguous() for key, tensor in foreign.items()}, tmp_path / "foreign.safetensors")
    assert_same(read_lora(tmp_path / "foreign.safetensors", model.config), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"transformer.layers.9.attention.to_q.lora_A.weight": torch.ones(4, 64)},
            r"1 tensors are no LoRA .*layers\.9",
        ),
        ({"text_encoder.x.lora_A.weight": torch.ones(4, 64)}, r"no LoRA of this backbone: text_encoder\.x"),
        ({"transformer.layers.0.attention.to_q.dora_scale": torch.ones(64)}, r"to_q\.dora_scale"),
        ({"transformer.layers.0.attention.to_q.lora_A.weight": None}, r"layers\.0\.attention\.to_q lacks its down"),
        ({"transformer.layers.0.attention.to_q.lora_A.weight": torch.ones(4, 65)}, r"another backbone"),
        ({"transformer.layers.0.attention.to_q.lora_B.weight": torch.ones(64, 5)}, r"another backbone"),
        ({"transformer.layers.0.attention.to_q.lora_magnitude_vector": torch.ones(64)}, r"only some of the adapters"),
        (
            {
                "diffusion_model.layers.0.attention.out.lora_A.weight": torch.ones(4, 64),
                "diffusion_model.layers.0.attention.out.lora_B.weight": torch.ones(64, 4),
            },
            r"to_out\.0 is adapted twice",
        ),
    ],
)
def test_what_does_not_belong_into_a_lora_is_named(change: dict, message: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    model = adapted(ALL)
    write_lora(adapters_of(model), file, "diffusers", torch.float32)
    tensors = {**load_file(file), **change}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(UserError, match=message) as caught:
        read_lora(file, model.config)
    assert "lora.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_are_refused(tmp_path: Path) -> None:
    adapters = adapters_of(adapted(CHOICES["dora"]))
    with pytest.raises(UserError, match=r"ComfyUI scales the rows of a DoRA by another rule.*form=comfyui"):
        write_lora(adapters, tmp_path / "lora.safetensors", "comfyui")
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        write_lora(adapters, tmp_path / "lora")
    with pytest.raises(UserError, match="there is no file"):
        read_lora(tmp_path / "lora.safetensors", S3DiTConfig(**SIZES))
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="holds no LoRA"):
        read_lora(tmp_path / "empty.safetensors", S3DiTConfig(**SIZES))
    assert [file.name for file in tmp_path.iterdir()] == ["empty.safetensors"]


# --- in training -----------------------------------------------------------------------------------------------------


def stage(lora: LoRASettings | None, init_from: str | None = None, dim: int = 64) -> FlowMatchingModule:
    """Learns from latents and features that are there already, so that it needs neither codec nor text encoder."""
    part: Any = SimpleNamespace(to=lambda device: None)
    return FlowMatchingModule(
        part,
        part,
        backbone={"preset": "tiny", **SIZES, "dim": dim, "axes_lens": [1536, 64, 64]},
        optimizer=OptimizerSettings(lr=1e-2),
        caption_dropout=0.0,
        init_from=init_from,
        lora=lora,
    )


def fit(module: FlowMatchingModule, steps: int = 3, resume: Path | None = None, **settings: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip
    latents, _, captions = batch()
    data = [{"image_latents": latents, "caption_features": captions, "captions": ["a", "b"]}] * steps
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=resume)
    return trainer


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "backbone"
    base(axes_lens=[1536, 64, 64], pad_multiple=4, rope_theta=2.0).save_pretrained(folder)
    return folder


def test_a_run_trains_averages_and_keeps_the_adapters_alone(start: Path, tmp_path: Path) -> None:
    module, ema = stage(LoRASettings(rank=2, base_dtype="bfloat16"), str(start)), EMA(decay=0.5)
    trainer = fit(module, precision="bf16-mixed", callbacks=[ema])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    adapters = {f"backbone.{name}" for name in kept_weights(module.backbone)}
    assert saved["state_dict"].keys() == adapters and len(adapters) == 28
    assert {f"backbone.{name}" for name in saved["callbacks"]["EMA"]["average"]} == adapters
    assert all(".lora_" in name for name in adapters)
    assert all(w.dtype == torch.float32 and w.any() for w in saved["state_dict"].values())
    frozen = {name: p for name, p in module.backbone.named_parameters() if not p.requires_grad}
    original = S3DiT.from_pretrained(start).state_dict()
    assert len(frozen) == len(original)
    for name, parameter in frozen.items():
        assert torch.equal(parameter, original[name.replace(".base_layer.", ".")].bfloat16())
    trained = {name: weight.clone() for name, weight in kept_weights(module.backbone).items()}
    with averaged_weights(trainer, module):
        assert all(torch.equal(ema.average[n], w) for n, w in kept_weights(module.backbone).items())
    for name, weight in kept_weights(module.backbone).items():
        assert torch.equal(weight, trained[name]) and not torch.equal(weight, ema.average[name])


def test_a_checkpoint_that_does_not_belong_to_the_run_is_named(start: Path, tmp_path: Path) -> None:
    settings = LoRASettings(rank=2)
    fit(stage(settings, str(start))).save_checkpoint(tmp_path / "lora.ckpt")
    fit(stage(None, str(start))).save_checkpoint(tmp_path / "full.ckpt")
    other = tmp_path / "other"
    fill(model := S3DiT.from_pretrained(start), seed=9)
    model.save_pretrained(other)

    def refused(module: FlowMatchingModule, checkpoint: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            fit(module, steps=5, resume=tmp_path / checkpoint)

    refused(stage(settings, str(other)), "lora.ckpt", "adapters of other frozen weights than .*other:")
    refused(stage(None, str(start)), "lora.ckpt", r"was trained with model\.init_args\.lora")
    refused(stage(settings, str(start)), "full.ckpt", r"was trained without model\.init_args\.lora")
    refused(stage(LoRASettings(rank=3), str(start)), "lora.ckpt", r"28 tensors do not fit.*model\.init_args\.lora as")
    with pytest.raises(UserError, match=r"holds a LoRA without its base.*lightning run export"):
        build_backbone(model.config, str(tmp_path / "lora.ckpt"), 0)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_nothing_with_dropout_neither(start: Path, mode: Any) -> None:
    """What is computed again in the backward pass hides the same inputs."""
    trained = []
    for settings in (ParallelizeSettings(), ParallelizeSettings(mode)):
        module = stage(LoRASettings(rank=2, dropout=0.3), str(start))
        module.parallelize = settings
        fit(module)
        trained.append(kept_weights(module.backbone))
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())


def test_adapters_in_half_are_refused(start: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.precision to bf16-mixed or 32-true"):
        fit(stage(LoRASettings(rank=2), str(start)), precision="bf16-true")
