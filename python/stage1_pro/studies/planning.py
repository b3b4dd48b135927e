"""plan: how many calibration rows (groups, where rows share one) a promise takes, before any are collected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from stage1_pro.errors import InputError
from stage1_pro.files import write_bytes
from stage1_pro.metrics.figures import power_png
from stage1_pro.policies.bounds import check_share
from stage1_pro.policies.planning import certify_power, scrc_power, smallest_alpha, smallest_n
from stage1_pro.record import Record
from stage1_pro.words import PolicyName

if TYPE_CHECKING:
    from stage1_pro.commands.plan import Plan

DEFAULT_ALPHA: dict[str, float] = {"softmax": 0.02, "gate": 0.01, "scrc": 0.01}
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
    """Say how many calibration units certify a target with the wanted chance, by the exact binomials of the policies.

    Raises:
        InputError: an option that does not fit the policy, or no number of units would do.
    """
    policy, min_coverage, power, n, out = asked.policy, asked.min_coverage, asked.power, asked.n, asked.out
    expected_coverage, positives = asked.expected_coverage, asked.positives
    risk = DEFAULT_ALPHA[policy] if asked.alpha is None else asked.alpha
    error = risk / 2 if asked.expected_error is None else asked.expected_error
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out must be a folder to write into, got the file {out}")
    levels = _levels(policy, asked.delta)
    shares = _cells(policy, asked.cells)
    if expected_coverage is not None:
        _check_coverage(policy, min_coverage, expected_coverage)
    coverage = min_coverage if expected_coverage is None else expected_coverage
    trials, level = coverage, levels[-1]
    if policy == "softmax":
        trials = coverage * positives
    elif policy == "scrc":
        trials, level = min_coverage * min(shares), levels[-1] / len(shares)
    promised = min_coverage if policy == "gate" and expected_coverage is not None else None

    def power_at(units: int, limit: float, expected: float) -> float:
        if policy == "scrc":
            return scrc_power(units, min_coverage, limit, (levels[0], levels[1]), expected, shares)
        return certify_power(units, limit, level, trials, expected, min_coverage=promised)

    needed = smallest_n(
        lambda units: power_at(units, risk, error), power, alpha=risk, delta=level, share=trials, expected_error=error
    )
    sizes = sorted({*(max(1, round(needed * factor)) for factor in _MULTIPLES), *([] if n is None else [n])})
    found = CalibrationPlan(
        policy=policy,
        alpha=risk,
        delta=list(levels),
        min_coverage=min_coverage,
        expected_error=error,
        expected_coverage=expected_coverage,
        positives=positives if policy == "softmax" else None,
        cells=list(shares),
        power=power,
        n_certify=needed,
        n_val_calib=2 * needed,
        table=[PlanPoint(n=size, power=power_at(size, risk, error)) for size in sizes],
        n=n,
        power_at_n=None if n is None else power_at(n, risk, error),
        smallest_alpha_at_n=None if n is None else smallest_alpha(lambda limit: power_at(n, limit, error), power),
        least_alpha_at_n=None if n is None else smallest_alpha(lambda limit: power_at(n, limit, 0.0), power),
        wish=_wish(policy, risk, levels, min_coverage, shares),
        assumptions=_assumptions(policy, error, min_coverage, expected_coverage, positives, shares),
    )
    if out is not None:
        found.write(out / "plan.json")
        write_bytes(out / "plan.png", draw(found, lambda units: power_at(units, risk, error)))
    return found


def draw(found: CalibrationPlan, power_at: Callable[[int], float]) -> bytes:
    """Power against units of the certify half, to twice what is needed or there is; PNG bytes."""
    last = 2 * max(found.n_certify, found.n or 0)
    sizes = sorted({*np.linspace(1, last, _CURVE_POINTS).round().astype(int).tolist(), found.n_certify})
    given = None if found.n is None or found.power_at_n is None else (found.n, found.power_at_n)
    return power_png(sizes, [power_at(size) for size in sizes], wished=found.power, needed=found.n_certify, given=given)


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


def _levels(policy: str, delta: float | Sequence[float]) -> tuple[float, ...]:
    given = (float(delta),) if isinstance(delta, int | float) else tuple(float(value) for value in delta)
    if policy == "scrc" and len(given) == 1:
        given = (SELECTION_PART * given[0], (1 - SELECTION_PART) * given[0])
    if len(given) != (2 if policy == "scrc" else 1):
        raise InputError(
            f"delta must be {'one or two shares' if policy == 'scrc' else 'one share'} for policy {policy}, got "
            f"{list(given)}; only scrc has one of its own for the selection"
        )
    for value in (*given, sum(given)):
        check_share("delta", value)
    return given


def _cells(policy: str, cells: float | Sequence[float]) -> tuple[float, ...]:
    given = [float(cells)] if isinstance(cells, int | float) else [float(value) for value in cells]
    if not all(math.isfinite(value) and 0 < value <= 100 for value in given):
        raise InputError(f"cells must be 1 to 100 positive shares that sum to 1, or their number, got {cells}")
    if len(given) == 1 and given[0] >= 1 and given[0] == math.floor(given[0]):
        given = [1 / given[0]] * min(int(given[0]), 1000)
    if policy != "scrc" and given != [1.0]:
        raise InputError(f"cells must be 1 for policy {policy}, got {cells}; only scrc has limits of its own by cell")
    return tuple(given)


def _check_coverage(policy: str, min_coverage: float, expected_coverage: float) -> None:
    if policy == "scrc":
        raise InputError(
            f"expected_coverage must be left out for policy scrc, got {expected_coverage}; the rank that selects "
            "depends on n and min_coverage alone"
        )
    if not min_coverage < expected_coverage <= 1 and policy == "gate":
        raise InputError(
            f"expected_coverage must be in (min_coverage = {min_coverage:g}, 1], got {expected_coverage:g}; no number "
            "of rows certifies a coverage that is not exceeded"
        )
    if not 0 < expected_coverage <= 1:
        raise InputError(f"expected_coverage must be in (0, 1], got {expected_coverage}; it is the share that exits")


def _wish(policy: str, alpha: float, levels: tuple[float, ...], min_coverage: float, shares: tuple[float, ...]) -> str:
    sure = f"with probability {1 - sum(levels):.6g}"
    if policy == "softmax":
        return f"{sure}, FNR on exits at most {100 * alpha:g}% (softmax)"
    if policy == "gate":
        return f"{sure}, coverage at least {100 * min_coverage:g}% and exit error at most {100 * alpha:g}% (gate)"
    each = "" if len(shares) == 1 else f", in each of {len(shares)} cells"
    return (
        f"{sure}, at least {100 * min_coverage:g}% accepted and the label outside the set in at most "
        f"{100 * alpha:g}% of those{each} (scrc, pac)"
    )


def _assumptions(
    policy: str,
    error: float,
    min_coverage: float,
    expected_coverage: float | None,
    positives: float,
    shares: tuple[float, ...],
) -> list[str]:
    found = [f"the true risk at the threshold in mind is {error:g}; nothing is promised where it is larger"]
    if policy == "softmax":
        coverage = min_coverage if expected_coverage is None else expected_coverage
        found.append(
            f"{100 * positives:g}% are positive (--positives) and {100 * coverage:g}% of those exit, so a share of "
            f"{coverage * positives:.4g} are trials of the FNR"
        )
    elif policy == "gate" and expected_coverage is None:
        found.append(
            f"the coverage there is {min_coverage:g} and its test is taken for granted; --expected-coverage counts it"
        )
    elif policy == "gate":
        found.append(
            f"the coverage there is {expected_coverage:g}; the exact test of at least {min_coverage:g} is counted"
        )
    else:
        found.append("power is the chance that the certified limit, and so the sets, are no larger than those in mind")
        if len(shares) > 1:
            found.append(f"cells hold shares of {', '.join(f'{share:.3g}' for share in shares)} of the accepted")
    found.append(
        "the threshold was fixed on the fit half; rows of the certify half are independent, or count as groups"
    )
    return found
