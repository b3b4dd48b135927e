"""What a policy promises where it serves, and what is left of it when the share of positives is another there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from stage1_pro.classes import need_positive
from stage1_pro.data.splits import Splits, SplitsSummary
from stage1_pro.errors import InputError, printable
from stage1_pro.metrics.binomial import clopper_pearson, clopper_pearson_upper
from stage1_pro.policies.bounds import trials_needed
from stage1_pro.policies.policy import Policy
from stage1_pro.words import SPLITS

# The error rate of a class that a split should not miss, and how many classes a warning names.
_UNSEEN = 0.2
_MOST_NAMED = 5

# Shares that differ by less are one.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Standing:
    """What is left of a policy's promises; ``stands`` and ``void`` name them. Answers do not depend on it."""

    guarantee: str
    statement: str
    prior: float | None  # share of positives at serving, if anybody said
    calibrated_prior: float | None  # None: no class is the positive one
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
        InputError: ``prior`` is outside, or no class is the positive one.
    """
    check_prior(prior)
    if prior is not None:
        need_positive(policy.positive, "--prior, the share of positives,")
    counts, n_groups, share = splits.counts["val_calib"], splits.groups["val_calib"], None
    if policy.positive is not None:
        # Where clips differ in size, rows would count some of them more than certificates do.
        of_rows = counts.get(policy.positive, 0) / max(1, sum(counts.values()))
        share = splits.group_shares.get(policy.positive, of_rows)
    asked = policy.target.promises(policy.positive)
    served = None if policy.mix is None or policy.positive is None else policy.mix[policy.positive]
    share = share if served is None else served
    within_class = tuple(one.name for one in asked if one.within_class)
    overall = tuple(one.name for one in asked if not one.within_class)
    stands: tuple[str, ...] = (*overall, *within_class)
    void: tuple[str, ...] = ()
    if policy.guarantee == "none":
        stands = ()
        note = "nothing is promised" if prior is None else "nothing is promised, so no prior can void it"
    elif prior is None or share is None:
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
        if served is not None:
            # It was stated, not counted: there is nothing uncertain about it.
            low, high = share * (1 - _ROUNDING), share * (1 + _ROUNDING)
            calibrated = f"share of '{policy.positive}' {share:.3g}, as was stated"
        note = f"prior {prior:g} is inside what was calibrated on: {calibrated}"
        if not low <= prior <= high:
            stands, void = within_class, overall
            left = (
                "Nothing stands; calibrate on rows of the new mix, for it (--prior), or by class (scrc, --cells class)"
            )
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

    def best(n: int) -> str:
        return f"{100 * clopper_pearson_upper(0, n, 1 - delta):.1f}%"

    fnr = ""
    if splits.positive is not None:
        positive = len({row.group for row in kept if row.label == splits.positive})
        fnr = f"; FNR on exits {best(positive)} at best, by {positive} groups with '{splits.positive}'"
    return (
        f"with {groups} groups in val_calib: exit error {best(groups)} at best, if none is wrong{fnr} (stage1 plan "
        "counts errors too)"
    )


def few_groups(splits: Splits) -> str:
    """A warning about classes with fewer groups in a split than can tell anything of them; empty where there are none.

    A class that is answered wrongly in one group of five looks perfect in a split with probability .8^n, which is above
    5% below 14 groups. To certify an error of 5% of one class alone takes 59 of its groups in ``val_calib``.

    Args:
        splits: of a run.
    """
    least, of_calib = trials_needed(0, _UNSEEN, 0.05), trials_needed(0, 0.05, 0.05)
    holding = Counter(of for of, _ in {((row.label, row.split), row.group) for row in splits.rows})
    thin = []
    for name in splits.classes:
        short = [f"{split} {holding[name, split]}" for split in SPLITS if holding[name, split] < least]
        if short:
            thin.append(f"'{printable(name, 80)}' ({', '.join(short)})")
    if not thin:
        return ""
    more = "" if len(thin) <= _MOST_NAMED else f" and {len(thin) - _MOST_NAMED} more classes"
    return (
        f"few groups of {', '.join(thin[:_MOST_NAMED])}{more}: with fewer than {least} in a split, a class that is "
        "answered wrongly in one group of five can look perfect there by chance; to certify an error of 5% of one "
        f"class alone, val_calib takes {of_calib} groups of it. Add groups (clips, places) of these classes"
    )


def check_prior(prior: float | None) -> None:
    """Raise InputError when a prior is given that is no share inside (0, 1)."""
    if prior is not None and not 0 < prior < 1:
        raise InputError(f"prior must be inside (0, 1), got {prior}; give the share of positives, such as 0.05")
