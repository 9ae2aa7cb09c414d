"""The optimiser and learning-rate schedule of a stage, as plain settings."""

import copy
import importlib.util
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zimage_lit.errors import UserError, at_least_one


@dataclass
class GroupSettings:
    """What a part of the parameters has of its own; the first group whose pattern matches a name takes it."""

    match: str  # pattern over the parameters' names, such as layers.*.attention.* or *.bias
    lr_scale: float = 1.0  # times the learning rate of all; 0 keeps these parameters as they are
    weight_decay: float | None = None  # on everything that matches; null: as outside of groups

    def __post_init__(self) -> None:
        for name in ("lr_scale", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"optimizer.groups: {name} of '{self.match}' must be 0 or more, not {value}.")


@dataclass
class OptimizerSettings:
    """AdamW, AdamW with 8-bit states, or Muon with AdamW; linear warm-up, then one of four shapes of the learning rate.

    wsd (warm-up, stable, decay): the peak is held until `decay_steps` before the end. Source: Hu et al., "MiniCPM",
    arXiv 2404.06395, section 4.
    """

    # adamw8bit: moments in 8 bits (torchao); muon: Muon for the blocks' matrices, AdamW for all else
    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: float = 1e-4  # peak learning rate of AdamW
    muon_lr: float = 4e-3  # peak learning rate of Muon, on AdamW's scale
    muon_ns_steps: int = 5  # Newton-Schulz iterations of Muon: fewer are cheaper and orthogonalise less exactly
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only; norms, biases and pad tokens never decay
    stochastic_rounding: bool = False  # bfloat16 weights (trainer.precision=bf16-true) that lose no small steps
    groups: list[GroupSettings] = field(default_factory=list)  # learning rate and decay of a part of the parameters
    warmup_steps: int = 0  # optimiser steps of linear warm-up
    decay: Literal["constant", "linear", "cosine", "wsd"] = "constant"  # shape after the warm-up, down to min_lr
    decay_steps: float | None = None  # wsd: optimiser steps of its decay; below 1 a share of the run; null: a tenth
    min_lr: float = 0.0  # share of the peak that is left at the last step

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "eps", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name} must be 0 or more, not {getattr(self, name)}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas must lie in [0, 1), not {list(self.betas)}.")
        at_least_one("optimizer.muon_ns_steps", self.muon_ns_steps)
        if self.decay_steps is not None and self.decay != "wsd":
            raise UserError(f"optimizer.decay_steps belongs to decay=wsd: remove it, or change decay={self.decay}.")
        if self.decay_steps is not None and not 0 < self.decay_steps < math.inf:
            raise UserError(f"optimizer.decay_steps must be more than 0, not {self.decay_steps}.")
        if not 0 <= self.min_lr <= 1 or (self.min_lr and self.decay == "constant"):
            raise UserError(
                f"optimizer.min_lr is the share of the peak that a decay ends with, in [0, 1]: {self.min_lr} with "
                f"decay={self.decay} means nothing."
            )
        if self.stochastic_rounding and self.name == "muon":
            raise UserError("optimizer.stochastic_rounding: muon has none, use name=adamw or adamw8bit with it.")
        if self.needs_torchao and importlib.util.find_spec("torchao") is None:
            raise UserError(f"optimizer.{self.torchao_key} needs torchao: pip install 'zimage-lit[8bit]'.")

    @property
    def needs_torchao(self) -> bool:
        return self.stochastic_rounding or self.name == "adamw8bit"

    @property
    def torchao_key(self) -> str:
        return "name=adamw8bit" if self.name == "adamw8bit" else "stochastic_rounding"

    @property
    def kind(self) -> str:
        """What a checkpoint's optimiser states are of."""
        return f"{self.name} with stochastic rounding" if self.stochastic_rounding else self.name


def check_can_shard(settings: OptimizerSettings, key: str = "optimizer") -> None:
    """UserError for settings that need whole weights, where each device keeps parts of them."""
    if settings.name == "muon":
        raise UserError(
            f"{key}.name=muon orthogonalises whole matrices, and trainer.strategy=fsdp2 keeps parts of them on each "
            f"device: set {key}.name=adamw."
        )


