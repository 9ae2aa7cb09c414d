"""Training steps of our S3-DiT beside those of diffusers' ZImageTransformer2DModel: speed, MFU and memory.

    python benchmarks/finetune.py                                   # one GPU: the published 6.15 B, random weights
    python benchmarks/finetune.py --preset tiny --steps 3           # CPU, a few minutes on two cores

Cases, in the words of the table:

    full 512, full 1024   one picture, all weights trained, every block's forward computed again in the backward
    lora 512              one picture, rank 64 on attention and feed-forward, all else frozen in bfloat16
    lora packed           eight pictures of six shapes with captions of eight lengths, in one batch

The optimisers of a full fine-tune:

    rounded        bfloat16 weights, stochastic rounding, float32 moments (torchao)
    rounded-8bit   bfloat16 weights, stochastic rounding, 8-bit moments (torchao)
    fused-bf16     bfloat16 weights and moments, torch's fused AdamW; loses small steps, so it is a bound, no recipe
    fp32           float32 weights and moments, torch's fused AdamW, autocast to bfloat16

Each row is measured in a process of its own, so peaks of memory are its own: on a GPU the allocator's, everything
included; on a CPU the resident set's. The two networks get batches of the same sizes and the same optimiser. With
--compile both compile their blocks, each in its own way. MFU counts forward, backward to the inputs and backward to
trained weights, without recomputation, and without what padding to the longest sample costs: the same work for both, so
that ratios of MFU are ratios of speed. A row that runs out of memory says so, and the rest goes on. Needs torch and
zimage_lit.backbone; diffusers, peft and torchao for their rows. With --preset tiny pictures have a quarter of the side.
The last column compares seconds on a GPU; on a CPU, which others use too, seconds of the processor (with --threads 1:
what waits for other threads counts as work).
"""

import argparse
import importlib.util
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.backbone.flops import TrainingWork
from zimage_lit.backbone.parallelize import ParallelizeSettings, parallelize
from zimage_lit.hardware import peak_flops

Batch = tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]
CASES = ("full 512", "full 1024", "lora 512", "lora packed")
OPTIMIZERS = ("rounded", "rounded-8bit", "fused-bf16", "fp32")
NETWORKS = ("ours", "diffusers")
# (height, width) of pictures in pixels and lengths of captions; the sizes of `tiny` are a quarter of them
PACKED = [(512, 512), (640, 416), (416, 640), (704, 384), (384, 704), (576, 448), (512, 512), (448, 576)]
CAPTIONS = [128, 40, 75, 200, 24, 310, 96, 61]
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
# diffusers' classes pad to 32 whatever the sizes; so does this small network, unlike the preset of that name
TINY = {
    "dim": 128, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 128,
    "axes_dims": [8, 12, 12],
}  # fmt: skip


def main() -> None:
    options = parse_options()
    if options.row:
        print(json.dumps(measure(options, **json.loads(options.row))))
        return
    rows = [in_own_process(options, row) for row in planned(options)]
    report(options, rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["z-image-6b", "tiny"], default="z-image-6b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="fewer main blocks than the preset has")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="of full")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=10, help="timed, after --warmup")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="pictures of a full step")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA")
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"], default="full", help="of full steps")
    parser.add_argument("--lora-checkpointing", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="of the device, in bfloat16; else by its name")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def planned(options: argparse.Namespace) -> list[dict[str, str]]:
    """The rows of the table: case, optimiser, network."""
    rows = []
    for case in options.cases:
        for optimizer in options.optimizers if case.startswith("full") else ["fp32"]:
            rows += [{"case": case, "optimizer": optimizer, "network": network} for network in options.networks]
    return rows


