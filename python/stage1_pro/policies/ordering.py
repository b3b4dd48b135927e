"""Candidates and their order from the fit half, the certificate from the other; what is stored of it, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc

from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.policies.bounds import binomial_cdf
from stage1_pro.policies.candidates import Risk, group_weights, ranked
from stage1_pro.policies.certificate import NOT_COUNTED, CertificateRecord
from stage1_pro.policies.certify import Certificate, certify
from stage1_pro.policies.counts import gaps
from stage1_pro.policies.needed import units_needed
from stage1_pro.policies.rows import check_halves


def order_candidates(
    scores: ArrayLike,
    risks: Sequence[Risk],
    *,
    n_certify: int,
    min_coverage: float | None = None,
    groups: ArrayLike | None = None,
    lowest: float = -math.inf,
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

    Raises:
        InputError: no row of the fit half has a score.
    """
    values = np.asarray(scores, dtype=np.float64)
    weights = group_weights(groups, np.ones(values.size, dtype=bool))
    order = ranked(values)
    if order.size == 0:
        raise InputError(
            "scores of the fit half must have at least one that is not NaN, got none; calibrate on more rows"
        )
    last, thresholds = gaps(values[order], lowest)
    n_fit = weights.sum()
    scale = n_certify / n_fit
    expected = np.zeros(last.size)
    for risk in risks:
        share = group_weights(groups, np.ones(values.size, dtype=bool) if risk.trials is None else risk.trials)
        m, k = np.cumsum(share[order])[last] * scale, np.cumsum(share[order] * risk.errors[order])[last] * scale
        expected = np.maximum(expected, binomial_cdf(k, m, risk.alpha))
    if min_coverage is None:
        return thresholds[int(expected.argmin()) :]
    covered = np.cumsum(weights[order])[last]
    margin = 3 * math.sqrt(min_coverage * (1 - min_coverage) * (1 / n_fit + 1 / max(n_certify, 1)))
    reached = np.flatnonzero(covered / n_fit >= min_coverage + margin)
    accepted = np.minimum(covered * scale, n_certify)
    expected = np.maximum(expected, betainc(accepted, n_certify - accepted + 1.0, min_coverage))
    start = max(int(reached[0]) if reached.size else last.size - 1, int(expected.argmin()))
    return thresholds[start:]


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

    Raises:
        InputError: a half is empty, a group is in both, or another argument is not what it must be.
    """
    values = np.asarray(scores, dtype=np.float64)
    names = None if groups is None else np.asarray(groups)
    fit = check_halves(halves, values.size, names)

    def part(rows: NDArray[np.bool_], wished: Sequence[Risk]) -> list[Risk]:
        return [
            replace(risk, errors=risk.errors[rows], trials=None if risk.trials is None else risk.trials[rows])
            for risk in wished
        ]

    n_certify = int((~fit).sum()) if names is None else np.unique(names[~fit]).size

    def attempt(wished: Sequence[Risk]) -> Certificate:
        candidates = order_candidates(
            values[fit], part(fit, wished), n_certify=n_certify, min_coverage=min_coverage,
            groups=None if names is None else names[fit], lowest=lowest,
        )  # fmt: skip
        return certify(
            values[~fit], part(~fit, wished), delta=delta, min_coverage=min_coverage, candidates=candidates,
            groups=None if names is None else names[~fit], seed=seed,
        )  # fmt: skip

    found = attempt(risks)
    if found.feasible:
        return found
    # Both halves say how good answers are, and the walk of more units would start elsewhere.
    plan = partial(units_needed, values, risks, names, delta=delta, min_coverage=min_coverage, start="halves")
    found = replace(found, plan=plan)
    return found if not smallest else _with_smallest(found, risks, attempt)


def _with_smallest(
    found: Certificate, risks: Sequence[Risk], attempt: Callable[[Sequence[Risk]], Certificate]
) -> Certificate:
    """An infeasible certificate with the smallest alpha of the risk that failed at which the same walk succeeds.

    Another alpha walks from another threshold, so it is searched for, not read off the walk that failed. The number
    given has four digits and was tried. The other risks keep their alphas.
    """
    place = next((i for i, risk in enumerate(found.risks) if risk.p_value > found.delta), 0)

    def tried(alpha: float) -> Certificate:
        return attempt([replace(risk, alpha=alpha) if i == place else risk for i, risk in enumerate(risks)])

    nothing = replace(found, min_certifiable_alpha=None, coverage_there=None, smallest_of=risks[place].name)
    low, high = risks[place].alpha, risks[place].alpha
    while not tried(high).feasible:
        if high >= 0.999:
            return nothing
        low, high = high, min(0.999, 2 * high)
    while high > low * 1.0005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if tried(middle).feasible else (middle, high)
    # Upwards in the fourth digit; the walk may fail at a number between, so what is said is tried.
    digit = 10.0 ** (math.floor(math.log10(high)) - 3)
    for step in range(20):
        said = round((math.ceil(high / digit) + step) * digit, 12)
        if said < 1 and (there := tried(said)).feasible:
            return replace(nothing, min_certifiable_alpha=said, coverage_there=there.coverage)
    return nothing


def record(certificate: Certificate, *, claims: int, use: int | None) -> CertificateRecord:
    """Write a feasible certificate as what is stored: counts, p-values and the promise in words.

    Args:
        certificate: a feasible one.
        claims: how many claims its delta was divided for.
        use: which of them this is; None when nobody counted.
    """
    same = {name: getattr(certificate, name) for name in CertificateRecord.model_fields if hasattr(certificate, name)}
    (place,) = np.flatnonzero(certificate.candidates == certificate.threshold)[:1]
    more = {
        "first_candidate": float(certificate.candidates[0]),
        "n_tested": certificate.candidates.size,
        "p_value": None if certificate.method == "crc" else float(certificate.p_values[place]),
        "assumptions": [*certificate.assumptions, *([NOT_COUNTED] if use is None else [])],
    }
    return CertificateRecord(**{**same, **more, "claims": claims, "use": use})


def infeasible(certificate: Certificate, wish: str) -> NotReachableError:
    """Build the error of a wish that cannot be certified: why, what could be, and how many rows it takes.

    Args:
        certificate: an infeasible one.
        wish: what was asked for, in words.
    """
    said = f"{wish} must be certifiable on the certify half, but it is INFEASIBLE: {certificate.reason}. "
    what, unit = certificate.smallest_of, certificate.unit
    if certificate.min_certifiable_alpha is None:
        said += f"No {what} at all could be certified there"
    else:
        said += (
            f"The smallest {what} that could be certified is {certificate.min_certifiable_alpha:.4g}, at coverage "
            f"{certificate.coverage_there or 0:.4g}"
        )
    needed, more = certificate.needed, "Bring more, or choose"
    untried = [risk.name for risk in certificate.risks if risk.trials == 0]
    if untried:
        said += f". No {unit} of the certify half that may exit tell anything of {' or '.join(untried)}"
        more = f"Bring {unit} of which it can be told, or choose"
    elif needed is None:
        said += f". No number of {unit} would do while so many answers are wrong"
        more = "Train a better Stage A, ask for less, or choose"
    elif needed.n <= certificate.n:
        said += f". About {needed} {unit} in the certify half succeed 9 times in 10; these {certificate.n} did not"
    else:
        said += (
            f". With answers as good as these about {needed} {unit} in the certify half would do (it has "
            f"{certificate.n}; val_calib is cut in two, so twice that there)"
        )
    return NotReachableError(f"{said}. {more} with --guarantee none, which promises nothing. No policy was written")
