"""The gate refitted after training: P(Stage A is correct | x), from answers of heads that had not seen the row's label.

On the rows it learned from, a network is right nearly always, so a gate fitted on that says "right" to everything.
Here the train rows are cut into folds by group; each fold is answered by a head fitted on the other folds, and the gate
is fitted on whether those answers were right. The backbone itself has seen every train row: what keeps this from being
too rosy again are views, augmented draws that training did not make (on traffic signs a classifier that is right on
98% of clean train rows and 92% of new ones is right on 95% of these).

Everything is convex and solved in float64 by L-BFGS: the same features give the same gate. NumPy in, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from threadpoolctl import threadpool_limits

from stage1_pro.errors import InputError

Array = NDArray[np.float64]
Form = Literal["features and margin", "margin alone"]

# L2 penalty of a fold's head on standardised features, per row. Thirty times more or less moved the gate's AUGRC on
# traffic signs by 3%.
HEAD_STRENGTH = 0.003
# Candidates for the gate's penalty on features, per row; the margin is all but free.
GATE_STRENGTHS = (0.001, 0.01, 0.1, 1.0)
_MARGIN_PENALTY = 1.0
# With fewer groups in error a weight per feature is guesswork.
FEWEST_ERROR_GROUPS = 10
# Per row; the objectives are convex, and what is left to gain below this moves no ranking.
_SOLVER = {"maxiter": 300, "ftol": 1e-8, "gtol": 1e-4, "maxcor": 20}


@dataclass(frozen=True)
class GateFit:
    """A linear gate on [features, margin] as they come: ``weight`` [F + 1], ``bias``, and how it was made.

    ``strength`` is the penalty per row that was chosen, None where there was nothing to choose; ``reason`` says why the
    form is the margin alone. ``n_rows`` counts every view of a row.
    """

    weight: Array
    bias: float
    form: Form
    strength: float | None
    n_rows: int
    n_groups: int
    n_errors: int
    reason: str = ""


def margin(logits: NDArray[Any]) -> Array:
    """The largest logit minus the second largest, [N] >= 0; higher is surer. Logits are [N, K], K >= 2."""
    top: Array = np.partition(np.asarray(logits, dtype=np.float64), -2, axis=1)[:, -2:]
    return top[:, 1] - top[:, 0]


def fold_of(groups: Sequence[str], folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of every row [N], 0 to ``folds`` - 1 (fewer with fewer groups); rows of a group are never parted."""
    names, member = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
    place = np.random.Generator(np.random.Philox(seed)).permutation(names.size) % min(folds, names.size)
    return place[member].astype(np.int64)


def fit_head(features: NDArray[Any], labels: NDArray[Any], weights: Array, classes: int) -> tuple[Array, Array]:
    """A linear classifier of features [N, F] by penalised, weighted cross entropy: matrix [F, K] and offsets [K]."""
    centre, scale = _standard(features)
    rows = (features - centre) / scale
    n, width = rows.shape
    penalty = HEAD_STRENGTH * n
    each = np.arange(n)

    def objective(point: Array) -> tuple[float, Array]:
        matrix, offsets = point[: width * classes].reshape(width, classes), point[width * classes :]
        logs = log_softmax(rows @ matrix + offsets, axis=1)
        value = -float(weights @ logs[each, labels]) + 0.5 * penalty * float((matrix**2).sum())
        residual = np.exp(logs)
        residual[each, labels] -= 1
        residual *= weights[:, None]
        return value / n, np.concatenate([(rows.T @ residual + penalty * matrix).ravel(), residual.sum(0)]) / n

    point = _solve(objective, np.zeros((width + 1) * classes))
    matrix = point[: width * classes].reshape(width, classes) / scale[:, None]
    return matrix, point[width * classes :] - centre @ matrix