def in_own_process(options: argparse.Namespace, row: dict[str, str]) -> dict[str, Any]:
    """The row with its figures, or with the reason why it has none."""
    needs = [name for name, needed in (
        ("diffusers", row["network"] == "diffusers"),
        ("peft", row["case"].startswith("lora")),
        ("torchao", row["optimizer"].startswith("rounded")),
    ) if needed and importlib.util.find_spec(name) is None]  # fmt: skip
    if needs:
        return {**row, "failed": f"{needs[0]} is not installed"}
    print(f"{row['case']}, {row['optimizer']}, {row['network']} …", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--row", json.dumps(row)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return {**row, **json.loads(done.stdout.splitlines()[-1])}
    lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["no reason given"]
    return {**row, "failed": "out of memory" if "OutOfMemory" in lines[-1] else lines[-1][:200]}


# ---------------------------------------------------------------------------------------------------- one row


def measure(options: argparse.Namespace, case: str, optimizer: str, network: str) -> dict[str, Any]:
    """Seconds a step, tokens a second, peak memory and the loss of the last step."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    is_lora = case.startswith("lora")
    dtype = torch.float32 if optimizer == "fp32" and not is_lora else torch.bfloat16
    checkpointing = options.lora_checkpointing if is_lora else options.checkpointing
    model = build(options, network, dtype)
    if is_lora:
        add_adapters(model, options.rank)
    prepare(model, network, checkpointing, options.compile)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = build_optimizer(trained, optimizer)
    batch = draw_batch(options, case)
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=dtype == torch.float32 or is_lora)

    def step() -> float:
        with autocast:
            predicted = run(model, network, batch)
        errors = [(p.float() - target.float()).square().mean() for p, target in zip(predicted, batch[3], strict=True)]
        loss = torch.stack(errors).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device, as a run that guards its steps does

    for _ in range(options.warmup):
        step()
    reset_peak(options)
    seconds, processor = [], []
    for _ in range(options.steps):
        began, worked = time.perf_counter(), time.process_time()
        loss = step()
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - worked)
    tokens = sum(map(sum, lengths(batch)))
    typical = statistics.median(seconds)
    return {
        "seconds": typical,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "processor_seconds": statistics.median(processor),
        "tokens_per_second": tokens / typical,
        "tflops": training_flops(options, batch, is_lora) / typical / 1e12,
        "peak_GiB": peak(options) / 2**30,
        "loss": loss,
        "tokens": tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained": sum(parameter.numel() for parameter in trained),
        "checkpointing": checkpointing,
    }


def sizes(options: argparse.Namespace) -> S3DiTConfig:
    config = vars(S3DiTConfig.preset("z-image-6b")) | (TINY if options.preset == "tiny" else {})
    return S3DiTConfig(**(config | ({"n_layers": options.layers} if options.layers else {})))


def build(options: argparse.Namespace, network: str, dtype: torch.dtype) -> Any:
    """Random weights, made where and as they are used: 6.15 B numbers are never there twice."""
    torch.set_default_dtype(dtype)
    with torch.device(options.device):
        if network == "ours":
            model: Any = S3DiT(sizes(options))
        else:
            from diffusers import ZImageTransformer2DModel

            config = {key: value for key, value in vars(sizes(options)).items() if key != "pad_multiple"}
            model = ZImageTransformer2DModel(**config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.train()


def add_adapters(model: nn.Module, rank: int) -> None:
    """Float32 adapters on the matrices of all main blocks; everything else is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    where = [name for name, _ in model.named_modules() if name.startswith("layers.")]
    targets = [name for name in where if any(name.endswith(f".{target}") for target in LORA_TARGETS)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def prepare(model: Any, network: str, checkpointing: str, compiled: bool) -> None:
    if network == "ours":
        parallelize(model, None, ParallelizeSettings(activation_checkpointing=checkpointing, compile=compiled))  # type: ignore[arg-type]
        return
    if checkpointing != "none":  # it knows all or nothing
        model.enable_gradient_checkpointing()
    if compiled:
        model.compile_repeated_blocks()


def build_optimizer(trained: list[Any], name: str) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.99), "weight_decay": 0.01}
    if name in ("fused-bf16", "fp32"):
        return torch.optim.AdamW(trained, fused=True, **common)
    import torchao.optim

    if name == "rounded-8bit":
        return torchao.optim.AdamW8bit(trained, bf16_stochastic_round=True, **common)

    class Rounded(torchao.optim._AdamW):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            return torch.zeros_like(p, dtype=torch.float32)

    return Rounded(trained, bf16_stochastic_round=True, **common)


