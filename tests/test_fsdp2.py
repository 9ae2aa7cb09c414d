"""FSDP2 on two processes of a CPU against one process that sees the same batches, and its traps, each with a test.

The trap of a loader that replays an epoch after it was resumed (the ninth of ten known ones) has its tests beside the
loader: tests/data_modules/test_streaming_resume.py and test_two_ranks.py.
"""

import re
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from ranks import SAMPLES, Ranks, Steps
from torch import Tensor
from torch.distributed.tensor import DTensor

from zimage_lit.backbone import S3DiTConfig
from zimage_lit.backbone.checkpoints import export_comfyui
from zimage_lit.backbone.parallelize import ParallelizeSettings, gathered
from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.callbacks.ema import EMA
from zimage_lit.errors import UserError
from zimage_lit.lora import LoRASettings
from zimage_lit.objectives import flow_matching
from zimage_lit.rng import generator
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.stages import FlowMatchingModule
from zimage_lit.stages.initial_weights import build_backbone, open_weights, read_checkpoint
from zimage_lit.stages.optimizers import OptimizerSettings, check_can_shard
from zimage_lit.strategies import FSDP2Strategy

SIZES = {
    "preset": "tiny", "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 12, "axes_dims": [4, 6, 6], "pad_multiple": 32,
}  # fmt: skip


class Frozen:
    """Stands for the text encoder and the codec: the batches hold latents and features already."""

    def to(self, device: torch.device) -> "Frozen":
        return self


def batch_of(ids: range) -> dict[str, Any]:
    sources = [torch.Generator().manual_seed(number) for number in ids]
    return {
        "ids": list(ids),
        "image_latents": [torch.randn(16, 4, 4 + 2 * (i % 2), generator=s) for i, s in zip(ids, sources, strict=True)],
        "caption_features": [torch.randn(3 + i % 3, 12, generator=s) for i, s in zip(ids, sources, strict=True)],
        "captions": ["" for _ in ids],
    }


class Stage(FlowMatchingModule):
    """Its noise and times depend on the sample, not on the rank."""

    def losses(self, batch: dict[str, Any], phase: str, step: int) -> Tensor:
        draws = [generator(self.seed, f"{phase}/{number}", step) for number in batch["ids"]]
        data = batch["image_latents"]
        t = torch.stack([torch.rand((), generator=draw) for draw in draws])
        noise = [torch.randn(x.shape, generator=draw) for x, draw in zip(data, draws, strict=True)]
        predicted = self.backbone(flow_matching.interpolate(noise, data, t), t, batch["caption_features"])
        return flow_matching.loss(predicted, flow_matching.target_velocity(noise, data))


class Data(lightning.LightningDataModule):
    def train_dataloader(self) -> Steps:
        return Steps(self.trainer.global_rank, self.trainer.world_size, batch_of)


@dataclass
class Seen:
    """What happened: losses, sample ids and norms of every batch, and the whole state at the start and at the end."""

    losses: list[float] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    network: dict[str, Any] = field(default_factory=dict)


