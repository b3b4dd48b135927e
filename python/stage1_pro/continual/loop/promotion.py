"""The promotion test: a candidate replaces the champion only if it passes every part; most often it does not.

Parts, in this order:

1. Figures of the candidate's bundle (latency, size, parity) are within their limits.
2. The candidate's own certificate promises at least what the champion's does.
3. Non-inferiority on the anchor (the domain that must not be forgotten): mean reward overall and by slice, and every
   class's FNR. One family under Holm, with p-values that are exact for any number of clusters.
4. Only if all of that holds, one counted look at the guard. The lower bound of the paired reward difference by cluster
   bootstrap is above zero, and a betting test on clusters' means, exact for any number of clusters of any size, agrees.
   A bootstrap alone would let five lucky rows pass.

"No promotion" is a result like any other. NumPy only; it judges decisions that were made elsewhere. Nothing that
proposes candidates may import this module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stage1_pro import native
from stage1_pro.continual.learn.rewards import NOBODY, Actions, RewardSpec, Verified, earned
from stage1_pro.continual.ledger.guard import GuardVault, Look
from stage1_pro.errors import InputError
from stage1_pro.policies.bounds import betting_p_value, binomial_cdf, holm
from stage1_pro.policies.policy import Policy
from stage1_pro.record import Record

# Resamples drawn at once.
_CHUNK = 500
# Share of rows on which two sides are taken to differ, before any was seen.
_DIFFER = 0.2


class Terms(Record):
    """Margins and levels of the promotion test, in units of mean reward and of shares; fixed before any look."""

    margin: float = Field(0.05, gt=0, description="largest loss of mean reward on the anchor")
    slice_margin: float = Field(0.1, gt=0, description="the same in any slice of it")
    fnr_margin: float = Field(0.02, gt=0, description="largest rise of any class's share answered as another")
    least_slice: int | None = Field(
        None,
        ge=1,
        description="clusters that a slice must have to be tested for no loss; null: as many as could pass. "
        "A smaller one refuses only where it shows a loss",
    )
    anchor_level: float = Field(0.05, gt=0, lt=1, description="of all tests on the anchor together, by Holm")
    require_certificate: bool = True
    n_replicates: int = Field(4000, ge=1000)
    seed: int = Field(0, ge=0)


class Measured(Record):
    """A figure of the candidate's bundle and its limit; passes at or below it. Null: not measured, which fails."""

    name: str
    value: float | None
    limit: float
    bound: float | None = Field(None, description="upper end of the value's interval: held against the limit for it")
    n: int = Field(0, description="rows that it was measured on")
    note: str = Field("", description="its unit, or why there is no value and what to do")


class PromotionTest(Record):
    """One test of a verdict: what was estimated from how many units, its bound, and what it had to keep."""

    name: str
    passed: bool
    n: int = Field(0, description="independent units")
    unit: Literal["clusters", "", "groups", "rows"] = ""
    n_differ: int | None = Field(None, description="rows on which the two sides do not do the same")
    estimate: float | None = None
    bound: float | None = Field(None, description="one-sided, at the test's own level")
    p_value: float | None = None
    limit: float | None = Field(None, description="what estimate and bound are held against")
    level: float | None = None
    method: str = ""
    note: str = ""


class Verdict(Record):
    """``verdict.json``: whether a candidate replaces the champion, with every test that said so or not."""

    format_version: Literal[1] = 1
    promoted: bool
    reason: str
    champion: str
    candidate: str
    epoch: str = Field(description="of the guard")
    look: int | None = Field(description="number of this look at the guard; null when none was taken")
    looks: int | None = Field(description="how many the epoch has")
    earlier_promotions: int | None = Field(
        description="in this epoch before this look; after the first, the promise is for candidates that did not "
        "depend on it"
    )
    time: float = Field(description="seconds since 1970; of the look where one was taken, so that a repeat is the same")
    spec: RewardSpec
    terms: Terms
    tests: list[PromotionTest]

    def test(self, name: str) -> PromotionTest:
        """The test of that name."""
        return next(test for test in self.tests if test.name == name)


@dataclass(frozen=True)
class Side:
    """Champion or candidate: its name (a hash), its decisions on guard and anchor rows, the policy that made them.

    ``fingerprint`` is of the model; its certificate must be of that one.
    """

    name: str
    guard: Actions
    anchor: Actions
    policy: Policy | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Anchor:
    """Labelled rows of the domain that must not be forgotten: truth [N], clusters [N], and slices, each a mask [N].

    ``origin`` holds the decisions of the model that first learned them. Every candidate is compared with that model:
    compared with the champion of the day, each round could lose the margin once more.
    """

    truth: Verified
    clusters: NDArray[np.str_]
    slices: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    origin: Actions | None = None


