"""``model.tap: auto``: the cheapest block to read Stage A at, by what a cascade of linear probes costs at equal risk.

Probes on the starting backbone, not trainings: a candidate costs part of one forward pass and a convex fit. They judge
where the class can be read before fine-tuning, which moves it; a tap that matters should be confirmed by trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from threadpoolctl import threadpool_limits

from stage1_pro.metrics.selective import augrc
from stage1_pro.policies.softmax import confidence, softmax
from stage1_pro.record import Record
from stage1_pro.training.gate_head import fit_head


class TapCandidate(Record):
    """One block that Stage A could read, measured by a linear probe on ``val_select``."""

    tap: int
    accuracy: float
    augrc: float
    exits: float = Field(description="largest exit rate at which the cascade errs no more than Stage B alone")
    cascade_error: float
    cost: float = Field(description="blocks run per photo at that rate, as a share of all")


class TapChoice(Record):
    """``tap.json``: what ``model.tap: auto`` measured and chose."""

    format_version: Literal[1] = 1
    n_blocks: int
    tap: int
    error_b: float = Field(description="error of the probe at the last block, the risk that is kept")
    candidates: list[TapCandidate]
    split_hashes: dict[str, str]


def candidates(n_blocks: int) -> list[int]:
    """Blocks at a third, a half, two thirds and the end of a backbone, ascending and different."""
    return sorted({max(1, round(share * n_blocks)) for share in (1 / 3, 1 / 2, 2 / 3, 1)})


def cost(tap: int, n_blocks: int, exits: float) -> float:
    """Blocks run per photo as a share of all, in (0, 1]; lower is better. An exit runs ``tap`` blocks, the rest all."""
    share = tap / n_blocks
    return share + (1 - exits) * (1 - share)


def largest_exit(
    sure: NDArray[np.float64], wrong_a: NDArray[np.bool_], wrong_b: NDArray[np.bool_]
) -> tuple[float, float]:
    """The largest exit rate at which the cascade errs no more than Stage B alone, and its error there; both in [0, 1].

    Rows exit from the surest down; a tie group is never cut. Nobody exits when no rate keeps the error.
    """
    order = np.argsort(-sure, kind="stable")
    extra = np.cumsum(wrong_a[order].astype(np.int64) - wrong_b[order].astype(np.int64))
    ends = np.flatnonzero(np.append(np.diff(sure[order]) != 0, True))
    kept = ends[extra[ends] <= 0]
    errors = int(wrong_b.sum())
    if kept.size == 0:
        return 0.0, errors / sure.size
    last = int(kept[-1])
    return (last + 1) / sure.size, (errors + int(extra[last])) / sure.size


def choose_tap(
    train: Mapping[int, NDArray[Any]],
    select: Mapping[int, NDArray[Any]],
    labels: tuple[NDArray[np.int64], NDArray[np.int64]],
    class_weights: NDArray[Any],
    split_hashes: Mapping[str, str],
) -> TapChoice:
    """Measure every candidate by a probe fitted on ``train`` and judged on ``val_select``; the cheapest is chosen.

    Stage B is the probe at the last block. Of equal costs the later block is taken, whose probe has seen more. Features
    [N, F] of both splits are by block, the last one among them; ``labels`` are of both, class indices.
    """
    n_blocks, classes = max(train), len(class_weights)
    weights = np.asarray(class_weights, dtype=np.float64)[labels[0]]
    probs = {}
    with threadpool_limits(limits=1, user_api="blas"):
        for tap, features in train.items():
            matrix, offsets = fit_head(np.asarray(features, dtype=np.float64), labels[0], weights, classes)
            probs[tap] = softmax(np.asarray(select[tap], dtype=np.float64) @ matrix + offsets)
    wrong = {tap: p.argmax(1) != labels[1] for tap, p in probs.items()}
    found: list[TapCandidate] = []
    for tap in sorted(probs):
        sure = confidence(probs[tap])
        exits, error = largest_exit(sure, wrong[tap], wrong[n_blocks])
        found.append(
            TapCandidate(
                tap=tap,
                accuracy=float(1 - wrong[tap].mean()),
                augrc=augrc(sure, wrong[tap]),
                exits=exits,
                cascade_error=error,
                cost=cost(tap, n_blocks, exits),
            )
        )
    best = min(found, key=lambda one: (one.cost, -one.tap))
    return TapChoice(
        n_blocks=n_blocks, tap=best.tap, error_b=float(wrong[n_blocks].mean()), candidates=found,
        split_hashes={name: split_hashes[name] for name in ("train", "val_select")},
    )  # fmt: skip


def table(choice: TapChoice) -> Sequence[str]:
    """The candidates as lines of text."""
    head = f"cost at the error of Stage B alone ({choice.error_b:.4f}), val_select, {choice.n_blocks} blocks"
    lines = [
        f"tap: linear probes on the starting backbone; {head}",
        "  tap  accuracy    AUGRC   exits  cascade error   cost",
    ]
    for one in choice.candidates:
        cells = f"{one.tap:>5}{one.accuracy:>10.4f}{one.augrc:>9.5f}{one.exits:>8.3f}{one.cascade_error:>15.4f}"
        lines.append(f"{cells}{one.cost:>7.3f}{'  chosen' if one.tap == choice.tap else ''}")
    return lines
