"""Exit policies: which answers of Stage A stand. NumPy only; exactly one policy is active in a folder."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.native import Router
from stage1_pro.policies import gate
from stage1_pro.policies.certify import NOISE
from stage1_pro.policies.gate import GateParams
from stage1_pro.policies.policy import Policy
from stage1_pro.policies.sets import NOBODY_EXITS, ScrcParams
from stage1_pro.policies.softmax import Thresholds, confidence, decide
from stage1_pro.words import POLICY_FILES, PolicyName

__all__ = ["POLICIES", "exit_rule", "exit_scores", "exits", "make_router", "read_policy", "void", "withdraw_policies"]

# The record of each policy.
POLICIES: dict[PolicyName, type[Policy]] = {"softmax": Thresholds, "gate": GateParams, "scrc": ScrcParams}


def exits(policy: Policy, probs: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Say which rows [N] Stage A answers under a policy; the one rule of evaluation, cascade and reports.

    A row exits iff its score (``exit_scores``) is at or above the policy's threshold; NaN never does.

    Args:
        policy: of this model.
        probs: [N, K] probabilities of Stage A.
        gate_logits: [N], for gate and scrc.

    Raises:
        InputError: another number of classes than the policy's, or gate logits that are missing.
    """
    if isinstance(policy, Thresholds):
        return decide(probs, policy)
    exited: NDArray[np.bool_] = exit_scores(policy, probs, gate_logits) >= policy.exit_threshold
    return exited


def exit_scores(policy: Policy, probs: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.float64]:
    """Give what a policy compares with its threshold, [N] in [0, 1]; higher is surer, NaN has no answer.

    The largest probability (softmax), or the gate's calibrated P(Stage A is correct) where the row has an answer.
    """
    values = np.asarray(probs, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(policy.classes):
        raise InputError(
            f"probs must have shape [N, {len(policy.classes)}] as the policy's classes, got {list(values.shape)}; "
            "use the policy of this model"
        )
    if isinstance(policy, Thresholds):
        return confidence(values)
    if gate_logits is None or np.shape(gate_logits) != values.shape[:1]:
        got = "None" if gate_logits is None else list(np.shape(gate_logits))
        raise InputError(f"gate_logits must have shape [{len(values)}] for the {policy.policy} policy, got {got}")
    known = np.isfinite(values).all(axis=1)
    scores: NDArray[np.float64] = np.where(known, gate.score(gate_logits, policy.a, policy.b), np.nan)
    return scores


def exit_rule(policy: Policy) -> str:
    """The rule in words."""
    if isinstance(policy, ScrcParams):
        limits = ", ".join(
            f"{cell.limit:.6g}" + ("" if policy.cells is None else f" ({policy.cells} {cell.name})")
            for cell in policy.lambda_2
        )
        out = "nobody exits" if policy.exit_threshold == NOBODY_EXITS else _gate_rule(policy)
        return (
            f"{out}; accept when P(answer correct) is at or above {policy.lambda_1:.6g}, with the set of classes whose "
            f"{policy.score} nonconformity is at or below {limits}; nobody answers the rest"
        )
    if isinstance(policy, GateParams):
        return _gate_rule(policy)
    return f"exit when the largest probability of Stage A is at or above {policy.exit_threshold:.6g}"


def _gate_rule(policy: GateParams | ScrcParams) -> str:
    return (
        f"exit when the gate's P(Stage A is correct) = sigmoid({policy.a:.6g} * gate logit + {policy.b:.6g}) "
        f"is at or above {policy.exit_threshold:.6g}"
    )


def make_router(policy: Policy, max_rows: int) -> Router:
    """Make the compiled router of a policy's exit rule; what it routed and merged goes to ``sets.answer_sets``.

    The rule that was certified compares scores in float64; the router's are float32. They are one rule where float32
    tells scores at the threshold apart as finely as calibration does, which parts no two scores that differ by a
    runtime's rounding (``certify.NOISE``). Near 1 (beyond some .995) float32 cannot, and the policy is refused.

    Args:
        policy: any; its gate logits go to ``Router.route`` unless it is softmax.
        max_rows: the largest batch.

    Raises:
        InputError: float32 does not decide as the policy does; serve with ``Cascade``.
    """
    platt = None if isinstance(policy, Thresholds) else (policy.a, policy.b)
    threshold = policy.exit_threshold
    if threshold > 1:
        # In float32 just above 1 is 1, which a saturated score reaches.
        return Router(max_rows, threshold=np.inf, platt=platt)
    if threshold > 0:
        rounding, size = _float32_rounding(threshold, 0.0 if platt is None else platt[1])
        if not rounding <= NOISE * (1 + size):
            raise InputError(
                f"exit_threshold must be one at which float32 decides as float64 does (up to about 0.995), got "
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


def read_policy(folder: Path | str) -> Policy | None:
    """Read the active policy of a run or bundle; None when there is none.

    Raises:
        ArtifactError: more than one policy file, or a damaged one.
    """
    found = [name for name in POLICY_FILES.values() if (Path(folder) / name).is_file()]
    if len(found) > 1:
        raise ArtifactError(f"{folder} must hold exactly one policy file, got {', '.join(found)}; calibrate again")
    if not found:
        return None
    (record,) = (POLICIES[name] for name, file in POLICY_FILES.items() if file == found[0])
    return record.read(Path(folder) / found[0])


def void(policy: Policy) -> str:
    """What follows for a promise where something that it stands on has changed; empty when there is none."""
    return "" if policy.guarantee == "none" else ", so its certificate is void"


def withdraw_policies(folder: Path | str) -> list[str]:
    """Remove every policy file of a folder; give the names of those that were there."""
    found = [name for name in POLICY_FILES.values() if (Path(folder) / name).is_file()]
    for name in found:
        (Path(folder) / name).unlink()
    return found