def evaluate(
    vault: GuardVault,
    epoch: str,
    champion: Side,
    candidate: Side,
    anchor: Anchor,
    *,
    spec: RewardSpec,
    now: float,
    terms: Terms | None = None,
    measured: Sequence[Measured] = (),
) -> Verdict:
    """Judge a candidate; takes one look at the guard, and only when everything else speaks for it.

    The same evidence again, after a crash, gives the same verdict and takes no second look.

    Args:
        vault: of the store that holds the guard.
        epoch: which guard.
        champion: what serves now.
        candidate: what would replace it.
        anchor: rows of what must not be forgotten; its classes are the guard's.
        spec: what decisions earn.
        now: seconds since 1970.
        terms: what is asked.
        measured: figures of the candidate's bundle, each with its limit.

    Raises:
        LooksSpentError: the guard epoch has no look left.
        InputError: decisions of other rows, or guard rows that differ and have no label (no look is taken then).
    """
    terms = terms or Terms()
    tests = [_held(one) for one in measured]
    if terms.require_certificate:
        tests.append(check_certificate(champion.policy, candidate.policy, candidate.fingerprint))
    tests += judge_anchor(anchor, anchor.origin or champion.anchor, candidate.anchor, spec, terms)
    look: Look | None = None
    if all(test.passed for test in tests):
        look, test = vault.judge(
            epoch, champion.guard, candidate.guard,
            partial(_test_guard, champion=champion.guard, candidate=candidate.guard, spec=spec, terms=terms),
            terms=spec.fingerprint() + terms.fingerprint(), name=candidate.name, classes=anchor.truth.classes,
            positive=anchor.truth.positive, now=now,
        )  # fmt: skip
        tests.append(test)
        vault.close(look, promoted=test.passed)
    return _verdict(champion.name, candidate.name, epoch, tests, look, spec=spec, terms=terms, now=now)


def refuse(
    champion: str,
    candidate: str,
    epoch: str,
    measured: Sequence[Measured],
    *,
    spec: RewardSpec,
    now: float,
    terms: Terms | None = None,
) -> Verdict | None:
    """The verdict on a candidate whose bundle fails what was measured of it, without a decision of it; else None.

    A bundle that does not give its own reference outputs is not run on anything. Arguments are those of ``evaluate``,
    the two sides by name.
    """
    tests = [_held(one) for one in measured]
    if all(test.passed for test in tests):
        return None
    return _verdict(champion, candidate, epoch, tests, None, spec=spec, terms=terms or Terms(), now=now)


def _verdict(
    champion: str,
    candidate: str,
    epoch: str,
    tests: Sequence[PromotionTest],
    look: Look | None,
    *,
    spec: RewardSpec,
    terms: Terms,
    now: float,
) -> Verdict:
    failed = [test.name for test in tests if not test.passed]
    if look is None:
        note = f"not looked at, no look was taken: {failed[0]} failed before"
        tests = [*tests, PromotionTest(name="guard reward", passed=False, note=note)]
    return Verdict(
        promoted=not failed, reason=f"no promotion: {', '.join(failed)}" if failed else "every test passed",
        champion=champion, candidate=candidate, epoch=epoch, look=look and look.number, looks=look and look.of,
        earlier_promotions=look and look.earlier_promotions, time=look.time if look else now, spec=spec, terms=terms,
        tests=list(tests),
    )  # fmt: skip


def lower_bound(
    differences: ArrayLike, clusters: ArrayLike | None = None, *, level: float, n_replicates: int = 4000, seed: int = 0
) -> float:
    """Lower bound of a mean paired difference at ``1 - level``, one-sided: a quantile over resampled clusters.

    Args:
        differences: [N] candidate minus champion.
        clusters: [N] the independent unit of every row; None = every row is one.
        level: inside (0, 1).
        n_replicates: resamples.
        seed: of the resamples.

    Raises:
        InputError: too few resamples for the level.
    """
    values = np.asarray(differences, dtype=np.float64)
    place = math.floor(level * (n_replicates + 1)) - 1
    if place < 0:
        raise InputError(f"n_replicates must be {math.ceil(1 / level)} or more for level {level:g}, got {n_replicates}")
    number = np.arange(values.size) if clusters is None else native.cluster_numbers(clusters, values.size)
    sums, rows = np.bincount(number, values), np.bincount(number)
    means = []
    for first in range(0, n_replicates, _CHUNK):
        count = min(_CHUNK, n_replicates - first)
        times = native.resample_counts([rows.size], count, first=first, seed=seed).astype(np.float64)
        means.append((times @ sums) / (times @ rows))
    return float(np.sort(np.concatenate(means))[place])


