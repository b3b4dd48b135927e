"""Candidates and their order from some rows, the certificate from others; what is stored of it, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc

from stage1_pro.arguments import Grid, choice, flag, grid_of, names, number, whole
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.policies.bounds import MOST_UNITS, binomial_cdf, last_digit
from stage1_pro.policies.candidates import Counts, Mix, Risk, group_weights, photo_shares, ranked
from stage1_pro.policies.certificate import NOT_COUNTED, CertificateRecord
from stage1_pro.policies.certify import Certificate, certify, check_mix, check_rows
from stage1_pro.policies.counts import gaps
from stage1_pro.policies.needed import units_needed
from stage1_pro.policies.rows import check_halves, counting_unit, one_each

_BETTING_STEPS = 100


def order_candidates(
    scores: ArrayLike,
    risks: Sequence[Risk],
    *,
    n_certify: int,
    min_coverage: float | None = None,
    groups: ArrayLike | None = None,
    lowest: float = -math.inf,
    grid: Grid | None = None,
) -> NDArray[np.float64]:
    """Give thresholds [T] from the fit half, in the order in which the certify half will test them.

    All thresholds that part two scores, in the middle of their gap, strict to lax. Where the walk starts decides its
    power, and only the fit half and the size of the certify half may decide that. It starts where the largest p-value
    to expect is smallest; with ``min_coverage`` c0 never stricter than coverage c0 + 3 sqrt(c0 (1 - c0) (1/n_fit +
    1/n_certify)), below which chance in either half would fail the test of the coverage. Rows are weighted: groups
    count alike.

    Args:
        scores: [N] of the fit half; NaN is never accepted.
        risks: of the fit half's rows.
        n_certify: rows, or groups, of the certify half.
        min_coverage: the least coverage that will be certified.
        groups: [N] of the fit half.
        lowest: lower end of the scores' range, closes the last gap.
        grid: dtype that scores came in, which thresholds are numbers of; that of ``scores`` by default.

    Raises:
        InputError: no row of the fit half has a score, or another argument is not what it must be.
    """
    values = check_rows(scores, risks, 0.5, min_coverage)
    whole("n_certify", n_certify, most=MOST_UNITS)
    number("lowest", lowest)
    units = None if groups is None else names("groups", groups, values.size)
    found = _Expected(values, risks, n_certify, min_coverage, units, lowest, _grid(grid, scores))
    return found.thresholds[found.start([risk.alpha for risk in risks]) :]


def _grid(asked: Grid | None, scores: ArrayLike) -> Grid:
    if asked is None:
        return grid_of(scores)
    choice("grid", asked, get_args(Grid))
    return asked


class _Expected:
    """All thresholds of the fit half, strict to lax, with the counts to expect on the certify half at each."""

    def __init__(
        self,
        values: NDArray[np.float64],
        risks: Sequence[Risk],
        n_certify: int,
        min_coverage: float | None,
        groups: NDArray[np.generic] | None,
        lowest: float,
        grid: Grid,
        mix: Mix | None = None,
    ) -> None:
        everyone = np.ones(values.size, dtype=bool)
        counts_more = 1.0 if mix is None else mix.ratios()
        weights, order = group_weights(groups, everyone) * counts_more, ranked(values)
        if order.size == 0:
            raise InputError(
                "scores of the rows that fix the order must have one that is not NaN, got none; calibrate on more rows"
            )
        last, self.thresholds = gaps(values[order], lowest, grid)
        n_fit = weights.sum()
        scale, changes = n_certify / n_fit, np.zeros(last.size, dtype=bool)
        self.counts, self.first = [], 0
        for risk in risks:
            share = weights if risk.trials is None else group_weights(groups, risk.trials)
            m, wrong = np.cumsum(share[order])[last], share * risk.errors
            k = np.cumsum(wrong[order])[last]
            if risk.otherwise is not None:
                other = share * risk.otherwise
                m, k = np.full(last.size, share.sum()), k + other.sum() - np.cumsum(other[order])[last]
            m, k = m * scale, k * scale
            self.counts.append((k, m))
            changes[:-1] |= k[1:] != k[:-1]
        self.coverage = np.zeros(last.size)
        if min_coverage is not None:
            covered = np.cumsum(weights[order])[last]
            margin = 3 * math.sqrt(min_coverage * (1 - min_coverage) * (1 / n_fit + 1 / max(n_certify, 1)))
            reached = np.flatnonzero(covered / n_fit >= min_coverage + margin)
            self.first = int(reached[0]) if reached.size else last.size - 1
            accepted = np.minimum(covered * scale, n_certify)
            self.coverage = betainc(accepted, n_certify - accepted + 1.0, min_coverage)
        # While errors stay the same, every p-value falls with the trials: only where they end can one be smallest.
        changes[-1] = True
        self.ends = np.flatnonzero(changes)

    def start(self, alphas: Sequence[float]) -> int:
        """Where the walk starts for these limits of the risks: at the smallest of the largest p-values to expect."""
        best = int(self._largest(self.ends, alphas).argmin())
        stretch = np.arange(self.ends[best - 1] + 1 if best else 0, self.ends[best] + 1)
        return max(self.first, int(stretch[self._largest(stretch, alphas).argmin()]))

    def _largest(self, at: NDArray[np.int64], alphas: Sequence[float]) -> NDArray[np.float64]:
        found = self.coverage[at]
        for (k, m), alpha in zip(self.counts, alphas, strict=True):
            found = np.maximum(found, binomial_cdf(k[at], m[at], alpha))
        return found


def certify_halves(
    scores: ArrayLike,
    risks: Sequence[Risk],
    halves: ArrayLike,
    *,
    delta: float,
    min_coverage: float | None = None,
    groups: ArrayLike | None = None,
    lowest: float = -math.inf,
    seed: int = 0,
    smallest: bool = True,
    grid: Grid | None = None,
    largest_group: int | None = None,
    rows_independent: bool = False,
    alike: bool = True,
    mix: Mix | None = None,
) -> Certificate:
    """Take candidates and their order from the fit half, and certify on the other: ``order_candidates``, ``certify``.

    Args:
        scores: [N] of both halves.
        risks: of the rows of both halves.
        halves: [N] of ``fit`` and ``certify``.
        delta: largest chance that the certificate is false.
        min_coverage: least coverage.
        groups: [N] clip or track of every row.
        lowest: lower end of the scores' range.
        seed: of the row that speaks for its group.
        smallest: search for the smallest risk that can be certified, where the one wished cannot.
        grid: dtype that scores came in; that of ``scores`` by default.
        largest_group: promise shares of photos, in groups of at most so many; None: of groups.
        rows_independent: the caller states that rows are independent, where there are no groups.
        alike: both halves say how good answers are; False: the fit half chose the model.
        mix: of the rows of both halves: what is promised is of this mix of classes.

    Raises:
        InputError: a half is empty, a group is in both, or another argument is not what it must be.
    """
    values = check_rows(scores, risks, delta, min_coverage)
    units = None if groups is None else names("groups", groups, values.size)
    fit = check_halves(halves, values.size, units)

    def part(rows: NDArray[np.bool_]) -> list[Risk]:
        return [risk.where(rows) for risk in risks]

    n_certify = int((~fit).sum()) if units is None else np.unique(units[~fit]).size
    if mix is not None:
        certifying = check_mix(mix, values.size).where(~fit)
        everyone = np.ones(certifying.labels.size, dtype=bool)
        n_certify = int(certifying.where(one_each(None if units is None else units[~fit], everyone, seed)).effective)
    flag("smallest", smallest)
    flag("alike", alike)
    if flag("rows_independent", rows_independent) and units is not None:
        raise InputError("rows_independent must be False where groups are given, got True; choose one")
    photos = largest_group is not None and units is not None and np.unique(units).size < units.size
    bets, squares = photos or mix is not None, None
    if largest_group is not None and units is not None:
        squares = mean_squares(units[fit], [None, *(risk.trials for risk in part(fit))], largest_group)
    expected = _Expected(
        values[fit], part(fit), n_certify, min_coverage, None if units is None or photos else units[fit],
        number("lowest", lowest), _grid(grid, scores), None if mix is None else mix.where(fit),
    )  # fmt: skip
    rest, others, certain = values[~fit], None, part(~fit)
    if units is not None:
        if largest_group is not None:
            photo_shares(units[~fit], None, largest_group)
        # Numbers in the order of the names: they are sorted at every attempt.
        others = np.unique(units[~fit], return_inverse=True)[1]

    def attempt(alphas: Sequence[float]) -> Certificate:
        wished = [replace(risk, alpha=alpha) for risk, alpha in zip(certain, alphas, strict=True)]
        candidates = expected.thresholds[expected.start(alphas) :]
        if bets:
            # Every test looks at all groups: as many thresholds as tell coverages a percent apart.
            steps = np.linspace(0, candidates.size - 1, min(candidates.size, _BETTING_STEPS))
            candidates = candidates[steps.astype(np.int64)]
        return certify(
            rest, wished, delta=delta, min_coverage=min_coverage, candidates=candidates, groups=others, seed=seed,
            unit="photos" if photos else "auto", largest_group=largest_group if photos else None,
            squares=squares if photos else None, rows_independent=rows_independent,
            mix=None if mix is None else mix.where(~fit),
        )  # fmt: skip

    alphas = [risk.alpha for risk in risks]
    found = attempt(alphas)
    if found.feasible:
        return found
    if not bets and all(risk.otherwise is None for risk in risks):
        # The walk of more units would start elsewhere.
        seen = (values, risks, units) if alike else (rest, certain, others)
        plan = partial(units_needed, *seen, delta=delta, min_coverage=min_coverage, start="halves")
        found = replace(found, plan=plan)
    if not smallest:
        return found
    _, names_of = counting_unit(others, rest.size, "auto", False)
    everyone = np.ones(rest.size, dtype=bool)
    drawn = one_each(names_of, everyone, seed)
    among = [drawn if risk.trials is None else one_each(names_of, risk.trials, seed) for risk in certain]
    tests = Counts(rest, certain, drawn, among, expected.thresholds, min_coverage, joint=False)

    def passes(alphas: Sequence[float]) -> bool:
        """Whether the walk's first candidate does, which is what feasible means."""
        if bets:
            return attempt(alphas).feasible
        at = np.array([expected.start(alphas)])
        return bool(tests.accepted[at] > 0 and max(tests.p_coverage(at), tests.p_risk(at, alphas)) <= delta)

    return _with_smallest(found, alphas, passes, attempt)