def build_optimizer(
    model: nn.Module | Mapping[str, nn.Parameter], settings: OptimizerSettings, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters of `model`, or over parameters given by name.

    seed: of stochastic rounding. Every group of its parameters is marked with the `kind` of the settings, by which a
    checkpoint is recognised.
    Raises UserError for a group of the settings that matches nothing, and stochastic rounding of other weights than
    bfloat16 ones.
    """
    named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    trainable = {name: p for name, p in named if p.requires_grad}
    taken = group_parameters(trainable, settings.groups)
    orthogonalised = {n for n, p in trainable.items() if settings.name == "muon" and is_block_matrix(n, p)}
    adamw_groups = optimizer_groups(trainable, taken, settings, settings.lr, trainable.keys() - orthogonalised)
    if settings.needs_torchao:
        return refusing_other_groups(torchao_adamw(adamw_groups, settings, seed))
    adamw = torch.optim.AdamW(adamw_groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    refusing_other_groups(adamw)
    if settings.name == "adamw":
        return adamw
    muon = StackedMuon(
        optimizer_groups(trainable, taken, settings, settings.muon_lr, orthogonalised),
        lr=settings.muon_lr,
        ns_steps=settings.muon_ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    return OptimizerPair(refusing_other_groups(muon), adamw)


def refusing_other_groups(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser, which raises UserError for a state whose groups hold other numbers of parameters."""

    def check(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        own = [len(group["params"]) for group in optimizer.param_groups]
        stored = [len(group["params"]) for group in state["param_groups"]]
        if stored != own:
            raise UserError(
                f"the checkpoint to continue from was trained with other optimizer.groups, of {stored} parameters and "
                f"not {own}: set them back, or begin a new run from its weights with model.init_args.init_from."
            )

    optimizer.register_load_state_dict_pre_hook(check)
    return optimizer


def group_parameters(trainable: Mapping[str, Tensor], groups: Sequence[GroupSettings]) -> dict[str, GroupSettings]:
    """Parameter name -> its group, for those that have one."""
    taken: dict[str, GroupSettings] = {}
    for group in groups:
        matched = [name for name in trainable if name not in taken and fnmatchcase(name, group.match)]
        if not matched:
            raise UserError(
                f"optimizer.groups: no trained parameter that an earlier group leaves matches '{group.match}'; names "
                f"look like {next(iter(trainable), '(none is trained)')}."
            )
        taken.update(dict.fromkeys(matched, group))
    return taken


def optimizer_groups(
    trainable: Mapping[str, Tensor],
    taken: Mapping[str, GroupSettings],
    settings: OptimizerSettings,
    lr: float,
    names: Set[str],
) -> list[dict[str, Any]]:
    """torch's parameter groups over `names`, in the network's order: matrices of equal settings share one."""
    members: dict[tuple[float, float, bool], list[Tensor]] = {(lr, settings.weight_decay, True): []}  # matrices first
    for name, parameter in trainable.items():
        if name not in names:
            continue
        group, is_matrix = taken.get(name), parameter.ndim > 1 and len(parameter) > 1
        decay = settings.weight_decay if is_matrix else 0.0
        if group is not None and group.weight_decay is not None:
            decay = group.weight_decay
        rate = lr if group is None else lr * group.lr_scale
        members.setdefault((rate, decay, is_matrix), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "kind": settings.kind}
        for (rate, decay, _), parameters in members.items()
        if parameters
    ]


def torchao_adamw(groups: list[dict[str, Any]], settings: OptimizerSettings, seed: int) -> torch.optim.Optimizer:
    """AdamW with 8-bit states, or with float32 states over bfloat16 weights."""
    from zimage_lit.stages import low_bit

    types = {parameter.dtype for group in groups for parameter in group["params"]}
    if settings.stochastic_rounding and types != {torch.bfloat16}:
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
        raise UserError(
            f"optimizer.stochastic_rounding rounds bfloat16 weights, and these are {found}: set "
            "trainer.precision=bf16-true, or remove it."
        )
    if "cpu" in {parameter.device.type for group in groups for parameter in group["params"]} and not cpp_compiler():
        raise UserError(
            f"optimizer.{settings.torchao_key} compiles its step and finds no C++ compiler: install g++ or clang++, or "
            "name one in the environment variable CXX."
        )
    cls = low_bit.AdamW8bit if settings.name == "adamw8bit" else low_bit.RoundedAdamW
    return cls(groups, settings.betas, settings.eps, seed, settings.stochastic_rounding)


def kind_of_states(state: dict[str, Any]) -> str:
    """The `kind` of the settings whose optimiser's state this is."""
    if "pair" in state:
        return "muon"
    return state["param_groups"][0].get("kind", "adamw") if state["param_groups"] else "adamw"


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would take on a CPU."""
    return next(
        (found for name in (os.environ.get("CXX", ""), "g++", "clang++") if (found := shutil.which(name))), None
    )


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """The projections of attention and feed-forward; embedders, modulation and output layer are left to AdamW."""
    return parameter.ndim == 2 and (".attention." in name or ".feed_forward." in name)


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure of an optimiser step returns, None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class StackedMuon(torch.optim.Muon):
    """torch's Muon with the same results, but matrices of one shape are orthogonalised together, which is faster.

    Of the arguments, `nesterov` is always true and `adjust_lr_fn` always "match_rms_adamw" (an update of AdamW's size).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = loss_of(closure)
        for group in self.param_groups:
            by_shape: dict[torch.Size, dict[Tensor, Tensor]] = defaultdict(dict)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape][parameter] = parameter.grad
            for shape, members in by_shape.items():
                parameters, gradients = list(members), list(members.values())
                averages = [self.momentum_of(parameter) for parameter in parameters]
                torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
                looking_ahead = torch.stack(torch._foreach_lerp(gradients, averages, group["momentum"]))
                updates = orthogonalise(looking_ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                rate = 0.2 * math.sqrt(max(shape)) * group["lr"]
                torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype)), alpha=-rate)
        return loss

    def momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """(n, rows, columns) -> bfloat16 of the same shape: each matrix with its singular values brought near 1.

    Newton-Schulz: X <- a X + (b A + c A A) X with A = X X'. Source: Jordan et al., "Muon", 2024.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalise(matrices.mT, coefficients, steps, eps).mT
    a, b, c = coefficients
    x = matrices.bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class OptimizerPair(torch.optim.Optimizer):
    """Two optimisers over different parameters that step, are scheduled and are saved as one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.pair = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        self.share_groups()

    def share_groups(self) -> None:
        """One list of group dicts for all three, so that a scheduler reaches both optimisers."""
        self.param_groups = [group for optimizer in self.pair for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = loss_of(closure)
        for optimizer in self.pair:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"pair": [optimizer.state_dict() for optimizer in self.pair]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.pair, state_dict["pair"], strict=True):
            optimizer.load_state_dict(state)
        self.share_groups()


