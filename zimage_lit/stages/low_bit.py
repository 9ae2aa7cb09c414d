"""torchao's AdamW, made to fit a run that continues bit for bit; imported only where a setting asks for it.

torchao computes every step in float32 and compiles it, which takes a C++ compiler on a CPU (Triton on a GPU) and some
seconds at the first step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._functorch.config
import torchao.optim
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim.subclass_8bit import OptimState8bit

from zimage_lit.rng import generator
from zimage_lit.stages.optimizers import loss_of

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Reproducible:
    """What both of torchao's classes need: rounding drawn from the run's seed, and float32 wherever 8 bits are not.

    torchao keeps small moments in the weights' type, and torch casts all that it loads to it. In bfloat16 an average
    over a thousand squared gradients never falls: a thousandth of it is less than half of its last digit.
    """

    state: Any
    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        seed: int,
        stochastic_rounding: bool,
    ) -> None:
        self.seed = seed
        options: dict[str, Any] = {"betas": betas, "eps": eps, "bf16_stochastic_round": stochastic_rounding}
        super().__init__(groups, **options)  # type: ignore[call-arg]  # of torchao's class beside this one

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = loss_of(closure)
        devices = {p.device.index for group in self.param_groups for p in group["params"] if p.is_cuda}
        # torch's cache on disk takes an 8-bit state inside a DTensor for a plain one and would run wrong code on it
        uncached = torch._functorch.config.patch(enable_autograd_cache=False)
        with uncached, torch.random.fork_rng(devices=sorted(devices)):
            # the same on all ranks: replicas must stay alike, and shards hold different weights anyway
            torch.manual_seed(generator(self.seed, "stochastic_rounding", self.steps_taken()).initial_seed())
            super().step()  # type: ignore[misc]
        return loss

    def steps_taken(self) -> int:
        """As the first parameter counts them; torchao keeps that number on the CPU."""
        return next((int(state["step"]) for state in self.state.values() if "step" in state), 0)

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        buffer = super()._new_buffer(p, signed)  # type: ignore[misc]
        return buffer if is_quantised(buffer) else torch.zeros_like(p, dtype=torch.float32)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # type: ignore[misc]
        stored = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(stored, parameters, strict=True):
            for name in MOMENTS:
                value = state_dict["state"].get(number, {}).get(name)
                if value is not None:
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def is_quantised(state: Tensor) -> bool:
    return isinstance(state.to_local() if isinstance(state, DTensor) else state, OptimState8bit)


class AdamW8bit(_Reproducible, torchao.optim.AdamW8bit):
    """AdamW whose moments are kept in 8 bits, in blocks of 256 values with a scale each.

    Tensors (or their local shards) of fewer than 4096 values, or of a number that 256 does not divide, keep float32
    moments. Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
    """

    @staticmethod
    def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
        # float32 to the outside whatever the weights are: as the local part of a DTensor it forgets any other type
        return OptimState8bit.zeros(p.shape, signed, block_size, p.device, dtype=torch.float32)


class RoundedAdamW(_Reproducible, torchao.optim._AdamW):
    """AdamW over bfloat16 weights with float32 moments; each new weight goes up or down with the chance that makes its
    mean right, so that steps smaller than a weight's last digit add up instead of vanishing."""
