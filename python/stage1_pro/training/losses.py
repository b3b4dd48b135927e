"""Training losses: cross entropy of both class heads, and SelectiveNet's selective risk with its coverage hinge.

After Geifman and El-Yaniv, "SelectiveNet: A Deep Neural Network with an Integrated Reject Option", ICML 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stage1_pro.models.model import Outputs

# Keeps the selective risk finite when every soft gate is shut; far below the sum of one open gate.
EPSILON = 1e-6


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Class weights [K], inverse to the class's frequency and 1 on average over the rows."""
    counts = torch.bincount(labels, minlength=classes).clamp_min(1)
    return labels.numel() / (classes * counts.to(torch.float32))


def joint_loss(
    outputs: Outputs,
    labels: Tensor,
    weights: Tensor,
    *,
    auxiliary_weight: float,
    label_smoothing: float,
    classifier_weight: float = 1.0,
) -> Tensor:
    """Summed weighted cross entropy of classifier and auxiliary head, a scalar >= 0; lower is better.

    A sum, not a mean: the caller divides by the rows of the whole effective batch, so that
    micro-batches and processes add up to the same gradient.
    """
    losses = [
        _row_losses(logits, labels, weights, label_smoothing).sum() for logits in (outputs.logits_a, outputs.logits_b)
    ]
    return classifier_weight * losses[0] + auxiliary_weight * losses[1]


def selective_sums(outputs: Outputs, labels: Tensor, weights: Tensor, *, label_smoothing: float) -> Tensor:
    """What the selective loss is made of, over these rows: [sum of g·CE, sum of g, rows] for g = sigmoid(gate), [3].

    Sums of parts of a batch add up to those of the batch; means do not.
    """
    soft = torch.sigmoid(outputs.gate_logit.float())
    losses = _row_losses(outputs.logits_a, labels, weights, label_smoothing)
    return torch.stack([(soft * losses).sum(), soft.sum(), soft.new_tensor(float(len(labels)))])


def selective_loss(sums: Tensor, *, selective_weight: float, coverage_weight: float, target_coverage: float) -> Tensor:
    """Selective risk with its coverage hinge, a scalar >= 0; lower is better.

    ``selective_weight · Σ g·CE / (Σ g + ε) + coverage_weight · max(0, target_coverage - mean g)²``. Without the hinge
    the risk has a trivial minimum: a gate that shuts on all but a few easy rows.

    Args:
        sums: [3] of ``selective_sums``, over the whole effective batch.
        selective_weight: of the selective risk.
        coverage_weight: of the hinge.
        target_coverage: mean soft gate below which the hinge pulls, in (0, 1].
    """
    weighted, opened, rows = sums.unbind()
    short = (target_coverage - opened / rows).clamp_min(0)
    return selective_weight * weighted / (opened + EPSILON) + coverage_weight * short**2


def as_share(part: Tensor, whole: Tensor) -> Tensor:
    """The sums of a whole batch [3] with the gradient of a part of it: the parts' gradients add up to the batch's.

    A ratio of sums is no sum of the parts' ratios. But its gradient is the gradient of each part's sums times factors
    that depend on the whole's sums alone, so the value is the whole's and only the part is differentiated.
    """
    return whole.detach() + (part - part.detach())


def _row_losses(logits: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float) -> Tensor:
    return functional.cross_entropy(
        logits.float(), labels, weight=weights, reduction="none", label_smoothing=label_smoothing
    )
