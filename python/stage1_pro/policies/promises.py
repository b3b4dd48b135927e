"""What a policy promises where it serves, and what is left of it when the share of positives is another there."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

from stage1_pro.data.splits import SplitsSummary
from stage1_pro.errors import InputError
from stage1_pro.metrics.binomial import clopper_pearson
from stage1_pro.policies.bounds import exact
from stage1_pro.policies.certificate import PromiseCheck
from stage1_pro.policies.certify import counting_unit, one_each
from stage1_pro.policies.gate import GateParams
from stage1_pro.policies.policy import Policy
from stage1_pro.policies.scrc import check_claim
from stage1_pro.policies.sets import ScrcParams
from stage1_pro.policies.softmax import Thresholds


@dataclass(frozen=True)
class Promise:
    """A policy's promise; ``stands`` and ``void`` name its parts. Answers are the same whatever becomes of it."""

    guarantee: str
    statement: str
    prior: float | None  # share of positives at serving, if anybody said
    calibrated_prior: float
    stands: tuple[str, ...]
    void: tuple[str, ...]
    note: str


def promise(policy: Policy, splits: SplitsSummary, prior: float | None = None) -> Promise:
    """Say what is promised, given the share of positives where the policy serves.

    A prior inside the 95% interval of the calibration rows' share (Clopper and Pearson, by group) is no other prior as
    far as anybody can tell. Otherwise promises about all images together are void. Those that hold within one class
    (the risk by class, FNR) stand under label shift: each class's images are drawn as before, only their mix changes.

    Args:
        policy: the active one.
        splits: what it was calibrated on.
        prior: inside (0, 1); None: nothing is said.

    Raises:
        InputError: ``prior`` is outside.
    """
    check_prior(prior)
    counts, n_groups = splits.counts["val_calib"], splits.groups["val_calib"]
    share = counts.get(policy.positive, 0) / max(1, sum(counts.values()))
    # Where clips differ in size, rows would count some of them more than certificates do.
    share = splits.group_shares.get(policy.positive, share)
    within_class, overall = _parts(policy)
    if policy.guarantee == "none":
        note = "nothing is promised" if prior is None else "nothing is promised, so no prior can void it"
        return Promise(policy.guarantee, policy.statement, prior, share, (), (), note)
    if prior is None:
        return Promise(policy.guarantee, policy.statement, prior, share, (*overall, *within_class), (), "as calibrated")
    low, high = clopper_pearson(round(share * n_groups), n_groups)
    calibrated = f"share of '{policy.positive}' {share:.3g} (95% interval {low:.3g} to {high:.3g})"
    if low <= prior <= high:
        note = f"prior {prior:g} is inside what was calibrated on: {calibrated}"
        return Promise(policy.guarantee, policy.statement, prior, share, (*overall, *within_class), (), note)
    note = f"prior {prior:g} is not what was calibrated on: {calibrated}. Void: {', '.join(overall) or 'nothing'}. "
    if within_class:
        note += (
            f"Stands: {', '.join(within_class)}, provided that images of each class are drawn as before and only the "
            "mix of classes changed (label shift)"
        )
    else:
        note += "Nothing stands; calibrate on rows of the new mix, or by class (policy scrc, cells class)"
    return Promise(
        policy.guarantee, policy.statement, prior, share, within_class, overall, f"{note}. Answers do not change"
    )


def check_prior(prior: float | None) -> None:
    """Raise InputError when a prior is given that is no share inside (0, 1)."""
    if prior is not None and not 0 < prior < 1:
        raise InputError(f"prior must be inside (0, 1), got {prior}; give the share of positives, such as 0.05")


def _parts(policy: Policy) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of what holds within one class, and of what speaks of all images together."""
    if isinstance(policy, Thresholds):
        return ("FNR on exits",), ()
    if isinstance(policy, ScrcParams):
        if policy.loss == "fnr":
            return ("FNR of accepted sets",), ("share accepted",)
        if policy.cells == "class":
            return ("risk of each class",), ("share accepted",)
        return (), ("share accepted", "risk")
    return ("FNR on exits",) if policy.target_fnr is not None else (), ("coverage", "exit error")


def verify_exits(
    policy: Thresholds | GateParams,
    answered: ArrayLike,
    exited: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> list[PromiseCheck]:
    """Hold every constraint of an exit policy against rows that calibrated nothing: PASS, FAIL or INCONCLUSIVE.

    FAIL: the 99% lower bound is beyond the limit; PASS: the 95% upper bound is within it. A rate below the limit is no
    PASS, one above it no FAIL. The coverage is held as the share deferred.

    Args:
        policy: softmax or gate.
        answered: [N] class indices that Stage A gives.
        exited: bool [N].
        labels: [N] class indices.
        groups: [N] clip or track; one seeded row speaks for its group, as in a certificate.
        seed: of that row.
    """
    given, out, truth = np.asarray(answered), np.asarray(exited, dtype=bool), np.asarray(labels)
    positive = policy.classes.index(policy.positive)
    _, names = counting_unit(groups, truth.size, "auto", False)
    drawn, wrong = one_each(names, np.ones(truth.size, dtype=bool), seed), given != truth
    found = []
    if isinstance(policy, GateParams):
        wish = policy.constraints
        deferred = float(1 - exact(wish.min_coverage))
        found.append(check_claim("share deferred", int((~out[drawn]).sum()), drawn.size, deferred, drawn.size))
        exits = drawn[out[drawn]]
        found.append(check_claim("exit error", int(wrong[exits].sum()), exits.size, wish.max_exit_error, drawn.size))
    if policy.target_fnr is not None:
        exits = one_each(names, truth == positive, seed)
        exits = exits[out[exits]]
        missed = int((given[exits] != positive).sum())
        found.append(check_claim("FNR on exits", missed, exits.size, policy.target_fnr, drawn.size))
    return [PromiseCheck(source=None, **asdict(one)) for one in found]
