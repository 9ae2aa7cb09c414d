"""`lightning run plan EXPERIMENT devices=8 gpu_memory=80`: what a run takes, before anything is spent.

The backbone is built on the meta device, where it has sizes and no values; memory and work follow from these sizes and
from the lengths of the longest samples. Nothing is loaded, downloaded or trained.

A GPU's memory is most in use at one of a few moments: as the backward pass begins (all activations, and what one block
needs to work) or ends (all gradients), in the optimiser's step, or between steps, when pictures are drawn. The parts
are those of the largest of these moments; gradients, say, are not there when the backward pass begins. Not counted are
pictures on their way through the codec, which pass before there are activations.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from zimage_lit.backbone.flops import TrainingWork
from zimage_lit.backbone.memory import activation_bytes, working_bytes
from zimage_lit.config import compose, settings_from
from zimage_lit.errors import UserError
from zimage_lit.hardware import peak_flops
from zimage_lit.lora import kept_weights
from zimage_lit.plan_inputs import NOT_GIVEN, Training, arguments, compose_leniently, read_training
from zimage_lit.stages.optimizers import is_block_matrix

GIB = 2**30


@dataclass
class PlanSettings:
    """What `lightning run plan` takes beside the experiment's own settings."""

    experiment: str  # its name or file; the first word after `plan`
    devices: int | None = None  # GPUs, all machines together; null: the experiment's
    gpu: str = "h100"  # what each of them is; its peak in bfloat16 is looked up by this name
    gpu_memory: float = 80.0  # GiB of one of them
    peak_tflops: float | None = None  # its peak in bfloat16 in place of the table's
    mfu: float = 0.4  # share of that peak which the run reaches, assumed
    gpu_hour_price: float = 2.0  # of one GPU, in any currency
    caption_tokens: int | None = None  # of the longest caption; null: the prepared data's, else 512
    overhead: float | None = None  # GiB of CUDA and its libraries; null: 1.5, with several GPUs 2.5, on a CPU none
    margin: float = 0.05  # share on top of all that torch allocates, for the gaps between blocks of memory
    json: str | None = None  # a file for the same figures
    overrides: list[str] = field(default_factory=list)  # of the experiment: written as for `run`, trainer.max_steps=100

    def __post_init__(self) -> None:
        for name in ("devices", "caption_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("gpu_memory", "peak_tflops", "mfu"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be more than 0, not {getattr(self, name)}.")
        for name in ("gpu_hour_price", "overhead", "margin"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be 0 or more, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Plan:
    """The answer. Bytes are of one device; flops of one device and optimiser step."""

    parameters: int
    trained: int
    memory: dict[str, int]  # part -> bytes
    moment: str  # at which these are in use together
    total: int  # the parts, the gaps between them and the overhead
    fits: bool
    flops: float  # those executed, recomputing included
    images: int  # per step, all devices
    step_seconds: float | None  # None: the peak of the device is not known
    steps: int | None
    gpu_hours: float | None
    cost: float | None


def plan_task(settings: Mapping[str, Any]) -> int:
    """The `plan` task. Returns 0 where the run fits the GPUs and 1 where it does not."""
    asked = settings_from(PlanSettings, settings)
    config = compose_leniently(asked.experiment, asked.overrides)
    training = read_training(config, asked.devices, asked.caption_tokens)
    found = make_plan(training, asked)
    attempts = [] if found.fits else list(advice(asked, config, training))
    show(asked, training, found, attempts)
    if asked.json:
        Path(asked.json).write_text(json.dumps(as_json(asked, found, attempts), indent=2) + "\n", encoding="utf-8")
    return 0 if found.fits else 1


def make_plan(training: Training, asked: PlanSettings) -> Plan:
    """Memory, work and cost of a run on GPUs as they are asked for."""
    parameters = list(training.backbone.parameters())
    moment, memory = memory_parts(training)
    overhead = asked.overhead
    if overhead is None:
        overhead = 0.0 if not training.on_gpu else 1.5 if training.devices == 1 else 2.5
    total = round(sum(memory.values()) * (1 + asked.margin) + overhead * GIB)
    again = training.keeping.checkpointing == "full"
    _, executed = TrainingWork(training.backbone, again).flops(training.images, training.captions)
    flops = executed * training.accumulate
    peak = peak_flops(asked.gpu) if training.on_gpu else None
    if asked.peak_tflops:
        peak = asked.peak_tflops * 1e12
    seconds = flops / (peak * asked.mfu) if peak else None
    hours = training.steps * training.devices * seconds / 3600 if seconds and training.steps else None
    return Plan(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        memory=memory,
        moment=moment,
        total=total,
        fits=total <= asked.gpu_memory * GIB,
        flops=flops,
        images=len(training.images) * training.accumulate * training.devices,
        step_seconds=seconds,
        steps=training.steps,
        gpu_hours=hours,
        cost=hours * asked.gpu_hour_price if hours is not None else None,
    )


# ---------------------------------------------------------------------------------------------------- memory


def memory_parts(training: Training) -> tuple[str, dict[str, int]]:
    """The moment of a step at which most memory is in use, and part -> bytes on one device: what is there all the time,
    and what that moment adds."""
    backbone, shards = training.backbone, training.shards
    averaged = kept_weights(backbone).values() if training.average else []
    gradients = gradient_bytes(training)
    steady = {
        "weights": tensor_bytes(backbone.parameters()) // shards,
        "optimiser states": optimizer_bytes(training) // shards,
        "average of the weights": sum(4 * weight.numel() for weight in averaged) // shards,  # always float32
        "gradients once more (DDP)": gradients if training.strategy == "ddp" else 0,  # in the buckets that are summed
        "text encoder and codec": training.frozen,
    }
    moment, parts = max(moments_of(training).items(), key=lambda moment: sum(moment[1].values()))
    return moment, steady | parts


def moments_of(training: Training) -> dict[str, dict[str, int]]:
    """Moment of a step -> part -> bytes on one device."""
    sizes = training.backbone.config, training.images, training.captions, training.keeping
    gradients, working = gradient_bytes(training), working_bytes(*sizes)
    copies, copies_later = copies_bytes(training)
    named = "gathered blocks" if training.strategy == "fsdp2" else "weights in bfloat16"
    # the average is drawn with in the place of the weights, which wait beside it
    waiting = tensor_bytes(kept_weights(training.backbone).values()) // training.shards if training.average else 0
    accumulated = gradients if training.accumulate > 1 else 0
    activations = activation_bytes(*sizes)
    return {
        "the forward pass ends": {"activations": activations, named: copies, "gradients": accumulated},
        "the backward pass begins": {
            "activations": activations,
            "working memory": working,
            named: copies_later,
            "gradients": accumulated,
        },
        "the backward pass ends": {"working memory": working, named: copies_later, "gradients": gradients},
        "the optimiser steps": {"working memory": optimizer_working_bytes(training), "gradients": gradients},
        "pictures are drawn": {"weights that wait": waiting},
    }


def gradient_bytes(training: Training) -> int:
    return tensor_bytes(p for p in training.backbone.parameters() if p.requires_grad) // training.shards


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def copies_bytes(training: Training) -> tuple[int, int]:
    """Weights in the type of the products, beside those that are kept: in the forward pass, in the backward pass.

    Autocast keeps a copy of each float32 matrix that is trained until the forward pass is over, and where the backward
    pass reads it, until that is: with checkpointing it makes a block's copies anew. FSDP2 gathers a block at a time,
    and the next one while this one is at work; in the backward pass there is also one block's gradient, and once more
    in the float32 that ranks sum it in.
    """
    backbone, width = training.backbone, training.keeping.width
    blocks = [*backbone.layers, *backbone.noise_refiner, *backbone.context_refiner]
    if training.strategy == "fsdp2":
        largest = max((count(block.parameters()) for block in blocks), default=0)
        trained = max((count(p for p in block.parameters() if p.requires_grad) for block in blocks), default=0)
        root = count(backbone.parameters()) - sum(count(block.parameters()) for block in blocks)
        gathered = (2 * largest + root) * width
        return gathered, gathered + trained * (width + 4)
    if not training.keeping.autocast:
        return 0, 0
    everything = count(cast_matrices(backbone)) * width
    if training.keeping.checkpointing == "none":
        return everything, everything
    one_block = max((count(cast_matrices(block)) for block in blocks), default=0) * width
    kept = count(p for p in cast_matrices(backbone) if p.requires_grad) * width
    return max(kept, one_block), one_block


def cast_matrices(module: nn.Module) -> Iterator[Tensor]:
    return (p for p in module.parameters() if p.ndim > 1 and p.dtype == torch.float32)


def count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def optimizer_bytes(training: Training) -> int:
    """The states of all trained weights together."""
    name, rounding = training.optimizer.get("name", "adamw"), training.optimizer.get("stochastic_rounding", False)
    total = 0.0
    for parameter_name, p in training.backbone.named_parameters():
        if not p.requires_grad:
            continue
        if name == "adamw8bit":
            total += 2 * p.numel() * (1 + 4 / 256)  # two moments of a byte, a float32 scale for 256 values
        elif name == "muon" and is_block_matrix(parameter_name, p):
            total += p.numel() * p.element_size()
        else:
            total += 2 * p.numel() * (4 if rounding else p.element_size())
    return round(total)


def optimizer_working_bytes(training: Training) -> int:
    """Muon turns all matrices of one shape together: their momentum in float32, and three copies in bfloat16."""
    if training.optimizer.get("name") != "muon":
        return 0
    shapes: dict[torch.Size, int] = defaultdict(int)
    for name, p in training.backbone.named_parameters():
        if p.requires_grad and is_block_matrix(name, p):
            shapes[p.shape] += p.numel()
    return max(shapes.values(), default=0) * (4 + 3 * 2)


# ---------------------------------------------------------------------------------------------------- advice


@dataclass(frozen=True)
class Attempt:
    """Other settings for the same run."""

    what: str
    overrides: list[str]  # of the experiment, beside those asked for
    devices: int
    plan: Plan


def advice(asked: PlanSettings, config: Mapping[str, Any], training: Training) -> Iterator[Attempt]:
    """What else could be tried, cheapest first, each on top of those before it, up to the first that fits; and LoRA."""
    kept: list[str] = []
    total = make_plan(training, asked).total
    for what, overrides, devices in changes(config, training):
        attempt = tried(asked, what, merged_overrides(kept, overrides), devices)
        if attempt.plan.total > HELPS * total:
            continue
        yield attempt
        kept, total = attempt.overrides, attempt.plan.total
        if attempt.plan.fits:
            break
    if training.keeping.adapters is None:
        keep = [word for word in kept if not word.startswith((OPTIMIZER, "trainer.strategy"))]
        yield tried(asked, "LoRA in place of all weights", [*keep, *LORA], training.devices)


PARALLELIZE = "model.init_args.parallelize.activation_checkpointing"
OPTIMIZER = "model.init_args.optimizer.name"
LORA = ["model.init_args.lora.rank=64", "model.init_args.lora.base_dtype=bfloat16"]
MOST_DEVICES = 64
HELPS = 0.99  # a change that leaves more than this share of the memory is not worth its price


def changes(config: Mapping[str, Any], training: Training) -> Iterator[tuple[str, list[str], int]]:
    """(what, overrides, devices) of each step of the advice."""
    devices = training.devices
    if training.keeping.checkpointing != "full":
        yield "full activation checkpointing", [f"{PARALLELIZE}=full"], devices
    settings, accumulate, count = arguments(config["data"]), training.accumulate, len(training.images)
    name = "token_budget" if settings.get("token_budget") else "batch_size"
    size = int(settings.get(name) or count)
    while count > 1 and not isinstance(settings.get("data"), dict):
        count, size, accumulate = count // 2, size // 2, accumulate * 2
        smaller = [f"data.init_args.{name}={size}", f"trainer.accumulate_grad_batches={accumulate}"]
        yield f"batches of half the size, {accumulate} a step", smaller, devices
    if training.optimizer.get("name", "adamw") != "adamw8bit" and training.keeping.adapters is None:
        yield "8-bit optimiser states", [f"{OPTIMIZER}=adamw8bit"], devices
    if devices > 1 and training.strategy != "fsdp2":
        yield "shards (FSDP2)", ["trainer.strategy=fsdp2"], devices
    while training.on_gpu and devices < MOST_DEVICES:
        devices *= 2
        yield f"{devices} devices", ["trainer.strategy=fsdp2", f"trainer.devices={devices}"], devices


def merged_overrides(first: list[str], second: list[str]) -> list[str]:
    """Both, the later value of a key in place of the earlier one."""
    return [f"{k}={v}" for k, v in dict(word.split("=", 1) for word in [*first, *second]).items()]


def tried(asked: PlanSettings, what: str, overrides: list[str], devices: int) -> Attempt:
    config = compose(asked.experiment, [*asked.overrides, *overrides], gaps=NOT_GIVEN)
    training = read_training(config, devices, asked.caption_tokens)
    return Attempt(what, overrides, devices, make_plan(training, asked))


# ---------------------------------------------------------------------------------------------------- the answer


def show(asked: PlanSettings, training: Training, found: Plan, attempts: list[Attempt]) -> None:
    """Print the plan."""
    console = Console()
    keeping = training.keeping
    shards = f", {training.shards} shard{'s' if training.shards > 1 else ''}"
    kind = {"one device": "", "ddp": ", a copy each", "fsdp2": shards}[training.strategy]
    console.print(f"[bold]{asked.experiment}[/] on {training.devices} x {asked.gpu_memory:g} GiB{kind}")
    if training.devices_guessed:
        console.print("all devices of a machine, taken for one here: give devices=8 (or as many as there are)")
    console.print(f"{found.parameters:,} parameters, {found.trained:,} of them trained")
    console.print(
        f"{found.images} pictures a step; a batch of {len(training.images)} on each device, at most "
        f"{max(training.images)} + {max(training.captions)} tokens a sample; activation checkpointing: "
        f"{keeping.checkpointing}"
    )
    console.print(f"memory of one device at its peak, when {found.moment}:")
    table = Table(min_width=46)
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for part, size in found.memory.items():
        if size:
            table.add_row(part, f"{size / GIB:.3f}")
    rest = found.total - sum(found.memory.values())
    table.add_row("gaps between blocks, CUDA", f"{rest / GIB:.3f}", end_section=True)
    table.add_row("together", f"{found.total / GIB:.3f}", style="bold")
    console.print(table)
    spare = asked.gpu_memory - found.total / GIB
    console.print(f"fits, {spare:.1f} GiB to spare" if found.fits else f"does not fit: {-spare:.1f} GiB too much")
    if attempts:
        show_attempts(console, attempts)
    show_cost(console, asked, found)


def show_attempts(console: Console, attempts: list[Attempt]) -> None:
    table = Table(title="what to change, each on top of those before", title_justify="left")
    for heading in ("change", "GiB", "fits", "GPU-hours"):
        table.add_column(heading, justify="left" if heading == "change" else "right")
    for attempt in attempts:
        hours = "" if attempt.plan.gpu_hours is None else f"{attempt.plan.gpu_hours:,.0f}"
        table.add_row(attempt.what, f"{attempt.plan.total / GIB:.1f}", "yes" if attempt.plan.fits else "no", hours)
    console.print(table)
    fitting = next((attempt for attempt in attempts if attempt.plan.fits), None)
    if fitting is None:
        console.print("none of these fits: take GPUs with more memory")
        return
    console.print(f"the first that fits, on {fitting.devices} device{'s' if fitting.devices > 1 else ''}:")
    console.print("\n".join(f"  {word}" for word in fitting.overrides), highlight=False, markup=False)


def show_cost(console: Console, asked: PlanSettings, found: Plan) -> None:
    console.print(f"{found.flops / 1e12:,.4g} TFLOP a step and device")
    if found.step_seconds is None:
        console.print("what the device can do at best is not known: give peak_tflops to see time and cost")
        return
    rate = found.images / found.step_seconds
    console.print(
        f"{found.step_seconds:.2f} s a step, {rate:.1f} pictures/s, if {asked.mfu:.0%} of the peak is reached"
    )
    if found.gpu_hours is None:
        console.print("how many steps is not known: give trainer.max_steps to see GPU-hours and cost")
        return
    price = f"{found.cost:,.0f} at {asked.gpu_hour_price:g} an hour"
    console.print(f"{found.steps:,} steps: {found.gpu_hours:,.1f} GPU-hours, {price}")


def as_json(asked: PlanSettings, found: Plan, attempts: list[Attempt]) -> dict[str, Any]:
    return {
        "settings": asdict(asked),
        **asdict(found),
        "attempts": [asdict(attempt) for attempt in attempts],
    }
