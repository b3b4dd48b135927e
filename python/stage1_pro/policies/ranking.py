"""What ranks Stage A's answers better, the gate or max softmax: AUGRC of both and their paired difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from stage1_pro.data.predictions import Predictions
from stage1_pro.errors import ArtifactError
from stage1_pro.metrics.estimate import Interval
from stage1_pro.metrics.intervals import bootstrap_augrc, compare
from stage1_pro.metrics.measured import Metric
from stage1_pro.policies.softmax import confidence, softmax
from stage1_pro.record import Record


class GateChoice(Record):
    """``gate.json``: how the gate was fitted, and what ranks answers better on ``val_select``, it or max softmax."""

    format_version: Literal[1] = 1
    fit: Literal["out_of_fold", "joint"]
    form: str = Field(description="features and margin, margin alone, or joint: as training left it")
    reason: str = Field("", description="why the form is the margin alone")
    folds: int | None = None
    views: int | None = None
    strength: float | None = Field(None, description="penalty per row, the best on rows out of fold")
    n_rows: int = Field(0, description="rows it was fitted on, every view counted")
    n_groups: int = 0
    n_errors: int = Field(0, description="wrong answers among them")
    split: Literal["val_select"] = "val_select"
    split_hash: str
    model_fingerprint: str
    gate_augrc: Metric
    softmax_augrc: Metric
    joint_gate_augrc: Metric | None = Field(None, description="of the gate before it was refitted")
    difference: Metric = Field(description="AUGRC of the gate minus that of max softmax, paired, by group")
    asked: Literal["auto", "softmax", "gate"]
    confidence: Literal["softmax", "gate"] = Field(description="which one says how sure an answer is")

    @classmethod
    def of(cls, found: Mapping[str, Interval], predictions: Predictions, asked: str, **facts: Any) -> Self:
        """The record of what ``rank_answers`` found, as it was asked for; ``facts`` say how the gate was fitted."""
        better = "gate" if found[GATE].value < found[SOFTMAX].value else "softmax"
        figures = {name: Metric.of(name, found[name]) for name in (GATE, SOFTMAX, JOINT) if name in found}
        difference = Metric.of(DIFFERENCE, found[DIFFERENCE])
        return cls.model_validate({
            **facts, **figures, "difference": difference, "split_hash": predictions.split_hash, "asked": asked,
            "model_fingerprint": predictions.model_fingerprint, "confidence": better if asked == "auto" else asked,
        })  # fmt: skip


GATE, SOFTMAX, JOINT, DIFFERENCE = "gate_augrc", "softmax_augrc", "joint_gate_augrc", "gate_minus_softmax_augrc"


def rank_answers(
    predictions: Predictions, *, n_replicates: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Interval]:
    """AUGRC of Stage A's answers ranked by the gate and by max softmax, in [0, 0.5], lower is better, by group.

    ``gate_minus_softmax_augrc`` is paired: both are measured on the same resamples, and a negative one speaks for the
    gate. ``joint_gate_augrc``, of the gate before it was refitted, is there when the predictions hold it. Any strictly
    monotone rescaling of a score, such as Platt's, leaves its AUGRC as it is.

    Raises:
        ArtifactError: a gate logit is NaN.
    """
    probs = softmax(predictions.logits_a)
    wrong = probs.argmax(1) != predictions.labels
    scores = {GATE: predictions.gate_logits.astype(np.float64), SOFTMAX: confidence(probs)}
    if predictions.joint_gate_logits is not None:
        scores[JOINT] = predictions.joint_gate_logits.astype(np.float64)
    for name, values in scores.items():
        broken = np.flatnonzero(np.isnan(values))
        if broken.size:
            row = predictions.row_ids[broken[0]]
            raise ArtifactError(f"scores of {name} must be numbers, got NaN for row {row}; train again")
    groups = predictions.groups
    found = {
        name: bootstrap_augrc(values, wrong, groups=groups, n_replicates=n_replicates, level=level, seed=seed)
        for name, values in scores.items()
    }
    found[DIFFERENCE] = compare(
        probs, probs, predictions.labels, confidence=(scores[GATE], scores[SOFTMAX]), groups=groups,
        metrics=["augrc"], n_replicates=n_replicates, level=level, seed=seed,
    )["augrc"]  # fmt: skip
    return found