class Watch(lightning.Callback):
    def __init__(self) -> None:
        self.all = Seen()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.all.states.append(whole_state(trainer, pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.all.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        self.all.ids.append(batch["ids"])
        self.all.norms.append(float(trainer.callback_metrics.get("train/gradient_norm", 0)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.all.states.append(whole_state(trainer, pl_module))
        self.all.network = {
            "mesh": tuple(pl_module.device_mesh.shape) if pl_module.device_mesh else None,
            "types": {parameter.dtype for parameter in pl_module.backbone.parameters()},
            "sharded": all(isinstance(parameter, DTensor) for parameter in pl_module.backbone.parameters()),
        }


def whole_state(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Weights, optimiser, average and counters, all of them whole."""
    names = {id(parameter): name for name, parameter in pl_module.backbone.named_parameters()}
    state: dict[str, Any] = {f"weights.{k}": v.clone() for k, v in gathered(pl_module.backbone, keep=True).items()}
    (optimizer,) = trainer.optimizers
    for parameter, of_one in optimizer.state.items():
        for key, value in of_one.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            state[f"{key}.{names[id(parameter)]}"] = whole.clone()
    (ema,) = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]
    for name, average in ema.average.items():
        state[f"average.{name}"] = (average.full_tensor() if isinstance(average, DTensor) else average).clone()
    (group, *_) = optimizer.param_groups
    return state | {"updates": ema.updates, "step": trainer.global_step, "lr": group["lr"]}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key]
        for key, value in first.items()
    )


def stage(**settings: Any) -> Stage:
    optimizer = OptimizerSettings(lr=1e-3, warmup_steps=5, decay="linear", weight_decay=0.1)
    return Stage(Frozen(), Frozen(), backbone=SIZES, optimizer=optimizer, seed=1, **settings)  # type: ignore[arg-type]


def fit(
    folder: Path,
    steps: int,
    resume: Path | None = None,
    strategy: Any = "auto",
    devices: int = 1,
    stage_settings: dict[str, Any] | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    saves: tuple[int, int | None] | None = (100, None),
    **settings: Any,
) -> Seen:
    """Train; the learning rate always ends at step 20. saves: steps between checkpoints, and between those kept."""
    watch, module = Watch(), stage(**(stage_settings or {}))
    saving = [RunCheckpoint(*saves)] if saves else []
    module.total_steps = lambda: 20  # type: ignore[method-assign]
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=devices, strategy=strategy, logger=False, max_epochs=-1,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
        enable_checkpointing=bool(saving),
        callbacks=[watch, EMA(decay=0.9), *callbacks, *saving], **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(), ckpt_path=resume, weights_only=True)
    return watch.all


def fit_sharded(folder: Path, steps: int, devices: int = 2, replicate: int = 1, **settings: Any) -> Seen:
    return fit(folder, steps, strategy=FSDP2Strategy(replicate), devices=devices, **settings)


def call(function: Any, args: tuple, settings: dict[str, Any]) -> Any:
    return function(*args, **settings)


def train(ranks: Ranks, folder: Path, steps: int, **settings: Any) -> list[Seen]:
    return ranks(call, fit_sharded, (folder, steps), {"devices": len(ranks.processes), **settings})


def means(watches: list[Seen]) -> list[float]:
    return [sum(losses) / len(losses) for losses in zip(*(watch.losses for watch in watches), strict=True)]


@pytest.fixture(scope="module")
def single():
    with Ranks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Seen:
    """One process, twenty steps, without the strategy."""
    return fit(folder / "whole", 20)


@pytest.fixture(scope="module")
def sharded(pair: Ranks, folder: Path) -> list[Seen]:
    """Two ranks, the same twenty steps; what was saved at the twelfth is kept."""
    return train(pair, folder / "sharded", 20, saves=(12, 12))


# ---------------------------------------------------------------------------------------------------- as one process


def assert_alike(watches: list[Seen], whole: Seen, tolerance: float = 1e-5) -> None:
    assert means(watches) == pytest.approx(whole.losses, rel=tolerance, abs=tolerance)
    assert watches[0].norms == pytest.approx(whole.norms, rel=1e-4, abs=tolerance)
    assert same(watches[0].states[-1], watches[1].states[-1])
    for name, tensor in whole.states[-1].items():
        if name.startswith(("weights.", "average.")):
            torch.testing.assert_close(watches[0].states[-1][name], tensor, rtol=0, atol=tolerance)


def test_twenty_steps_equal_those_of_a_single_process(sharded: list[Seen], whole: Seen) -> None:
    assert_alike(sharded, whole)
    assert all(watch.network["sharded"] for watch in sharded)
    start, end = (state["weights.layers.0.feed_forward.w1.weight"] for state in whole.states)
    assert (end - start).abs().max() > 5e-3  # there was something to agree about


def test_a_run_begins_with_the_weights_of_a_single_process(sharded: list[Seen], whole: Seen) -> None:
    start = {name: tensor for name, tensor in whole.states[0].items() if name.startswith("weights.")}
    for watch in sharded:
        assert same({name: watch.states[0][name] for name in start}, start)


def test_clipping_and_accumulation_agree(pair: Ranks, folder: Path) -> None:
    settings: dict[str, Any] = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "saves": None}
    watches = train(pair, folder / "clipped", 6, **settings)
    twin = fit(folder / "clipped-whole", 6, **settings)
    assert_alike(watches, twin)
    assert len(twin.losses) == 12 and max(twin.norms) > 0.5


def test_two_groups_that_hold_the_whole_model_each(pair: Ranks, folder: Path, whole: Seen) -> None:
    watches = train(pair, folder / "hsdp", 4, replicate=2)
    assert watches[0].network["mesh"] == (2, 1) and watches[0].network["sharded"]
    assert means(watches) == pytest.approx(whole.losses[:4], abs=1e-5)
    assert torch.equal(  # what they wrote, each tensor once
        open_weights(last_checkpoint(folder / "hsdp"))["x_pad_token"], watches[0].states[-1]["average.x_pad_token"]
    )


@pytest.mark.parametrize(
    ("mode", "compiled"), [("selective", False), ("full", False), ("selective", True), ("full", True)]
)
def test_checkpointing_and_compiling_change_no_loss(
    pair: Ranks, folder: Path, sharded: list[Seen], mode: str, compiled: bool
) -> None:
    settings = ParallelizeSettings(mode, compile=compiled, compile_backend="eager")  # type: ignore[arg-type]
    watches = train(pair, folder / f"{mode}-{compiled}", 3, saves=None, stage_settings={"parallelize": settings})
    assert [watch.losses for watch in watches] == [watch.losses[:3] for watch in sharded]


def losses_and_times_seen(folder: Path) -> tuple[Seen, list[torch.dtype], list[torch.dtype]]:
    """In bf16-mixed: what t and the latents' embedder are given."""
    times: list[torch.dtype] = []
    tokens: list[torch.dtype] = []
    configure = Stage.configure_model

    def watched(self: Any) -> None:
        configure(self)
        self.backbone.t_embedder.register_forward_pre_hook(lambda module, args: times.append(args[0].dtype))
        self.backbone.layers[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0].dtype))

    Stage.configure_model = watched  # type: ignore[method-assign]
    try:
        watch = fit(folder, 6, strategy=FSDP2Strategy(), devices=2, saves=None, precision="bf16-mixed")
    finally:
        Stage.configure_model = configure  # type: ignore[method-assign]
    return watch, times, tokens


def test_bfloat16_computes_with_float32_masters_and_an_uncast_t(pair: Ranks, folder: Path, whole: Seen) -> None:
    answers = pair(losses_and_times_seen, folder / "bf16")
    for watch, times, tokens in answers:
        assert watch.network["types"] == {torch.float32}
        assert set(times) == {torch.float32}  # 0.999 in bfloat16 is 1.0
        assert set(tokens) == {torch.bfloat16}
    assert means([answer[0] for answer in answers]) == pytest.approx(whole.losses[:6], rel=0.03)


LORAS = {
    "lora": LoRASettings(rank=2, dropout=0.0),
    "dora": LoRASettings(rank=2, dora=True, refiners=True),
    "half": LoRASettings(rank=2, base_dtype="bfloat16"),
}


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_trains_and_resumes_on_shards_as_in_one_process(pair: Ranks, folder: Path, kind: str) -> None:
    settings: dict[str, Any] = {"stage_settings": {"lora": LORAS[kind]}}
    if kind == "half":
        settings["precision"] = "bf16-mixed"
    twin = fit(folder / f"{kind}-whole", 6, **settings)
    watches = train(pair, folder / kind, 6, saves=(4, 4), **settings)
    if kind == "half":
        assert means(watches) == pytest.approx(twin.losses, rel=0.03)
    else:
        assert_alike(watches, twin)
    kept = open_weights(last_checkpoint(folder / kind))
    assert kept and all(".lora_" in name for name in kept)
    assert all(torch.equal(weight, watches[0].states[-1][f"average.{name}"]) for name, weight in kept.items())
    first, last = watches[0].states
    changed = {name for name in first if name.startswith("weights.") and not torch.equal(first[name], last[name])}
    assert changed == {f"weights.{name}" for name in kept}

    torn = last_checkpoint(folder / kind).with_name("step-00000004.ckpt")
    resumed = train(pair, folder / f"{kind}-torn", 6, resume=torn, saves=None, **settings)
    assert [watch.losses for watch in resumed] == [watch.losses[4:] for watch in watches]
    assert same(resumed[0].states[-1], last)


# ---------------------------------------------------------------------------------------------------- traps


def draw_then_change(mode: str) -> bool:
    """Whether a forward sees what happened to the shards after a forward that had no backward."""
    from torch.distributed.device_mesh import init_device_mesh

    from zimage_lit.backbone.parallelize import parallelize

    torch.manual_seed(0)
    backbone = build_backbone(stage().config, None, 0)
    parallelize(backbone, init_device_mesh("cpu", (2,)), ParallelizeSettings(), mode)
    batch = batch_of(range(2))
    inputs = batch["image_latents"], torch.tensor([0.3, 0.6]), batch["caption_features"]
    with torch.no_grad():
        backbone(*inputs)
        still_sharded = all(isinstance(parameter, DTensor) for parameter in backbone.parameters())
        for parameter in backbone.parameters():
            parameter.zero_()
        return still_sharded and all(not velocity.any() for velocity in backbone(*inputs))


def test_trap_4_weights_changed_after_a_picture_was_drawn_are_used(pair: Ranks) -> None:
    assert pair(draw_then_change, "32-true") == [True, True]
    assert pair(draw_then_change, "bf16-mixed") == [True, True]


def test_trap_5_every_rank_has_its_own_data_and_shards(sharded: list[Seen]) -> None:
    assert sharded[0].network["mesh"] == (2,)
    for step, (first, second) in enumerate(zip(sharded[0].ids, sharded[1].ids, strict=True)):
        assert sorted(first + second) == list(range(step * SAMPLES, (step + 1) * SAMPLES))


class Forgetful(Stage):
    def configure_model(self) -> None:
        if self.backbone is None:
            self.backbone = build_backbone(self.config, None, self.seed)


def fit_unsharded(folder: Path) -> str:
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", devices=2, strategy=FSDP2Strategy(), logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, enable_checkpointing=False,
    )  # fmt: skip
    try:
        trainer.fit(Forgetful(Frozen(), Frozen(), backbone=SIZES), datamodule=Data())  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return "trained"


def test_trap_6_a_network_that_nobody_sharded_is_refused(pair: Ranks, folder: Path) -> None:
    for answer in pair(fit_unsharded, folder / "unsharded"):
        assert "does not shard" in answer and "backbone." in answer and "\n" not in answer


def test_trap_8_the_average_lives_on_shards_and_equals_the_recursion(sharded: list[Seen], whole: Seen) -> None:
    for name, average in whole.states[-1].items():
        if name.startswith("average."):
            torch.testing.assert_close(sharded[0].states[-1][name], average, rtol=0, atol=1e-5)
    assert sharded[0].states[-1]["updates"] == 20


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_a_run_goes_on_exactly_on_as_many_ranks(pair: Ranks, folder: Path, sharded: list[Seen]) -> None:
    torn = last_checkpoint(folder / "sharded").with_name("step-00000012.ckpt")
    resumed = train(pair, folder / "torn", 20, resume=torn)
    assert [watch.losses for watch in resumed] == [watch.losses[12:] for watch in sharded]
    assert same(resumed[0].states[-1], sharded[0].states[-1])


def test_a_run_goes_on_from_two_ranks_to_one_and_back(pair: Ranks, single: Ranks, folder: Path, whole: Seen) -> None:
    last = last_checkpoint(folder / "elastic")
    first = train(pair, folder / "elastic", 6)
    second = train(single, folder / "elastic", 10, resume=last)
    third = train(pair, folder / "elastic", 16, resume=last)
    assert same(first[0].states[-1], second[0].states[0]) and same(second[0].states[-1], third[0].states[0])
    assert means(second) + means(third) == pytest.approx(whole.losses[6:16], abs=1e-5)


def test_a_file_of_a_single_process_goes_on_sharded(pair: Ranks, folder: Path, whole: Seen) -> None:
    before = fit(folder / "file", 8)
    last = last_checkpoint(folder / "file")
    assert last.is_file()
    after = train(pair, folder / "file", 14, resume=last)
    assert same(before.states[-1], after[0].states[0])
    assert means(after) == pytest.approx(whole.losses[8:14], abs=1e-5)
    assert last.is_symlink() and sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "last.ckpt.1"]


class Fill(lightning.Callback):
    """The disk of the second rank is full from step 5 on: a limit on file sizes makes its writes fail half-way."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5 and trainer.global_rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fit_on_a_full_disk(folder: Path) -> str:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        fit_sharded(folder, 12, callbacks=[Fill()], saves=(4, None))
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved"


def test_a_full_disk_of_one_rank_ends_all_and_leaves_the_last_good_checkpoint(pair: Ranks, folder: Path) -> None:
    for answer in pair(fit_on_a_full_disk, folder / "full"):
        assert re.fullmatch(
            r"cannot write a checkpoint in .*; the last good checkpoint is .*last\.ckpt: make room.*", answer
        )
    last = last_checkpoint(folder / "full")
    assert read_checkpoint(last)["global_step"] == 4
    assert {path.name for path in last.parent.iterdir()} == {"last.ckpt", "last.ckpt.0"}


def start_from(source: Path, folder: Path) -> dict[str, Tensor]:
    settings = {"init_from": str(source)}
    watch = fit(folder, 1, strategy=FSDP2Strategy(), devices=2, saves=None, stage_settings=settings)
    assert stage(**settings).backbone is None
    return {name.removeprefix("weights."): w for name, w in watch.states[0].items() if name.startswith("weights.")}


@pytest.mark.parametrize("form", ["folder", "comfyui.safetensors", "file.ckpt", "sharded"])
def test_init_from_fills_the_shards(pair: Ranks, folder: Path, sharded: list[Seen], whole: Seen, form: str) -> None:
    backbone = build_backbone(S3DiTConfig(**{**vars(stage().config)}), None, 7)
    expected = backbone.state_dict()
    source = folder / "sources" / form
    if form == "folder":
        backbone.save_pretrained(source)
    elif form == "comfyui.safetensors":
        export_comfyui(backbone, source)
    else:
        run = "whole" if form == "file.ckpt" else "sharded"
        source, watch = last_checkpoint(folder / run), whole if run == "whole" else sharded[0]
        expected = {k.removeprefix("average."): v for k, v in watch.states[-1].items() if k.startswith("average.")}
    for weights in pair(start_from, source, folder / f"from-{form}"):
        assert same(weights, expected)
    assert same(dict(build_backbone(stage().config, str(source), 0).state_dict()), expected)


def test_settings_that_need_whole_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.name=muon .* set optimizer\.name=adamw"):
        check_can_shard(OptimizerSettings(name="muon"))
