"""The norm with its hand-written backward against the composition that it stands for."""

import pytest
import torch
from fake_gpu import fake_gpu
from torch import Tensor

from zimage_lit.backbone.norm import RMSNorm
from zimage_lit.backbone.rope import rotate

FACTORS = {"none": None, "per chunk": (5, 1, 16), "per token": (5, 4, 16), "of one token each": (20, 1, 16)}


def composed(norm: RMSNorm, x: Tensor, factor: Tensor | None) -> Tensor:
    normalised = x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return normalised if factor is None else normalised * factor


def double(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("shape", FACTORS)
def test_norm_and_its_gradients_equal_the_composition(shape: str) -> None:
    size = FACTORS[shape]
    x = double(*((20, 1, 16) if shape == "of one token each" else (5, 4, 16)), seed=0)
    factor = None if size is None else double(*size, seed=1)
    norm = RMSNorm(16, 1e-5).double()
    with torch.no_grad():
        norm.weight.copy_(double(16, seed=2))
    inputs = [tensor for tensor in (x, norm.weight, factor) if tensor is not None]
    output, expected = norm(x, factor), composed(norm, x, factor)
    torch.testing.assert_close(output, expected)
    weight = double(*output.shape, seed=3)
    for actual, wanted in zip(
        torch.autograd.grad(output, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_rotated_norm_and_its_gradients_equal_the_composition() -> None:
    x = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rotation = torch.polar(torch.ones(6, 4), torch.linspace(-3, 3, 24).view(6, 4))
    norm = RMSNorm(8, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 8))
    output, expected = norm(x, rotation=rotation), rotate(composed(norm, x, None), rotation)
    torch.testing.assert_close(output, expected)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    for actual, wanted in zip(
        torch.autograd.grad(output, [x, norm.weight], weight),
        torch.autograd.grad(expected, [x, norm.weight], weight),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_keeps_the_dtype_of_its_input_and_rounds_once(dtype: torch.dtype) -> None:
    x = torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = RMSNorm(64, 1e-5)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), composed(norm, x.float(), None).to(dtype))


def test_weights_of_bfloat16_get_gradients() -> None:
    norm, reference = RMSNorm(64, 1e-5).bfloat16(), RMSNorm(64, 1e-5)
    x = torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm(x).float().square().sum().backward()
    reference(x.float()).square().sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(norm.weight.grad.float(), reference.weight.grad, rtol=0.02, atol=0)


def test_a_row_of_zeros_stays_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    output = RMSNorm(8, 1e-5)(x)
    output.sum().backward()
    assert not output.any()
    assert x.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_on_a_gpu_does_not_widen_the_network() -> None:
    """By itself it would run the norm in float32, and with it the residual stream and the attention."""
    with fake_gpu(autocast=True):
        x = torch.empty(5, 4, 64, dtype=torch.bfloat16, device="cuda")
        with torch.device("cuda"):
            norm = RMSNorm(64, 1e-5)
        assert norm(x, torch.empty(5, 1, 64, dtype=torch.bfloat16, device="cuda")).dtype == torch.bfloat16
        assert torch.nn.functional.rms_norm(x, (64,)).dtype == torch.float32  # or the test has lost its reason


def test_norm_works_on_the_meta_device() -> None:
    assert RMSNorm(64, 1e-5).to("meta")(torch.empty(3, 64, device="meta")).shape == (3, 64)


@pytest.mark.parametrize("shape", ["none", "per chunk"])
def test_a_weight_in_bfloat16_has_gradients_near_those_in_float32(shape: str) -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 16, generator=source).bfloat16().float().requires_grad_()
    size = FACTORS[shape]
    factor = None if size is None else torch.randn(*size, generator=source).bfloat16().float()
    wide, narrow = RMSNorm(16, 1e-5), RMSNorm(16, 1e-5).bfloat16()
    (expected,) = torch.autograd.grad(wide(x, factor).square().sum(), x)
    short = x.detach().bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(narrow(short, None if factor is None else factor.bfloat16()).square().sum(), short)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)
