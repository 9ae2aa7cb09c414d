"""One self-contained HTML page about a run: pictures over time, scores, curves of loss and rewards, the settings."""

import html
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from zimage_lit.callbacks.tinyworld_score import TinyWorldScore
from zimage_lit.errors import at_least_one
from zimage_lit.files import write_atomically
from zimage_lit.pages import document, figure
from zimage_lit.plots import is_mean_reward, line_plot

LOSS = "loss"


class HTMLReport(Callback):
    """Writes `report.html` into the run's folder when training ends; readable on its own, with nothing to fetch.

    every_n_steps: optimiser steps between two points of a curve, each the mean over the steps between.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        self.every_n_steps = at_least_one("HTMLReport: every_n_steps", every_n_steps)
        self.curves: dict[str, list[tuple[int, float]]] = {}  # LOSS, and each reward's `reward/<name>`
        self._recent: dict[str, list[float]] = {}  # since the last point

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        rewards = {name: value for name, value in trainer.callback_metrics.items() if is_mean_reward(name)}
        for name, value in {LOSS: outputs["loss"], **rewards}.items():
            if math.isfinite(number := float(value)):  # a step that was skipped has none
                self._recent.setdefault(name, []).append(number)
        if trainer.global_step % self.every_n_steps == 0:
            self.add_point(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.add_point(trainer.global_step)

    def add_point(self, step: int) -> None:
        """The means since the last point."""
        for name, values in self._recent.items():
            self.curves.setdefault(name, []).append((step, sum(values) / len(values)))
        self._recent = {}

    @rank_zero_only
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After every other callback's last word, so that final samples and scores are in."""
        if stage != "fit" or trainer.interrupted or not self.curves:
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
            "<h2>Curves</h2>",
            *curve_figures(self.curves),
            "<h2>Settings</h2>",
            f"<pre>{html.escape(config_text(folder))}</pre>",
        ]
        return document(folder.name, "".join(parts))

    def state_dict(self) -> dict[str, Any]:
        return {"curves": self.curves, "recent": self._recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = {name: [tuple(point) for point in points] for name, points in state_dict["curves"].items()}
        self._recent = {name: list(values) for name, values in state_dict["recent"].items()}


def parameters(trainer: Trainer) -> int:
    return sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad)


def chosen(paths: list[Path], most: int = 6) -> list[Path]:
    """At most `most` grids, spread evenly, the first and the last among them."""
    if len(paths) <= most:
        return paths
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def step_of(path: Path) -> str:
    return f"step {int(path.stem.split('-')[1])}"


def curve_figures(curves: Mapping[str, list[tuple[int, float]]]) -> Iterator[str]:
    """The rewards in one picture, if there are any; the loss with a running mean, logarithmic where it can be."""
    if rewards := {name: points for name, points in curves.items() if name != LOSS}:
        yield figure(line_plot(rewards, "reward"), ", ".join(rewards))
    if losses := curves.get(LOSS):
        steps, values = zip(*losses, strict=True)
        window = max(1, len(values) // 20)
        smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
        both = {"loss": losses, "its mean over a twentieth of the run": list(zip(steps, smooth, strict=True))}
        yield figure(line_plot(both, "loss", ("#bbccee", "#2244aa"), logarithmic=min(values) > 0), "the stage's loss")


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
