"""Steps that would break the weights are not taken, and losses out of the ordinary are written down."""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from zimage_lit.errors import SharedError, UserError, at_least_one
from zimage_lit.files import write_atomically
from zimage_lit.run_folder import last_checkpoint

RECORDS = "guard.jsonl"  # in the run's folder: one line for each update that was skipped or stood out
SHOWN = 8  # samples that a message names; the file names all


@dataclass
class Watch:
    """What a guard has seen of one optimiser."""

    losses: deque[float]  # finite ones, means over ranks and accumulated batches
    in_a_row: int = 0  # updates that were skipped, the last of them now


class StepGuard(Callback):
    """Skips an optimiser step whose loss or gradient norm is not a finite number on any rank, on all ranks alike.

    A skipped step leaves weights, their average and the optimiser's state as they were; the step's number and the
    learning rate's schedule go on. Where the trainer counts several updates as one step, each is judged by itself, and
    the average follows where any was taken. With `max_skipped_in_a_row` skipped updates the run stops. A loss above
    `spike_factor` times the median of the last `spike_window` updates is written down, and its step taken; null turns
    that off.

    Both are counted (`guard/skipped`, `guard/spikes`) and written to `guard.jsonl` with the ids of the samples: those
    of all batches that the step accumulated, on the ranks whose own loss was at fault (on all, where only the gradient
    was). The counts survive a resume.

    A stage with several optimisers has its losses, and what was skipped in a row, judged for each of them by itself;
    records name it by its place, `optimizer`. A stage whose class says `hands_over_gradient_norm = True` calls
    `on_gradient_norm` between its clipping and the step; for any other module the norm is worked out here. Each step
    waits for the device once, to read loss and norm.
    """

    def __init__(
        self, max_skipped_in_a_row: int = 5, spike_factor: float | None = 3.0, spike_window: int = 200
    ) -> None:
        self.max_skipped_in_a_row = at_least_one("StepGuard: max_skipped_in_a_row", max_skipped_in_a_row)
        if spike_factor is not None and not 1 < spike_factor < math.inf:
            raise UserError(f"StepGuard: spike_factor must be more than 1 (or null for none), not {spike_factor}.")
        self.spike_factor = spike_factor
        self.spike_window = at_least_one("StepGuard: spike_window", spike_window)
        self.skipped = self.spikes = 0
        self.watches: dict[int, Watch] = {}  # by the optimiser's place
        self.taken = 0  # updates of the latest step of the trainer, which may have several
        self._losses: list[Tensor] = []  # of this rank since the last step, each divided by their number
        self._ids: list[Any] = []
        self._is_done = False  # whether any update has been judged since the last batch began

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What an interrupted run wrote after the checkpoint that it continues from will happen again."""
        path = Path(trainer.default_root_dir) / RECORDS
        if trainer.is_global_zero and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= trainer.global_step]
            write_atomically(path, "".join(kept))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._is_done:
            self.taken, self._ids, self._is_done = 0, [], False
        known = isinstance(batch, Mapping) and "ids" in batch
        self._ids += batch["ids"] if known else [f"all of batch {batch_idx}"]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not getattr(pl_module, "hands_over_gradient_norm", False):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.on_gradient_norm(trainer, pl_module, optimizer, torch.nn.utils.get_total_norm(gradients))

    def on_gradient_norm(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer, norm: Tensor
    ) -> None:
        """Judge the update that is about to be taken.   norm: of all gradients, over all ranks; not read before."""
        losses, norms = self.of_all_ranks(trainer, norm)
        loss, ids = sum(losses) / len(losses), self._ids
        place = next(i for i, known in enumerate(trainer.optimizers) if known is optimizer)
        watch = self.watch(place)
        self._losses, self._is_done = [], True
        if not all(map(math.isfinite, losses + norms)):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # what has no gradient is not touched, by any of torch's optimisers
            self.skipped += 1
            watch.in_a_row += 1
            at_fault = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
            self.report(trainer, "skipped", place, loss, norms[0], at_fault or list(range(len(losses))), ids)
            return
        watch.in_a_row = 0
        self.taken += 1
        usual = statistics.median(watch.losses) if len(watch.losses) >= self.spike_window / 4 else math.inf
        if self.spike_factor is not None and loss > self.spike_factor * usual:
            self.spikes += 1
            at_fault = [rank for rank, value in enumerate(losses) if value > self.spike_factor * usual]
            self.report(trainer, "spike", place, loss, norms[0], at_fault, ids)
        watch.losses.append(loss)

    def watch(self, place: int) -> "Watch":
        """What has been seen of the optimiser at this place."""
        return self.watches.setdefault(place, Watch(deque(maxlen=self.spike_window)))

    def of_all_ranks(self, trainer: Trainer, norm: Tensor) -> tuple[list[float], list[float]]:
        """(losses, gradient norms), one a rank: the one moment at which the processor waits for the device."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        losses = torch.stack(self._losses or [torch.zeros_like(norm)])
        own = torch.stack([losses.sum().float(), norm.detach().float().to(losses.device)])
        rows = trainer.strategy.all_gather(own).reshape(-1, 2).tolist()
        return [loss for loss, _ in rows], [norm for _, norm in rows]

    def report(
        self,
        trainer: Trainer,
        event: str,
        place: int,
        loss: float,
        norm: float,
        at_fault: list[int],
        own_ids: Sequence[Any],
    ) -> None:
        """Write the record and say it; stop the run where the steps that were skipped are too many."""
        step, path = trainer.global_step + 1, Path(trainer.default_root_dir) / RECORDS
        in_a_row = self.watch(place).in_a_row
        ids = [
            name for rank, names in enumerate(gathered(trainer, list(own_ids))) if rank in at_fault for name in names
        ]
        numbers = {
            name: value if math.isfinite(value) else str(value)  # JSON knows no NaN
            for name, value in (("loss", loss), ("gradient_norm", norm))
        }
        which = {"optimizer": place} if len(trainer.optimizers) > 1 else {}
        if trainer.is_global_zero:
            record = {"step": step, "event": event, **which, **numbers, "ranks": at_fault, "ids": ids}
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        shown = ", ".join(map(str, ids[:SHOWN])) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
        told = f"loss {loss:.4g}, gradient norm {norm:.4g}, samples {shown}"
        if event == "spike":
            rank_zero_warn(f"an update at step {step} stands out: {told}")
        elif in_a_row < self.max_skipped_in_a_row:
            rank_zero_warn(f"an update at step {step} is skipped, its loss or gradient is not finite: {told}")
        else:
            last = last_checkpoint(Path(trainer.default_root_dir))
            good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been written before"
            raise SharedError(
                f"{in_a_row} updates in a row had a loss or gradient that is not finite, the last of them at step "
                f"{step} ({told}); {good}: lower the learning rate and continue from it with run.resume=PATH, or "
                f"prepare the data without the samples that {path} names for a run of its own."
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        if every and trainer.global_step % every == 0:
            pl_module.log_dict({"guard/skipped": float(self.skipped), "guard/spikes": float(self.spikes)})

    def state_dict(self) -> dict[str, Any]:
        watches = {place: {"in_a_row": w.in_a_row, "losses": list(w.losses)} for place, w in self.watches.items()}
        return {"skipped": self.skipped, "spikes": self.spikes, "watches": watches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.spikes = state_dict["skipped"], state_dict["spikes"]
        older = {0: state_dict}  # of runs from when a stage had one optimiser, always
        for place, stored in state_dict.get("watches", older).items():
            self.watch(place).in_a_row = stored["in_a_row"]
            self.watch(place).losses.extend(stored["losses"])


def gathered(trainer: Trainer, own: list[Any]) -> list[list[Any]]:
    """One list a rank, on every rank."""
    if trainer.world_size == 1:
        return [own]
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def step_was_skipped(trainer: Trainer) -> bool:
    """Whether a StepGuard skipped all updates of the trainer's last step: the weights are still those before it."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it without declaring it
    return any(isinstance(callback, StepGuard) and callback.taken == 0 for callback in callbacks)
