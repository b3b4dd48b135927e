"""Training losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stage1_pro.models.model import Outputs


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Class weights [K], inverse to the class's frequency and 1 on average over the rows."""
    counts = torch.bincount(labels, minlength=classes).clamp_min(1)
    return labels.numel() / (classes * counts.to(torch.float32))


def joint_loss(
    outputs: Outputs, labels: Tensor, weights: Tensor, *, auxiliary_weight: float, label_smoothing: float
) -> Tensor:
    """Summed weighted cross entropy of classifier and auxiliary head, a scalar.

    A sum, not a mean: the caller divides by the rows of the whole effective batch, so that
    micro-batches and processes add up to the same gradient.
    """
    losses = [
        functional.cross_entropy(
            logits.float(), labels, weight=weights, reduction="none", label_smoothing=label_smoothing
        ).sum()
        for logits in (outputs.logits_a, outputs.logits_b)
    ]
    return losses[0] + auxiliary_weight * losses[1]
