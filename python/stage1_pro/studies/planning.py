"""plan: how many calibration rows (groups, where rows share one) a promise takes, before any are collected.

Whole calibrations are simulated: rows that order and rows that certify are drawn from a world, and the policy itself
looks for its threshold and certifies it. Every calibration has a seed of its own, whatever n, so that powers of
different n share their noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field
from scipy.special import ndtri

from stage1_pro.arguments import check_share
from stage1_pro.commands.plan import MOST_UNITS
from stage1_pro.data.given import read_arrays
from stage1_pro.data.predictions import Predictions
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import write_bytes
from stage1_pro.metrics.binomial import clopper_pearson_upper
from stage1_pro.metrics.figures import power_png
from stage1_pro.policies.bounds import last_digit
from stage1_pro.policies.planning import Planned, PlanTerms, plan_calibration
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.target import POLICIES
from stage1_pro.progress import track
from stage1_pro.record import Record
from stage1_pro.studies.worlds import Resampled, Stated, World
from stage1_pro.words import PolicyName

if TYPE_CHECKING:
    from stage1_pro.commands.plan import Plan

# Of a delta given as one number, the part that the selection of scrc takes.
SELECTION_PART = 0.2
_MOST_CELLS = 100
# Rows that the calibrations of one n may have in all, and how many there are at least and at most.
_ROWS, _LEAST, _MOST = 4_000_000, 60, 400
# A power this many standard errors from the wished one needs no more draws.
_SURE = 3.0
# The ends of the search are this near each other before n is read off between them.
_NEAR = 1.12
# A search takes some twenty steps.
_STEPS = 300
_LARGEST_ALPHA = 0.999
_LEAST_DELTA = 1e-12


class PlanPoint(Record):
    """Power with so many units."""

    n: int = Field(description="units that certify")
    power: float = Field(
        description="chance to certify the wish with them, in a promise that says something, if the expectation holds"
    )
    draws: int | None = Field(None, description="calibrations that it is a share of; null: exact, of older versions")
    coverage: float | None = Field(None, description="median of those that certify; null where none does")


class CalibrationPlan(Record):
    """What ``stage1 plan`` found; units are groups where rows share clips or tracks, else rows."""

    format_version: Literal[1] = 1
    policy: PolicyName
    alpha: float
    delta: list[float] = Field(description="of the risk; of scrc: of the selection and of the risk")
    min_coverage: float
    expected_error: float | None = Field(description="null: the world is the rows given")
    expected_coverage: float | None = Field(description="where that error is hoped for")
    growth: float | None = Field(None, description="the error grows as coverage to this power")
    world: str | None = Field(None, description="file whose rows are drawn; null: the stated curve")
    positives: float | None = Field(description="share of units that are positive; of softmax alone")
    cells: list[float] = Field(description="share of each cell of scrc among the accepted")
    power: float
    seed: int | None = Field(None, description="of the simulated calibrations")
    n_certify: int = Field(description="units that certify, with which the power is the wished one")
    n_val_calib: int = Field(description="the same; twice that in plans of older versions, which halved val_calib")
    table: list[PlanPoint]
    n: int | None = Field(description="units that there are")
    power_at_n: float | None
    smallest_alpha_at_n: float | None = Field(description="smallest risk certifiable with them at the wished power")
    least_alpha_at_n: float | None = Field(
        description="smallest risk certifiable with them if all are accepted that may be, and no error is seen"
    )
    wish: str
    assumptions: list[str]


@dataclass(frozen=True)
class _Calibrations:
    """Simulated calibrations of one policy in one world; ``tick`` is called for each."""

    planned: Planned
    world: World
    alpha: float
    seed: int
    pool: ThreadPoolExecutor
    tick: Callable[[], object]
    found: dict[int, list[tuple[float, bool] | None]] = field(default_factory=dict)  # by n, what each draw certifies

    def power(self, n: int, draws: int = _LEAST, *, useless: bool = False) -> float:
        """Share of the draws with ``n`` units that certify, of so many at least; ``useless``: what says nothing too."""

        def drawn(number: int) -> tuple[float, bool] | None:
            return self.planned.certifies(self.world.rows(n, np.random.default_rng([self.seed, number])), self.alpha)

        seen = self.found.setdefault(n, [])
        for found in self.pool.map(drawn, range(len(seen), draws)):
            seen.append(found)
            self.tick()
        return sum(one is not None and (one[1] or useless) for one in seen) / len(seen)

    def reaches(self, n: int, power: float, *, useless: bool = False) -> bool:
        """Whether ``n`` units reach a power, by as many draws as it takes to tell."""
        for draws in range(_LEAST, _draws(n) + 1, 20):
            found = self.power(n, draws, useless=useless)
            if abs(found - power) > _SURE * math.sqrt(power * (1 - power) / draws):
                break
        return self.power(n, useless=useless) >= power

    def search(self, start: int, power: float) -> int:
        """The n with which the power is ``power``, to three digits.

        Raises:
            InputError: no number of units that is simulated reaches the power.
        """
        low, high, n = 0, 0, start
        for _ in range(_STEPS):
            low, high = (low, n) if self.reaches(n, power) else (n, high)
            if low and high and (high <= low * _NEAR or high - low == 1):
                ends = [self.power(end, _draws(end)) for end in (low, high)]
                if ends[0] < power <= ends[1]:
                    return _between(low, high, ends, power)
                # With all draws both ends lie on one side.
                low, high = (high, 0) if ends[1] < power else (0, low)
            if high == 1:
                return 1
            # Strictly between the ends: isqrt(low * (low + 2)) is low.
            n = (
                max(math.isqrt(low * high), low + 1)
                if low and high
                else max(high // 2, 1)
                if high
                else math.ceil(1.5 * low)
            )
            useless = low > 0 and self.power(low, useless=True) >= power
            hopeless = low > 10 * self.plenty() if useless else low > self.plenty() and self.power(low) == 0
            if n > MOST_UNITS or hopeless:
                advice = "hope for a smaller error or ask for less"
                if useless:
                    advice = "they certify it, but it says no more than one answer to all: ask for a smaller alpha"
                raise InputError(
                    f"power must be reachable, got {power:g}, which {low:,} units do not reach; the chance there is "
                    f"{self.power(low):.2f}: {advice}"
                )
        raise InputError(f"power must be told from others by simulation, got {power:g}; give another --seed")

    def plenty(self) -> float:
        """Units of which a calibration in twenty would certify what does not hold."""
        return 50 * self.planned.least_units(self.alpha)

    def point(self, n: int) -> PlanPoint:
        """What the draws with ``n`` units said."""
        power, seen = self.power(n), self.found[n]
        covered = [one[0] for one in seen if one is not None and one[1]]
        return PlanPoint(n=n, power=power, draws=len(seen), coverage=float(np.median(covered)) if covered else None)


def _draws(n: int) -> int:
    """How many calibrations with ``n`` units are enough."""
    return min(_MOST, max(_LEAST, _ROWS // (2 * n)))


def _between(low: int, high: int, ends: list[float], power: float) -> int:
    """Where the power lies between two n; its normal score is about linear in log n."""
    score = ndtri(np.clip([*ends, power], 0.002, 0.998))
    n = low * math.exp(math.log(high / low) * float((score[2] - score[0]) / (score[1] - score[0])))
    digit = max(1, round(last_digit(n, 3)))
    return min(high, digit * math.ceil(n / digit))


def plan(asked: Plan) -> CalibrationPlan:
    """What ``commands.plan.plan`` does, by simulating the policy's own calibrations."""
    if asked.out is not None and asked.out.exists() and not asked.out.is_dir():
        raise InputError(f"--out must be a folder to write into, got the file {asked.out}")
    kind, power, n = POLICIES.find(asked.policy), asked.power, asked.n
    # The last promise of a target is its risk.
    risk = kind.asks.of().promises("")[-1].limit if asked.alpha is None else asked.alpha
    delta, cells = _delta(asked, parts=kind.abstains), _cells(asked, several=kind.abstains)
    known = _rows(asked)
    planned = kind.planned(PlanTerms(risk, delta, asked.min_coverage, asked.positives, cells, one_class=known is None))
    world: World
    hoped: dict[str, float | None] = dict.fromkeys(("expected_error", "expected_coverage", "growth"))
    if known is None:
        error = risk / 2 if asked.expected_error is None else asked.expected_error
        where = asked.min_coverage if asked.expected_coverage is None else asked.expected_coverage
        hoped = {"expected_error": error, "expected_coverage": where, "growth": asked.growth}
        world = Stated(error, where, asked.growth, cells if len(cells) > 1 else (1 - asked.positives, asked.positives))
        start = plan_calibration(risk, planned.level, planned.share, error, power)
        said = [
            str(world),
            *([] if asked.policy != "softmax" else [f"{100 * asked.positives:g}% of units are positive (--positives)"]),
        ]
        if start > MOST_UNITS:
            raise InputError(
                f"expected_error must be small enough for {MOST_UNITS:,} units, got {error:g}, which takes more than "
                f"{start:,}; hope for a smaller error or ask for a larger alpha"
            )
    else:
        world = Resampled(known)
        start = min(max(world.units, 30), MOST_UNITS)
        source = asked.run or asked.logits
        said = [
            f"new photos are like the {world.units} units of {source}, drawn again and again; no others are counted",
            *([] if asked.run is None else ["val_select chose the model, which looks better there than on new photos"]),
        ]
    least = planned.least_units(risk)
    if least > MOST_UNITS:
        raise InputError(
            f"alpha and min_coverage must be provable with {MOST_UNITS:,} units, got {risk:g} and "
            f"{asked.min_coverage:g}, which take {least:.3g} even without an error; ask for less"
        )
    ticks = iter(track(range(10**9), "simulating calibrations", total=5 * _draws(start)))
    with ThreadPoolExecutor(2) as pool:
        run = _Calibrations(planned, world, risk, asked.seed, pool, lambda: next(ticks))
        needed = run.search(start, power)
        for size in {needed, *([] if n is None else [n])}:
            run.power(size, _draws(size))
        for size in (max(1, needed // 2), 2 * needed):
            run.power(size)
        best = None if n is None else clopper_pearson_upper(0, planned.most_trials(n), 1 - planned.level)
        smallest = None if n is None or best is None else _smallest_alpha(run, n, power, best)
    found = CalibrationPlan(
        policy=asked.policy,
        alpha=risk,
        delta=delta,
        min_coverage=asked.min_coverage,
        **hoped,
        world=None if known is None else str(asked.run or asked.logits),
        positives=planned.positives,
        cells=cells,
        power=power,
        seed=asked.seed,
        n_certify=needed,
        n_val_calib=needed,
        table=[run.point(size) for size in sorted(run.found)],
        n=n,
        power_at_n=None if n is None else run.power(n),
        smallest_alpha_at_n=smallest,
        least_alpha_at_n=None if best == 1 else best,
        wish=f"with probability {1 - sum(delta):.6g}, {planned.wish}",
        assumptions=[
            *said,
            *planned.assumptions,
            "rows are independent, or count as groups",
            "val_select holds two thirds as many and fixes the order; a val_calib that is halved takes twice as many",
        ],
    )
    if asked.out is not None:
        found.write(asked.out / "plan.json")
        given = None if n is None or found.power_at_n is None else (n, found.power_at_n)
        sizes, powers = [0, *(one.n for one in found.table)], [0.0, *(one.power for one in found.table)]
        write_bytes(asked.out / "plan.png", power_png(sizes, powers, wished=power, needed=needed, given=given))
    return found


def _smallest_alpha(run: _Calibrations, n: int, power: float, least: float) -> float | None:
    """The smallest risk from ``least`` that ``n`` units certify with a power, to two digits; None below 1.

    Larger risks are certified more often, and say nothing more often.
    """

    def certifies(alpha: float) -> bool:
        return replace(run, alpha=alpha, found={}).reaches(n, power, useless=True)

    low, high = least, _LARGEST_ALPHA
    if low >= high or not certifies(high):
        return None
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if certifies(middle) else (middle, high)
    said = high
    while True:
        digit = last_digit(said, 2)
        said = min(round(math.ceil(said / digit) * digit, 12), _LARGEST_ALPHA)
        of = replace(run, alpha=said, found={})
        if of.reaches(n, power):
            return said
        if said == _LARGEST_ALPHA or of.power(n, useless=True) - of.power(n) > 1 - power:
            return None
        said *= 1.02


def _rows(asked: Plan) -> Rows | None:
    """The rows that are the world: a run's own of val_select, or those of a file; None: the curve is stated.

    Raises:
        InputError: a file that lacks what it must hold, or an option of the stated curve beside it.
        ArtifactError: the run has no ``val_select.npz``.
    """
    if asked.run is None and asked.logits is None:
        return None
    if asked.run is not None and asked.logits is not None:
        raise InputError("run and logits must not both be given, got both; one of them says what photos are like")
    stated = [name for name in ("expected_error", "expected_coverage") if getattr(asked, name) is not None]
    if stated:
        raise InputError(f"{stated[0]} must be left out where rows say it, got it with --run or --logits; drop one")
    from stage1_pro.training.calibration import file_rows, run_rows

    if asked.logits is not None:
        arrays = read_arrays(asked.logits, columns=asked.columns)
        return file_rows(asked.logits, arrays, asked.policy, said=f"positive in {asked.logits}")
    assert asked.run is not None
    path = asked.run / "val_select.npz"
    if not path.is_file():
        raise ArtifactError(f"{path} must exist, but there is no such file; run `stage1 train --run {asked.run}` first")
    return run_rows(Predictions.load(path))


def render(found: CalibrationPlan) -> str:
    """The answer, the table, and what it rests on."""
    lines = [
        f"wish: {found.wish}",
        f"needed: {found.n_certify:,} rows in val_calib, for a chance of {found.power:g} to certify it",
        "        count groups instead of rows where rows share a clip, a track or a place: one speaks for its group",
        *(
            []
            if found.world is None
            else ["        from few answers: others of such photos can ask for far fewer or far more"]
        ),
        "",
        f"{'val_calib':>14}{'power':>8}{'+-':>7}{'then answers':>14}",
    ]
    for point in found.table:
        mark = "  <- needed" if point.n == found.n_certify else "  <- given" if point.n == found.n else ""
        noise = "" if point.draws is None else f"{math.sqrt(point.power * (1 - point.power) / point.draws):.3f}"
        covered = "-" if point.coverage is None else f"{point.coverage:.0%}"
        lines.append(f"{point.n:>14,}{point.power:>8.2f}{noise:>7}{covered:>14}{mark}")
    if found.n is not None:
        lines += ["", f"with the given {found.n:,} the chance is {found.power_at_n:.2f}"]
        if found.least_alpha_at_n is None:
            lines.append(f"no risk below 1 can be certified with them at a chance of {found.power:g}")
        else:
            smallest = found.smallest_alpha_at_n
            said = "none that says something" if smallest is None else f"{smallest:.2g}"
            lines.append(
                f"smallest alpha certifiable with them at a chance of {found.power:g}: {said}; "
                f"{found.least_alpha_at_n:.4f} at best, if none is wrong and all are answered that may be"
            )
    by = "exact tests" if found.seed is None else f"simulated calibrations, seed {found.seed}"
    lines += ["", f"from {by}; assumed:"]
    return "\n".join([*lines, *(f"  - {text}" for text in found.assumptions)])


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
        if check_share("delta", value) < _LEAST_DELTA:
            raise InputError(f"delta must be at least {_LEAST_DELTA:g}, got {value:g}; rounding hides a smaller one")
    return given


def _cells(asked: Plan, *, several: bool) -> list[float]:
    """The share of each cell."""
    cells = asked.cells
    given = [float(value) for value in (cells if isinstance(cells, tuple) else (cells,))]
    if len(given) == 1 and given[0] in range(1, _MOST_CELLS + 1):
        given = [1 / given[0]] * int(given[0])
    shares = 1 <= len(given) <= _MOST_CELLS and all(value > 0 for value in given)
    if not (shares and abs(sum(given) - 1) <= 1e-6):
        raise InputError(
            f"cells must be 1 to {_MOST_CELLS} positive shares that sum to 1, or their number, got {cells}"
        )
    if not several and given != [1.0]:
        raise InputError(
            f"cells must be 1 for policy {asked.policy}, got {cells}; only scrc has limits of its own by cell"
        )
    return given
