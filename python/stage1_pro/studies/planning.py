"""plan: how many calibration rows (groups, where rows share one) a promise takes, before any are collected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from stage1_pro.arguments import check_share
from stage1_pro.errors import InputError
from stage1_pro.files import write_bytes
from stage1_pro.metrics.figures import power_png
from stage1_pro.policies.planning import PlanTerms, smallest_alpha, smallest_n
from stage1_pro.policies.target import POLICIES
from stage1_pro.record import Record
from stage1_pro.words import PolicyName

if TYPE_CHECKING:
    from stage1_pro.commands.plan import Plan

# Of a delta given as one number, the part that the selection of scrc takes.
SELECTION_PART = 0.2
_MULTIPLES = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3)
_CURVE_POINTS = 81


class PlanPoint(Record):
    """Power with so many units."""

    n: int = Field(description="units of the certify half")
    power: float = Field(description="chance to certify the wish with them, if the expectation holds")


class CalibrationPlan(Record):
    """What ``stage1 plan`` found; units are groups where rows share clips or tracks, else rows."""

    format_version: Literal[1] = 1
    policy: PolicyName
    alpha: float
    delta: list[float] = Field(description="of the risk; of scrc: of the selection and of the risk")
    min_coverage: float
    expected_error: float
    expected_coverage: float | None
    positives: float | None = Field(description="share of units that are positive; of softmax alone")
    cells: list[float] = Field(description="share of each cell of scrc among the accepted")
    power: float
    n_certify: int = Field(description="units of the certify half from which the power stays at the wished one")
    n_val_calib: int = Field(description="twice that: val_calib is cut in two halves")
    table: list[PlanPoint]
    n: int | None = Field(description="units that there are")
    power_at_n: float | None
    smallest_alpha_at_n: float | None = Field(description="smallest risk certifiable with them at the wished power")
    least_alpha_at_n: float | None = Field(description="smallest risk certifiable with them if no error is seen")
    wish: str
    assumptions: list[str]


def plan(asked: Plan) -> CalibrationPlan:
    """What ``commands.plan.plan`` does, by the exact binomials of the policies."""
    if asked.out is not None and asked.out.exists() and not asked.out.is_dir():
        raise InputError(f"--out must be a folder to write into, got the file {asked.out}")
    kind, power, n = POLICIES.find(asked.policy), asked.power, asked.n
    # The last promise of a target is its risk.
    risk = kind.asks.of().promises("")[-1].limit if asked.alpha is None else asked.alpha
    error = risk / 2 if asked.expected_error is None else asked.expected_error
    delta, cells = _delta(asked, parts=kind.abstains), _cells(asked, several=kind.abstains)
    planned = kind.planned(PlanTerms(risk, delta, asked.min_coverage, asked.expected_coverage, asked.positives, cells))

    def power_at(units: int) -> float:
        return planned.power(units, risk, error)

    needed = smallest_n(power_at, power, alpha=risk, delta=planned.level, share=planned.share, expected_error=error)
    sizes = sorted({*(max(1, round(needed * factor)) for factor in _MULTIPLES), *([] if n is None else [n])})
    found = CalibrationPlan(
        policy=asked.policy,
        alpha=risk,
        delta=delta,
        min_coverage=asked.min_coverage,
        expected_error=error,
        expected_coverage=asked.expected_coverage,
        positives=planned.positives,
        cells=cells,
        power=power,
        n_certify=needed,
        n_val_calib=2 * needed,
        table=[PlanPoint(n=size, power=power_at(size)) for size in sizes],
        n=n,
        power_at_n=None if n is None else power_at(n),
        smallest_alpha_at_n=None if n is None else smallest_alpha(lambda a: planned.power(n, a, error), power),
        least_alpha_at_n=None if n is None else smallest_alpha(lambda a: planned.power(n, a, 0.0), power),
        wish=f"with probability {1 - sum(delta):.6g}, {planned.wish}",
        assumptions=[
            f"the true risk at the threshold in mind is {error:g}; nothing is promised where it is larger",
            *planned.assumptions,
            "the threshold was fixed on the fit half; rows of the certify half are independent, or count as groups",
        ],
    )
    if asked.out is not None:
        found.write(asked.out / "plan.json")
        # To twice what is needed or there is.
        ends = np.linspace(1, 2 * max(needed, n or 0), _CURVE_POINTS).round().astype(int)
        curve = sorted({*ends.tolist(), needed})
        given = None if n is None or found.power_at_n is None else (n, found.power_at_n)
        png = power_png(curve, [power_at(size) for size in curve], wished=power, needed=needed, given=given)
        write_bytes(asked.out / "plan.png", png)
    return found


def render(found: CalibrationPlan) -> str:
    """The answer, the table, and what it rests on."""
    halves = f"{found.n_certify:,} rows in the certify half, {found.n_val_calib:,} in val_calib (it is cut in two)"
    lines = [
        f"wish: {found.wish}",
        f"needed: {halves}, for a chance of {found.power:g} to certify it",
        "        count groups instead of rows where rows share a clip, a track or a place: one speaks for its group",
        "",
        f"{'certify half':>14}{'val_calib':>12}{'power':>8}",
    ]
    for point in found.table:
        mark = "  <- needed" if point.n == found.n_certify else "  <- given" if point.n == found.n else ""
        lines.append(f"{point.n:>14,}{2 * point.n:>12,}{point.power:>8.3f}{mark}")
    if found.n is not None:
        lines += ["", f"with the given {found.n:,} in the certify half the chance is {found.power_at_n:.3f}"]
        if found.smallest_alpha_at_n is None or found.least_alpha_at_n is None:
            lines.append(f"no risk below 1 can be certified with them at a chance of {found.power:g}")
        else:
            lines.append(
                f"smallest alpha certifiable with them at a chance of {found.power:g}: {found.smallest_alpha_at_n:.4f} "
                f"with a true risk of {found.expected_error:g}, {found.least_alpha_at_n:.4f} if answers are never wrong"
            )
    lines += ["", "assumed:", *(f"  - {text}" for text in found.assumptions)]
    return "\n".join(lines)


def _delta(asked: Plan, *, parts: bool) -> list[float]:
    """Of the risk; with parts of the selection and of the risk."""
    given = [float(value) for value in (asked.delta if isinstance(asked.delta, tuple) else (asked.delta,))]
    if parts and len(given) == 1:
        given = [SELECTION_PART * given[0], (1 - SELECTION_PART) * given[0]]
    if len(given) != (2 if parts else 1):
        raise InputError(
            f"delta must be {'one or two shares' if parts else 'one share'} for policy {asked.policy}, got {given}; "
            "only scrc has one of its own for the selection"
        )
    for value in (*given, sum(given)):
        check_share("delta", value)
    return given


def _cells(asked: Plan, *, several: bool) -> list[float]:
    """The share of each cell."""
    cells = asked.cells
    given = [float(value) for value in (cells if isinstance(cells, tuple) else (cells,))]
    if not given or not all(math.isfinite(value) and 0 < value <= 100 for value in given):
        raise InputError(f"cells must be 1 to 100 positive shares that sum to 1, or their number, got {cells}")
    if len(given) == 1 and given[0] >= 1 and given[0] == math.floor(given[0]):
        given = [1 / given[0]] * min(int(given[0]), 1000)
    if not several and given != [1.0]:
        raise InputError(
            f"cells must be 1 for policy {asked.policy}, got {cells}; only scrc has limits of its own by cell"
        )
    return given
