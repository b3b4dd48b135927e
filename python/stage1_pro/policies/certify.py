"""Statistics that policies share: exact binomial bounds on integer counts, with the group as the unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from stage1_pro.errors import InputError


def clopper_pearson_upper(errors: int, trials: int, *, level: float = 0.95) -> float:
    """Give the exact one-sided upper bound of an error probability, in [0, 1]; lower is better.

    The bound is the p with P(Bin(trials, p) <= errors) = 1 - level (Clopper and Pearson, 1934).
    Trials must be independent; no trial gives 1.

    Raises:
        InputError: counts are not 0 <= errors <= trials, or the level is not inside (0, 1).
    """
    if not 0 <= errors <= trials:
        raise InputError(f"errors must be in 0..trials, got {errors} of {trials}; pass integer counts")
    if not 0 < level < 1:
        raise InputError(f"level must be inside (0, 1), got {level}; 0.95 is usual")
    if errors == trials:
        return 1.0
    return float(special.betaincinv(errors + 1, trials - errors, level))


def groups_in_error(errors: ArrayLike, groups: ArrayLike | None = None) -> tuple[int, int]:
    """Count the groups with at least one error, and all groups: ``(errors, trials)`` for a bound.

    Rows of one clip or track are no independent trials, so the group is the unit. One error in a
    group makes the whole group an error: never less than the mean of the groups' error rates.

    Args:
        errors: bool [M], one per row.
        groups: [M] group names; ``None`` makes every row its own group.
    """
    wrong = np.asarray(errors, dtype=bool)
    if groups is None:
        return int(wrong.sum()), wrong.size
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    hit: NDArray[np.bool_] = np.zeros(int(member.max(initial=-1)) + 1, dtype=bool)
    hit[member[wrong]] = True
    return int(hit.sum()), hit.size
