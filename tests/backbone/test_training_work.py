"""The operations of a training step, of all weights or with LoRA, against torch's own counter."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode

from zimage_lit.backbone import S3DiT, S3DiTConfig, packing
from zimage_lit.backbone.flops import TrainingWork, attention_flops, forward_flops

CONFIG = S3DiTConfig(
    dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=64,
    axes_dims=[8, 12, 12], axes_lens=[1536, 64, 64], pad_multiple=8,
)  # fmt: skip
GRIDS, CAPTIONS = [(4, 4), (4, 3)], [5, 9]  # patches, tokens
IMAGES = [rows * columns for rows, columns in GRIDS]


@pytest.fixture(autouse=True)
def nothing_is_padded_to_save_a_call(monkeypatch):
    monkeypatch.setattr(packing, "PAIRS_OF_A_CALL", 0)  # no formula counts it


def example(requires_grad: bool = False):
    latents = [torch.randn(16, 2 * rows, 2 * columns, requires_grad=requires_grad) for rows, columns in GRIDS]
    captions = [torch.randn(length, 64, requires_grad=requires_grad) for length in CAPTIONS]
    return latents, torch.rand(len(latents)), captions


def counted(network: S3DiT) -> int:
    """Operations of a forward and backward pass by torch's counter; in bfloat16, whose attention is plain products."""
    with FlopCounterMode(display=False) as counter:
        torch.cat([x.flatten() for x in network.bfloat16()(*example(requires_grad=True))]).square().mean().backward()
    return counter.get_total_flops()


def test_attention_is_the_part_of_the_forward_without_weights():
    with FlopCounterMode(display=False) as counter:
        S3DiT(CONFIG).bfloat16()(*example())
    images, captions, both = [16, 16], [8, 16], [24, 32]  # with pads
    expected = attention_flops(CONFIG, images + captions) + 2 * attention_flops(CONFIG, both)
    assert counter.get_flop_counts()["Global"][torch.ops.aten.bmm] == expected


NO_GRADIENT = 2 * 256 * 1024 * len(IMAGES)  # of the sinusoids of t


def test_full_training_costs_three_forwards():
    network = S3DiT(CONFIG)
    model, executed = TrainingWork(network).flops(IMAGES, CAPTIONS)
    assert model == executed == 3 * forward_flops(CONFIG, IMAGES, CAPTIONS)
    assert counted(network) == pytest.approx(model - NO_GRADIENT, rel=0.002)  # with sums that norms do as products


def test_frozen_weights_under_lora_cost_no_gradients_of_their_own():
    network = S3DiT(CONFIG).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), network)
    work = TrainingWork(network)
    model, _ = work.flops(IMAGES, CAPTIONS)
    assert model < 2.5 * forward_flops(CONFIG, IMAGES, CAPTIONS)
    no_gradient = 2 * work.sizes["samples"] * len(IMAGES)  # nothing below the modulation is trained
    assert counted(network) == pytest.approx(model - no_gradient, rel=0.002)


def test_checkpointing_adds_a_forward():
    model, executed = TrainingWork(S3DiT(CONFIG), again=True).flops(IMAGES, CAPTIONS)
    assert executed - model == forward_flops(CONFIG, IMAGES, CAPTIONS)