def _test_guard(
    look: Look,
    truth: Verified,
    differ: NDArray[np.bool_],
    clusters: NDArray[np.str_],
    *,
    champion: Actions,
    candidate: Actions,
    spec: RewardSpec,
    terms: Terms,
) -> tuple[Look, PromotionTest]:
    """Test whether the candidate earns more; ``truth`` is of the rows that differ, the others earn the same."""

    def of(side: Actions) -> NDArray[np.float64]:
        return earned(spec, truth, Actions(side.answers[differ], side.deferred[differ]))

    difference = np.zeros(differ.size)
    difference[differ] = of(candidate) - of(champion)
    bound = lower_bound(difference, clusters, level=look.level, n_replicates=terms.n_replicates, seed=terms.seed)
    p = _betting_on_means(difference, clusters, largest_difference(spec), look.level, terms.seed)
    earlier = f", {look.earlier_promotions} promoted before in this epoch" if look.earlier_promotions else ""
    return look, PromotionTest(
        name="guard reward", passed=bound > 0 and p <= look.level, n=np.unique(clusters).size, unit="clusters",
        n_differ=int(differ.sum()), estimate=float(difference.mean()), bound=bound, p_value=p, limit=0.0,
        level=look.level, note=f"look {look.number} of {look.of}{earlier}",
        method="bound: cluster bootstrap of rows, percentile; p-value: betting on clusters' means, exact",
    )  # fmt: skip


def _betting(
    difference: NDArray[np.float64],
    clusters: NDArray[np.str_],
    reach: float,
    level: float,
    seed: int,
    margin: float = 0,
) -> float:
    """p-value of "the rows' mean difference is at most -margin", for any number of clusters, of these sizes.

    No row's difference is beyond ``reach``; the bets aim at ``level``. Their first size assumes that one row in five
    differs, by half of ``reach``; it is fixed in advance because bets must not depend on the rows they are made on. The
    test assumes that no cluster is larger than the largest one drawn.
    """
    number = native.cluster_numbers(clusters, difference.size)
    rows = np.bincount(number).astype(np.float64)
    return _bet(np.bincount(number, difference).astype(np.float64), rows, reach, level, seed, margin)


def _betting_on_means(
    difference: NDArray[np.float64], clusters: NDArray[np.str_], reach: float, level: float, seed: int
) -> float:
    """p-value of "the mean over clusters of their mean differences is at most 0"; whatever sizes clusters may have.

    A place counts once, however often it was seen, as in a certificate by groups.
    """
    number = native.cluster_numbers(clusters, difference.size)
    means = np.bincount(number, difference) / np.bincount(number)
    return _bet(means, np.ones(means.size), reach, level, seed)


def _bet(
    sums: NDArray[np.float64], rows: NDArray[np.float64], reach: float, level: float, seed: int, margin: float = 0.0
) -> float:
    """p-value of "E[sum] <= -margin E[rows]" of clusters [G] whose sums are within ``reach`` a row."""
    if reach <= margin:
        return 0.0 if margin else 1.0
    most = float(rows.max())
    # Their order must not depend on what they hold; numbers are of sorted names.
    order = np.random.Generator(np.random.Philox(seed)).permutation(rows.size)
    losses = np.clip((reach * rows - sums) / (2 * reach * most), 0.0, 1.0)
    alpha = (reach + margin) / (2 * reach)
    # In units of twice the reach and of the largest cluster.
    variance = _DIFFER * float(rows.mean()) / (4 * most) ** 2
    # A cluster's v is at most its a.
    weights = (rows / most)[order]
    return betting_p_value(losses[order], alpha, level, weights=weights, variance=variance, worst=1 - alpha)


def largest_difference(spec: RewardSpec) -> float:
    """The largest possible difference of two decisions' rewards on one row."""
    answers = [spec.right, -spec.k_fp, -spec.k_fn]
    blind = spec.guess - spec.abstain_cost
    return max(*answers, blind) - (min(*answers, blind) - spec.defer_cost)


