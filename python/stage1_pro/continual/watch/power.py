"""How many audited exits see which harm: the fixed-sample binomial test, and the e-process that looks at any time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import ndtri

from stage1_pro.arguments import check_share
from stage1_pro.continual.watch.monitor import LEAST_AUDIT_RATE, Evidence, grow
from stage1_pro.errors import InputError
from stage1_pro.policies.planning import binomial_power
from stage1_pro.record import Record

DEFAULT_MULTIPLES = (1.5, 2.0, 3.0, 5.0)
# Beyond so many audited exits a simulation gives up; nobody audits as many for one answer.
_MOST_AUDITS = 20_000


class HarmPower(Record):
    """How many audited exits see one risk that is above alpha."""

    risk: float = Field(description="true risk of exits after the harm")
    n_normal: int = Field(description="one look, one-sided test, normal approximation")
    n_exact: int = Field(description="one look, exact binomial test: from so many on the power stays")
    n_anytime: int | None = Field(
        description="e-process that looks after every audit: alarms by then with the wished power; null beyond 20,000"
    )
    n_anytime_median: int | None
    decisions: int | None = Field(description="served decisions until n_anytime audited exits, on average")


class AuditPlan(Record):
    """What ``plan_audits`` found."""

    format_version: int = 1
    alpha: float
    delta: float
    power: float
    exit_rate: float
    audit_rate: float
    harms: list[HarmPower]
    runs: int = Field(description="simulated runs of the e-process")
    seed: int


def plan_audits(
    alpha: float,
    *,
    harms: Sequence[float] | None = None,
    delta: float = 0.05,
    power: float = 0.8,
    exit_rate: float = 0.7,
    audit_rate: float = 0.1,
    runs: int = 2000,
    seed: int = 0,
) -> AuditPlan:
    """Say how many audited exits tell each harm from alpha, with a wished power; fewer is a larger harm.

    ``n_normal`` and ``n_exact`` are for a test of "risk <= alpha" at level delta that looks once, at the end.
    ``n_anytime`` is for the e-process of the monitor, which looks after each audit and begins with the harm: quantiles
    over simulated runs, with a noise of a few percent.

    Args:
        alpha: limit of the risk, inside (0, 1).
        harms: true risks to see, each inside (alpha, 1); 1.5, 2, 3 and 5 times alpha by default.
        delta: chance of a false alarm.
        power: wished chance to see the harm.
        exit_rate: share of decisions that exit, in (0, 1].
        audit_rate: share of exits that are audited, at least 2%.
        runs: of the simulation.
        seed: of the simulation.

    Raises:
        InputError: an argument outside its range.
    """
    wished = {"alpha": alpha, "delta": delta, "power": power}
    for name, value in wished.items():
        check_share(name, value)
    if not 0 < exit_rate <= 1:
        raise InputError(f"exit_rate must be in (0, 1], got {exit_rate}; it is the share of decisions that exit")
    if not LEAST_AUDIT_RATE <= audit_rate <= 1:
        raise InputError(
            f"audit_rate must be in [{LEAST_AUDIT_RATE:g}, 1], got {audit_rate}; at least that share is always audited"
        )
    if runs < 100:
        raise InputError(f"runs must be 100 or more, got {runs}; fewer say little of a quantile")
    found = []
    if harms is None:
        harms = [alpha * multiple for multiple in DEFAULT_MULTIPLES if alpha * multiple < 1]
    for risk in harms:
        if not alpha < risk < 1:
            raise InputError(f"harms must be inside (alpha = {alpha:g}, 1), got {risk:g}; what is below is no harm")
    for risk in harms:
        took = _anytime(alpha, risk, delta, runs, seed, power)
        anytime = _quantile(took, power)
        found.append(
            HarmPower(
                risk=risk,
                n_normal=normal_audits(alpha, risk, delta, power),
                n_exact=exact_audits(alpha, risk, delta, power),
                n_anytime=anytime,
                n_anytime_median=_quantile(took, 0.5),
                decisions=None if anytime is None else math.ceil(anytime / (exit_rate * audit_rate)),
            )
        )
    return AuditPlan(**wished, exit_rate=exit_rate, audit_rate=audit_rate, harms=found, runs=runs, seed=seed)


def normal_audits(alpha: float, risk: float, delta: float, power: float) -> int:
    """Audited exits for one look, by the normal approximation: alpha .02, risk .04, delta .05, power .8 take 391."""
    spread = -ndtri(delta) * math.sqrt(alpha * (1 - alpha)) + ndtri(power) * math.sqrt(risk * (1 - risk))
    return math.ceil(float(spread / (risk - alpha)) ** 2)


def exact_audits(alpha: float, risk: float, delta: float, power: float) -> int:
    """Audited exits from which the exact binomial test at one look has the power, for every larger number as well.

    The test rejects at k errors where P(Bin(n, alpha) >= k) <= delta; its power saws with n.
    """
    n = np.arange(1, max(4 * normal_audits(alpha, risk, delta, power), 200) + 1, dtype=np.float64)
    # More wrong answers than alpha are fewer right ones than 1 - alpha.
    enough = binomial_power(n, 1 - alpha, delta, 1 - risk) >= power
    short = np.flatnonzero(~enough)
    return int(n[short[-1]]) + 1 if short.size else 1


def render(plan: AuditPlan) -> str:
    """The plan as a table and its assumptions."""
    lines = [
        f"audited exits that tell a risk from alpha = {plan.alpha:g}: false alarm {plan.delta:g}, power {plan.power:g}",
        "",
        f"{'true risk':>10}{'one look':>10}{'exact':>8}{'any time':>10}{'median':>8}{'decisions':>11}",
    ]
    for one in plan.harms:
        cells = [
            "-" if value is None else f"{value:,}" for value in (one.n_anytime, one.n_anytime_median, one.decisions)
        ]
        lines.append(f"{one.risk:>10.4g}{one.n_normal:>10,}{one.n_exact:>8,}{cells[0]:>10}{cells[1]:>8}{cells[2]:>11}")
    lines += [
        "",
        "one look: a single test after so many audits (normal approximation; exact: binomial)",
        f"any time: the e-process of the monitor, which may alarm after every audit ({plan.runs} simulated runs)",
        f"decisions: served until then; {plan.exit_rate:g} of them exit, {plan.audit_rate:g} of those are audited",
    ]
    return "\n".join(lines)


def _anytime(alpha: float, risk: float, delta: float, runs: int, seed: int, power: float) -> NDArray[np.float64]:
    """Audits until the e-process alarms, in runs that begin with the harm [runs]; inf where that is beyond the last."""
    rng = np.random.default_rng(seed)
    took = np.full(runs, np.inf)
    bets = Evidence(alpha=alpha, delta=delta).bets
    capital = np.zeros((runs, bets.size))
    for n in range(1, _MOST_AUDITS + 1):
        capital, value = grow(capital, n, np.asarray((rng.random(runs) < risk) - alpha, dtype=np.float64), bets)
        took = np.where(np.isinf(took) & (value >= 1 / delta), n, took)
        if np.isfinite(took).mean() > max(power, 0.5):
            break
    return took


def _quantile(took: NDArray[np.float64], share: float) -> int | None:
    value = float(np.sort(took)[math.ceil(share * took.size) - 1])
    return int(value) if math.isfinite(value) else None