def mean_squares(groups: NDArray[np.generic], trials: Sequence[NDArray[np.bool_] | None], largest: int) -> list[float]:
    """Mean squares of groups' trials as shares of the largest group, for ``certify``; 1 where there is no trial."""
    shares = [photo_shares(groups, one, largest) for one in trials]
    return [float((one**2).mean()) if one.size else 1.0 for one in shares]


def _with_smallest(
    found: Certificate,
    alphas: list[float],
    passes: Callable[[Sequence[float]], bool],
    attempt: Callable[[Sequence[float]], Certificate],
) -> Certificate:
    """An infeasible certificate with the smallest alpha of the risk that failed at which the same walk succeeds.

    Another alpha walks from another threshold, so it is searched for, not read off the walk that failed. The number
    given has four digits and was tried. The other risks keep their alphas.
    """
    place = next((i for i, risk in enumerate(found.risks) if risk.p_value > found.delta), 0)

    def with_alpha(alpha: float) -> list[float]:
        return [*alphas[:place], alpha, *alphas[place + 1 :]]

    nothing = replace(found, min_certifiable_alpha=None, coverage_there=None, smallest_of=found.risks[place].name)
    low, high = alphas[place], alphas[place]
    while not passes(with_alpha(high)):
        if high >= 0.999:
            return nothing
        low, high = high, min(0.999, 2 * high)
    while high > low * 1.0005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if passes(with_alpha(middle)) else (middle, high)
    # Upwards in the fourth digit; the walk may fail at a number between, so what is said is tried.
    digit = last_digit(high, 4)
    for step in range(20):
        said = round((math.ceil(high / digit) + step) * digit, 12)
        if said < 1 and passes(with_alpha(said)):
            there = attempt(with_alpha(said))
            return replace(nothing, min_certifiable_alpha=said, coverage_there=there.coverage)
    return nothing


