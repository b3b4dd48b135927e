"""Statistics that policies share: exact binomial bounds on integer counts, with the group as the unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
