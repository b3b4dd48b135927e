"""The unit that is counted: rows, or groups where rows share a clip or track. NumPy only."""

from __future__ import annotations

from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.errors import InputError
from stage1_pro.policies.candidates import Unit


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


def counting_unit(
    groups: ArrayLike | None, n: int, unit: str, rows_independent: bool
) -> tuple[Unit, NDArray[np.generic] | None]:
    """What is counted, and the group of every row (None when rows are)."""
    if unit not in ("auto", *get_args(Unit)):
        raise InputError(f"unit must be auto, rows, groups or group_means, got '{unit}'")
    names = None if groups is None else np.asarray(groups)
    if names is not None and names.shape != (n,):
        raise InputError(f"groups must have shape [{n}] as scores, got {list(names.shape)}; give one per row")
    if unit in ("groups", "group_means") and names is None:
        raise InputError("groups must be given where the unit is groups, got None")
    if unit == "group_means":
        if rows_independent:
            raise InputError("rows_independent must be False where the unit is group_means, got True; choose one")
        return "group_means", names
    if names is None or rows_independent or (unit != "groups" and np.unique(names).size == n):
        return "rows", None
    if unit == "rows":
        raise InputError(
            f"unit must be groups where rows share one ({np.unique(names).size} groups of {n} rows), got rows; rows of "
            "one clip are near-copies and a bound on them is false: pass rows_independent=True only if they are not"
        )
    return "groups", names


def one_each(groups: NDArray[np.generic] | None, eligible: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """One eligible row of every group that has one, [U] indices; drawn without a look at scores or errors."""
    rows = np.flatnonzero(eligible)
    if groups is None:
        return rows
    shuffled = rows[np.random.default_rng(seed).permutation(rows.size)]
    _, first = np.unique(groups[shuffled], return_index=True)
    return np.sort(shuffled[first])