def fit_gate(
    views: Sequence[NDArray[Any]],
    logits: Sequence[NDArray[Any]],
    labels: NDArray[np.int64],
    groups: Sequence[str],
    class_weights: NDArray[Any],
    *,
    folds: int,
    seed: int,
) -> GateFit:
    """Fit the gate on whether held-out answers on train rows were right; no label is seen by the head that answers it.

    The margin of a fold's head is brought to the mean margin of the trained classifier, whose margin the gate will
    read. With no error (or nothing but errors, or errors in fewer than ten groups) the gate is the margin alone, which
    ranks as max softmax does for two classes, and the reason is told.

    Args:
        views: features of the train rows at the tap [N, F], once per view.
        logits: the trained classifier's on the same [N, K]; for the scale of its margin only.
        labels: [N] class indices.
        groups: [N] names.
        class_weights: [K], as in training.
        folds: how many parts, >= 2.
        seed: of the cut into folds.

    Raises:
        InputError: no view, or fewer than two folds.
    """
    if not views or folds < 2:
        raise InputError(f"views must be one or more and folds 2 or more, got {len(views)} and {folds}; 5 are usual")
    names, truth = np.tile(np.asarray(groups, dtype=np.str_), len(views)), np.tile(labels, len(views))
    fold = np.tile(fold_of(groups, folds, seed), len(views))
    row_weights = np.asarray(class_weights, dtype=np.float64)[truth]
    features = np.concatenate([np.asarray(view, dtype=np.float64) for view in views])
    n, n_groups = truth.size, np.unique(names).size

    def margin_alone(n_errors: int, reason: str) -> GateFit:
        weight = np.append(np.zeros(features.shape[1]), 1.0)
        return GateFit(weight, 0.0, "margin alone", None, n, n_groups, n_errors, reason)

    if n_groups < 2:
        return margin_alone(0, "all train rows are of one group: nothing is held out")
    # One BLAS thread: the same bytes whatever their number, and ten times faster beside busy processes.
    with threadpool_limits(limits=1, user_api="blas"):
        own = margin(np.concatenate(list(logits)))
        sure, right = np.empty(n), np.empty(n, dtype=bool)
        for part in range(int(fold.max()) + 1):
            held = fold == part
            matrix, offsets = fit_head(features[~held], truth[~held], row_weights[~held], classes=len(class_weights))
            given = features[held] @ matrix + offsets
            sure[held] = margin(given)
            if (mean := sure[held].mean()) > 0:
                sure[held] *= own[held].mean() / mean
            right[held] = given.argmax(1) == truth[held]
        errors = int((~right).sum())
        if errors in (0, n):
            words = "no answer" if errors == 0 else "every answer"
            reason = f"{words} on held-out train rows was wrong: correctness has one value and cannot be fitted"
            return margin_alone(errors, reason)

        inputs = np.column_stack([features, sure])
        centre, scale = _standard(inputs)
        inputs = (inputs - centre) / scale
        target = right.astype(np.float64)
        error_groups = np.unique(names[~right]).size
        if error_groups >= FEWEST_ERROR_GROUPS:
            strength = _choose_strength(inputs, target, fold)
            point = _logistic(inputs, target, strength * n)
            weight = point[:-1] / scale
            bias = float(point[-1] - centre @ weight)
            return GateFit(weight, bias, "features and margin", strength, n, n_groups, errors)
        reason = f"only {error_groups} group(s) hold a wrong answer: too few to weigh features by"
        point = np.concatenate([np.zeros(features.shape[1]), _logistic(inputs[:, -1:], target, 0.0)])
        weight = point[:-1] / scale
        if weight[-1] <= 0:
            return margin_alone(errors, f"{reason}, and the margin does not tell them")
        bias = float(point[-1] - centre @ weight)
        return GateFit(weight, bias, "margin alone", None, n, n_groups, errors, reason)


def _choose_strength(inputs: Array, target: Array, fold: NDArray[np.int64]) -> float:
    """The penalty with the lowest log loss on folds the gate was not fitted on; the stronger one on a tie."""
    losses = np.zeros(len(GATE_STRENGTHS))
    for part in range(int(fold.max()) + 1):
        held = fold == part
        point: Array | None = None
        for k in reversed(range(len(GATE_STRENGTHS))):
            strength = GATE_STRENGTHS[k] * int((~held).sum())
            point = _logistic(inputs[~held], target[~held], strength, start=point)
            score = inputs[held] @ point[:-1] + point[-1]
            losses[k] += float((np.logaddexp(0, score) - target[held] * score).sum())
    return GATE_STRENGTHS[len(losses) - 1 - int(losses[::-1].argmin())]


def _logistic(inputs: Array, target: Array, strength: float, start: Array | None = None) -> Array:
    """Weights and, last, the bias of a logistic regression; ``strength`` penalises all weights but the margin's."""
    penalties = np.append(np.full(inputs.shape[1] - 1, strength), _MARGIN_PENALTY)
    n = target.size

    def objective(point: Array) -> tuple[float, Array]:
        weight = point[:-1]
        score = inputs @ weight + point[-1]
        value = float((np.logaddexp(0, score) - target * score).sum() + 0.5 * (penalties * weight**2).sum())
        residual = expit(score) - target
        return value / n, np.concatenate([inputs.T @ residual + penalties * weight, [residual.sum()]]) / n

    return _solve(objective, np.zeros(inputs.shape[1] + 1) if start is None else start)


def _solve(objective: Any, start: Array) -> Array:
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=_SOLVER)
    point: Array = np.asarray(found.x, dtype=np.float64)
    return point


def _standard(values: NDArray[Any]) -> tuple[Array, Array]:
    """Mean and standard deviation of every column; 1 where a column is constant."""
    centre, scale = values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64)
    return centre, np.where(scale > 1e-12 * (1 + np.abs(centre)), scale, 1.0)
