"""Training losses, a table: cross entropy of both class heads, and SelectiveNet's selective risk with its hinge.

After Geifman and El-Yaniv, "SelectiveNet: A Deep Neural Network with an Integrated Reject Option", ICML 2019.

A loss is defined by sums, which add up over micro-batches and processes, and by its value as a function of the whole
batch's sums. So the gradient of an effective batch does not depend on how it is cut.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from stage1_pro.config import TrainConfig
from stage1_pro.models.model import Outputs
from stage1_pro.registry import Registry

# Keeps the selective risk finite when every soft gate is shut; far below the sum of one open gate.
EPSILON = 1e-6


@dataclass(frozen=True)
class Part:
    """Rows of a batch as a loss sees them: ``outputs``, ``labels`` [B] and the classes' ``weights`` [K].

    ``progress`` is the share of the training's steps that are done, in [0, 1), for losses with a schedule.
    """

    outputs: Outputs
    labels: Tensor
    weights: Tensor
    progress: float = 0.0


class Loss(Protocol):
    """One term of the training loss.

    Attributes:
        adds: whether ``of`` is linear in the sums and gives a sum over rows. The mean over the batch is then the sum of
            the parts' shares, and no pass over the batch is needed before the first step back.
        reads_gate: whether the gate learns from it.
    """

    adds: bool
    reads_gate: bool

    def sums(self, part: Part) -> Tensor:
        """Sums over the rows of a part, [S]."""

    def of(self, sums: Tensor) -> Tensor:
        """The loss, a scalar, lower is better: of the rows together where it ``adds``, else per row."""


class CrossEntropy:
    """Weighted cross entropy of the classifier and of the auxiliary head, summed over rows."""

    adds, reads_gate = True, False

    def __init__(self, options: TrainConfig) -> None:
        self.weights = (options.classifier_weight, options.auxiliary_weight)
        self.label_smoothing = options.label_smoothing

    def sums(self, part: Part) -> Tensor:
        """Cross entropy of both heads, each summed over rows, [2]."""
        both = (part.outputs.logits_a, part.outputs.logits_b)
        return torch.stack([row_losses(logits, part, self.label_smoothing).sum() for logits in both])

    def of(self, sums: Tensor) -> Tensor:
        """``classifier_weight`` and ``auxiliary_weight`` times the heads' sums."""
        return self.weights[0] * sums[0] + self.weights[1] * sums[1]


class Selective:
    """Selective risk with its coverage hinge; a ratio, so it needs the whole batch's sums.

    ``selective_weight · Σ g·CE / (Σ g + ε) + coverage_weight · max(0, target_coverage - mean g)²`` for
    g = sigmoid(gate). Without the hinge the risk has a trivial minimum: a gate that shuts on all but a few easy rows.
    """

    adds, reads_gate = False, True

    def __init__(self, options: TrainConfig) -> None:
        self.selective_weight, self.coverage_weight = options.selective_weight, options.coverage_weight
        self.target_coverage, self.label_smoothing = options.target_coverage, options.label_smoothing

    def sums(self, part: Part) -> Tensor:
        """[sum of g·CE, sum of g, rows]."""
        soft = torch.sigmoid(part.outputs.gate_logit.float())
        losses = row_losses(part.outputs.logits_a, part, self.label_smoothing)
        return torch.stack([(soft * losses).sum(), soft.sum(), soft.new_tensor(float(len(part.labels)))])

    def of(self, sums: Tensor) -> Tensor:
        """Weighted selective risk plus weighted hinge."""
        weighted, opened, rows = sums.unbind()
        short = (self.target_coverage - opened / rows).clamp_min(0)
        return self.selective_weight * weighted / (opened + EPSILON) + self.coverage_weight * short**2


# What `train.losses` can name. The first two are always there: their own keys weigh them.
LOSSES: Registry[Callable[[TrainConfig], Loss]] = Registry(
    "train.losses", "stage1_pro.losses", {"cross_entropy": CrossEntropy, "selective": Selective}
)


class Objective:
    """The configured losses with their weights, as a training step needs them.

    Raises:
        InputError: ``train.losses`` names one that is not known.
    """

    def __init__(self, options: TrainConfig) -> None:
        wanted = {"cross_entropy": 1.0}
        if options.selective_weight > 0 or options.coverage_weight > 0:
            wanted["selective"] = 1.0
        losses = [(weight, LOSSES.find(name)(options)) for name, weight in {**wanted, **options.losses}.items()]
        self.reads_gate = any(loss.reads_gate for _, loss in losses)
        self.ratios = [(weight, loss) for weight, loss in losses if not loss.adds]
        self._added = [(weight, loss) for weight, loss in losses if loss.adds]

    def added(self, part: Part) -> Tensor:
        """Losses that add up, summed over the rows of a part, a scalar."""
        return functools.reduce(operator.add, (weight * loss.of(loss.sums(part)) for weight, loss in self._added))

    def sums(self, part: Part) -> list[Tensor]:
        """Sums over a part of each loss that does not add up, [S] each."""
        return [loss.sums(part) for _, loss in self.ratios]

    def shared(self, own: list[Tensor], whole: list[Tensor]) -> Tensor:
        """Those losses per row of the whole batch, a scalar, with the gradient of a part of it."""
        given = zip(self.ratios, own, whole, strict=True)
        terms = (weight * loss.of(as_share(part, batch)) for (weight, loss), part, batch in given)
        return functools.reduce(operator.add, terms)


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Class weights [K], inverse to the class's frequency and 1 on average over the rows."""
    counts = torch.bincount(labels, minlength=classes).clamp_min(1)
    return labels.numel() / (classes * counts.to(torch.float32))


def as_share(part: Tensor, whole: Tensor) -> Tensor:
    """The sums of a whole batch [S] with the gradient of a part of it: the parts' gradients add up to the batch's.

    A ratio of sums is no sum of the parts' ratios. But its gradient is the gradient of each part's sums times factors
    that depend on the whole's sums alone, so the value is the whole's and only the part is differentiated.
    """
    return whole.detach() + (part - part.detach())


def row_losses(logits: Tensor, part: Part, label_smoothing: float) -> Tensor:
    """Weighted cross entropy of every row [B]."""
    return functional.cross_entropy(
        logits.float(), part.labels, weight=part.weights, reduction="none", label_smoothing=label_smoothing
    )
