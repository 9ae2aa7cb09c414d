"""Earlier weights of a stage: what they are, what moves them, and what a checkpoint knows of them."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from distillation import SIZES, Codec, Data, Encoder, batch_of, same, write_teacher
from ranks import SAMPLES

from zimage_lit.backbone import S3DiT
from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.errors import UserError
from zimage_lit.lora import TRAINED, LoRASettings, adapter_of, adapters_of, base_weights, plain_weights
from zimage_lit.objectives import flow_matching
from zimage_lit.rng import generator
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.stages.initial_weights import read_checkpoint
from zimage_lit.stages.optimizers import OptimizerSettings
from zimage_lit.stages.stage import BackboneStage

BOTH = {"reference": "fixed", "old_policy": "follows"}
LORA = LoRASettings(rank=4)


class Stage(BackboneStage):
    """Flow matching towards numbered latents; its old policy follows by a half at each step."""

    def __init__(self, init_from: Path, lora: LoRASettings | None = None, kinds: Any = None, **more: Any) -> None:
        optimizer = OptimizerSettings(lr=3e-3)
        kinds = BOTH if kinds is None else kinds
        super().__init__(
            Encoder(), Codec(), dict(SIZES), optimizer, 1, str(init_from), lora, None, kinds, **more  # type: ignore[arg-type]
        )  # fmt: skip
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        draw, data = generator(1, "noise", self.global_step), batch["image_latents"]
        noise, t = [torch.randn(x.shape, generator=draw) for x in data], torch.rand(len(data), generator=draw)
        predicted = self.backbone(flow_matching.interpolate(noise, data, t), t, batch["caption_features"])
        loss = flow_matching.loss(predicted, flow_matching.target_velocity(noise, data)).mean()
        if "old_policy" in self.snapshots:
            with self.snapshots["old_policy"].acting() as network:  # so that its weights have a say
                old = network(noise, t, batch["caption_features"])
            loss = loss + 0.1 * flow_matching.loss(predicted, old).mean()
        self.losses.append(float(loss))
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if "old_policy" in self.snapshots:
            self.snapshots["old_policy"].follow(0.5)


def fit(module: Stage, folder: Path, steps: int, resume: Path | None = None, **settings: Any) -> Stage:
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, max_epochs=-1,
        enable_model_summary=False, default_root_dir=folder, callbacks=[RunCheckpoint(every_n_steps=100)], **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(), ckpt_path=resume, weights_only=True)
    return module


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("start") / "transformer")


def velocities(network: S3DiT) -> list[torch.Tensor]:
    batch = batch_of(range(SAMPLES))
    return network(batch["image_latents"], torch.linspace(0.1, 0.9, SAMPLES), batch["caption_features"])


def check_equal(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lora", [None, LORA, LoRASettings(rank=4, dora=True)], ids=["whole", "lora", "dora"])
def test_the_reference_stays_and_the_old_policy_follows_the_weights_in_training(start, tmp_path, lora):
    module = fit(Stage(start, lora), tmp_path, 3)
    begun = S3DiT.from_pretrained(start)
    with module.snapshots["reference"].acting() as network:
        seen = velocities(network)
    with torch.no_grad():
        trained = velocities(module.backbone)
        check_equal(seen, velocities(begun), 1e-5)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(trained, seen, strict=True))
    with module.snapshots["old_policy"].acting() as network:
        lagging = velocities(network)
    for old, new, first in zip(lagging, trained, seen, strict=True):
        assert (old - new).abs().max() > 1e-3 and (old - first).abs().max() > 1e-3
    module.snapshots["old_policy"].follow(0.0)
    with module.snapshots["old_policy"].acting() as network:
        check_equal(velocities(network), trained)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_following_is_a_blend_of_what_is_trained(start, tmp_path, lora):
    module = fit(Stage(start, lora), tmp_path, 1)
    snapshot = module.snapshots["old_policy"]
    before = {name: weight.clone() for name, weight in snapshot.kept().items()}
    own = {name: w for name, w in module.state_dict().items() if name.startswith("backbone.")}
    snapshot.follow(0.75)
    for (name, after), trained in zip(snapshot.kept().items(), own.values(), strict=True):
        torch.testing.assert_close(after, 0.75 * before[name] + 0.25 * trained)
    assert any(not torch.equal(after, before[name]) for name, after in snapshot.kept().items())
    with pytest.raises(ValueError, match="does not follow"):
        module.snapshots["reference"].follow(0.5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_nothing_of_a_snapshot_is_trained_or_left_behind_in_the_network(start, tmp_path, lora):
    module = fit(Stage(start, lora), tmp_path, 1)
    stepped = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert stepped == {id(p) for p in module.parameters() if p.requires_grad}
    assert stepped == {id(p) for n, p in module.backbone.named_parameters() if not lora or adapter_of(n) == TRAINED}
    before = [v.detach() for v in velocities(module.backbone)]
    for snapshot in module.snapshots.values():
        with snapshot.acting() as network:
            assert not any(v.requires_grad for v in velocities(network))
    after = velocities(module.backbone)
    check_equal([v.detach() for v in after], before)
    assert all(v.requires_grad for v in after)


def test_with_lora_there_is_one_network(start, tmp_path):
    module = fit(Stage(start, LORA), tmp_path, 1)
    base = sum(weight.numel() for weight in base_weights(module.backbone).values())
    adapters = [adapters_of(module.backbone, name) for name in ("default", "old_policy")]
    extra = sum(a.down.numel() + a.up.numel() for of_one in adapters for a in of_one.values())
    assert sum(parameter.numel() for parameter in module.parameters()) == base + extra
    whole = plain_weights(module.backbone)  # what is exported knows the trained adapters alone
    name, adapter = next(iter(adapters[0].items()))
    assert torch.equal(whole[f"{name}.weight"], adapter.merged(base_weights(module.backbone)[f"{name}.weight"]))


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_a_checkpoint_has_what_has_moved_and_a_run_goes_on_bit_for_bit(start, tmp_path, lora):
    straight = fit(Stage(start, lora), tmp_path / "straight", 4)
    fit(Stage(start, lora), tmp_path / "torn", 2)
    last = last_checkpoint(tmp_path / "torn")
    stored = read_checkpoint(last)["state_dict"]
    parts = [name.partition(".")[0] for name in stored]
    assert set(parts) == {"backbone", "old_policy"}
    assert parts.count("backbone") == parts.count("old_policy") == (28 if lora else len(parts) // 2)
    resumed = fit(Stage(start, lora), tmp_path / "torn", 4, resume=last)
    assert resumed.losses == straight.losses[2:]
    assert same(resumed.state_dict(), straight.state_dict())


def test_a_run_goes_on_beside_its_own_snapshots_alone(start, tmp_path):
    fit(Stage(start), tmp_path / "run", 1)
    last = last_checkpoint(tmp_path / "run")
    with pytest.raises(UserError, match="kept reference and old policy, and this one keeps reference:"):
        fit(Stage(start, kinds={"reference": "fixed"}), tmp_path / "other", 2, resume=last)
    with pytest.raises(UserError, match="and this one keeps no earlier weights"):
        fit(Stage(start, kinds={}), tmp_path / "other", 2, resume=last)
    with pytest.raises(UserError, match="another reference than the weights of init_from"):
        fit(Stage(write_teacher(tmp_path / "transformer", seed=8)), tmp_path / "other", 2, resume=last)
    fit(Stage(start, LORA), tmp_path / "lora", 1)
    with pytest.raises(UserError, match="adapters of other frozen weights"):
        other = Stage(write_teacher(tmp_path / "transformer", seed=8), LORA)
        fit(other, tmp_path / "other", 2, resume=last_checkpoint(tmp_path / "lora"))


def test_a_frozen_copy_can_be_of_half_the_size(start, tmp_path):
    module = fit(Stage(start, frozen_dtype="bfloat16"), tmp_path, 1)
    types = {name: module.snapshots[name].network.x_pad_token.dtype for name in BOTH}
    assert types == {"reference": torch.bfloat16, "old_policy": torch.float32}
    for settings in ({"lora": LORA}, {"kinds": {"old_policy": "follows"}}):
        with pytest.raises(UserError, match="frozen_dtype=bfloat16 is of a frozen copy"):
            Stage(start, frozen_dtype="bfloat16", **settings)
