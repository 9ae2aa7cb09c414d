"""How fast a run is, how much of the GPU that is, and what it waits for."""

import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import nn

from zimage_lit.backbone import S3DiT
from zimage_lit.backbone.flops import TrainingWork, forward_flops, padded
from zimage_lit.errors import UserError
from zimage_lit.hardware import peak_flops

PAUSE = 5.0  # a step that takes so many times the usual one was held up: by validation, pictures, a checkpoint
SHOWN = ("throughput/images_per_second", "throughput/mfu")  # in the progress bar


@dataclass
class Forward:
    """What went through a network of the stage."""

    work: TrainingWork
    images: list[int]  # tokens of each sample's image
    captions: list[int]  # tokens of each sample's caption
    learns: bool  # whether a backward pass follows

    def flops(self) -> tuple[int, int]:
        """(the model's own, those executed)."""
        if self.learns:
            return self.work.flops(self.images, self.captions)
        alone = forward_flops(self.work.config, self.images, self.captions)
        return alone, alone


@dataclass
class BatchRecord:
    """One batch: when it began, and what went through the networks."""

    began: Any  # a CUDA event, or seconds
    waited: float  # seconds that this process has waited for data, from the start of training until then
    forwards: list[Forward]


@dataclass
class Window:
    """What happened on one rank between two points of the curves."""

    seconds: float
    pauses: float  # seconds of `PAUSE`s, not part of the above
    waited: float
    images: int
    tokens: int  # of images and captions, without pads
    packed_tokens: int  # with them
    model_flops: float
    executed_flops: float
    peak_memory: float  # bytes


