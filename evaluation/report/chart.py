"""A chart of scores with intervals, published ones beside them, as SVG inside the page."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

OUR_COLORS = ("#1f4fa8", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0e7490")
ANCHOR_COLORS = ("#d946a0", "#8b6f00", "#16a34a", "#0891b2", "#6b7280")
LABELS, WIDTH, LINE = 190, 640, 16  # pixels: of the names, of the scale, of one model's line
TICKS = 5


class Series(NamedTuple):
    """One model's scores by name, in [0, 1]: (score, low, high), low and high None where there is no interval."""

    model: str
    scores: Mapping[str, tuple[float, float | None, float | None]]


def score_chart(names: Sequence[str], ours: Sequence[Series], anchors: Sequence[Series], times: float) -> str:
    """A row for each of the `names`: a line with a dot for each of our models, a mark for each published number."""
    row = LINE * len(ours) + 12
    height = row * len(names) + 28
    parts = [
        f"<svg class='chart' viewBox='0 0 {LABELS + WIDTH + 20} {height}' role='img' aria-label='scores'>",
        *(grid_line(tick / TICKS, height - 24, times) for tick in range(TICKS + 1)),
    ]
    for place, name in enumerate(names):
        top = row * place + 6
        parts.append(f"<text x='{LABELS - 10}' y='{top + row / 2}' text-anchor='end'>{escape(name)}</text>")
        for number, series in enumerate(anchors):
            if name in series.scores:
                parts.append(
                    anchor_mark(series, name, ANCHOR_COLORS[number % len(ANCHOR_COLORS)], top, row - 12, times)
                )
        for number, series in enumerate(ours):
            if name in series.scores:
                color = OUR_COLORS[number % len(OUR_COLORS)]
                parts.append(our_mark(series, name, color, top + LINE * number + LINE / 2, times))
    return "".join([*parts, "</svg>", legend(ours, anchors)])


def at(score: float) -> float:
    """Where a score lies on the scale."""
    return round(LABELS + WIDTH * min(max(score, 0.0), 1.0), 1)


def grid_line(score: float, bottom: float, times: float) -> str:
    x = at(score)
    return (
        f"<line x1='{x}' x2='{x}' y1='0' y2='{bottom}' stroke='#e5e5e5'/>"
        f"<text x='{x}' y='{bottom + 18}' text-anchor='middle' fill='#666'>{score * times:g}</text>"
    )


def anchor_mark(series: Series, name: str, color: str, top: float, height: float, times: float) -> str:
    x, score = at(series.scores[name][0]), series.scores[name][0]
    return (
        f"<line x1='{x}' x2='{x}' y1='{top - 2}' y2='{top + height + 2}' stroke='{color}' stroke-width='2.5'>"
        f"<title>{escape(series.model)}: {score * times:g}</title></line>"
    )


def our_mark(series: Series, name: str, color: str, y: float, times: float) -> str:
    score, low, high = series.scores[name]
    line = ""
    if low is not None and high is not None:
        line = (
            f"<line x1='{at(low)}' x2='{at(high)}' y1='{y}' y2='{y}' stroke='{color}' stroke-width='5' opacity='.35'/>"
        )
    dot = f"<circle cx='{at(score)}' cy='{y}' r='5' fill='{color}'>"
    return f"{line}{dot}<title>{escape(series.model)}: {score * times:.4g}</title></circle>"


def legend(ours: Sequence[Series], anchors: Sequence[Series]) -> str:
    def entry(series: Series, color: str, sign: str) -> str:
        return f"<span><b style='color:{color}'>{sign}</b> {escape(series.model)}</span>"

    entries = [
        *(entry(series, OUR_COLORS[i % len(OUR_COLORS)], "●") for i, series in enumerate(ours)),
        *(entry(series, ANCHOR_COLORS[i % len(ANCHOR_COLORS)], "|") for i, series in enumerate(anchors)),
    ]
    return f"<p class='legend'>{' '.join(entries)}</p>"
