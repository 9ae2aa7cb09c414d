"""Optimisers against torch's AdamW, schedules against their shapes written out, and what is refused."""

import importlib.util
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from zimage_lit.callbacks.checkpoint import RunCheckpoint
from zimage_lit.errors import UserError
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.stages.initial_weights import read_checkpoint
from zimage_lit.stages.optimizers import (
    GroupSettings,
    OptimizerSettings,
    build_optimizer,
    cpp_compiler,
    kind_of_states,
    learning_rate_factor,
)
from zimage_lit.validate import check_value

torchao_step = pytest.mark.skipif(
    cpp_compiler() is None or importlib.util.find_spec("torchao") is None,
    reason="torchao's optimisers compile their step: needs torchao and a C++ compiler",
)


SIZE = 64  # a square of it is just large enough for 8 bits
# torchao compiles a step anew for every other shape, type, beta and decay: the tests share theirs
COMMON = {"betas": (0.9, 0.999), "weight_decay": 0.1}


def network(dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Sequential:
    """One matrix that is large enough for 8 bits, and what is not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE, bias=bias), nn.Tanh(), nn.Linear(SIZE, 1, bias=bias)).to(dtype)


def give_gradients(model: nn.Module, source: torch.Generator) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=source).to(parameter.dtype)


def regression_loss(settings: OptimizerSettings, dtype: torch.dtype, steps: int) -> list[float]:
    """Losses of a small problem whose answer is known."""
    model = network(dtype)
    inputs = torch.randn(64, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    targets = inputs[:, :8].float().sum(dim=1, keepdim=True).tanh()
    optimizer, losses = build_optimizer(model, settings), []
    for _ in range(steps):
        loss = (model(inputs).float() - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------------------------------------------- torchao


@torchao_step
def test_8_bit_states_learn_as_float32_ones_do():
    full = regression_loss(OptimizerSettings(lr=3e-3, **COMMON), torch.float32, 60)
    eight = regression_loss(OptimizerSettings(name="adamw8bit", lr=3e-3, **COMMON), torch.float32, 60)
    assert full[-1] < 0.2 * full[0]
    assert eight == pytest.approx(full, rel=0.1, abs=0.01)
    assert eight != full


@torchao_step
def test_only_large_tensors_have_8_bit_moments():
    model = network()
    optimizer = build_optimizer(model, OptimizerSettings(name="adamw8bit", **COMMON))
    give_gradients(model, torch.Generator().manual_seed(0))
    optimizer.step()
    kinds = {p.numel(): type(optimizer.state[p]["exp_avg"]).__name__ for p in model.parameters()}
    assert kinds == {SIZE**2: "OptimState8bit", SIZE: "Tensor"}


@torchao_step
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_stochastically_rounded_weights_are_right_in_the_mean(name):
    """AdamW's first step moves every weight by lr, and its decay by a tenth of that: plain rounding would lose it."""
    model = nn.Linear(SIZE, SIZE, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    optimizer = build_optimizer(model, OptimizerSettings(name=name, lr=1e-3, stochastic_rounding=True, **COMMON))
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    low, high = 1 - 2**-8, 1.0  # bfloat16's neighbours of 0.9989
    assert set(model.weight.float().unique().tolist()) == {low, high}
    share = (model.weight == low).float().mean().item()
    expected = 1.1e-3 / 2**-8
    assert abs(share - expected) < 4 * (expected * (1 - expected) / SIZE**2) ** 0.5  # four standard deviations
    assert (torch.ones_like(model.weight) - 1.1e-3 == 1).all()


@torchao_step
def test_rounded_bfloat16_weights_follow_float32_adamw():
    """Against torch's AdamW on float32 weights: where bfloat16 weights without rounding stand still."""
    settings = {"lr": 1e-3, **COMMON}
    rounded, twin, plain = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(3))
    for model in (rounded, twin, plain):
        nn.init.constant_(model.weight, 2.0)
    rounded.bfloat16(), plain.bfloat16()
    ours = build_optimizer(rounded, OptimizerSettings(stochastic_rounding=True, **settings))
    theirs = [torch.optim.AdamW(model.parameters(), eps=1e-8, **settings) for model in (twin, plain)]
    source = torch.Generator().manual_seed(0)
    for _ in range(40):
        gradient = torch.rand(SIZE, SIZE, generator=source).bfloat16()
        for model in (rounded, twin, plain):
            model.weight.grad = gradient.to(model.weight.dtype)
        for optimizer in (ours, *theirs):
            optimizer.step()
    assert (plain.weight == 2).all()
    moved = (2 - twin.weight).mean().item()
    assert (2 - rounded.weight.float()).mean().item() == pytest.approx(moved, rel=0.03)
    assert ours.state[rounded.weight]["exp_avg_sq"].dtype == torch.float32


@torchao_step
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_low_bit_states_continue_exactly_from_a_checkpoint(name, tmp_path):
    """With rounding, which draws random numbers, on bfloat16 weights, to whose type torch casts what it loads."""
    settings = OptimizerSettings(name=name, lr=1e-2, stochastic_rounding=True, **COMMON)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in steps:
            give_gradients(model, torch.Generator().manual_seed(step))
            optimizer.step()
            schedule.step()
            torch.rand(3)  # whatever else draws from the global generator

    straight, first, second = network(torch.bfloat16), network(torch.bfloat16), network(torch.bfloat16)
    optimizer = build_optimizer(straight, settings, seed=3)
    run(straight, optimizer, range(3))
    run(straight, optimizer, range(3, 6))
    optimizer = build_optimizer(first, settings, seed=3)
    run(first, optimizer, range(3))
    content = {"state_dict": first.state_dict(), "optimizer": optimizer.state_dict(), "pytorch-lightning_version": "2"}
    torch.save(content, tmp_path / "half.ckpt")
    stored = read_checkpoint(tmp_path / "half.ckpt")
    assert kind_of_states(stored["optimizer"]) == f"{name} with stochastic rounding"
    second.load_state_dict(stored["state_dict"])
    optimizer = build_optimizer(second, settings, seed=3)
    optimizer.load_state_dict(stored["optimizer"])
    run(second, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


class Fitted(lightning.LightningModule):
    """A network of one matrix with 8-bit states in a trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.model(batch) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, OptimizerSettings(name="adamw8bit", lr=1e-2, **COMMON))


@torchao_step
def test_a_run_with_8_bit_states_goes_on_from_its_checkpoint(tmp_path):
    """Through the trainer, whose own reading of checkpoints torch cannot do with such states."""

    def fit(folder: Path, steps: int, resume: Path | None = None) -> nn.Module:
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder, callbacks=[RunCheckpoint()],
        )  # fmt: skip
        module = Fitted()
        batches = [torch.randn(4, SIZE, generator=torch.Generator().manual_seed(0))] * 8  # wherever the loader stands
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=resume)
        assert trainer.global_step == steps
        return module.model

    straight = fit(tmp_path / "straight", 4)
    fit(tmp_path / "halves", 2)
    resumed = fit(tmp_path / "halves", 4, last_checkpoint(tmp_path / "halves"))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.fixture
def one_process_mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@torchao_step
@pytest.mark.parametrize(
    "settings",
    [
        OptimizerSettings(**COMMON),
        OptimizerSettings(name="adamw8bit", **COMMON),
        OptimizerSettings(stochastic_rounding=True, **COMMON),
        OptimizerSettings(name="adamw8bit", stochastic_rounding=True, **COMMON),
    ],
    ids=["adamw", "adamw8bit", "rounding", "adamw8bit-rounding"],
)
def test_sharded_parameters_step_as_plain_ones_do(settings, one_process_mesh):
    dtype = torch.bfloat16 if settings.stochastic_rounding else torch.float32
    plain, sharded = network(dtype), network(dtype)
    fully_shard(sharded, mesh=one_process_mesh)
    inputs = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    for model in (plain, sharded):
        optimizer = build_optimizer(model, settings)
        for _ in range(2):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
            state = optimizer.state_dict()
            optimizer = build_optimizer(model, settings)
            optimizer.load_state_dict(state)
    for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(b.full_tensor(), a, rtol=1e-6, atol=1e-7)


def test_stochastic_rounding_of_float32_weights_is_refused():
    with pytest.raises(UserError, match=r"rounds bfloat16 weights, and these are float32: set trainer\.precision"):
        build_optimizer(network(), OptimizerSettings(stochastic_rounding=True))


def test_without_torchao_or_a_compiler_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="name=adamw8bit compiles its step and finds no C\\+\\+ compiler"):
        build_optimizer(network(), OptimizerSettings(name="adamw8bit"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for settings in ({"name": "adamw8bit"}, {"stochastic_rounding": True}):
        with pytest.raises(UserError, match=r"needs torchao: pip install 'zimage-lit\[8bit\]'"):
            OptimizerSettings(**settings)


# ---------------------------------------------------------------------------------------------------- groups


def test_groups_scale_the_learning_rate_and_set_the_decay():
    model = network(bias=True)
    model[0].bias.requires_grad_(False)
    groups = [GroupSettings("0.*", lr_scale=0.1), GroupSettings("*.bias", weight_decay=0.3), GroupSettings("2.*")]
    settings = OptimizerSettings(lr=1e-2, weight_decay=0.1, groups=groups, eps=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, settings)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, rate, decay in (("0.weight", 1e-3, 0.1), ("2.weight", 1e-2, 0.0), ("2.bias", 1e-2, 0.3)):
        # AdamW's first step: the decay, then lr times the gradient's sign
        torch.testing.assert_close(model.get_parameter(name), before[name] * (1 - rate * decay) - rate)
    assert torch.equal(model[0].bias, before["0.bias"])


def test_groups_reach_muon_and_adamw_alike():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.Linear(8, 8)

    model = nn.ModuleDict({"a": Block(), "b": Block()})
    settings = OptimizerSettings(name="muon", lr=1.0, muon_lr=2.0, groups=[GroupSettings("b.*", lr_scale=0.5)])
    muon, adamw = build_optimizer(model, settings).pair
    assert [group["lr"] for group in muon.param_groups] == [2.0, 1.0]
    assert [group["lr"] for group in adamw.param_groups] == [1.0, 0.5]


@pytest.mark.parametrize("patterns", [["layers.*"], ["0.*", "0.weight"]])
def test_a_group_that_matches_nothing_is_refused(patterns):
    groups = [GroupSettings(pattern) for pattern in patterns]
    with pytest.raises(UserError, match=rf"matches '{patterns[-1]}'; names look like 0\.weight"):
        build_optimizer(network(), OptimizerSettings(groups=groups))


def test_an_unknown_key_of_a_group_is_named():
    with pytest.raises(UserError, match=r"optimizer\.groups\[1\]\.learning_rate is not a setting of GroupSettings"):
        check_value("optimizer.groups", [{"match": "a"}, {"match": "b", "learning_rate": 1}], list[GroupSettings])


# ---------------------------------------------------------------------------------------------------- schedules


def test_warmup_stable_decay():
    settings = OptimizerSettings(decay="wsd", warmup_steps=3, decay_steps=4, min_lr=0.2)
    shape = [learning_rate_factor(step, 12, settings) for step in range(13)]
    assert shape == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    share = OptimizerSettings(decay="wsd", decay_steps=0.5)
    assert [learning_rate_factor(step, 8, share) for step in (4, 6, 8)] == [1, 0.5, 0]
    tenth = OptimizerSettings(decay="wsd")
    assert [learning_rate_factor(step, 100, tenth) for step in (90, 95, 100)] == pytest.approx([1, 0.5, 0])
    short = OptimizerSettings(decay="wsd", warmup_steps=5, decay_steps=100)  # the warm-up is never cut short
    assert [learning_rate_factor(step, 9, short) for step in (4, 5, 7, 9)] == pytest.approx([5 / 6, 1, 0.5, 0])


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_decay_ends_at_the_share_that_is_asked_for(decay):
    settings = OptimizerSettings(decay=decay, min_lr=0.1)
    assert [learning_rate_factor(step, 10, settings) for step in (0, 5, 10)] == pytest.approx([1, 0.55, 0.1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay_steps": 10}, "decay_steps belongs to decay=wsd"),
        ({"decay": "wsd", "decay_steps": 0}, "decay_steps must be more than 0"),
        ({"min_lr": 0.1}, "min_lr is the share of the peak"),
        ({"min_lr": 2.0, "decay": "cosine"}, "min_lr is the share of the peak"),
        ({"name": "muon", "stochastic_rounding": True}, "muon has none"),
        ({"lr": float("nan")}, "optimizer.lr must be 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        OptimizerSettings(**settings)
    with pytest.raises(UserError, match="lr_scale of 'x' must be 0 or more"):
        GroupSettings("x", lr_scale=-1)
