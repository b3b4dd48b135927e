"""``fit_policy``: any registered policy from arrays, in one call. NumPy only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stage1_pro.arguments import array, choice, flag, names
from stage1_pro.errors import InputError
from stage1_pro.policies.policy import Policy
from stage1_pro.policies.rows import Rows, check_halves, cut_halves
from stage1_pro.policies.target import POLICIES, Target, settle_target


def fit_policy(
    policy: str | Target,
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    gate: ArrayLike | None = None,
    probs_b: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    rows_independent: bool = False,
    halves: ArrayLike | None = None,
    classes: ArrayLike | None = None,
    positive: str | int | None = None,
    **target: Any,
) -> Policy:
    """Fit a policy on labelled rows that trained nothing, or say why it cannot be certified.

    Half of the rows fit it and choose the order of thresholds, the other half certifies it. What is found is the same
    as from ``stage1 calibrate --logits`` with these rows, halves and positive class; nothing is written:
    ``policy.write(path)`` does.

    Args:
        policy: name of a registered policy, such as ``softmax``, ``gate`` or ``scrc``; or a target of its kind.
        probs: [N, K] probabilities of Stage A, K >= 2; or [N]: of the second of two classes.
        labels: [N] class indices.
        gate: [N] the gate's logits, which the gate policy needs.
        probs_b: [N, K] probabilities of Stage B, for scrc; without them Stage A answers deferred rows too.
        groups: [N] clip, track or place of every row.
        rows_independent: the caller states that every row is a photo of its own; needed where something is certified
            without groups, and refused with them.
        halves: [N] of ``fit`` and ``certify``; by default cut at random, by group.
        classes: K names; by default 0, 1, ....
        positive: name of the positive class; of two the second one by default, of more none is. Only rates of one
            class need it, and can name theirs: ``fnr_class``.
        **target: what is asked for, by the target's fields, such as ``exit_error`` or ``fnr``, ``delta``, ``claims``
            and ``guarantee``.

    Raises:
        InputError: an argument is not what it must be.
        NotReachableError: the target cannot be met or certified.
    """
    asked = _target(policy, target)
    if flag("rows_independent", rows_independent) and groups is not None:
        raise InputError("rows_independent must be False where groups are given, got True; choose one")
    first = _columns("probs", probs)
    n_classes = np.shape(array("probs", first))[-1]
    given = range(n_classes) if classes is None else names("classes", classes, n_classes, like="probs has columns")
    called = [str(one) for one in given]
    if positive is None and n_classes == 2:
        positive = called[-1]
    rows = Rows.of(
        first, labels, classes=called, positive=None if positive is None else str(positive), gate=gate,
        probs_b=None if probs_b is None else _columns("probs_b", probs_b), groups=groups,
        rows_independent=rows_independent,
    )  # fmt: skip
    n = rows.labels.size
    parts = cut_halves(n, rows.groups) if halves is None else names("halves", halves, n, like="probs has rows")
    check_halves(parts, n, rows.groups)
    return POLICIES.find(asked.policy).fit(asked, replace(rows, halves=parts))


def _columns(name: str, given: ArrayLike) -> ArrayLike:
    """Probabilities [N, K] as they came, or made of [N]."""
    values = array(name, given)
    if values.ndim == 1:
        second = values.astype(np.float64)
        return np.stack([1 - second, second], axis=1)
    if values.ndim != 2 or values.size == 0:
        raise InputError(f"{name} must have shape [N, K] or [N], got {list(values.shape)}; give one row per photo")
    return given


def _target(policy: str | Target, fields: dict[str, Any]) -> Target:
    if isinstance(policy, Target):
        if fields:
            raise InputError(f"a target must be given alone, got it with {', '.join(fields)}; it says all of that")
        return policy
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in fields.items()}
    return settle_target(None, {**plain, "policy": choice("policy", policy, list(POLICIES))})
