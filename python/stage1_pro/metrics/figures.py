"""Figures as PNG bytes: drawn without pyplot or any global state, the same bytes again.

Colours are Okabe and Ito's, which colour-blind readers tell apart; lines differ in dash as well.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.metrics.estimate import Interval
from stage1_pro.metrics.probabilistic import calibration_bins
from stage1_pro.metrics.selective import relative_cost, risk_coverage


@contextlib.contextmanager
def _nothing_at_home() -> Iterator[None]:
    """Let matplotlib, which writes a list of fonts into the home where it is loaded, do so in a folder that goes again.

    Where it has folders of its own already it uses them, with the settings in them.
    """
    homes = [os.environ.get("XDG_CACHE_HOME", "~/.cache"), os.environ.get("XDG_CONFIG_HOME", "~/.config"), "~"]
    names = ("matplotlib", "matplotlib", ".matplotlib")
    known = [Path(os.path.expanduser(home), name) for home, name in zip(homes, names, strict=True)]  # noqa: PTH111
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ or any(one.is_dir() for one in known):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="stage1-fonts-") as folder:
        os.environ["MPLCONFIGDIR"] = folder
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]


with _nothing_at_home():
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
COLORS = (BLUE, VERMILION, GREEN, ORANGE)
# Of lines that marks in vermilion stand out from.
QUIET = (BLUE, GREEN, ORANGE, GREY)
DASHES = ("-", "--", "-.", ":")
SIZE = (5.4, 3.5)
# More points than a printed line can show only make the drawing slow.
CURVE_POINTS = 2000
# Where the band of the risk-coverage curve is measured: names for ``bootstrap``.
BAND_METRICS = tuple(f"risk_at_coverage_{share / 50:g}" for share in range(1, 51))


def risk_coverage_png(
    confidence: ArrayLike,
    error: ArrayLike,
    *,
    point: tuple[float, float] | None = None,
    band: ArrayLike | None = None,
    level: float = 0.95,
    title: str = "",
) -> bytes:
    """Draw the share of wrong answers among the surest rows against their share of all rows.

    Args:
        confidence: [N], N >= 1, higher is surer.
        error: [N] in [0, 1].
        point: (coverage, risk) of a policy to mark.
        band: [3, M] coverage, low and high risk at it, to shade; NaN leaves a gap.
        level: of the band.
        title: above the figure.
    """
    figure, axes = _canvas("coverage: share of rows answered, surest first", "share wrong among them")
    curve = risk_coverage(confidence, error)
    coverage, risk = curve.coverage, curve.selective_risk
    top = float(risk.max())
    if band is not None:
        x, low, high = np.asarray(band, np.float64)
        kept = ~np.isnan(low + high)
        if kept.any():
            axes.fill_between(x, low, high, color=BLUE, alpha=0.18, linewidth=0, label=f"{100 * level:.4g}% interval")
            # A handful of surest rows tells next to nothing; their huge interval must not flatten all the rest.
            top = max(float(risk[coverage >= 0.1].max()), float(np.quantile(high[kept], 0.9)))
    shown = np.unique(np.linspace(0, coverage.size - 1, CURVE_POINTS).round().astype(int))
    # A tie group enters whole, so between two achievable points there is nothing: dots when there are few.
    marker = "o" if coverage.size <= 30 else None
    axes.plot(coverage[shown], risk[shown], color=BLUE, linewidth=2, marker=marker, label="all thresholds")
    if point is not None:
        label = f"policy: {point[0]:.1%} answered, {point[1]:.2%} wrong"
        axes.plot(*point, "D", color=VERMILION, markersize=8, label=label)
        top = max(top, point[1])
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, max(top * 1.15, 0.01))
    return _finish(figure, axes, percent="xy", title=title)


def risk_band(intervals: Mapping[str, Interval]) -> NDArray[np.float64]:
    """Coverage, low and high risk [3, M] for ``risk_coverage_png``, from intervals of ``BAND_METRICS``."""
    measured = [(float(name.rpartition("_")[2]), intervals[name]) for name in BAND_METRICS]
    return np.array([(coverage, one.low, one.high) for coverage, one in measured]).T


def distribution_png(
    one: Interval,
    label: str,
    *,
    percent: bool = False,
    target: float | None = None,
    bound: float | None = None,
    target_label: str = "target",
) -> bytes:
    """Draw how a metric varies over its resamples, with its value, interval, target and upper bound.

    Args:
        one: the interval with its replicates; those that are NaN are left out, none at all leaves the lines alone.
        label: what the axis says.
        percent: the metric is a share, shown in percent.
        target: to mark, with ``target_label``.
        bound: upper bound to mark.
        target_label: the target's name in the legend.
    """
    value, low, high = one.value, one.low, one.high
    drawn = one.replicates[np.isfinite(one.replicates)]
    figure, axes = _canvas(label, "resamples")

    def text(number: float) -> str:
        return f"{100 * number:.3g}%" if percent else f"{number:.3g}"

    if math.isfinite(low) and math.isfinite(high):
        span = f"{100 * one.level:.4g}% interval {text(low)} to {text(high)}"
        axes.axvspan(low, high, color=BLUE, alpha=0.15, linewidth=0, label=span)
    marks = [number for number in (value, low, high, target, bound) if number is not None and math.isfinite(number)]
    if drawn.size:
        spread = float(drawn.max() - drawn.min())
        # All equal: one bar as wide as the figure allows it to be seen.
        reach = max(marks) - min(marks) if marks else 0.0
        width = spread / 30 or 0.05 * reach or 0.01
        # Shares of few rows take few values: bins that fall between them would leave a comb.
        values = np.unique(drawn)
        if values.size > 1:
            step = float(np.diff(values).min())
            width = max(width, step) if values.size <= 30 and spread / step <= 60 else width
        start = float(drawn.min()) - width / 2
        edges = start + width * np.arange(math.ceil(spread / width) + 2)
        axes.hist(drawn, edges.tolist(), color=BLUE, alpha=0.55)
    if math.isfinite(value):
        axes.axvline(value, color="black", linewidth=1.8, label=f"measured {text(value)}")
    if bound is not None and math.isfinite(bound):
        axes.axvline(bound, color=VERMILION, linewidth=1.8, linestyle=":", label=f"upper bound {text(bound)}")
    if target is not None:
        axes.axvline(target, color=GREEN, linewidth=1.8, linestyle="--", label=f"{target_label} {text(target)}")
    axes.set_ylim(bottom=0)
    if marks or drawn.size:
        ends = [*marks, *([float(drawn.min()), float(drawn.max())] if drawn.size else [])]
        room = 0.08 * (max(ends) - min(ends)) or 0.02
        axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if percent:
        axes.xaxis.set_major_formatter(FuncFormatter(_in_percent))
    return _finish(figure, axes)


def reliability_png(confidence: ArrayLike, correct: ArrayLike, *, bins: int = 15, error: float | None = None) -> bytes:
    """Draw how often answers of a confidence are right, in the equal bins that ``ece`` sums over, with their counts.

    Args:
        confidence: of the answer [N] in [0, 1].
        correct: bool [N].
        bins: of equal width over [0, 1]; empty ones are left out.
        error: the expected calibration error, for the legend.
    """
    count, sure, right = calibration_bins(confidence, correct, bins=bins)
    kept = np.flatnonzero(count)
    count, sure, right, start = count[kept], sure[kept], right[kept], kept[0] / bins
    figure, axes = _canvas("confidence of the answer", "share of right answers")
    axes.plot([start, 1], [start, 1], color=GREY, linestyle="--", linewidth=1, label="as sure as right")
    gap = "gap" if error is None else f"gap (ECE {error:.2%})"
    axes.vlines(sure, np.minimum(sure, right), np.maximum(sure, right), color=ORANGE, linewidth=3, label=gap)
    axes.plot(sure, right, color=BLUE, linewidth=1)
    axes.scatter(sure, right, s=20 + 300 * count / count.sum(), color=BLUE, zorder=3, label="measured, with rows")
    bottom = min(start, float(right.min())) - 0.02
    axes.set_xlim(start - 0.02, 1.03)
    axes.set_ylim(bottom - 0.16 * (1.05 - bottom), 1.05)
    # In a row of their own, the counts cannot run into points or lines.
    for x, n in zip(sure, count, strict=True):
        axes.annotate(f"{n}", (x, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=7, color=GREY)
    return _finish(figure, axes, percent="xy")


def confidence_png(confidence: ArrayLike, correct: ArrayLike, *, threshold: float | None = None) -> bytes:
    """Draw how many right and wrong answers there are at each confidence; counts on a log scale.

    Args:
        confidence: [N] in [0, 1].
        correct: bool [N].
        threshold: exit threshold to mark.
    """
    sure, right = np.asarray(confidence, np.float64), np.asarray(correct, dtype=bool)
    edges = np.linspace(min(np.floor(float(sure.min()) * 20) / 20, 0.95), 1, 26).tolist()
    figure, axes = _canvas("confidence of the answer", "answers (log scale)")
    axes.hist(sure[right], edges, color=BLUE, alpha=0.35, label=f"right ({int(right.sum())})")
    wrong = f"wrong ({int((~right).sum())})"
    axes.hist(sure[~right], edges, histtype="step", color=VERMILION, linewidth=2, hatch="///", label=wrong)
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1.5, label=f"threshold {threshold:.4g}")
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, percent="x")


def speedup_png(
    measured: Mapping[str, Sequence[tuple[float, float, float, float]]], *, tap: int, n_blocks: int
) -> bytes:
    """Draw how many times faster than a full pass the cascade is at each exit rate, beside what blocks alone allow.

    Args:
        measured: name of a line to its points: exit rate, speed-up, and its lower and upper quartile.
        tap: block that Stage A ends with.
        n_blocks: blocks of a full pass.
    """
    figure, axes = _canvas("exit rate: share of rows answered by Stage A", "speed-up over one full pass")
    rates = np.linspace(0, 1, 101)
    ideal, label = 1 / relative_cost(rates, tap, n_blocks), f"ideal: blocks only, tap {tap} of {n_blocks}"
    axes.plot(rates, ideal, color=GREY, linestyle="--", linewidth=1.5, label=label)
    axes.axhline(1, color=GREY, linewidth=0.8)
    for (name, points), color, marker in zip(measured.items(), cycle(COLORS), cycle("os^D"), strict=False):
        x, middle, low, high = np.array(sorted(points), np.float64).T
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(x, middle, color=color, marker=marker, markersize=4, linewidth=1.5, label=name)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, percent="x")


def latency_png(measured: Mapping[str, Sequence[tuple[float, float, float, float, float | None]]]) -> bytes:
    """Draw milliseconds of a batch against its deferral rate: medians as lines with their intervals, p99 above, dotted.

    Args:
        measured: name of a line to its points: deferral rate, p50, its lower and upper end, and p99 or None.
    """
    figure, axes = _canvas("deferral rate: share of rows that Stage B answers", "milliseconds of a batch")
    for (name, points), color, marker in zip(measured.items(), cycle(COLORS), cycle("os^D"), strict=False):
        ordered = sorted(points, key=lambda point: point[0])
        x, middle, low, high = np.array([point[:4] for point in ordered], np.float64).T
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(x, middle, color=color, marker=marker, markersize=4, linewidth=1.5, label=f"{name}, p50")
        tail = [(point[0], point[4]) for point in ordered if point[4] is not None]
        if tail:
            axes.plot(*zip(*tail, strict=True), color=color, linestyle=":", linewidth=1.5, label=f"{name}, p99")
    axes.set_xlim(-0.02, 1.02)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda _, __: ""))
    return _finish(figure, axes, percent="x")


def exit_rate_png(
    confidence: ArrayLike,
    exited: ArrayLike,
    correct: ArrayLike,
    *,
    bins: int = 10,
    label: str = "confidence of Stage A",
) -> bytes:
    """Draw which share exits in bins of about as many rows each, from least to most sure, and Stage A's accuracy there.

    Args:
        confidence: of Stage A's answer [N], N >= 1.
        exited: bool [N].
        correct: bool [N], whether Stage A is right.
        bins: at most so many; rows of equal confidence share one.
        label: what the confidence is.
    """
    sure, out, right = np.asarray(confidence, np.float64), np.asarray(exited, bool), np.asarray(correct, bool)
    edges = np.unique(np.quantile(sure, np.linspace(0, 1, bins + 1)[1:-1], method="higher"))
    place = np.searchsorted(edges, sure, side="right")
    shown = np.unique(place)
    x, count = np.arange(shown.size), np.bincount(place)[shown]
    rate, accuracy = (np.bincount(place, weights=of)[shown] / count for of in (out, right))
    figure, axes = _canvas(f"{label}: bins from least to most sure (rows)", "share")
    axes.bar(x, rate, width=0.8, color=BLUE, alpha=0.45, label="exits at Stage A")
    axes.plot(x, accuracy, color=VERMILION, marker="D", markersize=5, linewidth=1, label="Stage A is right")
    names = [f"{sure[place == one].min():.3f}\n{sure[place == one].max():.3f}" for one in shown]
    axes.set_xticks(x, [f"{name}\n({n})" for name, n in zip(names, count, strict=True)], fontsize=7)
    axes.set_ylim(0, 1.04)
    return _finish(figure, axes, percent="y")


def cost_risk_png(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    point: tuple[float, float] | None = None,
    stage_b: tuple[float, float] | None = None,
) -> bytes:
    """Draw the share of wrong answers against the share of a full pass's blocks, over all thresholds of each tap.

    Args:
        curves: name of a tap to its costs and risks, each [M].
        point: (cost, risk) of the policy to mark.
        stage_b: (cost, risk) of Stage B answering everything.
    """
    figure, axes = _canvas("blocks run, as a share of a full pass", "share of wrong answers")
    top = 0.0
    for (name, (cost, risk)), color, dash in zip(curves.items(), cycle(QUIET), cycle(DASHES), strict=False):
        x, y = np.asarray(cost, np.float64), np.asarray(risk, np.float64)
        shown = np.unique(np.linspace(0, x.size - 1, CURVE_POINTS).round().astype(int))
        axes.plot(x[shown], y[shown], color=color, linestyle=dash, linewidth=2, label=name)
        top = max(top, float(y.max()))
    marks = (("policy", point, "D", VERMILION), ("Stage B alone", stage_b, "s", "black"))
    for name, mark, shape, color in marks:
        if mark is not None:
            axes.plot(*mark, shape, color=color, markersize=8, label=f"{name}: {mark[1]:.2%} wrong")
            top = max(top, mark[1])
    axes.set_xlim(right=1.03)
    axes.set_ylim(0, max(top * 1.15, 0.01))
    return _finish(figure, axes, percent="xy")


def training_png(epochs: Sequence[float], series: Mapping[str, Sequence[float]]) -> bytes:
    """Draw one small panel per series over the epochs; NaN leaves a gap.

    Args:
        epochs: [E], one number an epoch.
        series: title to values [E].
    """
    figure, panels = _panels(list(series), 1.75, sharex=True)
    for axes, values, color in zip(panels, series.values(), cycle(COLORS), strict=False):
        axes.plot(epochs, values, color=color, marker="o", markersize=4, linewidth=1.5)
    panels[-1].set_xlabel("epoch")
    panels[-1].locator_params("x", integer=True)
    return _png(figure)


def differences_png(
    panels: Mapping[str, Sequence[tuple[str, float, float, float]]], *, baseline: str, level: float = 0.95
) -> bytes:
    """Draw each arm's difference to the baseline with its interval, one panel a metric.

    Args:
        panels: title to its rows: arm, difference, and the interval's ends (NaN where there is none).
        baseline: name of what is subtracted.
        level: of the intervals.
    """
    figure, all_axes = _panels(list(panels), 0.9 + 0.28 * max(map(len, panels.values())))
    for axes, points in zip(all_axes, panels.values(), strict=True):
        names, values, low, high = zip(*points, strict=True)
        place = np.arange(len(names))[::-1]
        axes.axvline(0, color=GREY, linewidth=1)
        axes.hlines(place, low, high, color=BLUE, linewidth=2)
        axes.plot(values, place, "o", color=BLUE, markersize=5)
        axes.set_yticks(place, names)
        axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(f"minus {baseline}, {100 * level:.4g}% interval by group")
    return _png(figure)


def confusion_png(counts: ArrayLike, classes: Sequence[str]) -> bytes:
    """Draw how often each class [K, K] (down) is answered as each (across), in shares of its rows.

    Args:
        counts: integers [K, K].
        classes: K names.
    """
    values = np.asarray(counts, dtype=np.float64)
    shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    n = len(classes)
    figure = Figure(figsize=(SIZE[0], max(SIZE[1], 0.45 * n + 1.2)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    shown = [name if len(name) <= 16 else f"{name[:15]}…" for name in classes]
    axes.set_xticks(range(n), shown, rotation=45 if n > 4 else 0, ha="right" if n > 4 else "center")
    axes.set_yticks(range(n), shown)
    axes.set_xlabel("answer")
    axes.set_ylabel("label")
    if n <= 20:
        for (row, column), share in np.ndenumerate(shares):
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{int(values[row, column])}", ha="center", va="center", color=color, fontsize=9)
    return _png(figure)


def tradeoff_png(
    points: Sequence[tuple[str, float, float, float, float]], *, x: str, y: str, log: bool = False
) -> bytes:
    """Draw what each arm reaches against what it costs.

    Args:
        points: arm, cost, value, and the ends of the value's interval (NaN where there is none).
        x: name of the cost.
        y: name of the value.
        log: costs on a logarithmic axis.
    """
    figure, axes = _canvas(x, y)
    for name, cost, value, low, high in points:
        axes.vlines(cost, low, high, color=BLUE, linewidth=1.5, alpha=0.6)
        axes.plot(cost, value, "o", color=BLUE, markersize=6)
        axes.annotate(name, (cost, value), xytext=(6, 4), textcoords="offset points", fontsize=9)
    if log:
        axes.set_xscale("log")
        for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            set_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))
    axes.margins(x=0.15)
    return _png(figure)


def power_png(
    n: Sequence[int], power: Sequence[float], *, wished: float, needed: int, given: tuple[int, float] | None = None
) -> bytes:
    """Draw the chance to certify a wish against calibration units, with the wished chance and where it is reached.

    Args:
        n: units that certify.
        power: chance at each, in [0, 1].
        wished: the chance asked for.
        needed: units from which it stays there.
        given: units that there are and the chance with them, to mark.
    """
    figure, axes = _canvas("rows of val_calib (groups, where rows share one)", "chance to certify the wish")
    axes.plot(n, power, color=BLUE, linewidth=2, label="power")
    axes.axhline(wished, color=GREY, linestyle="--", linewidth=1.2, label=f"wished: {wished:.4g}")
    axes.plot(needed, np.interp(needed, n, power), "o", color=GREEN, markersize=8, label=f"needed: {needed:,}")
    if given is not None:
        label = f"given: {given[0]:,}, power {given[1]:.2f}"
        axes.plot(*given, "D", color=VERMILION, markersize=7, clip_on=False, label=label)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return _finish(figure, axes)


def timeline_png(
    days: ArrayLike,
    series: Mapping[str, ArrayLike],
    *,
    y: str,
    band: tuple[ArrayLike, ArrayLike] | None = None,
    limits: Mapping[str, float] = MappingProxyType({}),
    marks: Mapping[str, Sequence[float]] = MappingProxyType({}),
    steps: bool = False,
    percent: bool = True,
) -> bytes:
    """Draw values over time with a band around the first, limits as dashed lines, and moments as vertical ones.

    Args:
        days: [T], on the x axis.
        series: name to values [T]; NaN leaves a gap.
        y: what the values are.
        band: low and high ends [T] of the first series.
        limits: name to value.
        marks: name to days.
        steps: values hold until the next one.
        percent: values are shares.
    """
    figure, axes = _canvas("days", y)
    x = np.asarray(days, np.float64)
    if band is not None:
        low, high = (np.asarray(end, np.float64) for end in band)
        axes.fill_between(x, low, high, color=BLUE, alpha=0.18, linewidth=0)
    drawn: dict[str, Any] = {"drawstyle": "steps-post"} if steps else {"marker": "o" if x.size <= 60 else ""}
    for (name, values), color, dash in zip(series.items(), QUIET, DASHES, strict=False):
        y_values = np.asarray(values, np.float64)
        axes.plot(x, y_values, color=color, linestyle=dash, linewidth=1.6, label=name, markersize=3, **drawn)
    for (name, value), dash in zip(limits.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color=VERMILION, linestyle=dash, linewidth=1.2, label=name)
    for (name, moments), color, dash in zip(marks.items(), (VERMILION, GREY, GREEN), DASHES, strict=False):
        for place, moment in enumerate(moments):
            label = name if place == 0 else None
            axes.axvline(moment, color=color, linestyle=dash, linewidth=1.4, alpha=0.8, label=label)
    return _finish(figure, axes, percent="y" if percent else "")


def _panels(titles: Sequence[str], height: float, *, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(SIZE[0], height * len(titles)), layout="constrained")
    panels = list(np.atleast_1d(figure.subplots(len(titles), 1, sharex=sharex)))
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def _canvas(x: str, y: str) -> tuple[Figure, Axes]:
    figure, (axes,) = _panels([""], SIZE[1])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _in_percent(value: float, _: object = None) -> str:
    return f"{100 * value:.4g}%"


def _finish(figure: Figure, axes: Axes, *, percent: str = "", title: str = "") -> bytes:
    """Write the axes named in ``percent`` (x, y, xy) in per cent, put the legend above, and give the PNG."""
    for name in percent:
        # A formatter belongs to one axis.
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(FuncFormatter(_in_percent))
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if axes.get_legend_handles_labels()[0]:
        # Above the axes, where no line of anybody's data runs through it; two columns are as wide as a phone shows.
        axes.legend(
            frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2, columnspacing=1.2,
            fontsize=9, title=title or None, alignment="left", title_fontproperties={"weight": "bold", "size": 10},
        )  # fmt: skip
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # The Software entry names the library's version, which would change the bytes.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    figure.clear()
    return buffer.getvalue()