@dataclass(frozen=True)
class AnchorQuestion:
    """One non-inferiority test on the anchor.

    Args:
        name: of the test.
        difference: candidate minus reference [N], higher is better.
        clusters: independent unit of every row [N].
        margin: largest mean loss that is allowed.
        reach: largest possible loss of one row.
        n_differ: rows on which the two sides decide otherwise.
        sign: 1 where the figure shown is a gain, -1 where it is a rise of FNR.
    """

    name: str
    difference: NDArray[np.float64]
    clusters: NDArray[np.str_]
    margin: float
    reach: float
    n_differ: int
    sign: float = 1.0

    @property
    def n(self) -> int:
        """Number of clusters."""
        return int(np.unique(self.clusters).size)

    @property
    def share(self) -> float:
        """Smallest share of clusters with a loss if the mean loss is the margin: the largest lose the most."""
        rows = np.bincount(native.cluster_numbers(self.clusters, self.difference.size))
        return float(self.margin * rows.mean() / (self.reach * rows.max())) if self.reach else 1.0

    def p_value(self, level: float, seed: int) -> float:
        """Of "a loss of the margin or more", exact for any number of clusters of the sizes seen."""
        if self.margin >= self.reach:
            return 0.0
        losing = np.unique(self.clusters[self.difference < 0]).size
        counted = float(binomial_cdf(np.array([float(losing)]), np.array([float(self.n)]), self.share)[0])
        bet = _betting(self.difference, self.clusters, self.reach, level / 2, seed, self.margin)
        return min(1.0, 2 * min(counted, bet))

    def tested(
        self, terms: Terms, *, passed: bool, p_value: float, level: float, note: str, method: str
    ) -> PromotionTest:
        """The question with its answer, and the bound of a bootstrap for information."""
        bound = lower_bound(
            self.difference, self.clusters, level=terms.anchor_level, n_replicates=terms.n_replicates, seed=terms.seed
        )
        return PromotionTest(
            name=self.name, passed=passed, n=self.n, unit="clusters", n_differ=self.n_differ,
            estimate=self.sign * float(self.difference.mean()), bound=self.sign * bound, p_value=p_value,
            limit=-self.sign * self.margin, level=level, note=note, method=f"{method}; bound: cluster bootstrap",
        )  # fmt: skip


def _enough(share: float, level: float) -> int:
    """Clusters needed to pass if none of them loses: a share of all clusters would lose at the margin."""
    return math.ceil(math.log(level / 2) / math.log1p(-share)) if 0 < share < 1 else 1


def judge_anchor(
    anchor: Anchor, reference: Actions, candidate: Actions, spec: RewardSpec, terms: Terms
) -> list[PromotionTest]:
    """Non-inferiority on the anchor: mean reward overall and by slice, and the share of every class that is missed.

    Each tests "worse by the margin or more"; Holm corrects over all of them. Two exact p-values are combined by
    Bonferroni: a binomial test on the number of clusters that lost anything, and a betting test on the summed
    differences, which also counts gains. Both hold for any number of clusters. A bootstrap does not: it passed 10% of
    draws of 1000 rows at the margin and level 5%, and 34% where large clusters lose (benchmarks/README). Its bound is
    shown for information.

    A slice with fewer clusters than ``least_slice`` cannot pass, and would refuse every candidate. It fails only if a
    loss beyond the margin is significant, by a betting test.

    Args:
        anchor: the rows.
        reference: decisions on them that the candidate is compared with.
        candidate: the candidate's.
        spec: rewards of decisions.
        terms: margins and level.

    Raises:
        InputError: decisions of other rows, or a slice without rows.
    """
    truth = anchor.truth
    n = truth.labels.size
    difference = earned(spec, truth, candidate) - earned(spec, truth, reference)
    differ = reference.differ(candidate)

    def missed(side: Actions) -> NDArray[np.float64]:
        wrong: NDArray[np.bool_] = (side.answers != truth.labels) & (side.answers != NOBODY)
        return wrong.astype(np.float64)

    def ask(
        name: str, values: NDArray[np.float64], mask: NDArray[np.bool_], margin: float, reach: float, sign: float = 1.0
    ) -> AnchorQuestion:
        if mask.shape != (n,) or not mask.any():
            raise InputError(f"anchor must have rows for each test, got none for '{name}'; add rows or drop the slice")
        n_differ = int((differ & mask).sum())
        return AnchorQuestion(name, values[mask], anchor.clusters[mask], margin, reach, n_differ, sign)

    reach = largest_difference(spec)
    slices = [
        ask(f"anchor reward, slice {k}", difference, mask, terms.slice_margin, reach)
        for k, mask in sorted(anchor.slices.items())
    ]
    rise = missed(candidate) - missed(reference)
    classes = [
        ask(f"anchor FNR of {name}", -rise, truth.labels == k, terms.fnr_margin, 1.0, -1.0)
        for k, name in enumerate(truth.classes)
    ]
    whole = ask("anchor reward", difference, np.ones(n, dtype=bool), terms.margin, reach)
    level, most = terms.anchor_level, 1 + len(slices) + len(classes)
    least = {one.name: terms.least_slice or _enough(one.share, level / most) for one in slices}
    small = [one for one in slices if one.n < least[one.name]]
    asked = [whole, *(one for one in slices if one not in small), *classes]
    p_values = np.array([one.p_value(level / len(asked), terms.seed) for one in asked])
    found = [
        _keeps(one, float(p), len(asked), terms, passed=bool(passed))
        for one, p, passed in zip(asked, p_values, holm(p_values, level), strict=True)
    ]
    return found + [_shows_no_loss(one, least[one.name], len(small), terms) for one in small]


