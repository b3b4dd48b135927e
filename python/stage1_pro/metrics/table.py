"""What every metric is: one row each, and everything that measures, shows or compares metrics reads it here.

``register`` adds a row. A metric that is a mean over rows gives ``values``, one that is anything else of answers gives
``of``; both are then measured with their intervals, shown by ``stage1 metrics``, ``evaluate`` and the report.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stage1_pro import native
from stage1_pro.errors import InputError

if TYPE_CHECKING:
    from stage1_pro.metrics.probabilistic import Resampled
    from stage1_pro.metrics.thresholds import Walk

Need = Literal["probabilities", "threshold", "positive"]
Floats = NDArray[np.float64]
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9)
RISKS = (0.01, 0.02, 0.05, 0.1)


class Influence(NamedTuple):
    """How a metric depends on its rows, in sorted order.

    ``slope`` [N]: derivative along how often each row is there, None for stepwise metrics. ``rows``: those that the
    metric speaks of. ``hits`` [N]: the events it counts, None for means of other things.
    """

    slope: Floats | None
    rows: NDArray[np.bool_] | slice = slice(None)
    hits: NDArray[Any] | None = None


@dataclass(frozen=True)
class MetricSpec:
    """All facts of one metric, or of a family of them with a target in their names.

    ``name``: of a family it ends in "_" and the target follows. ``kind``: "rows" is sorted or averaged over rows and
    measured by ``bootstrap``; "answers" is measured by ``bootstrap_answers``; "figure" is made of others.
    ``better``: "higher" or "lower". The metric lies in [``bottom``, ``top``]. ``share``: shown in per cent, others with
    ``digits``. ``target_zero``: 0 is a target. ``jumps``: few rows can move it far, so that
    resamples tell little of it. ``events``: what it counts, in words. ``undefined``: when it is NaN.
    ``bound``: its ends where the share of events lies between two bounds, for any order of the rows; None where that
    share bounds nothing.
    ``exact(walk, target, level)``: its ends without a resample, for what is the best of all thresholds.
    ``values(probs, labels)`` gives what it is the mean of, [N]; ``of(resampled)`` the metric of a resample;
    ``strays(resampled, rows)``: a distance that the metric of a resample can have come closer or gone further by.
    """

    name: str
    title: str
    kind: Literal["rows", "answers", "figure"]
    better: Literal["higher", "lower"]
    top: float = 1.0
    bottom: float = 0.0
    share: bool = False
    digits: int = 3
    needs: tuple[Need, ...] = ()
    targets: tuple[float, ...] = ()
    target_zero: bool = False
    jumps: bool = False
    events: str = "errors"
    undefined: str = "no row defines it"
    influence: Callable[[native.Ranked, float, float], Influence] = field(default=lambda *_: Influence(None))
    bound: Callable[[float, float], tuple[float, float]] | None = field(default=lambda low, high: (low, high))
    exact: Callable[[Walk, float, float], tuple[float, float]] | None = None
    values: Callable[[Floats, NDArray[np.int64]], Floats] | None = None
    of: Callable[[Resampled], float] | None = None
    strays: Callable[[Resampled, Resampled], float] | None = None

    def influence_on(self, ranked: native.Ranked, value: float, target: float) -> Influence:
        """How the metric's ``value`` on sorted rows depends on each of them."""
        found = _of_mean(ranked.means[self.name], value) if self.values else self.influence(ranked, value, target)
        if found.slope is None or not ranked.weight.size:
            return found
        return found._replace(slope=found.slope * ranked.weight)

    @property
    def stepwise(self) -> bool:
        """Whether it jumps with the weights of rows, so that of resamples only percentiles serve."""
        return bool(self.targets)

    def target(self, name: str) -> float | None:
        """Read the target off a name of this family; None when it has none, or one out of range."""
        text = name.removeprefix(self.name)
        if not self.targets or text == name or not re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d+)?", text):
            return None
        value = float(text)
        return value if value <= 1 and (value > 0 or self.target_zero) else None


METRICS: dict[str, MetricSpec] = {}


def register(spec: MetricSpec) -> MetricSpec:
    """Add a row to the table.

    Raises:
        InputError: the name is taken, or nothing says how to measure it.
    """
    if spec.name in METRICS:
        raise InputError(f"name must be new, got '{spec.name}'; that metric is there already")
    METRICS[spec.name] = spec
    return spec


def names(kind: Literal["rows", "answers"], *, without: Sequence[Need] = ()) -> list[str]:
    """Names of all metrics of a kind in their order, families at their usual targets, but those that need any of
    ``without``.
    """
    found: list[str] = []
    for spec in METRICS.values():
        if spec.kind == kind and not set(spec.needs) & set(without):
            found += [f"{spec.name}{target:g}" for target in spec.targets] or [spec.name]
    return found