def draw_batch(options: argparse.Namespace, case: str) -> Batch:
    """(noisy latents, t, caption features, velocities) of pictures of the case's sizes."""
    scale = 1 if options.preset == "z-image-6b" else 4
    if case == "lora packed":
        pictures, captions = PACKED, CAPTIONS
    else:
        side = int(case.split()[1])
        number = options.batch if case.startswith("full") else 1
        pictures, captions = [(side, side)] * number, [128] * number
    grids = [tuple(2 * max(1, round(side / scale / 16)) for side in picture) for picture in pictures]  # of latents
    captions = [max(4, length // scale) for length in captions]
    dice = random.Random(options.seed)
    generator = torch.Generator().manual_seed(options.seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(options.device)

    latents = [noise(16, *grid) for grid in grids]
    features = [noise(length, sizes(options).cap_feat_dim) for length in captions]
    t = torch.tensor([dice.random() for _ in grids], device=options.device)
    return latents, t, features, [noise(*latent.shape) for latent in latents]


def run(model: Any, network: str, batch: Batch) -> list[Tensor]:
    latents, t, features, _ = batch
    if network == "ours":
        return model(latents, t, features)
    dtype = next(model.parameters()).dtype
    frames = [latent.unsqueeze(1).to(dtype) for latent in latents]
    outputs = model(frames, t.to(dtype), [x.to(dtype) for x in features], return_dict=False)[0]
    return [output.squeeze(1) for output in outputs]


def lengths(batch: Batch) -> tuple[list[int], list[int]]:
    """(image tokens, caption tokens), one a sample."""
    return [latent[0].numel() // 4 for latent in batch[0]], [len(caption) for caption in batch[2]]


def training_flops(options: argparse.Namespace, batch: Batch, is_lora: bool) -> float:
    """Operations of a step, of either network: they have the same matrices."""
    with torch.device("meta"):
        twin = S3DiT(sizes(options))
        if is_lora:
            add_adapters(twin, options.rank)
    return TrainingWork(twin).flops(*lengths(batch))[0]


# ---------------------------------------------------------------------------------------------------- memory


def reset_peak(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(options: argparse.Namespace) -> int:
    """Bytes, weights and optimiser included."""
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


# ---------------------------------------------------------------------------------------------------- the table


def report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    name = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, {options.threads} threads"
    )
    tflops = options.peak_tflops
    if tflops is None and options.device == "cuda" and (known := peak_flops(name)):
        tflops = known / 1e12
    config = sizes(options)
    print(f"{name}; torch {torch.__version__}; {options.preset}, {config.n_layers} main blocks; blocks "
          f"{'compiled' if options.compile else 'not compiled'}; peak {tflops or 'unknown'} TFLOP/s")  # fmt: skip
    print(f"{'case':12}{'optimizer':>14}{'network':>11}{'s/step':>9}{'(range)':>16}{'processor':>11}{'steps/s':>9}"
          f"{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>7}{'peak GiB':>10}{'ours is':>9}")  # fmt: skip
    for row in rows:
        head = f"{row['case']:12}{row['optimizer']:>14}{row['network']:>11}"
        if "failed" in row:
            print(f"{head}   {row['failed']}")
            continue
        row["mfu"] = row["tflops"] / tflops if tflops else None
        ours = next((r for r in rows if same(r, row) and r["network"] == "ours" and "failed" not in r), None)
        # a CPU is shared: processor time says more than the clock there
        cost = "seconds" if options.device == "cuda" else "processor_seconds"
        row["ours_is_faster_by"] = row[cost] / ours[cost] if ours and row["network"] != "ours" else None
        span = f"{row['fastest']:.3f}-{row['slowest']:.3f}"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        ratio = f"{row['ours_is_faster_by']:.2f}x" if row["ours_is_faster_by"] else ""
        figures = f"{row['tokens_per_second']:>10.0f}{row['tflops']:>9.3g}{mfu:>7}{row['peak_GiB']:>10.2f}{ratio:>9}"
        print(f"{head}{row['seconds']:>9.3f}{span:>16}{row['processor_seconds']:>11.3f}{1 / row['seconds']:>9.2f}"
              f"{figures}")  # fmt: skip
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    result = {"device": name, "torch": torch.__version__, "peak_tflops": tflops, "options": settings, "rows": rows}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("case", "optimizer"))


if __name__ == "__main__":
    main()