def record(
    certificate: Certificate, *, claims: int, use: int | None, largest_group: int | None = None
) -> CertificateRecord:
    """Write a feasible certificate as what is stored: counts, p-values and the promise in words.

    Args:
        certificate: a feasible one.
        claims: how many claims its delta was divided for.
        use: which of them this is; None when nobody counted.
        largest_group: that a promise of photos was asked for with.
    """
    same = {name: getattr(certificate, name) for name in CertificateRecord.model_fields if hasattr(certificate, name)}
    (place,) = np.flatnonzero(certificate.candidates == certificate.threshold)[:1]
    more = {
        "first_candidate": float(certificate.candidates[0]),
        "n_tested": certificate.candidates.size,
        "p_value": None if certificate.method == "crc" else float(certificate.p_values[place]),
        "assumptions": [*certificate.assumptions, *([NOT_COUNTED] if use is None else [])],
    }
    return CertificateRecord(**{**same, **more, "claims": claims, "use": use, "largest_group": largest_group})


def infeasible(certificate: Certificate, wish: str, *, halved: bool) -> NotReachableError:
    """Build the error of a wish that cannot be certified: why, what could be, and how many rows it takes.

    Args:
        certificate: an infeasible one.
        wish: what was asked for, in words.
        halved: a half of the rows given fixed the order.
    """
    said = (
        f"{wish} must be certifiable on the rows kept for the certificate, but it is INFEASIBLE: {certificate.reason}. "
    )
    what, unit = certificate.smallest_of, certificate.unit
    if certificate.min_certifiable_alpha is None:
        said += f"No {what} at all could be certified there"
    else:
        said += (
            f"The smallest {what} that could be certified is {certificate.min_certifiable_alpha:.4g}, at coverage "
            f"{certificate.coverage_there or 0:.4g}"
        )
    needed = certificate.needed
    untried = [risk.name for risk in certificate.risks if risk.trials == 0]
    unit = "rows" if unit == "rows" else "groups"
    if untried:
        said += f". No {unit} kept for it that may exit tell anything of {' or '.join(untried)}: bring some that do"
    elif needed is None:
        said += f". No number of {unit} would do while so many answers are wrong: train a better Stage A"
    elif needed.n <= certificate.n:
        said += f". About {needed} {unit} kept for it succeed 9 times in 10; these {certificate.n} did not: bring more"
    else:
        twice = "; twice that in all, since half of them fix the order" if halved else ""
        said += f". With answers as good as these about {needed} {unit} kept for it would do (there are "
        said += f"{certificate.n}{twice})"
    return NotReachableError(f"{said}. No policy was written")
