"""Forward and backward of our S3-DiT against diffusers' ZImageTransformer2DModel, with the same weights.

    python benchmarks/backbone.py                      # CPU, about five minutes on two cores
    python benchmarks/backbone.py --device cuda --dtype bfloat16 --dim 3840 --heads 30 --layers 6

Two cases: a batch of mixed lengths (image tokens 64-1024, captions 8-200) and one of equal lengths. The two networks
take turns on each batch, and the ratio theirs / ours of each turn enters the median: a ratio says more than seconds on
a machine with other work. Peak memory is that of a process of its own for each network (CPU: the growth of the
resident set over the built network; CUDA: the allocator's). diffusers runs as it comes: it pads to the longest sample
and masks, or drops the mask when all lengths agree. Prints a table and one line of JSON.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from zimage_lit.backbone import S3DiT, S3DiTConfig, attention

Batch = tuple[list[Tensor], Tensor, list[Tensor]]
Run = Callable[..., list[Tensor]]
AXES = {32: [8, 12, 12], 64: [16, 24, 24], 128: [32, 48, 48]}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_memory(options, options.memory_of, options.case))
        return
    results = {case: compare(options, case) for case in ("mixed", "equal")}
    report(options, results)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=2, help="dim / heads is 32, 64 or 128")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--draws", type=int, default=8, help="different batches of each case")
    parser.add_argument("--turns", type=int, default=2, help="timed turns on each batch, after one to warm up")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "bfloat16-mixed"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=["mixed", "equal"], help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(options: argparse.Namespace, case: str) -> dict[str, float]:
    """Median ratio of the turns, tokens a second, and the peak memory of each network."""
    ours, theirs = build_ours(options), build_theirs(options)
    theirs.load_state_dict(ours.state_dict())
    runs: dict[str, Run] = {"ours": ours, "diffusers": as_ours(theirs)}
    seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
    batches = [draw_batch(options, case, draw) for draw in range(options.draws)]
    for batch in batches:
        check_agreement(runs, batch, options)
        for _ in range(options.turns):
            for name, run in runs.items():
                seconds[name].append(timed_step(run, batch, options))
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    real = sum(latent.shape[1] * latent.shape[2] // 4 for batch in batches for latent in batch[0])
    real += sum(len(caption) for batch in batches for caption in batch[2])
    memory = {name: memory_in_own_process(options, name, case) for name in runs}
    return {
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        **{f"{name}_tokens_per_second": real * options.turns / sum(times) for name, times in seconds.items()},
        **{f"{name}_peak_MiB": memory[name] for name in runs},
        "diffusers_tokens_per_real_token": statistics.mean(padded_share(batch) for batch in batches),
    }


def draw_batch(options: argparse.Namespace, case: str, draw: int) -> Batch:
    """Mixed: square and rectangular grids of about 64-1024 tokens, captions of 8-200; equal: 16x16 and 64."""
    dice = random.Random(f"{options.seed}/{draw}")
    grids, lengths = [(16, 16)] * options.batch, [64] * options.batch
    if case == "mixed":
        grids = []
        for _ in range(options.batch):
            tokens, aspect = dice.randint(80, 1024), dice.choice([1, 1, 4 / 3, 3 / 4, 16 / 9, 9 / 16])
            height = round((tokens * aspect) ** 0.5)
            grids.append((height, tokens // height))
        lengths = [dice.randint(8, 200) for _ in range(options.batch)]
    generator = torch.Generator().manual_seed(draw)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(options.device, weight_dtype(options))

    latents = [noise(16, 2 * height, 2 * width) for height, width in grids]
    captions = [noise(length, sizes(options).cap_feat_dim) for length in lengths]
    return latents, torch.rand(options.batch, generator=generator).to(options.device), captions


def padded_share(batch: Batch) -> float:
    """Tokens that diffusers' layers compute for each real one: all samples padded to the longest."""
    latents, _, captions = batch
    real = [(x.shape[1] * x.shape[2] // 4, len(caption)) for x, caption in zip(latents, captions, strict=True)]
    longest = max(sum(-(-n // 32) * 32 for n in sample) for sample in real)
    return longest * len(real) / sum(map(sum, real))


def sizes(options: argparse.Namespace) -> S3DiTConfig:
    heads = options.heads
    return S3DiTConfig(
        dim=options.dim,
        n_layers=options.layers,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=min(2560, options.dim),
        axes_dims=AXES[options.dim // heads],
    )


def build_ours(options: argparse.Namespace) -> S3DiT:
    """Random weights with open gates, so that no part of the network is idle."""
    torch.manual_seed(options.seed)
    with torch.device(options.device):
        model = S3DiT(sizes(options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(weight_dtype(options))


def build_theirs(options: argparse.Namespace) -> nn.Module:
    config = {key: value for key, value in vars(sizes(options)).items() if key != "pad_multiple"}
    with torch.device(options.device):
        model: Any = ZImageTransformer2DModel(**config)
    return model.to(weight_dtype(options))


def weight_dtype(options: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if options.dtype == "bfloat16" else torch.float32


def as_ours(model: nn.Module) -> Run:
    def run(latents: list[Tensor], t: Tensor, captions: list[Tensor]) -> list[Tensor]:
        frames = model([latent.unsqueeze(1) for latent in latents], t, captions, return_dict=False)[0]
        return [frame.squeeze(1) for frame in frames]

    return run


def step(run: Run, batch: Batch, options: argparse.Namespace) -> list[Tensor]:
    """One forward and backward pass, as in training: the gradients of a mean square."""
    with torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16-mixed"):
        outputs = run(*batch)
    torch.cat([output.float().flatten() for output in outputs]).square().mean().backward()
    return outputs


def timed_step(model: Run, batch: Batch, options: argparse.Namespace) -> float:
    synchronize(options)
    start = time.perf_counter()
    step(model, batch, options)
    synchronize(options)
    return time.perf_counter() - start


def synchronize(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def check_agreement(runs: dict[str, Run], batch: Batch, options: argparse.Namespace) -> None:
    """Warm both up, and stop if they do not compute the same thing."""
    outputs = [torch.cat([x.detach().float().flatten() for x in step(run, batch, options)]) for run in runs.values()]
    error = ((outputs[0] - outputs[1]).norm() / outputs[1].norm()).item()
    if error > (1e-4 if options.dtype == "float32" else 0.1):
        raise SystemExit(f"the two networks disagree: relative error {error:.2g}")


def memory_in_own_process(options: argparse.Namespace, name: str, case: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name, "--case", case]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_memory(options: argparse.Namespace, name: str, case: str) -> float:
    """MiB that the largest step takes beyond the built network."""
    run: Run = build_ours(options) if name == "ours" else as_ours(build_theirs(options))
    batches = [draw_batch(options, case, draw) for draw in range(options.draws)]
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
    for batch in batches:
        step(run, batch, options)
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else resident("VmHWM")
    return (peak - before) / 2**20


def resident(field: str) -> int:
    """Bytes, from the kernel's book on this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def attention_kernel(options: argparse.Namespace) -> str:
    """Which of the ways in `attention.py` these options take."""
    if options.dtype == "float32" or (options.device == "cuda" and attention.varlen_attn is None):
        return "scaled_dot_product_attention by groups of like length"
    return "varlen_attn" if options.device == "cuda" else "plain products by groups of like length"


def report(options: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    kernel = attention_kernel(options)
    print(f"{options.device}, {options.dtype}, dim {options.dim}, {options.layers} layers, {options.heads} heads, "
          f"batch {options.batch}, {options.threads} threads; our attention: {kernel}")  # fmt: skip
    print(f"{'case':8}{'theirs/ours':>14}{'(range)':>16}{'tokens/s ours':>16}{'theirs':>9}{'MiB ours':>11}{'theirs':>9}"
          f"{'theirs pads to':>17}")  # fmt: skip
    for case, row in results.items():
        span = f"{row['lowest_ratio']:.2f}-{row['highest_ratio']:.2f}"
        print(
            f"{case:8}{row['ratio']:>14.2f}{span:>16}{row['ours_tokens_per_second']:>16.0f}"
            f"{row['diffusers_tokens_per_second']:>9.0f}{row['ours_peak_MiB']:>11.0f}{row['diffusers_peak_MiB']:>9.0f}"
            f"{row['diffusers_tokens_per_real_token']:>16.2f}x"
        )
    print(json.dumps({"options": vars(options), "attention": kernel, "torch": torch.__version__, **results}))


if __name__ == "__main__":
    main()
