"""The flow-matching stage against a twin written out by hand, and its settings."""

import json
import math
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from data_modules.tinyworld.world import draw
from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.callbacks.ema import EMA
from zimage_lit.callbacks.guards import StepGuard
from zimage_lit.components import PatchPCACodec, Qwen3TextEncoder, build_tiny_qwen3
from zimage_lit.errors import UserError
from zimage_lit.objectives import TimestepLaw
from zimage_lit.rng import generator
from zimage_lit.sampling import sigmas
from zimage_lit.stages import FlowMatchingModule
from zimage_lit.stages.frozen_parts import encode_images
from zimage_lit.stages.initial_weights import backbone_config, build_backbone
from zimage_lit.stages.optimizers import (
    GroupSettings,
    OptimizerSettings,
    build_optimizer,
    is_block_matrix,
    learning_rate_factor,
)

CONFIG = S3DiTConfig(
    dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=64,
    axes_dims=[8, 12, 12], axes_lens=[1536, 64, 64], pad_multiple=8,
)  # fmt: skip
SAMPLES = [draw(index) for index in range(8)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    captions = [text for sample in SAMPLES for kinds in sample.captions.values() for text in kinds.values()]
    build_tiny_qwen3(folder / "text_encoder", captions, hidden_size=64)
    images = torch.stack([torch.from_numpy(draw(i).image).permute(2, 0, 1) for i in range(200)])
    PatchPCACodec.fit(images.float() / 127.5 - 1, folder / "codec")
    return folder


def stage(parts: Path, **settings) -> FlowMatchingModule:
    module = FlowMatchingModule(
        Qwen3TextEncoder(parts / "text_encoder"),
        PatchPCACodec(parts / "codec"),
        backbone={"preset": "tiny", **vars(CONFIG)},
        **settings,
    )
    module.configure_model()
    return module


@pytest.fixture
def batch():
    return {
        "images": [torch.from_numpy(sample.image).permute(2, 0, 1).contiguous() for sample in SAMPLES],
        "captions": [sample.captions["en"]["short"] for sample in SAMPLES],
    }


def test_loss_equals_the_formula_written_out_sample_by_sample(parts, batch):
    module = stage(parts, caption_dropout=0.5, timesteps=TimestepLaw(mean=0.3, std=0.8), seed=5)
    with torch.no_grad():
        for parameter in module.backbone.parameters():  # fresh gates are zero: let every part speak
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    losses = module.losses(batch, "train", step=7)

    dropped = torch.rand(8, generator=generator(5, "train/caption_dropout", 7)) < 0.5
    assert 0 < dropped.sum() < 8
    t = torch.sigmoid(-(0.3 + 0.8 * torch.randn(8, generator=generator(5, "train/timesteps", 7))))
    noise_source = generator(5, "train/noise", 7)
    for i in range(8):
        clean = module.codec.encode(batch["images"][i][None].float() / 127.5 - 1)[0]
        noise = torch.randn(clean.shape, generator=noise_source)
        caption = module.text_encoder.encode(["" if dropped[i] else batch["captions"][i]])
        noisy = t[i] * clean + (1 - t[i]) * noise
        (velocity,) = module.backbone([noisy], t[i : i + 1], caption)
        torch.testing.assert_close(losses[i], (velocity - (clean - noise)).square().mean(), rtol=1e-5, atol=1e-6)


def test_randomness_depends_on_seed_and_step_alone(parts, batch):
    module = stage(parts, seed=1)
    first = module.losses(batch, "train", 3)
    torch.manual_seed(123)
    assert torch.equal(first, module.losses(batch, "train", 3))
    assert not torch.equal(first, module.losses(batch, "train", 4))
    assert not torch.equal(first, stage(parts, seed=2).losses(batch, "train", 3))
    assert torch.equal(module.losses(batch, "val", 0), module.losses(batch, "val", 0))


def test_a_distilled_student_is_tuned_at_the_times_of_its_steps_alone(parts, batch):
    module, seen = stage(parts, timesteps=TimestepLaw("grid", num_inference_steps=4, shift=3.0)), set()
    module.backbone.register_forward_pre_hook(lambda _, arguments: seen.update(arguments[1].tolist()))
    for step in range(6):
        module.losses(batch, "train", step)
    assert sorted(seen) == pytest.approx([float(1 - sigma) for sigma in sigmas(4, 3.0)[:-1]])


def test_pictures_of_different_sizes_train_in_one_step(parts, batch):
    batch["images"][2] = batch["images"][2].repeat(1, 2, 1)
    batch["images"][5] = batch["images"][5][:, :32, :48].contiguous()
    module = stage(parts)
    latents = encode_images(module.codec, batch["images"], module.device)
    assert [tuple(x.shape) for x in latents][2:6] == [(16, 16, 8), (16, 8, 8), (16, 8, 8), (16, 4, 6)]
    assert torch.equal(latents[3], module.codec.encode(batch["images"][3][None].float() / 127.5 - 1)[0])
    assert module.losses(batch, "train", 0).shape == (8,)


def fit(module, batch, steps: int, folder: Path, resume: Path | None = None, **settings) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **settings,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([batch] * steps, batch_size=None), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_golden_losses(parts, batch, precision, tmp_path):
    """Catches silent drift of network, objective, law, dropout or optimiser; regenerate by printing `losses`."""
    losses = []
    module = stage(parts, optimizer=OptimizerSettings(lr=3e-3, decay="linear"), seed=0)
    original = module.training_step
    module.training_step = lambda *a: losses.append(original(*a)) or losses[-1]
    fit(module, batch, 40, tmp_path, precision=precision, gradient_clip_val=1.0)
    seen = [sum(losses[i : i + 10]).item() / 10 for i in range(0, 40, 10)]
    assert seen == pytest.approx(GOLDEN, rel=1e-3 if precision == "32-true" else 3e-2)
    assert seen[-1] < 0.8 * seen[0]


GOLDEN = [1.6504038, 1.2872533, 1.1914799, 1.1168041]


def test_bfloat16_weights_see_the_noise_and_times_of_float32_ones(parts, batch, tmp_path, monkeypatch):
    """Under bf16-true every tensor that is made without a type is bfloat16, in which t has 256 values."""
    seen = {"32-true": [], "bf16-true": []}
    for precision, inputs in seen.items():
        module = FlowMatchingModule(
            Qwen3TextEncoder(parts / "text_encoder"),
            PatchPCACodec(parts / "codec"),
            backbone={"preset": "tiny", **vars(CONFIG)},
        )
        forward = S3DiT.forward
        monkeypatch.setattr(
            S3DiT, "forward", lambda self, x, t, c, f=forward, i=inputs: i.append((x, t)) or f(self, x, t, c)
        )
        fit(module, batch, 2, tmp_path, precision=precision)
        monkeypatch.setattr(S3DiT, "forward", forward)
        assert module.backbone.x_pad_token.dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
    for (latents, t), (half_latents, half_t) in zip(seen["32-true"], seen["bf16-true"], strict=True):
        assert torch.equal(t, half_t)
        torch.testing.assert_close(half_latents, latents, rtol=0, atol=0.02)


class Clipped(lightning.Callback):
    """The norm of the gradients that the optimiser is about to use."""

    def on_gradient_norm(self, trainer, module, optimizer, norm):
        self.total = torch.stack([p.grad.norm() for p in module.backbone.parameters() if p.grad is not None]).norm()


def test_gradients_are_clipped_and_the_norm_is_logged(parts, batch, tmp_path):
    module, clipped = stage(parts), Clipped()
    trainer = fit(module, batch, 1, tmp_path, gradient_clip_val=1e-3, callbacks=[clipped])
    assert trainer.callback_metrics["train/gradient_norm"] > 1e-2
    assert clipped.total == pytest.approx(1e-3, rel=1e-3)
    assert all(parameter.grad is None for parameter in module.parameters())  # not held beside the next activations


def test_float16_is_refused(parts, batch, tmp_path):
    with pytest.raises(UserError, match="16-mixed overflows"):
        fit(stage(parts), batch, 1, tmp_path, plugins=[MixedPrecision("16-mixed", "cpu")])


def test_a_largest_norm_of_zero_clips_nothing(parts, batch, tmp_path):
    """As everywhere in Lightning; taken at its word it would turn every gradient to zero."""
    module, twin = stage(parts), stage(parts)
    fit(module, batch, 1, tmp_path, gradient_clip_val=0)
    fit(twin, batch, 1, tmp_path, gradient_clip_val=None)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_that_goes_on_has_the_rates_of_its_settings(parts, batch, tmp_path, name):
    """A guard's advice after steps that broke is a lower learning rate: the checkpoint's must not come back."""
    schedule = {"name": name, "decay": "linear", "warmup_steps": 1}
    first = fit(stage(parts, optimizer=OptimizerSettings(lr=1e-3, muon_lr=1e-2, **schedule)), batch, 4, tmp_path)
    first.save_checkpoint(tmp_path / "last.ckpt")
    lower = OptimizerSettings(lr=1e-4, muon_lr=1e-3, weight_decay=0.1, betas=(0.8, 0.9), **schedule)
    trainer = fit(stage(parts, optimizer=lower), batch, 6, tmp_path, resume=tmp_path / "last.ckpt")
    groups = trainer.optimizers[0].param_groups
    assert trainer.global_step == 6 and all(group["lr"] == 0 for group in groups)
    assert [group["initial_lr"] for group in groups] == ([1e-3] if name == "muon" else []) + [1e-4, 1e-4]
    assert [group["weight_decay"] for group in groups] == ([0.1] if name == "muon" else []) + [0.1, 0.0]
    assert groups[-1]["betas"] == (0.8, 0.9)


def test_a_checkpoint_of_other_groups_is_named(parts, batch, tmp_path):
    fit(stage(parts), batch, 1, tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    grouped = OptimizerSettings(groups=[GroupSettings("*_embedder.*", lr_scale=0.5)])
    with pytest.raises(UserError, match=r"other optimizer\.groups, of .* set them back"):
        fit(stage(parts, optimizer=grouped), batch, 2, tmp_path, resume=tmp_path / "last.ckpt")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_sample_that_is_not_finite_costs_its_step_alone(parts, batch, tmp_path, name):
    """Against a loop written out by hand that leaves that step out; EMA and optimiser included."""
    latents = encode_images(stage(parts).codec, batch["images"], torch.device("cpu"))
    good = {"image_latents": latents, "captions": batch["captions"], "ids": list("abcdefgh")}
    bad = {**good, "image_latents": [x * math.nan if i == 3 else x for i, x in enumerate(good["image_latents"])]}
    settings = OptimizerSettings(name=name, lr=1e-3, weight_decay=0.1)
    module, guard, ema = stage(parts, optimizer=settings), StepGuard(), EMA(decay=0.5, warmup=False)
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, gradient_clip_val=0.5, callbacks=[guard, ema],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([good, good, bad, good], batch_size=None))
    assert guard.skipped == 1
    (record,) = map(json.loads, (tmp_path / "guard.jsonl").read_text().splitlines())
    assert record["step"] == 3 and record["ids"] == list("abcdefgh")

    twin = stage(parts, optimizer=settings)
    optimizer, average = build_optimizer(twin.backbone, settings), twin.backbone.state_dict()
    average = {key: weight.clone() for key, weight in average.items()}
    for step in (0, 1, 3):
        optimizer.zero_grad()
        twin.losses(good, "train", step).mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.backbone.parameters(), 0.5)
        optimizer.step()
        average = {key: weight.lerp(twin.backbone.state_dict()[key], 0.5) for key, weight in average.items()}
    for key, weight in module.backbone.state_dict().items():
        assert torch.equal(weight, twin.backbone.state_dict()[key])
        torch.testing.assert_close(ema.average[key], average[key])


