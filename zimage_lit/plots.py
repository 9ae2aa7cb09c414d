"""Curves over the steps of a run, as a picture for the HTML pages."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

COLOURS = ("#2244aa", "#cc5522", "#228855", "#884499", "#aa8800", "#448899")
Points = Sequence[tuple[int, float]]  # (step, value)


def line_plot(
    curves: Mapping[str, Points], label: str, colours: Sequence[str] = COLOURS, logarithmic: bool = False
) -> bytes:
    """All curves in one PNG; with more than one, their names beside it.   label: of the values."""
    plot = Figure(figsize=(9, 3), layout="tight")
    axes = plot.subplots()
    for i, (name, points) in enumerate(curves.items()):
        marker = "o" if len(points) == 1 else None
        axes.plot(*zip(*points, strict=True), color=colours[i % len(colours)], label=name, linewidth=1.5, marker=marker)
    axes.set(xlabel="step", ylabel=label, yscale="log" if logarithmic else "linear")
    if len(curves) > 1:
        axes.legend(fontsize="small")
    return as_png(plot)


def as_png(plot: Figure) -> bytes:
    """The figure's PNG, at 110 dots per inch."""
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def is_mean_reward(metric: str) -> bool:
    """Whether a logged metric is a reward's mean, `reward/<name>`, and not what is logged beside it."""
    return metric.startswith("reward/") and not metric.endswith(("_std", "_invalid"))