class Throughput(Callback):
    """Logs `throughput/…` whenever the run logs; all ranks together, over the steps since the last point.

    images_per_second, tokens_per_second: what was trained on, tokens of images and captions without pads. Counted in
        the forwards that a backward pass follows, so a picture that is learnt from several times (the steps of a
        roll-out, its noised copies, the winner and the loser of a pair) counts as often.
    tflops: per device, of the model's own work: forward, backward to the inputs, and to the weights that are trained;
        of stages that draw, compare or judge with networks as well, those forwards too.
    mfu: that as a share of the device's peak in bfloat16. Not shown where the peak is unknown, as on a CPU.
    hfu: the same with what activation checkpointing computes again; only with `full`.
    data_wait: share of the time in which the slowest process waited for its next batch.
    padding: share of pads among the tokens that the backbone worked on.
    pause: share of the clock spent in pauses (validation, pictures, checkpoints, compiling): steps of more than
        five times the usual length, data apart. All else is measured without them.
    peak_memory_gib: the most of any rank since the last point: allocated on a GPU, resident on a CPU (there since the
        process began).

    peak_tflops: the device's, in bfloat16; None takes it from a table by the device's name.

    The work is counted from the lengths of the samples that pass through the stage's networks in training. Time on a
    GPU is taken by events, which nobody waits for before a point of the curves is due.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise UserError(f"Throughput: peak_tflops must be more than 0 (or null), not {peak_tflops}.")
        self.peak_tflops = peak_tflops
        self._records: list[BatchRecord] = []
        self._last_step = 0
        self._clock = FetchClock(None)
        self._hooks: list[Any] = []
        self._works: dict[int, TrainingWork] = {}  # by the identity of the network

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._clock = trainer.profiler = FetchClock(trainer.profiler)  # type: ignore[attr-defined]  # the public place that sees every fetch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._records, self._last_step = [], trainer.global_step
        settings = getattr(pl_module, "parallelize", None)
        again = getattr(settings, "activation_checkpointing", "none") == "full"
        for network in pl_module.modules():  # a module without any has its waiting and memory logged, and no work
            if isinstance(network, S3DiT):
                self._works[id(network)] = TrainingWork(network, again)
                self._hooks.append(network.register_forward_pre_hook(self._count))
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._records.append(BatchRecord(now(trainer.strategy.root_device), self._clock.waited, []))

    def _count(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        if network.training and self._records:  # pictures are drawn, and losses validated, in evaluation mode
            latents, _, captions = arguments
            work = self._works[id(network)]
            images = [latent[0].numel() // work.config.patch_size**2 for latent in latents]
            lengths = images, [len(caption) for caption in captions]
            self._records[-1].forwards.append(Forward(work, *lengths, learns=torch.is_grad_enabled()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        stepped = trainer.global_step != self._last_step  # else gradients are still being accumulated
        self._last_step = trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        is_due = stepped and every and trainer.global_step % every == 0
        if is_due and len(self._records) > 1:  # a batch ends where the next one begins: the one at hand has no end yet
            window = self.window(trainer.strategy.root_device)
            self._records = self._records[-1:]
            measured = self.measured(trainer, window)
            for name, value in measured.items():
                pl_module.log(name, value, prog_bar=name in SHOWN)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()

    def window(self, device: torch.device) -> Window:
        """This rank's figures from its records."""
        lasted = [seconds_between(a.began, b.began) for a, b in zip(self._records, self._records[1:], strict=False)]
        waits = [b.waited - a.waited for a, b in zip(self._records, self._records[1:], strict=False)]
        busy = [max(0.0, whole - wait) for whole, wait in zip(lasted, waits, strict=True)]
        limit = PAUSE * statistics.median(busy)
        kept = [place for place, seconds in enumerate(busy) if seconds <= limit]
        forwards = [forward for place in kept for forward in self._records[place].forwards]
        learnt = [forward for forward in forwards if forward.learns]
        multiple = learnt[0].work.config.pad_multiple if learnt else 1
        sizes = [size for forward in learnt for size in (*forward.images, *forward.captions)]
        work = [forward.flops() for forward in forwards]
        return Window(
            seconds=sum(lasted[place] for place in kept),
            pauses=sum(lasted) - sum(lasted[place] for place in kept),
            waited=sum(waits[place] for place in kept),
            images=sum(len(forward.images) for forward in learnt),
            tokens=sum(sizes),
            packed_tokens=sum(padded(size, multiple) for size in sizes),
            model_flops=sum(model for model, _ in work),
            executed_flops=sum(executed for _, executed in work),
            peak_memory=peak_memory(device),
        )

    def measured(self, trainer: Trainer, own: Window) -> dict[str, float]:
        """Name -> value, of all ranks together."""
        fields = list(vars(own))
        rows = [list(vars(own).values())]
        if trainer.world_size > 1:
            sent = torch.tensor(rows[0], dtype=torch.float64, device=trainer.strategy.root_device)
            rows = trainer.strategy.all_gather(sent).tolist()
        total = Window(**{name: sum(row[place] for row in rows) for place, name in enumerate(fields)})
        most = Window(**{name: max(row[place] for row in rows) for place, name in enumerate(fields)})
        seconds = max(most.seconds, 1e-9)
        values = {"data_wait": most.waited / seconds, "pause": most.pauses / (most.pauses + seconds)}
        values["peak_memory_gib"] = most.peak_memory / 2**30
        if total.images:
            values["images_per_second"] = total.images / seconds
            values["tokens_per_second"] = total.tokens / seconds
            values["padding"] = 1 - total.tokens / total.packed_tokens
            values["tflops"] = total.model_flops / seconds / len(rows) / 1e12
            peak = self.peak(trainer.strategy.root_device)
            if peak is not None:
                values["mfu"] = total.model_flops / seconds / len(rows) / peak
                if total.executed_flops > total.model_flops:
                    values["hfu"] = total.executed_flops / seconds / len(rows) / peak
        return {f"throughput/{name}": value for name, value in values.items()}

    def peak(self, device: torch.device) -> float | None:
        if self.peak_tflops is not None:
            return self.peak_tflops * 1e12
        return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class FetchClock(Profiler):
    """Measures how long the training waits for batches, and passes everything on to the profiler that it stands for."""

    def __init__(self, wrapped: Profiler | None) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.waited = 0.0  # seconds
        self._began = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._began = time.perf_counter()
        if self.wrapped is not None:
            self.wrapped.start(action_name)

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.waited += time.perf_counter() - self._began
        if self.wrapped is not None:
            self.wrapped.stop(action_name)

    def summary(self) -> str:
        return self.wrapped.summary() if self.wrapped is not None else ""

    def describe(self) -> None:
        if self.wrapped is not None:
            self.wrapped.describe()

    def setup(self, *arguments: Any, **named: Any) -> None:
        if self.wrapped is not None:
            self.wrapped.setup(*arguments, **named)

    def teardown(self, *arguments: Any, **named: Any) -> None:
        if self.wrapped is not None:
            self.wrapped.teardown(*arguments, **named)


def now(device: torch.device) -> Any:
    """A point in time: on a GPU the one at which it will have done what it has been given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Any, second: Any) -> float:
    if isinstance(first, float):
        return second - first
    second.synchronize()
    return first.elapsed_time(second) / 1000


def peak_memory(device: torch.device) -> float:
    """Bytes."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
