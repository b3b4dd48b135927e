"""What a policy promises where it serves, and what is left of it when the share of positives is another there."""

from __future__ import annotations

from dataclasses import dataclass

from stage1_pro.data.splits import Splits, SplitsSummary
from stage1_pro.errors import InputError
from stage1_pro.metrics.binomial import clopper_pearson, clopper_pearson_upper
from stage1_pro.policies.policy import Policy


@dataclass(frozen=True)
class Standing:
    """What is left of a policy's promises; ``stands`` and ``void`` name them. Answers do not depend on it."""

    guarantee: str
    statement: str
    prior: float | None  # share of positives at serving, if anybody said
    calibrated_prior: float
    stands: tuple[str, ...]
    void: tuple[str, ...]
    note: str


def standing(policy: Policy, splits: SplitsSummary, prior: float | None = None) -> Standing:
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
    asked = policy.target.promises(policy.positive)
    within_class = tuple(one.name for one in asked if one.within_class)
    overall = tuple(one.name for one in asked if not one.within_class)
    stands: tuple[str, ...] = (*overall, *within_class)
    void: tuple[str, ...] = ()
    if policy.guarantee == "none":
        stands = ()
        note = "nothing is promised" if prior is None else "nothing is promised, so no prior can void it"
    elif prior is None:
        note = "as calibrated"
    elif policy.outside:
        stands, void = within_class, overall
        note = (
            f"prior {prior:g} cannot be held against the photos that certified it, which are of no split: the share of "
            f"'{policy.positive}' among them is not known. Void: {', '.join(overall) or 'nothing'}. Certify on photos "
            "drawn where it serves, and leave the prior out. Answers do not change"
        )
    else:
        low, high = clopper_pearson(round(share * n_groups), n_groups)
        calibrated = f"share of '{policy.positive}' {share:.3g} (95% interval {low:.3g} to {high:.3g})"
        note = f"prior {prior:g} is inside what was calibrated on: {calibrated}"
        if not low <= prior <= high:
            stands, void = within_class, overall
            left = "Nothing stands; calibrate on rows of the new mix, or by class (policy scrc, cells class)"
            if within_class:
                left = (
                    f"Stands: {', '.join(within_class)}, provided that images of each class are drawn as before and "
                    "only the mix of classes changed (label shift)"
                )
            note = (
                f"prior {prior:g} is not what was calibrated on: {calibrated}. Void: "
                f"{', '.join(overall) or 'nothing'}. {left}. Answers do not change"
            )
    return Standing(policy.guarantee, policy.statement, prior, share, stands, void, note)


def in_reach(splits: Splits, delta: float = 0.05) -> str:
    """Say what these splits can promise at best, from counts alone: the bounds of no error among all that may count.

    Args:
        splits: of a run.
        delta: chance of a false certificate.
    """
    kept = splits.of("val_calib")
    groups = len({row.group for row in kept})
    positive = len({row.group for row in kept if row.label == splits.positive})

    def best(n: int) -> str:
        return f"{100 * clopper_pearson_upper(0, n, 1 - delta):.1f}%"

    return (
        f"with {groups} groups in val_calib: exit error {best(groups)} at best, if none is wrong; "
        f"FNR on exits {best(positive)} at best, by {positive} groups with '{splits.positive}' (stage1 plan counts "
        "errors too)"
    )


def check_prior(prior: float | None) -> None:
    """Raise InputError when a prior is given that is no share inside (0, 1)."""
    if prior is not None and not 0 < prior < 1:
        raise InputError(f"prior must be inside (0, 1), got {prior}; give the share of positives, such as 0.05")
