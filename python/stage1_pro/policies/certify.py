"""Certified thresholds: tests on integer counts or group means, with the group as the unit. NumPy only.

A certificate says: with probability at least 1 - delta over the draw of the certify rows, the risk of *this* threshold
is at most alpha (and its coverage at least so much). It is found by testing thresholds in an order that was frozen
before the certify rows were looked at (fixed-sequence testing; Angelopoulos et al., Learn then Test, 2110.01052), or it
is refused: "infeasible" is a result, with its reason, the smallest risk that could be certified and the rows needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal, TypedDict, Unpack, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.arguments import array, at_or_above, check_share, choice, floats, grid_of, on_grid, shown
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.notebook import Shown
from stage1_pro.policies.bounds import betting_p_value, coverage_p_value, errors_allowed, first_enough, trials_needed
from stage1_pro.policies.candidates import JOINT, Counts, Means, Mix, Mixed, Risk, choose, count_at_least, photo_shares
from stage1_pro.policies.certificate import LABELS_RIGHT, Method, RiskCounts, why_independent
from stage1_pro.policies.needed import Needed, units_needed
from stage1_pro.policies.planning import plan_calibration
from stage1_pro.policies.rows import Unit, counting_unit, one_each

CountedAs = Literal["auto", "rows", "groups", "group_means", "photos"]
# Without candidates, so many ranks share delta.
_SHARING_RANKS = 20


@dataclass(frozen=True, repr=False)
class Certificate(Shown):
    """A certified threshold, or why there is none.

    Counts, coverage and bounds are those at ``threshold``; of an infeasible one those at the candidate where it failed:
    the first one (of ``bonferroni`` and ``holm`` the one with the smallest p-value). ``alpha``, ``errors``, ``trials``
    and ``risk_bound`` are of the first risk; ``risks`` has all. With ``group_means`` counts are of groups: those with
    an accepted trial, those with an error among them; bounds and p-values come from the means.

    ``accepts`` is how to apply it. ``threshold`` is a number of the dtype that scores were certified in (float16,
    bfloat16, float32, whole numbers), so that ``scores >= threshold`` accepts the same rows in that dtype. Scores that
    were certified in a wider dtype and rounded since are other scores: nobody can tell what they were, and they are
    compared as they are. Certify in the dtype that will be served.
    """

    feasible: bool
    threshold: float | None  # accept iff score >= it; see ``accepts``
    coverage: float | None  # accepted units / units
    risk_bound: float | None
    min_certifiable_alpha: float | None  # the smallest one that would have passed; None when the coverage failed
    coverage_there: float | None
    smallest_of: str  # name of the risk that min_certifiable_alpha is of
    reason: str
    candidates: NDArray[np.float64]  # tested thresholds, in the order of testing
    p_values: NDArray[np.float64]  # of each; empty for crc, which tests nothing
    guarantee: str
    assumptions: tuple[str, ...]
    n: int
    accepted: int
    risks: tuple[RiskCounts, ...]
    unit: Unit
    method: Method
    delta: float
    min_coverage: float | None
    seed: int
    plan: Callable[[], Needed | None] = field(repr=False, compare=False)

    def accepts(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """Say which scores are accepted, of their shape: compared as float64, whatever their dtype; NaN never is.

        Raises:
            InputError: scores that are no numbers.
            NotReachableError: infeasible: there is no threshold.
        """
        if self.threshold is None:
            raise NotReachableError(f"the certificate must be feasible to accept anything, got: {self.reason}")
        return at_or_above("scores", scores, self.threshold)

    @cached_property
    def needed(self) -> Needed | None:
        """Units for 90% power with the margin of what was seen here; None when feasible, or when no number would do."""
        return None if self.feasible else self.plan()

    @property
    def n_needed(self) -> int | None:
        """Units for 90% power if errors are as seen here; None when feasible, or when no number would do."""
        return None if self.needed is None else self.needed.n

    @property
    def alpha(self) -> float:
        """What the first risk was to stay below."""
        return self.risks[0].alpha

    @property
    def trials(self) -> int:
        """Units that the first risk is a share of."""
        return self.risks[0].trials

    @property
    def errors(self) -> int:
        """Errors among them."""
        return self.risks[0].errors


class Options(TypedDict, total=False):
    """What ``certify_threshold`` hands on to ``certify``, which says what each is."""

    min_coverage: float | None
    candidates: ArrayLike | None
    method: Method
    groups: ArrayLike | None
    unit: CountedAs
    seed: int
    rows_independent: bool
    largest_group: int | None
    squares: Sequence[float] | None
    mix: Mix | None


def certify_threshold(
    scores: ArrayLike,
    errors: ArrayLike,
    *,
    alpha: float,
    delta: float,
    condition: Literal["exit", "exit&y=1"] = "exit",
    labels: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Certificate:
    """Find the laxest threshold whose risk is at most ``alpha`` with probability 1 - ``delta``, or why there is none.

    The form of ``certify`` for one risk.

    Args:
        scores: [N], higher is surer, in the dtype that will be served; NaN is never accepted.
        errors: [N] of 0 and 1.
        alpha: largest risk, inside (0, 1).
        delta: largest chance that the certificate is false, inside (0, 1).
        condition: ``exit``: risk = P(error | accept); ``exit&y=1``: P(error | accept, y = 1), from positives alone.
        labels: [N] of 0 and 1, for ``exit&y=1``.
        **options: see ``certify``.

    Raises:
        InputError: an argument is not what it must be.
    """
    trials, name, values = None, "error on accepted rows", _scores(scores)
    if isinstance(condition, str) and condition == "exit&y=1":
        if labels is None:
            raise InputError(
                "labels must be given for condition 'exit&y=1', got None; they say which rows are positive"
            )
        trials, name = _zero_one("labels", labels, values), "error on accepted positives"
    elif not isinstance(condition, str) or condition != "exit":
        raise InputError(f"condition must be 'exit' or 'exit&y=1', got {shown(condition)}; choose one")
    risk = Risk(name, alpha, _zero_one("errors", errors, values), trials)
    return certify(scores, [risk], delta=delta, **options)


def certify(
    scores: ArrayLike,
    risks: Sequence[Risk],
    *,
    delta: float,
    min_coverage: float | None = None,
    candidates: ArrayLike | None = None,
    method: Method = "ltt_fst",
    groups: ArrayLike | None = None,
    unit: CountedAs = "auto",
    seed: int = 0,
    rows_independent: bool = False,
    largest_group: int | None = None,
    squares: Sequence[float] | None = None,
    mix: Mix | None = None,
) -> Certificate:
    """Find the last threshold that passes every constraint, walking a frozen order until one fails.

    At each candidate the p-value is the largest of those of the risks and of the coverage: a threshold that breaks any
    of them passes with chance delta at most, so several constraints need no correction. Rows with equal scores are
    accepted together, NaN never is (it counts among all for the coverage).

    Candidates must come, order included, from rows that are not these (``order_candidates`` on the fit half). Without
    them the ranks of the scores are walked, never the labels: the rows strictly above the M-th largest score are
    independent draws from what lies above it. The start depends on counts alone. The last candidate accepts everything.

    With groups the unit is the group. The coverage is tested on one row of each group, drawn by ``seed``, each risk on
    one of its trials per group. The promise is then about one image drawn from a new group, and n counts groups.
    ``group_means`` promises the same from all rows: of group i with trials j let v_i be the mean of error and accepted,
    a_i the mean of accepted; the risk of that image (of that trial, where only some rows are trials) is E[v] / E[a], so
    E[v] >= alpha E[a] is tested by betting on the pairs (``betting_p_value``), and the coverage on the groups' accepted
    shares. It is worth it where groups differ within; where a group's rows are all alike, one row each is exact and
    takes fewer groups.

    ``photos`` promises shares of photos instead: v_i and a_i are sums over the rows of group i, as shares of the
    largest group that can ever come, which the caller states; E[v] / E[a] is then the share of all accepted photos
    that are wrong, and large groups count as much as they hold.

    Methods (``delta`` is the chance of a false certificate, ``crc`` apart):

    - ``ltt_fst``: the walk above, each test at the full delta. The default.
    - ``bonferroni``, ``holm``: all candidates share delta, in any order; the laxest that passes.
    - ``sgr``: binary search from strict to lax (Geifman & El-Yaniv 2017); needs a risk that does not fall as thresholds
      get laxer. With ``min_coverage`` delta is halved between risk and coverage.
    - ``rcps``: promises another quantity, the joint share P(error and accepted) of all trials (MPR for ``exit&y=1``),
      at most P(error | accepted) but a weaker wish. It cannot fall as thresholds get laxer, so each is tested
      pointwise at delta (Bates et al. 2101.02703). With ``min_coverage`` delta is halved.
    - ``crc``: the same joint share in expectation over calibration and new images (2208.02814), nothing about this
      threshold alone, no use of delta, and no ``min_coverage``.

    Args:
        scores: [N], higher is surer.
        risks: at least one.
        delta: largest chance that the certificate is false, inside (0, 1).
        min_coverage: least coverage, inside (0, 1).
        candidates: [T] thresholds in the order of testing; ranks when None, which ``group_means`` has not.
        method: see above; ``bonferroni`` and ``holm`` take 20 ranks where no candidates are given.
        groups: [N] clip or track of every row.
        unit: what is counted: groups where rows share one (``auto``), by one row each or by their means
            (``group_means``), by their sums (``photos``), or rows, which needs ``rows_independent``.
        seed: of the row that speaks for its group.
        rows_independent: the caller states that rows of one group are independent.
        largest_group: with ``photos``: rows of the largest group that can ever come.
        squares: with ``photos``: mean square of groups' trials as shares of the largest, of the coverage and of each
            risk, which bets begin with; from other rows than these.
        mix: promise the coverage, and risks of all rows, of another mix of classes, in which each class is as it is
            here (label shift); one row a unit, with candidates.

    Raises:
        InputError: an argument is not what it must be; grouped rows are to count as rows without that statement.
    """
    values = check_rows(scores, risks, delta, min_coverage)
    _check_method(method, min_coverage)
    counted, names = counting_unit(groups, values.size, unit, rows_independent)
    everyone = np.ones(values.size, dtype=bool)
    drawn = one_each(names, everyone, seed)
    among = [drawn if risk.trials is None else one_each(names, risk.trials, seed) for risk in risks]
    n = drawn.size
    if counted == "photos":
        if largest_group is None or names is None or method in JOINT:
            raise InputError(
                f"largest_group must be given where the unit is photos, with a method other than "
                f"{' and '.join(JOINT)}, got {largest_group} with {method}"
            )
        photo_shares(names, None, largest_group)
        squares = None if squares is None else _squares(squares, 1 + len(risks))
    elif squares is not None:
        raise InputError(f"squares must go with groups counted as photos, got them with {counted}; drop them")
    elif largest_group is not None and unit != "photos":
        raise InputError(f"largest_group must go with unit photos, got it with {unit}; drop it or ask for photos")
    if mix is not None:
        _check_mix(check_mix(mix, values.size), drawn, counted, candidates, method)
    if candidates is None and counted in ("group_means", "photos"):
        raise InputError(
            f"candidates must be given where the unit is {counted}, got None; rows above a rank of one row each are "
            "independent, whole groups are not: take them from the fit half with order_candidates"
        )
    if candidates is None:
        order = _ranks(values, drawn, among[0], risks[0].alpha, delta, min_coverage, method)
    else:
        order = _given_order(candidates, method)
    # What a narrower dtype rounds in a comparison must be on its grid: scores of that dtype are then decided alike.
    order = on_grid(order, grid_of(scores))
    joint = method in JOINT
    tests: Counts | Means
    if counted in ("group_means", "photos") and names is not None:
        largest = largest_group if counted == "photos" else None
        tests = Means(values, risks, names, order, delta, min_coverage, joint, seed, largest, squares)
    else:
        tests = Counts(values, risks, drawn, among, order, min_coverage, joint)
        if mix is not None:
            tests = Mixed(values, tests, drawn, mix, delta, seed)
    choice = choose(tests, method, delta)
    chosen, shown = choice.deployed, choice.shown
    found = tests.risks_at(shown, choice.level)
    if method == "crc":
        found = tuple(
            one.model_copy(update={"bound": tests.crc_risk(i, shown), "p_value": 1.0}) for i, one in enumerate(found)
        )
    covered = bool(n) and float(tests.p_coverage(np.array([shown]))[0]) <= choice.coverage_level
    reason, smallest, there = "", None, None
    if chosen is None:
        where = f"at threshold {order[shown]:.3g}"
        reason = _reason(
            found, where, tests.accepted_at(shown), n, counted, choice.level, min_coverage, covered,
            expectation=method == "crc",
        )  # fmt: skip
        if covered or (min_coverage is None and n):
            smallest, there = found[0].bound, tests.coverage_at(shown)
    return Certificate(
        feasible=chosen is not None,
        threshold=None if chosen is None else float(order[chosen]),
        coverage=tests.coverage_at(shown) if n else None,
        risk_bound=found[0].bound,
        min_certifiable_alpha=smallest,
        coverage_there=there,
        smallest_of=risks[0].name,
        reason=reason,
        candidates=order[choice.tested],
        p_values=choice.p_values,
        guarantee="none: infeasible"
        if chosen is None
        else _sentence(risks, n, counted, delta, min_coverage, method, mixed=mix is not None),
        assumptions=_assumptions(
            counted,
            why_independent(grouped=groups is not None, stated=rows_independent),
            candidates is None,
            method,
            largest_group,
            mixed=mix is not None,
        ),
        n=n,
        accepted=tests.accepted_at(shown),
        risks=found,
        unit=counted,
        method=method,
        delta=delta,
        min_coverage=min_coverage,
        seed=seed,
        plan=partial(_needed_in_mix, tests, shown, delta)
        if isinstance(tests, Mixed)
        else partial(_needed_jointly, found[0], n, delta, "crc" if method == "crc" else "rcps")
        if joint or risks[0].otherwise is not None
        else partial(
            units_needed,
            values,
            risks,
            names,
            delta=delta,
            min_coverage=min_coverage,
            start="ranks" if candidates is None or method != "ltt_fst" else float(order[0]),
        ),
    )


def check_rows(
    scores: ArrayLike, risks: Sequence[Risk], delta: float, min_coverage: float | None
) -> NDArray[np.float64]:
    """Scores [N] in float64; raises InputError as ``certify`` says."""
    values = _scores(scores)
    check_share("delta", delta)
    if min_coverage is not None:
        check_share("min_coverage", min_coverage)
    if not isinstance(risks, list | tuple) or not risks or not all(isinstance(risk, Risk) for risk in risks):
        raise InputError(f"risks must be a list of at least one Risk, got {shown(risks)}; make them with Risk")
    for risk in risks:
        if risk.errors.shape != values.shape or (risk.trials is not None and risk.trials.shape != values.shape):
            raise InputError(f"{risk.name} must have shape [{values.size}] as scores, got {list(risk.errors.shape)}")
    return values


def _scores(given: ArrayLike) -> NDArray[np.float64]:
    values = floats("scores", given)
    if values.ndim != 1:
        raise InputError(f"scores must have shape [N], got {list(values.shape)}; give one score per row")
    return values


def _squares(given: ArrayLike, n: int) -> list[float]:
    values = floats("squares", given)
    if values.shape != (n,) or not ((values > 0) & (values <= 1)).all():
        raise InputError(
            f"squares must be {n} numbers in (0, 1], of the coverage and of each risk, got {shown(given)}; leave it "
            "out, or take them from other rows"
        )
    return [float(one) for one in values]


def check_mix(mix: Mix, n: int) -> Mix:
    """The same; raises InputError where it is not of n rows."""
    if not isinstance(mix, Mix) or mix.labels.size != n:
        got = shown(mix) if not isinstance(mix, Mix) else f"one of {mix.labels.size}"
        raise InputError(f"mix must be a Mix of {n} rows as scores, got {got}; make one with Mix(shares, labels)")
    return mix


def _check_mix(mix: Mix, drawn: NDArray[np.int64], unit: Unit, candidates: ArrayLike | None, method: Method) -> None:
    if unit not in ("rows", "groups") or candidates is None or method in JOINT:
        raise InputError(
            f"mix must go with candidates, one row a unit, and a method other than {' and '.join(JOINT)}, got "
            f"{'none' if candidates is None else 'them'}, {unit} and {method}"
        )
    if not mix.where(drawn).known:
        raise NotReachableError(
            "each class of mix must be among the rows that certify, got INFEASIBLE: one has none, so nothing is known "
            "of it; bring photos of it"
        )


def _check_method(method: Method, min_coverage: float | None) -> None:
    choice("method", method, get_args(Method))
    if method == "crc" and min_coverage is not None:
        raise InputError(
            f"min_coverage must be None for crc, got {min_coverage}; it promises an expectation of one risk, nothing "
            "about the coverage: use ltt_fst"
        )


def _given_order(candidates: ArrayLike, method: Method) -> NDArray[np.float64]:
    """Candidates [T] in the order of testing: as given, or strict to lax where the method needs that."""
    order = floats("candidates", candidates)
    if order.ndim != 1 or order.size == 0 or np.isnan(order).any():
        raise InputError(
            f"candidates must be at least one threshold [T] without NaN, got shape {list(order.shape)}; "
            "take them from the fit half with order_candidates"
        )
    return order if method in ("ltt_fst", "bonferroni", "holm") else np.unique(order)[::-1]


def _ranks(
    values: NDArray[np.float64],
    drawn: NDArray[np.int64],
    trials: NDArray[np.int64],
    alpha: float,
    delta: float,
    min_coverage: float | None,
    method: Method = "ltt_fst",
) -> NDArray[np.float64]:
    """Thresholds just above one score after another, strict to lax, from a rank that counts alone decide.

    Methods that share delta take a few of them, evenly; those on the joint share all.
    """
    rows = drawn if min_coverage is not None else trials
    known = np.unique(values[rows][~np.isnan(values[rows])])
    # Just above a score: what is accepted lies strictly above it (the next number of its dtype, once on its grid).
    # Above -inf lies everything.
    order = np.append(np.nextafter(known[::-1], np.inf), -np.inf)
    if method in JOINT:
        return order[min(1, order.size - 1) :]
    above = count_at_least(values[rows], order)
    if min_coverage is not None:
        start = np.flatnonzero(coverage_p_value(above, rows.size, min_coverage) <= delta)
    else:
        # Where two errors would do: a start that one unlucky row ends is a poor one.
        start = np.flatnonzero(above >= trials_needed(2, alpha, delta))
    order = order[int(start[0]) :] if start.size else order[-1:]
    if method in ("bonferroni", "holm"):
        order = order[np.unique(np.linspace(0, order.size - 1, _SHARING_RANKS).round().astype(np.int64))]
    return order


def _needed_jointly(risk: RiskCounts, n: int, delta: float, method: Method) -> Needed | None:
    """Units for 90% power (rcps), or for the budget (crc), if the joint share is as it was seen."""
    if n == 0 or risk.trials == 0 or risk.errors / risk.trials >= risk.alpha:
        return None
    share, error = risk.trials / n, risk.errors / risk.trials
    if method == "rcps":
        return Needed(plan_calibration(risk.alpha, delta, share, error))
    return Needed(math.ceil((1 - risk.alpha) / (risk.alpha - error) / share))


def _needed_in_mix(tests: Mixed, at: int, delta: float) -> Needed | None:
    """Units for 90% power in a mix: those of an exact test, times what bets take more where nothing is wrong."""
    (error, share), alpha = tests.rate_at(at), tests.risks[0].alpha
    if not share or error >= alpha:
        return None
    weight, variance = float(tests.whole.mean()), alpha * (1 - alpha) * tests.square
    bets = first_enough(
        lambda n: betting_p_value(np.zeros(n), alpha, delta, weights=np.full(n, weight), variance=variance) <= delta,
        1, 10**5,
    )  # fmt: skip
    exact = plan_calibration(alpha, delta, share, error)
    return None if bets is None else Needed(math.ceil(exact * bets / trials_needed(0, alpha, delta)))


def _reason(
    risks: tuple[RiskCounts, ...],
    at: str,
    accepted: int,
    n: int,
    unit: Unit,
    delta: float,
    min_coverage: float | None,
    covered: bool,
    *,
    expectation: bool,
) -> str:
    unit = "rows" if unit == "rows" else "groups"
    if n == 0:
        return f"there are no certify {unit}"
    where = f"{at}, {accepted} of {n} {unit} are accepted"
    if min_coverage is not None and not covered:
        return f"{where}, too few to certify a coverage of {min_coverage:g} at delta {delta:g}"
    parts = [
        f"{risk.name} is {risk.errors} of {risk.trials} (upper bound {risk.bound:.4g}, wished {risk.alpha:g})"
        + (
            f", and even no error at all would need {trials_needed(0, risk.alpha, delta)}"
            if not expectation and int(errors_allowed(risk.trials, risk.alpha, delta)) < 0
            else ""
        )
        for risk in risks
        if risk.p_value > delta
    ]
    return f"{where}, where {' and '.join(parts)}" if parts else f"{where}: a threshold that accepts none is no answer"


_HOW: dict[Method, str] = {
    "ltt_fst": "in a fixed sequence",
    "bonferroni": "that share delta",
    "holm": "that share delta step by step",
    "sgr": "in a binary search",
    "rcps": "at each threshold alone; the joint share cannot fall as it gets laxer",
    "crc": "",
}


def _sentence(
    risks: Sequence[Risk],
    n: int,
    unit: Unit,
    delta: float,
    min_coverage: float | None,
    method: Method,
    *,
    mixed: bool = False,
) -> str:
    image = {"rows": "a new image", "photos": "all images to come, large groups with all of theirs"}.get(
        unit, "one image drawn from a new group"
    )
    if unit in ("groups", "group_means") and any(risk.trials is not None for risk in risks):
        image += " (a rate of positives: one positive drawn from a new group that has any; such groups count alike)"
    units = "rows" if unit == "rows" else "groups"
    names = [
        risk.name
        if method not in JOINT
        else f"share of {'images' if risk.trials is None else 'positives'} that are accepted and wrong ({risk.name}, "
        "jointly with its acceptance)"
        for risk in risks
    ]
    wishes = [f"{name} at most {100 * risk.alpha:g}%" for name, risk in zip(names, risks, strict=True)]
    if method == "crc":
        return (
            f"On average over draws of {n} certify {units} and of {image}, and so not for this threshold alone: "
            f"{' and '.join(wishes)} (conformal risk control: an expectation)."
        )
    if min_coverage is not None:
        wishes.insert(0, f"coverage at least {100 * min_coverage:g}%")
    tests = {"group_means": "betting on group means", "photos": "betting on sums over groups"}.get(
        unit, "betting on rows that count by their class" if mixed else "exact binomial tests"
    )
    if mixed:
        image += ", in the mix of classes that was asked for"
    return (
        f"With probability at least {100 * (1 - delta):g}% over the draw of the {n} certify {units}, this holds of "
        f"{image}: {' and '.join(wishes)} ({tests} {_HOW[method]})."
    )


def _assumptions(
    unit: Unit, why: str, ranks: bool, method: Method, largest: int | None = None, *, mixed: bool = False
) -> tuple[str, ...]:
    units = "rows" if unit == "rows" else "groups"
    shifts = "only the mix of classes shifts, as was asked for" if mixed else "nothing shifts"
    found = [
        f"certify {units} are independent draws of what will be seen later, and {shifts}",
        LABELS_RIGHT,
        "model, wish and order of testing were fixed before anybody looked at the certify rows",
    ]
    if unit == "rows":
        found.append(why)
    if unit == "photos":
        found.append(f"no group holds more than {largest} images")
    if unit == "groups":
        found.append(
            "one row speaks for its group, drawn without a look at scores or errors; large groups count no more"
        )
    if unit == "group_means":
        found.append("the mean of its rows speaks for a group; large groups count no more")
    if method == "sgr":
        found.append("the risk does not fall as the threshold gets laxer")
    elif ranks and method not in JOINT:
        found.append(
            "the risk does not fall as the threshold gets laxer (ranks are walked, not thresholds of other rows)"
        )
    return tuple(found)


def _zero_one(name: str, given: ArrayLike, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    values = array(name, given)
    if values.shape != (scores.size,):
        raise InputError(f"{name} must have shape [{scores.size}] as scores, got {list(values.shape)}; one per row")
    if not np.isin(values, (0, 1)).all():
        raise InputError(f"{name} must be 0 or 1, got other values; exact binomial bounds need 0/1 losses")
    return values.astype(bool)
