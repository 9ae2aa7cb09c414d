"""One self-contained HTML page about a run: pictures over time, scores, the loss curve, the settings."""

import html
import io
import math
from pathlib import Path
from typing import Any

import matplotlib
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from matplotlib.figure import Figure

from zimage_lit.callbacks.tinyworld_score import TinyWorldScore
from zimage_lit.errors import at_least_one
from zimage_lit.files import write_atomically
from zimage_lit.pages import document, figure

matplotlib.use("Agg")


class HTMLReport(Callback):
    """Writes `report.html` into the run's folder when training ends; readable on its own, with nothing to fetch.

    every_n_steps: optimiser steps between two points of the loss curve, each the mean over the steps between.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        self.every_n_steps = at_least_one("HTMLReport: every_n_steps", every_n_steps)
        self.losses: list[tuple[int, float]] = []
        self._recent: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        loss = float(outputs["loss"])
        if math.isfinite(loss):  # of a step that was skipped
            self._recent.append(loss)
        if trainer.global_step % self.every_n_steps == 0:
            self.add_point(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.add_point(trainer.global_step)

    def add_point(self, step: int) -> None:
        """The mean of the losses since the last point."""
        if self._recent:
            self.losses.append((step, sum(self._recent) / len(self._recent)))
            self._recent = []

    @rank_zero_only
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After every other callback's last word, so that final samples and scores are in."""
        if stage != "fit" or trainer.interrupted or not self.losses:
            return
        folder = Path(trainer.default_root_dir)
        path = folder / "report.html"
        page = self.page(trainer, folder)
        write_atomically(path, page)
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):
                logger.log_text(page, "report.html")
        rank_zero_info(f"report: {path}")

    def page(self, trainer: Trainer, folder: Path) -> str:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        samples = sorted((folder / "samples").glob("*.png"))
        scores = next((c.history for c in callbacks if isinstance(c, TinyWorldScore)), [])
        parts = [
            f"<h1>{html.escape(folder.name)}</h1>",
            f"<p>{trainer.global_step} optimiser steps, {parameters(trainer):,} trained parameters.</p>",
            "<h2>Samples while it learns</h2>" if samples else "",
            *[figure(path.read_bytes(), step_of(path)) for path in chosen(samples)],
            "<h2>Scores</h2>" + score_table(scores) if scores else "",
            "<h2>Loss</h2>",
            figure(loss_curve(self.losses), "the stage's loss, and its mean over a twentieth of the run"),
            "<h2>Settings</h2>",
            f"<pre>{html.escape(config_text(folder))}</pre>",
        ]
        return document(folder.name, "".join(parts))

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "recent": self._recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = [(int(step), float(loss)) for step, loss in state_dict["losses"]]
        self._recent = list(state_dict["recent"])


def parameters(trainer: Trainer) -> int:
    return sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad)


def chosen(paths: list[Path], most: int = 6) -> list[Path]:
    """At most `most` grids, spread evenly, the first and the last among them."""
    if len(paths) <= most:
        return paths
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def step_of(path: Path) -> str:
    return f"step {int(path.stem.split('-')[1])}"


def loss_curve(losses: list[tuple[int, float]]) -> bytes:
    """The curve as PNG, logarithmic, with a running mean over a twentieth of the run."""
    steps, values = zip(*losses, strict=True)
    window = max(1, len(values) // 20)
    smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    plot = Figure(figsize=(9, 3.5), layout="tight")
    axes = plot.subplots()
    axes.plot(steps, values, color="#bbccee", linewidth=1, marker="o" if len(values) == 1 else None)
    axes.plot(steps, smooth, color="#2244aa", linewidth=2)
    axes.set(xlabel="step", ylabel="train/loss", yscale="log")
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def score_table(history: list[dict[str, Any]]) -> str:
    """Accuracy by task, one column a scoring, with 95 % intervals."""

    def cell(score: dict[str, float]) -> str:
        return f"<td>{score['accuracy']:.3f} [{score['ci_low']:.2f}, {score['ci_high']:.2f}]</td>"

    head = "".join(f"<th>step {summary['step']}</th>" for summary in history)
    rows = [f"<tr><th>overall</th>{''.join(cell(summary['overall']) for summary in history)}</tr>"]
    for task, last in history[-1]["tasks"].items():
        cells = "".join(cell(summary["tasks"][task]) for summary in history)
        rows.append(f"<tr><td>{task} (n = {last['n']})</td>{cells}</tr>")
    note = (
        "Held-out combinations only. overall: unweighted mean of GenEval's six tasks; words are apart. "
        f"Brackets: {history[-1]['interval']}."
    )
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table><p>{html.escape(note)}</p>"


def config_text(folder: Path) -> str:
    path = folder / "config.yaml"
    return path.read_text(encoding="utf-8") if path.exists() else "(run without an experiment file)"
