"""Checkpointing and compiling of a whole backbone: the same gradients, less kept for the backward pass."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.backbone.parallelize import ParallelizeSettings, parallelize
from zimage_lit.errors import UserError

CONFIG = S3DiTConfig(
    dim=32, n_layers=4, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12, axes_dims=[4, 6, 6],
    axes_lens=[1536, 64, 64], pad_multiple=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> S3DiT:
    torch.manual_seed(0)
    return S3DiT(CONFIG)


def inputs(samples: int = 3) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    source = torch.Generator().manual_seed(samples)
    return (
        [torch.randn(16, 8, 8, generator=source) for _ in range(samples)],
        torch.rand(samples, generator=source),
        [torch.randn(5 + i, 12, generator=source) for i in range(samples)],
    )


def gradients(backbone: S3DiT) -> tuple[dict[str, Tensor], int]:
    """Gradients of a loss, and the bytes that its forward has kept for them."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocities = backbone(*inputs())
    torch.stack([velocity.square().mean() for velocity in velocities]).mean().backward()
    return {name: parameter.grad for name, parameter in backbone.named_parameters()}, sum(kept.values())


def prepared(plain: S3DiT, mode: str, backend: str | None = None) -> S3DiT:
    backbone = copy.deepcopy(plain)
    settings = ParallelizeSettings(mode, compile=backend is not None, compile_backend=backend or "eager")  # type: ignore[arg-type]
    parallelize(backbone, None, settings)
    assert list(backbone.state_dict()) == list(plain.state_dict())
    return backbone


def test_less_is_kept_and_the_gradients_are_the_same(plain: S3DiT) -> None:
    expected, everything = gradients(prepared(plain, "none"))
    seen = {}
    for mode in ("selective", "full"):
        found, seen[mode] = gradients(prepared(plain, mode))
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert seen["full"] < 0.5 * everything


class Products(TorchDispatchMode):
    """Counts the matrix products that are really computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def products(backbone: S3DiT) -> int:
    with Products() as counted:
        gradients(backbone)
    return counted.count


def test_selective_repeats_no_product(plain: S3DiT) -> None:
    none, selective, full = (products(prepared(plain, mode)) for mode in ("none", "selective", "full"))
    assert none == selective < full


def test_equal_blocks_share_their_compiled_code(plain: S3DiT) -> None:
    torch._dynamo.reset()
    counters.clear()
    expected, _ = gradients(prepared(plain, "none"))
    compiled = prepared(plain, "none", "eager")
    found, _ = gradients(compiled)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert counters["stats"]["unique_graphs"] == 3  # refiners of two kinds and one for the four layers
    assert not counters["graph_break"]


def test_a_backend_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallelize\.compile_backend must be one of .*inductor.*, not fast"):
        ParallelizeSettings(compile=True, compile_backend="fast")