def lookup(name: str) -> tuple[MetricSpec, float | None]:
    """Find a metric's row and the target in its name; KeyError for names that are none."""
    if name in METRICS and not METRICS[name].targets:
        return METRICS[name], None
    for spec in METRICS.values():
        target = spec.target(name)
        if target is not None:
            return spec, target
    raise KeyError(name)


def title(name: str) -> str:
    """A metric's name for readers: ``risk_at_coverage_0.8`` is "Risk at coverage 80%"."""
    spec, target = lookup(name)
    return spec.title if target is None else f"{spec.title} {100 * target:.4g}%"


def means(metrics: str | Sequence[str]) -> Iterator[tuple[str, Callable[[Floats, NDArray[np.int64]], Floats]]]:
    """Names asked for that are means over rows without a column in the kernel, and what they are the mean of."""
    for name, spec in METRICS.items():
        if spec.values is not None and (metrics == "all" or name in metrics):
            yield name, spec.values


# ---------------------------------------------------------------------------------------------- influences


def _of_errors(slope: Callable[[native.Ranked, float], Floats]) -> Callable[[native.Ranked, float, float], Influence]:
    return lambda ranked, value, _: Influence(slope(ranked, value), hits=ranked.error)


def _of_mean(values: Floats, value: float, hits: NDArray[Any] | None = None) -> Influence:
    return Influence((values - value) / values.size, hits=hits)


def _aurc_slope(ranked: native.Ranked, value: float) -> Floats:
    """Derivative of AURC along each sorted row's weight [N].

    With risk ρ_g = E_g / C_g at the end of tie group g and trapezoid weights v_g, n·AURC is Σ v_g ρ_g. A row of group h
    widens that group's step, and moves every risk from h on by (r − ρ_g) / C_g.
    """
    # In place where it can be: new memory costs more than the arithmetic.
    ends = ranked.through
    repeats = np.diff(ranked.ends, prepend=np.uint32(0))
    weight = np.diff(ends, prepend=0.0) / 2
    first = float(weight[0])
    weight[:-1] += weight[1:].copy()
    weight[0] += first
    losses = ranked.error * ranked.weight if ranked.weight.size else ranked.error
    risk = np.cumsum(losses, dtype=np.float64)[ranked.ends - np.uint32(1)]
    risk /= ends
    steps = risk.copy()
    steps[1:] += risk[:-1]
    steps[0] *= 2
    steps /= 2
    np.divide(weight, ends, out=weight)
    slope = np.cumsum(weight[::-1])[::-1]
    weight *= risk
    steps -= np.cumsum(weight[::-1])[::-1]
    steps -= value
    if repeats.size < ranked.error.size:
        steps, slope = np.repeat(steps, repeats), np.repeat(slope, repeats)
    influence: Floats = ranked.error * slope
    influence += steps
    influence /= ranked.error.size
    return influence


def _accepted(ranked: native.Ranked, _value: float, target: float) -> Influence:
    """Of Risk@Coverage: the rows accepted at the point that is reported."""
    reached = np.searchsorted(ranked.through, target * ranked.error.size * (1 - 1e-12), side="left")
    return Influence(None, slice(0, int(ranked.ends[reached])), ranked.error)


def _coverage(ranked: native.Ranked, value: float, _: float) -> Influence:
    n, exits = ranked.error.size, ranked.n_exit or 0
    slope = np.zeros(n)
    slope[:exits] = 1 / n
    slope -= value / n
    return Influence(slope, hits=np.arange(n) < exits)


def _exit_error(ranked: native.Ranked, value: float, _: float) -> Influence:
    exits = ranked.n_exit or 0
    slope = np.zeros(ranked.error.size)
    slope[:exits] = (ranked.error[:exits] - value) / (_amount(ranked, slice(0, exits)) or 1)
    return Influence(slope, slice(0, exits), ranked.error)


def _fnr(ranked: native.Ranked, value: float, _: float) -> Influence:
    exits = ranked.n_exit or 0
    slope = np.zeros(ranked.error.size)
    among, missed = (ranked.kind & 1) > 0, (ranked.kind & 2) > 0
    among[exits:] = False
    slope[:exits] = among[:exits] * (missed[:exits] - value) / (_amount(ranked, among) or 1)
    return Influence(slope, among, missed)


def _aurc_bound(low: float, high: float) -> tuple[float, float]:
    return (low + (1 - low) * math.log1p(-low) if low < 1 else 1.0, high * (1 - math.log(high)) if high > 0 else 0.0)


