"""The compiled router of a policy's exit rule, where float32 decides as the certified rule does."""

from __future__ import annotations

import math

import numpy as np

from stage1_pro.errors import InputError
from stage1_pro.native import Router
from stage1_pro.policies.counts import NOISE
from stage1_pro.policies.policy import Policy


def make_router(policy: Policy, max_rows: int) -> Router:
    """Make the compiled router of a policy's exit rule; what it routed and merged goes to ``Policy.answer``.

    The rule that was certified compares scores in float64; the router's are float32. They are one rule where float32
    tells scores at the threshold apart as finely as calibration does, which parts no two scores that differ by a
    runtime's rounding (``counts.NOISE``). Near 1 (beyond some .995) float32 cannot, and the policy is refused.

    Args:
        policy: its gate logits go to ``Router.route`` where it needs them.
        max_rows: the largest batch.

    Raises:
        InputError: float32 does not decide as the policy does, or the router does not know its scores; serve with
            ``Cascade``.
    """
    platt, threshold = policy.compiled(), policy.exit_threshold
    if threshold > 1:
        # In float32 just above 1 is 1, which a saturated score reaches.
        return Router(max_rows, threshold=np.inf, platt=platt)
    if threshold > 0:
        rounding, size = _float32_rounding(threshold, 0.0 if platt is None else platt[1])
        if not rounding <= NOISE * (1 + size):
            raise InputError(
                "exit_threshold must be one at which float32 decides as float64 does (up to about 0.995), got "
                f"{threshold:.9g}; serve with Cascade, which compares in float64"
            )
    return Router(max_rows, threshold=threshold, platt=platt)


def _float32_rounding(threshold: float, offset: float) -> tuple[float, float]:
    """How far, in its logit, a score at a threshold moves by float32 alone, and the size of that logit; inf at 1.

    The score itself is rounded, a sum of exponentials before it, and so are both terms of the gate's logit.
    """
    if threshold >= 1:
        return math.inf, math.inf
    size = abs(math.log(threshold) - math.log1p(-threshold))
    half = float(np.finfo(np.float32).eps) / 2
    return half * (2 / (1 - threshold) + size + 2 * abs(offset)), size