class LearningRate(torch.optim.lr_scheduler.LambdaLR):
    """The schedule of the settings.

    A run that continues takes from its checkpoint how far it has come; the peak, the decay of weights and everything
    else of the optimiser's groups are those of the settings, which may have changed since.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, total_steps: int, settings: OptimizerSettings) -> None:
        super().__init__(optimizer, lambda step: learning_rate_factor(step, total_steps, settings))
        self.groups = [copy.deepcopy(without_parameters(group)) for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "groups"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        for group, own, peak in zip(self.optimizer.param_groups, self.groups, self.base_lrs, strict=True):
            group.update(copy.deepcopy(own))
            rate = peak * self.lr_lambdas[0](self.last_epoch)
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate  # torchao's is a tensor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def learning_rate_factor(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Share of the peak learning rate at optimiser step `step` of `total_steps`."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    if settings.decay == "constant":
        return 1.0
    start = decay_start(total_steps, settings)
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if settings.decay == "cosine" else 1 - progress
    return settings.min_lr + (1 - settings.min_lr) * left


def decay_start(total_steps: int, settings: OptimizerSettings) -> float:
    """The optimiser step at which the learning rate begins to fall, never before the end of the warm-up."""
    if settings.decay != "wsd":
        return settings.warmup_steps
    length = 0.1 if settings.decay_steps is None else settings.decay_steps
    return max(settings.warmup_steps, total_steps - (length * total_steps if length < 1 else length))