def test_adamw_decays_matrices_only(parts):
    module = stage(parts)
    matrices, others = build_optimizer(module.backbone, OptimizerSettings(weight_decay=0.1)).param_groups
    assert matrices["weight_decay"] == 0.1 and others["weight_decay"] == 0
    names = {id(p): name for name, p in module.backbone.named_parameters()}
    undecayed = {names[id(p)] for p in others["params"]}
    assert {"x_pad_token", "cap_pad_token", "layers.0.attention_norm1.weight", "t_embedder.mlp.0.bias"} <= undecayed
    assert "layers.0.attention.to_q.weight" not in undecayed
    assert len(matrices["params"]) + len(others["params"]) == len(names)


def test_muon_with_adamw_steps_like_the_two_apart_and_survives_a_checkpoint(parts):
    """Against torch's own two optimisers on a copy, over a save and load in the middle."""
    settings = OptimizerSettings(name="muon", lr=1e-2, muon_lr=2e-2, weight_decay=0.01)
    ours, twin = stage(parts).backbone, stage(parts).backbone
    optimizer = build_optimizer(ours, settings)
    split = {True: [], False: []}
    for name, parameter in twin.named_parameters():
        split[is_block_matrix(name, parameter)].append(parameter)
    assert len(split[True]) == 4 * 7  # blocks, matrices each
    matrices = [p for p in split[False] if p.ndim > 1 and len(p) > 1]
    vectors = [p for p in split[False] if not (p.ndim > 1 and len(p) > 1)]
    pair = [
        torch.optim.Muon(split[True], lr=2e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95),
                          eps=1e-8, weight_decay=0.01, fused=True),
    ]  # fmt: skip
    source = torch.Generator().manual_seed(0)
    for step in range(4):
        for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=source)
            b.grad = a.grad.clone()
        optimizer.step()
        for one in pair:
            one.step()
        if step == 1:
            state = optimizer.state_dict()
            optimizer = build_optimizer(ours, settings)
            optimizer.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), twin.parameters(), strict=True))


