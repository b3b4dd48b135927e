"""Figures as PNG bytes: drawn with the Agg canvas alone, no pyplot, no global state, the same bytes again.

Colours are Okabe and Ito's, which colour-blind readers tell apart; lines differ in dash as well.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

from stage1_pro.metrics.selective import risk_coverage

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
SIZE = (5.4, 3.5)
# More points than a printed line can show only make the drawing slow.
CURVE_POINTS = 2000


def risk_coverage_png(
    confidence: ArrayLike, error: ArrayLike, *, point: tuple[float, float] | None = None, band: ArrayLike | None = None
) -> bytes:
    """Draw the share of wrong answers among the surest rows against their share of all rows.

    Args:
        confidence: [N], N >= 1, higher is surer.
        error: [N] in [0, 1].
        point: (coverage, risk) of a policy to mark.
        band: [3, M] coverage, low and high risk, to shade.
    """
    curve = risk_coverage(confidence, error)
    kept = np.unique(np.linspace(0, curve.coverage.size - 1, CURVE_POINTS).round().astype(int))
    coverage, risk = curve.coverage[kept], curve.selective_risk[kept]
    figure, axes = _canvas("coverage: share of photos answered by Stage A", "share wrong among them")
    if band is not None:
        x, low, high = np.asarray(band, np.float64)
        axes.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0, label="interval")
    # A tie group enters whole, so between two achievable points there is nothing: dots when there are few.
    axes.plot(
        coverage, risk, color=BLUE, linewidth=2, marker="o" if coverage.size <= 30 else None, label="all thresholds"
    )
    top = float(risk.max())
    if point is not None:
        axes.plot(
            *point, "D", color=VERMILION, markersize=9, label=f"policy: {point[0]:.0%} answered, {point[1]:.1%} wrong"
        )
        top = max(top, point[1])
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, max(top * 1.15, 0.01))
    _percent(axes, x=True, y=True)
    _legend(axes)
    return _png(figure)


def reliability_png(probability: ArrayLike, correct: ArrayLike, *, bins: int = 10) -> bytes:
    """Draw how often answers of a confidence are right, in bins of equal width, with their counts.

    Args:
        probability: confidence [N] in [0, 1].
        correct: bool [N].
        bins: how many of equal width between the smallest confidence, rounded down to .1, and 1.
    """
    sure, right = np.asarray(probability, np.float64), np.asarray(correct, np.float64)
    start = np.floor(float(sure.min()) * 10) / 10 if sure.min() < 1 else 0.5
    edges = np.linspace(start, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, sure, side="right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    kept = count > 0
    mean_sure = np.bincount(place, sure, bins)[kept] / count[kept]
    mean_right = np.bincount(place, right, bins)[kept] / count[kept]
    figure, axes = _canvas("confidence of Stage A", "share of right answers")
    axes.plot([start, 1], [start, 1], color=GREY, linestyle="--", linewidth=1, label="as sure as right")
    area = 20 + 400 * count[kept] / sure.size
    axes.plot(mean_sure, mean_right, color=BLUE, linewidth=1)
    axes.scatter(mean_sure, mean_right, s=area, color=BLUE, label="measured (numbers: photos)")
    for x, y, n in zip(mean_sure, mean_right, count[kept], strict=True):
        axes.annotate(str(n), (x, y), xytext=(0, -20), textcoords="offset points", ha="center", fontsize=8, color=GREY)
    axes.set_xlim(start - 0.02, 1.02)
    axes.set_ylim(min(start, float(mean_right.min())) - 0.12, 1.05)
    _percent(axes, x=True, y=True)
    _legend(axes)
    return _png(figure)


def confidence_png(confidence: ArrayLike, correct: ArrayLike, *, threshold: float | None = None) -> bytes:
    """Draw how many right and wrong answers there are at each confidence; counts on a log scale.

    Args:
        confidence: [N] in [0, 1].
        correct: bool [N].
        threshold: exit threshold to mark.
    """
    sure, right = np.asarray(confidence, np.float64), np.asarray(correct, dtype=bool)
    edges = np.linspace(min(np.floor(float(sure.min()) * 20) / 20, 0.95), 1, 26).tolist()
    figure, axes = _canvas("confidence of Stage A", "photos (log scale)")
    axes.hist(sure[right], edges, color=BLUE, alpha=0.35, label=f"right ({int(right.sum())})")
    axes.hist(
        sure[~right],
        edges,
        histtype="step",
        color=VERMILION,
        linewidth=2,
        hatch="///",
        label=f"wrong ({int((~right).sum())})",
    )
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1.5, label=f"threshold {threshold:.4g}")
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_ylim(bottom=0)
    _percent(axes, x=True)
    _legend(axes)
    return _png(figure)


def training_png(epochs: Sequence[float], series: Mapping[str, Sequence[float]]) -> bytes:
    """Draw one small panel per series over the epochs; NaN leaves a gap.

    Args:
        epochs: [E], one number an epoch.
        series: title to values [E].
    """
    figure = Figure(figsize=(SIZE[0], 1.75 * len(series)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(len(series), 1, sharex=True))
    for axes, (title, values), color in zip(
        panels, series.items(), [BLUE, VERMILION, GREEN, ORANGE] * len(series), strict=False
    ):
        axes.plot(epochs, values, color=color, marker="o", markersize=4, linewidth=1.5)
        axes.set_title(title, loc="left", fontsize=10)
        _clean(axes)
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def _canvas(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _clean(axes)
    return figure, axes


def _legend(axes: Axes) -> None:
    # Above the axes, where no line of anybody's data runs through it.
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=3, columnspacing=1.2)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _percent(axes: Axes, *, x: bool = False, y: bool = False) -> None:
    formatter = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
    for axis, wanted in ((axes.xaxis, x), (axes.yaxis, y)):
        if wanted:
            axis.set_major_formatter(formatter)
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # The Software entry names the library's version, which would change the bytes.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    figure.clear()
    return buffer.getvalue()
