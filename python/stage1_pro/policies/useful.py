"""Promises that are true and say nothing: exits or sets that are no better than an answer nobody looked at a photo for.

What is compared are shares as they were seen on the certify half, by the certificate's own unit. It can only refuse
what was certified, so it costs no validity.

- Exits: against always answering the commonest class; where all are of one, nothing can be said. Where more than two
  classes are told apart and the promise is about one of them, the answers between the others are held against the
  commonest of those: they must be wrong at most half as often, or no more often than the promise allows of its own
  class.
- Sets: the share that holds the right class against always giving the commonest classes, as many on average. Sets that
  name every class say nothing, however true they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stage1_pro.classes import index_of
from stage1_pro.policies.candidates import Mix
from stage1_pro.policies.rows import Rows, Unit, one_each

# Sets that name every class in so large a share of the accepted tell nobody anything.
_NEARLY_ALL = 0.95
# Shares that differ by less are equal.
_ROUNDING = 1e-9
OVERRIDE = "take it all the same with allow_useless (--allow-useless), which is put on record"


@dataclass(frozen=True)
class Exits:
    """How right exits are, beside always answering the commonest class; shares of units."""

    n: int  # units that exit
    right: float  # of them, answered rightly
    commonest: str
    rate: float  # its share of all units
    useless: str = ""  # why they say nothing; empty: they say something

    def words(self) -> str:
        """Both in words."""
        return (
            f"Stage A's answers that exit are right in {self.right:.1%}; always answering '{self.commonest}' would be "
            f"right in {self.rate:.1%}"
        )


def weigh_exits(
    rows: Rows,
    exited: NDArray[np.bool_],
    unit: Unit,
    limit: float | None,
    seed: int = 0,
    *,
    shares: NDArray[np.float64] | None = None,
) -> Exits:
    """Hold exits against always answering the commonest class.

    Args:
        rows: the certify half.
        exited: [N] which of them exit.
        unit: of the certificate; of groups one row speaks for each, as there.
        limit: of the FNR that is promised of the positive class; None: the promise is about all classes.
        seed: of the row that speaks for its group.
        shares: of the classes [K] where it serves; as they come by default.
    """
    drawn = one_each(rows.groups if unit in ("groups", "group_means") else None, np.ones(exited.size, dtype=bool), seed)
    truth, right, exits = rows.labels[drawn], ~rows.wrong[drawn], exited[drawn]
    weight = np.ones(truth.size) if shares is None else Mix(shares, truth).ratios()
    share = np.bincount(truth, weight, minlength=len(rows.classes)) / max(float(weight.sum()), 1)
    n, top = int(exits.sum()), int(share.argmax())
    seen = float(np.average(right[exits], weights=weight[exits])) if n and weight[exits].any() else 0.0
    found = Exits(n, seen, rows.classes[top], float(share[top]))
    # As right is no better, but of rows of one class a perfect model is right as often.
    if n and (found.right < found.rate or (found.rate < 1 and found.right <= found.rate + _ROUNDING)):
        return replace(found, useless=found.words())
    positive = index_of(rows.classes, rows.positive)
    if limit is None or positive is None or len(rows.classes) == 2:
        return found
    others = exits & (rows.probs[drawn].argmax(axis=1) != positive)
    if not others.any():
        return found
    wrong = 1 - float(right[others].mean())
    counts = np.bincount(truth[others], minlength=len(rows.classes))
    counts[positive] = 0
    guess = int(counts.argmax())
    missed = 1 - counts[guess] / int(others.sum())
    if wrong <= limit or wrong <= missed / 2:
        return found
    useless = (
        f"the promise is about '{rows.positive}' alone, and of the other answers that exit {1 - wrong:.1%} are right, "
        f"hardly more than always answering '{rows.classes[guess]}' there, which would be right in {1 - missed:.1%}"
    )
    return replace(found, useless=useless)


def weigh_sets(
    sets: NDArray[np.bool_], accepted: NDArray[np.bool_], labels: NDArray[np.int64], *, by_class: bool
) -> str:
    """Say why sets tell nothing; empty where they do.

    Args:
        sets: [N, K] of the certify units.
        accepted: [N].
        labels: [N] class indices.
        by_class: the promise is about single classes, so that all of them count alike.
    """
    n_classes = sets.shape[1]
    counts = np.bincount(labels, minlength=n_classes)
    weight = (1 / np.maximum(counts, 1))[labels] if by_class else np.ones(labels.size)
    if not accepted.any():
        return ""
    every = float(np.average(sets[accepted].all(axis=1)))
    if every >= _NEARLY_ALL:
        return f"the sets name every class for {every:.1%} of what is accepted, so they tell no class from another"
    size = float(np.average(sets[accepted].sum(axis=1), weights=weight[accepted]))
    hit = float(np.average(sets[np.arange(labels.size), labels][accepted], weights=weight[accepted]))
    shares = np.sort(np.bincount(labels, weight, n_classes))[::-1] / weight.sum()
    free = float(np.interp(size, np.arange(n_classes + 1), np.append(0.0, np.cumsum(shares))))
    if hit > free + _ROUNDING:
        return ""
    return (
        f"the sets hold the right class for {hit:.1%} of what is accepted, with {size:.2f} classes each on average; "
        f"always giving as many of the commonest classes would hold it for {free:.1%}"
        + (", where all classes count alike" if by_class else "")
    )
