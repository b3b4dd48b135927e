"""Exit policies: which answers of Stage A stand. NumPy only; exactly one policy is active in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.artifacts import POLICY_FILES, GateParams, Policy, Thresholds
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.policies import gate
from stage1_pro.policies.softmax import confidence, decide

__all__ = ["exit_rule", "exit_scores", "exits", "read_policy", "withdraw_policies"]


def exits(policy: Policy, probs: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Say which rows [N] Stage A answers under a policy; the one rule of evaluation, cascade and reports.

    A row exits iff its score (``exit_scores``) is at or above the policy's threshold; NaN never does.

    Args:
        policy: of this model.
        probs: [N, K] probabilities of Stage A.
        gate_logits: [N], for the gate policy.

    Raises:
        InputError: another number of classes than the policy's, or gate logits that are missing.
    """
    if isinstance(policy, Thresholds):
        return decide(probs, policy)
    exited: NDArray[np.bool_] = exit_scores(policy, probs, gate_logits) >= policy.threshold
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
        raise InputError(f"gate_logits must have shape [{len(values)}] for the gate policy, got {got}")
    known = np.isfinite(values).all(axis=1)
    scores: NDArray[np.float64] = np.where(known, gate.score(gate_logits, policy.a, policy.b), np.nan)
    return scores


def exit_rule(policy: Policy) -> str:
    """The rule in words."""
    if isinstance(policy, GateParams):
        return (
            f"exit when the gate's P(Stage A is correct) = sigmoid({policy.a:.6g} * gate logit + {policy.b:.6g}) "
            f"is at or above {policy.threshold:.6g}"
        )
    return f"exit when the largest probability of Stage A is at or above {policy.exit_threshold:.6g}"


def read_policy(folder: Path | str) -> Policy | None:
    """Read the active policy of a run or bundle; None when there is none.

    Raises:
        ArtifactError: more than one policy file, a damaged one, or a kind this version cannot apply.
    """
    found = [name for name in POLICY_FILES.values() if (Path(folder) / name).is_file()]
    if len(found) > 1:
        raise ArtifactError(f"{folder} must hold exactly one policy file, got {', '.join(found)}; calibrate again")
    if not found:
        return None
    if found[0] == POLICY_FILES["gate"]:
        return GateParams.read(Path(folder) / found[0])
    if found[0] != POLICY_FILES["softmax"]:
        raise ArtifactError(f"{folder} must hold a policy this version knows, got {found[0]}; calibrate again")
    return Thresholds.read(Path(folder) / found[0])


def withdraw_policies(folder: Path | str) -> list[str]:
    """Remove every policy file of a folder; give the names of those that were there."""
    found = [name for name in POLICY_FILES.values() if (Path(folder) / name).is_file()]
    for name in found:
        (Path(folder) / name).unlink()
    return found