def test_a_schedule_reaches_both_optimisers(parts):
    optimizer = build_optimizer(stage(parts).backbone, OptimizerSettings(name="muon", lr=1.0, muon_lr=2.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    assert [[group["lr"] for group in one.param_groups] for one in optimizer.pair] == [[1.0], [0.5, 0.5]]


def test_learning_rate_shapes():
    linear = OptimizerSettings(warmup_steps=4, decay="linear")
    assert [learning_rate_factor(s, 12, linear) for s in (0, 3, 4, 8, 12)] == pytest.approx([0.2, 0.8, 1, 0.5, 0])
    cosine = OptimizerSettings(decay="cosine")
    assert [learning_rate_factor(s, 10, cosine) for s in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    assert learning_rate_factor(99, 10, OptimizerSettings()) == 1


def test_fresh_weights_depend_on_the_seed_and_leave_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first, again, other = (build_backbone(CONFIG, None, seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.layers[0].attention.to_q.weight, other.layers[0].attention.to_q.weight)


def test_init_from_a_folder_and_from_a_checkpoint(parts, batch, tmp_path):
    module = stage(parts)
    module.backbone.save_pretrained(tmp_path / "exported")
    loaded = build_backbone(CONFIG, str(tmp_path / "exported"), seed=9)
    assert all(torch.equal(a, b) for a, b in zip(module.backbone.parameters(), loaded.parameters(), strict=True))

    ema = EMA(decay=0.5)
    trainer = fit(module, batch, 3, tmp_path, callbacks=[ema])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = build_backbone(CONFIG, str(tmp_path / "run.ckpt"), seed=9)
    assert all(torch.equal(ema.average[name], weight) for name, weight in loaded.state_dict().items())


@pytest.mark.parametrize("file", ["exported", "run.ckpt"])
def test_weights_stored_in_half_train_in_the_precision_of_the_trainer(parts, tmp_path, file):
    """Small steps would vanish in bfloat16."""
    backbone = stage(parts).backbone.bfloat16()
    backbone.save_pretrained(tmp_path / "exported")
    weights = {f"backbone.{name}": weight for name, weight in backbone.state_dict().items()}
    torch.save({"state_dict": weights, "pytorch-lightning_version": "2"}, tmp_path / "run.ckpt")
    loaded = build_backbone(CONFIG, str(tmp_path / file), seed=0)
    for half, full in zip(backbone.parameters(), loaded.parameters(), strict=True):
        assert full.dtype == torch.float32 and torch.equal(full, half.float())


def test_the_sizes_of_a_backbone_are_those_of_the_folder_that_is_named(parts, tmp_path):
    stage(parts).backbone.save_pretrained(tmp_path / "pipeline/transformer")
    assert backbone_config(str(tmp_path / "pipeline")) == CONFIG
    with pytest.raises(UserError, match="no backbone in"):
        backbone_config(str(tmp_path))


def test_a_folder_that_is_called_like_a_preset_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # as `experiments/tiny` is, for who works in there
    assert backbone_config("tiny") == S3DiTConfig.preset("tiny")


def test_data_that_it_would_learn_wrongly_from_are_refused(parts, batch):
    module = stage(parts)
    for other in ({**batch, "sources": batch["images"]}, {"winners": batch["images"], "captions": batch["captions"]}):
        with pytest.raises(UserError, match="learns from pictures and captions, and the data give"):
            module.losses(other, "train", 0)


def test_init_from_says_what_is_wrong(tmp_path, parts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint file"):
        build_backbone(CONFIG, str(tmp_path / "absent.ckpt"), 0)
    (tmp_path / "torn.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"torn\.ckpt cannot be read"):
        build_backbone(CONFIG, str(tmp_path / "torn.ckpt"), 0)
    with pytest.raises(UserError, match="does not know this run"):
        build_backbone(CONFIG, "run:0123456789abcdef0123456789abcdef", 0)
    stage(parts).backbone.save_pretrained(tmp_path / "other")
    wider = S3DiTConfig(**{**vars(CONFIG), "n_layers": 3})
    with pytest.raises(UserError, match="n_layers"):
        build_backbone(wider, str(tmp_path / "other"), 0)
    for name, foreign in (("list.ckpt", [1]), ("foreign.ckpt", {"weights": torch.ones(1)})):
        torch.save(foreign, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is not a checkpoint of a training run"):
            build_backbone(CONFIG, str(tmp_path / name), 0)
    weights = {f"backbone.{n}": w for n, w in stage(parts).backbone.state_dict().items()}
    torch.save({"state_dict": weights, "pytorch-lightning_version": "2"}, tmp_path / "s.ckpt")
    with pytest.raises(UserError, match=r"layers\.2\."):
        build_backbone(wider, str(tmp_path / "s.ckpt"), 0)
    assert isinstance(build_backbone(CONFIG, str(tmp_path / "s.ckpt"), 0), S3DiT)


def test_a_caption_dropout_outside_its_range_is_refused(parts):
    with pytest.raises(UserError, match="caption_dropout"):
        stage(parts, caption_dropout=1.5)
