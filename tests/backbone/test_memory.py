"""What a network of these sizes keeps between forward and backward, against every tensor that is alive there."""

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fake_gpu import fake_gpu
from live_bytes import LiveBytes
from torch import nn

from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.backbone.memory import Adapters, Keeping, activation_bytes, working_bytes
from zimage_lit.backbone.parallelize import ParallelizeSettings, parallelize
from zimage_lit.backbone.rope import rotation_tables
from zimage_lit.lora import LoRASettings, apply_lora

# Wide enough that what grows with width and length outweighs the small parts, as it does at full size.
CONFIG = S3DiTConfig(dim=384, n_heads=3, n_kv_heads=3, n_layers=5, n_refiner_layers=1, cap_feat_dim=160)
ONE_LENGTH = [(12, 16)] * 2, [64] * 2
LENGTHS = [(16, 16), (12, 20), (8, 9)], [40, 77, 13]


def measured(
    keeping: Keeping, batch: Any, lora: LoRASettings | None = None, weights: torch.dtype = torch.float32
) -> tuple[int, int]:
    """(bytes alive after the forward, most bytes in the backward), of activations and gradients but not of weights."""
    grids, lengths = batch
    device = "cuda" if keeping.on_gpu else "cpu"
    with fake_gpu(keeping.autocast) if keeping.on_gpu else nullcontext():
        network = build(device, weights, lora, keeping.checkpointing)
        latents = [torch.zeros(16, 2 * rows, 2 * columns, device=device) for rows, columns in grids]
        captions = [torch.zeros(length, CONFIG.cap_feat_dim, device=device) for length in lengths]
        live = LiveBytes([*network.parameters(), *latents, *captions])
        with live:
            with torch.autocast("cpu", torch.bfloat16, keeping.autocast) if device == "cpu" else nullcontext():
                velocities = network(latents, torch.zeros(len(grids), device=device), captions)
                loss = torch.stack([velocity.square().mean() for velocity in velocities]).mean()
            torch.clear_autocast_cache()  # as the trainer's autocast does at its end
            gc.collect()
            after_forward, live.peak = live.now, live.now
            if device == "cpu":
                loss.backward()
        rotation_tables.cache_clear()  # they may be fake
        copies = copies_bytes(network, keeping)
        return after_forward - copies, live.peak - copies


def copies_bytes(network: S3DiT, keeping: Keeping) -> int:
    """What autocast's bfloat16 copies of weights hold until the backward: no activations."""
    if not keeping.autocast:
        return 0
    outside = [network.t_embedder.mlp[2], network.all_final_layer]  # what the way back to trained weights leads through
    kept = [network] if keeping.checkpointing == "none" else outside
    return 2 * sum(p.numel() for m in kept for p in m.parameters() if p.ndim > 1 and p.requires_grad)


def build(device: str, weights: torch.dtype, lora: LoRASettings | None, checkpointing: Any) -> S3DiT:
    torch.set_default_dtype(weights)
    try:
        with torch.device(device):
            network = S3DiT(CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)
    if lora:
        with torch.device(device), pytest.MonkeyPatch.context() as patch:
            if device == "cuda":  # fake tensors have no values, and cannot be moved
                patch.setattr("zimage_lit.lora.reset_adapters", lambda *_: None)
                patch.setattr(nn.Module, "to", lambda module, *_, **__: module)
            apply_lora(network, lora)
    parallelize(network, None, ParallelizeSettings(activation_checkpointing=checkpointing))
    return network


def predicted(keeping: Keeping, batch: Any) -> tuple[int, int]:
    tokens = [rows * columns for rows, columns in batch[0]]
    return activation_bytes(CONFIG, tokens, batch[1], keeping), working_bytes(CONFIG, tokens, batch[1], keeping)


@pytest.mark.parametrize(
    ("autocast", "checkpointing", "batch"),
    [(autocast, mode, LENGTHS) for autocast in (False, True) for mode in ("none", "selective", "full")]
    + [(False, "none", ONE_LENGTH)],
)
def test_activations_on_a_cpu_are_predicted_within_a_tenth(autocast: bool, checkpointing: Any, batch: Any) -> None:
    keeping = Keeping(2 if autocast else 4, autocast, on_gpu=False, checkpointing=checkpointing)
    kept, peak = measured(keeping, batch)
    activations, working = predicted(keeping, batch)
    assert activations == pytest.approx(kept, rel=0.1)
    gradients = 4 * sum(p.numel() for p in S3DiT(CONFIG).parameters())
    assert max(activations + working, gradients + working) > 0.9 * peak  # both ends of the backward


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16-true", "bf16-mixed"])
def test_activations_on_a_gpu_are_predicted_within_a_tenth(weights: torch.dtype, checkpointing: Any) -> None:
    """Of the very code that runs there, on fake tensors."""
    keeping = Keeping(2, weights is torch.float32, on_gpu=True, checkpointing=checkpointing)
    kept, _ = measured(keeping, LENGTHS, weights=weights)
    assert predicted(keeping, LENGTHS)[0] == pytest.approx(kept, rel=0.1)


LORAS = {
    "all matrices": LoRASettings(rank=16),
    "query and value": LoRASettings(rank=16, targets=["to_q", "to_v"]),
    "dropout": LoRASettings(rank=16, dropout=0.1),
    "dora": LoRASettings(rank=16, dora=True),
    "refiners too": LoRASettings(rank=16, refiners=True),
}


CASES = [(name, True, True) for name in LORAS] + [("all matrices", False, True), ("dropout", False, False)]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("name", "autocast", "on_gpu"), CASES)
def test_activations_of_lora_over_bfloat16_weights_are_predicted_within_a_tenth(
    name: str, autocast: bool, on_gpu: bool
) -> None:
    lora = LORAS[name]
    adapters = Adapters(lora.rank, frozenset(lora.targets), lora.refiners, lora.dora, lora.dropout > 0)
    keeping = Keeping(2, autocast, on_gpu, "none", adapters)
    kept, _ = measured(keeping, LENGTHS, lora, torch.bfloat16)
    assert predicted(keeping, LENGTHS)[0] == pytest.approx(kept, rel=0.1)


def test_selective_checkpointing_of_lora_keeps_the_results_of_adapters_too() -> None:
    lora = LORAS["all matrices"]
    adapters = Adapters(lora.rank, frozenset(lora.targets))
    keeping = Keeping(2, True, on_gpu=False, checkpointing="selective", adapters=adapters)
    kept, _ = measured(keeping, LENGTHS, lora, torch.bfloat16)
    assert predicted(keeping, LENGTHS)[0] == pytest.approx(kept, rel=0.1)