def _keeps(one: AnchorQuestion, p: float, number: int, terms: Terms, *, passed: bool) -> PromotionTest:
    # Holm's last step asks for the whole level, its first for this share of it.
    enough = _enough(one.share, terms.anchor_level / number)
    method = f"p-value: losing clusters counted, or a bet; Holm over {number}"
    note = f"too few clusters to rule a loss of {one.margin:g} out, whatever they show: {enough} would do"
    if passed or one.n >= enough:
        note = ""
    return one.tested(terms, passed=passed, p_value=p, level=terms.anchor_level, note=note, method=method)


def _shows_no_loss(one: AnchorQuestion, least: int, number: int, terms: Terms) -> PromotionTest:
    """Test a slice too small to prove non-inferiority: fail it only if a loss beyond the margin is significant."""
    level = terms.anchor_level / number
    p = _betting(-one.difference - one.margin, one.clusters, one.reach + one.margin, level, terms.seed)
    method = f"p-value of no such loss: betting, exact; Bonferroni over {number}"
    note = f"too small to rule a loss of {one.margin:g} out ({least} clusters would do): refuses what it shows alone"
    return one.tested(terms, passed=p > level, p_value=p, level=level, note=note, method=method)


def check_certificate(champion: Policy | None, candidate: Policy | None, fingerprint: str | None) -> PromotionTest:
    """Test that the candidate's own certificate, of the model of that fingerprint, promises what the champion's does.

    A champion that is None or has no guarantee promises nothing to keep; a candidate is None where that was refused.
    """
    problem = ""
    if candidate is None:
        problem = "the candidate has no policy: calibration was refused or not run"
    elif candidate.guarantee == "none":
        problem = "the candidate's policy promises nothing"
    elif candidate.model_fingerprint is None or candidate.model_fingerprint != fingerprint:
        problem = "the candidate's policy was certified for another model; calibrate again"
    elif champion is not None and champion.guarantee != "none":
        given = candidate.promises
        lost = next((asked for asked in champion.promises if not any(one.covers(asked) for one in given)), None)
        if lost is not None:
            said = "; ".join(map(str, given))
            problem = f"the candidate must promise what the champion does: {lost}; it promises {said}"
        # One or the other certified; cuts of one val_calib share rows.
        shared = champion.outside == candidate.outside and (
            bool(champion.outside)
            or any(
                one in champion.split_hashes and champion.split_hashes[one] == candidate.split_hashes.get(one)
                for one in ("val_calib", "val_calib.certify")
            )
        )
        if not problem and shared and candidate.claims_made[0] < 2:
            problem = (
                "the candidate was certified on the rows that certified the champion with delta undivided: they served "
                "their one claim; certify on fresh rows, or declare claims before the first"
            )
    promises, n = ((), 0) if candidate is None else (candidate.promises, candidate.n_certified)
    note, method = problem or "; ".join(map(str, promises)), "of the candidate's own policy file"
    return PromotionTest(name="certificate", passed=not problem, n=n, note=note, method=method)


def _held(one: Measured) -> PromotionTest:
    if one.value is None:
        note = f"not measured: {one.note}" if one.note else "not measured"
        return PromotionTest(name=one.name, passed=False, limit=one.limit, note=note, method="measured")
    held = one.value if one.bound is None else one.bound
    return PromotionTest(
        name=one.name, passed=held <= one.limit, n=one.n, unit="rows" if one.n else "", estimate=one.value,
        bound=one.bound, limit=one.limit, note=one.note, method="measured",
    )  # fmt: skip