def _accepted_within(ranked: native.Ranked, value: float, _: float) -> Influence:
    """Of Coverage@Risk: the rows accepted at the point that is reported."""
    if not ranked.weight.size:
        return Influence(None, slice(0, round(value * ranked.error.size)), ranked.error)
    through = np.cumsum(ranked.weight)
    return Influence(None, through <= value * through[-1] * (1 + 1e-12), ranked.error)


def _amount(ranked: native.Ranked, rows: NDArray[np.bool_] | slice) -> float:
    """How many rows these are, or what they weigh."""
    return float(ranked.weight[rows].sum() if ranked.weight.size else ranked.error[rows].size)


# ---------------------------------------------------------------------------------------------- the rows

_ONE_CLASS = "only one class is there"
for _spec in (
    MetricSpec(
        "augrc", "AUGRC", "rows", "lower", top=0.5, digits=4,
        influence=_of_errors(
            lambda ranked, _: native.augrc_influence(
                ranked.error, ranked.ends, ranked.weight if ranked.weight.size else None
            )
        ),
        bound=lambda low, high: (low**2 / 2, high - high**2 / 2),
    ),
    MetricSpec("aurc", "AURC", "rows", "lower", digits=4, influence=_of_errors(_aurc_slope), bound=_aurc_bound),
    MetricSpec(
        "risk_at_coverage_", "Risk at coverage", "rows", "lower", share=True, targets=COVERAGES, influence=_accepted,
        exact=lambda walk, target, level: walk.risk_at_coverage(target, level),
    ),
    MetricSpec(
        "coverage_at_risk_", "Coverage at risk", "rows", "higher", share=True, targets=RISKS, target_zero=True,
        jumps=True, influence=_accepted_within,
        exact=lambda walk, target, level: walk.coverage_at_risk(target, level),
    ),
    MetricSpec(
        "accuracy", "Accuracy", "rows", "higher", share=True,
        influence=_of_errors(lambda ranked, value: (1 - ranked.error - value) / ranked.error.size),
        bound=lambda low, high: (1 - high, 1 - low),
    ),
    MetricSpec(
        "nll", "NLL", "rows", "lower", top=math.inf, digits=4, needs=("probabilities",),
        influence=lambda ranked, value, _: _of_mean(ranked.nll, value, ranked.error), bound=None,
    ),
    MetricSpec(
        "brier", "Brier score", "rows", "lower", digits=4, needs=("probabilities",),
        influence=lambda ranked, value, _: _of_mean(ranked.brier, value, ranked.error), bound=None,
    ),
    MetricSpec(
        "coverage", "Coverage", "rows", "higher", share=True, needs=("threshold",), events="exits", influence=_coverage
    ),
    MetricSpec(
        "exit_error", "Exit error", "rows", "lower", share=True, needs=("threshold",), events="wrong exits",
        undefined="no row exits", influence=_exit_error,
    ),
    MetricSpec(
        "fnr_on_exited", "FNR on exits", "rows", "lower", share=True, needs=("threshold", "positive"),
        events="missed positives", undefined="no positive row exits", influence=_fnr,
    ),
    MetricSpec(
        "balanced_accuracy", "Balanced accuracy", "answers", "higher", share=True,
        of=lambda resampled: resampled.balanced_accuracy(),
    ),
    MetricSpec(
        "mcc", "MCC", "answers", "higher", bottom=-1.0, undefined=_ONE_CLASS, of=lambda resampled: resampled.mcc()
    ),
    MetricSpec(
        "auroc", "AUROC", "answers", "higher", needs=("positive",), undefined=_ONE_CLASS,
        of=lambda resampled: resampled.auroc(),
    ),
    MetricSpec(
        "ece", "ECE (calibration)", "answers", "lower", share=True, of=lambda resampled: resampled.ece(),
        strays=lambda resampled, rows: float(np.abs(resampled.bins_apart() - rows.bins_apart()).sum()),
        bound=None,
    ),
    MetricSpec("exit_accuracy", "Exit accuracy", "figure", "higher", share=True),
    MetricSpec("deferred_accuracy", "Deferred accuracy", "figure", "higher", share=True),
    MetricSpec("accuracy_minus_stage_b", "Accuracy minus Stage B's", "figure", "higher"),
    MetricSpec("gate_augrc", "AUGRC, gate", "figure", "lower", top=0.5, digits=4),
    MetricSpec("softmax_augrc", "AUGRC, max softmax", "figure", "lower", top=0.5, digits=4),
    MetricSpec("joint_gate_augrc", "AUGRC, gate before it was refitted", "figure", "lower", top=0.5, digits=4),
    MetricSpec("gate_minus_softmax_augrc", "AUGRC, gate minus max softmax", "figure", "lower", top=0.5, digits=4),
):  # fmt: skip
    register(_spec)
